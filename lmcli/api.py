"""`lmcli.load(DIR)`: a model folder as an object that encodes, scores, generates; what commands and notebooks call."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcli.checkpoints import folder, hub
from lmcli.config import GenerateConfig, ModelConfig, check
from lmcli.errors import UsageError, UserError
from lmcli.inference.classification import Classified, Classifier
from lmcli.inference.decoding import Decoder, Generated, Piece
from lmcli.inference.filling import Filler
from lmcli.inference.perplexity import Perplexity, measured
from lmcli.inference.scoring import Question, Score, Scorer
from lmcli.inference.spans import Answer, Answerer
from lmcli.inference.writing import decode_all, new_seed, streams
from lmcli.model.device import Placement, place
from lmcli.text.corpus import encode_text

# (shape, head) → what such a model is, and the commands that can use it with what they do
ABILITIES = {
    ("decoder", "lm"): ("a language model (decoder)", {
        "generate": "continues text", "score": "log-probabilities", "perplexity": "bits per byte"}),
    ("encoder", "lm"): ("a masked language model (encoder)", {
        "generate": "fills masks", "score": "pseudo-log-likelihoods"}),
    ("encoder-decoder", "lm"): ("an encoder–decoder", {
        "generate": "turns one text into another", "score": "log-probabilities of a target, given its source"}),
    ("encoder", "sequence"): ("a classifier of texts (encoder)", {"classify": "labels texts"}),
    ("encoder", "token"): ("a classifier of tokens (encoder)", {"classify": "labels tokens"}),
    ("encoder", "span"): ("a question-answering model (encoder)", {"classify": "finds answers in a context"}),
    ("encoder", "none"): ("an encoder without a head", {}),
}


def load(path: str | Path, device: str = "auto", dtype: str = "auto", threads: int = 0, training: bool = False) -> "Model":
    """The model of a folder, or of a name on Hugging Face's hub (see checkpoints/hub.py). `dtype` "auto" is float32 (with
    `training`, which also suits generating, bfloat16 where the hardware is faster in it).

    Raises UserError for a folder that cannot be read and UsageError for a device that is not there.
    """
    placement, found = place(device, dtype, threads, training), hub.find(path)
    return Model(folder.load(found, placement.device, placement.dtype), placement, str(path), Path(found))


def abilities(config: ModelConfig) -> tuple[str, dict[str, str]]:
    """(what a model is, {command that can use it: what it does})."""
    return ABILITIES[config.shape, config.head]


class Model:
    """A loaded model folder. `model` is the torch.nn.Module, `tokenizer` and `placement` what it runs with; `name` is
    what errors call it, `folder` where it lies."""

    def __init__(self, checkpoint: folder.Checkpoint, placement: Placement, name: str = "the model",
                 folder: Path | None = None):
        self.checkpoint, self.placement, self.name, self.folder = checkpoint, placement, name, folder
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer

    def require(self, command: str) -> None:
        """Raises UserError, naming what the model is and can do, when its shape or head is not made for a command."""
        what, commands = abilities(self.model.config)
        if command not in commands:
            able = ", ".join(f"lm {name} ({does})" for name, does in commands.items())
            raise UserError(f"is {what}, which lm {command} cannot use", where=self.name,
                            hint=f"it can: {able}" if able else "its outputs: lmcli.load(…).logits in Python")

    def _require_head(self, command: str, heads: tuple[str, ...]) -> None:
        """The same, for one of the things that a command does with several heads."""
        self.require(command)
        if self.model.config.head not in heads:
            raise UserError(f"is {abilities(self.model.config)[0]}", where=self.name,
                            hint="a question-answering model gives answers, a classifier labels")

    @property
    def context(self) -> int:
        """Tokens the model sees at once."""
        return self.model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode(ids)

    @torch.inference_mode()
    def logits(self, input_ids: Tensor | list[list[int]], attention_mask: Tensor | list[list[int]] | None = None,
               decoder_input_ids: Tensor | list[list[int]] | None = None,
               token_type_ids: Tensor | list[list[int]] | None = None) -> Tensor:
        """Logits for ids (B, T): (B, T, V) over the vocabulary, (B, labels) or (B, T, labels) with a classifier, (B, T, 2)
        with question answering, the first token's state (B, C) without a head.

        `attention_mask` (B, T) is 0 on padding. An encoder–decoder reads the ids and gives logits for the
        `decoder_input_ids`, without which it raises UsageError. No token is added.
        """
        if (decoder_input_ids is None) == (self.model.config.shape == "encoder-decoder"):
            raise UsageError("an encoder–decoder, and no other model, needs decoder_input_ids", where=self.name)
        ids, mask, target, types = (
            None if given is None else torch.as_tensor(given, device=self.placement.device)
            for given in (input_ids, attention_mask, decoder_input_ids, token_type_ids))
        return self.model(ids, mask, decoder_input_ids=target, token_type_ids=types)

    def classifier(self, threshold: float = 0.5, batch: int = 0) -> Classifier:
        """A Classifier for this model; `threshold` is the probability above which a multi-label model's label holds.

        Raises UserError for a model that gives no labels.
        """
        self._require_head("classify", ("sequence", "token"))
        _check_share(threshold)
        return Classifier(self.model, self.tokenizer, threshold, batch)

    def classify(self, texts: str | list[str | tuple[str, str]], **options: Any) -> list[Classified]:
        """What the model says of each text, or pair of texts: .label, .probability, .probabilities, .logits, and .pieces
        when it labels tokens. The tokenizer's special tokens are put around; `truncated` tells what was cut."""
        return self.classifier(**options).classify([texts] if isinstance(texts, str) else texts)

    def answerer(self, threshold: float = 0.5, **options: Any) -> Answerer:
        """An Answerer for this model; other `options` are fields of it: longest, count, stride, batch.

        Raises UserError for a model that is not made to answer questions.
        """
        self._require_head("classify", ("span",))
        _check_share(threshold)
        return Answerer(self.model, self.tokenizer, threshold, **options)

    def answer(self, questions: str | list[str], contexts: str | list[str], **options: Any) -> list[Answer]:
        """The span of its context that answers each question: .text .score .start .end (bytes of the context), .no_answer,
        and .candidates, as many as `count` asks for. One context does for all questions."""
        questions = [questions] if isinstance(questions, str) else questions
        contexts = [contexts] * len(questions) if isinstance(contexts, str) else contexts
        if len(questions) != len(contexts):
            raise UsageError(f"{len(questions)} questions, but {len(contexts)} contexts")
        return self.answerer(**options).answer(questions, contexts)

    def beginning(self, bos: bool | None = None) -> list[int]:
        """The ids that start a context: the tokenizer's own, or as `bos` overrides them.

        Raises UsageError when `bos` asks for a beginning token and the folder names none.
        """
        if bos is None:
            return self.checkpoint.beginning
        if not bos:
            return []
        named = self.tokenizer.special("bos_token")
        if named is None:
            named = self.model.config.bos_token_id
        if not self.checkpoint.beginning and named is None:
            raise UsageError("this model has no beginning token", where="--bos")
        return self.checkpoint.beginning or [named]

    def prompt(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of a prompt with the template's special tokens: for a decoder the beginning token, never doubled, for an
        encoder what stands behind the text as well.

        Raises UserError for a prompt that nothing can be made of: empty where there is no beginning token, without a
        mask (or too long to keep all) where masks are to be filled.
        """
        beginning, ids = self.beginning(bos), self.encode(text)
        ids = ids if beginning and ids[:len(beginning)] == beginning else beginning + ids
        shape = self.model.config.shape
        if shape != "decoder":
            ids += self.tokenizer.suffix
        if not ids:
            raise UsageError("an empty prompt, and this model has no beginning token to start from",
                             hint="give a prompt, or --bos")
        if shape == "encoder":
            mask = self._mask()
            if mask not in ids:
                raise UserError(f"nothing to fill: the prompt has no {self.tokenizer.pieces([mask])[0]}",
                                hint="this model fills masked tokens; write that where one is missing")
            if len(ids) > self.context:
                raise UserError(f"{len(ids)} tokens are more than the context of {self.context}")
        return ids

    def _mask(self) -> int:
        mask = self.tokenizer.special("mask_token")
        if mask is None:
            raise UserError("the tokenizer names no mask token, without which an encoder can neither fill nor score",
                            hint="tokenizer_config.json should name its mask_token")
        return mask

    def decoder(self, stop: str | tuple[str, ...] = (), bos: bool | None = None, **options: Any) -> Decoder | Filler:
        """What writes text with this model, with the folder's defaults under `options` (fields of GenerateConfig; None
        leaves the default): a Decoder, or a Filler for an encoder, which draws only with a temperature in `options`.

        A temperature above 0 without num_beams means drawing, whatever the folder says. Raises UserError for a model that
        cannot write.
        """
        self.require("generate")
        known = {f.name for f in fields(GenerateConfig)}
        unknown = set(options) - known
        if unknown:
            raise TypeError(f"unknown option {sorted(unknown)[0]!r}; there are: stop, bos, {', '.join(sorted(known))}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise UsageError("an empty text is in every text", where="--stop", hint="give a text that is to end it")
        if isinstance(options.get("early_stopping"), bool):
            options["early_stopping"] = str(options["early_stopping"]).lower()
        chosen = {key: check(GenerateConfig, key, value, "generate") for key, value in options.items()
                  if value is not None}
        implied = {"max_length": 0} if "max_new_tokens" in chosen else {}
        implied |= {"min_length": 0} if "min_new_tokens" in chosen else {}
        implied |= {"num_beams": 1} if chosen.get("temperature") else {}
        config = replace(self.checkpoint.generate, **{**implied, **chosen})
        if self.model.config.shape == "encoder":
            return Filler(self.model, self.tokenizer, config, self._mask(), bool(chosen.get("temperature")))
        for key in ("forced_bos_token_id", "forced_eos_token_id"):
            if (getattr(config, key) or 0) >= self.model.config.vocab_size:
                raise UserError(f"{key} {getattr(config, key)} is no id of this model", where="generate",
                                hint=f"ids are 0 to {self.model.config.vocab_size - 1}")
        return Decoder(self.model, self.tokenizer, self.beginning(bos), self.checkpoint.stops, config, stop,
                       start=self.checkpoint.start)

    def generate(self, prompts: str | list[str], num_samples: int = 1, seed: int | None = None,
                 stop: str | tuple[str, ...] = (), bos: bool | None = None, batch: int = 0,
                 **options: Any) -> list[Generated]:
        """`num_samples` results a prompt, in order: continuations, of an encoder–decoder what it makes of the source, of
        an encoder the text with its masks filled. Options: fields of GenerateConfig, such as max_new_tokens,
        temperature, top_p, num_beams. Without a seed a random one is drawn; each result names its own. `batch` is tokens
        a forward pass, 0 what suits the device."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        decoder = self.decoder(stop, bos, **options)
        ids = [self.prompt(text, bos) for text in prompts]
        return [result for results in decode_all(decoder, ids, num_samples, seed, batch) for result in results]

    def stream(self, prompt: str, seed: int | None = None, stop: str | tuple[str, ...] = (), bos: bool | None = None,
               **options: Any) -> Iterator[Piece]:
        """One continuation as it comes: pieces of text, the last one with the result. A beam search, and an encoder that
        fills masks, give one piece."""
        decoder = self.decoder(stop, bos, **options)
        ids, seed = self.prompt(prompt, bos), new_seed() if seed is None else seed
        if streams(decoder):
            return decoder.stream([ids], [seed])
        (found,), = decode_all(decoder, [ids], 1, seed)
        return iter([Piece(0, found.text, found)])

    def scorer(self, bos: bool | None = None, eos: bool = False, context: int | None = None,
               stride: int | None = None, batch: int = 0, within_word: bool = False) -> Scorer:
        """A Scorer for this model. `eos` scores the closing token too; `within_word` is for encoders: the rest of a word is
        masked with each of its tokens.

        Raises UsageError for what the model cannot have: a context or stride, a beginning or closing token, masks.
        """
        self.require("score")
        shape = self.model.config.shape
        if context is not None and not 2 <= context <= self.context:
            raise UsageError(f"{context} is outside 2 to {self.context}, the model's context", where="--context")
        if stride is not None and not 1 <= stride <= (context or self.context):
            raise UsageError(f"{stride} is outside 1 to {context or self.context}, the context", where="--stride")
        if eos and (shape == "encoder" or not self.checkpoint.stops):
            raise UsageError("this model has no closing token", where="--eos")
        if bos is not None and shape != "decoder":
            raise UsageError("only a decoder's beginning can be chosen", where="--bos")
        if within_word and shape != "encoder":
            raise UsageError("only an encoder masks what it scores", where="--pll")
        beginning = self.beginning(bos)
        if shape == "encoder":
            self._mask()
        elif shape == "encoder-decoder":
            beginning = [self.checkpoint.start, *self.tokenizer.target.prefix]
        return Scorer(self.model, self.tokenizer, beginning, self.checkpoint.stops[0] if eos else None,
                      context or 0, stride or 0, batch, within_word)

    def score(self, texts: str | list[str | Question], per: str = "record", alternatives: int = 0,
              **options: Any) -> list[Score]:
        """A Score a text, or a Question with what is given before it or as its source: natural-log probability, tokens,
        bytes, bits per byte; `per` "token" or "word" adds pieces, `alternatives` so many likely tokens to each."""
        if per not in ("record", "token", "word"):
            raise UsageError(f"{per!r} is none of record, word, token", where="--per")
        return self.scorer(**options).score([texts] if isinstance(texts, str) else texts, per, alternatives)

    def perplexity(self, text: str, context: int | None = None, stride: int | None = None, **options: Any) -> Perplexity:
        """Perplexity, bits per byte and the counts of one text, taken as one document."""
        self.require("perplexity")
        return measured(self.scorer(context=context, stride=stride, **options), [encode_text(text, self.tokenizer)])


def _check_share(threshold: float) -> None:
    if not 0 <= threshold <= 1:
        raise UsageError(f"{threshold} is outside 0 to 1", where="--threshold")
