"""What the fields of a row mean: its text, its two sides, its labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

# the first of these sets that a row has gives its text; several fields are joined as they stand
TEXT_FIELDS = (("text",), ("prompt", "completion"), ("source",), ("prompt",))
LABELLED = ("text", "label")


class Pair(NamedTuple):
    """Fields that make two texts, what is given and what is to follow. `sides` makes them of a row; where a decoder reads
    both as one text, `between` parts them."""

    fields: tuple[str, ...]
    sides: Callable[[dict], tuple[str, str]]
    between: str = ""


def row_text(row: dict, wanted: tuple[str, ...]) -> str:
    """The text of a row: the fields `wanted`, else the first set of TEXT_FIELDS it has. ValueError when it has none."""
    names = wanted or next((names for names in TEXT_FIELDS if all(name in row for name in names)), None)
    if names is None:
        raise ValueError(f"no text field among {', '.join(map(repr, row)) or 'none'}: name one with --field")
    return "".join(row_field(row, name) for name in names)


def row_field(row: dict, name: str) -> str:
    """One field of a row. ValueError when it is missing or no text."""
    text = row.get(name)
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is missing or not a text; fields: {', '.join(map(repr, row))}")
    text.encode("utf-8")  # a lone surrogate ("\ud800") is valid JSON and no text: UnicodeEncodeError is a ValueError
    return text


def row_labels(row: dict, name: str, several: bool = False) -> tuple[str, ...]:
    """The labels of a row: its one label, or with `several` those of a list, or of a text in which commas part them.

    ValueError when there is none; with `several` there may be none.
    """
    value = row.get(name)
    if several and isinstance(value, str):
        value = [label.strip() for label in value.split(",") if label.strip()]
    found = value if several and isinstance(value, list) else [value]
    for label in found:
        if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
            raise ValueError(f"field {name!r} is missing or no label; fields: {', '.join(map(repr, row))}")
    return tuple(map(str, found))


def _instruction(row: dict) -> tuple[str, str]:
    more = row_field(row, "input") if "input" in row else ""
    return "\n".join(filter(None, (row_field(row, "instruction"), more))), row_field(row, "output")


def _messages(row: dict) -> tuple[str, str]:
    """What was said before the last message, each as "role: content", and its content.

    >>> _messages({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    ('user: Hi\\nassistant:', ' Hello')
    """
    messages: Any = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError("field 'messages' is no list of messages with role and content")
    said = [(row_field(message, "role"), row_field(message, "content")) for message in messages]
    last, content = said.pop()
    return "".join(f"{role}: {text}\n" for role, text in said) + f"{last}:", f" {content}"


def _question(row: dict) -> tuple[str, str]:
    answers = row.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else answers
    first = texts[0] if isinstance(texts, list) and texts else ""
    return (f"question: {row_field(row, 'question')} context: {row_field(row, 'context')}",
            row_field(first, "text") if isinstance(first, dict) else str(first))


def _named(*names: str) -> Callable[[dict], tuple[str, str]]:
    return lambda row: (row_field(row, names[0]), row_field(row, names[1]))


# in the order in which they are looked for
PAIRS = (Pair(("source", "target"), _named("source", "target"), "\n"),
         Pair(("prompt", "completion"), _named("prompt", "completion")),
         Pair(("messages",), _messages), Pair(("instruction", "output"), _instruction, "\n"),
         Pair(("context", "question", "answers"), _question, "\n"))


def known_pair(keys: list[str] | dict) -> Pair | None:
    """The first of PAIRS whose fields are all there."""
    return next((pair for pair in PAIRS if set(pair.fields) <= set(keys)), None)


def pair_of(fields: tuple[str, ...]) -> Pair | None:
    """The Pair of these fields: a known one, or any two; None for other numbers of fields."""
    known = next((pair for pair in PAIRS if pair.fields == fields), None)
    return known or (Pair(fields, _named(*fields), "\n") if len(fields) == 2 else None)
