"""Metrics of texts: BLEU and chrF by sacrebleu, ROUGE by rouge-score, exact match and token F1."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

from lmcli.data.squad import exact_match, token_f1
from lmcli.errors import import_extra
from lmcli.evaluation.bootstrap import SumMetric
from lmcli.evaluation.label_metrics import column_mean, column_rate

References = Sequence[Sequence[str]]  # for each record the texts that are right

# source (a library, or a rule) → the figures it gives
TEXT_FIGURES = {
    "bleu": ("bleu",),
    "chrf": ("chrf",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "squad": ("exact_match", "token_f1"),
    "identical": ("identical",),
    "pairs": ("first_likelier",),
}


@dataclass
class TextMetric:
    """Figures that share what they count of a record.

    `rows` gives these counts (N, K), `figures` maps sums (R, K) of rows to each figure. `hits` maps
    figures that are the mean of a column of 0 and 1 to that column. `signature` says how it counts.
    """

    rows: Callable[[References, Sequence[str]], np.ndarray]
    figures: dict[str, SumMetric]
    signature: Callable[[], str] = str
    hits: dict[str, int] = field(default_factory=dict)


def _library(name: str, metric: str) -> ModuleType:
    what = f"{metric} needs {name.split('.')[0]}, which is not installed"
    return import_extra(name, "eval", what, "--metric")


def bleu(tokenizer: str = "13a") -> TextMetric:
    """BLEU of a corpus (Papineni et al. 2002), 0 to 100; sacrebleu's `tokenizer` splits words."""
    return _sacrebleu("bleu", _library("sacrebleu.metrics", "bleu").BLEU(tokenize=tokenizer))


def chrf() -> TextMetric:
    """chrF2 of a corpus (Popović 2015) by sacrebleu, 0 to 100."""
    return _sacrebleu("chrf", _library("sacrebleu.metrics", "chrf").CHRF())


def _sacrebleu(name: str, metric: Any) -> TextMetric:
    """A metric of sacrebleu (Post 2018), split as its significance tests split it.

    `rows` gives the statistics of segments, the figure is the score of their sums.
    """
    reference_counts: set[int] = set()  # which numbers of references occurred: for the signature

    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        most = max(map(len, references))
        streams = [
            [texts[k] if k < len(texts) else None for texts in references] for k in range(most)
        ]
        statistics = metric._extract_corpus_statistics(predictions, streams)
        reference_counts.add(metric.num_refs)
        return np.asarray(statistics, dtype=np.float64)

    def score(sums: np.ndarray) -> np.ndarray:
        counts = [[round(value) for value in row] for row in sums.tolist()]
        return np.array([metric._compute_score_from_stats(row).score for row in counts])

    def signature() -> str:
        metric.num_refs = next(iter(reference_counts)) if len(reference_counts) == 1 else -1
        return str(metric.get_signature())

    return TextMetric(rows, {name: score}, signature)


def rouge(stemmer: bool = False, names: Sequence[str] = TEXT_FIGURES["rouge"]) -> TextMetric:
    """The mean F-measure of each ROUGE (Lin 2004), 0 to 1, for the best of the references."""
    scorer_class = _library("rouge_score.rouge_scorer", "rouge").RougeScorer
    scorer = scorer_class(list(names), use_stemmer=stemmer)

    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        scores = (scorer.score_multi(texts, text) for texts, text in zip(references, predictions))
        return np.array([[1.0, *(score[name].fmeasure for name in names)] for score in scores])

    def signature() -> str:
        version = metadata.version("rouge-score")
        return f"figure:fmeasure|stemmer:{'yes' if stemmer else 'no'}|rouge-score:{version}"

    return TextMetric(
        rows, {name: column_mean(1 + k, 0) for k, name in enumerate(names)}, signature
    )


def squad(version: int = 1) -> TextMetric:
    """Exact match and token F1 by the rules of SQuAD 1.1, or of 2.0 with unanswerable questions."""

    def row(answers: Sequence[str], text: str) -> list[float]:
        exact, f1 = exact_match(text, answers, version), token_f1(text, answers, version)
        has = float(bool(answers))
        return [1.0, exact, f1, has, exact * has, f1 * has, 1 - has, exact * (1 - has)]

    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        return np.array([row(*each) for each in zip(references, predictions)])

    figures: dict[str, SumMetric] = {
        "exact_match": column_rate(1, 0),
        "token_f1": column_mean(2, 0),
    }
    if version == 2:
        figures["exact_match_answerable"] = column_rate(4, 3)
        figures["token_f1_answerable"] = column_mean(5, 3)
        figures["exact_match_unanswerable"] = column_rate(7, 6)
    name = "version:1.1" if version == 1 else "version:2.0"
    return TextMetric(rows, figures, lambda: name, {"exact_match": 1})


def identical() -> TextMetric:
    """The rate of texts that equal one of their references but for white space around, 0 to 1."""

    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        pairs = zip(references, predictions)
        return np.array(
            [[1.0, text.strip() in (right.strip() for right in texts)] for texts, text in pairs]
        )

    return TextMetric(rows, {"identical": column_rate(1, 0)}, hits={"identical": 1})


def first_likelier() -> TextMetric:
    """The rate of pairs whose first text is likelier, 0 to 1, of pairs with a figure."""

    def rows(references: References, predictions: Sequence[str]) -> np.ndarray:
        return np.array([[float(text != ""), float(text == "true")] for text in predictions])

    return TextMetric(rows, {"first_likelier": column_rate(1, 0)}, hits={"first_likelier": 1})


def select_text_metrics(
    names: Sequence[str], tokenizer: str, stemmer: bool, version: int
) -> dict[str, TextMetric]:
    """The metrics that give the named figures, by their source (see TEXT_FIGURES).

    `tokenizer` is BLEU's, `stemmer` is ROUGE's, `version` is SQuAD's.
    """
    rouge_names = [name for name in TEXT_FIGURES["rouge"] if name in names]
    build: dict[str, Callable[[], TextMetric]] = {
        "bleu": lambda: bleu(tokenizer),
        "chrf": chrf,
        "rouge": lambda: rouge(stemmer, rouge_names),
        "squad": lambda: squad(version),
        "identical": identical,
        "pairs": first_likelier,
    }
    return {
        source: build[source]()
        for source, figures in TEXT_FIGURES.items()
        if any(figure in names for figure in figures)
    }
