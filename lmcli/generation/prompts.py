"""Prompts from arguments and standard input → token ids, in batches as they arrive."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from lmcli.config import ModelConfig
from lmcli.data.files import limited, open_bytes, text_chunks
from lmcli.data.rows import CHUNK_BYTES, MAX_LINE_BYTES, Record, RowReader
from lmcli.data.schema import row_prompt
from lmcli.errors import UsageError, UserError
from lmcli.generation.chat import Chat, without_answer
from lmcli.text.tokenizer import Tokenizer

PROMPTS_PER_BATCH = 256


class Prompt(NamedTuple):
    """A prompt's text, its ids (None for one without a result), and the row that it is from."""

    text: str
    ids: list[int] | None
    row: dict[str, Any] | None = None


def mask_id(tokenizer: Tokenizer) -> int:
    """The id of the tokenizer's mask token; raises UserError without one."""
    if (mask := tokenizer.special_id("mask_token")) is not None:
        return mask
    raise UserError(
        "the tokenizer names no mask token, so this encoder can neither fill nor score",
        hint="add mask_token to tokenizer_config.json",
    )


def encode_prompt(
    text: str, tokenizer: Tokenizer, config: ModelConfig, bos: list[int]
) -> list[int]:
    """Ids of a prompt with `bos` once in front and for an encoder the template's end.

    Raises UserError for an empty prompt without bos, or one without a mask for an encoder.
    """
    ids = tokenizer.encode(text)
    ids = ids if bos and ids[: len(bos)] == bos else bos + ids
    if config.shape != "decoder":
        ids += tokenizer.suffix
    if not ids:
        raise UsageError(
            "the prompt is empty, and this model has no beginning token to start from",
            hint="give a prompt, or --bos",
        )
    if config.shape == "encoder":
        mask = mask_id(tokenizer)
        if mask not in ids:
            raise UserError(
                f"nothing to fill: the prompt has no {tokenizer.pieces([mask])[0]}",
                hint="write the mask token where this model should fill in a token",
            )
    return ids


def too_long(prompt: list[int], context: int, hint: str) -> UserError:
    """The error of a prompt (ids) longer than the context."""
    count, over = len(prompt), len(prompt) - context
    return UserError(
        f"the prompt has {count:,} tokens, {over:,} more than the context of {context:,}", hint=hint
    )


def slid_note(count: int, context: int) -> str:
    """What a user is told about texts that outgrew the context."""
    texts = "1 text is" if count == 1 else f"{count:,} texts are"
    return (
        f"{texts} longer, with the prompt, than the context of {context:,} tokens: the window "
        "slid, and the end was written without the beginning"
    )


class Prompts:
    """Reads prompts; `encode` is encode_prompt for a model, `fit` cuts ids, `note` gets warnings.

    Standard input has lines or rows of a `format`, of which `fields` are read (see row_prompt). The
    Chat that `find_chat` returns writes messages, and with `chat_texts` all texts as a user's. No
    ids have: an empty line that cannot be encoded; with `on_error` "blank" a bad one.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        fit: Callable[[list[int]], list[int]],
        on_error: str,
        note: Callable[[str], None],
        find_chat: Callable[[], Chat],
        chat_texts: bool = False,
        format: str = "text",
        fields: tuple[str, ...] = (),
    ):
        self.encode, self.fit, self.on_error, self.note = encode, fit, on_error, note
        self.find_chat, self.chat_texts, self.fields, self.empty = find_chat, chat_texts, fields, 0
        self.reader = RowReader(format, on_error=on_error, extract=self._extract)

    @cached_property
    def chat(self) -> Chat:
        """The model's chat template; raises UserError if it has none."""
        return self.find_chat()

    def batches(self, arguments: Sequence[str], whole: bool, zero: bool) -> Iterator[list[Prompt]]:
        """Yields prompts as they arrive; all arguments are one batch, "-" is standard input.

        It has a prompt a line or row, is one prompt (`whole`), or is split at NUL (`zero`).
        """
        waiting: list[Prompt] = []
        for argument in arguments or ("-",):
            if argument != "-":
                waiting.append(self._prompt(argument))
                continue
            for records in self._standard_input(whole, zero):
                waiting += [prompt for record in records for prompt in self._prompts(record, whole)]
                while waiting and not whole and not zero:
                    yield waiting[:PROMPTS_PER_BATCH]
                    waiting = waiting[PROMPTS_PER_BATCH:]
        if waiting:
            yield waiting

    def _standard_input(self, whole: bool, zero: bool) -> Iterator[list[Record]]:
        if not whole and not zero:
            yield from self.reader.batches(["-"])
            return
        with open_bytes("-") as handle:
            _, chunks = text_chunks(handle, "-", CHUNK_BYTES, nul_separated=zero)
            data = b"".join(limited(chunks, "-", MAX_LINE_BYTES))
        try:
            text = data.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            message = f"invalid UTF-8 (byte {error.start + 1})"
            raise UserError(message, where="standard input") from error
        texts = [text] if whole else text.removesuffix("\0").split("\0") if text else []
        yield [Record(text, "-", number) for number, text in enumerate(texts, 1)]

    def _extract(self, row: dict | str) -> tuple[str, tuple[str, ...]]:
        text = row_prompt(row, self.fields)
        if isinstance(text, str):
            return text, ()
        _ = self.chat  # that there is none is no fault of the row
        return "", ()

    def _prompts(self, record: Record, whole: bool) -> list[Prompt]:
        """The prompt of a record in a list, which is empty if the record is skipped."""
        if record.bad:
            return [Prompt(record.text, None)]
        try:
            return [self._prompt(record.text, record.fields)]
        except UserError as error:
            if not record.text and record.fields is None:
                self.empty += 1
            elif self.on_error == "stop":
                where = "standard input" if whole else f"standard input, line {record.line}"
                raise UserError(error.what, where, error.hint) from error
            elif self.on_error == "skip":
                self.reader.skipped += 1
                return []
            return [Prompt(record.text, None, record.fields)]

    def _prompt(self, text: str, row: dict[str, Any] | None = None) -> Prompt:
        """The prompt of a text, or of the row that it is from. Raises UserError."""
        messages = None if row is None else row_prompt(row, self.fields)
        if isinstance(messages, list):
            text, ids = self.chat.encode(without_answer(messages))
        elif self.chat_texts:
            text, ids = self.chat.encode_user(text)
        else:
            ids = self.encode(text)
        return Prompt(text, self.fit(ids), row)

    def report_skipped(self) -> None:
        """Notes how many lines have an empty result or were skipped."""
        if count := self.empty:
            lines = f"{count} empty {'lines' if count > 1 else 'line'}"
            self.note(f"{lines}: this model needs text, so the result is empty")
        if count := self.reader.skipped:
            self.note(f"{count} bad {'lines' if count > 1 else 'line'} left out")
