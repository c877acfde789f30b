"""What a model that is trained further still knows of other texts: their bits per byte before and after."""

from pathlib import Path

from lmcli.errors import UsageError, UserError
from lmcli.inference.perplexity import measured
from lmcli.inference.scoring import Scorer
from lmcli.model.transformer import Transformer
from lmcli.storage import user_errors
from lmcli.text.corpus import encode_documents
from lmcli.text.documents import Layout
from lmcli.text.tokenizer import Tokenizer


def checked(files: tuple[str, ...], shape: str) -> list[str]:
    """The files' absolute paths. Raises UsageError for a model that is no decoder, UserError for a file that is missing."""
    if files and shape != "decoder":
        raise UsageError(f"bits per byte of a text are a decoder's, and this is an {shape}", where="--remember")
    for file in files:
        with user_errors(file, "read"):
            if not Path(file).is_file():
                raise UserError("no such file", where=file, hint="--remember takes a text file")
    return [str(Path(file).resolve()) for file in files]


def begun(file: str) -> str:
    """One line, before a text is measured: of a long one that takes minutes. Raises UserError for a file that is gone."""
    with user_errors(file, "read"):
        return f"measuring bits/byte of {file} ({Path(file).stat().st_size:,} bytes)"


def bits_per_byte(model: Transformer, tokenizer: Tokenizer, file: str) -> float:
    """Those of a file, as `lm perplexity` measures them. Raises UserError for a file with no text in it."""
    training, layout = model.training, Layout("file", "auto")
    figures = measured(Scorer(model.eval(), tokenizer, tokenizer.prefix),
                       encode_documents(list(layout.find([file])), layout, tokenizer))
    model.train(training)
    if not figures.bytes:
        raise UserError("no text in it", where=file)
    return figures.bits_per_byte


def told(file: str, before: float, after: float | None) -> str:
    """One line."""
    if after is None:
        return f"{file}: {before:.4f} bits/byte before"
    return f"{file}: {after:.4f} bits/byte after, {before:.4f} before ({after - before:+.4f})"
