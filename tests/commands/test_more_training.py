"""More training of a finished run: a new budget, whose rate rises and falls anew."""

import json
import os
import shutil
import signal

import pytest
import yaml
from small_runs import SMALL, sets

from lmcli.display import TrainingView

STEPS, MORE = 8, 12
OPTIONS = (*SMALL, *sets("train.averaging=0.3", "train.warmup=0.25", "train.eval_every=2"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder for the runs that are trained once for all tests."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "text.txt").write_text(
        "".join(f"The baker of village {i} sold {i % 7} loaves.\n" for i in range(20))
    )
    return folder


@pytest.fixture
def finished(inside, trained):
    """The folder of a run of STEPS steps."""
    folder = trained / "run"
    if not folder.exists():
        done = inside("train", trained / "text.txt", *OPTIONS, "--steps", STEPS, "-o", folder)
        assert done.returncode == 0, done.stderr.decode()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def extended(inside, finished, trained):
    """The finished run after MORE more steps without a stop, and what was said of them."""
    folder = trained / "extended"
    if not folder.exists():
        shutil.copytree(finished, folder)
        done = inside("train", "--resume", folder, "--steps", MORE)
        assert done.returncode == 0 and done.stdout.decode() == f"{folder}\n"
        (trained / "told").write_bytes(done.stderr)
    return folder, (trained / "told").read_text()


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): Ctrl-C when the display gets this step."""

    def arm(number: int) -> None:
        shown = TrainingView.step

        def step(view, record) -> None:
            shown(view, record)
            if record.step == number:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(TrainingView, "step", step)

    return arm


def log(folder) -> list[dict]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    times = ("elapsed", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in times} for row in rows]


def recipe(folder) -> dict:
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def test_the_rate_rises_and_falls_anew_and_the_log_goes_on(finished, extended):
    folder, told = extended
    steps = [row for row in log(folder) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + MORE + 1))
    # warm-up over a quarter of the budget, then a straight fall to 0 at its end
    rates = [row["learning_rate"] / 0.01 for row in steps[STEPS:]]
    rises, falls = [0.01, 1 / 3, 2 / 3], [1 - i / 9 for i in range(9)]
    assert rates == pytest.approx([*rises, *falls], abs=1e-9)
    assert log(folder)[: len(log(finished))] == log(finished)
    assert (
        f"more training after step {STEPS}: {MORE} steps; the learning rate rises to 0.01 "
        "in the first 25% of it and falls to 0"
    ) in told


def test_the_best_model_is_that_of_both_budgets(extended):
    folder, _ = extended
    evaluations = [row for row in log(folder) if "val_loss" in row]
    best = min(evaluations, key=lambda row: row["val_loss"])
    assert recipe(folder)["result"]["best_step"] == best["step"]


def test_the_recipe_tells_both_budgets(inside, finished, extended):
    folder, _ = extended
    before, after = recipe(finished), recipe(folder)
    assert after["train"] == {**before["train"], "steps": MORE}
    stage = after["stages"][0]
    assert stage["budget"] == {"steps": STEPS} and stage["steps"] == STEPS
    assert after["result"]["steps"] == STEPS + MORE and not after["result"]["stopped"]
    assert after["validation"] == before["validation"]
    shown = json.loads(inside("info", folder, "--json").stdout)
    assert shown["run"]["earlier_budgets"] == [f"steps={STEPS} ({STEPS} steps)"]
    checked = inside("perplexity", "-m", folder, "--validation", "--json")
    assert json.loads(checked.stdout)["bits_per_byte"] == after["result"]["val_bits_per_byte"]


@pytest.mark.parametrize("stop", [STEPS + 1, STEPS + 5, STEPS + MORE])
def test_stopped_and_resumed_it_is_the_same_to_the_bit(inside, run, extended, stop_at, stop):
    expected, _ = extended
    stop_at(stop)
    done = inside("train", "--resume", run, "--steps", MORE)
    assert done.returncode == 130 and f"stopped after step {stop}" in done.stderr.decode()
    assert inside("train", "--resume", run).returncode == 0
    newest = f"state/step-{STEPS + MORE:09d}"
    names = [f"{newest}/{name}.safetensors" for name in ("weights", "optimizer", "random")]
    for name in ("model.safetensors", *names):
        assert (run / name).read_bytes() == (expected / name).read_bytes()
    assert log(run) == log(expected)
    assert recipe(run)["stages"] == recipe(expected)["stages"]


def test_an_unfinished_run_takes_no_budget(inside, run, stop_at):
    stop_at(STEPS + 6)
    assert inside("train", "--resume", run, "--steps", MORE).returncode == 130
    before = (run / "recipe.yaml").read_bytes()
    done = inside("train", "--resume", run, "--steps", MORE)
    assert done.returncode == 2 and done.stdout == b""
    assert f"is not finished: it stands after step {STEPS + 6}" in done.stderr.decode()
    assert f"lm train --resume {run} finishes it" in done.stderr.decode()
    assert (run / "recipe.yaml").read_bytes() == before


def test_a_kill_before_the_recipe_is_written_is_mended(inside, run, extended, stop_at, finished):
    stop_at(STEPS + 3)
    assert inside("train", "--resume", run, "--steps", MORE).returncode == 130
    shutil.copy(finished / "recipe.yaml", run / "recipe.yaml")
    done = inside("train", "--resume", run)
    assert done.returncode == 0, done.stderr.decode()
    assert log(run) == log(extended[0]) and recipe(run)["train"]["steps"] == MORE


def test_a_finished_run_says_so_and_how_to_go_on(inside, run):
    done = inside("train", "--resume", run)
    assert done.returncode == 0 and done.stdout.decode() == f"{run}\n"
    told = f"{run} is finished, after {STEPS} steps: lm train --resume {run} --time 10m trains it"
    assert told in done.stderr.decode()


def test_time_and_epochs_and_tokens_are_budgets_too(inside, run):
    before = sum("loss" in row for row in log(run))
    done = inside("train", "--resume", run, "--epochs", 1, "--tokens", 100_000)
    assert done.returncode == 0 and "1.0 epochs" in done.stderr.decode()
    assert recipe(run)["result"]["epochs"] > 2  # the data were read before, and are read again
    steps = sum("loss" in row for row in log(run))
    assert before < steps
    done = inside("train", "--resume", run, "--time", 0.001)
    assert done.returncode == 1 and "over before the first step" in done.stderr.decode()
    assert sum("loss" in row for row in log(run)) == steps and len(recipe(run)["stages"]) == 1
    assert inside("train", "--resume", run, "--steps", 1).returncode == 0
    assert [stage["budget"] for stage in recipe(run)["stages"]] == [
        {"steps": STEPS},
        {"epochs": 1.0, "tokens": 100_000},
    ]


def test_two_budgets_of_one_kind_are_refused(inside, run):
    done = inside(
        "train", "--resume", run, "--steps", 3, "--set", "train.time=5", "--allow-changes"
    )
    assert done.returncode == 2 and "--steps and --set train.time=5" in done.stderr.decode()
