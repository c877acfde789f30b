"""What of a row or line is to be scored: a text, one behind a prefix, one of several choices, a pair, a target's source;
and which of its fields pose a question."""

from dataclasses import dataclass

from lmcli.errors import UsageError
from lmcli.text.fields import TEXT_FIELDS, row_field, row_text

# the two fields of minimal pairs as their authors name them, BLiMP (Warstadt et al. 2020) and CrowS-Pairs (Nangia et al.
# 2020), and as copies of them shorten the names
PAIR_FIELDS = (("sentence_good", "sentence_bad"), ("sent_more", "sent_less"), ("good", "bad"), ("more", "less"))
SOURCE_FIELDS = (("source", "target"),)


@dataclass(frozen=True)
class Asked:
    """The fields that a command was told to take; a call gives (text, other parts) of a row or of a plain line.

    With `pairs` or `sources` the parts are the two texts, by the two `fields` named, by well-known names, or parted by a
    tab in a plain line. With `prefix_field` or a fixed `prefix` the part is what stands before the text; with `choices`
    the parts are the texts of that field, and the text, if any, is what stands before them.
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

    def __call__(self, row: dict | str) -> tuple[str, tuple[str, ...]]:
        """Raises ValueError for a row or line without what is asked for."""
        if self.pairs:
            return "", self._two(row, PAIR_FIELDS)
        if self.sources:
            source, target = self._two(row, SOURCE_FIELDS)
            return target, (source,)
        if self.choices:
            return self._before(row), self._choices(row)
        if self.prefix_field:
            before = self._before(row)
            rest = self.fields or next(
                (left for names in TEXT_FIELDS if all(name in row for name in names)
                 and (left := tuple(name for name in names if name != self.prefix_field))), ())
            return row_text(row, rest), (before,)
        return row if isinstance(row, str) else row_text(row, self.fields), (self.prefix,)

    def _two(self, row: dict | str, known: tuple[tuple[str, str], ...]) -> tuple[str, str]:
        if isinstance(row, str):
            first, tab, second = row.partition("\t")
            if not tab or "\t" in second:
                raise ValueError(f"has {row.count(chr(9))} tabs: two texts are parted by one")
            return first, second
        names = self.fields or next((pair for pair in known if all(name in row for name in pair)), None)
        if names is None:
            raise ValueError(f"no pair of fields among {', '.join(map(repr, row)) or 'none'}: name two with --field")
        return row_field(row, names[0]), row_field(row, names[1])

    def _before(self, row: dict | str) -> str:
        if not self.prefix_field:
            return self.prefix
        if isinstance(row, str):
            raise ValueError(f"is plain text, without a field {self.prefix_field!r}")
        return row_field(row, self.prefix_field)

    def _choices(self, row: dict | str) -> tuple[str, ...]:
        found = row.get(self.choices) if isinstance(row, dict) else None
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            raise ValueError(f"field {self.choices!r} is missing or no list of texts")
        for text in found:
            text.encode("utf-8")
        return tuple(found)


@dataclass(frozen=True)
class QuestionFields:
    """The two fields of a row that pose a question; a call gives (question, (context,))."""

    context: str = "context"
    question: str = "question"

    def __call__(self, row: dict | str) -> tuple[str, tuple[str, ...]]:
        """Raises ValueError for a row without both, and for a plain line."""
        if isinstance(row, str):
            raise ValueError(f"is plain text: a question is a row with {self.context} and {self.question} (--format jsonl)")
        return row_field(row, self.question), (row_field(row, self.context),)


def joined(before: str, text: str, between: str | None) -> str:
    """The text as it continues what stands before it: with `between` in front, by default a space unless one is there.

    >>> joined("The sky is", "blue", None), joined("The sky is ", "blue", None), joined("天", "空", "")
    (' blue', 'blue', '空')
    """
    if between is None:
        between = " " if before and text and not before[-1].isspace() and not text[0].isspace() else ""
    return between + text if before else text
