"""A run stopped at any point and resumed equals an uninterrupted one: weights, best model, log."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small_runs import SMALL

from lmcli.display import TrainingView
from lmcli.text import tokenizer as tokenizers

pytestmark = pytest.mark.slow

STEPS = 20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """About 9 rows of 32 tokens an epoch, so that 20 steps of 4 rows are nine epochs."""
    path = tmp_path_factory.mktemp("resume") / "text.txt"
    path.write_text("".join(f"The baker of village {i} sold {i % 7} loaves.\n" for i in range(20)))
    return path


@pytest.fixture(scope="module")
def finished():
    """Uninterrupted runs by the name of their variant."""
    return {}


@pytest.fixture
def whole(inside, text, tmp_path_factory, finished):
    """whole(variant): the folder of an uninterrupted run, trained once for all tests."""

    def get(variant: str = "plain"):
        if variant not in finished:
            folder = tmp_path_factory.mktemp("whole") / "run"
            arguments = ("train", text, *SMALL, *VARIANTS[variant], "--steps", STEPS)
            done = inside(*arguments, "-o", folder)
            assert done.returncode == 0, done.stderr.decode()
            finished[variant] = folder
        return finished[variant]

    return get


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(steps, event="step", times=1): Ctrl-C when the display gets this event."""

    def arm(steps, event: str = "step", times: int = 1) -> None:
        shown, left = getattr(TrainingView, event), set(steps)

        def show(view, record) -> None:
            shown(view, record)
            if record.step in left:
                left.remove(record.step)
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.01)

        monkeypatch.setattr(TrainingView, event, show)

    return arm


def log(folder) -> list[dict]:
    """The content of metrics.jsonl without its times."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in row.items() if key not in ("elapsed", "tokens_per_second")}
        for row in rows
    ]


def weights(folder) -> dict:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in (
            folder / "model.safetensors",
            *(folder / "state" / f"step-{STEPS:09d}").glob("*.safetensors"),
        )
    }


VARIANTS = {
    "plain": (),
    "accumulated": ("--set", "train.micro_batch_tokens=32", "--set", "train.dropout=0.2"),
    "adamw, often looked at": (
        "--set",
        "train.optimizer=adamw",
        "--set",
        "train.eval_every=2",
        "--set",
        "train.save_every=3",
    ),
}


# evaluations are after steps 3, 5, 8, 10 … (every eighth of the budget), or 2, 4, 6 …
@pytest.mark.parametrize(
    "variant, stops",
    [
        *(("plain", stops) for stops in ((1,), (3,), (5, 6), (10,), (19,), (20,))),
        *(
            (variant, stops)
            for variant in ("accumulated", "adamw, often looked at")
            for stops in ((5, 6), (10,))
        ),
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    inside, text, tmp_path, whole, stop_at, variant, stops
):
    arguments = ("train", text, *SMALL, *VARIANTS[variant], "--steps", STEPS)
    expected = whole(variant)
    stop_at(stops)
    done = inside(*arguments, "-o", tmp_path / "stopped")
    for step in stops:
        assert done.returncode == 130 and f"stopped after step {step}" in done.stderr.decode()
        assert (
            f"lm train --resume {tmp_path / 'stopped'}" in done.stderr.decode()
            and done.stdout == b""
        )
        done = inside("train", "--resume", tmp_path / "stopped")
    assert done.returncode == 0, done.stderr.decode()
    assert weights(tmp_path / "stopped") == weights(expected)
    assert log(tmp_path / "stopped") == log(expected)


def test_a_stopped_run_on_messages_goes_on_in_its_chat_template(inside, tmp_path, stop_at):
    """The plain template that the run saves is read by transformers: the same ids."""
    from transformers import AutoTokenizer

    chats = [
        [{"role": "user", "content": f"Was it {i}?"}, {"role": "assistant", "content": "Yes."}]
        for i in range(30)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    arguments = ("train", file, *SMALL, "--steps", STEPS)
    assert inside(*arguments, "-o", tmp_path / "whole").returncode == 0
    stop_at({6})
    done = inside(*arguments, "-o", tmp_path / "stopped")
    assert done.returncode == 130 and b"it gets a plain one, saved as chat_template" in done.stderr
    done = inside("train", "--resume", tmp_path / "stopped")
    assert done.returncode == 0 and b"plain one" not in done.stderr
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "whole")
    ids = theirs.apply_chat_template(chats[0], return_dict=False)
    ours = tokenizers.load(tmp_path / "whole")
    text = "<|endoftext|><|user|>\nWas it 0?\n<|assistant|>\nYes.<|endoftext|>\n"
    assert ids == ours.encode(text) and ours.settings["chat_template"] == theirs.chat_template


def test_a_stop_during_validation_logs_the_evaluation_once(inside, text, tmp_path, whole, stop_at):
    arguments = ("train", text, *SMALL, "--steps", STEPS)
    expected = whole()
    stop_at({8}, "validation")
    assert inside(*arguments, "-o", tmp_path / "stopped").returncode == 130
    assert inside("train", "--resume", tmp_path / "stopped").returncode == 0
    assert log(tmp_path / "stopped") == log(expected)
    assert weights(tmp_path / "stopped") == weights(expected)


def test_a_stop_during_the_last_evaluation_is_a_finished_run(inside, text, tmp_path, stop_at):
    stop_at({STEPS}, "validation")
    assert inside("train", text, *SMALL, "--steps", STEPS, "-o", tmp_path / "run").returncode == 0


def test_resuming_a_finished_run_changes_nothing(inside, text, tmp_path):
    assert inside("train", text, *SMALL, "--steps", STEPS, "-o", tmp_path / "run").returncode == 0
    logged, saved = (tmp_path / "run" / "metrics.jsonl").read_bytes(), weights(tmp_path / "run")
    done = inside("train", "--resume", tmp_path / "run")
    assert done.returncode == 0 and done.stdout.decode() == f"{tmp_path / 'run'}\n"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == logged and weights(
        tmp_path / "run"
    ) == saved


def test_a_second_ctrl_c_ends_at_once_and_the_older_state_is_used(
    inside, text, tmp_path, whole, stop_at
):
    arguments = ("train", text, *SMALL, "--steps", STEPS)
    expected = whole()
    stop_at({9}, times=2)
    done = inside(*arguments, "-o", tmp_path / "stopped")
    assert done.returncode == 130 and b"Traceback" not in done.stderr
    assert sorted(path.name for path in (tmp_path / "stopped" / "state").iterdir()) == [
        "step-000000005",
        "step-000000008",
    ]
    assert inside("train", "--resume", tmp_path / "stopped").returncode == 0
    assert weights(tmp_path / "stopped") == weights(expected)
    assert log(tmp_path / "stopped") == log(expected)


def test_a_damaged_newest_state_is_named_and_the_one_before_it_is_used(
    inside, text, tmp_path, whole, stop_at
):
    arguments = ("train", text, *SMALL, "--steps", STEPS)
    expected = whole()
    stop_at({12})
    assert inside(*arguments, "-o", tmp_path / "stopped").returncode == 130
    newest = tmp_path / "stopped" / "state" / "step-000000012" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "los')  # what a machine that lost its power leaves
    done = inside("train", "--resume", tmp_path / "stopped")
    assert (
        done.returncode == 0
        and b"step-000000012" in done.stderr
        and b"going on after step 10" in done.stderr
    )
    assert weights(tmp_path / "stopped") == weights(expected)
    assert log(tmp_path / "stopped") == log(expected)


def test_no_readable_state_is_an_error(inside, text, tmp_path):
    assert inside("train", text, *SMALL, "--steps", 2, "-o", tmp_path / "run").returncode == 0
    for state in (tmp_path / "run" / "state").iterdir():
        (state / "counters.json").write_text("{")
    done = inside("train", "--resume", tmp_path / "run")
    assert (
        done.returncode == 1 and b"counters.json is damaged" in done.stderr and done.stdout == b""
    )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("more.txt",), "--resume and DATA exclude each other"),
        (("-o", "x"), "--resume and -o exclude each other"),
        (("--set", "train.seed=1"), "--set train.seed=1 cannot be changed on resume"),
        (("--overwrite",), "--resume and --overwrite exclude each other"),
    ],
)
def test_resume_refuses_other_options(inside, arguments, expected):
    done = inside("train", "--resume", "run", *arguments)
    assert done.returncode == 2 and expected in done.stderr.decode()


@pytest.mark.parametrize("folder", ["missing", "."])
def test_only_runs_can_be_resumed(inside, tmp_path, folder):
    done = inside("train", "--resume", tmp_path / folder)
    assert done.returncode == 1 and b"holds no run" in done.stderr
    assert not (tmp_path / "missing").exists()


def test_missing_data_is_named(inside, tmp_path, text):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    assert inside("train", copy, *SMALL, "--steps", 2, "-o", tmp_path / "run").returncode == 0
    copy.unlink()
    done = inside("train", "--resume", tmp_path / "run")
    assert done.returncode == 1 and str(copy) in done.stderr.decode()


def test_a_nan_loss_stops_before_the_update(inside, text, tmp_path, whole, monkeypatch):
    from lmcli.training.objective import Objective

    true, calls = Objective.loss, []

    def broken(*arguments):
        calls.append(1)
        loss = true(*arguments)
        return loss * float("nan") if len(calls) == 10 else loss

    expected = whole()
    monkeypatch.setattr(Objective, "loss", broken)
    done = inside("train", text, *SMALL, "--steps", STEPS, "-o", tmp_path / "run")
    stderr = done.stderr.decode()
    assert (
        done.returncode == 1
        and "lm: error: training: loss is nan" in stderr
        and "at step 10" in stderr
        and "step 8" in stderr
    )
    assert done.stdout == b"" and "Traceback" not in stderr
    assert max(row["step"] for row in log(tmp_path / "run")) == 9
    assert inside("perplexity", "-m", tmp_path / "run", "--validation").returncode == 0
    done = inside(
        "train", "--resume", tmp_path / "run"
    )  # the eleventh call on is sound: the state was too
    assert done.returncode == 0 and weights(tmp_path / "run") == weights(expected)


def test_ctrl_c_before_the_first_step_leaves_nothing(environment, story, tmp_path):
    large = tmp_path / "large.txt"
    large.write_bytes(story.read_bytes() * 100)
    command = [
        sys.executable,
        "-m",
        "lmcli",
        "train",
        large,
        "-o",
        tmp_path / "new" / "run",
        *SMALL,
        "--steps",
        "5",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        assert (
            b"documents" in process.stderr.readline()
        )  # surveyed; now it learns a tokenizer and encodes
        process.send_signal(signal.SIGINT)
        stderr = process.stderr.read()
    assert process.returncode == 130 and b"Traceback" not in stderr
    assert not (tmp_path / "new").exists()
