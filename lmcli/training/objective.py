"""What an objective consists of: its row of data, its data set, its loss and its figures."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lmcli.config import ModelConfig, TrainConfig
from lmcli.data.batches import IGNORED, Batch, ExampleRows, MaskedRows, PackedRows, unigram_entropy
from lmcli.data.byte_ranges import Documents
from lmcli.data.corpus import Corpus, EncodedDocument, Mixture
from lmcli.data.documents import DocumentFormat
from lmcli.data.examples import Examples
from lmcli.data.squad import Questions
from lmcli.model.likelihood import chunks, summed_loss, target_logprobs
from lmcli.model.transformer import Transformer
from lmcli.text.tokenizer import Tokenizer
from lmcli.training.datasets import FirstRows, Split

EVALUATION_BATCH_TOKENS = 16_384


class Predictions(NamedTuple):
    """Hidden states (N, C), the `head` that turns them into logits, and the N targets."""

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    targets: Tensor


BatchSource = PackedRows | MaskedRows | ExampleRows


class ValidationFigures(Protocol):
    """What one evaluation measured."""

    @property
    def criterion(self) -> float:
        """The figure that selects the best model; lower is better."""

    @property
    def loss(self) -> float:
        """Nats per target: of models with the same criterion the one with less is better."""

    def metrics(self) -> dict[str, float]:
        """Plain values for metrics.jsonl."""

    def facts(self) -> dict[str, float]:
        """Plain values for recipe.yaml."""

    def headline(self) -> str:
        """The figures on one line."""


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate a model: `measure()` does it once and reads `tokens` tokens."""

    measure: Callable[[], ValidationFigures]
    tokens: int = 0


# how `lm perplexity` measures documents; passed in, since training does not import scoring
PerplexityEvaluation = Callable[[Transformer, Tokenizer, list[EncodedDocument]], Evaluation]


@dataclass(frozen=True)
class SamplePrompt:
    """What a sample text continues: `ids`, shown as `text` ("" shows the continuation alone)."""

    ids: list[int]
    stop_ids: list[int]
    greedy: bool = False
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingData(ABC):
    """Encoded training and validation sets, with the tokenizer of both."""

    objective: "Objective"
    tokenizer: Tokenizer
    context: int
    tokens: int  # of the training set
    bytes: int  # UTF-8 bytes of its text
    measured: Documents  # the documents of the validation set
    labels: tuple[str, ...] = ()
    multi_label: bool = False
    bytes_per_token: float = 0.0  # of the loss; 0 if it is not one of plain text
    context_prefix: str = ""  # text of the special token that begins every context

    @abstractmethod
    def batches(self, train: TrainConfig, model: ModelConfig) -> BatchSource:
        """The training rows."""

    @abstractmethod
    def evaluation(
        self, model: Transformer, train: TrainConfig, perplexity: PerplexityEvaluation
    ) -> Evaluation:
        """How a model is evaluated on the validation set."""

    def sample_prompt(self, step: int, model: ModelConfig) -> SamplePrompt | None:
        """The prompt of the sample text after a step; None if the objective has no sample text."""
        return None

    def training_ids(self, count: int) -> np.ndarray | None:
        """At most `count` ids of the training text; None if its next tokens are not predicted."""
        return None

    @property
    def validation_ids(self) -> list[np.ndarray]:
        """The ids of each document of the validation set, likewise."""
        return []

    @property
    def most_frequent(self) -> tuple[str, float] | None:
        """The most frequent label of the validation set, if each text has one, and its share."""
        return None

    def example_ids(self) -> Sequence[int]:
        """The ids of a text of the validation set, for examples of commands; () for none."""
        return ()


@dataclass(frozen=True)
class EncodingInput:
    """What an objective's `encode` needs; `note` gets lines about the data."""

    objective: "Objective"
    split: Split
    tokenizer: Tokenizer
    context: int
    note: Callable[[str], None]
    labels: tuple[str, ...] = ()

    def common(self, training: Corpus | Mixture | Examples | Questions) -> dict[str, Any]:
        """The arguments that every TrainingData has, given the encoded training set."""
        return {
            "objective": self.objective,
            "tokenizer": self.tokenizer,
            "context": self.context,
            "tokens": training.tokens,
            "bytes": training.bytes,
            "measured": self.split.measured,
        }


@dataclass(frozen=True)
class CardText:
    """An objective's lines of the model card; `figures` makes a table of recipe.yaml's `result`.

    `pipeline` is the pipeline of transformers, "" if there is none. `example` are lines of Python
    that use a `model` of `auto_class` and its `tokenizer`. `usage` are commands. In all of them
    DIR is the model's folder, PROMPT an example of a text and DATA the first training file.
    """

    pipeline: str
    usage: str
    auto_class: str
    example: str
    figures: Callable[[dict, TrainConfig], str]
    verification: str = ""  # how to measure the same figure again


GENERATION_EXAMPLE = """
ids = model.generate(tokenizer(PROMPT, return_tensors="pt").input_ids)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""


@dataclass(frozen=True)
class Objective:
    """One training objective; no other code asks for its name.

    A new objective is one more row in `objectives.OBJECTIVES`, with its functions.
    """

    name: str
    shape: str  # of the model, as in ModelConfig
    head: str  # likewise
    target: str  # what messages call one target
    learns: str  # what learns from what, for messages
    # whether the fields show this objective, for `train.objective=auto`
    recognizes: Callable[[FirstRows], bool]
    # how rows are read; raises UsageError if the fields it needs are missing
    document_format: Callable[[FirstRows], DocumentFormat]
    encode: Callable[[EncodingInput], TrainingData]
    predict: Callable[[Transformer, Batch], Predictions]
    choices: Callable[[ModelConfig, TrainConfig], int]  # classes among which a target is predicted
    card: CardText
    accuracy: str = "accuracy"  # what train.metric=accuracy goes by; "" if by the loss, too
    smooths: bool = True  # whether label smoothing applies
    mixable: bool = False  # whether --weights applies
    preset: str = ""  # the preset that `auto` takes from scratch; "" for `auto` itself
    finetune_preset: str = "finetune"  # the preset that `auto` takes with --from
    evaluation_passes: float = 1.0  # how often an evaluation reads a token of the validation set
    auto_sizes: bool = False  # whether `auto` chooses the model's sizes by the text
    # rows of random ids for `lm bench`; None if it is not measured
    random_rows: Callable[[ModelConfig, TrainConfig], BatchSource] | None = None

    def loss(self, model: Transformer, batch: Batch, smoothing: float = 0.0) -> Tensor:
        """The summed loss of a batch in nats; differentiable."""
        hidden, head, targets = self.predict(model, batch)
        return summed_loss(hidden, head, targets, smoothing if self.smooths else 0.0)

    def selection(self, train: TrainConfig) -> str:
        """What makes a model the best on the validation set: "lowest loss", "highest accuracy"."""
        by_accuracy = train.metric == "accuracy" and self.accuracy
        return f"highest {self.accuracy}" if by_accuracy else "lowest loss"

    def uniform_loss(self, model: ModelConfig, train: TrainConfig) -> float:
        """Nats per target of a uniform guess."""
        return math.log(max(2, self.choices(model, train)))


def vocabulary_size(model: ModelConfig, train: TrainConfig) -> int:
    """The number of classes of an objective that predicts tokens."""
    return model.vocab_size


def predictions_at_targets(model: Transformer, hidden: Tensor, targets: Tensor) -> Predictions:
    """Predictions at the positions (B, T) whose target is not IGNORED."""
    predicted = targets != IGNORED
    return Predictions(hidden[predicted], model.head, targets[predicted])


class BatchTensors(NamedTuple):
    """The arrays of a Batch on the model's device; types only if the model has several."""

    ids: Tensor
    targets: Tensor
    mask: Tensor | None
    types: Tensor | None
    document_start: Tensor | None
    decoder_ids: Tensor | None
    candidates: Tensor | None


def batch_tensors(model: Transformer, batch: Batch) -> BatchTensors:
    """Copies a batch to the model's device."""
    device = model.embedding.weight.device

    def copied(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)  # copies while the GPU computes

    optional = (
        batch.token_mask,
        batch.types if model.config.type_vocab_size >= 2 else None,
        batch.document_start,
        batch.decoder_ids,
        batch.candidates,
    )
    copies = (None if array is None else copied(array) for array in optional)
    return BatchTensors(copied(batch.ids), copied(batch.targets), *copies)


@dataclass
class TargetFigures:
    """Sums over validation targets: log-probability in nats, number, how many were predicted best.

    `end` is a closing token that is not counted. `bytes` is the text that the targets stand for, 0
    if none. `entropy` is the unigram baseline in nats per target. `metric`, loss or accuracy,
    selects the best model.
    """

    target: str
    end: int | None = None
    bytes: int = 0
    entropy: float = 0.0
    metric: str = "loss"
    logprob: float = 0.0
    targets: int = 0
    correct: int = 0

    @property
    def criterion(self) -> float:
        """Nats per target, or the error rate; lower is better. NaN if the loss is."""
        by_loss = self.metric == "loss" or not math.isfinite(self.loss)
        return self.loss if by_loss else 1.0 - self.accuracy

    @property
    def loss(self) -> float:
        """Nats per target."""
        return -self.logprob / max(1, self.targets)

    @property
    def accuracy(self) -> float:
        """Share of targets that were the most likely choice."""
        return self.correct / max(1, self.targets)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the targets' text; NaN if they stand for none."""
        return -self.logprob / math.log(2) / self.bytes if self.bytes else math.nan

    def metrics(self) -> dict[str, float]:
        """Plain values for metrics.jsonl."""
        values = {
            "val_loss": self.loss,
            "val_accuracy": self.accuracy,
            "val_targets": self.targets,
            "val_unigram_entropy": self.entropy,
        }
        if self.bytes:
            values |= {"val_bits_per_byte": self.bits_per_byte, "val_bytes": self.bytes}
        return values

    def facts(self) -> dict[str, float]:
        """Plain values for recipe.yaml."""
        return self.metrics()

    def headline(self) -> str:
        """The figures on one line."""
        bits = f" · {self.bits_per_byte:.4f} bits/byte" if self.bytes else ""
        return (
            f"{self.loss:.4f} nats/{self.target}{bits} · accuracy {self.accuracy:.1%} "
            f"(unigram baseline: {self.entropy:.3f} nats)"
        )

    def add(self, predictions: Predictions) -> None:
        """Adds the predictions for one batch."""
        hidden, head, targets = predictions
        if targets.is_floating_point():  # all labels of a text must be right
            correct = ((head(hidden) > 0) == (targets > 0)).all(-1)
        else:
            rows = chunks(head, hidden, targets)
            correct = torch.cat([head(row).argmax(-1) == expected for row, expected in rows])
        counted = torch.ones_like(correct) if self.end is None else targets != self.end
        logprobs = target_logprobs(hidden, head, targets)[counted]
        self.logprob += float(logprobs.cpu().double().sum())  # Apple's GPUs have no float64
        self.targets += int(counted.sum())
        self.correct += int(correct[counted].sum())


@torch.inference_mode()
def evaluate(
    objective: Objective, model: Transformer, batches: Iterable[Batch], figures: TargetFigures
) -> TargetFigures:
    """`figures` with the sums over these batches. The model is in evaluation mode."""
    for batch in batches:
        figures.add(objective.predict(model, batch))
    return figures


def evaluation_on(
    objective: Objective,
    model: Transformer,
    batches: Callable[[], Iterable[Batch]],
    figures: TargetFigures,
) -> Evaluation:
    """An Evaluation on batches that are the same at every call of `batches`."""
    figures = replace(figures, entropy=unigram_entropy(batch.targets for batch in batches()))
    return Evaluation(
        lambda: evaluate(objective, model, batches(), replace(figures)),
        sum(batch.tokens for batch in batches()),
    )


def target_table(targets: str) -> Callable[[dict, TrainConfig], str]:
    """The card's figures of an objective with targets of this name; {share} is train.mask_share."""

    def table(result: dict, train: TrainConfig) -> str:
        bits = ""
        if "val_bits_per_byte" in result:
            bits = f"\n| bits per byte of the target | {result['val_bits_per_byte']:.4f} |"
        counted = f"{result['val_targets']:,} {targets.format(share=f'{train.mask_share:.0%}')}"
        return f"""On the validation set that `recipe.yaml` names ({counted}),
with the weights of step {result["best_step"]:,}, in float32.

| figure | value |
| --- | --- |
| loss, nats each | {result["val_loss"]:.4f} |
| unigram baseline, nats each | {result["val_unigram_entropy"]:.4f} |
| accuracy | {result["val_accuracy"]:.1%} |{bits}"""

    return table
