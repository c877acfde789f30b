"""Figures against scikit-learn, sacrebleu, rouge-score, scipy and SQuAD's rules, a thousand cases each."""

import random
import re
import string
import warnings
from collections import Counter

import numpy as np
import pytest

from lmcli.analysis import intervals, text_metrics
from lmcli.analysis.systems import LabelCounts, System, TextCounts, measure
from lmcli.text.answers import exact_match, token_f1

CASES = 1000
PARTS = 4  # in which scikit-learn, the slowest of them, is asked, so that the cores share it
WORDS = ["a", "the", "an", "cat", "cats", "dog", "runs", "running", "ran", "red", "house,", "house.", "U.S.", "don't",
         "it's", "Der", "Mann", "läuft", "你好", "3.5", "%", "-", ""]


def figures(counts) -> dict:
    """{(figure, label): value} of all records counted."""
    size = len(counts.index) if isinstance(counts, LabelCounts) else sum(map(len, counts.rows))
    system = System("it", counts, empty=[False] * size)
    (row,) = measure([system], (), ("accuracy", "exact_set", "precision", "recall", "f1", "mcc", "confusion",
                                    *(name for names in text_metrics.FIGURES.values() for name in names)), 0, 0)
    return {(figure.name, figure.label): figure.value for figure in row.figures} | {"confusion": row.confusion,
                                                                                     "classes": row.classes}


def labelled(generator: random.Random, several: bool) -> tuple[list[list[str]], list[list[str]]]:
    """Labels that are right and given: of few or many classes, some rare, some never given, some right nowhere."""
    names = [f"c{k}" for k in range(generator.randint(1, 6))]
    right_names, given_names = (generator.sample(names, generator.randint(1, len(names))) for _ in range(2))
    count = generator.randint(1, 30)
    if several:
        return ([generator.sample(right_names, generator.randint(0, len(right_names))) for _ in range(count)],
                [generator.sample(given_names, generator.randint(0, len(given_names))) for _ in range(count)])
    right = [generator.choice(right_names) for _ in range(count)]
    return [[label] for label in right], [[label if generator.random() < 0.4 else generator.choice(given_names)]
                                          for label in right]


@pytest.fixture
def sklearn():
    """scikit-learn's metrics, silent, without the checks of arguments that take most of their time."""
    library = pytest.importorskip("sklearn", reason="pip install scikit-learn")
    with library.config_context(skip_parameter_validation=True, assume_finite=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("part", range(PARTS))
def test_labels_are_counted_as_scikit_learn_counts_them(sklearn, part):
    for seed in range(part, CASES, PARTS):
        right, given = labelled(random.Random(seed), several=False)
        counts = LabelCounts(False)
        counts.add(right, given)
        found = figures(counts)
        true, said = (np.array([int(label[1:]) for label, in rows]) for rows in (right, given))
        numbers = sorted({*true.tolist(), *said.tolist()})
        labels = [f"c{number}" for number in numbers]
        assert found["classes"] == labels
        classes_are_theirs(sklearn, found, true, said, numbers)
        matrix = sklearn.confusion_matrix(true, said, labels=numbers)
        assert [row[:-1] for row in found["confusion"]] == matrix.tolist() and not any(row[-1] for row in found["confusion"])
        assert (found["mcc", None] or 0) == pytest.approx(sklearn.matthews_corrcoef(true, said))  # undefined is 0 there
        if seed % 5 == part:
            assert found["accuracy", None] == pytest.approx(sklearn.accuracy_score(true, said))
            averages_are_theirs(sklearn, found, true, said)


def classes_are_theirs(sklearn, found, true, said, columns):
    theirs = sklearn.precision_recall_fscore_support(true, said, labels=columns, zero_division=np.nan)
    for name, values in zip(("precision", "recall", "f1"), theirs):
        own = [np.nan if found[name, label] is None else found[name, label] for label in found["classes"]]
        np.testing.assert_allclose(own, values)
        assert found[f"{name}_macro", None] == pytest.approx(np.nan_to_num(values).mean())


def averages_are_theirs(sklearn, found, true, said):
    for average in ("macro", "micro"):
        wanted = sklearn.precision_recall_fscore_support(true, said, average=average, zero_division=0)
        own = [found[f"{name}_{average}", None] or 0 for name in ("precision", "recall", "f1")]
        assert own == pytest.approx(wanted[:3])


@pytest.mark.parametrize("part", range(PARTS))
def test_sets_of_labels_are_counted_as_scikit_learn_counts_them(sklearn, part):
    done, seed = 0, part
    while done < CASES // PARTS:
        seed += PARTS
        right, given = labelled(random.Random(seed), several=True)
        labels = sorted({label for row in (*right, *given) for label in row})
        if len(labels) < 2:
            continue  # scikit-learn takes one column for classes 0 and 1
        done += 1
        counts = LabelCounts(True)
        counts.add(right, given)
        found = figures(counts)
        true, said = (np.array([[label in row for label in labels] for row in rows]) for rows in (right, given))
        classes_are_theirs(sklearn, found, true, said, None)
        if done % 5 == 0:
            assert found["exact_set", None] == pytest.approx(sklearn.accuracy_score(true, said))
            averages_are_theirs(sklearn, found, true, said)


def sentence(generator: random.Random, most: int = 14) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(0, most)))


def beside(generator: random.Random, text: str) -> str:
    """A text near another one."""
    return " ".join(generator.choice(WORDS) if generator.random() < 0.3 else word for word in text.split(" ")
                    if generator.random() < 0.9)


def test_bleu_and_chrf_are_those_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu", reason="pip install 'lmcli[eval]'")
    for seed in range(CASES):
        generator = random.Random(seed)
        right = [[sentence(generator)] for _ in range(generator.randint(1, 5))]
        given = [beside(generator, text) for text, in right]
        counts = TextCounts(text_metrics.chosen(["bleu", "chrf"], "13a", False, 1))
        for part in (slice(2), slice(2, None)):  # parts add up
            if right[part]:
                counts.add(right[part], [(text,) for text in given[part]])
        found, streams = figures(counts), [[text for text, in right]]
        assert found["bleu", None] == pytest.approx(sacrebleu.corpus_bleu(given, streams).score)
        assert found["chrf", None] == pytest.approx(sacrebleu.corpus_chrf(given, streams).score)


def test_several_references_and_the_signature_are_those_of_sacrebleu():
    metric = pytest.importorskip("sacrebleu.metrics", reason="pip install 'lmcli[eval]'").BLEU()
    generator = random.Random(3)
    right = [[sentence(generator, 9) or "x" for _ in range(2)] for _ in range(40)]
    given = [beside(generator, texts[1]) for texts in right]
    counts = TextCounts(text_metrics.chosen(["bleu"], "13a", False, 1))
    counts.add(right, [(text,) for text in given])
    assert figures(counts)["bleu", None] == pytest.approx(
        metric.corpus_score(given, [[texts[k] for texts in right] for k in range(2)]).score)
    assert counts.signatures() == {"bleu": str(metric.get_signature())} and "nrefs:2" in counts.signatures()["bleu"]
    counts.add([["only one"]], [("only one",)])
    assert "nrefs:var" in counts.signatures()["bleu"]


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_is_that_of_rouge_score(stemmer):
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install 'lmcli[eval]'")
    names = ("rouge1", "rouge2", "rougeL")
    theirs = scorer.RougeScorer(list(names), use_stemmer=stemmer)
    generator, right = random.Random(1), []
    right = [[sentence(generator) for _ in range(generator.choice((1, 1, 2)))] for _ in range(CASES)]
    given = [beside(generator, texts[0]) for texts in right]
    counts = TextCounts(text_metrics.chosen(names, "13a", stemmer, 1))
    counts.add(right, [(text,) for text in given])
    each = [theirs.score_multi(texts, text) for texts, text in zip(right, given)]
    found = figures(counts)
    for name in names:
        assert found[name, None] == pytest.approx(np.mean([one[name].fmeasure for one in each]))
    assert f"stemmer:{'yes' if stemmer else 'no'}" in counts.signatures()["rouge"]


class Official:
    """The rules of SQuAD's evaluate-v1.1.py and evaluate-v2.0.py, written down once more and apart from ours."""

    @staticmethod
    def normal(text: str) -> str:
        text = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())

    @classmethod
    def overlap(cls, given: str, right: str) -> float:
        a, b = cls.normal(given).split(), cls.normal(right).split()
        same = sum((Counter(a) & Counter(b)).values())
        if same == 0:
            return 0
        precision, recall = 1.0 * same / len(a), 1.0 * same / len(b)
        return (2 * precision * recall) / (precision + recall)

    @classmethod
    def overlap_2(cls, right: str, given: str) -> float:
        a, b = (cls.normal(text).split() if text else [] for text in (right, given))
        if len(a) == 0 or len(b) == 0:
            return int(a == b)
        return cls.overlap(given, right)

    @classmethod
    def version_1(cls, answers: list[str], given: str) -> tuple[float, float]:
        return (max(float(cls.normal(given) == cls.normal(right)) for right in answers),
                max(cls.overlap(given, right) for right in answers))

    @classmethod
    def version_2(cls, answers: list[str], given: str) -> tuple[float, float]:
        answers = [right for right in answers if cls.normal(right)]
        if not answers:
            answers = [""]
        return (max(int(cls.normal(right) == cls.normal(given)) for right in answers),
                max(cls.overlap_2(right, given) for right in answers))


@pytest.mark.parametrize("version", [1, 2])
def test_answers_are_compared_as_squad_does(version):
    generator = random.Random(version)
    for _ in range(CASES):
        least = 1 if version == 1 else 0
        right = [sentence(generator, 3) for _ in range(generator.randint(least, 3))]
        given = generator.choice(("", "the", beside(generator, right[0]) if right else sentence(generator, 2)))
        wanted = (Official.version_1 if version == 1 else Official.version_2)(right, given)
        found = exact_match(given, right, version), token_f1(given, right, version)
        assert found == pytest.approx(wanted), (right, given)


def test_mcnemars_p_value_is_that_of_an_exact_binomial_test():
    stats = pytest.importorskip("scipy.stats", reason="pip install scipy")
    generator = np.random.default_rng(0)
    for _ in range(CASES):
        first, second = generator.random((2, int(generator.integers(1, 400)))) < generator.random((2, 1))
        only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
        wanted = stats.binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
        assert intervals.mcnemar(first * 1.0, second * 1.0) == pytest.approx(wanted, rel=1e-9)


def test_the_paired_tests_are_those_of_sacrebleu():
    significance = pytest.importorskip("sacrebleu.significance", reason="pip install 'lmcli[eval]'")
    from sacrebleu.metrics import BLEU

    generator = random.Random(5)
    right = [[sentence(generator, 12) or "x"] for _ in range(120)]
    first = [beside(generator, text) for text, in right]
    second = [text if generator.random() < 0.1 else beside(generator, text) for text, in right]
    systems = []
    for given in (first, second):
        systems.append(System("it", TextCounts(text_metrics.chosen(["bleu"], "13a", False, 1))))
        list(systems[-1].take(zip([type("Record", (), {"references": texts}) for texts in right],
                                  [(text,) for text in given])))
    row = list(measure(systems, (), ("bleu",), 1000, 0))[1]
    _, theirs = significance.PairedTest([("a", first), ("b", second)], {"bleu": BLEU()}, [[text for text, in right]],
                                        test_type="ar", n_samples=1000)()
    assert row.figures[0].compared.p == pytest.approx(theirs["BLEU"][1].p_value, abs=0.04)
    _, theirs = significance.PairedTest([("a", first), ("b", second)], {"bleu": BLEU()}, [[text for text, in right]],
                                        test_type="bs", n_samples=1000)()
    width = (row.figures[0].high - row.figures[0].low) / 2
    assert width == pytest.approx(theirs["BLEU"][1].ci, rel=0.15)
