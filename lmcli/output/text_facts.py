"""Facts of `lm info` about text files and folders of them: what they count."""

import codecs
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

from lmcli.data.corpus import encode_documents
from lmcli.data.documents import DocumentFormat, survey
from lmcli.data.files import display_name, expand, open_bytes, text_chunks
from lmcli.data.rows import (
    CHUNK_BYTES,
    Line,
    RowReader,
    file_format,
    parse_json_row,
    read_lines,
    split_cells,
)
from lmcli.errors import UserError
from lmcli.output.facts import Summary
from lmcli.storage import user_errors
from lmcli.text.tokenizer import Tokenizer


def corpus_summary(path: Path, tokenizer: Tokenizer | None, fields: tuple[str, ...]) -> Summary:
    """The sums over a folder's text files."""
    try:
        files, left_out = expand([str(path)])
    except UserError as error:
        message = "holds neither a model, nor a tokenizer, nor text"
        raise UserError(message, where=str(path), hint=error.hint) from error
    facts = {"kind": "corpus", "path": str(path), "files": len(files), "left_out": left_out}
    summary, counts = Summary(facts), Counter[str]()
    for file in files:
        of_file = text_summary(file, tokenizer, fields)
        summary.damage += of_file.damage
        counts.update({key: n for key, n in of_file.facts.items() if isinstance(n, int)})
    summary.facts |= counts
    return summary


def text_summary(file: str, tokenizer: Tokenizer | None, fields: tuple[str, ...]) -> Summary:
    """The counts of a text file or a file of rows, with a tokenizer its tokens too."""
    format = file_format(file, "auto")
    summary = Summary({"kind": "text", "path": file, "format": format})
    with summary.noting(), user_errors(file, "read"):
        summary.facts |= _text_counts(file, summary.facts)
        if format != "text":
            summary.facts |= _row_counts(file, format, tokenizer, fields)
        elif tokenizer:
            summary.facts["tokens"] = _tokens(file, tokenizer) if summary.facts["words"] else 0
    return summary


def _text_counts(file: str, facts: dict[str, Any]) -> dict[str, int]:
    """Lines, characters and words (runs of non-space) of a file; puts its bytes into `facts`.

    Raises UserError, after the bytes were counted, if it is not UTF-8.
    """
    decoder, counts = codecs.getincrementaldecoder("utf-8")(), Counter[str]()
    in_word, bad_line, last = False, 0, b""
    with open_bytes(file) as handle:
        mark, chunks = text_chunks(handle, file, CHUNK_BYTES)
        counts["bytes"] += len(mark)
        for chunk in chunks:
            counts["bytes"] += len(chunk)
            last = chunk
            if bad_line:
                continue
            try:
                text = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                bad_line = counts["lines"] + error.object[: error.start].count(b"\n") + 1
                continue
            counts["lines"] += chunk.count(b"\n")
            counts["characters"] += len(text)
            counts["words"] += len(text.split()) - (in_word and text[:1].strip() != "")
            in_word = text[-1:].strip() != "" if text else in_word
    facts["bytes"] = counts["bytes"]
    if not bad_line and decoder.getstate()[0]:  # an unfinished character at the end
        bad_line = counts["lines"] + 1
    if bad_line:
        raise UserError(f"is not text: invalid UTF-8 in line {bad_line}", where=display_name(file))
    counts["lines"] += bool(last) and not last.endswith(b"\n")
    return {name: counts[name] for name in ("lines", "characters", "words")}


def _row_counts(
    file: str, format: str, tokenizer: Tokenizer | None, fields: tuple[str, ...]
) -> dict[str, Any]:
    """The fields, records and bad records of a file of rows, and what their texts count."""
    with open_bytes(file) as handle:
        lines = chain.from_iterable(read_lines(handle, file, format))
        first = next(lines, Line(b"", True, 1, 0))
    try:
        text = first.text.decode("utf-8", "replace")
        names = list(parse_json_row(text)) if format == "jsonl" else split_cells(text, format)
    except ValueError:
        names = []
    reader, counts = RowReader("auto", fields, "skip"), Counter[str]()
    for batch in reader.batches([file]):
        texts = [record.text for record in batch]
        counts["records"] += len(texts)
        counts["text_bytes"] += sum(len(text.encode("utf-8")) for text in texts)
        counts["characters"] += sum(map(len, texts))
        counts["words"] += sum(len(text.split()) for text in texts)
        counts["tokens"] += sum(map(len, tokenizer.encode_batch(texts))) if tokenizer else 0
    return {
        "fields": names if first.text else [],
        **{name: counts[name] for name in ("records", "text_bytes", "characters", "words")},
        "bad_records": reader.skipped,
        **({"tokens": counts["tokens"]} if tokenizer else {}),
    }


def _tokens(file: str, tokenizer: Tokenizer) -> int:
    """The tokens of a text as `lm perplexity` reads it, without marks between documents."""
    document_format = DocumentFormat("file", "text")
    documents = survey([file], document_format).documents
    encoded = encode_documents(documents, document_format, tokenizer)
    return sum(len(document.ids) for document in encoded)
