"""Bad input, signals and pipes: one or two lines, the right exit code, nothing half-written."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from small_runs import SMALL


def message(done, code: int) -> str:
    """The error on standard error, after checking its form."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert "Traceback" not in text and done.stdout == b""
    errors = text[text.index("lm: error:") :]
    assert errors.count("\n") <= 2
    return errors


@pytest.fixture
def damaged(trained, tmp_path):
    """damaged(file, content): a copy of the trained folder with one file replaced (None: gone)."""

    def make(name: str, content: bytes | None):
        folder = tmp_path / "damaged"
        shutil.copytree(trained[0], folder)
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        return folder

    return make


TEXTS = {
    "missing": (None, "no such file"),
    "binary": (bytes(range(256)) * 50, "UTF-8"),
    "invalid": (b"fine\nfine\n\xff\xfe bad\n", "line 3"),
    "empty": (b"", "no text"),
    "short": (b"a b c", ""),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_training_on_bad_text_is_an_error_and_leaves_nothing(inside, tmp_path, kind):
    content, expected = TEXTS[kind]
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    assert expected in message(
        inside("train", path, "-o", tmp_path / "run", *SMALL, "--steps", 2), 1
    )
    assert not (tmp_path / "run").exists()


def test_a_directory_without_text_is_an_error(inside, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "image.bin").write_bytes(b"\0\xff" * 100)
    assert "holds no text files" in message(
        inside("train", tmp_path / "folder", "-o", tmp_path / "run"), 1
    )


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("config.json", None, "config.json"),
        ("config.json", b"{", "is not JSON"),
        ("config.json", b'{"model_type": "mystery"}', "mystery"),
        ("tokenizer.json", b"[]", "is no tokenizer"),
        ("model.safetensors", b"\x10", "safetensors"),
        ("model.safetensors", None, "model.safetensors"),
    ],
)
@pytest.mark.parametrize("command", [("score",), ("generate", "The")])
def test_damaged_model_folders_are_named(inside, damaged, name, content, expected, command):
    assert expected in message(
        inside(command[0], "-m", damaged(name, content), *command[1:], stdin=b"a\n"), 1
    )


def test_truncated_weights_are_named(inside, damaged, trained):
    whole = (trained[0] / "model.safetensors").read_bytes()
    assert "model.safetensors" in message(
        inside("generate", "-m", damaged("model.safetensors", whole[:-1000]), "a"), 1
    )


def test_a_tokenizer_larger_than_the_model_is_an_error(inside, damaged, trained):
    config = json.loads((trained[0] / "config.json").read_text()) | {"vocab_size": 100}
    assert "512 ids" in message(
        inside("generate", "-m", damaged("config.json", json.dumps(config).encode()), "a"), 1
    )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--set", "train.learning_rat=1"), "did you mean 'learning_rate'"),
        (("--preset", "smal"), "did you mean 'small'"),
        (
            ("--set", "model.hidden_size=65", "--set", "model.num_attention_heads=4"),
            "does not divide",
        ),
        (("--set", "train.context=-1"), "outside"),
        (("--set", "nonsense"), "section.key=value"),
    ],
)
def test_impossible_recipes_end_with_code_2(inside, story, tmp_path, arguments, expected):
    assert expected in message(inside("train", story, "-o", tmp_path / "run", *arguments), 2)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_changed(inside, story, trained):
    before = (trained[0] / "model.safetensors").read_bytes()
    stderr = message(inside("train", story, "-o", trained[0], *SMALL, "--steps", 1), 2)
    assert "--resume" in stderr and "--overwrite" in stderr
    assert (trained[0] / "model.safetensors").read_bytes() == before


def test_unwritable_output_is_an_error(lm, story, trained, tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "run"
    assert "file" in message(lm("train", story, "-o", below, *SMALL, "--steps", 1), 1)
    assert "file" in message(lm("score", "-m", trained[0], "-o", below, stdin=b"a\n"), 1)


def test_a_full_disk_is_an_error(lm, story, trained, tmp_path, environment):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lmcli", "tokenize", "-m", trained[0], story],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=60,
        )
    assert (
        done.returncode == 1 and b"No space left" in done.stderr and b"Traceback" not in done.stderr
    )

    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    # from the cache, so that only the weights are too large
    done = lm(
        "train",
        story,
        "-o",
        tmp_path / "run",
        "--preset",
        "tiny",
        "--tokenizer",
        trained[0],
        "--steps",
        1,
        preexec_fn=little,
    )
    assert done.returncode == 1 and b"Traceback" not in done.stderr and b"too large" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["tokenize", "score"])
def test_a_closed_pipe_ends_quietly(trained, piped, command):
    done = piped(1, command, "-m", trained[0], line="a b c")
    assert done.returncode == 141 and done.stderr == b"" and done.stdout.count(b"\n") == 1


def test_a_slow_pipe_is_answered_line_by_line(trained, environment):
    command = [sys.executable, "-m", "lmcli", "score", "-m", trained[0], "--no-header"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
    ) as process:
        for line in (b"The baker\n", b"went home\n"):
            process.stdin.write(line)
            assert process.stdout.readline().endswith(line)
        process.stdin.close()
    assert process.returncode == 0


def test_ctrl_c_while_generating_keeps_the_output(damaged, environment):
    endless = damaged(
        "generation_config.json", b'{"do_sample": true, "eos_token_id": []}'
    )  # nothing ends the text early
    command = [sys.executable, "-m", "lmcli", "generate", "-m", endless, "-n", "1000000", "The"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, bufsize=0
    ) as process:
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and b"Traceback" not in errors


def train_and_stop(environment, arguments, after: int, number: int) -> tuple[int, str]:
    """Trains, sends a signal after `after` logged steps; returns (exit code, standard error)."""
    folder = arguments[arguments.index("-o") + 1]
    command = [sys.executable, "-m", "lmcli", "train", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            metrics = folder / "metrics.jsonl"
            if metrics.exists() and metrics.read_text().count("\n") >= after:
                break
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, extra",
    [
        (signal.SIGINT, ()),
        (signal.SIGTERM, ("--set", "train.micro_batch_tokens=64", "--set", "train.dropout=0.1")),
    ],
)
def test_a_stopped_run_resumes_to_the_same_bits(lm, inside, environment, tmp_path, number, extra):
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(
            f"The baker of village {i} sold {i % 7} loaves and went home.\n" for i in range(300)
        )
    )
    arguments = [text, *SMALL, *extra, "--steps", "60", "-q"]
    code, errors = train_and_stop(environment, [*arguments, "-o", tmp_path / "stopped"], 10, number)
    assert code == 130 and f"lm train --resume {tmp_path / 'stopped'}" in errors
    assert inside("generate", "-m", tmp_path / "stopped", "-n", 3, "The").returncode == 0
    assert lm("train", "--resume", tmp_path / "stopped", "-q").returncode == 0
    assert lm("train", *arguments, "-o", tmp_path / "whole").returncode == 0
    steps = [
        json.loads(line)
        for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [m["step"] for m in steps if "loss" in m] == list(range(1, 61))
    last = "state/step-000000060"
    for file in (
        "model.safetensors",
        f"{last}/weights.safetensors",
        f"{last}/optimizer.safetensors",
    ):
        assert (tmp_path / "stopped" / file).read_bytes() == (
            tmp_path / "whole" / file
        ).read_bytes(), file


def test_resume_refuses_changed_data_and_other_options(inside, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The baker went home.\n" * 200)
    assert inside("train", text, "-o", tmp_path / "run", *SMALL, "--steps", 3).returncode == 0
    assert "--preset" in message(
        inside("train", "--resume", tmp_path / "run", "--preset", "tiny"), 2
    )
    text.write_text("The butcher went home.\n" * 200)
    assert "text.txt" in message(inside("train", "--resume", tmp_path / "run"), 1)


def test_a_loss_that_explodes_keeps_the_last_good_model(inside, story, tmp_path):
    done = inside(
        "train",
        story,
        "-o",
        tmp_path / "run",
        *SMALL,
        "--steps",
        40,
        "--set",
        "train.learning_rate=1e9",
        "--set",
        "train.matrix_learning_rate=1e9",
        "--set",
        "train.eval_every=1",
        "--set",
        "train.warmup=0.9",
    )
    stderr = done.stderr.splitlines()[-2]
    assert (
        done.returncode == 1
        and stderr.startswith(b"lm: error: training: ")
        and b" at step " in stderr
    ), done.stderr
    assert inside("generate", "-m", tmp_path / "run", "-n", 3, "The").returncode == 0


def test_context_and_vocabulary_shrink_for_a_small_text(inside, tmp_path):
    done = inside(
        "train",
        "-",
        "-o",
        tmp_path / "run",
        "--preset",
        "tiny",
        "--steps",
        2,
        "--set",
        "train.context=512",
        stdin=b"The baker of the village sold a loaf and went home.\n" * 12,
    )
    assert done.returncode == 0
    assert b"context shrinks" in done.stderr and b"room for a vocabulary" in done.stderr


def test_fine_tuning_from_another_folder(inside, trained, story, tmp_path):
    done = inside(
        "train",
        story,
        "--from",
        trained[0],
        "-o",
        tmp_path / "more",
        "--preset",
        "tiny",
        "--steps",
        3,
        "--set",
        "train.learning_rate=1e-4",
        "--set",
        "train.matrix_learning_rate=1e-4",
        "--set",
        "train.batch_tokens=256",
    )
    assert done.returncode == 0, done.stderr.decode()
    before, after = (
        json.loads(inside("perplexity", "-m", folder, "--validation", "--json").stdout)[
            "bits_per_byte"
        ]
        for folder in (trained[0], tmp_path / "more")
    )
    assert after == pytest.approx(before, abs=0.3)


def test_a_run_by_time_ends_on_time_with_its_schedule_complete(lm, story, tmp_path):
    began = time.monotonic()
    assert lm("train", story, "-o", tmp_path / "run", *SMALL, "--time", "4s").returncode == 0
    took = time.monotonic() - began
    rates = [
        m["learning_rate"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "loss" in (m := json.loads(line))
    ]
    assert rates[-1] < 0.1 * max(rates)
    assert took < 25  # 4 s on a quiet machine; the bound only catches a clock that is not obeyed
