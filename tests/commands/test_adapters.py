"""lm train --lora, --freeze and --remember, and lm export, on the command line."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lmcli.checkpoints import folder as checkpoints
from lmcli.config import GenerateConfig
from lmcli.runs.run_record import RunRecord

SET = (
    "--preset",
    "tiny",
    "--set",
    "train.context=32",
    "--set",
    "train.batch_tokens=128",
    "--set",
    "train.sample_every=99",
    "--set",
    "train.eval_every=4",
    "--threads",
    1,
)
STEPS = ("--steps", 8)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters") / "text.txt"
    path.write_text("".join(f"The baker of village {i} sold {i % 7} loaves.\n" for i in range(40)))
    return path


@pytest.fixture
def tune(inside, trained, text, tmp_path):
    """tune(*arguments, name="run", by=inside): the process that fine-tuned the small run."""

    def call(*arguments, name: str = "run", by=inside):
        return by(
            "train", text, "--from", trained[0], "-o", tmp_path / name, *SET, *STEPS, *arguments
        )

    return call


def bits(inside, folder, file) -> float:
    done = inside("perplexity", "-m", folder, "--json", file)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)["bits_per_byte"]


def test_a_run_with_lora_is_an_adapter_that_every_command_loads(
    inside, tune, trained, text, tmp_path
):
    done = tune("--lora", 4)
    stderr = done.stderr.decode()
    assert done.returncode == 0, stderr
    assert "parameters, 10,240 of them (6.8 %) trained (2 × 64)" in stderr
    run = tmp_path / "run"
    assert not (run / "config.json").exists() and not (run / "model.safetensors").exists()
    options = json.loads((run / "adapter_config.json").read_text())
    assert (options["r"], options["lora_alpha"]) == (4, 8)
    assert options["base_model_name_or_path"] == str(trained[0].resolve())
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["train"]["lora_rank"] == 4 and recipe["train"]["lora_targets"] == ["all"]
    assert bits(inside, run, text) < bits(inside, trained[0], text)
    again = json.loads(inside("perplexity", "-m", run, "--validation", "--json").stdout)[
        "bits_per_byte"
    ]
    assert again == recipe["result"]["val_bits_per_byte"]
    assert inside("generate", "-m", run, "--seed", 1, "-n", 3, "The").returncode == 0
    facts = json.loads(inside("info", run, "--json").stdout)
    assert (
        facts["kind"] == "run"
        and facts["adapter"]["rank"] == 4
        and facts["adapter"]["parameters"] == 10_240
    )
    assert facts["family"] == "qwen3" and not facts["weights"]["missing"] and "damage" not in facts
    card = (run / "README.md").read_text()
    assert f"base_model: {trained[0].resolve()}" in card and "A LoRA adapter of rank 4" in card


def test_an_adapter_is_refused_after_its_base_has_changed(inside, trained, text, tmp_path):
    """Its figures were those of a model that no longer exists."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(trained[0], base)
    assert (
        inside("train", text, "--from", base, "-o", run, *SET, *STEPS, "--lora", 2).returncode == 0
    )
    before = bits(inside, run, text)
    shutil.rmtree(base)
    assert (
        inside(
            "train", text, "--from", trained[0], "-o", base, *SET, *STEPS, "--freeze", 1
        ).returncode
        == 0
    )
    for arguments in (
        ("perplexity", "-m", run, text),
        ("train", "--resume", run),
        ("export", run, "--merge", "-o", tmp_path / "merged"),
    ):
        done = inside(*arguments)
        assert done.returncode == 1 and done.stdout == b""
        what, remedy = done.stderr.decode().splitlines()[-2:]
        assert (
            what
            == f"lm: error: {run}/adapter_config.json: its base model {base} has other weights "
            "than when the adapter was trained"
        )
        assert remedy.endswith(f"delete `base` from {run}/recipe.yaml")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe.pop("base").keys() == {"model", "weights"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert bits(inside, run, text) != before


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lora", 4),
        ("--lora", 2, "--freeze", 1, "--set", "train.lora_targets=query,up"),
        ("--freeze", 1, "--set", "train.averaging=0.75"),
        ("--lora", 3, "--set", "train.lora_dropout=0.2", "--set", "train.dropout=0.1"),
    ],
    ids=str,
)
def test_a_resumed_adapter_run_equals_an_uninterrupted_one(
    tune, inside, stopped_after_five, tmp_path, arguments
):
    assert tune(*arguments, name="whole").returncode == 0
    assert tune(*arguments, by=stopped_after_five).returncode == 130
    done = inside("train", "--resume", tmp_path / "run", "--threads", 1)
    assert done.returncode == 0, done.stderr.decode()
    assert b"of them (" in done.stderr
    weights_file = "adapter_model.safetensors" if "--lora" in arguments else "model.safetensors"
    for name in (
        weights_file,
        "state/step-000000008/weights.safetensors",
        "state/step-000000008/optimizer.safetensors",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (
            name
        )


@pytest.fixture
def untied(inside, small_model, small_tokenizer, text, tmp_path):
    """untied(*arguments, name="run", by=inside): the process that fine-tuned an untied model."""
    (tmp_path / "base").mkdir()
    base = small_model(tie_word_embeddings=False)
    checkpoints.save(tmp_path / "base", base, small_tokenizer, GenerateConfig())

    def call(*arguments, name: str = "run", by=inside):
        return by(
            "train",
            text,
            "--from",
            tmp_path / "base",
            "-o",
            tmp_path / name,
            *SET,
            *STEPS,
            *arguments,
        )

    return call


def test_lora_targets_may_name_embedding_and_head(inside, untied, text, tmp_path):
    done = untied("--lora", 2, "--set", "train.lora_targets=[all,embedding,head]")
    assert done.returncode == 0, done.stderr.decode()
    inner = (
        2 * 2 * sum((32 + 32, 32 + 16, 32 + 16, 32 + 32, 3 * (32 + 96)))
    )  # of rank 2, in two blocks
    run, tensors = tmp_path / "run", load_file(tmp_path / "run" / "adapter_model.safetensors")
    trained = sum(tensor.numel() for tensor in tensors.values())
    assert (
        trained - 2 * 2 * (401 + 32) == inner and f"{trained:,} of them (" in done.stderr.decode()
    )
    assert {"embed_tokens", "lm_head"} < {
        *json.loads((run / "adapter_config.json").read_text())["target_modules"]
    }
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    again = json.loads(inside("perplexity", "-m", run, "--validation", "--json").stdout)[
        "bits_per_byte"
    ]
    assert again == recipe["result"]["val_bits_per_byte"]
    assert bits(inside, run, text) < bits(inside, tmp_path / "base", text)
    assert inside("export", run, "--merge", "-o", tmp_path / "whole").returncode == 0
    assert bits(inside, tmp_path / "whole", text) == pytest.approx(
        bits(inside, run, text), rel=1e-9
    )


@pytest.mark.parametrize(
    "more",
    [("--set", "train.lora_init=gradient"), ("--freeze", 1, "--set", "train.lora_dropout=0.2")],
    ids=str,
)
def test_lora_of_embedding_and_head_resumes_bit_for_bit(
    inside, untied, stopped_after_five, tmp_path, more
):
    arguments = ("--lora", 2, "--set", "train.lora_targets=all,embedding,head", *more)
    assert untied(*arguments, name="whole").returncode == 0
    assert untied(*arguments, by=stopped_after_five).returncode == 130
    assert inside("train", "--resume", tmp_path / "run", "--threads", 1).returncode == 0
    one, other = ((tmp_path / name / "adapter_model.safetensors") for name in ("run", "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert any("embed_tokens" in name for name in load_file(one)) == ("--freeze" not in more)


def test_frozen_layers_do_not_change(tune, trained, tmp_path):
    assert tune("--freeze", 1).returncode == 0
    before, after = (
        load_file(folder / "model.safetensors") for folder in (trained[0], tmp_path / "run")
    )
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert same == {
        name for name in after if name.startswith(("model.embed_tokens.", "model.layers.0."))
    }


def test_forgetting_is_reported_and_stored(tune, inside, trained, story, tmp_path):
    old = tmp_path / "old.txt"
    old.write_text(story.read_text()[:4000])
    done = tune("--lora", 2, "--remember", old)
    assert done.returncode == 0, done.stderr.decode()
    (one,) = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["result"]["remembered"]
    assert one["file"] == str(old)
    assert one["before"] == pytest.approx(bits(inside, trained[0], old), rel=1e-6)
    assert one["after"] == pytest.approx(bits(inside, tmp_path / "run", old), rel=1e-6)
    assert one["after"] != one["before"]
    measuring = f"lm: measuring bits/byte of {old} (4,000 bytes)"
    lines = [line for line in done.stderr.decode().splitlines() if str(old) in line]
    assert lines == [
        measuring,
        f"lm: {old}: {one['before']:.4f} bits/byte before",
        measuring,
        f"lm: {old}: {one['after']:.4f} bits/byte after, {one['before']:.4f} before "
        f"({one['after'] - one['before']:+.4f})",
    ]


def test_a_forgetting_text_deleted_during_the_run_only_loses_its_figure(
    tune, story, tmp_path, monkeypatch
):
    old, create = tmp_path / "old.txt", RunRecord.create
    old.write_text(story.read_text()[:4000])

    def without_text(record, train_step):
        create(record, train_step)
        old.unlink()

    monkeypatch.setattr(RunRecord, "create", without_text)
    done = tune("--lora", 2, "--remember", old)
    assert done.returncode == 1 and f"{old}: cannot read: No such file" in done.stderr.decode()
    result = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["result"]
    assert result["steps"] == 8 and result["remembered"][0]["after"] is None
    assert (tmp_path / "run" / "loss.svg").is_file() and (tmp_path / "run" / "README.md").is_file()


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (
            ("--set", "train.lora_targets=querry"),
            2,
            "'querry' is not one of all, query, key, value, output, gate, up, down, "
            "embedding, head; did you mean 'query'?",
        ),
        (
            ("--lora", 4, "--set", "train.lora_targets=all,head"),
            2,
            "'head' cannot have an adapter: embedding and head of this model share one matrix",
        ),
        (("--lora", 4, "--freeze", 3), 2, "frozen_layers 3 is more than the 2 blocks there are"),
        (("--lora", 4, "--freeze", 2), 2, "frozen_layers leaves nothing that LoRA could train"),
        (("--remember", "nowhere.txt"), 1, "nowhere.txt: no such file"),
    ],
    ids=str,
)
def test_impossible_adapters_are_usage_errors(tune, tmp_path, arguments, code, expected):
    done = tune(*arguments)
    assert done.returncode == code and expected in done.stderr.decode(), done.stderr.decode()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--lora", 4), "--lora (train.lora_rank) needs a model to fine-tune"),
        (("--set", "train.frozen_layers=2"), "--freeze (train.frozen_layers) needs a model"),
        (
            ("--remember", "x.txt"),
            "--remember measures what a model that is trained further forgets",
        ),
    ],
    ids=str,
)
def test_fine_tuning_options_need_from(inside, text, tmp_path, arguments, expected):
    done = inside("train", text, "-o", tmp_path / "run", *SET, *STEPS, *arguments)
    assert (
        done.returncode == 2
        and expected in done.stderr.decode()
        and "name that model with --from" in done.stderr.decode()
    )
    if "--remember" not in arguments:
        assert (
            inside(
                "plan",
                text,
                *SET[:2],
                *STEPS,
                *(arguments if "--set" in arguments else ("--set", "train.lora_rank=4")),
            ).returncode
            == 2
        )


def test_a_rank_above_the_width_is_allowed_with_a_note(tune):
    done = tune("--lora", 64)
    assert (
        done.returncode == 0 and b"rank 64 is no less than the model's width of 64" in done.stderr
    )


def test_an_adapter_of_an_adapter_or_in_its_base_folder_is_refused(
    tune, inside, text, trained, tmp_path
):
    assert tune("--lora", 2).returncode == 0
    done = inside(
        "train",
        text,
        "--from",
        tmp_path / "run",
        "-o",
        tmp_path / "second",
        *SET,
        *STEPS,
        "--lora",
        2,
    )
    assert (
        done.returncode == 2
        and f"lm export {tmp_path / 'run'} --merge -o DIR" in done.stderr.decode()
    )
    whole = inside(
        "train", text, "--from", tmp_path / "run", "-o", tmp_path / "third", *SET, *STEPS
    )
    assert whole.returncode == 0 and (tmp_path / "third" / "model.safetensors").is_file()
    shutil.copytree(trained[0], tmp_path / "base")
    done = inside(
        "train",
        text,
        "--from",
        tmp_path / "base",
        "-o",
        tmp_path / "base",
        *SET,
        *STEPS,
        "--lora",
        2,
        "--overwrite",
    )
    assert done.returncode == 2 and "is the base that the adapter needs" in done.stderr.decode()
    assert (tmp_path / "base" / "model.safetensors").is_file()


def test_a_missing_base_is_named(inside, trained, text, tmp_path):
    shutil.copytree(trained[0], tmp_path / "base")
    done = inside(
        "train",
        text,
        "--from",
        tmp_path / "base",
        "-o",
        tmp_path / "run",
        *SET,
        *STEPS,
        "--lora",
        2,
    )
    assert done.returncode == 0
    shutil.rmtree(tmp_path / "base")
    for arguments in (("perplexity", "-m", tmp_path / "run", text), ("info", tmp_path / "run")):
        done = inside(*arguments)
        assert (
            done.returncode == 1
            and f"its base model is missing: {tmp_path / 'base'}" in done.stderr.decode()
        )


def test_a_classification_head_is_trained_with_the_adapter(inside, tmp_path):
    rows, sizes = (
        tmp_path / "labels.tsv",
        (
            "--set",
            "model.hidden_size=32",
            "--set",
            "model.num_hidden_layers=1",
            "--set",
            "tokenizer.vocab_size=300",
            "--set",
            "train.context=32",
        ),
    )
    rows.write_text(
        "text\tlabel\n"
        + "".join(f"number {i} is here\t{('even', 'odd')[i % 2]}\n" for i in range(60))
    )
    (tmp_path / "plain.txt").write_text(rows.read_text())
    base, run = tmp_path / "base", tmp_path / "run"
    assert (
        inside(
            "train", tmp_path / "plain.txt", "-o", base, "--preset", "encoder-small", *sizes, *STEPS
        ).returncode
        == 0
    )
    done = inside(
        "train",
        rows,
        "--from",
        base,
        "-o",
        run,
        "--preset",
        "encoder-small",
        *sizes[-2:],
        *STEPS,
        "--lora",
        2,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads((run / "adapter_config.json").read_text())["modules_to_save"] == [
        "classifier",
        "head",
    ]
    answer = inside("classify", "-m", run, stdin=b"number 3 is here\n")
    assert answer.returncode == 0 and answer.stdout.split(b"\t")[0] in (b"even", b"odd")
    assert inside("export", run, "--merge", "-o", tmp_path / "whole").returncode == 0
    assert (
        inside("classify", "-m", tmp_path / "whole", stdin=b"number 3 is here\n").stdout
        == answer.stdout
    )
    facts = json.loads(inside("info", run, "--json").stdout)
    assert (
        facts["labels"] == ["even", "odd"]
        and not facts["weights"]["missing"]
        and facts["commands"] == ["lm classify"]
    )


class TestExport:
    def test_a_merged_adapter_has_the_same_perplexity(self, inside, tune, text, tmp_path):
        assert tune("--lora", 4).returncode == 0
        done = inside("export", tmp_path / "run", "--merge", "-o", tmp_path / "whole")
        assert done.returncode == 0 and done.stdout.decode() == f"{tmp_path / 'whole'}\n"
        assert b"MB of float32 weights" in done.stderr
        assert bits(inside, tmp_path / "whole", text) == pytest.approx(
            bits(inside, tmp_path / "run", text), rel=1e-9
        )

    def test_another_precision(self, inside, trained, text, tmp_path):
        done = inside("export", trained[0], "-o", tmp_path / "half", "--dtype", "bfloat16", "-q")
        assert done.returncode == 0 and done.stderr == b""
        stored = load_file(tmp_path / "half" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert bits(inside, tmp_path / "half", text) == pytest.approx(
            bits(inside, trained[0], text), rel=0.01
        )

    def test_only_a_model_is_replaced_and_only_with_overwrite(self, inside, trained, tmp_path):
        out = tmp_path / "out"
        assert inside("export", trained[0], "-o", out).returncode == 0
        done = inside("export", trained[0], "-o", out, "--dtype", "float16")
        assert done.returncode == 2 and "replace its model with --overwrite" in done.stderr.decode()
        assert (
            inside("export", trained[0], "-o", out, "--dtype", "float16", "--overwrite").returncode
            == 0
        )
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {
            torch.float16
        }
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "mine.md").write_text("mine")
        done = inside("export", trained[0], "-o", tmp_path / "notes", "--overwrite")
        assert done.returncode == 2 and "is not empty and holds no model" in done.stderr.decode()
        done = inside("export", trained[0], "-o", tmp_path / "notes" / "mine.md")
        assert done.returncode == 2 and "is a file" in done.stderr.decode()

    @pytest.mark.parametrize(
        "arguments, code, expected",
        [
            (("--merge",), 2, "holds no adapter to merge"),
            (("--dtype", "int4"), 2, "'int4' is not one of"),
        ],
        ids=str,
    )
    def test_impossible_exports_are_errors(
        self, inside, trained, tmp_path, arguments, code, expected
    ):
        done = inside("export", trained[0], "-o", tmp_path / "out", *arguments)
        assert (
            done.returncode == code
            and expected in done.stderr.decode()
            and not (tmp_path / "out").exists()
        )

    def test_a_missing_folder_is_an_error(self, inside, tmp_path):
        done = inside("export", tmp_path / "none", "-o", tmp_path / "out")
        assert done.returncode == 1 and "no such model folder" in done.stderr.decode()
