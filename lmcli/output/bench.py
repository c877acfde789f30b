"""The table of `lm bench` for a terminal."""

from collections.abc import Mapping
from typing import Any


def readable(row: Mapping[str, Any]) -> dict[str, str]:
    """Column → cell of a table for a terminal, from a measurement of training or scoring."""
    time = "step_ms" if "step_ms" in row else "pass_ms"
    cells = {"name": row["name"]}
    if "lines_per_second" in row:
        cells["lines/s"] = f"{row['lines_per_second']:,.0f}"
    cells |= {
        "tokens/s": f"{row['tokens_per_second']:,.0f}",
        f"G{row['unit']}": f"{row['achieved'] / 1e9:,.1f}",
        "limit": f"{row['limit'] / 1e9:,.1f}",
        "share": f"{row['ratio']:.0%}",
    }
    if row.get("bits_per_byte"):
        cells["bits/byte"] = f"{row['bits_per_byte']:.4f}"
    return cells | {
        "dtype": row["dtype"],
        "threads": str(row["threads"]),
        time.replace("_", " "): f"{row[time]:,.1f}",
        "peak MB": f"{row['peak_memory_bytes'] / 1e6:,.0f}",
    }
