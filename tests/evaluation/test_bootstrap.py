"""Bootstrap intervals, paired differences and their tests, by hand and by simulation."""

import numpy as np
import pytest

from lmcli.evaluation.bootstrap import (
    Statistics,
    approximate_randomization,
    bootstrap_intervals,
    bootstrap_weights,
    compare,
    figure_table,
    mcnemar,
)
from lmcli.evaluation.intervals import Rate, newcombe_interval
from lmcli.evaluation.sparse_rows import SparseRows

MEAN = {"mean": lambda sums: sums[:, 0] / sums[:, 1]}


def statistics(values: np.ndarray) -> Statistics:
    """The statistics for the mean of these records, a row for each."""
    return Statistics(np.stack([values, np.ones(len(values))], axis=1), np.arange(len(values)))


def shared_rows(values: np.ndarray) -> Statistics:
    """The same statistics; equal records share a row."""
    distinct, index = np.unique(values, return_inverse=True)
    return Statistics(np.stack([distinct, np.ones(len(distinct))], axis=1), index)


@pytest.mark.parametrize("counts", [np.ones(50, dtype=int), np.array([3, 300, 97])])
def test_a_resample_has_as_many_records_as_there_are(counts):
    weights = np.concatenate(list(bootstrap_weights(counts, 230, 1)))
    assert weights.shape == (230, len(counts)) and (weights.sum(1) == counts.sum()).all()
    assert weights.mean(0) == pytest.approx(counts, rel=0.25, abs=0.5)
    assert (
        np.concatenate(list(bootstrap_weights(counts, 230, 1))) == weights
    ).all()  # the same in every run
    assert (np.concatenate(list(bootstrap_weights(counts, 230, 2))) != weights).any()


def test_the_interval_covers_the_true_mean_19_times_in_20():
    generator, covered = np.random.default_rng(0), 0
    for seed in range(300):
        low, high = bootstrap_intervals(statistics(generator.normal(1, 2, 80)), MEAN, 300, seed)[
            "mean"
        ]
        covered += low <= 1 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_the_interval_matches_the_standard_error_with_and_without_shared_rows():
    values = (np.random.default_rng(1).random(2000) < 0.3).astype(float)
    error = values.std() / np.sqrt(len(values))
    for each in (statistics(values), shared_rows(values)):
        low, high = bootstrap_intervals(each, MEAN, 1000, 0)["mean"]
        assert (high - low) / 2 == pytest.approx(
            1.96 * error, rel=0.08
        ) and low < values.mean() < high


def test_no_interval_below_two_records_or_without_resamples():
    assert bootstrap_intervals(statistics(np.array([1.0])), MEAN, 100, 0) == {"mean": None}
    assert bootstrap_intervals(statistics(np.array([1.0, 2.0])), MEAN, 0, 0) == {"mean": None}


@pytest.mark.parametrize(
    "first, second, p",
    [
        ([1, 1, 1, 1, 0], [0, 0, 0, 0, 0], 0.125),
        ([1, 0], [0, 1], 1.0),
        ([1, 1], [1, 1], 1.0),
        ([1] * 9 + [0], [0] * 9 + [1], 0.021484375),
    ],
)
def test_mcnemar_by_hand(first, second, p):
    assert (
        mcnemar(np.array(first), np.array(second))
        == mcnemar(np.array(second), np.array(first))
        == p
    )


def test_mcnemar_of_many_records_does_not_underflow():
    assert 0 < mcnemar(np.ones(1000), np.zeros(1000)) < 1e-300


def test_identical_systems_do_not_differ_and_show_no_spread():
    values = np.random.default_rng(2).normal(size=100)
    comparison = compare(statistics(values), statistics(values), MEAN, {}, 200, 0)["mean"]
    assert (
        comparison.difference,
        comparison.low,
        comparison.high,
        comparison.p,
        comparison.test,
    ) == (0, None, None, 1, "randomization")


def test_records_are_resampled_in_pairs():
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 10, 200)  # records differ much, the systems little
    comparison = compare(
        statistics(hard), statistics(hard + 0.5 + generator.normal(0, 0.5, 200)), MEAN, {}, 500, 0
    )["mean"]
    assert (
        comparison.low < comparison.difference < comparison.high
        and comparison.difference == pytest.approx(0.5, abs=0.1)
    )
    assert comparison.low > 0.3 and comparison.p == pytest.approx(1 / 501)


def test_the_randomization_test_is_exact_under_the_null():
    generator, ps = np.random.default_rng(4), []
    for seed in range(300):
        first, second = generator.normal(size=(2, 40))
        ps.append(compare(statistics(first), statistics(second), MEAN, {}, 99, seed)["mean"].p)
    assert np.mean(np.array(ps) <= 0.05) == pytest.approx(0.05, abs=0.03) and np.mean(
        ps
    ) == pytest.approx(0.5, abs=0.06)


def test_the_randomization_test_against_all_possible_swaps():
    # three records, the second system better by 1 in each: 2 of the 8 ways to swap give 3
    p = approximate_randomization(
        np.array([[0.0, 1]]), np.array([[1.0, 1]]), np.array([3]), figure_table(MEAN), 4000, 0
    )[0]
    assert p == pytest.approx(0.25, abs=0.03)


RATE = {"rate": Rate(lambda sums: sums[:, 0], lambda sums: sums[:, 1])}


def test_rates_get_mcnemars_test_and_newcombes_interval():
    first, second = (np.random.default_rng(5).random((2, 60)) < 0.5).astype(float)
    comparison = compare(shared_rows(first), shared_rows(second), RATE, {"rate": 0}, 100, 0)["rate"]
    assert (comparison.p, comparison.test) == (mcnemar(first, second), "mcnemar")
    counts = [int(((first == a) & (second == b)).sum()) for a in (1, 0) for b in (1, 0)]
    assert (comparison.low, comparison.high) == newcombe_interval(*counts)


def test_equal_rates_without_a_mistake_have_a_width():
    right = np.ones(20)
    each = bootstrap_intervals(shared_rows(right), RATE, 100, 0)["rate"]
    assert each == (pytest.approx(0.838875, abs=1e-5), 1.0)
    comparison = compare(shared_rows(right), shared_rows(right), RATE, {"rate": 0}, 100, 0)["rate"]
    assert (comparison.difference, comparison.p) == (0, 1)
    assert -0.2 < comparison.low == -comparison.high < -0.1


def test_one_record_has_the_interval_of_a_rate_and_no_other():
    assert bootstrap_intervals(shared_rows(np.ones(1)), RATE, 100, 0)["rate"][1] == 1
    assert bootstrap_intervals(shared_rows(np.ones(1)), RATE, 0, 0) == {"rate": None}
    nothing = Statistics(np.zeros((1, 2)), np.zeros(5, dtype=int))
    assert bootstrap_intervals(nothing, RATE, 100, 0) == {"rate": None}


@pytest.mark.parametrize("distinct", [3, 40, 2000])
def test_sparse_rows_compute_as_dense_ones(distinct):
    generator = np.random.default_rng(distinct)
    dense = (generator.random((distinct, 30)) < 0.1).astype(float)
    rows, columns = np.nonzero(dense)
    starts = np.searchsorted(rows, np.arange(distinct + 1))
    sparse = SparseRows(columns, starts, 30)
    weights = generator.integers(0, 5, (4, distinct)).astype(float)
    chosen = generator.integers(distinct, size=20)
    some = np.array([7, 3, 29])
    for result, expected in (
        (sparse.weighted(weights), weights @ dense),
        (
            sparse.take(chosen).weighted(weights[:, :3].repeat(7, 1)[:, :20]),
            weights[:, :3].repeat(7, 1)[:, :20] @ dense[chosen],
        ),
        (sparse.select(some).weighted(weights), weights @ dense[:, some]),
        (np.stack([sparse.column(k) for k in range(30)], 1), dense),
    ):
        np.testing.assert_array_equal(result, expected)
    index = generator.integers(distinct, size=200)
    metrics = {"f": lambda sums: (sums[:, :9] / (1 + sums[:, 9:18])).mean(1)}
    one, other = (
        bootstrap_intervals(Statistics(v, index), metrics, 200, 0) for v in (sparse, dense)
    )
    assert one["f"] == pytest.approx(other["f"])


def test_different_numbers_of_records_cannot_be_paired():
    with pytest.raises(ValueError, match="2 with 3"):
        compare(statistics(np.zeros(2)), statistics(np.zeros(3)), MEAN, {}, 10, 0)
