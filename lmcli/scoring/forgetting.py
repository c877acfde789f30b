"""Forgetting (--remember): bits per byte of other texts before and after training further."""

from pathlib import Path
from typing import Any

from lmcli.data.corpus import encode_documents
from lmcli.data.documents import DocumentFormat, find_documents
from lmcli.data.files import display_name, pin
from lmcli.errors import UsageError, UserError
from lmcli.model.transformer import Transformer
from lmcli.scoring.perplexity import measure_perplexity
from lmcli.scoring.scorer import Scorer
from lmcli.storage import user_errors
from lmcli.text.tokenizer import Tokenizer


def require_files(files: tuple[str, ...], shape: str) -> list[str]:
    """The absolute paths. Raises UsageError without a decoder, UserError if a file is missing."""
    if files and shape != "decoder":
        raise UsageError(
            f"--remember needs a decoder, and this model is an {shape}", where="--remember"
        )
    for file in files:
        with user_errors(file, "read"):
            if not Path(file).exists() or Path(file).is_dir():
                raise UserError("no such file", where=file, hint="--remember takes a text file")
    return [str(Path(pin(file)).resolve()) for file in files]


def progress_line(file: str) -> str:
    """A line to print before a text is measured. Raises UserError if it is gone."""
    with user_errors(file, "read"):
        size = Path(file).stat().st_size
        return f"measuring bits/byte of {display_name(file)} ({size:,} bytes)"


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, file: str) -> float:
    """Bits per byte of a file, as by `lm perplexity`. Raises UserError if it has no text."""
    training, doc_format = model.training, DocumentFormat("file", "auto")
    figures = measure_perplexity(
        Scorer(model.eval(), tokenizer, tokenizer.prefix),
        encode_documents(list(find_documents([file], doc_format)), doc_format, tokenizer),
    )
    model.train(training)
    if not figures.bytes:
        raise UserError("no text in it", where=display_name(file))
    return figures.bits_per_byte


def result_line(entry: dict[str, Any]) -> str:
    """One line about a text: `file`, bits per byte `before` and `after` (None: not yet)."""
    file, before, after = display_name(entry["file"]), entry["before"], entry["after"]
    if after is None:
        return f"{file}: {before:.4f} bits/byte before"
    return f"{file}: {after:.4f} bits/byte after, {before:.4f} before ({after - before:+.4f})"
