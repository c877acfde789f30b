"""The table of `lm plan` for a terminal, and a line of advice for each row."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmcli.planning.expected_quality import rounded
from lmcli.planning.plan import Plan


def rows(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """The plans as rows of figures, bits per byte rounded to what the estimate is good for."""
    return [
        {**dataclasses.asdict(plan), "bits_per_byte": rounded(plan.bits_per_byte)} for plan in plans
    ]


def readable(row: Mapping[str, Any], time: str, cluster: bool) -> dict[str, str]:
    """Column → cell of a table for a terminal. `time` is the row's, formatted.

    With `cluster` the columns say what each device holds and what all devices do.
    """
    bits = row["bits_per_byte"]
    memory, speed = f"{row['memory'] / 1e6:,.0f}", f"{row['tokens_per_second']:,.0f}"
    last = {"time": time, "bits/byte": "–" if bits is None else f"about {bits}"}
    if not cluster:
        epochs = row["epochs"]
        return {
            "preset": row["preset"],
            "params": _short(row["parameters"]),
            "tokens": _short(row["tokens"]),
            "epochs": f"{epochs:,.2g}" if epochs < 100 else f"{epochs:,.0f}",
            "tok/par": f"{row['tokens_per_parameter']:,.2g}",
            "FLOPs": f"{row['flops']:.0e}".replace("e+", "e"),
            "MB": memory,
            "tok/s": speed,
            **last,
        }
    waiting = row["seconds_communicating"] / row["seconds"] if row["seconds"] else 0
    return {
        "preset": row["preset"],
        "devices": f"{row['devices']:,}",
        "idle": f"{row['idle_devices']:,}",
        "weights": "sharded" if row["sharding"] == "sharded" else "whole",
        "MB each": memory,
        "tok/s": speed,
        "× one": "–" if row["speedup"] is None else f"{row['speedup']:,.1f}",
        "sends": f"{waiting:.0%}",
        **last,
    }


def advice(plan_rows: Sequence[Mapping[str, Any]], cluster: bool) -> Iterator[str]:
    """For each row its advice, and where its memory goes."""
    for row in plan_rows:
        where = f" {devices(row['devices'])}" if cluster else ""
        parts = ", ".join(
            f"{name} {row[name] / 1e6:,.0f}"
            for name in ("weights", "gradients", "optimizer", "activations")
        )
        program = f"the program {row['process'] / 1e6:,.0f} MB"
        yield f"{row['preset']}{where}: {row['advice']} ({parts}, {program})"


def devices(count: int) -> str:
    """ "on 1 device", "on 8 devices"."""
    return f"on {count:,} devices" if count > 1 else "on 1 device"


def _short(number: float) -> str:
    """ "1.2M"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return str(number)
