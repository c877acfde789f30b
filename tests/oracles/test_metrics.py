"""Metrics against scikit-learn, sacrebleu, rouge-score, scipy and SQuAD's rules."""

import random
import re
import string
import warnings
from collections import Counter

import numpy as np
import pytest

from lmcli.data.squad import exact_match, token_f1
from lmcli.evaluation import bootstrap, text_metrics
from lmcli.evaluation.systems import LabelCounts, System, TextCounts, evaluate_systems

CASES = 1000
SLOW_CASES = 300  # against scikit-learn, which takes milliseconds for each
WORDS = [
    "a",
    "the",
    "an",
    "cat",
    "cats",
    "dog",
    "runs",
    "running",
    "ran",
    "red",
    "house,",
    "house.",
    "U.S.",
    "don't",
    "it's",
    "Der",
    "Mann",
    "läuft",
    "你好",
    "3.5",
    "%",
    "-",
    "",
]


def figures(counts) -> dict:
    """{(metric, label): value} of all records counted."""
    size = len(counts.index) if isinstance(counts, LabelCounts) else sum(map(len, counts.rows))
    system = System("it", counts, empty=[False] * size)
    (result,) = evaluate_systems(
        [system],
        (),
        (
            "accuracy",
            "exact_set",
            "precision",
            "recall",
            "f1",
            "mcc",
            "confusion",
            *(name for names in text_metrics.TEXT_FIGURES.values() for name in names),
        ),
        0,
        0,
    )
    return {(value.name, value.label): value.value for value in result.values} | {
        "confusion": result.confusion,
        "classes": result.classes,
    }


def random_labels(
    generator: random.Random, multi_label: bool
) -> tuple[list[list[str]], list[list[str]]]:
    """True and predicted labels of few or many classes, some never predicted or never true."""
    names = [f"c{k}" for k in range(generator.randint(1, 6))]
    true_names, predicted_names = (
        generator.sample(names, generator.randint(1, len(names))) for _ in range(2)
    )
    count = generator.randint(1, 30)
    if multi_label:
        return (
            [
                generator.sample(true_names, generator.randint(0, len(true_names)))
                for _ in range(count)
            ],
            [
                generator.sample(predicted_names, generator.randint(0, len(predicted_names)))
                for _ in range(count)
            ],
        )
    references = [generator.choice(true_names) for _ in range(count)]
    return [[label] for label in references], [
        [label if generator.random() < 0.4 else generator.choice(predicted_names)]
        for label in references
    ]


@pytest.fixture
def sklearn():
    """scikit-learn's metrics, silent, without the slow checks of arguments."""
    library = pytest.importorskip("sklearn", reason="pip install scikit-learn")
    with (
        library.config_context(skip_parameter_validation=True, assume_finite=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield pytest.importorskip("sklearn.metrics")


def test_label_metrics_match_scikit_learn(sklearn):
    for seed in range(SLOW_CASES):
        references, predictions = random_labels(random.Random(seed), multi_label=False)
        counts = LabelCounts(False)
        counts.add(references, predictions)
        values = figures(counts)
        true, predicted = (
            np.array([int(label[1:]) for (label,) in rows]) for rows in (references, predictions)
        )
        numbers = sorted({*true.tolist(), *predicted.tolist()})
        labels = [f"c{number}" for number in numbers]
        assert values["classes"] == labels
        check_classes(sklearn, values, true, predicted, numbers)
        matrix = sklearn.confusion_matrix(true, predicted, labels=numbers)
        confusion = values["confusion"]
        ours = [[confusion.get((a, b), 0) for b in (*labels, None)] for a in labels]
        assert [row[:-1] for row in ours] == matrix.tolist() and not any(row[-1] for row in ours)
        assert (values["mcc", None] or 0) == pytest.approx(
            sklearn.matthews_corrcoef(true, predicted)
        )  # undefined is 0 there
        if seed % 5 == 0:
            assert values["accuracy", None] == pytest.approx(
                sklearn.accuracy_score(true, predicted)
            )
            check_averages(sklearn, values, true, predicted)


def check_classes(sklearn, values, true, predicted, columns):
    theirs = sklearn.precision_recall_fscore_support(
        true, predicted, labels=columns, zero_division=np.nan
    )
    for name, expected in zip(("precision", "recall", "f1"), theirs):
        ours = [
            np.nan if values[name, label] is None else values[name, label]
            for label in values["classes"]
        ]
        np.testing.assert_allclose(ours, expected)
        assert values[f"{name}_macro", None] == pytest.approx(np.nan_to_num(expected).mean())


def check_averages(sklearn, values, true, predicted):
    for average in ("macro", "micro"):
        expected = sklearn.precision_recall_fscore_support(
            true, predicted, average=average, zero_division=0
        )
        ours = [values[f"{name}_{average}", None] or 0 for name in ("precision", "recall", "f1")]
        assert ours == pytest.approx(expected[:3])


def test_multi_label_metrics_match_scikit_learn(sklearn):
    done, seed = 0, 0
    while done < SLOW_CASES:
        seed += 1
        references, predictions = random_labels(random.Random(seed), multi_label=True)
        labels = sorted({label for row in (*references, *predictions) for label in row})
        if len(labels) < 2:
            continue  # scikit-learn takes one column for classes 0 and 1
        done += 1
        counts = LabelCounts(True)
        counts.add(references, predictions)
        values = figures(counts)
        true, predicted = (
            np.array([[label in row for label in labels] for row in rows])
            for rows in (references, predictions)
        )
        check_classes(sklearn, values, true, predicted, None)
        if done % 5 == 0:
            assert values["exact_set", None] == pytest.approx(
                sklearn.accuracy_score(true, predicted)
            )
            check_averages(sklearn, values, true, predicted)


def sentence(generator: random.Random, most: int = 14) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(0, most)))


def perturbed(generator: random.Random, text: str) -> str:
    """A similar text: words replaced and left out at random."""
    return " ".join(
        generator.choice(WORDS) if generator.random() < 0.3 else word
        for word in text.split(" ")
        if generator.random() < 0.9
    )


def test_bleu_and_chrf_match_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="pip install 'lmcli[eval]'")
    for seed in range(CASES):
        generator = random.Random(seed)
        references = [[sentence(generator)] for _ in range(generator.randint(1, 5))]
        predictions = [perturbed(generator, text) for (text,) in references]
        counts = TextCounts(text_metrics.select_text_metrics(["bleu", "chrf"], "13a", False, 1))
        for part in (slice(2), slice(2, None)):  # batches add up
            if references[part]:
                counts.add(references[part], [(text,) for text in predictions[part]])
        values, streams = figures(counts), [[text for (text,) in references]]
        assert values["bleu", None] == pytest.approx(
            sacrebleu.corpus_bleu(predictions, streams).score
        )
        assert values["chrf", None] == pytest.approx(
            sacrebleu.corpus_chrf(predictions, streams).score
        )


def test_several_references_and_the_signature_match_sacrebleu():
    metric = pytest.importorskip("sacrebleu.metrics", reason="pip install 'lmcli[eval]'").BLEU()
    generator = random.Random(3)
    references = [[sentence(generator, 9) or "x" for _ in range(2)] for _ in range(40)]
    predictions = [perturbed(generator, texts[1]) for texts in references]
    counts = TextCounts(text_metrics.select_text_metrics(["bleu"], "13a", False, 1))
    counts.add(references, [(text,) for text in predictions])
    assert figures(counts)["bleu", None] == pytest.approx(
        metric.corpus_score(
            predictions, [[texts[k] for texts in references] for k in range(2)]
        ).score
    )
    assert (
        counts.signatures() == {"bleu": str(metric.get_signature())}
        and "nrefs:2" in counts.signatures()["bleu"]
    )
    counts.add([["only one"]], [("only one",)])
    assert "nrefs:var" in counts.signatures()["bleu"]


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_matches_rouge_score(stemmer):
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install 'lmcli[eval]'")
    names = ("rouge1", "rouge2", "rougeL")
    theirs = scorer.RougeScorer(list(names), use_stemmer=stemmer)
    generator, references = random.Random(1), []
    references = [
        [sentence(generator) for _ in range(generator.choice((1, 1, 2)))] for _ in range(CASES)
    ]
    predictions = [perturbed(generator, texts[0]) for texts in references]
    counts = TextCounts(text_metrics.select_text_metrics(names, "13a", stemmer, 1))
    counts.add(references, [(text,) for text in predictions])
    each = [theirs.score_multi(texts, text) for texts, text in zip(references, predictions)]
    values = figures(counts)
    for name in names:
        assert values[name, None] == pytest.approx(np.mean([one[name].fmeasure for one in each]))
    assert f"stemmer:{'yes' if stemmer else 'no'}" in counts.signatures()["rouge"]


class OfficialSquad:
    """The rules of SQuAD's evaluate-v1.1.py and evaluate-v2.0.py, implemented independently."""

    @staticmethod
    def normal(text: str) -> str:
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    @classmethod
    def overlap(cls, prediction: str, reference: str) -> float:
        a, b = cls.normal(prediction).split(), cls.normal(reference).split()
        same = sum((Counter(a) & Counter(b)).values())
        if same == 0:
            return 0
        precision, recall = 1.0 * same / len(a), 1.0 * same / len(b)
        return (2 * precision * recall) / (precision + recall)

    @classmethod
    def overlap_2(cls, reference: str, prediction: str) -> float:
        a, b = (cls.normal(text).split() if text else [] for text in (reference, prediction))
        if len(a) == 0 or len(b) == 0:
            return int(a == b)
        return cls.overlap(prediction, reference)

    @classmethod
    def version_1(cls, answers: list[str], prediction: str) -> tuple[float, float]:
        return (
            max(float(cls.normal(prediction) == cls.normal(reference)) for reference in answers),
            max(cls.overlap(prediction, reference) for reference in answers),
        )

    @classmethod
    def version_2(cls, answers: list[str], prediction: str) -> tuple[float, float]:
        answers = [reference for reference in answers if cls.normal(reference)]
        if not answers:
            answers = [""]
        return (
            max(int(cls.normal(reference) == cls.normal(prediction)) for reference in answers),
            max(cls.overlap_2(reference, prediction) for reference in answers),
        )


@pytest.mark.parametrize("version", [1, 2])
def test_answers_are_compared_by_the_rules_of_squad(version):
    generator = random.Random(version)
    for _ in range(CASES):
        least = 1 if version == 1 else 0
        references = [sentence(generator, 3) for _ in range(generator.randint(least, 3))]
        prediction = generator.choice(
            (
                "",
                "the",
                perturbed(generator, references[0]) if references else sentence(generator, 2),
            )
        )
        expected = (OfficialSquad.version_1 if version == 1 else OfficialSquad.version_2)(
            references, prediction
        )
        values = (
            exact_match(prediction, references, version),
            token_f1(prediction, references, version),
        )
        assert values == pytest.approx(expected), (references, prediction)


def test_mcnemars_p_value_matches_an_exact_binomial_test():
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    generator = np.random.default_rng(0)
    for _ in range(CASES):
        first, second = generator.random((2, int(generator.integers(1, 400)))) < generator.random(
            (2, 1)
        )
        only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
        expected = (
            stats.binomtest(only_first, only_first + only_second).pvalue
            if only_first + only_second
            else 1.0
        )
        assert bootstrap.mcnemar(first * 1.0, second * 1.0) == pytest.approx(expected, rel=1e-9)


def test_the_paired_tests_match_sacrebleu():
    significance = pytest.importorskip("sacrebleu.significance", reason="pip install 'lmcli[eval]'")
    from sacrebleu.metrics import BLEU

    generator = random.Random(5)
    references = [[sentence(generator, 12) or "x"] for _ in range(120)]
    first = [perturbed(generator, text) for (text,) in references]
    second = [
        text if generator.random() < 0.1 else perturbed(generator, text) for (text,) in references
    ]
    systems = []
    for predictions in (first, second):
        systems.append(
            System("it", TextCounts(text_metrics.select_text_metrics(["bleu"], "13a", False, 1)))
        )
        list(
            systems[-1].add(
                zip(
                    [type("Record", (), {"references": texts}) for texts in references],
                    [(text,) for text in predictions],
                )
            )
        )
    result = list(evaluate_systems(systems, (), ("bleu",), 1000, 0))[1]
    _, theirs = significance.PairedTest(
        [("a", first), ("b", second)],
        {"bleu": BLEU()},
        [[text for (text,) in references]],
        test_type="ar",
        n_samples=1000,
    )()
    assert result.values[0].comparison.p == pytest.approx(theirs["BLEU"][1].p_value, abs=0.04)
    _, theirs = significance.PairedTest(
        [("a", first), ("b", second)],
        {"bleu": BLEU()},
        [[text for (text,) in references]],
        test_type="bs",
        n_samples=1000,
    )()
    width = (result.values[0].high - result.values[0].low) / 2
    assert width == pytest.approx(theirs["BLEU"][1].ci, rel=0.15)
