"""Bootstrap intervals, paired differences and their tests, by hand and by simulation."""

import numpy as np
import pytest

from lmcli.analysis.intervals import Statistics, compare, intervals, mcnemar, percentiles, randomization, resampled

MEAN = {"mean": lambda sums: sums[:, 0] / sums[:, 1]}


def statistics(values: np.ndarray) -> Statistics:
    """Of records whose mean is measured, each with a row of its own."""
    return Statistics(np.stack([values, np.ones(len(values))], axis=1), np.arange(len(values)))


def shared(values: np.ndarray) -> Statistics:
    """The same, records that are alike sharing a row."""
    kinds, index = np.unique(values, return_inverse=True)
    return Statistics(np.stack([kinds, np.ones(len(kinds))], axis=1), index)


@pytest.mark.parametrize("counts", [np.ones(50, dtype=int), np.array([3, 300, 97])])
def test_a_resample_has_as_many_records_as_there_are(counts):
    weights = np.concatenate(list(resampled(counts, 230, 1)))
    assert weights.shape == (230, len(counts)) and (weights.sum(1) == counts.sum()).all()
    assert weights.mean(0) == pytest.approx(counts, rel=0.25, abs=0.5)
    assert (np.concatenate(list(resampled(counts, 230, 1))) == weights).all()  # the same in every run
    assert (np.concatenate(list(resampled(counts, 230, 2))) != weights).any()


def test_the_interval_holds_the_truth_19_times_of_20():
    generator, held = np.random.default_rng(0), 0
    for seed in range(300):
        low, high = intervals(statistics(generator.normal(1, 2, 80)), MEAN, 300, seed)["mean"]
        held += low <= 1 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_it_is_as_wide_as_the_standard_error_says_however_rows_are_shared():
    values = (np.random.default_rng(1).random(2000) < 0.3).astype(float)
    error = values.std() / np.sqrt(len(values))
    for made in (statistics(values), shared(values)):
        low, high = intervals(made, MEAN, 1000, 0)["mean"]
        assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08) and low < values.mean() < high


def test_where_there_is_no_interval():
    assert intervals(statistics(np.array([1.0])), MEAN, 100, 0) == {"mean": None}
    assert intervals(statistics(np.array([1.0, 2.0])), MEAN, 0, 0) == {"mean": None}
    assert percentiles(np.array([np.nan, np.nan])) is None
    assert percentiles(np.array([np.nan, 1.0])) == (1, 1)


@pytest.mark.parametrize("first, second, p", [([1, 1, 1, 1, 0], [0, 0, 0, 0, 0], 0.125), ([1, 0], [0, 1], 1.0),
                                              ([1, 1], [1, 1], 1.0), ([1] * 9 + [0], [0] * 9 + [1], 0.021484375)])
def test_mcnemar_by_hand(first, second, p):
    assert mcnemar(np.array(first), np.array(second)) == mcnemar(np.array(second), np.array(first)) == p


def test_mcnemar_of_very_many_records_is_a_number():
    assert 0 < mcnemar(np.ones(1000), np.zeros(1000)) < 1e-300


def test_two_systems_that_are_one_do_not_differ():
    values = np.random.default_rng(2).normal(size=100)
    found = compare(statistics(values), statistics(values), MEAN, {}, 200, 0)["mean"]
    assert (found.difference, found.low, found.high, found.p, found.test) == (0, 0, 0, 1, "randomization")


def test_pairs_are_kept_together():
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 10, 200)  # what records differ by, both systems alike
    found = compare(statistics(hard), statistics(hard + 0.5 + generator.normal(0, 0.5, 200)), MEAN, {}, 500, 0)["mean"]
    assert found.low < found.difference < found.high and found.difference == pytest.approx(0.5, abs=0.1)
    assert found.low > 0.3 and found.p == pytest.approx(1 / 501)


def test_the_randomization_test_is_exact_under_the_null():
    generator, ps = np.random.default_rng(4), []
    for seed in range(300):
        first, second = generator.normal(size=(2, 40))
        ps.append(compare(statistics(first), statistics(second), MEAN, {}, 99, seed)["mean"].p)
    assert np.mean(np.array(ps) <= 0.05) == pytest.approx(0.05, abs=0.03) and np.mean(ps) == pytest.approx(0.5, abs=0.06)


def test_the_randomization_test_by_counting_all_trials():
    # three records, the second system better by 1 in each: of the 8 ways to swap, 2 give a difference of 3
    p = randomization(np.array([[0.0, 1]]), np.array([[1.0, 1]]), np.array([3]), MEAN, 4000, 0)["mean"]
    assert p == pytest.approx(0.25, abs=0.03)


def test_rates_get_mcnemars_test():
    first, second = (np.random.default_rng(5).random((2, 60)) < 0.5).astype(float)
    one = compare(shared(first), shared(second), MEAN, {"mean": 0}, 100, 0)["mean"]
    assert (one.p, one.test) == (mcnemar(first, second), "mcnemar")


def test_other_records_are_no_pairs():
    with pytest.raises(ValueError, match="2 and 3"):
        compare(statistics(np.zeros(2)), statistics(np.zeros(3)), MEAN, {}, 10, 0)
