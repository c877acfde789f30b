"""Facts of `lm info`: a summary with damage, written as lines of key and value or as a table."""

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lmcli.config import ModelConfig
from lmcli.data.output_file import escaped
from lmcli.errors import UserError
from lmcli.text.characters import visible

MAX_ITEMS = 12  # of a list or mapping on a terminal
MIN_TEXT_WIDTH = 20


@dataclass
class Summary:
    """Facts (nested one or two levels), the damage found, and the configuration of a model."""

    facts: dict[str, Any]
    damage: list[UserError] = field(default_factory=list)
    config: ModelConfig | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Adds a UserError of the block to the damage, unless it is there already."""
        try:
            yield
        except UserError as error:
            if str(error) not in map(str, self.damage):
                self.damage.append(error)


def as_lines(facts: Mapping[str, Any]) -> str:
    """Lines of key and value, tab-separated; a key of an inner mapping is OUTER.INNER."""
    return "".join(f"{key}\t{escaped(_plain(value))}\n" for key, value in _flat(facts))


def as_table(facts: Mapping[str, Any], width: int) -> str:
    """Two columns in `width`, for readers: sizes with units, shares of parameters, lists cut."""
    cells = [(key, visible(escaped(_readable(key, value, facts)))) for key, value in _flat(facts)]
    indent = max(len(key) for key, _ in cells) + 2
    lines = []
    for key, text in cells:
        wrapped = textwrap.wrap(
            text, max(MIN_TEXT_WIDTH, width - indent), break_on_hyphens=False
        ) or ["–"]
        lines.append(f"{key:<{indent}}{wrapped[0]}")
        lines += [" " * indent + line for line in wrapped[1:]]
    return "\n".join(lines) + "\n"


def _flat(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())
        else:
            yield key, value


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {None: "NA", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _readable(key: str, value: Any, facts: Mapping[str, Any]) -> str:
    group, _, inner = key.partition(".")
    if isinstance(value, dict):
        items = [f"{name}={_readable('', item, facts)}" for name, item in value.items()]
        more = [f"…={len(items) - MAX_ITEMS} more"] if len(items) > MAX_ITEMS else []
        return ", ".join(items[:MAX_ITEMS] + more)
    if isinstance(value, list) and len(value) > MAX_ITEMS:
        value = [*value[:MAX_ITEMS], f"… {len(value) - MAX_ITEMS} more"]
    if isinstance(value, bool) or not isinstance(value, int):
        return _plain(value)
    if "bytes" in key.replace(".", "_").split("_") or group == "memory":
        return _size(value)
    share = ""
    if group == "parameters" and inner != "total":
        share = f" ({value / facts['parameters']['total']:.1%})"
    return f"{value:,}{share}"


def _size(count: int) -> str:
    """9,999 bytes, 12.3 kB, 4.5 MB …, in powers of 1,000."""
    if count < 10_000:
        return f"{count:,} bytes"
    size, unit = next(each for each in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= each[0])
    return f"{count / size:.1f} {unit}"
