"""`lm train` option by option: budgets, sources of text, and the folders it writes."""

import json
import re
import shutil
import sys

import pytest
import yaml
from small_runs import SMALL

LINES = [f"The baker of village {i} sold {i % 7} loaves and went home.\n" for i in range(200)]


@pytest.fixture
def text(tmp_path):
    """A file of 200 lines, one document."""
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    return path


@pytest.fixture
def train(inside, tmp_path):
    """train(*arguments): recipe.yaml of a successful run in tmp_path/"run"."""

    def call(*arguments, stdin: bytes = b"") -> dict:
        done = inside("train", *arguments, "-o", tmp_path / "run", *SMALL, stdin=stdin)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode() == f"{tmp_path / 'run'}\n"
        return yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())

    return call


def losses(folder) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


# 128 tokens a step of 4 rows
@pytest.mark.parametrize(
    "budget, steps",
    [
        (("--steps", 3), 3),
        (("--tokens", 640), 5),
        (("--tokens", 641), 6),
        (("--steps", 9, "--tokens", 256), 2),
        (("--steps", 2, "--tokens", 10**6), 2),
        (("--set", "train.steps=4"), 4),
    ],
)
def test_the_first_budget_reached_ends_the_run(train, text, tmp_path, budget, steps):
    recipe = train(text, *budget)
    assert recipe["result"]["steps"] == len(losses(tmp_path / "run")) == steps
    assert recipe["result"]["tokens"] == 128 * steps
    assert recipe["train"]["time"] == 0  # the preset's own budget is gone


def test_epochs_are_passes_over_the_training_set(train, text, tmp_path):
    recipe = train(text, "--epochs", 0.5)
    assert recipe["result"]["tokens"] == pytest.approx(recipe["data"]["tokens"] / 2, abs=128 + 32)


def test_rates_warm_up_and_decay(train, text, tmp_path):
    train(
        text,
        "--steps",
        20,
        "--set",
        "train.warmup=0.25",
        "--set",
        "train.schedule=linear",
        "--set",
        "train.learning_rate=1e-3",
    )
    rates = [row["learning_rate"] for row in losses(tmp_path / "run")]
    assert rates[5] == max(rates) == 1e-3 and rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] == pytest.approx(1e-3 / 15)


def test_same_seed_gives_the_same_bytes_and_another_does_not(inside, text, tmp_path):
    weights = []
    for i, seed in enumerate((5, 5, 6)):
        assert (
            inside(
                "train", text, "-o", tmp_path / str(i), *SMALL, "--steps", 6, "--seed", seed
            ).returncode
            == 0
        )
        weights.append((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    "variables, reason",
    [
        ({"CC": "/nonexistent"}, "CC=/nonexistent was not found"),
        ({"CC": "false"}, "false fails: exit code 1"),
        ({"CC": "", "PATH": ""}, "no C compiler (cc, gcc, clang) was found"),
        ({"LM_KERNELS": "0"}, "LM_KERNELS=0"),
    ],
)
def test_without_compiled_kernels_training_works_and_says_why(
    variables, reason, inside, text, tmp_path, monkeypatch
):
    from lmcli.kernels import build

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cached = (build.library, build.problem, build._loaded)
    for function in cached:
        function.cache_clear()
    try:
        done = inside("train", text, "-o", tmp_path / "run", *SMALL, "--steps", 2)
    finally:
        for function in cached:
            function.cache_clear()
    assert (done.returncode, done.stdout.decode()) == (0, f"{tmp_path / 'run'}\n")
    assert len(losses(tmp_path / "run")) == 2
    (stderr,) = (line for line in done.stderr.decode().splitlines() if "compiled kernels" in line)
    if sys.platform == "linux":
        assert stderr.endswith(reason)


def test_accumulated_gradients_train_the_same_model(inside, text, tmp_path):
    logs = []
    for most in (0, 32, 96):
        assert (
            inside(
                "train",
                text,
                "-o",
                tmp_path / str(most),
                *SMALL,
                "--steps",
                5,
                "--dtype",
                "float32",
                "--set",
                f"train.micro_batch_tokens={most}",
            ).returncode
            == 0
        )
        logs.append(losses(tmp_path / str(most)))
    for rows in logs[1:]:
        assert [row["loss"] for row in rows] == pytest.approx(
            [row["loss"] for row in logs[0]], rel=1e-4
        )
        assert [row["tokens"] for row in rows] == [row["tokens"] for row in logs[0]]


def test_quiet_prints_nothing(inside, text, tmp_path):
    done = inside("train", text, "-o", tmp_path / "run", *SMALL, "--steps", 2, "-q")
    assert (done.returncode, done.stderr) == (
        0,
        b"",
    ) and done.stdout.decode() == f"{tmp_path / 'run'}\n"


def test_without_an_output_the_folder_is_runs_name_and_the_next_number(
    inside, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/text", "runs/text-2", "runs/text-3"):
        assert (
            inside("train", "text.txt", *SMALL, "--steps", 1, "-q").stdout.decode()
            == expected + "\n"
        )
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    (tmp_path / "runs").rename(tmp_path / ".runs")  # otherwise its files would be part of the text
    done = inside("train", "..", *SMALL, "--steps", 1, "-q")
    assert done.stdout.decode() == f"runs/{tmp_path.name}\n"  # and not runs/.., which is here


@pytest.mark.parametrize("documents, count", [("file", 1), ("line", 180), ("blank", 1)])
def test_what_a_document_is(inside, text, tmp_path, documents, count):
    done = inside(
        "train", text, "--documents", documents, "-o", tmp_path / "run", *SMALL, "--steps", 1
    )
    assert f"lm: {count} document{'s' * (count > 1)},".encode() in done.stderr
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    ranges = recipe["validation"][0]["ranges"].split()
    assert len(ranges) == (
        20 if documents == "line" else 1
    )  # every tenth of 200, or the end of one


def test_a_directory_a_jsonl_field_and_a_validation_file(train, tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b.txt").write_text("".join(LINES[:100]))
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"say": line, "text": 5}) + "\n" for line in LINES[100:])
    )
    (folder / "noise.bin").write_bytes(b"\0\xff" * 50)
    (folder / ".hidden").write_text("never read")
    (tmp_path / "val.txt").write_text("".join(LINES[:10]))
    recipe = train(folder, "--field", "say", "--val", tmp_path / "val.txt", "--steps", 2)
    assert recipe["data"]["files"] == [str(folder / "a.jsonl"), str(folder / "deep" / "b.txt")]
    assert recipe["data"]["bytes"] == len("".join(LINES))
    assert recipe["validation"] == [
        {"file": str(tmp_path / "val.txt"), "ranges": f"0-{len(''.join(LINES[:10]))}"}
    ]
    assert recipe["result"]["val_bytes"] == len("".join(LINES[:10]))


def test_standard_input_is_stored_for_validation_and_resuming(inside, train, tmp_path):
    recipe = train("-", "--steps", 2, stdin="".join(LINES).encode())
    assert recipe["data"]["files"][0].endswith(".txt") and "stdin" in recipe["data"]["files"][0]
    assert inside("perplexity", "-m", tmp_path / "run", "--validation").returncode == 0
    assert inside("train", "--resume", tmp_path / "run").returncode == 0


def test_tokenizer_is_used_unchanged(train, trained, text, tmp_path):
    recipe = train(text, "--tokenizer", trained[0], "--steps", 1)
    assert recipe["model"]["vocab_size"] == 512
    theirs, ours = (
        json.loads((folder / "tokenizer.json").read_text())
        for folder in (trained[0], tmp_path / "run")
    )
    assert ours == theirs


def test_a_run_can_overwrite_the_model_it_starts_from(inside, train, text, tmp_path):
    train(text, "--steps", 8)
    done = inside(
        "train",
        text,
        "--from",
        tmp_path / "run",
        "-o",
        tmp_path / "run",
        "--overwrite",
        "--preset",
        "tiny",
        "--steps",
        2,
        "--set",
        "train.batch_tokens=128",
    )
    assert done.returncode == 0 and b"context is 32 tokens, all that" in done.stderr
    assert len(losses(tmp_path / "run")) == 2


def test_fine_tuning_a_published_llama(inside, shared, tmp_path):
    origin = shared / "models" / "stories260K"
    text = tmp_path / "text.txt"
    text.write_bytes(
        (shared / "text" / "tinystories-sample.txt").read_bytes()[:60_000].rpartition(b"<|")[0]
    )
    done = inside(
        "train",
        text,
        "--from",
        origin,
        "-o",
        tmp_path / "run",
        "--preset",
        "tiny",
        "--steps",
        2,
        "--set",
        "train.learning_rate=1e-5",
        "--set",
        "train.matrix_learning_rate=1e-5",
        "--set",
        "train.batch_tokens=512",
    )
    assert done.returncode == 0, done.stderr.decode()
    config, before = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "run", origin)
    )
    sizes = (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    assert [config[key] for key in sizes] == [before[key] for key in sizes]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "<|endoftext|>" not in card  # not this model's beginning
    figures = [
        json.loads(inside("perplexity", "-m", folder, "--json", text).stdout)["bits_per_byte"]
        for folder in (origin, tmp_path / "run")
    ]
    assert figures[1] == pytest.approx(figures[0], rel=0.02)  # so it went on and did not begin anew


def test_the_starting_model_is_evaluated_and_kept_if_training_does_not_improve_on_it(
    inside, trained, text, tmp_path
):
    run, still = (
        tmp_path / "run",
        ("--set", "train.learning_rate=0", "--set", "train.matrix_learning_rate=0"),
    )
    done = inside(
        "train", text, "--from", trained[0], "-o", run, "--preset", "tiny", *still, "--steps", 2
    )
    first, *others = [
        line for line in done.stderr.decode().splitlines() if line.startswith("validation ")
    ]
    assert (
        first.endswith("(before the first step, best)")
        and others
        and not any("best" in line for line in others)
    )
    assert ", before the first of 2 steps (" in done.stderr.decode()
    rows = [
        row
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "val_loss" in row
    ]
    result = yaml.safe_load((run / "recipe.yaml").read_text())["result"]
    assert rows[0]["step"] == rows[0]["tokens"] == result["best_step"] == 0
    assert rows[0]["val_loss"] == rows[-1]["val_loss"]


@pytest.mark.parametrize(
    "arguments, rate, reasons",
    [
        ((), 5e-5, ["learning rate 5e-05: the budget is too small to try others"]),
        (("--lora", 2), 5e-4, ["learning rate 0.0005: the budget is too small to try others"]),
        (("--set", "train.learning_rate=2e-4"), 2e-4, []),
    ],
)
def test_fine_tuning_without_a_preset_uses_preset_finetune(
    inside, trained, text, tmp_path, arguments, rate, reasons
):
    done = inside(
        "train", text, "--from", trained[0], "-o", tmp_path / "run", "--steps", 2, *arguments
    )
    assert done.returncode == 0, done.stderr.decode()
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["choice"] == ["as preset finetune, since --from names a model", *reasons]
    assert all(f"lm: auto: {reason}\n" in done.stderr.decode() for reason in recipe["choice"])
    assert (recipe["train"]["optimizer"], recipe["train"]["learning_rate"]) == ("adamw", rate)


def test_a_longer_run_uses_the_best_rate_of_a_search(inside, trained, text, tmp_path):
    done = inside(
        "train",
        text,
        "--from",
        trained[0],
        "-o",
        tmp_path / "run",
        "--steps",
        360,
        "--threads",
        1,
        "--set",
        "train.batch_tokens=64",
        "--set",
        "train.context=32",
        "--set",
        "train.eval_every=360",
    )
    assert done.returncode == 0, done.stderr.decode()
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    reason = recipe["choice"][1]
    losses_by_rate = {
        float(rate): float(loss) for loss, rate in re.findall(r"([\d.]+) at ([\d.e-]+\d)", reason)
    }
    assert list(losses_by_rate) == [5e-5, 2.5e-4, 1.25e-3] and recipe["train"][
        "learning_rate"
    ] == min(losses_by_rate, key=losses_by_rate.get)
    assert losses(tmp_path / "run")[0]["step"] == 1 and recipe["result"]["steps"] == 360


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--set", "model.hidden_size=64"), "--from brings its own model"),
        (("--tokenizer", "x"), "leave --tokenizer out"),
    ],
)
def test_from_excludes_settings_of_model_and_tokenizer(
    inside, trained, text, tmp_path, arguments, expected
):
    done = inside("train", text, "--from", trained[0], "-o", tmp_path / "run", *arguments)
    assert (
        done.returncode == 2
        and expected in done.stderr.decode()
        and not (tmp_path / "run").exists()
    )


def test_overwrite_replaces_the_run_and_nothing_else(inside, train, text, tmp_path):
    train(text, "--steps", 4)
    (tmp_path / "run" / "notes.md").write_text("mine")
    train(text, "--steps", 2, "--overwrite")
    assert (tmp_path / "run" / "notes.md").read_text() == "mine"
    assert [path.name for path in (tmp_path / "run" / "state").glob("step-*")].count(
        "step-000000004"
    ) == 0
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    "data, extra",
    [
        ("missing.txt", ()),
        ("empty.txt", ()),
        ("text.txt", ("--val", "missing.txt")),
        ("text.txt", ("--tokenizer", "missing")),
        ("text.txt", ("--set", "train.contxt=3")),
    ],
)
def test_a_run_is_not_overwritten_by_one_that_fails_to_start(
    inside, train, text, tmp_path, monkeypatch, data, extra
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    train(text, "--steps", 2)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert inside(
        "train", data, *extra, "-o", tmp_path / "run", *SMALL, "--overwrite"
    ).returncode in (1, 2)
    assert {
        path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()
    } == before


def test_a_folder_of_something_else_is_refused_even_with_overwrite(inside, text, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = inside("train", text, "-o", tmp_path / "mine", *SMALL, "--overwrite")
    assert done.returncode == 2 and b"is not empty and holds no run" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_failure_before_the_first_step_leaves_no_folder_behind(inside, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = inside("train", tmp_path / "missing.txt")  # not even runs/
    assert (
        done.returncode == 1
        and [path for path in sorted(tmp_path.iterdir()) if path.name != "stdin"] == before
    )


def test_a_bad_row_is_skipped_in_training_and_validation(inside, train, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES) + "{broken\n")
    done = inside("train", rows, "-o", tmp_path / "run", *SMALL, "--steps", 2)
    assert (
        done.returncode == 1
        and f"{rows}, line 201" in done.stderr.decode()
        and not (tmp_path / "run").exists()
    )
    train(rows, "--steps", 2, "--on-error", "skip")
    assert inside("perplexity", "-m", tmp_path / "run", "--validation").returncode == 0
    assert inside("train", "--resume", tmp_path / "run").returncode == 0


def test_chinese_progress_has_bits_per_character(inside, tmp_path):
    text = tmp_path / "zh.txt"
    text.write_text(
        "".join(f"却说第{i}回，宝玉来到园中，见了黛玉，说了一回话。\n" for i in range(150))
    )
    done = inside(
        "train", text, "-o", tmp_path / "run", *SMALL, "--steps", 3, "--set", "train.eval_every=1"
    )
    stderr = done.stderr.decode()
    assert stderr.count("bits/character") >= 3
    result = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["result"]
    assert result["val_bits_per_character"] == pytest.approx(
        3 * result["val_bits_per_byte"], rel=0.1
    )


def test_the_stored_recipe_is_a_preset(inside, train, text, tmp_path):
    train(text, "--steps", 3)
    shutil.copy(tmp_path / "run" / "recipe.yaml", tmp_path / "again.yaml")
    assert (
        inside(
            "train", text, "-o", tmp_path / "second", "--preset", tmp_path / "again.yaml"
        ).returncode
        == 0
    )
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "second")
    )
    assert first == second


def test_no_data_on_a_terminal_is_a_usage_error(inside, monkeypatch):
    import pty

    _, follower = pty.openpty()
    with open(follower) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        from lmcli.commands import run

        assert run(["train"]) == run(["score", "-m", "x"]) == run(["perplexity", "-m", "x"]) == 2


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (("--time", "0s"), 2, "no budget"),
        (("--set", "train.time=0"), 2, "no budget"),
        (("--time", "0.1s"), 1, "over before"),
        (
            (
                "--preset",
                "tiny",
                "--steps",
                1,
                "--set",
                "model.hidden_size=64000",
                "--set",
                "model.num_hidden_layers=64",
            ),
            2,
            "GB of memory",
        ),
    ],
)
def test_a_run_without_time_for_one_step_is_an_error_and_leaves_nothing(
    inside, text, tmp_path, arguments, code, expected
):
    arguments = arguments if "--preset" in arguments else (*SMALL, *arguments)
    done = inside("train", text, "-o", tmp_path / "run", *arguments)
    assert done.returncode == code and expected in done.stderr.decode() and done.stdout == b""
    assert not (tmp_path / "run").exists()
