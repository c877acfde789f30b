"""Standard errors, paired differences and differing lines, by hand and by simulation."""

import math

import numpy as np
import pytest

from lmcli.data.corpus import EncodedDocument
from lmcli.data.documents import Document
from lmcli.evaluation import model_comparison
from lmcli.evaluation.model_comparison import PairedDifference, bits_of_lines, line_ends
from lmcli.scoring.perplexity import Perplexity, ScoredDocument

LN2 = math.log(2)


def document(text: str, ends: list[int], bits: list[float], start: int = 0) -> ScoredDocument:
    """A document whose tokens end at these bytes and cost these bits."""
    size = len(text.encode())
    encoded = EncodedDocument(
        Document("f", start, start + size),
        np.zeros(len(ends), dtype=np.int32),
        size,
        len(text),
        len(text.split()),
        text=text,
        ends=np.array(ends),
    )
    sums = np.array([sum(bits) * LN2, len(ends), size, len(text), len(text.split())])
    return ScoredDocument(encoded, sums, np.array([-b * LN2 for b in bits], dtype=np.float32))


def perplexity(rows: np.ndarray) -> Perplexity:
    result = Perplexity()
    for row in rows:
        result.add(row)
    return result


def test_the_standard_error_of_a_ratio_by_hand():
    # nats 1, 3 over 2, 2 tokens: ratio 1, residuals -1, 1, so √(2 · 2) / 4
    result = perplexity(np.array([[1.0, 2, 2, 2, 1], [3, 2, 2, 2, 1]]))
    assert result.standard_error("bits_per_byte") == pytest.approx(0.5 / LN2)
    assert result.standard_error("perplexity") == pytest.approx(math.e * 0.5)
    assert result.standard_error("word_perplexity") == pytest.approx(math.exp(2) * 1.0)
    assert perplexity(np.array([[1.0, 2, 2, 2, 1]])).standard_error("bits_per_byte") is None
    assert perplexity(np.array([[0.0, 0, 0, 0, 0]] * 2)).standard_error("perplexity") is None


def test_the_standard_error_is_the_spread_over_repeated_samples():
    generator, values, errors = np.random.default_rng(1), [], []
    for _ in range(400):
        size = generator.integers(20, 200, 80)
        nats = size * generator.normal(1.5, 0.3, 80)
        result = perplexity(np.stack([nats, size, size, size, size], axis=1))
        values.append(result.bits_per_byte)
        errors.append(result.standard_error("bits_per_byte"))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def paired(first: np.ndarray, second: np.ndarray, size: np.ndarray) -> PairedDifference:
    result = PairedDifference()
    for a, b, n in zip(first, second, size):
        zeros = (0, n, 0, 0)
        result.add(
            *(
                ScoredDocument(None, np.array([nats, *zeros[:1], n, *zeros[2:]]), np.array([]))
                for nats in (a, b)
            )
        )
    return result


@pytest.mark.parametrize("documents", [30, 300, 9000])
def test_the_interval_matches_that_of_a_paired_difference(documents):
    generator = np.random.default_rng(documents)
    size = generator.integers(20, 200, documents)
    first = size * generator.normal(1.5, 0.3, documents)
    second = first + size * generator.normal(0.02, 0.05, documents)
    result = paired(first, second, size)
    assert result.difference == pytest.approx((second.sum() - first.sum()) / size.sum() / LN2)
    low, high = result.interval()
    assert low < result.difference < high
    residuals = (second - first) / LN2 - result.difference * size
    error = math.sqrt((residuals**2).sum()) / size.sum()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert result.interval() == (low, high)  # the same in every run


def test_one_document_has_no_interval():
    assert paired(np.array([5.0]), np.array([6.0]), np.array([10])).interval() is None


def test_a_token_counts_for_the_line_it_starts_in():
    text = "ab\né\n\nlast"
    assert line_ends(text).tolist() == [3, 6, 7, 12]
    result = bits_of_lines(document(text, [2, 3, 5, 7, 11], [1, 2, 4, 8, math.nan]))
    assert result.tolist() == pytest.approx(
        [3.0, 12.0, 0.0, 0.0]
    )  # the fourth token starts at the end of é's line
    assert bits_of_lines(document("", [], [])).tolist() == [0.0]


def test_the_lines_that_differ_most_are_kept():
    result = PairedDifference(max_lines=2)
    text = "same\nworse\nbetter\n"
    result.add(
        document(text, [5, 11, 18], [5, 5, 9], 100), document(text, [5, 11, 18], [5, 9, 2], 100)
    )
    result.add(document("odd", [3], [1], 200), document("odd", [3], [3], 200))
    lines = result.lines()
    assert [(line.text, line.start, line.first, line.second) for line in lines] == [
        ("better", 111, pytest.approx(9.0), pytest.approx(2.0)),
        ("worse", 105, pytest.approx(5.0), pytest.approx(9.0)),
    ]


def test_more_documents_than_bins_share_bins(monkeypatch):
    monkeypatch.setattr(model_comparison, "DOCUMENT_BINS", 4)
    result = PairedDifference(bins=np.zeros((4, 4)))
    for nats in range(10):
        result.add(
            *(
                ScoredDocument(None, np.array([nats + more, 0, 1, 0, 0], dtype=float), np.array([]))
                for more in (0, 1)
            )
        )
    assert result.documents == 10 and result.bins[:, 1].tolist() == [3, 3, 2, 2]
    assert result.difference == pytest.approx(1 / LN2)
