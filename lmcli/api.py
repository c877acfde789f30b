"""`lmcli.load(DIR)`: a model folder as an object that encodes, scores, generates; what commands and notebooks call."""

import random
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
from lmcli.inference.ordering import batch_tokens, grouped_by_length
from lmcli.inference.scoring import Perplexity, Score, Scorer
from lmcli.model.device import Placement, place
from lmcli.text.corpus import encode_text

# (shape, head) → what such a model is, and the commands that can use it with what they do
ABILITIES = {
    ("decoder", "lm"): ("a language model (decoder)", {
        "generate": "continues text", "score": "log-probabilities", "perplexity": "bits per byte"}),
    ("encoder", "lm"): ("a masked language model (encoder)", {"generate": "fills masks"}),
    ("encoder-decoder", "lm"): ("an encoder–decoder", {"generate": "turns one text into another"}),
    ("encoder", "sequence"): ("a classifier of texts (encoder)", {"classify": "labels texts"}),
    ("encoder", "token"): ("a classifier of tokens (encoder)", {"classify": "labels tokens"}),
    ("encoder", "span"): ("a question-answering model (encoder)", {}),
    ("encoder", "none"): ("an encoder without a head", {}),
}


def load(path: str | Path, device: str = "auto", dtype: str = "auto", threads: int = 0, training: bool = False) -> "Model":
    """The model of a folder, or of a name on Hugging Face's hub (see checkpoints/hub.py). `dtype` "auto" is float32 (with
    `training`, which also suits generating, bfloat16 where the hardware is made for it).

    Raises UserError for a folder that cannot be read and UsageError for a device that is not there.
    """
    placement = place(device, dtype, threads, training)
    return Model(folder.load(hub.find(path), placement.device, placement.dtype), placement, str(path))


def abilities(config: ModelConfig) -> tuple[str, dict[str, str]]:
    """(what a model is, {command that can use it: what it does})."""
    return ABILITIES[config.shape, config.head]


class Model:
    """A loaded model folder. `model` is the torch.nn.Module, `tokenizer` and `placement` what it runs with; `name` is
    what errors call it."""

    def __init__(self, checkpoint: folder.Checkpoint, placement: Placement, name: str = "the model"):
        self.checkpoint, self.placement, self.name = checkpoint, placement, name
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer

    def require(self, command: str) -> None:
        """Raises UserError, naming what the model is and can do, when its shape or head is not made for a command."""
        what, commands = abilities(self.model.config)
        if command not in commands:
            able = ", ".join(f"lm {name} ({does})" for name, does in commands.items())
            raise UserError(f"is {what}, which lm {command} cannot use", where=self.name,
                            hint=f"it can: {able}" if able else "its outputs: lmcli.load(…).logits in Python")

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
        self.require("classify")
        if not 0 <= threshold <= 1:
            raise UsageError(f"{threshold} is outside 0 to 1", where="--threshold")
        return Classifier(self.model, self.tokenizer, threshold, batch)

    def classify(self, texts: str | list[str | tuple[str, str]], **options: Any) -> list[Classified]:
        """What the model says of each text, or pair of texts: .label, .probability, .probabilities, .logits, and .pieces
        when it labels tokens. The tokenizer's special tokens are put around; `truncated` tells what was cut."""
        return self.classifier(**options).classify([texts] if isinstance(texts, str) else texts)

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
        """Ids of a prompt with the beginning token in front, never doubled."""
        beginning, ids = self.beginning(bos), self.encode(text)
        ids = ids if beginning and ids[:len(beginning)] == beginning else beginning + ids
        if not ids:
            raise UsageError("an empty prompt, and this model has no beginning token to start from",
                             hint="give a prompt, or --bos")
        return ids

    def decoder(self, stop: str | tuple[str, ...] = (), bos: bool | None = None, **options: Any) -> Decoder:
        """A Decoder with the folder's defaults under `options` (fields of GenerateConfig; None leaves the default)."""
        known = {f.name for f in fields(GenerateConfig)}
        unknown = set(options) - known
        if unknown:
            raise TypeError(f"unknown option {sorted(unknown)[0]!r}; there are: stop, bos, {', '.join(sorted(known))}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise UsageError("an empty text is in every text", where="--stop", hint="give a text that is to end it")
        chosen = {key: check(GenerateConfig, key, value, "generate") for key, value in options.items()
                  if value is not None}
        return Decoder(self.model, self.tokenizer, self.beginning(bos), self.checkpoint.stops,
                       replace(self.checkpoint.generate, **chosen), stop)

    def generate(self, prompts: str | list[str], num_samples: int = 1, seed: int | None = None,
                 stop: str | tuple[str, ...] = (), bos: bool | None = None, **options: Any) -> list[Generated]:
        """`num_samples` continuations a prompt, in order. Options: max_new_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, num_beams, length_penalty. Without a seed a random one is drawn; each result names its own."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        decoder = self.decoder(stop, bos, **options)
        ids = [self.prompt(text, bos) for text in prompts]
        return [result for results in decode_all(decoder, ids, num_samples, seed) for result in results]

    def stream(self, prompt: str, seed: int | None = None, stop: str | tuple[str, ...] = (), bos: bool | None = None,
               **options: Any) -> Iterator[Piece]:
        """One continuation as it comes: pieces of text, the last one with the result."""
        decoder = self.decoder(stop, bos, **options)
        return decoder.stream([self.prompt(prompt, bos)], [new_seed() if seed is None else seed])

    def scorer(self, bos: bool | None = None, eos: bool = False, context: int | None = None,
               stride: int | None = None, batch: int = 0) -> Scorer:
        """A Scorer for this model. `eos` scores the closing token too.

        Raises UsageError for a context or stride that the model cannot have, UserError for one that is no decoder.
        """
        self.require("score")
        if context is not None and not 2 <= context <= self.context:
            raise UsageError(f"{context} is outside 2 to {self.context}, the model's context", where="--context")
        if stride is not None and not 1 <= stride <= (context or self.context):
            raise UsageError(f"{stride} is outside 1 to {context or self.context}, the context", where="--stride")
        if eos and not self.checkpoint.stops:
            raise UsageError("this model has no closing token", where="--eos")
        return Scorer(self.model, self.tokenizer, self.beginning(bos), self.checkpoint.stops[0] if eos else None,
                      context or 0, stride or 0, batch)

    def score(self, texts: str | list[str], per: str = "record", **options: Any) -> list[Score]:
        """A Score a text: natural-log probability, tokens, bytes, bits per byte; `per` "token" or "word" adds pieces."""
        if per not in ("record", "token", "word"):
            raise UsageError(f"{per!r} is none of record, word, token", where="--per")
        return self.scorer(**options).score([texts] if isinstance(texts, str) else texts, per)

    def perplexity(self, text: str, context: int | None = None, stride: int | None = None, **options: Any) -> Perplexity:
        """Perplexity, bits per byte and the counts of one text, taken as one document."""
        return self.scorer(context=context, stride=stride, **options).perplexity([encode_text(text, self.tokenizer)])


def new_seed() -> int:
    """A seed that nobody chose: 31 bits, so that it can be typed."""
    return random.SystemRandom().getrandbits(31)


def decode_all(decoder: Decoder, prompts: list[list[int]], num_samples: int = 1,
               seed: int | None = None, batch: int = 0) -> list[list[Generated]]:
    """`num_samples` results for each prompt (ids), in order; worked on in groups of like length.

    Sample k of prompt i is drawn from seed + i · num_samples + k, which its `seed` names.
    """
    first = new_seed() if seed is None else seed
    if decoder.config.num_beams > 1:
        if num_samples > decoder.config.num_beams:
            raise UsageError(f"--num-samples {num_samples} is more than --num-beams {decoder.config.num_beams}")
        return [decoder.beams(prompt, num_samples) for prompt in prompts]
    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    most = min(4 * batch_tokens(decoder.model.embedding.weight.device, batch), 64 * decoder.context)
    found: dict[int, Generated] = {}
    lengths = [min(len(row), decoder.context) + decoder.config.max_new_tokens for row in rows]
    for group in grouped_by_length(lengths, most):
        results = decoder.generate([rows[i] for i in group], [first + i for i in group])
        found.update(zip(group, results))
    return [[found[i * num_samples + k] for k in range(num_samples)] for i in range(len(prompts))]
