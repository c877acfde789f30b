"""The tokenizer of a model folder: learnt as byte-level BPE, or read from whatever files others keep theirs in.

Encoding is the `tokenizers` library's; here stand templates, special tokens, byte offsets and decoding as a stream.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from lmcli.config import TokenizerConfig
from lmcli.errors import UserError
from lmcli.storage import atomic_path, user_errors, write_text
from lmcli.text import pretrained
from lmcli.text.documents import PIECE_CHARS, SAFE_CUT, Layout
from lmcli.text.pretrained import END_OF_TEXT, LLAMA3_PATTERN, PLAIN, QWEN2_PATTERN
from lmcli.text.ranges import Documents
from lmcli.text.sentencepiece import MarianSide

CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
           (" 've", "'ve"), (" 're", "'re"))  # what clean_up_tokenization_spaces stands for
LEARNT_FROM_BYTES = 1 << 26  # of text: what counting its words takes in memory must not grow with the text
LONG_TEXT = 4 * PIECE_CHARS  # characters from which a text is encoded in parts
PARTS_AT_ONCE = 256
SPACE = "\u2581"  # how SentencePiece's vocabularies write one
OPEN = "\ufffd"  # how a decoder shows bytes that are no whole character


class Encoded(NamedTuple):
    """Token ids of one text, and for each the bytes of the text it stands for: `ends[i]` is where token i ends."""

    ids: list[int]
    ends: list[int]


class Part(NamedTuple):
    """A place in a template: the first ("A") or second text ("B"), or the ids of a special token; and its token type."""

    what: str | list[int]
    type: int


class Tokenizer:
    """Text ↔ ids. `encode` adds no special tokens; `prefix` and `suffix` are those that the template puts around a text.

    `target` cuts text of the target language: another tokenizer with the same ids in Marian's folders, else this one.
    `files` are a folder's own files that cannot be written anew; `save` writes them again in place of tokenizer.json.
    """

    def __init__(self, core: tokenizers.Tokenizer | MarianSide, settings: dict | None = None,
                 target: "Tokenizer | None" = None, files: dict[str, bytes] | None = None):
        core.no_padding()
        core.no_truncation()
        self.core, self.settings, self.target, self.files = core, settings or {}, target or self, files or {}
        self.size = core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the template's special tokens. Special tokens spelled out in it keep their own id."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        if any(len(text) > LONG_TEXT for text in texts):
            return [[index for part in parts for index in part] for parts in self._in_parts(texts, self._ids)]
        return self._ids(texts)

    def encode_with_ends(self, texts: list[str]) -> list[Encoded]:
        """Ids with byte offsets. Tokens that share a character share out its bytes, so the last end is the byte count."""
        if any(len(text) > LONG_TEXT for text in texts):
            return [_joined(parts) for parts in self._in_parts(texts, self._placed)]
        return self._placed(texts)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self.core.encode_batch_fast(texts, add_special_tokens=False)]

    def _placed(self, texts: list[str]) -> list[Encoded]:
        return [Encoded(found.ids, self._ends(text, found))
                for text, found in zip(texts, self.core.encode_batch(texts, add_special_tokens=False))]

    def _in_parts(self, texts: list[str], encode: Callable[[list[str]], list]) -> Iterator[list]:
        """What `encode` makes of the parts of each text, some at a time: what the library tells of a token takes a hundred
        times the memory of its id."""
        cut = [self._cut(text) for text in texts]
        whole = [part for parts in cut for part in parts]
        encoded = (found for i in range(0, len(whole), PARTS_AT_ONCE) for found in encode(whole[i:i + PARTS_AT_ONCE]))
        for parts in cut:
            yield list(islice(encoded, len(parts)))

    def _cut(self, text: str) -> list[str]:
        starts = [0]
        while self.cuts_at_words and (cut := SAFE_CUT.search(text, starts[-1] + PIECE_CHARS)):
            starts.append(cut.start())
        return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)])]

    def decode(self, ids: list[int], special: bool = True) -> str:
        """Text of ids; `special=False` leaves special tokens out. Spaces are tidied where the settings ask for it."""
        text = self.core.decode(ids, skip_special_tokens=not special)
        if isinstance(self.core, MarianSide):
            text = text.strip()
        if self.settings.get("clean_up_tokenization_spaces") and self._definition["model"].get("type") != "BPE":
            for apart, together in CLEANED:
                text = text.replace(apart, together)
        return text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Tokens as the vocabulary spells them."""
        return [self.core.id_to_token(index) or "" for index in ids]

    @cached_property
    def token_texts(self) -> list[str]:
        """The text of each id by itself, a space where the vocabulary has a mark for one; bytes that are no whole character
        show as U+FFFD."""
        return [text.replace(SPACE, " ") if SPACE in text else self.core.decode([i], skip_special_tokens=False) or text
                for i, text in enumerate(self.pieces(range(self.size)))]

    @cached_property
    def word_starts(self) -> list[bool] | None:
        """For each id whether a word before it has ended: it begins with white space, or is a special token. None for
        vocabularies that do not write spaces (WordPiece)."""
        if (self._definition["decoder"] or {}).get("type") == "WordPiece":
            return None
        special = self.core.special if isinstance(self.core, MarianSide) else {
            token["id"] for token in self._definition["added_tokens"] if token["special"]}
        return [i in special or text[:1].isspace() for i, text in enumerate(self.token_texts)]

    def id(self, token: str) -> int | None:
        """The id of a token, or None."""
        return self.core.token_to_id(token)

    @cached_property
    def prefix(self) -> list[int]:
        """Ids that the template puts before a text: the beginning token, if there is one."""
        return self._template[0]

    @cached_property
    def suffix(self) -> list[int]:
        """Ids that the template puts after a text."""
        return self._template[1]

    @cached_property
    def _template(self) -> tuple[list[int], list[int]]:
        parts = self._parts[0]
        at = next((i for i, part in enumerate(parts) if part.what == "A"), len(parts))
        before, after = ([index for part in side for index in part.what] for side in (parts[:at], parts[at + 1:]))
        return before, after

    def with_template(self, ids: list[int], pair_ids: list[int] | None = None) -> tuple[list[int], list[int]]:
        """(ids, token types) of a text, or of a pair of texts, with the template's special tokens around them."""
        texts, found, types = {"A": ids, "B": pair_ids or []}, [], []
        for what, kind in self._parts[pair_ids is not None]:
            part = texts[what] if isinstance(what, str) else what
            found += part
            types += [kind] * len(part)
        return found, types

    def before_second(self, first: int) -> int:
        """How many tokens stand before the second text of a pair, when the first has so many."""
        parts = self._parts[1]
        before = parts[:[part.what for part in parts].index("B")]
        return sum(first if part.what == "A" else len(part.what) for part in before)

    @cached_property
    def _parts(self) -> tuple[list[Part], list[Part]]:
        """The templates for one text and for a pair."""
        processor = self._definition["post_processor"] or {}
        for step in processor.get("processors", [processor]):
            if step.get("type") == "TemplateProcessing":
                return _template_parts(step, "single"), _template_parts(step, "pair")
            if step.get("type") in ("BertProcessing", "RobertaProcessing"):
                cls, sep = [step["cls"][1]], [step["sep"][1]]
                single, again = [Part(cls, 0), Part("A", 0), Part(sep, 0)], int(step["type"] == "BertProcessing")
                doubled = [] if again else [Part(sep, 0)]
                return single, [*single, *doubled, Part("B", again), Part(sep, again)]
        return [Part("A", 0)], [Part("A", 0), Part("B", 1)]

    def special(self, name: str) -> int | None:
        """The id of `bos_token`, `eos_token`, `mask_token` … as the folder's settings or its class name it, or None."""
        value = self.settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        return self.id(text) if isinstance(text, str) else None

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the tokenizer's definition."""
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()

    @cached_property
    def _definition(self) -> dict:
        return json.loads(self.core.to_str())

    @cached_property
    def cuts_at_words(self) -> bool:
        """Whether text cut at documents.SAFE_CUT gives the same ids as text in one go: with the patterns of GPT-2,
        Qwen2 and Llama 3.

        NFC composes nothing across such a cut, and leaves a letter there a letter, or one with a mark before a space.
        """
        if (self._definition["normalizer"] or {"type": "NFC"})["type"] != "NFC" or self._definition["truncation"]:
            return False
        if any((token["lstrip"] and token["content"][:1] not in ("[", "<")) or token["rstrip"] or token["single_word"]
               or any(map(str.isspace, token["content"])) or SAFE_CUT.search(token["content"])
               for token in self._definition["added_tokens"]):
            return False  # such a token may reach, or look, across a cut
        splitter = self._definition["pre_tokenizer"] or {}
        parts = splitter.get("pretokenizers", [splitter])
        kinds = [part.get("type") for part in parts]
        if any(part.get("add_prefix_space") for part in parts):
            return False
        if kinds == ["ByteLevel"]:
            return parts[0].get("use_regex", True)
        return kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") in (QWEN2_PATTERN, LLAMA3_PATTERN)

    @cached_property
    def _byte_lengths(self) -> list[int] | None:
        """Bytes of each token, for byte-level vocabularies, whose tokens spell one character a byte."""
        if (self._definition["decoder"] or {}).get("type") != "ByteLevel" or self._definition["normalizer"]:
            return None
        added = {token["id"]: len(token["content"].encode()) for token in self._definition["added_tokens"]}
        vocabulary = self.core.get_vocab(with_added_tokens=True)
        lengths = [0] * (max(vocabulary.values(), default=-1) + 1)
        for token, index in vocabulary.items():
            lengths[index] = added.get(index, len(token))
        return lengths

    def count_bytes(self, ids: list[int]) -> int:
        """UTF-8 bytes of the text that ids stand for; a byte-level token may be part of a character."""
        lengths = self._byte_lengths
        return len(self.decode(ids).encode("utf-8")) if lengths is None else sum(lengths[index] for index in ids)

    def _ends(self, text: str, found: tokenizers.Encoding) -> list[int]:
        size = len(text.encode("utf-8"))
        if self._byte_lengths is not None:
            ends, end = [], 0
            for index in found.ids:
                end += self._byte_lengths[index]
                ends.append(end)
            if end == size:
                return ends
        return _ends_from_characters(text, found.offsets, size)

    def save(self, folder: Path, context: int | None = None) -> None:
        """Writes `tokenizer.json` (or a Marian folder's own files) and `tokenizer_config.json`, with a model's `context`."""
        for name, content in self.files.items():
            with atomic_path(folder / name) as part:
                part.write_bytes(content)
        if not self.files:
            write_text(folder / "tokenizer.json", self.core.to_str(pretty=True))
        settings = {**self.settings, **({"model_max_length": context} if context else {})}
        write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _template_parts(step: dict, which: str) -> list[Part]:
    found = []
    for piece in step[which]:
        (kind, fields), = piece.items()
        what = fields["id"] if kind == "Sequence" else step["special_tokens"][fields["id"]]["ids"]
        found.append(Part(what, fields["type_id"]))
    return found


def _joined(parts: list[Encoded]) -> Encoded:
    ids, ends = [], []
    for part in parts:
        before = ends[-1] if ends else 0
        ids += part.ids
        ends += [before + end for end in part.ends]
    return Encoded(ids, ends)


def byte_offsets(text: str) -> Sequence[int]:
    """For each character of a text, and for its end, the UTF-8 bytes before it. byte_offsets("aé!") == [0, 1, 3, 4]."""
    if text.isascii():
        return range(len(text) + 1)
    return [0, *accumulate(len(character.encode("utf-8")) for character in text)]


def _ends_from_characters(text: str, spans: list[tuple[int, int]], size: int) -> list[int]:
    """Byte ends of tokens given as character spans; what lies between two spans goes to the token after it.

    Several tokens on one character (byte fallback) get a byte each, the last one the rest.
    """
    byte_at, ends, last = byte_offsets(text), [], 0
    for i, (start, end) in enumerate(spans):
        shared = i + 1 < len(spans) and spans[i + 1] == (start, end)
        last = min(max(last, byte_at[start]) + 1, byte_at[end]) if shared else max(last, byte_at[end])
        ends.append(last)
    if ends:
        ends[-1] = size
    return ends


def learn_from(documents: Documents, layout: Layout, config: TokenizerConfig, note: Callable[[str], None],
               kind: str = "decoder") -> Tokenizer:
    """`learn` from documents, of a long text from a sample; `note` gets how large it is, and what the text has no room for.
    """
    texts, every = layout.sampled(documents, LEARNT_FROM_BYTES)
    if every > 1:
        size = documents.bytes
        note(f"the vocabulary is learnt from some {size / every / 1e6:,.0f} of {size / 1e6:,.0f} MB: of every {every:,} "
             f"stretches of {PIECE_CHARS:,} characters one, all over the text")
    learnt = learn(texts, config, kind)
    if learnt.size < config.vocab_size:
        note(f"the text has room for a vocabulary of {learnt.size:,}, not {config.vocab_size:,}")
    return learnt


def learn(texts: Iterable[str], config: TokenizerConfig, kind: str = "decoder") -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `config.vocab_size` ids, learnt from a stream.

    Any text round-trips, since all 256 bytes are in the vocabulary. The first ids are the special tokens, which go with
    the model's shape: `<|endoftext|>` in front for a decoder; `[CLS] … [SEP]` and a mask for an encoder; `… </s>` for an
    encoder–decoder. Text too small for the vocabulary gives a smaller one: see the result's `size`.
    """
    special, single, pair, settings = SHAPES[kind]
    if config.vocab_size < 256 + len(special):
        raise UserError(f"tokenizer.vocab_size {config.vocab_size} is too small: 256 bytes and the {len(special)} special "
                        f"tokens of an {kind} make {256 + len(special)}")
    core = tokenizers.Tokenizer(models.BPE())
    if config.pattern == "gpt2":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        core.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=special, show_progress=False, min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(str(token.content), i) for i, token in enumerate(special)])
    return Tokenizer(core, {"tokenizer_class": PLAIN, **settings, "clean_up_tokenization_spaces": False})


def _special(*tokens: str) -> list[AddedToken]:
    """A mask stands for the word with the space before it, as the vocabulary spells words, so it takes that space."""
    return [AddedToken(token, special=True, normalized=False, lstrip=token == "[MASK]") for token in tokens]


# a model's shape → special tokens in the order of their ids, templates for a text and for a pair, settings
SHAPES = {
    "decoder": (
        _special(END_OF_TEXT), f"{END_OF_TEXT} $A", f"{END_OF_TEXT} $A {END_OF_TEXT} $B:1",
        {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "add_bos_token": True, "add_eos_token": False}),
    "encoder": (
        _special("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1",
        {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
         "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}),
    "encoder-decoder": (
        _special("<pad>", "</s>", "<unk>"), "$A </s>", "$A </s> $B </s>",
        {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})}


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder, from any of the files that text/pretrained.py knows, or of a `tokenizer.json`.

    Raises UserError when there is none or it cannot be read.
    """
    path = Path(path)
    with user_errors(path, "read"):  # a name too long
        if not path.is_file() and not path.exists():
            raise UserError("no such folder", where=str(path), hint="-m takes a model folder or a tokenizer.json")
    found = pretrained.read(path)
    target = Tokenizer(found.target, found.settings) if found.target else None
    return Tokenizer(found.core, found.settings, target, found.files)


class StreamDecoder:
    """Text of tokens as they come, never half a character: `push` returns what has become certain.

    Bytes that never become a character are left out, and with them U+FFFD, which stands for nothing else.
    `ids` is what stands before the stream (the prompt). Decoding looks at a few earlier ids as well, since some
    tokenizers write a space only between words.
    """

    def __init__(self, tokenizer: Tokenizer, ids: list[int]):
        self.tokenizer, self.ids, self._start = tokenizer, ids[-8:], 0
        while self.ids and self._decoded().startswith(OPEN):  # the last eight may begin inside a character
            del self.ids[0]
        self._whole = len(self.ids)  # decoding starts at `_start`; up to here every character is whole
        self._given = len(self._decoded())

    def push(self, index: int) -> str:
        """The text that this token completes: "" while a character is still open."""
        self.ids.append(index)
        text = self._decoded()
        if text.endswith(OPEN):  # half a character: one OPEN or, by byte fallback, one for each byte of its run
            start, self._given = self._given, max(self._given, len(text.rstrip(OPEN)))
            return text[start:self._given].replace(OPEN, "")
        new = text[self._given:]
        if new:  # a token without text stays in view, lest the next one looks like the first, which loses its space
            self._start, self._whole = self._whole, len(self.ids)
        self._given = len(self._decoded())
        return new.replace(OPEN, "")

    def _decoded(self) -> str:
        return self.tokenizer.core.decode(self.ids[self._start:], skip_special_tokens=True)  # untidied: it only grows
