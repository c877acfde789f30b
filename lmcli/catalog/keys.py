"""Every key of a preset as a row, from the dataclasses of `config`: nothing is written twice."""

import dataclasses
import difflib
from typing import Any

from lmcli.config import SECTIONS, type_name
from lmcli.errors import UsageError

KEY_COLUMNS = ("key", "type", "default", "range", "meaning")


def key_rows(selection: str = "") -> list[dict[str, str]]:
    """Rows of KEY_COLUMNS: of all keys, a section, or a key with or without its section.

    Raises UsageError for a name that is none of these, with the nearest ones.
    """
    rows = [
        {
            "key": f"{section}.{field.name}",
            "type": type_name(field.type),
            "default": value_text(field.default),
            "range": allowed(field),
            "meaning": field.metadata["meaning"],
        }
        for section, config in SECTIONS.items()
        for field in dataclasses.fields(config)
    ]
    if not selection:
        return rows
    chosen = [row for row in rows if selection in (row["key"], *row["key"].split("."))]
    if not chosen:
        names = [*SECTIONS, *(row["key"] for row in rows)]
        keys = {name.partition(".")[2] or name: name for name in names}
        near = difflib.get_close_matches(selection, [*names, *keys], n=3, cutoff=0.6)
        near = list(dict.fromkeys(keys.get(name, name) for name in near))
        raise UsageError(
            f"no section or key is named {selection!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else ""),
            hint=f"run lm help keys for all, or name a section: {', '.join(SECTIONS)}",
        )
    return chosen


def allowed(field: dataclasses.Field[Any]) -> str:
    """The choices or the range of a key in words; empty if any value of its type will do."""
    low, high, choices = (field.metadata[name] for name in ("low", "high", "choices"))
    if choices:
        return ", ".join(choices)
    if low is None:
        return "true, false" if field.type is bool else ""
    return f"{value_text(low)} or more" if high is None else f"{value_text(low)} to {_high(high)}"


def _high(number: int | float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,.10g}"


def value_text(value: Any) -> str:
    """A value as YAML has it, as `--set` takes it; a dash for none."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value in (None, "") else str(value)
