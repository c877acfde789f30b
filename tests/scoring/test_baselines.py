"""gzip and the n-gram model beside which a run is shown."""

import gzip
import math
from collections import Counter

import numpy as np
import pytest

from lmcli.scoring.baselines import gzip_bits_per_byte, ngram_logprobs


def direct_logprobs(training, document, vocabulary, start, order):
    """Interpolated Kneser-Ney from its definition (Chen & Goodman 1999), n-gram by n-gram."""
    training = [int(token) for token in training]

    def windows(size):
        return [tuple(training[i : i + size]) for i in range(len(training) - size + 1)]

    tables = {order: Counter(windows(order))}
    for size in range(1, order):  # how many different tokens stand before an n-gram
        tables[size] = Counter(gram[1:] for gram in set(windows(size + 1)))

    def probability(word, history):
        lower = probability(word, history[1:]) if history else 1 / vocabulary
        table = tables[len(history) + 1]
        following = {gram: count for gram, count in table.items() if gram[:-1] == history}
        if not following:
            return lower
        once, twice = (list(table.values()).count(count) for count in (1, 2))
        discount, total = once / (once + 2 * twice), sum(following.values())
        count = table.get((*history, word), 0)
        return max(count - discount, 0) / total + discount * len(following) / total * lower

    tokens = [*start, *map(int, document)]
    histories = [tuple(tokens[max(0, i - order + 1) : i]) for i in range(len(start), len(tokens))]
    everything = sum(probability(word, histories[-1]) for word in range(vocabulary))
    assert everything == pytest.approx(1.0)
    return [math.log(probability(w, h)) for w, h in zip(tokens[len(start) :], histories)]


@pytest.mark.parametrize("start", [(), (5,)])
def test_the_ngram_model_is_that_of_the_textbook(start):
    """The same probabilities also come from nltk's KneserNeyInterpolated (checked by hand)."""
    generator = np.random.default_rng(0)
    training = generator.zipf(1.5, 600) % 30
    documents = [generator.zipf(1.5, 40) % 30, generator.zipf(1.5, 7) % 30, np.array([29, 29])]
    logs = ngram_logprobs(training, documents, 30, start)
    for document, values in zip(documents, logs):
        expected = direct_logprobs(training, document, 30, start, 5)
        assert values == pytest.approx(expected, rel=1e-12)


def test_unseen_tokens_empty_documents_and_short_training():
    (values, nothing) = ngram_logprobs(np.array([1, 2, 3]), [np.array([7, 1]), np.array([])], 50)
    assert np.isfinite(values).all() and (values < 0).all() and not len(nothing)


def test_gzip_is_gzip():
    text = "却说那僧人 to be or not to be\n" * 40
    data = text.encode()
    assert gzip_bits_per_byte([text[:50], text[50:]]) * len(data) / 8 == len(
        gzip.compress(data, 9, mtime=0)
    )
    assert math.isnan(gzip_bits_per_byte([]))
