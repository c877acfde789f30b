"""Figures of a question-answering model on its validation part: loss, and its answers beside the right ones."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from lmcli.model.transformer import Transformer
from lmcli.text.answers import Posed, exact_match, token_f1
from lmcli.text.batches import ExampleRows
from lmcli.text.questions import Read, Windows, best_spans, text_of
from lmcli.training.evaluation import Figures, add
from lmcli.training.objectives import span


@dataclass
class SpanFigures(Figures):
    """The sums over validation windows, two targets each; `entropy` is what guessing among their candidates costs, in nats a
    target. Of the questions, sums of exact match and F1 by SQuAD's rules."""

    questions: int = 0
    exact: float = 0.0
    f1: float = 0.0

    @property
    def criterion(self) -> float:
        """Nats per position or, by accuracy, what F1 lacks of 1."""
        return self.loss if self.by == "loss" else 1.0 - self.f1 / max(1, self.questions)

    def metrics(self) -> dict[str, float]:
        """Plain values for metrics.jsonl and recipe.yaml."""
        questions = max(1, self.questions)
        return {"val_loss": self.loss, "val_accuracy": self.accuracy, "val_targets": self.targets,
                "val_guessing": self.entropy, "val_questions": self.questions,
                "val_exact_match": self.exact / questions, "val_f1": self.f1 / questions}

    facts = metrics

    def headline(self) -> str:
        """The figures on one line."""
        questions = max(1, self.questions)
        return (f"{self.loss:.4f} nats/{self.target} (guessing: {self.entropy:.3f}) · "
                f"{self.exact / questions:.1%} exact · F1 {self.f1 / questions:.1%}")


@dataclass
class Asked:
    """Questions held out, what each poses, in windows. `most` tokens are read at once; the best figures are told `by` loss,
    or with accuracy by F1."""

    windows: Windows
    posed: list[Posed]
    most: int
    by: str = "loss"
    guessing: float = field(init=False)

    def __post_init__(self) -> None:
        candidates = self.windows.places[:, 2] - self.windows.places[:, 1] + 1
        self.guessing = float(np.log(candidates).mean()) if len(candidates) else math.nan
        self._rows = ExampleRows(self.windows.lengths, lambda chosen: chosen, 0)

    @property
    def tokens(self) -> int:
        """Tokens that a measurement reads."""
        return int(self.windows.lengths.sum())

    @torch.inference_mode()
    def measure(self, model: Transformer) -> SpanFigures:
        """The figures of a model, which is in evaluation mode. An answer is given unless none is likelier."""
        figures = SpanFigures("position", entropy=self.guessing, by=self.by, questions=len(self.posed))
        read: list[list[Read]] = [[] for _ in self.posed]
        for chosen in self._rows.in_order(self.most):
            batch = self.windows.batch(chosen)
            predicted = span(model, batch)
            add(figures, predicted)
            both = predicted.hidden.unflatten(0, (2, -1)).transpose(0, 1).cpu().numpy()  # (B, 2, T)
            for (question, start, _), logits, may in zip(self.windows.places[chosen].tolist(), both, batch.candidates):
                read[question].append(Read(start, *logits[:, may]))
        for i, (windows, posed) in enumerate(zip(read, self.posed)):
            answer, right = _answer(windows, posed, self.windows.found.ends[i]), [answer.text for answer in posed.answers]
            figures.exact += exact_match(answer, right)
            figures.f1 += token_f1(answer, right)
        return figures


def _answer(windows: list[Read], posed: Posed, ends: np.ndarray) -> str | None:
    spans, none = best_spans(windows)
    if not spans or none > spans[0].logprob:
        return None
    data = posed.context.encode("utf-8")
    start, end = text_of(data, ends, spans[0])
    return data[start:end].decode("utf-8")
