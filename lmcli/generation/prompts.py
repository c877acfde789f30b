"""Prompts from arguments and standard input → token ids, in batches as they arrive."""

from collections.abc import Callable, Iterator, Sequence

from lmcli.config import ModelConfig
from lmcli.data.files import limited, open_bytes, text_chunks
from lmcli.data.rows import CHUNK_BYTES, MAX_LINE_BYTES, Record, RowReader
from lmcli.errors import UsageError, UserError
from lmcli.text.tokenizer import Tokenizer

PROMPTS_PER_BATCH = 256

Prompt = tuple[str, list[int] | None]


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

    Raises UserError for an empty prompt without bos, for one without a mask or too long for masks.
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
        context = config.max_position_embeddings
        if len(ids) > context:
            raise UserError(f"the prompt has {len(ids)} tokens, more than the context of {context}")
    return ids


class Prompts:
    """Reads prompts as (text, ids); `encode` is encode_prompt for a model, `note` gets warnings.

    Without ids (None): an empty line that cannot be encoded; with `on_error` "blank" a bad one.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        config: ModelConfig,
        on_error: str,
        note: Callable[[str], None],
    ):
        self.encode, self.config, self.on_error, self.note = encode, config, on_error, note
        self.reader, self.empty = RowReader("text", on_error=on_error), 0

    def batches(self, arguments: Sequence[str], whole: bool, zero: bool) -> Iterator[list[Prompt]]:
        """Yields prompts as they arrive; all arguments are one batch, "-" is standard input.

        It has a prompt a line, is one prompt (`whole`), or is split at NUL (`zero`).
        """
        waiting: list[Prompt] = []
        for argument in arguments or ("-",):
            if argument != "-":
                waiting.append((argument, self.encode(argument)))
                continue
            for records in self._standard_input(whole, zero):
                waiting += [prompt for record in records for prompt in self._prompts(record, whole)]
                while waiting and not whole and not zero:
                    yield self._checked(waiting[:PROMPTS_PER_BATCH])
                    waiting = waiting[PROMPTS_PER_BATCH:]
        if waiting:
            yield self._checked(waiting)

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

    def _prompts(self, record: Record, whole: bool) -> list[Prompt]:
        """The prompt of a record in a list, which is empty if the record is skipped."""
        if record.bad:
            return [(record.text, None)]
        try:
            return [(record.text, self.encode(record.text))]
        except UserError as error:
            if not record.text:
                self.empty += 1
            elif self.on_error == "stop":
                where = "standard input" if whole else f"standard input, line {record.line}"
                raise UserError(error.what, where, error.hint) from error
            elif self.on_error == "skip":
                self.reader.skipped += 1
                return []
            return [(record.text, None)]

    def _checked(self, batch: list[Prompt]) -> list[Prompt]:
        """The batch, after a warning about prompts that are cut."""
        config, context = self.config, self.config.max_position_embeddings
        long = sum(len(ids or ()) > context for _, ids in batch)
        if long and not (config.shape == "encoder-decoder" and config.positions == "relative"):
            which = "1 prompt is" if long == 1 else f"{long} prompts are"
            read = f"only the {'end' if config.shape == 'decoder' else 'beginning'} is read"
            self.note(f"{which} longer than the context of {context} tokens; {read}")
        return batch

    def report_skipped(self) -> None:
        """Notes how many lines have an empty result or were skipped."""
        if count := self.empty:
            lines = f"{count} empty {'lines' if count > 1 else 'line'}"
            self.note(f"{lines}: this model needs text, so the result is empty")
        if count := self.reader.skipped:
            self.note(f"{count} bad {'lines' if count > 1 else 'line'} left out")
