"""`lmcli.load(DIR)`: a model folder as an object that encodes, scores and generates.

The commands and notebooks call the same methods.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray

from lmcli.checkpoints import folder as checkpoints
from lmcli.checkpoints import hub
from lmcli.config import ModelConfig
from lmcli.errors import UsageError, UserError
from lmcli.generation.batch_generation import generate_all, new_seed, stream_one
from lmcli.generation.chat import Chat
from lmcli.generation.decoding import Decoder, Generated, TextChunk
from lmcli.generation.options import (
    check_forced_ids,
    check_stop_strings,
    check_texts_of_config,
    generation_config,
    with_logit_bias,
)
from lmcli.generation.prompts import encode_prompt, mask_id
from lmcli.generation.structure import check_form
from lmcli.kernels import processor
from lmcli.kernels.decode_step import DecoderWeights, weights_from_files
from lmcli.kernels.fast_decoding import FastDecodingState
from lmcli.model import finite

if TYPE_CHECKING:
    from torch import Tensor

    from lmcli.generation.mask_filling import MaskFiller
    from lmcli.model.device import DeviceConfig
    from lmcli.model.transformer import Transformer
    from lmcli.scoring.classifier import Classification, Classifier
    from lmcli.scoring.perplexity import Perplexity
    from lmcli.scoring.question_answering import Answer, QuestionAnswerer
    from lmcli.scoring.scorer import Score, Scorer, ScoringInput

# (shape, head) → what such a model is, and {command that can use it: what it does}
ABILITIES = {
    ("decoder", "lm"): (
        "a language model (decoder)",
        {"generate": "continues text", "score": "log-probabilities", "perplexity": "bits per byte"},
    ),
    ("encoder", "lm"): (
        "a masked language model (encoder)",
        {"generate": "fills masks", "score": "pseudo-log-likelihoods"},
    ),
    ("encoder-decoder", "lm"): (
        "an encoder–decoder",
        {"generate": "turns a source into a target", "score": "log-probabilities of a target"},
    ),
    ("encoder", "sequence"): ("a classifier of texts (encoder)", {"classify": "labels texts"}),
    ("encoder", "token"): ("a classifier of tokens (encoder)", {"classify": "labels tokens"}),
    ("encoder", "span"): (
        "a question-answering model (encoder)",
        {"classify": "finds answers in a context"},
    ),
    ("encoder", "none"): ("an encoder without a head", {}),
}

Result = TypeVar("Result", Generated, "Score", "Classification", "Answer")


def load(
    path: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    threads: int = 0,
    training: bool = False,
    quantize: str = "",
) -> "Model":
    """The model of a folder, or of a name on the Hugging Face Hub (see checkpoints/hub.py).

    `dtype` "auto" is float32, or with `training` (also for generation) bfloat16 on hardware that is
    faster in it. With `quantize` "int8" or "int4" a decoder on a CPU generates with weights in 8 or
    4 bit. Raises UserError for an unreadable folder, UsageError for a missing device, or where
    quantized weights cannot be used.
    """
    options = device, dtype, threads, training
    precision = processor.cpu_precision(device, dtype, training)
    if not precision:  # an error of the options comes before one of the folder
        _select_device(*options)
    folder = hub.find(path)
    contents = checkpoints.read_folder(folder)
    model = Model(contents, options, precision, str(path), Path(folder), quantize)
    if not model.decodes_without_torch:
        model.model  # noqa: B018  # raises the errors of the weights
    return model


def _select_device(device: str, dtype: str, threads: int, training: bool) -> "DeviceConfig":
    from lmcli.model.device import select_device

    return select_device(device, dtype, threads, training)


def abilities(config: ModelConfig) -> tuple[str, dict[str, str]]:
    """(what a model is, {command that can use it: what it does})."""
    return ABILITIES[config.shape, config.head]


class Model:
    """A loaded model: `model` (torch.nn.Module), `tokenizer`, `folder`; `name` is for errors.

    A decoder that runs in C generates without torch: `model` and `device_config` load it on first
    use. `device_options` are those of `select_device`; `precision` is that of a decoder in C, "" if
    it cannot run with these options.
    """

    def __init__(
        self,
        contents: checkpoints.ModelFolder,
        device_options: tuple[str, str, int, bool],
        precision: str,
        name: str = "the model",
        folder: Path | None = None,
        quantize: str = "",
    ):
        self._weight_type = quantize or None
        self.checkpoint, self.tokenizer = contents, contents.tokenizer
        self.name, self.folder = name, folder
        self._device_options, self._precision = device_options, precision
        self._parameters: Mapping[str, NDArray[Any]] | None = None
        self.config = contents.config
        if found := contents.decoder_parameters() if precision else None:
            self.config, self._parameters = found
            self._device_options = "cpu", precision, *device_options[2:]
            if threads := device_options[2]:
                processor.set_thread_count(threads)

    @property
    def decodes_without_torch(self) -> bool:
        """True if text is generated by the decoder in C, from the files' own weights."""
        return self._parameters is not None and "model" not in vars(self)

    @cached_property
    def device_config(self) -> "DeviceConfig":
        """Where the model runs, and in which precision."""
        return _select_device(*self._device_options)

    @cached_property
    def model(self) -> "Transformer":
        """The model as a torch.nn.Module. What changes in it changes what is generated."""
        device_config = self.device_config
        model = self.checkpoint.with_model(device_config.device, device_config.dtype).model
        self.config = model.config
        return model

    @cached_property
    def _weights(self) -> DecoderWeights:
        assert self._parameters is not None
        return weights_from_files(self.config, self._parameters, self._precision, self._weight_type)

    def _decoding_states(self) -> tuple[Callable[..., Any], bool]:
        """(sequences, sources, capacity) → the state after them; True if that is extendable."""
        if self.decodes_without_torch:
            return lambda rows, _, capacity: FastDecodingState(self._weights, rows, capacity), True
        from lmcli.kernels.decoding_state import decoding_state, supports

        fast = supports(self.model)
        if self._weight_type and not fast:
            raise UsageError(
                f"{self.name} cannot generate with weights in {self._weight_type} here",
                where="--quantize",
                hint="that takes a decoder on a CPU, without an adapter, and a C compiler",
            )
        states = partial(decoding_state, self.model, weight_type=self._weight_type)
        return states, fast and self.config.shape == "decoder"

    @property
    def runs_on(self) -> str:
        """Device, threads and precision, for people."""
        if self.decodes_without_torch:
            precision = self._weight_type or self._precision
            return f"cpu, {processor.thread_count()} threads, {precision}"
        return str(self.device_config)

    def require(self, command: str) -> None:
        """Raises UserError with what the model is and can do if a command cannot use it."""
        kind, commands = abilities(self.config)
        if command not in commands:
            able = ", ".join(f"lm {name} ({does})" for name, does in commands.items())
            raise UserError(
                f"is {kind}, which lm {command} cannot use",
                where=self.name,
                hint=f"use {able or 'lmcli.load(…).logits in Python'}",
            )

    def _require_head(self, heads: tuple[str, ...], threshold: float) -> None:
        """Raises UserError unless the model has one of these heads and the threshold is one."""
        self.require("classify")
        if not 0 <= threshold <= 1:
            raise UsageError(f"{threshold} is outside 0 to 1", where="--threshold")
        if self.config.head not in heads:
            raise UserError(
                f"is {abilities(self.config)[0]}",
                where=self.name,
                hint="answering needs a question-answering model, labeling a classifier",
            )

    @property
    def context(self) -> int:
        """Tokens the model attends to."""
        return self.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of ids."""
        return self.tokenizer.decode(ids)

    def logits(
        self,
        input_ids: "Tensor | list[list[int]]",
        attention_mask: "Tensor | list[list[int]] | None" = None,
        decoder_input_ids: "Tensor | list[list[int]] | None" = None,
        token_type_ids: "Tensor | list[list[int]] | None" = None,
    ) -> "Tensor":
        """Logits of ids (B, T), to which no token is added; the mask (B, T) is 0 on padding.

        (B, T, V) over the vocabulary; (B, labels) or (B, T, labels) of a classifier; (B, T, 2) of a
        question-answering model; the first token's hidden state (B, C) without a head. An
        encoder–decoder returns the logits of `decoder_input_ids`; raises UsageError without them.
        """
        if (decoder_input_ids is None) == (self.config.shape == "encoder-decoder"):
            raise UsageError(
                "an encoder–decoder, and no other model, needs decoder_input_ids", where=self.name
            )
        import torch

        model = self.model
        ids = torch.as_tensor(input_ids, device=self.device_config.device)
        mask, target, types = (
            None if values is None else torch.as_tensor(values, device=ids.device)
            for values in (attention_mask, decoder_input_ids, token_type_ids)
        )
        with torch.inference_mode():
            return model(ids, mask, decoder_input_ids=target, token_type_ids=types)

    def classifier(self, threshold: float = 0.5, batch: int = 0) -> "Classifier":
        """A Classifier of this model; raises UserError if it has no labels."""
        from lmcli.scoring.classifier import Classifier

        self._require_head(("sequence", "token"), threshold)
        return Classifier(self.model, self.tokenizer, threshold, batch)

    def classify(
        self, texts: str | list[str | tuple[str, str]], **options: Any
    ) -> "list[Classification]":
        """The Classification of each text or pair of texts: .label .probability .logits .truncated.

        A classifier of tokens gives .pieces.
        """
        texts = [texts] if isinstance(texts, str) else texts
        return self._all_checked(self.classifier(**options).classify(texts), "text")

    def question_answerer(self, threshold: float = 0.5, **options: Any) -> "QuestionAnswerer":
        """A QuestionAnswerer; `options` are its fields: max_answer_tokens, count, stride, batch."""
        from lmcli.scoring.question_answering import QuestionAnswerer

        self._require_head(("span",), threshold)
        return QuestionAnswerer(self.model, self.tokenizer, threshold, **options)

    def answer(
        self, questions: str | list[str], contexts: str | list[str], **options: Any
    ) -> "list[Answer]":
        """The Answer to each question in its context; one context may serve all questions."""
        questions = [questions] if isinstance(questions, str) else questions
        contexts = [contexts] * len(questions) if isinstance(contexts, str) else contexts
        if len(questions) != len(contexts):
            raise UsageError(f"{len(questions)} questions, but {len(contexts)} contexts")
        answers = self.question_answerer(**options).answer(questions, contexts)
        return self._all_checked(answers, "question")

    def bos_ids(self, bos: bool | None = None) -> list[int]:
        """The ids that start a context: the tokenizer's own, or with or without them as `bos` says.

        Raises UsageError if `bos` asks for a beginning token and the folder names none.
        """
        if bos is None or (bos and self.checkpoint.bos):
            return self.checkpoint.bos
        if not bos:
            return []
        token = self.tokenizer.special_id("bos_token")
        if token is None:
            token = self.config.bos_token_id
        if token is None:
            raise UsageError("this model has no beginning token", where="--bos")
        if token >= self.config.vocab_size:
            raise UserError(f"bos_token_id {token} is no id of this model", where=self.name)
        return [token]

    def prompt(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of a prompt with special tokens; bos is never doubled (see prompts.encode_prompt)."""
        return encode_prompt(text, self.tokenizer, self.config, self.bos_ids(bos))

    def chat(self, system: str | None = None) -> Chat:
        """Writes messages in the model's chat template; raises UserError if it has none."""
        return Chat(self.tokenizer, self.name, system)

    def decoder(
        self, stop: str | tuple[str, ...] = (), bos: bool | None = None, **options: Any
    ) -> "Decoder | MaskFiller":
        """What generates text: a Decoder, or for an encoder a MaskFiller.

        `options` are fields of GenerateConfig over the folder's defaults (generation/options.py). A
        MaskFiller samples only if they have a temperature. Raises UserError for other models.
        """
        self.require("generate")
        config = generation_config(self.checkpoint.generate, options)
        stop_strings = check_stop_strings(stop)
        check_form(config, self.config.shape, stop_strings or config.stop_strings)
        if self.config.shape == "encoder":
            from lmcli.generation.mask_filling import MaskFiller

            sampled = options.get("temperature") is not None and config.temperature > 0
            mask = mask_id(self.tokenizer)
            return MaskFiller(self.model, self.tokenizer, config, mask, sampled)
        check_forced_ids(config, self.config.vocab_size)
        config = with_logit_bias(config, self.tokenizer, self.config.vocab_size)
        check_texts_of_config(config)
        states, extendable = self._decoding_states()
        return Decoder(
            self.config,
            states,
            self.tokenizer,
            self.bos_ids(bos),
            self.checkpoint.stop_ids,
            config,
            stop_strings,
            decoder_start=self.checkpoint.decoder_start,
            device_type="cpu" if self.decodes_without_torch else self.device_config.device.type,
            extendable=extendable,
        )

    def generate(
        self,
        prompts: str | list[str],
        num_samples: int = 1,
        seed: int | None = None,
        stop: str | tuple[str, ...] = (),
        bos: bool | None = None,
        batch: int = 0,
        best_of: int = 0,
        **options: Any,
    ) -> list[Generated]:
        """`num_samples` results per prompt, in order: continuations, targets or filled texts.

        `options` are fields of GenerateConfig, such as max_new_tokens, temperature and top_p. Each
        result holds its seed. With `best_of` that many are drawn, and those with the highest mean
        log-probability are returned. `batch` is tokens per forward pass; 0: as suits the device.
        Raises UserError for a prompt longer than the context, unless `on_long` says otherwise.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        decoder = self.decoder(stop, bos, **options)
        ids = [decoder.fit(self.prompt(text, bos)) for text in prompts]
        results = generate_all(decoder, ids, num_samples, seed, batch, best_of)
        return [
            self.checked(result, f"prompt {i + 1:,}", i)
            for i, samples in enumerate(results)
            for result in samples
        ]

    def checked(self, result: Result, place: str, index: int = 0) -> Result:
        """The result for the input at a place; raises BadResult or UserError for a problem.

        `index` is the number of the input in its call, see BadResult.
        """
        self.require_sound(result.problem, place, index)
        return result

    def require_sound(self, problem: str, place: str, index: int = 0) -> None:
        """Raises BadResult or UserError for a problem with the input at a place; "" is none."""
        if problem in (finite.LOGPROB, finite.LOGIT):
            raise finite.not_finite(self.model, self.name, problem, place, index)
        if problem:
            few = "fewer" in problem
            hint = "ask for fewer, or give more beams" if few else None
            raise UserError(problem, where=place, hint=hint)

    def _all_checked(self, results: list[Result], what: str) -> list[Result]:
        return [self.checked(result, f"{what} {i + 1:,}", i) for i, result in enumerate(results)]

    def stream(
        self,
        prompt: str,
        seed: int | None = None,
        stop: str | tuple[str, ...] = (),
        bos: bool | None = None,
        **options: Any,
    ) -> Iterator[TextChunk]:
        """Yields one continuation in chunks, the last with the result; beams give one chunk."""
        decoder = self.decoder(stop, bos, **options)
        ids, seed = decoder.fit(self.prompt(prompt, bos)), new_seed() if seed is None else seed
        return map(self._checked_chunk, stream_one(decoder, ids, seed))

    def _checked_chunk(self, chunk: TextChunk) -> TextChunk:
        if chunk.result:
            self.checked(chunk.result, "the text")
        return chunk

    def scorer(
        self,
        bos: bool | None = None,
        eos: bool = False,
        context: int | None = None,
        stride: int | None = None,
        batch: int = 0,
        within_word: bool = False,
    ) -> "Scorer":
        """A Scorer; `eos` scores the closing token too, `within_word` is for encoders (see Scorer).

        Raises UsageError for a context or stride out of range and for tokens that are not there.
        """
        from lmcli.scoring.scorer import Scorer

        self.require("score")
        shape = self.config.shape
        if context is not None and not 2 <= context <= self.context:
            raise UsageError(
                f"{context} is outside 2 to {self.context}, the model's context", where="--context"
            )
        if stride is not None and not 1 <= stride <= (context or self.context):
            raise UsageError(
                f"{stride} is outside 1 to {context or self.context}, the context", where="--stride"
            )
        if eos and (shape == "encoder" or not self.checkpoint.stop_ids):
            raise UsageError("this model has no closing token", where="--eos")
        if bos is not None and shape != "decoder":
            raise UsageError("--bos/--no-bos applies to decoders only", where="--bos")
        if within_word and shape != "encoder":
            raise UsageError("only an encoder masks what it scores", where="--pll")
        window_start = self.bos_ids(bos)
        if shape == "encoder":
            mask_id(self.tokenizer)  # raises UserError if there is none
        elif shape == "encoder-decoder":
            assert self.checkpoint.decoder_start is not None  # set for every encoder–decoder
            window_start = [self.checkpoint.decoder_start, *self.tokenizer.target.prefix]
        return Scorer(
            self.model,
            self.tokenizer,
            window_start,
            self.checkpoint.stop_ids[0] if eos else None,
            context or 0,
            stride or 0,
            batch,
            within_word,
            self.name,
        )

    def score(
        self,
        texts: "str | list[str | ScoringInput]",
        per: str = "record",
        alternatives: int = 0,
        **options: Any,
    ) -> "list[Score]":
        """The Score of each text: .logprob (nats) .tokens .bytes .bits_per_byte.

        A ScoringInput adds a prefix or a source. With `per` "token" or "word" there are .pieces, of
        tokens with as many likely `alternatives` as asked for.
        """
        if per not in ("record", "token", "word"):
            raise UsageError(f"{per!r} is none of record, word, token", where="--per")
        texts = [texts] if isinstance(texts, str) else texts
        return self._all_checked(self.scorer(**options).score(texts, per, alternatives), "text")

    def perplexity(
        self, text: str, context: int | None = None, stride: int | None = None, **options: Any
    ) -> "Perplexity":
        """Perplexity, bits per byte and counts of a text as one document."""
        from lmcli.data.corpus import encode_text
        from lmcli.scoring.perplexity import measure_perplexity

        self.require("perplexity")
        scorer = self.scorer(context=context, stride=stride, **options)
        figures = measure_perplexity(scorer, [encode_text(text, self.tokenizer)])
        self.require_sound(figures.problem, "the text")
        return figures
