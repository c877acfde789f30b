"""Batches: a position restores the order, and an epoch reads each token once."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmcli.data import samplers
from lmcli.data.batches import (
    IGNORED,
    Batch,
    ExampleRows,
    MaskedRows,
    PackedRows,
    TokenMasking,
    padded,
    token_mask,
)
from lmcli.data.samplers import WeightedCorpora, permute_index

BOS = 60_000
cases = st.tuples(
    st.integers(1, 200), st.integers(1, 40), st.integers(0, 3), st.sampled_from([None, BOS])
)


def rows_of(case):
    tokens, context, seed, bos = case
    return PackedRows(np.arange(tokens, dtype=np.uint16), context, bos, seed)


@given(cases, st.data())
def test_a_position_determines_the_row(case, data):
    """In any order and from any object, as after a resume."""
    positions = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    expected = rows_of(case).batch(0, 31)
    other = rows_of(case)
    for position in positions:
        assert np.array_equal(other.batch(position, 1)[0], expected[position])
    assert np.array_equal(rows_of(case).batch(7, 5), expected[7:12])


@given(cases)
def test_rows_have_the_shape_and_begin_with_bos(case):
    _, context, _, bos = case
    batch = rows_of(case).batch(3, 4)
    assert batch.shape == (4, context + 1) and batch.dtype == np.int64
    if bos is not None:
        assert (batch[:, 0] == bos).all() and (batch[:, 1:] != bos).all()


@given(cases)
def test_a_row_is_a_contiguous_span_of_the_cyclic_corpus(case):
    tokens, _, _, bos = case
    for row in rows_of(case).batch(0, 5):
        stretch = row if bos is None else row[1:]
        assert (np.diff(stretch) % tokens == 1 % tokens).all()


@given(cases)
def test_an_epoch_predicts_no_token_twice_and_leaves_out_less_than_a_row(case):
    tokens, context, _, _ = case
    rows = rows_of(case)
    predicted = Counter(
        rows.batch(rows.rows_per_epoch, rows.rows_per_epoch)[:, 1:].flatten().tolist()
    )
    if tokens >= context:
        assert max(predicted.values()) == 1 and tokens - len(predicted) < context
    else:
        assert rows.rows_per_epoch == 1


@pytest.mark.parametrize("bos", [None, BOS])
def test_epochs_and_seeds_differ(bos):
    rows = PackedRows(np.arange(1000), 10, bos, seed=1)
    first, second = rows.batch(0, 100), rows.batch(100, 100)
    other = PackedRows(np.arange(1000), 10, bos, seed=2).batch(0, 100)
    for one, two in ((first, second), (first, other)):
        assert not np.array_equal(one, two)
        assert not np.array_equal(
            np.sort(one[:, 1] % 10), np.sort(two[:, 1] % 10)
        )  # other cuts, not only another order


def test_rows_come_in_random_order():
    document_start = PackedRows(np.arange(1000), 10, None, seed=0).batch(0, 100)[:, 0]
    neighbours = sum(
        (later - earlier) % 1000 in (10, 990) for earlier, later in pairwise(document_start)
    )
    assert neighbours < 10  # of 99; two are expected


@pytest.mark.parametrize("count", [1, 2, 3, 5, 63, 64, 65, 1000, 4097])
def test_permute_index_is_a_permutation(count):
    orders = [
        [permute_index(i, count, keys) for i in range(count)]
        for keys in ([1, 2, 3, 4], [4, 3, 2, 1])
    ]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count > 5:
        assert orders[0] != orders[1]


def test_permute_index_looks_random():
    """Neighbors are far apart, and images are spread evenly: as if drawn, within 5 σ."""
    order = np.array([permute_index(i, 10_000, [11, 12, 13, 14]) for i in range(10_000)])
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # two are expected
    table = np.histogram2d(np.arange(10_000), order, bins=10)[0]
    assert table.min() > 50 and table.max() < 150
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_rows_of_a_corpus_too_long_to_shuffle_in_memory(monkeypatch):
    monkeypatch.setattr(samplers, "MAX_SHUFFLED", 10)
    rows = PackedRows(np.arange(1005), 10, None, seed=1)
    first, second = (rows.batch(start, 100)[:, 1:].flatten() for start in (0, 100))
    assert len(set(first.tolist())) == len(set(second.tolist())) == 1000 and not np.array_equal(
        first, second
    )
    other = PackedRows(np.arange(1005), 10, None, seed=1)
    assert np.array_equal(other.batch(150, 3), rows.batch(150, 3))


def test_the_ids_are_not_changed():
    ids = np.arange(50, dtype=np.uint16)
    ids.setflags(write=False)  # as a memory-mapped file
    PackedRows(ids, 8, 0, 0).batch(0, 20)
    assert ids.dtype == np.uint16 and ids.tolist() == list(range(50))


MASKING = TokenMasking(mask=4, vocab_size=300, special=(0, 1, 2, 3, 4), share=0.3)


@given(
    st.lists(st.integers(0, 299), min_size=1, max_size=60).filter(lambda ids: max(ids) > 4),
    st.integers(0, 9),
)
def test_masking_predicts_only_the_original_ids(ids, seed):
    row = np.array(ids)
    read, targets = MASKING.apply(row, np.random.default_rng(seed))
    predicted = targets != IGNORED
    assert (
        predicted.any()
        and (targets[predicted] == row[predicted]).all()
        and (row[predicted] > 4).all()
    )
    assert (read[~predicted] == row[~predicted]).all()


def test_masking_masks_replaces_and_keeps_as_bert_does():
    row = np.full(100_000, 77)
    read, targets = MASKING.apply(row, np.random.default_rng(0))
    predicted = targets != IGNORED
    assert predicted.mean() == pytest.approx(0.3, abs=0.01)
    shares = [(read[predicted] == MASKING.mask).mean(), (read[predicted] == 77).mean()]
    assert shares == pytest.approx([0.8 + 0.1 / 300, 0.1 + 0.1 / 300], abs=0.01)


def test_masked_rows_are_inside_the_template_and_reproducible():
    rows = MaskedRows(np.arange(5, 295, dtype=np.uint16), 12, ([2], [3]), MASKING, seed=1)
    batches = rows.step(7, 60, 24)
    assert [batch.rows for batch in batches] == [2, 2, 1] and all(
        batch.ids.shape[1] == 12 for batch in batches
    )
    assert all((batch.ids[:, 0] == 2).all() and (batch.ids[:, -1] == 3).all() for batch in batches)
    again = rows.step(8, 12, 12)[0]
    assert (again.ids[0] == batches[0].ids[1]).all() and (
        again.targets[0] == batches[0].targets[1]
    ).all()


def test_validation_text_is_masked_the_same_each_time_and_in_order():
    rows = MaskedRows(np.arange(5, 295), 12, ([2], [3]), MASKING, seed=1)
    ids = np.arange(10, 45)  # three rows of ten, and five ids too few for a fourth
    first, second = list(rows.in_order(ids, 24)), list(rows.in_order(ids, 24))
    assert [batch.rows for batch in first] == [2, 1]
    assert all(
        (a.ids == b.ids).all() and (a.targets == b.targets).all() for a, b in zip(first, second)
    )
    whole = np.where(first[0].targets != IGNORED, first[0].targets, first[0].ids)
    assert whole[:, 1:-1].ravel().tolist() == list(range(10, 30))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=200),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 5),
)
def test_an_epoch_has_each_example_once_and_batches_within_the_limits(
    lengths, batch_tokens, most, seed
):
    seen = []
    rows = ExampleRows(
        np.array(lengths),
        lambda chosen: seen.append(chosen) or Batch(chosen[:, None], chosen),
        seed,
    )
    position = 0
    while position < len(lengths):
        step = rows.step(position, batch_tokens, most)
        position += sum(batch.rows for batch in step)
        for batch in step:
            longest = max(lengths[i] for i in batch.ids.ravel())
            assert batch.rows == 1 or longest * batch.rows <= min(batch_tokens, most)
    assert sorted(np.concatenate(seen)) == list(range(len(lengths)))


@pytest.mark.parametrize("seed", range(3))
def test_examples_are_grouped_by_the_length_of_each_side(seed):
    """Less than 6 % of a batch of sentence pairs is padding; sorted by total length 20 % were."""
    generator = np.random.default_rng(seed)
    sources = generator.poisson(14, size=20_000) + 1
    lengths = np.stack([sources, generator.poisson(sources) + 1], axis=1)
    rows = ExampleRows(lengths, lambda chosen: Batch(chosen[:, None], chosen), seed)
    groups, position = [], 0
    while position < len(lengths):
        group = rows.step(position, 4096, 4096)[0].targets
        assert len(group) * lengths[group].max(0).sum() <= 4096
        groups.append(lengths[group])
        position += len(group)
    assert lengths.sum() / sum(len(group) * group.max(0).sum() for group in groups) > 0.94


def test_examples_resume_in_the_middle_of_an_epoch():
    def steps(rows, start, count):
        for _ in range(count):
            batches = rows.step(start, 100, 60)
            start += sum(batch.rows for batch in batches)
            yield [batch.ids.ravel().tolist() for batch in batches]

    def new_rows():
        return ExampleRows(
            np.arange(500) % 37 + 1, lambda chosen: Batch(chosen[:, None], chosen), 3
        )

    whole = list(steps(new_rows(), 0, 200))  # more than one epoch
    done = sum(len(batch) for step in whole[:150] for batch in step)
    assert list(steps(new_rows(), done, 50)) == whole[150:]
    sizes = [len(batch) for step in whole[:100] for batch in step]
    assert sizes != sorted(sizes)  # batches come in a random order


def test_padding_by_hand():
    rows = [np.array([1, 2, 3]), np.array([4])]
    assert padded(rows, 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert token_mask(rows).tolist() == [[True, True, True], [True, False, False]]
    assert token_mask(rows[:1] * 2) is None


@pytest.mark.parametrize("bos", [9, None, 8], ids=["one token", "no bos", "two tokens"])
def test_document_start_separates_the_documents_of_a_row(bos):
    ids = np.array([1, 2, 9, 3, 4, 5, 9, 6, 9, 9])  # 9 is eos
    rows = PackedRows(ids, 8, bos, 0, eos=9)
    (batch,) = rows.step(0, 16, 16)
    for read, document_start in zip(batch.ids.tolist(), batch.document_start.tolist()):
        for i, token in enumerate(read):
            # eos begins the next document if it is bos too, else it ends its own document
            ends = read[: i + 1] if bos == 9 else [0, *read[:i]]
            last = max((j for j, before in enumerate(ends) if before == 9), default=0)
            assert document_start[i] == last, (read, i, token)
    assert PackedRows(ids, 8, bos, 0).step(0, 16, 16)[0].document_start is None


class TestMixture:
    """Rows from several corpora by weight; the ids show which corpus a row is from."""

    corpora = (np.arange(1000), np.arange(1000, 1300), np.arange(2000, 2050))

    def rows(self, weights=(6, 3, 1), seed=0):
        return PackedRows(WeightedCorpora(self.corpora, weights), 10, None, seed)

    def sources(self, rows, start, count):
        return np.digitize(rows.batch(start, count)[:, 0], [1000, 2000])

    @given(weights=st.lists(st.floats(1e-2, 1e2), min_size=3, max_size=3), seed=st.integers(0, 3))
    @settings(max_examples=30)
    @example(weights=[397.0, 0.5, 495.5], seed=0)
    def test_each_corpus_has_its_share_to_within_a_row(self, weights, seed):
        corpus, shares = self.rows(weights, seed).sampler, np.array(weights) / sum(weights)
        for number in (0, corpus.block_size, 3 * corpus.block_size, 10_000_000 * corpus.block_size):
            counts = corpus.counts(number)
            assert sum(counts) == number and (np.abs(counts - number * shares) <= 1).all()

    def test_counts_are_those_of_the_drawn_rows(self):
        rows, drawn = self.rows(), self.sources(self.rows(), 0, 1500)
        for number in (1, 700, 1500):
            assert rows.sampler.counts(number) == np.bincount(drawn[:number], minlength=3).tolist()

    def test_they_are_well_mixed(self):
        """No two runs of 100 rows are alike; each has over 10 rows of a corpus of weight 0.3."""
        drawn = self.sources(self.rows(), 0, 1000).reshape(10, 100)
        assert ((drawn == 1).sum(1) > 10).all() and len(
            {tuple(row) for row in drawn.tolist()}
        ) == 10

    def test_a_number_determines_the_row(self):
        expected = self.rows().batch(0, 2100)
        for start in (2050, 3, 1020):
            assert np.array_equal(self.rows().batch(start, 10), expected[start : start + 10])
        assert not np.array_equal(self.rows(seed=1).batch(0, 100), expected[:100])

    def test_an_epoch_of_each_corpus_reads_every_token_once(self):
        rows, drawn = self.rows(), {}
        for number in range(2000):
            corpus, _ = rows.sampler.locate(number)
            drawn.setdefault(corpus, []).append(rows.batch(number, 1)[0, 1:])
        for corpus, ids in enumerate(self.corpora):
            epoch = np.concatenate(drawn[corpus][: len(ids) // 10])
            assert len(np.unique(epoch)) == len(epoch) == len(ids) and np.isin(epoch, ids).all()

    def test_masked_rows_are_mixed_too(self):
        rows = MaskedRows(
            WeightedCorpora(self.corpora, (1, 1, 2)),
            10,
            ([], []),
            TokenMasking(5000, 5000, (), 0.15),
            0,
        )
        (batch,) = rows.step(0, 10_240, 10_240)
        document_start = np.where(batch.targets != IGNORED, batch.targets, batch.ids)
        counts = np.bincount(
            np.digitize(np.median(document_start, axis=1), [1000, 2000]), minlength=3
        )
        assert rows.rows_per_epoch == 135 and counts.tolist() == [256, 256, 512]

    def test_locations_are_positions_in_the_concatenated_corpora(self):
        rows = self.rows()
        kind, locations = rows.locations(0, 50)
        joined = np.concatenate(self.corpora)
        assert (
            kind == "token"
            and [int(joined[location]) for location in locations]
            == rows.batch(0, 50)[:, 0].tolist()
        )
