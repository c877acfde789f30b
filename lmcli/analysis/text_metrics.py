"""Metrics of texts beside their references: BLEU and chrF by sacrebleu, ROUGE by rouge-score, exact match and token F1."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

from lmcli.analysis.intervals import Score
from lmcli.analysis.metrics import mean_of
from lmcli.errors import UserError
from lmcli.text.answers import exact_match, token_f1

References = Sequence[Sequence[str]]  # for each record the texts that are right


@dataclass
class TextMetric:
    """`figures` that share what they count of a record: `rows` gives that (N, K), `scores` turn the sums (R, K) of rows
    into each figure. `hits` are the figures that are the rate of a column of 0 and 1. `signature` tells how it counts."""

    rows: Callable[[References, Sequence[str]], np.ndarray]
    scores: dict[str, Score]
    signature: Callable[[], str]
    hits: dict[str, int]


def library(name: str, needs: str) -> ModuleType:
    """An optional library. Raises UserError that names the extra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{needs} needs {name.split('.')[0]}, which is not installed", where="--metric",
                        hint="pip install 'lmcli[eval]'") from error


def bleu(tokenizer: str = "13a") -> TextMetric:
    """BLEU of a corpus (Papineni et al. 2002) by sacrebleu (Post 2018), 0 to 100, words parted by `tokenizer`."""
    return _sacrebleu("bleu", library("sacrebleu.metrics", "bleu").BLEU(tokenize=tokenizer))


def chrf() -> TextMetric:
    """chrF2 of a corpus (Popović 2015) by sacrebleu, 0 to 100."""
    return _sacrebleu("chrf", library("sacrebleu.metrics", "chrf").CHRF())


def _sacrebleu(name: str, metric: Any) -> TextMetric:
    """sacrebleu's own metric, split where its significance tests split it: statistics of segments, score of their sums."""
    known: set[int] = set()  # how many references records have, which the signature tells

    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        most = max(map(len, references))
        streams = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
        found = metric._extract_corpus_statistics(predictions, streams)
        known.add(metric.num_refs)
        return np.asarray(found, dtype=np.float64)

    def score(sums: np.ndarray) -> np.ndarray:
        return np.array([metric._compute_score_from_stats([round(value) for value in row]).score for row in sums.tolist()])

    def signature() -> str:
        metric.num_refs = next(iter(known)) if len(known) == 1 else -1
        return str(metric.get_signature())
    return TextMetric(rows, {name: score}, signature, {})


def rouge(stemmer: bool = False, names: Sequence[str] = ("rouge1", "rouge2", "rougeL")) -> TextMetric:
    """The mean F-measure of each ROUGE (Lin 2004) by rouge-score, 0 to 1; of several references the best one counts."""
    scorer = library("rouge_score.rouge_scorer", "rouge").RougeScorer(list(names), use_stemmer=stemmer)

    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        scored = (scorer.score_multi(texts, text) for texts, text in zip(references, predictions))
        return np.array([[1.0, *(found[name].fmeasure for name in names)] for found in scored])

    def signature() -> str:
        return f"figure:fmeasure|stemmer:{'yes' if stemmer else 'no'}|rouge-score:{metadata.version('rouge-score')}"
    return TextMetric(rows, {name: mean_of(1 + k, 0) for k, name in enumerate(names)}, signature, {})


def answers(version: int = 1) -> TextMetric:
    """Exact match and token F1 by the rules of SQuAD 1.1 or, with questions that have no answer, of 2.0, 0 to 1."""
    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        scored = ((exact_match(text, texts, version), token_f1(text, texts, version))
                  for texts, text in zip(references, predictions))
        return np.array([[1.0, exact, overlap, bool(texts), exact * bool(texts), overlap * bool(texts), not texts,
                          exact * (not texts)] for texts, (exact, overlap) in zip(references, scored)])
    scores = {"exact_match": mean_of(1, 0), "token_f1": mean_of(2, 0)}
    if version == 2:
        scores |= {"exact_match_answerable": mean_of(4, 3), "token_f1_answerable": mean_of(5, 3),
                   "exact_match_unanswerable": mean_of(7, 6)}
    return TextMetric(rows, scores, lambda: f"version:{'1.1' if version == 1 else '2.0'}", {"exact_match": 1})


def identical() -> TextMetric:
    """The rate of texts that are one of their references, white space around both left out, 0 to 1."""
    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        return np.array([[1.0, any(text.strip() == right.strip() for right in texts)]
                         for texts, text in zip(references, predictions)])
    return TextMetric(rows, {"identical": mean_of(1, 0)}, lambda: "", {"identical": 1})


def first_likelier() -> TextMetric:
    """The rate of pairs of which the first text is the likelier one, 0 to 1; pairs of which that is not known left out."""
    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        return np.array([[float(text != ""), float(text == "true")] for text in predictions])
    return TextMetric(rows, {"first_likelier": mean_of(1, 0)}, lambda: "", {"first_likelier": 1})


def chosen(names: Sequence[str], tokenizer: str, stemmer: bool, version: int) -> dict[str, TextMetric]:
    """The metrics that give these figures, by the name of the library or rule that counts them."""
    made = {"bleu": partial(bleu, tokenizer), "chrf": chrf,
            "rouge": partial(rouge, stemmer, [name for name in FIGURES["rouge"] if name in names]),
            "squad": partial(answers, version), "identical": identical, "pairs": first_likelier}
    return {name: make() for name, make in made.items() if any(figure in FIGURES[name] for figure in names)}


FIGURES = {"bleu": ("bleu",), "chrf": ("chrf",), "rouge": ("rouge1", "rouge2", "rougeL"),
           "squad": ("exact_match", "token_f1"), "identical": ("identical",), "pairs": ("first_likelier",)}
