"""Means, intervals and paired tests over seeds, and what may not be concluded from them.

Runs with the same seed share initial weights and data order, so two energies are compared by the differences
``d_i = a_i - b_i`` of their pairs: the paired t-test asks whether the mean of ``d`` is zero, Wilcoxon's signed-rank
test whether ``d`` is symmetric about zero, Cohen's ``d_z = mean(d) / std(d)`` says how large the effect is against its
own spread, and Holm's step-down method corrects for asking about several energies at once.

References: Wilcoxon 1945; Holm 1979; Cohen 1988, section 2.3.5; Lakens 2013 (``d_z``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
MINIMUM_PAIRS = 5
_EXACT_PAIRS = 12


@dataclass(frozen=True)
class Sample:
    """A mean with its t-interval; fields that the number of values does not support are NaN.

    Attributes:
        n: number of values.
        mean: arithmetic mean (NaN for no value).
        std: standard deviation with ``n - 1`` (NaN for fewer than two values).
        low: lower end of the interval (NaN for fewer than two values).
        high: upper end of the interval.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval: the number behind the plus-minus sign."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Paired:
    """A comparison of two samples paired by seed.

    Attributes:
        difference: the sample of the differences, value minus reference.
        p_t: two-sided p of the paired t-test (NaN where all differences are equal, or for fewer than two pairs).
        p_wilcoxon: two-sided p of the signed-rank test (NaN where all differences are zero, or fewer than two pairs).
        effect: Cohen's ``d_z`` (NaN where the differences do not vary).
        p_t_adjusted: ``p_t`` after Holm's correction over all comparisons of one table.
        p_wilcoxon_adjusted: ``p_wilcoxon`` after Holm's correction.
    """

    difference: Sample
    p_t: float
    p_wilcoxon: float
    effect: float
    p_t_adjusted: float
    p_wilcoxon_adjusted: float


def sample(values: Sequence[float], level: float = LEVEL) -> Sample:
    """Returns mean, standard deviation and the ``level`` t-interval of the finite values.

    >>> s = sample([1.0, 2.0, 3.0])
    >>> s.n, s.mean, s.std, round(s.high - s.mean, 4)  # 4.3027 / sqrt(3)
    (3, 2.0, 1.0, 2.4841)
    >>> sample([0.5])
    Sample(n=1, mean=0.5, std=nan, low=nan, high=nan)
    """
    x = np.asarray([v for v in values if math.isfinite(v)], dtype=float)
    n = len(x)
    if n == 0:
        return Sample(0, math.nan, math.nan, math.nan, math.nan)
    mean = float(x.mean())
    if n == 1:
        return Sample(1, mean, math.nan, math.nan, math.nan)
    std = 0.0 if _constant(x) else float(x.std(ddof=1))
    from scipy.stats import t

    half = float(t.ppf(0.5 + level / 2, n - 1)) * std / math.sqrt(n)
    return Sample(n, mean, std, mean - half, mean + half)


def paired(values: Mapping[int, float], reference: Mapping[int, float], level: float = LEVEL) -> Paired:
    """Compares two samples over the seeds that both have with a finite value.

    Args:
        values: value by seed.
        reference: value of the reference by seed.
        level: level of the interval of the mean difference.

    >>> result = paired({0: 1.0, 1: 2.0, 2: 4.0}, {0: 0.0, 1: 0.0, 2: 1.0, 9: 5.0})
    >>> result.difference.n, result.difference.mean, result.effect
    (3, 2.0, 2.0)
    >>> result.p_wilcoxon  # three positive differences: 2 / 2**3
    0.25
    """
    seeds = sorted(s for s in values.keys() & reference.keys() if math.isfinite(values[s] - reference[s]))
    d = np.asarray([values[s] - reference[s] for s in seeds], dtype=float)
    scale = max((max(abs(values[s]), abs(reference[s])) for s in seeds), default=0.0)
    d = _snap(d, scale)
    difference = sample(d.tolist(), level)
    if len(d) < 2:
        return Paired(difference, math.nan, math.nan, math.nan, math.nan, math.nan)
    if difference.std == 0:
        p_t = effect = math.nan
    else:
        from scipy.stats import t

        effect = difference.mean / difference.std
        p_t = float(2 * t.sf(abs(effect) * math.sqrt(len(d)), len(d) - 1))
    p_w = wilcoxon(d.tolist())
    return Paired(difference, p_t, p_w, effect, p_t, p_w)


def wilcoxon(differences: Sequence[float]) -> float:
    """Returns the two-sided p of Wilcoxon's signed-rank test; zeros are dropped, ties share their mean rank.

    Up to twelve pairs the p is exact also with ties (all sign patterns are enumerated); above that scipy decides.
    With five pairs it cannot be below 2 / 2**5 = 0.0625.

    >>> wilcoxon([1.0, 1.0, 2.0, 3.0, 5.0])
    0.0625
    >>> wilcoxon([0.0, 0.0])
    nan
    """
    d = np.asarray([v for v in differences if v != 0], dtype=float)
    if len(d) == 0 or len(differences) < 2:
        return math.nan
    from scipy import stats

    if len(d) > _EXACT_PAIRS:
        tied = len(np.unique(np.abs(d))) < len(d)
        return float(np.asarray(stats.wilcoxon(d, method="approx" if tied else "auto"))[1])
    ranks = stats.rankdata(np.abs(d))
    signs = np.array(np.meshgrid(*[[0, 1]] * len(d))).reshape(len(d), -1)
    sums = ranks @ signs
    observed = float(ranks[d > 0].sum())
    tail = min(float(np.mean(sums <= observed + 1e-9)), float(np.mean(sums >= observed - 1e-9)))
    return min(1.0, 2 * tail)


def holm(p: Sequence[float]) -> list[float]:
    """Returns Holm's step-down adjusted p values; NaN stays NaN and does not count as a test.

    ``adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))`` over the ``m`` tests in ascending order (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    adjusted = [math.nan] * len(p)
    running = 0.0
    for position, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - position) * p[i]))
        adjusted[i] = running
    return adjusted


def adjust(comparisons: Sequence[Paired]) -> list[Paired]:
    """Returns the comparisons with Holm's correction over all of them (one comparison stays as it is)."""
    from dataclasses import replace

    p_t = holm([c.p_t for c in comparisons])
    p_w = holm([c.p_wilcoxon for c in comparisons])
    return [replace(c, p_t_adjusted=a, p_wilcoxon_adjusted=b) for c, a, b in zip(comparisons, p_t, p_w)]


def verdict(comparison: Paired, alpha: float = 0.05) -> str:
    """Says in words what the adjusted paired t-test allows to say; nothing below five pairs.

    >>> verdict(paired({0: 1.0}, {0: 0.5}))
    'no verdict (1 of 5 pairs)'
    """
    d = comparison.difference
    if d.n < MINIMUM_PAIRS:
        return f"no verdict ({d.n} of {MINIMUM_PAIRS} pairs)"
    if d.std == 0:
        return "identical" if d.mean == 0 else "the same difference in every pair"
    if comparison.p_t_adjusted < alpha:
        return "higher" if d.mean > 0 else "lower"
    return "no clear difference"


def _constant(x: np.ndarray) -> bool:
    return bool(np.ptp(x) <= 1e-12 * np.abs(x).max())


def _snap(d: np.ndarray, scale: float) -> np.ndarray:
    """Rounds differences at 1e-12 of the values they come from, so that rounding errors hide neither ties nor zeros."""
    if len(d) == 0 or scale == 0:
        return d
    return np.round(d, 12 - math.ceil(math.log10(scale)))
