"""The tables of `lm plan` and `lm bench` for a terminal, and advice for each row of a plan."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmcli.planning.expected_quality import rounded
from lmcli.planning.plan import Plan
from lmcli.terminal.tables import Cell, Column


def rows(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """The plans as rows of figures, bits per byte rounded to what the estimate is good for."""
    return [
        {**dataclasses.asdict(plan), "bits_per_byte": rounded(plan.bits_per_byte)} for plan in plans
    ]


def readable(
    row: Mapping[str, Any], names: Mapping[str, str], time: str, cluster: bool
) -> dict[str | Column, Cell]:
    """Column → cell of a table for a terminal. `time` is the row's, formatted.

    Presets are called by their `names`.
    With `cluster` the columns say what each device holds and what all devices do.
    """
    bits = row["bits_per_byte"]
    memory, speed = f"{row['memory'] / 1e6:,.0f}", f"{row['tokens_per_second']:,.0f}"
    last: dict[str | Column, Cell] = {
        "time": time,
        "bits/byte": "–" if bits is None else f"about {bits}",
    }
    if not cluster:
        epochs = row["epochs"]
        return {
            Column("preset", kind="name"): names[row["preset"]],
            Column("params", 1): _short(row["parameters"]),
            Column("tokens", 5): _short(row["tokens"]),
            Column("epochs", 4): f"{epochs:,.2g}" if epochs < 100 else f"{epochs:,.0f}",
            Column("tok/par", 6): f"{row['tokens_per_parameter']:,.2g}",
            Column("FLOPs", 7): f"{row['flops']:.0e}".replace("e+", "e"),
            Column("MB", 2): memory,
            Column("tok/s", 3): speed,
            **last,
        }
    waiting = row["seconds_communicating"] / row["seconds"] if row["seconds"] else 0
    return {
        Column("preset", kind="name"): names[row["preset"]],
        "devices": f"{row['devices']:,}",
        Column("idle", 5): f"{row['idle_devices']:,}",
        Column("weights", 4): "sharded" if row["sharding"] == "sharded" else "whole",
        "MB each": memory,
        Column("tok/s", 2): speed,
        Column("× one", 1): "–" if row["speedup"] is None else f"{row['speedup']:,.1f}",
        Column("sends", 3): f"{waiting:.0%}",
        **last,
    }


def advice(plan_rows: Sequence[Mapping[str, Any]], cluster: bool) -> Iterator[str]:
    """For each row its advice, and where its memory goes."""
    for row in plan_rows:
        where = f" {devices(row['devices'])}" if cluster else ""
        sentence = ", ".join(
            f"{name} {row[name] / 1e6:,.0f}"
            for name in ("weights", "gradients", "optimizer", "activations")
        )
        program = f"the program {row['process'] / 1e6:,.0f} MB"
        yield f"{row['preset']}{where}: {row['advice']} ({sentence}, {program})"


def devices(count: int) -> str:
    """ "on 1 device", "on 8 devices"."""
    return f"on {count:,} devices" if count > 1 else "on 1 device"


def _short(number: float) -> str:
    """ "1.2M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return str(number)


def speed_cells(row: Mapping[str, Any]) -> dict[str | Column, Cell]:
    """Column → cell of a table for a terminal, from a measurement of training or scoring."""
    time = "step_ms" if "step_ms" in row else "pass_ms"
    cells: dict[str | Column, Cell] = {Column("name", kind="name"): row["name"]}
    if "lines_per_second" in row:
        cells["lines/s"] = f"{row['lines_per_second']:,.0f}"
    cells |= {
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        Column(f"G{row['unit']}", 1): f"{row['achieved'] / 1e9:,.1f}",
        Column("limit", 2): f"{row['limit'] / 1e9:,.1f}",
        "share": f"{row['ratio']:.0%}",
    }
    if row.get("bits_per_byte"):
        cells["bits/byte"] = f"{row['bits_per_byte']:.4f}"
    return cells | {
        Column("dtype", 3): row["dtype"],
        Column("threads", 6): str(row["threads"]),
        Column(time.replace("_", " "), 4): f"{row[time]:,.1f}",
        Column("peak MB", 5): f"{row['peak_memory_bytes'] / 1e6:,.0f}",
    }
