"""The objective of extractive question answering: where in a context the answer starts and ends."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from lmcli.config import ModelConfig, TrainConfig
from lmcli.data import squad
from lmcli.data.batches import Batch, ExampleRows
from lmcli.data.documents import DocumentFormat, read_rows
from lmcli.data.schema import QUESTION_FIELDS, SquadExample
from lmcli.data.squad import (
    QaEncoder,
    Questions,
    QuestionWindows,
    WindowLogits,
    best_spans,
    exact_match,
    span_bytes,
    token_f1,
)
from lmcli.model.transformer import Transformer
from lmcli.training.datasets import FirstRows
from lmcli.training.objective import (
    EVALUATION_BATCH_TOKENS,
    CardText,
    EncodingInput,
    Evaluation,
    Objective,
    PerplexityEvaluation,
    Predictions,
    TargetFigures,
    TrainingData,
    batch_tensors,
)


@dataclass(frozen=True, kw_only=True)
class QuestionData(TrainingData):
    """Questions to train and to validate on; `examples` are the validation rows."""

    questions: Questions
    validation: Questions
    examples: list[SquadExample]

    def windows(self, questions: Questions, stride: int) -> QuestionWindows:
        """Windows over the contexts of questions, `stride` tokens apart."""
        padding = self.tokenizer.special_id("pad_token") or 0
        return QuestionWindows(questions, QaEncoder(self.tokenizer, self.context, stride, padding))

    def long_contexts(self) -> int:
        """How many training contexts need more than one window."""
        windows = self.windows(self.questions, 0)
        return int((np.bincount(windows.spans[:, 0]) > 1).sum())

    def batches(self, train: TrainConfig, model: ModelConfig) -> ExampleRows:
        """The windows over the training contexts, batched by length."""
        windows = self.windows(self.questions, train.doc_stride)
        return ExampleRows(windows.lengths, windows.batch, train.seed)

    def evaluation(
        self, model: Transformer, train: TrainConfig, perplexity: PerplexityEvaluation
    ) -> Evaluation:
        """Exact match, F1 and loss on the validation questions."""
        windows = self.windows(self.validation, train.doc_stride)
        measure = partial(evaluate_questions, model, windows, self.examples, metric=train.metric)
        return Evaluation(measure, int(windows.lengths.sum()))


@dataclass
class SpanFigures(TargetFigures):
    """Sums over validation windows, two targets each; sums of exact match and F1 over questions.

    `entropy` is the loss of guessing among the candidates of a window, in nats per target.
    """

    questions: int = 0
    exact: float = 0.0
    f1: float = 0.0

    @property
    def criterion(self) -> float:
        """Nats per position or, with metric accuracy, 1 − F1."""
        by_loss = self.metric == "loss" or not math.isfinite(self.loss)
        return self.loss if by_loss else 1.0 - self.f1 / max(1, self.questions)

    def metrics(self) -> dict[str, float]:
        """Plain values for metrics.jsonl and recipe.yaml."""
        questions = max(1, self.questions)
        return {
            "val_loss": self.loss,
            "val_accuracy": self.accuracy,
            "val_targets": self.targets,
            "val_guessing": self.entropy,
            "val_questions": self.questions,
            "val_exact_match": self.exact / questions,
            "val_f1": self.f1 / questions,
        }

    def headline(self) -> str:
        """The figures on one line."""
        questions = max(1, self.questions)
        return (
            f"{self.loss:.4f} nats/{self.target} (guessing: {self.entropy:.3f}) · "
            f"{self.exact / questions:.1%} exact · F1 {self.f1 / questions:.1%}"
        )


@torch.inference_mode()
def evaluate_questions(
    model: Transformer,
    windows: QuestionWindows,
    examples: Sequence[SquadExample],
    batch_tokens: int = EVALUATION_BATCH_TOKENS,
    metric: str = "loss",
) -> SpanFigures:
    """The figures of a model in evaluation mode. An answer is predicted unless none is likelier."""
    candidates = windows.spans[:, 2] - windows.spans[:, 1] + 1
    guessing = float(np.log(candidates).mean()) if len(candidates) else math.nan
    figures = SpanFigures(SPAN.target, entropy=guessing, metric=metric, questions=len(examples))
    logits_of: list[list[WindowLogits]] = [[] for _ in examples]
    # read all windows, longest first
    for batch, numbers in _batches(windows, batch_tokens):
        predictions = predict_spans(model, batch)
        figures.add(predictions)
        # (2·B, T) → (B, 2, T)
        both = predictions.hidden.unflatten(0, (2, -1)).transpose(0, 1).cpu().numpy()
        assert batch.candidates is not None
        for (question, start, _), logits, allowed in zip(
            windows.spans[numbers].tolist(), both, batch.candidates
        ):
            logits_of[question].append(WindowLogits(start, *logits[:, allowed]))
    # combine the windows of each question
    for i, (window_logits, example) in enumerate(zip(logits_of, examples)):
        prediction = _answer(window_logits, example, windows.questions.ends[i])
        gold = [answer.text for answer in example.answers]
        figures.exact += exact_match(prediction, gold)
        figures.f1 += token_f1(prediction, gold)
    return figures


def _answer(windows: list[WindowLogits], example: SquadExample, ends: np.ndarray) -> str | None:
    spans, no_answer = best_spans(windows)
    if not spans or no_answer > spans[0].logprob:
        return None
    data = example.context.encode("utf-8")
    start, end = span_bytes(data, ends.tolist(), spans[0])
    return data[start:end].decode("utf-8")


def _batches(windows: QuestionWindows, batch_tokens: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """All windows once, longest first: batches, and the numbers of their windows."""
    groups: list[np.ndarray] = []

    def make(numbers: np.ndarray) -> Batch:
        groups.append(numbers)
        return windows.batch(numbers)

    for batch in ExampleRows(windows.lengths, make, 0).in_order(batch_tokens):
        yield batch, groups[-1]


def predict_spans(model: Transformer, batch: Batch) -> Predictions:
    """The first and the last token of each answer among the candidates (Devlin et al. 2019, §4.2).

    `hidden` holds logits (2·B, T), first of the starts, then of the ends.
    """
    tensors = batch_tensors(model, batch)
    hidden = model.hidden(tensors.ids, tensors.mask, token_type_ids=tensors.types)
    logits = model.head(hidden).float().movedim(-1, 0)  # (2, B, T)
    if tensors.candidates is not None:
        logits = logits.masked_fill(~tensors.candidates, float("-inf"))
    return Predictions(logits.flatten(0, 1), nn.Identity(), tensors.targets.T.flatten())


def encode_questions(request: EncodingInput) -> TrainingData:
    """Contexts and questions; notes how many contexts are read in windows."""
    split, doc_format = request.split, request.split.source.doc_format
    training, validation = (
        squad.build(documents, split.source.hashes, doc_format, request.tokenizer)
        for documents in (split.training, split.measured)
    )
    data = QuestionData(
        **request.common(training),
        questions=training,
        validation=validation,
        examples=[
            doc_format.squad_example(row) for _, row in read_rows(split.measured, doc_format)
        ],
    )
    if long := data.long_contexts():
        request.note(
            f"{long:,} of {len(training):,} contexts have no room in {request.context} tokens: "
            "they are read in windows"
        )
    return data


def question_format(first: FirstRows) -> DocumentFormat:
    """Rows with context, question and answers. Raises UsageError without these three fields."""
    *fields, answers = first.fields(QUESTION_FIELDS)
    return replace(first.doc_format, fields=tuple(fields), answers=answers)


def has_question(first: FirstRows) -> bool:
    """True if the fields are those of questions, or one is named for a question."""
    named = set(QUESTION_FIELDS) & first.named.keys()
    return bool(named) or set(QUESTION_FIELDS) <= set(first.names)


def answers_table(result: dict, train: TrainConfig) -> str:
    """The card's figures of a question-answering model."""
    return f"""On the {result["val_questions"]:,} held-out questions that `recipe.yaml` names,
with the weights of step {result["best_step"]:,}, in float32.

| figure | value |
| --- | --- |
| exact match | {result["val_exact_match"]:.1%} |
| F1 | {result["val_f1"]:.1%} |
| loss, nats for the start or the end | {result["val_loss"]:.4f} |
| the same by guessing | {result["val_guessing"]:.4f} |"""


ANSWER_EXAMPLE = """
inputs = tokenizer("Who sat?", "The cat sat on the mat.", return_tensors="pt")
output = model(**inputs)
start, end = int(output.start_logits.argmax()), int(output.end_logits.argmax())
print(tokenizer.decode(inputs.input_ids[0, start : end + 1]))  # lm classify finds better spans
"""
SPAN = Objective(
    "span",
    shape="encoder",
    head="span",
    target="position",
    learns="answers are learned from rows with context, question and answers",
    recognizes=has_question,
    document_format=question_format,
    encode=encode_questions,
    predict=predict_spans,
    choices=lambda model, train: train.context,
    card=CardText(
        "",  # transformers has no pipeline for it any more
        "lm classify -m DIR DATA",
        "AutoModelForQuestionAnswering",
        ANSWER_EXAMPLE,
        answers_table,
    ),
    accuracy="F1",
    smooths=False,
    preset="qa",
    finetune_preset="qa",
)
