"""Standard errors, paired differences and the lines that make them, by hand and by simulation."""

import math

import numpy as np
import pytest

from lmcli.analysis import comparison
from lmcli.analysis.comparison import Paired, bits_of_lines, line_ends
from lmcli.inference.perplexity import Measured, Perplexity
from lmcli.text.corpus import EncodedDocument
from lmcli.text.documents import Document

LN2 = math.log(2)


def document(text: str, ends: list[int], bits: list[float], start: int = 0) -> Measured:
    """A document whose tokens end at these bytes and cost these bits."""
    size = len(text.encode())
    made = EncodedDocument(Document("f", start, start + size), np.zeros(len(ends), dtype=np.int32), size, len(text),
                           len(text.split()), text=text, ends=np.array(ends))
    sums = np.array([sum(bits) * LN2, len(ends), size, len(text), len(text.split())])
    return Measured(made, sums, np.array([-b * LN2 for b in bits], dtype=np.float32))


def perplexity(rows: np.ndarray) -> Perplexity:
    found = Perplexity()
    for row in rows:
        found.add(row)
    return found


def test_the_standard_error_of_a_ratio_by_hand():
    # nats 1, 3 over 2, 2 tokens: ratio 1, residuals -1, 1, so √(2 · 2) / 4
    found = perplexity(np.array([[1.0, 2, 2, 2, 1], [3, 2, 2, 2, 1]]))
    assert found.standard_error("bits_per_byte") == pytest.approx(0.5 / LN2)
    assert found.standard_error("perplexity") == pytest.approx(math.e * 0.5)
    assert found.standard_error("word_perplexity") == pytest.approx(math.exp(2) * 1.0)
    assert perplexity(np.array([[1.0, 2, 2, 2, 1]])).standard_error("bits_per_byte") is None
    assert perplexity(np.array([[0.0, 0, 0, 0, 0]] * 2)).standard_error("perplexity") is None


def test_the_standard_error_is_the_spread_over_repeated_samples():
    generator, spread, told = np.random.default_rng(1), [], []
    for _ in range(400):
        size = generator.integers(20, 200, 80)
        nats = size * generator.normal(1.5, 0.3, 80)
        found = perplexity(np.stack([nats, size, size, size, size], axis=1))
        spread.append(found.bits_per_byte)
        told.append(found.standard_error("bits_per_byte"))
    assert np.mean(told) == pytest.approx(np.std(spread), rel=0.1)


def paired(first: np.ndarray, second: np.ndarray, size: np.ndarray) -> Paired:
    found = Paired()
    for a, b, n in zip(first, second, size):
        zeros = (0, n, 0, 0)
        found.add(*(Measured(None, np.array([nats, *zeros[:1], n, *zeros[2:]]), np.array([])) for nats in (a, b)))
    return found


@pytest.mark.parametrize("documents", [30, 300, 9000])
def test_the_interval_is_that_of_a_paired_difference(documents):
    generator = np.random.default_rng(documents)
    size = generator.integers(20, 200, documents)
    first = size * generator.normal(1.5, 0.3, documents)
    second = first + size * generator.normal(0.02, 0.05, documents)
    found = paired(first, second, size)
    assert found.difference == pytest.approx((second.sum() - first.sum()) / size.sum() / LN2)
    low, high = found.interval()
    assert low < found.difference < high
    apart = (second - first) / LN2 - found.difference * size
    error = math.sqrt((apart ** 2).sum()) / size.sum()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found.interval() == (low, high)  # the same in every run


def test_nothing_is_said_of_one_document():
    assert paired(np.array([5.0]), np.array([6.0]), np.array([10])).interval() is None


def test_bits_of_lines_go_to_where_a_token_starts():
    text = "ab\né\n\nlast"
    assert line_ends(text).tolist() == [3, 6, 7, 12]
    found = bits_of_lines(document(text, [2, 3, 5, 7, 11], [1, 2, 4, 8, math.nan]))
    assert found.tolist() == pytest.approx([3.0, 12.0, 0.0, 0.0])  # the fourth token starts at the end of é's line
    assert bits_of_lines(document("", [], [])).tolist() == [0.0]


def test_the_lines_that_differ_most_are_kept():
    found = Paired(most=2)
    text = "same\nworse\nbetter\n"
    found.add(document(text, [5, 11, 18], [5, 5, 9], 100), document(text, [5, 11, 18], [5, 9, 2], 100))
    found.add(document("odd", [3], [1], 200), document("odd", [3], [3], 200))
    lines = found.lines()
    assert [(line.text, line.start, line.first, line.second) for line in lines] == [
        ("better", 111, pytest.approx(9.0), pytest.approx(2.0)), ("worse", 105, pytest.approx(5.0), pytest.approx(9.0))]


def test_documents_beyond_the_bins_share_them(monkeypatch):
    monkeypatch.setattr(comparison, "BINS", 4)
    found = Paired(bins=np.zeros((4, 4)))
    for nats in range(10):
        found.add(*(Measured(None, np.array([nats + more, 0, 1, 0, 0], dtype=float), np.array([])) for more in (0, 1)))
    assert found.documents == 10 and found.bins[:, 1].tolist() == [3, 3, 2, 2]
    assert found.difference == pytest.approx(1 / LN2)
