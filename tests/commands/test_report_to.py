"""--report-to: figures and samples in a service, one failure of which ends no training."""

import json
import sqlite3
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
from small_runs import SMALL, sets

OPTIONS = (*SMALL[:-2], *sets("train.sample_every=2", "train.eval_every=2"))
FIGURES = {"loss", "learning_rate", "gradient_norm", "tokens", "elapsed", "tokens_per_second"}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(f"The baker of village {i} sold {i % 7} loaves.\n" for i in range(20)))
    return file


@pytest.fixture
def wandb(monkeypatch):
    """A module wandb that keeps what it gets: calls of init, rows of log."""
    module = ModuleType("wandb")
    module.__spec__ = SimpleNamespace(name="wandb")
    module.inits, module.rows, module.finished = [], [], []

    def init(**options):
        module.inits.append(options)
        return SimpleNamespace(
            offline=False,
            url="https://example.org/run",
            define_metric=lambda *_, **__: None,
            log=module.rows.append,
            finish=lambda: module.finished.append(True),
        )

    module.init, module.Settings, module.Html = init, SimpleNamespace, lambda text: text
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_figures_and_samples_are_those_of_the_run(inside, text, tmp_path, wandb):
    run = tmp_path / "run"
    done = inside("train", text, *OPTIONS, "--steps", 4, "-o", run, "--report-to", "wandb", "-q")
    assert done.returncode == 0 and done.stdout.decode() == f"{run}\n" and done.stderr == b""
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in logged:
        names = FIGURES if "loss" in line else line.keys() - FIGURES
        row = {name: line[name] for name in ("step", *names)}
        assert any(row.items() <= sent.items() for sent in wandb.rows)
    assert [row["step"] for row in wandb.rows if "sample" in row] == [2, 4]
    assert all(row["sample"].startswith("<pre>") for row in wandb.rows if "sample" in row)
    assert wandb.finished == [True] and wandb.inits[0]["config"]["train"]["steps"] == 4


def test_a_resumed_run_goes_on_in_the_same_place_untold(inside, text, tmp_path, wandb):
    run = tmp_path / "run"
    options = ("--report-to", "wandb", "-o", run)
    assert inside("train", text, *OPTIONS, "--steps", 2, *options).returncode == 0
    done = inside("train", "--resume", run, "--steps", 2)
    assert b"reporting to wandb: https://example.org/run" in done.stderr
    first, second = wandb.inits
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert {row["step"] for row in wandb.rows} == {1, 2, 3, 4}
    assert inside("train", text, *OPTIONS, "--steps", 1, "-o", run, "--overwrite").returncode == 0
    assert len(wandb.inits) == 2 and not (run / "reports.json").exists()


def test_a_service_that_fails_is_named_once(inside, text, tmp_path, wandb):
    def broken(row):
        raise ConnectionError("no route to\nhost")

    true = wandb.init
    wandb.init = lambda **options: SimpleNamespace(**{**vars(true(**options)), "log": broken})
    run = tmp_path / "run"
    done = inside("train", text, *OPTIONS, "--steps", 3, "-o", run, "--report-to", "wandb")
    assert done.returncode == 0 and done.stdout.decode() == f"{run}\n"
    told = "wandb failed, and gets nothing more of this run: no route to host"
    assert done.stderr.decode().count(told) == 1


def test_a_service_that_is_not_installed_is_refused(inside, text, tmp_path, monkeypatch):
    monkeypatch.setattr("lmcli.runs.tracking.find_spec", lambda name: None)
    done = inside("train", text, "-o", tmp_path / "run", "--report-to", "trackio")
    assert done.returncode == 2 and b"pip install trackio" in done.stderr
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_the_figures_back(inside, text, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    options = ("--report-to", "tensorboard", "-o", run)
    assert inside("train", text, *OPTIONS, "--steps", 4, *options).returncode == 0
    assert inside("train", "--resume", run, "--steps", 2).returncode == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "val_loss"):
        expected = [(line["step"], line[name]) for line in logged if name in line]
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert events.Tags()["tensors"] == ["sample/text_summary"]


@pytest.fixture
def trackio(monkeypatch, tmp_path):
    """The real trackio, where it is installed; else a module that prints and keeps as it does."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if find_spec("trackio"):
        return None
    module, runs = ModuleType("trackio"), {}
    module.__spec__ = SimpleNamespace(name="trackio")

    def init(project, name=None, config=None, resume="never"):
        print(f"* Trackio project initialized: {project}")
        rows = runs.setdefault(name, [])
        assert resume == "allow" and config["train"]["steps"]
        return SimpleNamespace(log=lambda metrics, step=None: rows.append((step, metrics)))

    module.init, module.runs = init, runs
    module.finish = lambda: print("* Run finished. Uploading logs to Trackio (please wait...)")
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def tracked(trackio, folder) -> list[tuple[int, dict]]:
    """(step, figures) of the one run, as trackio stores them."""
    if trackio:
        (rows,) = trackio.runs.values()
        return rows
    with sqlite3.connect(folder / "lm.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id")
        names, steps, figures = zip(*rows)
    assert len(set(names)) == 1
    return list(zip(steps, map(json.loads, figures)))


def test_trackio_reads_the_figures_back(inside, text, tmp_path, trackio):
    run = tmp_path / "run"
    options = ("--report-to", "trackio", "-o", run)
    done = inside("train", text, *OPTIONS, "--steps", 4, *options)
    assert (done.returncode, done.stdout.decode()) == (0, f"{run}\n")  # not what trackio prints
    assert b"lm: reporting to trackio: trackio show --project lm\n" in done.stderr
    assert inside("train", "--resume", run, "--steps", 2).stdout.decode() == f"{run}\n"
    rows = tracked(trackio, tmp_path / "trackio")
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "val_loss"):
        expected = [(line["step"], line[name]) for line in logged if name in line]
        assert [(step, row[name]) for step, row in rows if name in row] == expected
    assert [step for step, row in rows if "sample" in row] == [2, 4, 6]
