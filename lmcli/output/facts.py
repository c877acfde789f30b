"""Facts of `lm info`: a summary with damage, written as lines of key and value or as a table."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lmcli.config import ModelConfig
from lmcli.data.output_file import escaped
from lmcli.errors import UserError
from lmcli.terminal.tables import wrapped
from lmcli.terminal.wrapping import width
from lmcli.text.characters import visible

MAX_ITEMS = 12  # of a list or mapping on a terminal
MIN_TEXT_WIDTH = 20
# what a reader wants to know first; the other facts follow
FIRST_FACTS = (
    *("kind", "path", "damage", "family", "parameters.total", "labels", "context", "vocab_size"),
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "weights.bytes"),
    *("weights.dtypes", "adapter.base", "adapter.rank", "run.data", "run.tokens", "run.seconds"),
    *("run.best_step", "run.val_bits_per_byte", "run.val_perplexity", "commands", "tokenizer.kind"),
    *("tokenizer.template", "tokenizer.chat_template"),
)


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


def as_table(facts: Mapping[str, Any], columns: int, most: int | None = None) -> str:
    """Two columns for readers: sizes with units, shares of parameters, lists cut.

    With `most` lines the first facts come first, and the last line says how many are left out.
    """
    cells = {key: visible(escaped(_readable(key, value, facts))) for key, value in _flat(facts)}
    indent = max(map(width, cells)) + 2
    room = max(MIN_TEXT_WIDTH, columns - indent)
    blocks = {key: wrapped(text, room) or ["–"] for key, text in cells.items()}
    if most is not None and sum(map(len, blocks.values())) > most:
        order = [key for key in FIRST_FACTS if key in blocks]
        order += [key for key in blocks if key not in order]
        lines: list[str] = []
        while order and len(lines) + len(blocks[order[0]]) < most:
            lines += _lines(order[0], blocks[order.pop(0)], indent)
        more = f"… {len(order)} more facts: lm info -v"
        return "\n".join([*lines, more]) + "\n"
    return "\n".join(line for key in blocks for line in _lines(key, blocks[key], indent)) + "\n"


def _lines(key: str, texts: list[str], indent: int) -> list[str]:
    return [f"{name:<{indent}}{text}" for name, text in zip([key, *[""] * len(texts)], texts)]


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
