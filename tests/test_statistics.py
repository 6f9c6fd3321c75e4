"""Statistics over seeds: against scipy on random data, against hand values, and on the degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from groundstate.report import statistics
from groundstate.report.statistics import adjust, holm, paired, sample, verdict, wilcoxon

# both sides compute the same closed forms in float64 from values of order one, in another order of operations
TOLERANCE = 1e-10


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def by_seed(values: np.ndarray) -> dict[int, float]:
    return dict(enumerate(values.tolist()))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_t_interval_equals_scipy(n: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal(n)
    got = sample(x.tolist())
    low, high = stats.t.interval(0.95, n - 1, loc=x.mean(), scale=stats.sem(x))
    assert got.mean == pytest.approx(x.mean(), abs=TOLERANCE)
    assert (got.low, got.high) == pytest.approx((low, high), abs=TOLERANCE)
    assert got.half_width == pytest.approx((high - low) / 2, abs=TOLERANCE)


def test_t_interval_covers_the_mean_as_often_as_it_says(rng: np.random.Generator) -> None:
    found = [sample(row.tolist()) for row in rng.standard_normal((2000, 5))]
    share = np.mean([s.low <= 0 <= s.high for s in found])
    assert abs(share - 0.95) < 0.02  # four standard errors of a share of 0.95 over 2000 trials


@pytest.mark.parametrize("n", [2, 5, 8, 20])
def test_paired_t_equals_scipy(n: int, rng: np.random.Generator) -> None:
    a, b = rng.standard_normal(n), rng.standard_normal(n)
    got = paired(by_seed(a), by_seed(b))
    assert got.p_t == pytest.approx(float(stats.ttest_rel(a, b).pvalue), abs=TOLERANCE)
    assert got.effect == pytest.approx((a - b).mean() / (a - b).std(ddof=1), abs=1e-8)  # differences snapped at 1e-12
    assert got.difference.mean == pytest.approx((a - b).mean(), abs=TOLERANCE)


@pytest.mark.parametrize("n", [3, 5, 9, 12, 13, 30])
def test_wilcoxon_equals_scipy_without_ties(n: int, rng: np.random.Generator) -> None:
    d = rng.standard_normal(n) + 0.4
    assert wilcoxon(d.tolist()) == pytest.approx(float(np.asarray(stats.wilcoxon(d))[1]), abs=TOLERANCE)


@pytest.mark.parametrize("values", [[1, 1, 2, -2, 3], [0, 0, 1, 2, 2, -1], [1] * 7, [0, 1], [2, -2]])
def test_wilcoxon_with_ties_and_zeros_counts_sign_patterns(values: list[float]) -> None:
    from itertools import product

    d = np.array([v for v in values if v != 0], dtype=float)
    ranks = stats.rankdata(np.abs(d))
    center = ranks.sum() / 2
    observed = abs(ranks[d > 0].sum() - center)
    sums = [ranks @ np.array(s) for s in product((0, 1), repeat=len(d))]
    # the distribution of the rank sum is symmetric about its center, so both tails together are this share
    expected = np.mean([abs(s - center) >= observed - 1e-9 for s in sums])
    assert wilcoxon(values) == pytest.approx(expected, abs=TOLERANCE)


def test_five_pairs_cannot_fall_below_a_sixteenth() -> None:
    assert wilcoxon([0.1, 0.2, 0.3, 0.4, 0.5]) == 0.0625


def test_large_tied_samples_raise_no_warning() -> None:
    assert 0 < wilcoxon([1.0, 1.0, -1.0, 2.0] * 5) < 1


def test_holm_by_hand() -> None:
    # ascending 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04, made monotone
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=TOLERANCE)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    got = holm([math.nan, 0.02, 0.03])
    assert math.isnan(got[0])
    assert got[1:] == pytest.approx([0.04, 0.04], abs=TOLERANCE)


def test_holm_lies_between_the_raw_and_bonferroni(rng: np.random.Generator) -> None:
    p = rng.random(12)
    got = np.array(holm(p.tolist()))
    assert (got >= p).all()
    assert (got <= np.minimum(1, 12 * p) + TOLERANCE).all()
    assert (np.diff(got[np.argsort(p)]) >= 0).all()


def test_adjust_leaves_one_comparison_alone(rng: np.random.Generator) -> None:
    one = paired(by_seed(rng.random(5)), by_seed(rng.random(5)))
    assert adjust([one]) == [one]
    two = adjust([one, one])
    assert two[0].p_t_adjusted == min(1.0, 2 * one.p_t)


def test_pairs_are_the_common_seeds_with_finite_values() -> None:
    got = paired({0: 1.0, 1: 2.0, 2: math.nan, 3: 5.0}, {1: 1.0, 2: 0.0, 3: 3.0, 4: 9.0})
    assert got.difference.n == 2
    assert got.difference.mean == 1.5


def test_too_few_values_are_not_a_number() -> None:
    assert math.isnan(sample([]).mean)
    one = sample([0.9, math.nan])
    assert one.n == 1
    assert one.mean == 0.9
    assert all(math.isnan(v) for v in (one.std, one.low, one.high, one.half_width))
    lonely = paired({0: 1.0}, {0: 0.5})
    assert all(math.isnan(v) for v in (lonely.p_t, lonely.p_wilcoxon, lonely.effect))
    assert paired({0: 1.0}, {1: 0.5}).difference.n == 0


@pytest.mark.parametrize("shift", [0.0, 0.01, -0.3])
def test_equal_differences_have_no_test_and_no_warning(shift: float, rng: np.random.Generator) -> None:
    b = rng.random(5)  # (b + shift) - b differs between seeds by rounding alone
    got = paired(by_seed(b + shift), by_seed(b))
    assert got.difference.std == 0
    assert math.isnan(got.p_t)
    assert math.isnan(got.effect)
    assert math.isnan(got.p_wilcoxon) == (shift == 0)
    assert verdict(got) == ("identical" if shift == 0 else "the same difference in every pair")


def test_rounding_hides_neither_ties_nor_zeros() -> None:
    b = {k: v / 360 for k, v in enumerate((340, 345, 350, 351, 352))}
    a = {k: v / 360 for k, v in enumerate((341, 346, 351, 351, 350))}  # differences 1, 1, 1, 0, -2 of 1/360
    assert paired(a, b).p_wilcoxon == wilcoxon([1.0, 1.0, 1.0, 0.0, -2.0])


def test_verdicts() -> None:
    base = dict.fromkeys(range(6), 0.5)
    up = {k: 0.6 + 0.001 * k for k in range(6)}
    assert verdict(paired(up, base)) == "higher"
    assert verdict(paired(base, up)) == "lower"
    assert verdict(paired({k: 0.5 + 0.1 * (-1) ** k for k in range(6)}, base)) == "no clear difference"
    four = {k: up[k] for k in range(statistics.MINIMUM_PAIRS - 1)}
    assert verdict(paired(four, base)) == "no verdict (4 of 5 pairs)"
    corrected = adjust([paired(up, base)] + [paired({0: 1.0, 1: 0.1, 2: 0.7}, base)] * 3)
    assert verdict(corrected[0]) == "higher"
