"""Texts of a given form: a regular expression, one of several texts, or JSON of a schema.

llguidance tells after each token which ones may follow, by the bytes of the vocabulary.
"""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from lmcli.config import GenerateConfig
from lmcli.errors import UsageError, UserError, import_extra
from lmcli.generation.sampling import FORBIDDEN, Floats
from lmcli.text.stream_decoder import drops_first_space, token_bytes
from lmcli.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

TEXT_FORMS = ("regex", "choices", "json_schema")
# JSON on one line, as Python writes it or without spaces: endless spaces would never end
JSON_SPACES = {"whitespace_pattern": " ?"}


def form_of(config: GenerateConfig) -> str:
    """The option that sets the form of the text, or ""; raises UsageError for several."""
    names = [name for name in TEXT_FORMS if getattr(config, name)]
    if len(names) > 1:
        both = " and ".join(map(_option, names))
        raise UsageError(f"{both} exclude each other", hint="give one of them")
    return names[0] if names else ""


def check_form(config: GenerateConfig, shape: str, stop: tuple[str, ...]) -> None:
    """Raises UsageError for what cannot go with a form: an encoder, beams, --stop."""
    if not (form := form_of(config)):
        return
    if shape == "encoder":
        raise UsageError("an encoder that fills masks writes no text", where=_option(form))
    if config.num_beams > 1:
        raise UsageError(
            f"beam search ({config.num_beams} beams) is not supported",
            where=_option(form),
            hint="set --num-beams 1",
        )
    if stop:
        message = "--stop would cut the text before it has its form"
        raise UsageError(message, where=_option(form), hint="leave --stop out")


class Structure:
    """The form that a GenerateConfig sets, for a vocabulary of which `stop_ids` end a text."""

    def __init__(
        self, config: GenerateConfig, tokenizer: Tokenizer, vocab_size: int, stop_ids: list[int]
    ):
        self.form = form_of(config)
        self.value = getattr(config, self.form)
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        needed = f"{_option(self.form)} needs llguidance"
        self.library: Any = import_extra("llguidance", "structure", needed)
        texts = token_bytes(tokenizer)[:vocab_size]
        self.token_bytes = texts + [b""] * (vocab_size - len(texts))
        self.hidden = np.array([not text for text in self.token_bytes])
        self.hidden[stop_ids] = False
        # where the space of a word is not shown, a piece that is a space itself still is
        pieces = tokenizer.pieces(range(len(texts)))
        self.spaces = np.array([i for i, piece in enumerate(pieces) if piece[:1] == " "], np.int64)
        vocabulary = _Vocabulary(tokenizer, self.token_bytes, stop_ids)
        wrapper = self.library.TokenizerWrapper(vocabulary)
        self.vocabulary = self.library.LLTokenizer(wrapper, eos_token=vocabulary.eos_ids)
        self._matchers = {}
        for space in ("", " "):
            grammar = self._grammar(space)
            failed, messages = self.library.LLMatcher.validate_grammar_with_warnings(
                grammar, self.vocabulary
            )
            if failed:
                raise UsageError(_problem(messages[0]), where=_option(self.form))
            self._matchers[space] = self.library.LLMatcher(self.vocabulary, grammar, log_level=0)

    def start(self, ids: list[int]) -> "FormProgress":
        """The FormProgress of a new text after these ids."""
        # where the space of the first word is not shown, a text begins with one
        space = " " if drops_first_space(self.tokenizer, self.token_bytes, ids) else ""
        return FormProgress(self, self._matchers[space].deep_copy(), bool(space))

    def _grammar(self, space: str) -> str:
        """The grammar in Lark's syntax, with text in front."""
        start = f"start: {json.dumps(space)} " if space else "start: "
        if self.form == "regex":
            return f"{start}/{self.library.regex_to_lark(self.value, use_ascii='')}/"
        if self.form == "choices":
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in self.value)
            return f"{start}({texts})"
        try:
            schema = self.library.LLMatcher.grammar_from_json_schema(self.value, JSON_SPACES)
        except ValueError as error:
            raise UsageError(f"not JSON: {error}", where=_option(self.form)) from error
        schema = json.loads(schema)["grammars"][0]["json_schema"]
        return f"{start}value\nvalue: %json {json.dumps(schema)}"


class FormProgress:
    """A text under way: which tokens may follow, and whether it has its form."""

    def __init__(self, structure: Structure, matcher: "LLMatcher", after_space: bool):
        self._structure, self._matcher = structure, matcher
        self._after_space = after_space  # only until the first token
        self._bits = np.zeros((structure.vocabulary.vocab_size + 31) // 32, np.int32)

    @property
    def complete(self) -> bool:
        """True if the text has its form; it may still go on."""
        return self._matcher.is_accepting()

    @property
    def ended(self) -> bool:
        """True if nothing may follow."""
        return self._matcher.is_stopped()

    def forbid(self, scores: Floats) -> None:
        """Sets the scores (V,) of tokens that may not follow to −∞."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(scores)]
        scores[(allowed == 0) | self._structure.hidden] = FORBIDDEN
        if self._after_space:
            scores[self._structure.spaces] = FORBIDDEN

    def add(self, token: int) -> None:
        """Takes the next token; one without text changes nothing."""
        if self._structure.token_bytes[token]:
            self._after_space = False
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        """Raises UserError if the form became too complex to follow."""
        if self._matcher.is_error():
            where = _option(self._structure.form)
            raise UserError(_problem(self._matcher.get_error()), where=where)


class _Vocabulary:
    """What llguidance asks of a tokenizer; a text that must follow is tokenized by calling it.

    After the model's ids come one for each byte, so that every text has tokens, and one for the
    end: a model has no such tokens, so they are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, texts: list[bytes], stop_ids: list[int]):
        self._tokenizer, self._texts = tokenizer, texts
        self.tokens = [*texts, *(bytes([byte]) for byte in range(256)), b""]
        self.eos_ids = stop_ids or [len(self.tokens) - 1]
        self.eos_token_id, self.bos_token_id = self.eos_ids[0], None
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text]
        # of equal texts the model's own id
        self._id_of = {text: len(self.tokens) - 1 - i for i, text in enumerate(self.tokens[::-1])}
        self._longest = max(map(len, texts), default=1)

    def __call__(self, text: bytes) -> list[int]:
        """Ids that spell these bytes, as the tokenizer has them if that is possible."""
        shown = text.decode("utf-8", "ignore")
        for before in ("", "\n"):  # after a line end sentencepiece puts no space in front
            ids, rest = self._tokenizer.encode(before + shown), text
            while ids and ids[-1] < len(self._texts):
                own = self._texts[ids.pop()]
                if not own or not rest.endswith(own):
                    break
                rest = rest[: len(rest) - len(own)]
                if not rest:
                    return self._tokenizer.encode(before + shown)[len(ids) :]
        return self._fewest(text)

    def _fewest(self, text: bytes) -> list[int]:
        """The fewest ids of the model that spell these bytes, with as few others as possible."""
        best: list[tuple[int, list[int]]] = [(0, [])]
        for end in range(1, len(text) + 1):
            candidates = []
            for start in range(max(0, end - self._longest), end):
                if (index := self._id_of.get(text[start:end])) is not None:
                    cost, ids = best[start]
                    price = 1 if index < len(self._texts) else 1 << 20
                    candidates.append((cost + price, [*ids, index]))
            best.append(min(candidates))
        return best[-1][1]


def _option(form: str) -> str:
    return "--" + form.replace("_", "-")


def _problem(message: str) -> str:
    """The line of a message of llguidance that says what is wrong."""
    if message.startswith("NoExtension"):
        return "no token of this vocabulary can continue the text"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or ["not a grammar"])[0]
