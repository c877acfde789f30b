"""Which fields of a row hold its text, pair, labels and answers: the one table and its readers.

A row is what data/rows.py makes of a line: the fields of a JSON object, the columns of a table, or
a plain string. All functions raise ValueError for a row without the fields; whoever reads the file
adds its name and the line.
"""

import json
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lmcli.errors import UsageError, did_you_mean
from lmcli.text.characters import RepeatedKey, parse_json

Row = Mapping[str, Any]

# -- the table: in each line the first set of fields that a row has is used

MESSAGES = ("messages",)
# one text: several fields are concatenated
TEXT_FIELDS = (("text",), ("prompt", "completion"), ("source",), ("prompt",))
# what a model continues
PROMPT_FIELDS = (
    *(MESSAGES, ("prompt",), ("source",), ("instruction", "input"), ("instruction",)),
    *(("question", "context"), ("text",)),
)
# a text and its label
TEXT_LABEL_FIELDS = ("text", "label")
# a question about a context: `answers` as in SQuAD
QUESTION_FIELDS = ("context", "question", "answers")
# minimal pairs, as in BLiMP (Warstadt et al. 2020) and CrowS-Pairs (Nangia et al. 2020), and short
# forms of these names
MINIMAL_PAIR_FIELDS = (
    ("sentence_good", "sentence_bad"),
    ("sent_more", "sent_less"),
    ("good", "bad"),
    ("more", "less"),
)

MAX_WHOLE_FLOAT = 2**53  # up to it a float is one whole number


class MissingField(ValueError):
    """A row lacks a field."""


class PairSchema(NamedTuple):
    """Fields that hold a source and a target text; `texts` reads both.

    A decoder reads them joined by `separator`. `composed`: the texts are put together from several
    fields or messages.
    """

    fields: tuple[str, ...]
    texts: Callable[[Row], tuple[str, str]]
    separator: str = ""
    composed: bool = False


def _two_fields(source: str, target: str) -> Callable[[Row], tuple[str, str]]:
    return lambda row: (row_field(row, source), row_field(row, target))


def _chat(row: Row) -> tuple[str, str]:
    """(all messages but the last, as "role: content", and the last role; the last content).

    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> _chat({"messages": messages})
    ('user: Hi\\nassistant:', ' Hello')
    """
    messages = row_messages(row, MESSAGES[0])
    turns = [(row_field(message, "role"), row_field(message, "content")) for message in messages]
    last_role, reply = turns.pop()
    return "".join(f"{role}: {text}\n" for role, text in turns) + f"{last_role}:", f" {reply}"


def _instruction(row: Row) -> tuple[str, str]:
    details = row_field(row, "input") if "input" in row else ""
    prompt = "\n".join(filter(None, (row_field(row, "instruction"), details)))
    return prompt, row_field(row, "output")


def _question(row: Row) -> tuple[str, str]:
    texts = answer_texts(row, "answers")
    prompt = question_prompt(row_field(row, "question"), row_field(row, "context"))
    return prompt, texts[0] if texts else ""


def question_prompt(question: str, context: str) -> str:
    """The source text of a question about a context, for models that write their answer."""
    return f"question: {question} context: {context}"


SOURCE_TARGET, PROMPT_COMPLETION = ("source", "target"), ("prompt", "completion")
PAIR_SCHEMAS = (
    PairSchema(SOURCE_TARGET, _two_fields(*SOURCE_TARGET), "\n"),
    PairSchema(PROMPT_COMPLETION, _two_fields(*PROMPT_COMPLETION)),
    PairSchema(MESSAGES, _chat, composed=True),
    PairSchema(("instruction", "output"), _instruction, "\n", composed=True),
    PairSchema(QUESTION_FIELDS, _question, "\n"),
)


@dataclass(frozen=True)
class TaskSchema:
    """Fields of rows to evaluate. `kind` says what is predicted: labels, texts, answers, or pairs.

    For pairs the prediction is whether the first text is likelier. Of each tuple the first field in
    the row is used; of `inputs` the first set of fields.
    """

    kind: str
    inputs: tuple[tuple[str, ...], ...]
    references: tuple[str, ...]
    predictions: tuple[str, ...]


# `lm classify --json` writes a record's own label as given_label, and the predicted one as label
TASK_SCHEMAS = {
    "labels": TaskSchema(
        "labels",
        (TEXT_LABEL_FIELDS[:1],),
        ("given_labels", "given_label", "labels", "label"),
        ("prediction", "labels", "label"),
    ),
    "texts": TaskSchema(
        "texts",
        (("source",), ("prompt",), ("document",), ("article",)),
        ("target", "completion", "summary", "highlights"),
        ("prediction", "text"),
    ),
    "answers": TaskSchema(
        "answers",
        (("question", "context"),),
        ("answers", "answer"),
        ("prediction", "prediction_text", "answer", "text"),
    ),
    "pairs": TaskSchema("pairs", MINIMAL_PAIR_FIELDS, (), ("prediction", "first_likelier")),
}


def first_present(row: Collection[str], field_sets: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The first set of fields that are all in the row; () when there is none."""
    return next((names for names in field_sets if all(name in row for name in names)), ())


# -- text


def row_field(row: Row, name: str) -> str:
    """The text of one field."""
    return check_text(row.get(name), name, row)


def check_text(text: Any, name: str, row: Row) -> str:
    """The text itself; ValueError, which names the field, for anything else."""
    if isinstance(text, str):
        return text
    if name in row:
        raise ValueError(f"field {name!r} is not a text; fields: {field_names(row)}")
    near = did_you_mean(name, row)
    raise MissingField(f"field {name!r} is missing; fields: {field_names(row)}{near}")


def row_text(row: Row | str, fields: tuple[str, ...] = ()) -> str:
    """The text of a row: of these fields or the first set of TEXT_FIELDS; a plain line itself."""
    if isinstance(row, str):
        return row
    names = fields or first_present(row, TEXT_FIELDS)
    if not names:
        raise MissingField(f"no text field among {field_names(row)}: name one with --field")
    return "".join(row_field(row, name) for name in names)


def row_prompt(row: Row | str, fields: tuple[str, ...] = ()) -> str | list[dict[str, Any]]:
    """The text or the messages that a model continues: of these fields or of PROMPT_FIELDS."""
    if isinstance(row, str):
        return row
    names = fields or first_present(row, PROMPT_FIELDS)
    if len(names) == 1 and (names == MESSAGES or isinstance(row.get(names[0]), list)):
        return row_messages(row, names[0])
    if not fields and names[:1] == ("question",):
        return question_prompt(row_field(row, "question"), row_field(row, "context"))
    if not fields and names[:1] == ("instruction",):
        return "\n".join(filter(None, (row_field(row, name) for name in names)))
    return row_text(row, names)


def row_messages(row: Row, name: str) -> list[dict[str, Any]]:
    """The messages in a field: a list of objects, each with a role."""
    value = row.get(name)
    messages = value if isinstance(value, list) else []
    if not messages or not all(isinstance(m, dict) and m.get("role") for m in messages):
        raise ValueError(f"field {name!r} is no list of messages with role and content")
    return messages


def row_texts(row: Row, name: str) -> tuple[str, ...]:
    """The texts of a field that holds one text or a list of texts."""
    value = row.get(name)
    texts = value if isinstance(value, list) and value else [value]
    return tuple(check_text(text, name, row) for text in texts)


def field_names(row: Row) -> str:
    """The names of a row's fields, for messages."""
    return ", ".join(map(repr, row)) or "none"


# -- pairs


def find_pair_schema(fields: Collection[str]) -> PairSchema | None:
    """The first of PAIR_SCHEMAS whose fields are all there."""
    return next((schema for schema in PAIR_SCHEMAS if set(schema.fields) <= set(fields)), None)


def pair_schema(fields: tuple[str, ...]) -> PairSchema | None:
    """The PairSchema of these fields: a known one, or any two; None for another number."""
    known = next((schema for schema in PAIR_SCHEMAS if schema.fields == fields), None)
    if known is None and len(fields) == 2:
        return PairSchema(fields, _two_fields(*fields), "\n")
    return known


def _two_texts(
    row: Row | str, fields: tuple[str, ...], known: Sequence[tuple[str, ...]]
) -> tuple[str, str]:
    """The texts of two fields, named or known; in a plain line they are separated by a tab."""
    if isinstance(row, str):
        first, tab, second = row.partition("\t")
        if not tab or "\t" in second:
            raise ValueError(f"has {row.count(chr(9))} tabs: one separates the two texts")
        return first, second
    names = fields or first_present(row, known)
    if not names:
        raise MissingField(f"no pair of fields among {field_names(row)}: name two with --field")
    return row_field(row, names[0]), row_field(row, names[1])


# -- labels


def row_labels(row: Row, name: str, multi_label: bool = False) -> tuple[str, ...]:
    """The one label of a row; with `multi_label` any number: a list, or a text with commas."""
    if name not in row:
        raise ValueError(f"field {name!r} is missing: no label; fields: {field_names(row)}")
    if isinstance(row[name], list) and len(row[name]) == 1 and not multi_label:
        raise ValueError(f"field {name!r} has {row[name]}, which is no label")
    labels = parse_labels(row[name], name, multi_label)
    if not labels and not multi_label:
        raise ValueError(f"field {name!r} has no label")
    return labels


def parse_labels(value: Any, name: str, multi_label: bool = False) -> tuple[str, ...]:
    """The labels in the value of field `name`, without surrounding white space; () for none.

    Of JSON's values that are no text, true and false are the labels "true" and "false", and whole
    numbers are written without a fraction: 1.0 is "1".
    """
    labels = value.split(",") if multi_label and isinstance(value, str) else value
    if not isinstance(labels, list):
        labels = [] if value is None else [value]
    texts = [label_text(label) for label in labels]
    if None in texts:
        shown = json.dumps(value, ensure_ascii=False)[:60]
        raise ValueError(f"field {name!r} has {shown}, which is no label")
    if len(labels) > 1 and not multi_label:
        count = len(labels)
        raise ValueError(f"field {name!r} has {count} labels, where the first record has one")
    return tuple(text for text in texts if text)


def label_text(value: Any) -> str | None:
    """The label that a value of JSON stands for; None if it is none.

    >>> [label_text(value) for value in (" a ", True, 3, 1.0, 0.5, None)]
    ['a', 'true', '3', '1', None, None]
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_WHOLE_FLOAT:
        value = int(value)
    return str(value).strip() if isinstance(value, str | int) else None


def matching_label(label: str, known: Collection[str]) -> str:
    """The known label that `label` is another spelling of, as tables write values; else itself.

    >>> matching_label("True", ("false", "true")), matching_label("1.0", ("0", "1"))
    ('true', '1')
    """
    if label in known:
        return label
    same = [name for name in known if _label_value(name) == _label_value(label)]
    return same[0] if len(same) == 1 else label


def _label_value(label: str) -> str:
    if label.lower() in ("true", "false"):
        return label.lower()
    whole, point, fraction = label.partition(".")
    is_whole = point and whole.lstrip("-").isdecimal() and not fraction.strip("0")
    return whole if is_whole else label


def sort_labels(labels: Iterable[str]) -> list[str]:
    """Labels in order, whole numbers first and by value."""
    return sorted(labels, key=_label_order)


def _label_order(label: str) -> tuple[bool, int, str, str]:
    digits = ""
    if label.isdecimal():  # of any script and any length, for which int() has a limit
        digits = "".join(str(unicodedata.decimal(digit)) for digit in label).lstrip("0")
    return not label.isdecimal(), len(digits), digits, label


# -- questions and answers


class GoldAnswer(NamedTuple):
    """A correct answer: `text` stands at characters `start` to `end` of the context."""

    text: str
    start: int
    end: int


class SquadExample(NamedTuple):
    """A question about a context with its correct answers; none where the context holds none."""

    context: str
    question: str
    answers: list[GoldAnswer]


def squad_example(row: Row, context: str, question: str, answers: str) -> SquadExample:
    """The question of a row, whose three fields have these names.

    `answer_start` counts characters; without it an answer is at its first occurrence.
    """
    context_text, question_text = row_field(row, context), row_field(row, question)
    for name, text in ((context, context_text), (question, question_text)):
        if not text.strip():
            raise ValueError(f"field {name!r} is empty")
    texts, starts = _parse_answers(row, answers)
    if starts is None:
        starts = [context_text.find(text) for text in texts]
        for text, start in zip(texts, starts):
            if start < 0:
                raise ValueError(f"answer {text!r} does not occur in the context")
    elif len(starts) != len(texts):
        raise ValueError(
            f"field {answers!r} is missing or no list of objects with text and answer_start"
        )
    located = [_locate(context_text, *answer) for answer in zip(texts, starts)]
    return SquadExample(context_text, question_text, located)


def answer_texts(row: Row, name: str) -> tuple[str, ...]:
    """The texts of the answers in a field; () when it says that there is no answer."""
    return tuple(_parse_answers(row, name)[0])


def _parse_answers(row: Row, name: str) -> tuple[list[str], list[Any] | None]:
    """(texts of the answers, their answer_start values or None where there are none).

    The field holds a list of {"text", "answer_start"} (SQuAD), an object of two lists (Hugging
    Face), a list of texts, or one text, which may be any of these as JSON (tables).
    """
    value: Any = row.get(name)
    if isinstance(value, str):
        if not value.startswith(("[", "{")):
            return [value] if value else [], None
        try:
            value = parse_json(value)
        except RepeatedKey:
            raise
        except ValueError:
            return [value], None
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
    elif isinstance(value, list):
        objects = [answer if isinstance(answer, dict) else {"text": answer} for answer in value]
        texts, starts = [answer.get("text") for answer in objects], None
        if any("answer_start" in answer for answer in objects):
            starts = [answer.get("answer_start") for answer in objects]
    else:
        texts = starts = None
    if not (isinstance(texts, list) and isinstance(starts, list | None)):
        raise ValueError(f"field {name!r} is missing or no list of answers")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"an answer's text is {text!r}, not a text of the context")
        check_text(text, name, row)
    return texts, starts


def _locate(context: str, text: str, start: Any) -> GoldAnswer:
    """The answer at a character of the context, without the white space around it."""
    if not text.strip():
        raise ValueError(f"an answer's text is {text!r}, not a text of the context")
    if type(start) is not int or not 0 <= start <= len(context) - len(text):
        raise ValueError(
            f"answer {text!r} cannot start at {start!r} of a context of {len(context)} characters"
        )
    if (there := context[start : start + len(text)]) != text:
        raise ValueError(
            f"answer {text!r} is not at character {start} of the context, but {there!r}"
        )
    start += len(text) - len(text.lstrip())
    return GoldAnswer(text.strip(), start, start + len(text.strip()))


# -- what a command reads of a row: (text, extra texts)


@dataclass(frozen=True)
class ScoringFields:
    """What `lm score` reads of a row: a call gives (text, extra texts) of a row or of a plain line.

    With `pairs` the extra texts are the two of a minimal pair; with `sources` the extra text is the
    source of the target. With `prefix_field` or a fixed `prefix` it is what precedes the text.
    With `choices` the extra texts are the list in that field, and the text is the prefix of each.
    """

    fields: tuple[str, ...] = ()
    pairs: bool = False
    sources: bool = False
    prefix: str = ""
    prefix_field: str = ""
    choices: str = ""

    def __post_init__(self) -> None:
        if (self.pairs or self.sources) and len(self.fields) not in (0, 2):
            raise UsageError(f"{len(self.fields)} fields were named, a pair has 2", where="--field")

    def __call__(self, row: Row | str) -> tuple[str, tuple[str, ...]]:
        """Raises ValueError for a row or line without these fields."""
        if self.pairs:
            return "", _two_texts(row, self.fields, MINIMAL_PAIR_FIELDS)
        if self.sources:
            source, target = _two_texts(row, self.fields, (SOURCE_TARGET,))
            return target, (source,)
        if self.choices:
            return self._prefix(row), self._choices(row)
        prefix, fields = self._prefix(row), self.fields
        if self.prefix_field and not fields:
            sets = [names for names in TEXT_FIELDS if names != (self.prefix_field,)]
            fields = tuple(name for name in first_present(row, sets) if name != self.prefix_field)
        return row_text(row, fields), (prefix,)

    def _prefix(self, row: Row | str) -> str:
        if not self.prefix_field:
            return self.prefix
        if isinstance(row, str):
            raise ValueError(f"is plain text, without a field {self.prefix_field!r}")
        return row_field(row, self.prefix_field)

    def _choices(self, row: Row | str) -> tuple[str, ...]:
        texts = row.get(self.choices) if not isinstance(row, str) else None
        if not (texts and isinstance(texts, list) and all(isinstance(t, str) for t in texts)):
            raise ValueError(f"field {self.choices!r} is missing or no list of texts")
        return tuple(texts)


@dataclass(frozen=True)
class QuestionFields:
    """What `lm classify` reads of a question's row: a call gives (question, (context,))."""

    context: str = "context"
    question: str = "question"

    def __call__(self, row: Row | str) -> tuple[str, tuple[str, ...]]:
        """Raises ValueError for a row without both, and for a plain line."""
        if isinstance(row, str):
            raise ValueError(
                f"is plain text: a question is a row with {self.context} and {self.question} "
                "(--format jsonl)"
            )
        return row_field(row, self.question), (row_field(row, self.context),)


def join_prefix(prefix: str, text: str, separator: str | None) -> str:
    """The text as it continues a prefix: after `separator`, by default a space unless there is one.

    >>> join_prefix("The sky is", "blue", None), join_prefix("The sky is ", "blue", None)
    (' blue', 'blue')
    >>> join_prefix("天", "空", "")
    '空'
    """
    if separator is None:
        spaced = not prefix or not text or prefix[-1].isspace() or text[0].isspace()
        separator = "" if spaced else " "
    return separator + text if prefix else text
