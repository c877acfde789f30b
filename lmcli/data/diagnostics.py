"""Remarks on data before training: what its fields seem to hold; duplicates, overlap, balance."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from lmcli.data.examples import Examples, Texts
from lmcli.data.files import open_bytes
from lmcli.data.rows import parse_json_row
from lmcli.data.schema import PROMPT_COMPLETION, QUESTION_FIELDS, SOURCE_TARGET, TEXT_LABEL_FIELDS
from lmcli.storage import user_errors
from lmcli.text.tokenizer import Tokenizer

LISTED_LABELS = 10
FEW = 5  # a label with fewer examples is named
INSPECTED_BYTES = 1 << 16
LITTLE_BYTES = 10_000
SAMPLED_CHARACTERS, FEWEST_CHARACTERS = 20_000, 20
BYTES_VOCABULARY = 400  # tokens of a vocabulary that is bytes and little else
MOST_TOKENS_PER_CHARACTER = 1.2
MOST_UNKNOWN = 0.05
KNOWN_FIELDS = {*TEXT_LABEL_FIELDS, *SOURCE_TARGET, *PROMPT_COMPLETION, *QUESTION_FIELDS}

# -- size and language


def little_text(size: int) -> str:
    """A line on a text of `size` bytes that is too small for a new model; "" for a larger one."""
    if size >= LITTLE_BYTES:
        return ""
    return (
        f"{size:,} bytes are little text for a new model: expect letters, not words; "
        "--from MODEL trains one that knows the language"
    )


def foreign_text(texts: Iterable[str], tokenizer: Tokenizer, advice: str) -> str:
    """A line about a text that a tokenizer was not made for, by its beginning; or "".

    More tokens than characters are bytes, as of Chinese in an English vocabulary. That is no fault
    of a vocabulary that holds little else than bytes.
    """
    sample = ""
    for text in texts:
        sample += text
        if len(sample) >= SAMPLED_CHARACTERS:
            break
    sample = sample[:SAMPLED_CHARACTERS]
    if len(sample) < FEWEST_CHARACTERS:
        return ""
    ids = tokenizer.encode(sample)
    unknown_id = tokenizer.special_id("unk_token")
    unknown = sum(id_ == unknown_id for id_ in ids) / max(1, len(ids))
    per_character = len(ids) / len(sample)
    if per_character > MOST_TOKENS_PER_CHARACTER and tokenizer.size > BYTES_VOCABULARY:
        size = len(sample.encode("utf-8", "replace")) / len(ids)
        what = f"{per_character:.1f} tokens per character, {size:.1f} bytes a token"
    elif unknown > MOST_UNKNOWN:
        what = f"it has no token for {unknown:.0%} of the pieces"
    else:
        return ""
    return f"the tokenizer is not made for this text: {what}; {advice}"


# -- fields


def hidden_rows(file: str) -> str:
    """What a file that is read as plain text looks like by its beginning, and what to do; or ""."""
    with user_errors(file, "read"), open_bytes(file) as handle:
        head = (
            handle.read(INSPECTED_BYTES).decode("utf-8", "replace").removeprefix("\ufeff").lstrip()
        )
    return rows_by_look(head)


def rows_by_look(head: str) -> str:
    """What a plain text that begins so looks like, and what to do; or ""."""
    line = head.partition("\n")[0]
    with suppress(ValueError):
        parse_json_row(line)
        return "looks like JSON Lines: add --format jsonl"
    if re.match(r'\[\s*\{\s*"', head):
        return "looks like a JSON array: jq -c '.[]' makes JSON Lines of it"
    for format, separator in (("tsv", "\t"), ("csv", ",")):
        cells = [cell.strip().strip('"') for cell in line.split(separator)]
        if len(KNOWN_FIELDS.intersection(cells)) > 1:
            return f"looks like {format.upper()}: add --format {format}"
    return ""


def guess_fields(rows: Sequence[Mapping[str, Any]], roles: tuple[str, ...]) -> dict[str, str]:
    """The field of rows that seems to have each role: texts are long, labels recur.

    >>> guess_fields([{"a": "1", "b": "good film"}, {"a": "2", "b": "bad"}], ("text", "label"))
    {'text': 'b', 'label': 'a'}
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    guess = {role: role for role in roles if role in names}
    values = {name: [row[name] for row in rows if name in row] for name in names}
    length = {name: sum(len(str(value)) for value in values[name]) for name in names}
    free = [name for name in names if name not in guess]
    # texts by length, and two sides in their order
    texts = [role for role in roles if role not in (*guess, "label", "answers")]
    longest = [name for name in free if any(isinstance(value, str) for value in values[name])]
    longest = sorted(longest, key=lambda name: -length[name])[: len(texts)]
    if "context" not in roles:
        longest.sort(key=names.index)
    guess |= dict(zip(texts, longest))
    # the field with the fewest values
    rest = [name for name in free if name not in longest]
    distinct = {name: len(set(map(repr, values[name]))) for name in rest}
    rest.sort(key=lambda name: (distinct[name] < 2, distinct[name], length[name]))
    others = [role for role in roles if role in ("label", "answers") and role not in guess]
    return guess | dict(zip(others, rest))


def fields_option(rows: Sequence[Mapping[str, Any]], roles: tuple[str, ...]) -> str:
    """The option that names the fields of `guess_fields` for the command line."""
    guess = guess_fields(rows, roles)
    named = [f"{role}={guess.get(role, 'NAME')}" for role in roles]
    if any("," in name for name in named):
        return " ".join(f"--field {shlex.quote(name)}" for name in named)
    return f"--fields {shlex.quote(','.join(named))}"


def seems_label(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """True if few values recur in a field."""
    values = [repr(row[name]) for row in rows if name in row]
    return 2 <= len(set(values)) <= max(2, len(values) // 3)


# -- examples


def findings(training: Examples, validation: Examples, labels: tuple[str, ...]) -> Iterator[str]:
    """Sentences about the examples, each with its count; the share of every label."""
    inputs, validation_inputs = _input_hashes(training), _input_hashes(validation)
    if training.labels is not None:
        targets = _hashes(training.labels)
    else:
        targets = _hashes(training.targets) if training.targets else inputs
    examples = _combine(inputs, targets)
    distinct = len(np.unique(examples))
    if repeated := len(examples) - distinct:
        yield f"{repeated:,} of {len(examples):,} training examples are repeated word for word"
    if shared := int(np.isin(validation_inputs, inputs).sum()):
        yield (
            f"{shared:,} of {len(validation):,} validation examples have a source that is in the "
            "training set too: their figures say little about new text"
        )
    if training.labels is not None:
        if conflicts := distinct - len(np.unique(inputs)):
            yield f"{conflicts:,} training texts come with more than one label"
        yield from _balance(training.labels, labels)


def _input_hashes(examples: Examples) -> np.ndarray:
    """(N,) int64, equal for equal inputs: the source, or the text or pair of texts with a label."""
    sources = _hashes(examples.sources)
    if examples.labels is None or examples.targets is None:
        return sources
    return _combine(sources, _hashes(examples.targets))


def _hashes(rows: Texts | np.ndarray) -> np.ndarray:
    """(N,) int64, equal for equal texts or labels."""
    values = (hash(rows[i].tobytes()) for i in range(len(rows)))
    return np.fromiter(values, dtype=np.int64, count=len(rows))


def _combine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N,) int64, equal where both hashes are."""
    return first * np.int64(1_000_003) ^ second


def _balance(indices: np.ndarray, labels: tuple[str, ...]) -> Iterator[str]:
    """The share of each label, and the labels with few examples."""
    if indices.ndim == 2:  # multi-label
        counts = indices.sum(0).astype(np.int64)
    else:
        counts = np.bincount(indices, minlength=len(labels))
    order = np.argsort(-counts, kind="stable")
    total = max(1, len(indices))
    shares = [f"{labels[i]} {counts[i] / total:.1%}" for i in order]
    yield f"{len(labels)} labels: {_listed(shares)}"
    if few := [f"{labels[i]} ({counts[i]})" for i in order[::-1] if counts[i] < FEW]:
        yield f"{'labels' if len(few) > 1 else 'a label'} with few examples: {_listed(few)}"


def _listed(items: list[str]) -> str:
    return ", ".join(items[:LISTED_LABELS]) + (", …" if len(items) > LISTED_LABELS else "")
