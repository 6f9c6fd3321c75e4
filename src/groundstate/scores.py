"""Scores of predicted class probabilities: likelihood, calibration, and how well uncertainty tells errors and outliers.

Idea: with p = softmax(logits), confidence c = max_k p_k and N labeled samples::

    nll = -mean log p_y          brier = mean sum_k (p_k - 1[k = y])^2          entropy = -sum_k p_k log p_k
    ece = sum over bins b of |sum_{i in b} (correct_i - c_i)| / N
    auroc = P(score of an outlier > score of an inlier) + P(equal) / 2

All work is done in float64. The bins of the expected calibration error have equal widths and are closed on the left;
the last one is closed on the right too, since a saturated softmax has confidence exactly 1. Ties of scores are
averaged, never broken by the order of the samples. One logit for a sample, as binary networks have, is refused: the
largest of one number would always be right.

Reference: C. Guo, G. Pleiss, Y. Sun, K. Weinberger, "On calibration of modern neural networks" (2017); G. Brier,
"Verification of forecasts expressed in terms of probability" (1950); Y. Geifman, R. El-Yaniv, "Selective
classification for deep neural networks" (2017).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError

_PERCENTS = tuple(i / 100 for i in range(1, 101))
# Rows of probabilities need not sum to 1 more exactly than bfloat16 lets them.
_UNIT_SUM = 1e-2
ONE_LOGIT = "of a binary network with the logit z score torch.cat([0 * z, z], 1), of a probability p [1 - p, p]"


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Returns the mean negative log-likelihood -log p_y, in nats.

    Args:
        logits: ``(N, C)``, finite.
        labels: ``(N,)``, integers in 0..C-1.

    Raises:
        UsageError: no samples, a shape or dtype that does not fit, C < 2, a label out of range.
        NonFiniteError: a logit is NaN or infinite.

    >>> round(negative_log_likelihood(torch.tensor([[0.0, 0.0]]), torch.tensor([1])), 6)
    0.693147
    """
    z = _predictions(logits, True)
    y = checked_labels(labels, *z.shape)
    return float(-z.log_softmax(1).gather(1, y[:, None]).mean())


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Returns the share of samples whose largest logit is that of the label; among equal ones the first counts.

    Args:
        predictions: ``(N, C)``, logits or probabilities.
        labels: ``(N,)``, integers in 0..C-1.

    Errors as of `negative_log_likelihood`.

    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    0.5
    """
    z = _predictions(predictions, True)
    return float((z.argmax(1) == checked_labels(labels, *z.shape)).double().mean())


def expected_calibration_error(predictions: Tensor, labels: Tensor, bins: int = 15, *, logits: bool = True) -> float:
    """Returns the expected calibration error, in [0, 1]: |accuracy - mean confidence| per bin, weighted by its share.

    Bin b holds the confidences in [b / bins, (b + 1) / bins), the last one also confidence 1; empty bins add nothing.
    The estimate is biased upward for few samples per bin.

    Args:
        predictions: ``(N, C)``: logits, or probabilities where ``logits`` is False.
        labels: ``(N,)``, integers in 0..C-1.
        bins: How many, at least 1.
        logits: Whether ``predictions`` are logits.

    Raises:
        UsageError: as of `negative_log_likelihood`; rows that are no probabilities; bins < 1.
        NonFiniteError: a prediction is NaN or infinite.

    Two samples of confidence 0.8, one of them right:

    >>> p = torch.tensor([[0.8, 0.2], [0.8, 0.2]], dtype=torch.float64)
    >>> round(expected_calibration_error(p, torch.tensor([0, 1]), logits=False), 12)
    0.3
    """
    z = _predictions(predictions, logits)
    y = checked_labels(labels, *z.shape)
    confidence = (z.softmax(1) if logits else z).amax(1)
    return _calibration_error(confidence, z.argmax(1) == y, bins)


def brier(predictions: Tensor, labels: Tensor, *, logits: bool = True) -> float:
    """Returns the Brier score mean sum_k (p_k - 1[k = y])^2, in [0, 2]; for two classes twice the binary score.

    Arguments and errors as of `expected_calibration_error`.

    >>> brier(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    0.5
    """
    z = _predictions(predictions, logits)
    return _brier(z.softmax(1) if logits else z, checked_labels(labels, *z.shape))


def predictive_entropy(predictions: Tensor, *, logits: bool = True) -> Tensor:
    """Returns the entropy -sum_k p_k log p_k of each sample, ``(N,)`` in float64 and nats, in [0, log C].

    Args:
        predictions: ``(N, C)``: logits, or probabilities where ``logits`` is False.
        logits: Whether ``predictions`` are logits.

    Errors as of `expected_calibration_error`.

    >>> predictive_entropy(torch.zeros(1, 4))
    tensor([1.3863], dtype=torch.float64)
    """
    z = _predictions(predictions, logits)
    return torch.special.entr(z.softmax(1) if logits else z).sum(1)


def auroc(scores_in: Tensor, scores_out: Tensor) -> float | None:
    """Returns the area under the ROC curve of "a larger score is out of distribution", ties counting one half.

    Args:
        scores_in: ``(n,)``, e.g. the predictive entropy of known inputs; infinite scores are ranked.
        scores_out: ``(m,)``, the same of outliers.

    Returns:
        A number in [0, 1], or ``None`` where n or m is 0: then it is not defined.

    Raises:
        UsageError: not one-dimensional real tensors.
        NonFiniteError: a score is NaN.

    Cost: one sort of n + m numbers.

    Of four pairs two are ordered, one is tied and one is reversed:

    >>> auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0]))
    0.625
    """
    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        if scores.ndim != 1 or scores.is_complex():
            raise UsageError(f"{name} must be real and of shape (n,), got {scores.dtype} of {tuple(scores.shape)}")
        if bool(scores.isnan().any()):
            raise NonFiniteError(f"{name} holds NaN: scores must be ordered")
    n, m = len(scores_in), len(scores_out)
    if n == 0 or m == 0:
        return None
    _, group, counts = torch.unique(
        torch.cat([scores_in.detach(), scores_out.detach()]), return_inverse=True, return_counts=True
    )
    last = counts.cumsum(0).double()  # ranks from 1; a group of ties shares the mean of its ranks
    ranks = (last - (counts - 1) / 2)[group[n:]]
    return float((ranks.sum() - m * (m + 1) / 2) / (n * m))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns the temperature T > 0 that minimizes the negative log-likelihood of softmax(logits / T).

    The problem is convex in 1 / T; it is solved by Newton steps kept inside a bracket, in float64. Fit T on held-out
    samples, not on those that trained the model. c * logits has the temperature c * T.

    Args:
        logits: ``(N, C)``, finite.
        labels: ``(N,)``, integers in 0..C-1.

    Returns:
        T; or a limit where no positive T is best: ``0.0`` if every sample is right, ``math.inf`` if uniform
        probabilities are better than those of any T. ``1.0`` where logits are constant and T has no effect.

    Errors as of `negative_log_likelihood`.

    Logits (log 9, 0) that are right in three of four cases want p = 3/4, so T = log 9 / log 3:

    >>> round(fit_temperature(torch.tensor([[9.0, 1.0]] * 4, dtype=torch.float64).log(), torch.tensor([0, 0, 0, 1])), 9)
    2.0
    """
    z = _predictions(logits, True)
    return _temperature(z, checked_labels(labels, *z.shape))


def selective_accuracy(
    uncertainty: Tensor, correct: Tensor, fractions: Sequence[float] = _PERCENTS
) -> tuple[Tensor, float]:
    """Returns the accuracy on the most certain fraction of the samples, for each fraction, and the area below it.

    The number of right samples among the k most certain is linear between whole k and inside a group of ties (its
    expectation over orders of the group), so k = fraction * N is never rounded. To count outliers as errors, join them
    to the samples with ``correct`` False.

    Args:
        uncertainty: ``(N,)``, e.g. `predictive_entropy`.
        correct: ``(N,)``, bool.
        fractions: Strictly increasing, in (0, 1]; one to a hundred percent if not given.

    Returns:
        The accuracies, ``(len(fractions),)`` in float64; and the trapezoid area divided by the range of the fractions,
        in [0, 1] (the accuracy itself for a single fraction).

    Raises:
        UsageError: no samples, shapes that do not fit, or fractions that are not as said.
        NonFiniteError: an uncertainty is NaN.

    >>> selective_accuracy(torch.tensor([0.1, 0.9, 0.5, 0.7]), torch.tensor([True, False, True, False]), [0.5, 1.0])
    (tensor([1.0000, 0.5000], dtype=torch.float64), 0.75)
    """
    if uncertainty.ndim != 1 or uncertainty.numel() == 0 or uncertainty.is_complex():
        raise UsageError(f"uncertainty must be real and of shape (N,), N > 0, got {tuple(uncertainty.shape)}")
    if correct.dtype != torch.bool or correct.shape != uncertainty.shape:
        raise UsageError(
            f"correct must be bool and of the shape of uncertainty, {tuple(uncertainty.shape)}; "
            f"got {correct.dtype} of {tuple(correct.shape)}"
        )
    if bool(uncertainty.isnan().any()):
        raise NonFiniteError("uncertainty holds NaN: it must be ordered")
    x = torch.tensor(list(fractions), dtype=torch.float64, device=uncertainty.device)
    if x.numel() == 0 or not bool(((x > 0) & (x <= 1)).all()) or not bool((x.diff() > 0).all()):
        raise UsageError(f"fractions must be strictly increasing in (0, 1], got {list(fractions)}")
    _, group, counts = torch.unique(uncertainty.detach(), return_inverse=True, return_counts=True)
    right = x.new_zeros(len(counts)).index_add_(0, group, correct.double())
    ends, hits = counts.cumsum(0).double(), right.cumsum(0)
    k = x * len(correct)
    at = torch.searchsorted(ends, k).clamp_max(len(counts) - 1)
    curve = (hits[at] - (ends[at] - k) * right[at] / counts[at]) / k
    return curve, float(torch.trapezoid(curve, x) / (x[-1] - x[0]) if len(x) > 1 else curve[0])


def calibration(
    logits: Tensor, labels: Tensor, bins: int = 15, *, temperature: float | None = None
) -> dict[str, float]:
    """Returns every figure of calibration at once: nll, ece, ece_scaled, temperature, brier, accuracy.

    ``ece_scaled`` is the calibration error of softmax(logits / T): what a single number fitted afterward can mend.
    Unless ``temperature`` is given, T is fitted to these very samples, so ``ece_scaled`` is optimistic.

    Args:
        logits: ``(N, C)``, finite.
        labels: ``(N,)``, integers in 0..C-1.
        bins: Of the calibration error, at least 1.
        temperature: T from held-out samples by `fit_temperature`, whose limits 0 and infinity are understood.

    Errors as of `negative_log_likelihood`; UsageError also for bins < 1 and a temperature that is negative or NaN.

    >>> figures = calibration(torch.zeros(2, 2), torch.tensor([0, 1]))
    >>> {name: round(value, 4) for name, value in figures.items()}
    {'nll': 0.6931, 'ece': 0.0, 'ece_scaled': 0.0, 'temperature': 1.0, 'brier': 0.5, 'accuracy': 0.5}
    """
    z = _predictions(logits, True)
    y = checked_labels(labels, *z.shape)
    if temperature is not None and not temperature >= 0:
        raise UsageError(f"temperature must be at least 0, got {temperature!r}: fit it with fit_temperature")
    t = _temperature(z, y) if temperature is None else float(temperature)
    p, correct = z.softmax(1), z.argmax(1) == y
    shifted = z - z.amax(1, keepdim=True)
    scaled = shifted.masked_fill(shifted < 0, -math.inf) if t == 0 else shifted / t
    return {
        "nll": float(-z.log_softmax(1).gather(1, y[:, None]).mean()),
        "ece": _calibration_error(p.amax(1), correct, bins),
        "ece_scaled": _calibration_error(scaled.softmax(1).amax(1), correct, bins),
        "temperature": t,
        "brier": _brier(p, y),
        "accuracy": float(correct.double().mean()),
    }


def checked_labels(labels: Tensor, samples: int, classes: int) -> Tensor:
    """Returns the labels as int64, ``(samples,)``.

    Raises:
        UsageError: not integers, not one for each sample, not in 0..classes-1, or a single class.
    """
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise UsageError(f"labels must be integers, got {labels.dtype}: pass class numbers, e.g. labels.long()")
    if labels.shape != (samples,):
        raise UsageError(
            f"labels must have shape ({samples},), one for each sample, got {tuple(labels.shape)}: flatten a column, "
            "take labels.argmax(1) of one-hot rows"
        )
    if classes == 1:
        raise UsageError(f"a network with one output has no score of each class: {ONE_LOGIT}")
    y = labels.detach().long()
    low, high = (int(b) for b in y.aminmax())
    if low < 0 or high >= classes:
        raise UsageError(
            f"labels must lie in 0..{classes - 1} for {classes} classes, got {low}..{high}: number the classes from 0, "
            "or score a network with an output for each"
        )
    return y


def _predictions(predictions: Tensor, logits: bool) -> Tensor:
    """Returns the predictions in float64, detached, once they are known to be logits or probabilities."""
    name = "logits" if logits else "probabilities"
    if predictions.ndim != 2 or not predictions.is_floating_point():
        raise UsageError(
            f"{name} must be floating-point of shape (N, C), got {predictions.dtype} of {tuple(predictions.shape)}"
        )
    if predictions.numel() == 0:
        raise UsageError(f"{name} of shape {tuple(predictions.shape)} are empty: there is nothing to score")
    if predictions.shape[1] == 1:
        raise UsageError(f"{name} of shape {tuple(predictions.shape)} are no score of each class: {ONE_LOGIT}")
    z = predictions.detach().double()
    if not bool(z.isfinite().all()):
        row = int((~z.isfinite()).any(1).nonzero()[0])
        raise NonFiniteError(f"{name} hold NaN or infinity, first in row {row}")
    if not logits and (bool((z < 0).any()) or bool(((z.sum(1) - 1).abs() > _UNIT_SUM).any())):
        raise UsageError("rows of probabilities must be nonnegative and sum to 1; for logits pass logits=True")
    return z


def _calibration_error(confidence: Tensor, correct: Tensor, bins: int) -> float:
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise UsageError(f"bins must be an integer of at least 1, got {bins!r}")
    inner = torch.arange(1, bins, dtype=torch.float64, device=confidence.device) / bins
    gap = confidence.new_zeros(bins).index_add_(
        0, torch.bucketize(confidence, inner, right=True), correct.double() - confidence
    )
    return float(gap.abs().sum() / len(confidence))


def _brier(p: Tensor, y: Tensor) -> float:
    target = torch.zeros_like(p).scatter_(1, y[:, None], 1.0)
    return float((p - target).square().sum(1).mean())


def _temperature(z: Tensor, y: Tensor) -> float:
    """Finds the root of d nll / d beta, beta = scale / T, which increases with beta."""
    size = float(z.abs().amax())
    if size == 0:
        return 1.0
    a = z / size
    a = a - a.amax(1, keepdim=True)
    spread = float(a.abs().amax())
    if spread == 0:
        return 1.0
    a = a / spread
    right = a.gather(1, y[:, None])[:, 0]
    if bool((right == 0).all()):
        return 0.0
    if float((a.mean(1) - right).mean()) >= 0:
        return math.inf
    low, high, beta = 0.0, math.inf, 1.0
    for _ in range(300):
        p = (beta * a).softmax(1)
        mean = (p * a).sum(1)
        slope = float((mean - right).mean())
        curvature = float((p * (a - mean[:, None]).square()).sum(1).mean())
        low, high = (beta, high) if slope < 0 else (low, beta)
        following = beta - slope / curvature if curvature > 0 else math.nan
        if not low < following < high:
            following = 2 * beta if high == math.inf else (low + high) / 2
        if abs(following - beta) <= 1e-13 * beta:
            break
        beta = following
    return spread / beta * size
