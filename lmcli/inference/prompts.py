"""Prompts from arguments and standard input → token ids, as many at once as there are."""

from collections.abc import Callable, Iterator, Sequence

from lmcli.errors import UserError
from lmcli.text.opening import open_bytes
from lmcli.text.records import Reader, Record

PROMPTS_AT_ONCE = 256

Prompt = tuple[str, list[int] | None]


class Prompts:
    """Prompts for a `loaded` model (lmcli.api.Model) as lists of (text, ids), from arguments, where "-" stands for what
    standard input holds. `note` gets what is cut or left out.

    From standard input an empty line that nothing can be made of has no ids (None), nor has a bad one where `on_error` is
    "blank".
    """

    def __init__(self, loaded, bos: bool | None, on_error: str, note: Callable[[str], None]):
        self.loaded, self.bos, self.on_error, self.note = loaded, bos, on_error, note
        self.reader, self.empty = Reader("text", on_error=on_error), 0

    def batches(self, arguments: Sequence[str], whole: bool, zero: bool) -> Iterator[list[Prompt]]:
        """Lists of prompts as they arrive; those of arguments in one list. Standard input has one a line, or is one as a
        `whole`, or (`zero`) parted by NUL. Raises UserError for a line that is bad or that nothing can be made of."""
        waiting = []
        for argument in arguments or ("-",):
            if argument != "-":
                waiting.append((argument, self.loaded.prompt(argument, self.bos)))
                continue
            for records in self._standard_input(whole, zero):
                waiting += [pair for record in records for pair in self._of_record(record, whole)]
                while waiting and (argument, whole, zero) == ("-", False, False):
                    yield self._checked(waiting[:PROMPTS_AT_ONCE])
                    waiting = waiting[PROMPTS_AT_ONCE:]
        if waiting:
            yield self._checked(waiting)

    def _standard_input(self, whole: bool, zero: bool) -> Iterator[list[Record]]:
        if not whole and not zero:
            yield from self.reader.batches(["-"])
            return
        with open_bytes("-") as handle:
            data = b"".join(iter(lambda: handle.read(1 << 16), b""))
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"invalid UTF-8 (byte {error.start + 1})", where="standard input") from error
        texts = [text] if whole else text.removesuffix("\0").split("\0") if text else []
        yield [Record(text, "-", number) for number, text in enumerate(texts, 1)]

    def _of_record(self, record: Record, whole: bool) -> list[Prompt]:
        """The prompt of a record as a list of one, or of none when it is left out."""
        if record.bad:
            return [(record.text, None)]
        try:
            return [(record.text, self.loaded.prompt(record.text, self.bos))]
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
        context, shape = self.loaded.context, self.loaded.model.config
        long = sum(len(ids or ()) > context for _, ids in batch)
        if long and not (shape.shape == "encoder-decoder" and shape.positions == "relative"):
            which = "1 prompt is" if long == 1 else f"{long} prompts are"
            read = "end" if shape.shape == "decoder" else "beginning"
            self.note(f"{which} longer than the context of {context} tokens; only the {read} is read")
        return batch

    def tell_what_is_missing(self) -> None:
        """Says how many lines have an empty result or were left out."""
        if self.empty:
            self.note(f"{self.empty} empty {'lines' if self.empty > 1 else 'line'}, of which this model can make nothing: "
                      "the results are empty")
        if self.reader.skipped:
            self.note(f"{self.reader.skipped} bad {'lines' if self.reader.skipped > 1 else 'line'} left out")
