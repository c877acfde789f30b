"""The runs and models of a folder, and the models of the Hub's cache, without reading weights."""

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from os.path import isfile
from pathlib import Path
from typing import Any

import yaml

from lmcli import storage
from lmcli.catalog.presets import rounded
from lmcli.checkpoints import hub
from lmcli.checkpoints.config_json import read_config
from lmcli.errors import UserError
from lmcli.model import flops
from lmcli.terminal.tables import Column, table

OVERVIEW_COLUMNS = (
    *("name", "kind", "shape", "parameters", "figure", "best"),
    *("steps", "state", "modified"),
)
# of a validation, the first that there is; the lower the better, but for those of HIGHER
FIGURES = ("val_f1", "val_bits_per_byte", "val_accuracy", "val_loss")
HIGHER = ("val_f1", "val_accuracy")
LAST_BYTES = 1 << 22  # of metrics.jsonl and recipe.yaml that are read


def local_rows(folder: str = ".") -> list[dict[str, Any]]:
    """A row of OVERVIEW_COLUMNS for each run and model in `folder` and `folder`/runs, newest first.

    A value that a folder does not tell is None. Folders that cannot be read are left out.
    """
    rows = []
    for parent in (Path(folder), Path(folder) / "runs"):
        with suppress(OSError):
            paths = [parent / name for name in sorted(os.listdir(parent))]
            rows += [{"name": str(path), **row} for path in paths if (row := _row(path))]
    return sorted(rows, key=lambda row: row["modified"], reverse=True)


def cached_rows() -> tuple[list[dict[str, Any]], int]:
    """A row for each model of the Hub's cache that lm can read, and how many others are there."""
    names = hub.cached_names()
    rows = []
    for name in names:
        snapshot = hub.cached_snapshot(name)
        row = _row(snapshot) if snapshot else None
        if row and row["parameters"]:
            rows.append({"name": name, **row, "kind": "hub"})
    return rows, len(names) - len(rows)


def _row(path: Path) -> dict[str, Any] | None:
    """What a folder is; None if it holds neither a model nor a run."""
    is_run = isfile(path / "recipe.yaml")  # False for another user's folder
    files = [path / name for name in ("config.json", "adapter_config.json")]
    files = [file for file in files if isfile(file)]
    if not files and not is_run:
        return None
    newest = [path / "metrics.jsonl", *files, path / "recipe.yaml"]
    row = dict.fromkeys(OVERVIEW_COLUMNS[1:]) | {"kind": "run" if is_run else "model"}
    time = next(file.stat().st_mtime for file in newest if isfile(file))
    row["modified"] = datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")
    row |= _shape(files[0]) if files else {}
    return row | (_progress(path) if is_run else {})


def _shape(file: Path) -> dict[str, Any]:
    """Shape and number of parameters by a config.json; the base of an adapter."""
    try:
        document = storage.read_json(file)
        if file.name == "adapter_config.json":
            return {"shape": "adapter"}
        _, config = read_config(document, str(file))
    except (UserError, ValueError, TypeError, AttributeError, KeyError):  # damaged, or unknown
        return {}
    return {"shape": config.shape, "parameters": flops.parameters(config).total}


def _progress(path: Path) -> dict[str, Any]:
    """How far a run is and its best figure, of recipe.yaml, or else of metrics.jsonl."""
    recipe = _last_text(path / "recipe.yaml")
    result: Any = {}
    if match := re.search(r"^result:\n((?: .*\n?)+)", recipe, re.MULTILINE):
        try:
            result = yaml.load(match[0], getattr(yaml, "CSafeLoader", yaml.SafeLoader))["result"]
        except (yaml.YAMLError, ValueError):
            result = {}
    result = result if isinstance(result, dict) else {}
    done = result.get("stopped") is False
    steps = result.get("steps")
    evaluations = []
    if not done:
        for row in _metrics(path / "metrics.jsonl"):
            steps = row.get("step", steps)
            evaluations += [row] if "val_loss" in row else []
        figure = next((name for name in FIGURES if evaluations and name in evaluations[-1]), "")
        order = max if figure in HIGHER else min
        values = [row[figure] for row in evaluations if isinstance(row.get(figure), float)]
        result = {figure: order(values)} if values else result
    figure = next((name for name in FIGURES if isinstance(result.get(name), int | float)), "")
    best = result.get(figure)
    return {
        "figure": figure.removeprefix("val_") or None,
        "best": best if best is not None and abs(best) < sys.float_info.max else None,
        "steps": steps if isinstance(steps, int) else None,
        "state": _state(path, done),
    }


def _state(path: Path, done: bool) -> str | None:
    """running, done or resumable; None for a run of which no state is left."""
    try:
        holder = (path / ".lock").read_text(encoding="utf-8")
        match = re.fullmatch(r"process (\d+) on (.*)\n", holder)
        if match and match[2] == socket.gethostname():
            os.kill(int(match[1]), 0)
            return "running"
    except PermissionError:  # it is another user's process
        return "running"
    except (OSError, ValueError, OverflowError):
        pass
    if done:
        return "done"
    return "resumable" if any(path.glob("state/step-*")) else None


def _metrics(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl that can be read, of a long one the last."""
    for line in _last_text(file).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _last_text(file: Path) -> str:
    """The last LAST_BYTES of a file as text; empty if it cannot be read."""
    try:
        with file.open("rb") as handle:
            handle.seek(max(0, file.stat().st_size - LAST_BYTES))
            return handle.read().decode("utf-8", "replace")
    except OSError:
        return ""


def readable(here: list[dict[str, Any]], cached: list[dict[str, Any]], others: int) -> str:
    """The rows for a terminal; `others` is the number of cached models that lm cannot read."""
    fields = []
    if here:
        header = (
            *(Column("here", kind="name"), Column("shape", 4), Column("parameters", 2)),
            *(Column("best"), Column("steps", 1), Column("state"), Column("changed", 3)),
        )
        rows = [
            (
                *(row["name"], row["shape"] or "", _size(row), _best(row)),
                *(_steps(row), row["state"] or "", age(row["modified"])),
            )
            for row in here
        ]
        fields.append(table(header, rows))
    else:
        fields.append("no runs or models here; lm train TEXT makes one\n")
    if cached:
        models = [(row["name"], row["shape"], _size(row)) for row in cached]
        fields.append(table(("in the Hub's cache", "shape", "parameters"), models))
    if others:
        fields.append(f"in the Hub's cache {others:,} more, which lm cannot read\n")
    return "\n".join(fields)


def _size(row: dict[str, Any]) -> str:
    return rounded(row["parameters"]) if row["parameters"] else ""


def _best(row: dict[str, Any]) -> str:
    """The best figure of a run with its name: 2.346 bits/byte, 91.2 % right, loss 0.31."""
    if row["best"] is None:
        return ""
    names = {"bits_per_byte": "bits/byte", "f1": "F1", "accuracy": "accuracy", "loss": "loss"}
    return f"{row['best']:.3f} {names[row['figure']]}"


def _steps(row: dict[str, Any]) -> str:
    return "" if row["steps"] is None else f"{row['steps']:,}"


def age(modified: str) -> str:
    """How long ago a time of `local_rows` is, for people."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(modified)).total_seconds()
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            count = int(seconds // unit)
            return f"{count} {name if count > 1 or name != 'days' else 'day'} ago"
    return "just now"
