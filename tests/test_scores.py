"""Scores against hand-made cases, brute force, scikit-learn and scipy."""

from __future__ import annotations

import math
from itertools import permutations, product
from typing import Any

import pytest
import torch
from scipy import optimize
from sklearn import metrics
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.scores import (
    accuracy,
    auroc,
    brier,
    calibration,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    predictive_entropy,
    selective_accuracy,
)

F64 = torch.float64
# both sides are sums of a few hundred float64 numbers of order one, in another order
TOLERANCE = 1e-12


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(n: int = 200, classes: int = 5, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from softmax(logits)."""
    z = scale * torch.randn(n, classes, generator=gen(seed), dtype=F64)
    return z, torch.multinomial(z.softmax(1), 1, generator=gen(seed + 1))[:, 0]


# Likelihood, Brier, entropy


def test_proper_scores_equal_scikit_learn() -> None:
    z, y = sample()
    p = z.softmax(1)
    assert negative_log_likelihood(z, y) == pytest.approx(metrics.log_loss(y, p, labels=range(5)), abs=TOLERANCE)
    assert accuracy(z, y) == metrics.accuracy_score(y, z.argmax(1))
    pair, label = sample(classes=2)
    right = pair.softmax(1)[:, 1]
    assert brier(pair, label) == pytest.approx(2 * metrics.brier_score_loss(label, right), abs=TOLERANCE)
    one_hot = torch.eye(5, dtype=F64)[y]
    assert brier(z, y) == pytest.approx(float((p - one_hot).square().sum() / 200), abs=TOLERANCE)
    assert brier(p, y, logits=False) == pytest.approx(brier(z, y), abs=TOLERANCE)


def test_entropy_of_known_distributions() -> None:
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]], dtype=F64)
    got = predictive_entropy(p, logits=False)
    torch.testing.assert_close(got, math.log(2) * torch.tensor([0, 1, 1.5], dtype=F64), rtol=1e-15, atol=0)
    z = sample()[0]
    torch.testing.assert_close(predictive_entropy(z), torch.distributions.Categorical(logits=z).entropy())
    assert predictive_entropy(torch.tensor([[1e20, -1e20]])).tolist() == [0.0]


def test_the_first_of_equal_logits_counts() -> None:
    assert accuracy(torch.zeros(2, 3), torch.tensor([0, 1])) == 0.5


# Calibration error


def by_hand(p: Tensor, y: Tensor, bins: int) -> float:
    """The definition, bin by bin."""
    confidence, predicted = p.max(1)
    total = 0.0
    for b in range(bins):
        low, high = b / bins, (b + 1) / bins
        inside = [i for i, c in enumerate(confidence.tolist()) if low <= c < high or (c == 1 and b == bins - 1)]
        if inside:
            right = sum(float(predicted[i] == y[i]) for i in inside) / len(inside)
            sure = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / len(p) * abs(right - sure)
    return total


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 1000])
def test_calibration_error_equals_its_definition(bins: int) -> None:
    z, y = sample(seed=3)
    assert expected_calibration_error(z, y, bins) == pytest.approx(by_hand(z.softmax(1), y, bins), abs=TOLERANCE)


def test_confidence_one_is_counted() -> None:
    z = torch.tensor([[1e3, 0.0], [1e3, 0.0]])
    assert z.softmax(1).amax() == 1
    assert expected_calibration_error(z, torch.tensor([1, 1])) == 1.0
    assert expected_calibration_error(z, torch.tensor([0, 1])) == 0.5
    assert expected_calibration_error(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), logits=False) == 1.0


def test_confidence_on_an_edge_belongs_to_the_bin_above() -> None:
    # 0.7 begins the last of ten bins that hold anything: apart from 0.69, whose sign differs
    p = torch.tensor([[0.7, 0.3], [0.69, 0.31]], dtype=F64)
    y = torch.tensor([0, 1])
    assert expected_calibration_error(p, y, 10, logits=False) == pytest.approx((0.3 + 0.69) / 2, abs=TOLERANCE)
    # in one bin they cancel
    assert expected_calibration_error(p, y, 1, logits=False) == pytest.approx((0.69 - 0.3) / 2, abs=TOLERANCE)


def test_a_calibrated_sample_has_little_error() -> None:
    z, y = sample(20000)
    assert expected_calibration_error(z, y) < 0.02  # 15 bins, each off by about sqrt(p q 15 / 20000) / 15
    assert expected_calibration_error(3 * z, y) > 0.1


# Temperature


@pytest.mark.parametrize("scale", [1e-20, 0.3, 1.0, 40.0, 1e20, 1e300])
def test_temperature_minimizes_the_likelihood(scale: float) -> None:
    z, y = sample(seed=5)
    best: Any = optimize.minimize_scalar(
        lambda t: negative_log_likelihood(z / math.exp(t), y), bounds=(-2, 2), method="bounded", options={"xatol": 1e-9}
    )
    # the minimum of a function known to 1e-16 is found to about 1e-8
    assert fit_temperature(scale * z, y) == pytest.approx(scale * math.exp(best.x), rel=1e-6)


def test_temperature_is_a_stationary_point() -> None:
    z, y = sample(seed=6)
    beta = torch.tensor(1 / fit_temperature(z, y), dtype=F64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(beta * z, y)
    assert abs(float(torch.autograd.grad(loss, beta)[0])) < 1e-12  # rounding of a mean of 200 terms of order one


def test_temperature_of_one_doubtful_sample() -> None:
    # all right but one, which is wrong by 1e-6 of the scale: p_wrong = 1/2 + tiny, and T is far below the logits
    z = torch.tensor([[1.0, 0.0]] * 9 + [[0.5, 0.5 + 1e-6]], dtype=F64)
    t = fit_temperature(z, torch.zeros(10).long())
    slope = 9 / (1 + math.exp(1 / t)) - 1e-6 / (1 + math.exp(-1e-6 / t))
    assert slope == pytest.approx(0, abs=1e-14)  # of terms of size 1e-6


def test_limits_of_the_temperature() -> None:
    z = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert fit_temperature(z, torch.tensor([0, 1])) == 0.0
    assert fit_temperature(z, torch.tensor([1, 0])) == math.inf
    assert fit_temperature(torch.full((2, 3), 1e30), torch.tensor([1, 0])) == 1.0
    assert fit_temperature(torch.zeros(2, 2), torch.tensor([0, 0])) == 1.0
    right = calibration(z, torch.tensor([0, 1]))
    assert (right["temperature"], right["ece_scaled"], right["accuracy"]) == (0.0, 0.0, 1.0)
    wrong = calibration(z, torch.tensor([1, 0]))
    assert (wrong["temperature"], wrong["ece_scaled"], wrong["accuracy"]) == (math.inf, 0.5, 0.0)
    tied = calibration(torch.tensor([[1.0, 1.0, 0.0]] * 2), torch.tensor([0, 1]))  # T -> 0 leaves (1/2, 1/2, 0)
    assert (tied["temperature"], tied["ece_scaled"]) == (0.0, 0.0)


def test_calibration_agrees_with_its_parts() -> None:
    z, y = sample(seed=7)
    z = 3 * z
    got = calibration(z.float(), y)
    z = z.float().double()
    assert got == {
        "nll": negative_log_likelihood(z, y),
        "ece": expected_calibration_error(z, y),
        "ece_scaled": pytest.approx(expected_calibration_error(z / got["temperature"], y), abs=TOLERANCE),
        "temperature": fit_temperature(z, y),
        "brier": brier(z, y),
        "accuracy": accuracy(z, y),
    }
    assert got["temperature"] == pytest.approx(3, rel=0.2)
    assert got["ece_scaled"] < got["ece"]
    held_out = calibration(z, y, 10, temperature=2.0)
    assert held_out["temperature"] == 2.0
    assert held_out["ece_scaled"] == pytest.approx(expected_calibration_error(z / 2, y, 10), abs=TOLERANCE)
    assert all(isinstance(value, float) for value in got.values())


# Ranking


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_equals_scikit_learn(levels: int) -> None:
    inside = torch.randint(levels, (150,), generator=gen(1)).double()
    outside = torch.randint(levels, (70,), generator=gen(2)).double() + levels / 5
    expected = metrics.roc_auc_score([0] * 150 + [1] * 70, torch.cat([inside, outside]))
    assert auroc(inside, outside) == pytest.approx(expected, abs=TOLERANCE)
    assert auroc(outside, inside) == pytest.approx(1 - expected, abs=TOLERANCE)


def test_auroc_counts_pairs() -> None:
    a, b = torch.tensor([0.1, 0.4, 0.4, math.inf]), torch.tensor([0.4, 2.0, math.inf, -math.inf])
    pairs = [1.0 if y > x else 0.5 if y == x else 0.0 for x, y in product(a.tolist(), b.tolist())]
    assert auroc(a, b) == pytest.approx(sum(pairs) / 16, abs=TOLERANCE)


def test_auroc_of_extremes() -> None:
    low, high = torch.zeros(3), torch.ones(2)
    assert (auroc(low, high), auroc(high, low), auroc(low, low)) == (1.0, 0.0, 0.5)
    assert auroc(torch.tensor([1]), torch.tensor([2])) == 1.0
    assert auroc(low.bfloat16(), high.bfloat16()) == 1.0
    assert auroc(low[:0], high) is None
    assert auroc(low, high[:0]) is None


def test_selective_accuracy_is_the_mean_over_orders_of_ties() -> None:
    uncertainty = torch.tensor([0.2, 0.7, 0.7, 0.7, 0.1, 0.9])
    correct = torch.tensor([True, False, True, True, False, True])
    expected = torch.zeros(6, dtype=F64)
    orders = list(permutations([1, 2, 3]))
    for order in orders:
        sequence = correct[[4, 0, *order, 5]].double()
        expected += sequence.cumsum(0) / torch.arange(1, 7) / len(orders)
    curve, area = selective_accuracy(uncertainty, correct, [k / 6 for k in range(1, 7)])
    torch.testing.assert_close(curve, expected, rtol=0, atol=TOLERANCE)
    assert area == pytest.approx(float((expected[:-1] + expected[1:]).sum() / 2 / 5), abs=TOLERANCE)


def test_selective_accuracy_between_samples_and_at_the_ends() -> None:
    uncertainty, correct = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([False, True, True])
    curve, area = selective_accuracy(uncertainty, correct, [0.01, 0.5, 5 / 6, 1.0])
    torch.testing.assert_close(curve, torch.tensor([1, 1, 2 / 2.5, 2 / 3], dtype=F64), rtol=0, atol=TOLERANCE)
    assert selective_accuracy(uncertainty, correct, [1.0])[1] == pytest.approx(2 / 3, abs=TOLERANCE)
    assert selective_accuracy(uncertainty, ~correct & correct)[1] == 0.0
    curve, area = selective_accuracy(uncertainty, correct | ~correct)
    assert (len(curve), area) == (100, pytest.approx(1.0, abs=TOLERANCE))


# Types, shapes, misuse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_scored_in_double(dtype: torch.dtype) -> None:
    z, y = sample()
    z = z.to(dtype).requires_grad_()
    assert calibration(z, y.int()) == calibration(z.detach().double(), y)
    p = z.detach().softmax(1)
    assert math.isfinite(brier(p, y, logits=False))  # rows that sum to 1 only in their dtype


def test_one_sample() -> None:
    found = calibration(torch.zeros(1, 2), torch.tensor([0]))
    by_hand = {"nll": math.log(2), "ece": 0.5, "ece_scaled": 0.5, "temperature": 1.0, "brier": 0.5, "accuracy": 1.0}
    assert found == pytest.approx(by_hand, rel=1e-12)  # float64


def test_one_logit_is_refused_and_two_that_equal_it_are_scored_by_its_sign() -> None:
    z, y = torch.tensor([[1.5], [-0.5], [2.0]]), torch.tensor([1, 0, 0])
    for score in (negative_log_likelihood, accuracy, expected_calibration_error, brier, calibration, fit_temperature):
        with pytest.raises(UsageError, match=r"\[0 \* z, z\]"):
            score(z, y)
    with pytest.raises(UsageError, match="no score of each class"):
        predictive_entropy(z)
    two = torch.cat([0 * z, z], 1)
    assert accuracy(two, y) == pytest.approx(2 / 3, rel=1e-12)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z.double()[:, 0], y.double())
    assert negative_log_likelihood(two, y) == pytest.approx(float(expected), rel=1e-12)  # the same sum in float64


@pytest.mark.parametrize("score", [negative_log_likelihood, accuracy, expected_calibration_error, brier, calibration])
def test_bad_predictions_and_labels(score: Any) -> None:
    z, y = torch.zeros(3, 2), torch.zeros(3).long()
    for logits, labels, words in (
        (torch.zeros(0, 2), y[:0], "empty"),
        (torch.zeros(3, 0), y, "empty"),
        (torch.zeros(3), y, "shape"),
        (z.long(), y, "floating-point"),
        (z, y[:2], "one for each sample"),
        (z, y[:, None], "one for each sample"),
        (z, y.float(), "integers"),
        (z, y.bool(), "integers"),
        (z, torch.tensor([0, 1, 2]), r"0\.\.1 for 2 classes"),
        (z, torch.tensor([0, -1, 1]), r"got -1\.\.1"),
    ):
        with pytest.raises(UsageError, match=words):
            score(logits, labels)
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFiniteError, match="first in row 1"):
            score(torch.tensor([[0.0, 0.0], [0.0, value]]), y[:2])


def test_other_misuse() -> None:
    z, y = torch.tensor([[2.0, -1.0]]), torch.tensor([0])
    for bins in (0, 2.5, True):
        with pytest.raises(UsageError, match="bins"):
            expected_calibration_error(z, y, bins)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="nonnegative and sum to 1"):
        brier(z, y, logits=False)
    with pytest.raises(UsageError, match="nonnegative and sum to 1"):
        predictive_entropy(torch.tensor([[0.5, 0.2]]), logits=False)
    for temperature in (-1.0, math.nan):
        with pytest.raises(UsageError, match="temperature"):
            calibration(z, y, temperature=temperature)
    with pytest.raises(NonFiniteError, match="scores_out"):
        auroc(torch.zeros(2), torch.tensor([math.nan]))
    with pytest.raises(UsageError, match="scores_in"):
        auroc(torch.zeros(2, 1), torch.zeros(2))


def test_misuse_of_selective_accuracy() -> None:
    u, correct = torch.zeros(2), torch.ones(2).bool()
    for fractions in ([], [0.0, 1.0], [0.5, 0.5], [1.0, 0.5], [1.5], [math.nan]):
        with pytest.raises(UsageError, match="fractions"):
            selective_accuracy(u, correct, fractions)
    with pytest.raises(UsageError, match="bool"):
        selective_accuracy(u, correct.float())
    with pytest.raises(UsageError, match="shape"):
        selective_accuracy(u, correct[:1])
    with pytest.raises(UsageError, match="N > 0"):
        selective_accuracy(u[:0], correct[:0])
    with pytest.raises(NonFiniteError, match="NaN"):
        selective_accuracy(u * math.nan, correct)
