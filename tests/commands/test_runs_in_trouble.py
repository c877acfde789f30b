"""Runs with too little memory or a diverging loss: messages, and what is kept."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL

pytestmark = pytest.mark.slow

# many heads: attention weights take memory, and hardly any time
ROOMY = (
    "--preset",
    "tiny",
    "--set",
    "model.hidden_size=32",
    "--set",
    "model.num_hidden_layers=2",
    "--set",
    "model.num_attention_heads=16",
    "--set",
    "tokenizer.vocab_size=300",
    "--set",
    "train.batch_tokens=8192",
    "--set",
    "train.optimizer=adamw",
    "--set",
    "train.precision=float32",
    "--set",
    "train.validation_bytes=2000",
    "--steps",
    "2",
    "--device",
    "cpu",
)
LIMITED = """
import os, resource, sys
from lmcli.commands import run
from lmcli.training import loop

# from the first step on there is only so much more memory
def events(trainer, true=loop.Trainer.events):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
    yield from true(trainer)
loop.Trainer.events = events
code = run(sys.argv[2:])
sys.stdout.flush()
os._exit(code)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """About 9 rows of 32 tokens an epoch."""
    path = tmp_path_factory.mktemp("trouble") / "text.txt"
    path.write_text("".join(f"The baker of village {i} sold {i % 7} loaves.\n" for i in range(20)))
    return path


def weights(folder) -> dict:
    return load_file(folder / "model.safetensors")


def states(folder) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("state/step-*"))


def error_of(done) -> list[str]:
    """The two lines of the error that ended a command."""
    stderr = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b"" and "Traceback" not in stderr, stderr
    lines = stderr.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("lm: error: ")]
    assert len(lines) == at + 2
    return lines[at:]


def limited(environment, memory: int, *arguments) -> subprocess.CompletedProcess:
    """`lm` with this many bytes of memory from its first step on.

    Without the kernels, which need less, and without the address space that the C library keeps
    for finished threads (those of the tokenizer), where steps would find memory.
    """
    command = [sys.executable, "-c", LIMITED, str(memory), *map(str, arguments)]
    without = {"LM_KERNELS": "0", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, capture_output=True, env={**environment, **without}, timeout=120)


@pytest.mark.skipif(
    sys.platform != "linux", reason="memory can be limited, and read, on Linux only"
)
class TestMemory:
    def test_a_micro_batch_too_large_is_halved_without_changing_the_model(
        self, environment, story, tmp_path
    ):
        done = limited(environment, 150 << 20, "train", story, "-o", tmp_path / "limited", *ROOMY)
        stderr = done.stderr.decode()
        assert done.returncode == 0 and done.stdout.decode() == f"{tmp_path / 'limited'}\n", stderr
        notes = [line for line in stderr.splitlines() if "out of memory" in line]
        assert notes[0] == (
            "lm: out of memory with 8,192 tokens at once: going on with 4,096; "
            "the batch of an optimizer step stays 8,192"
        )
        (state,) = (tmp_path / "limited" / "state").glob("*2")
        tokens = json.loads((state / "counters.json").read_text())["micro_batch_tokens"]
        assert f"going on with {tokens:,};" in notes[-1] and tokens == 8192 >> len(notes)

        arguments = [
            "train",
            story,
            "-o",
            tmp_path / "small",
            *ROOMY,
            "--set",
            f"train.micro_batch_tokens={tokens}",
        ]
        command = [sys.executable, "-m", "lmcli", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, env={**environment, "LM_KERNELS": "0"}, timeout=120
        )
        assert done.returncode == 0 and b"out of memory" not in done.stderr
        small = weights(tmp_path / "small")
        for name, value in weights(tmp_path / "limited").items():
            torch.testing.assert_close(value, small[name], rtol=0, atol=1e-6)

    def test_too_little_memory_for_one_row_is_a_two_line_error(self, environment, story, tmp_path):
        done = limited(
            environment,
            1 << 20,
            "train",
            story,
            "-o",
            tmp_path / "run",
            *ROOMY,
            "--set",
            "train.context=2048",
        )
        first, second = error_of(done)
        assert re.search(
            r"out of memory (at step 1: not even one row of 2,048 tokens fits|in )", first
        )
        assert "lower train.context" in second


class TestExplodingLoss:
    @pytest.mark.parametrize("optimizer", ["adamw", "muon"])
    @pytest.mark.parametrize("rate", ["1e9", "1e4"])
    def test_a_far_too_high_rate_is_a_two_line_error_and_leaves_a_model_that_loads(
        self, lm, text, tmp_path, optimizer, rate
    ):
        folder = tmp_path / "run"
        rates = (
            "--set",
            f"train.learning_rate={rate}",
            "--set",
            f"train.matrix_learning_rate={rate}",
        )
        first, second = error_of(
            lm(
                "train",
                text,
                "-o",
                folder,
                *SMALL,
                "--set",
                f"train.optimizer={optimizer}",
                *rates,
                "--steps",
                20,
            )
        )
        assert re.match(
            "lm: error: training: (loss is|gradient norm is|the loss has exploded)", first
        )
        assert " step " in first and "float" in first  # which precision, bfloat16 or float32
        assert "learning rate " in first and "gradient norm " in first and "of epoch" in first
        assert f"{folder} keeps the weights it began with" in second
        assert "start again with --overwrite --set train.learning_rate=0.01" in second
        assert all(value.isfinite().all() for value in weights(folder).values()) and states(
            folder
        ) == [0]
        done = lm("generate", "-m", folder, "The", "-n", 3)
        assert done.returncode == 0 and b"Traceback" not in done.stderr

    @pytest.fixture
    def grown_after(self, monkeypatch):
        """grown_after(step): the update of that step leaves weights a thousand times too large."""
        from lmcli.training.optimizers import Optimizers

        def arm(last: int) -> None:
            true, steps = Optimizers.step, []

            def step(optimizer):
                true(optimizer)
                steps.append(1)
                if len(steps) == last:
                    with torch.no_grad():
                        for weight in (
                            weight for group in optimizer.groups for weight in group.parameters
                        ):
                            weight.mul_(1000.0)

            monkeypatch.setattr(Optimizers, "step", step)

        return arm

    # states and evaluations are due after steps 3, 5, 8, 10, 13 …
    def test_divergence_keeps_the_best_model_and_the_states_before_it(
        self, inside, text, tmp_path, grown_after
    ):
        folder = tmp_path / "run"
        grown_after(12)
        first, second = error_of(inside("train", text, "-o", folder, *SMALL, "--steps", 20))
        assert "the loss has exploded" in first and "at step 13 (" in first and "row" in first
        assert f"{folder} keeps the best model, of step 10, and the state of step 10" in second
        assert states(folder) == [8, 10]
        assert all(value.isfinite().all() for value in weights(folder).values())

        command = re.search(r": lm (train --resume .*?)( or --set.*)?$", second)[1]
        done = inside(*command.split())
        assert done.returncode == 0, done.stderr.decode()
        assert "learning_rate: 0.003" in (folder / "recipe.yaml").read_text()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
        assert sorted(rates) == list(range(1, 21)) and rates[11] == pytest.approx(
            0.3 * rates[10], rel=0.2
        )

    def test_a_diverged_state_is_removed_if_there_is_an_older_one(
        self, inside, text, tmp_path, grown_after
    ):
        """The weights are finite and so were saved; only the next loss shows the divergence."""
        grown_after(13)
        first, second = error_of(
            inside("train", text, "-o", tmp_path / "run", *SMALL, "--steps", 20)
        )
        assert (
            "at step 14 (" in first
            and "the best model, of step 10, and the state of step 10" in second
        )
        assert states(tmp_path / "run") == [10]


def test_only_some_settings_may_change_on_resume(inside, text, tmp_path):
    folder = tmp_path / "run"
    assert inside("train", text, "-o", folder, *SMALL, "--steps", 4).returncode == 0
    before = (folder / "recipe.yaml").read_text()
    done = inside("train", "--resume", folder, "--set", "model.hidden_size=64")
    assert (
        done.returncode == 2 and b"model.hidden_size=64 cannot be changed on resume" in done.stderr
    )
    assert (
        b"learning_rate, matrix_learning_rate, gradient_clip, precision, recompute" in done.stderr
    )
    done = inside("train", "--resume", folder, "--set", "train.learning_rate=fast")
    assert done.returncode == 2 and b"learning_rate: 'fast' is not a number" in done.stderr
    assert (folder / "recipe.yaml").read_text() == before
    done = inside(
        "train",
        "--resume",
        folder,
        "--set",
        "train.recompute=on",
        "--set",
        "train.gradient_clip=0.5",
    )
    assert done.returncode == 0 and "recompute: 'on'" in (folder / "recipe.yaml").read_text()


def test_activation_checkpointing_does_not_change_the_model(inside, text, tmp_path):
    models = []
    for recompute in ("off", "on"):
        done = inside(
            "train",
            text,
            "-o",
            tmp_path / recompute,
            *SMALL,
            "--steps",
            6,
            "--set",
            "train.dropout=0.2",
            "--set",
            f"train.recompute={recompute}",
        )
        assert done.returncode == 0
        models.append((tmp_path / recompute / "model.safetensors").read_bytes())
    assert models[0] == models[1]
