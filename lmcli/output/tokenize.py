"""`lm tokenize` output: ids, pieces, offsets or counts of each record, as text and JSON fields."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmcli.data.rows import Record
from lmcli.terminal.painted_text import segments, tokens_painted
from lmcli.terminal.tables import in_columns
from lmcli.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenFormat:
    """What is written of each record: its ids, or its `pieces`, its `offsets`, or their `count`.

    `truncate` keeps that many tokens, `special` adds the tokenizer's special tokens. With `color`
    it is the text, its tokens painted. A terminal of `columns` gets pieces above their ids.
    """

    pieces: bool = False
    offsets: bool = False
    count: bool = False
    truncate: int | None = None
    special: bool = False
    color: bool = False
    columns: int | None = None

    def encode(
        self, records: Sequence[Record], tokenizer: Tokenizer
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """(line without its end, JSON fields) for each record."""
        texts = [record.text for record in records]
        if self.offsets or self.color:
            encoded = [(each.ids, each.ends) for each in tokenizer.encode_with_ends(texts)]
        else:
            encoded = [(ids, []) for ids in tokenizer.encode_batch(texts)]
        for text, (ids, ends) in zip(texts, encoded):
            ids, offsets = ids[: self.truncate], list(zip([0, *ends], ends))[: self.truncate]
            if self.special:
                end = len(text.encode())
                offsets = [
                    *[(0, 0) for _ in tokenizer.prefix],
                    *offsets,
                    *[(end, end) for _ in tokenizer.suffix],
                ]
                ids = tokenizer.prefix + ids + tokenizer.suffix
            yield self._result(text, ids, offsets, tokenizer)

    def _result(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Tokenizer
    ) -> tuple[str, dict[str, Any]]:
        fields: dict[str, Any] = {"text": text, "ids": ids}
        words: list[str] = [str(index) for index in ids]
        if self.color:
            return self._colored(text, ids, offsets, tokenizer), fields
        if self.pieces:
            fields["pieces"] = tokenizer.pieces(ids)
            if self.columns is not None:
                return in_columns([fields["pieces"], words], self.columns), fields
            words = fields["pieces"]
        elif self.offsets:
            fields["offsets"] = offsets
            words = [f"{index}:{start}:{end}" for index, (start, end) in zip(ids, offsets)]
        fields["count"] = len(ids)
        return str(len(ids)) if self.count else " ".join(words), fields

    def _colored(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Tokenizer
    ) -> str:
        """The text, its tokens painted; one that begins inside of a character is in the one before.

        Special tokens that were added are written as they are called.
        """
        spans = [(start, end, float(k)) for k, (start, end) in enumerate(offsets) if end > start]
        added = {
            k: (tokenizer.token_text(ids[k]), True)
            for k, (start, end) in enumerate(offsets)
            if start == end
        }
        # the number of a token stands in place of its surprisal
        last = max((end for _, end in offsets), default=0)
        painted = segments(text.encode()[:last].decode("utf-8", "replace"), spans)
        pieces = {
            int(number): (piece, ids[int(number)] in tokenizer.special_ids)
            for piece, number in painted
            if number is not None
        }
        in_order = sorted((added | pieces).items())
        return tokens_painted((piece for _, piece in in_order), self.columns)
