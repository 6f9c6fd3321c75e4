"""Perturbations that do the most harm inside a ball: projected gradient ascent, and what it says about robustness.

Idea: from a random point of the ball B of radius epsilon around x, repeat::

    delta <- P_B(delta + alpha d),    d = g / ||g||_2 (l2)  or  sign(g) (linf),    g = J(x + delta)^T u

u says what is to grow. ``cross_entropy``: u = q - e_y with q the softmax of the logits without the label's. It is the
gradient of m = log sum_{k != y} exp z_k - z_y; as cross-entropy = log(1 + e^m), both ascend in the same direction, but
the gradient of m does not vanish by rounding where the network is sure. ``logits``: u = f(x + delta) - f(x), ascending
||f(x + delta) - f(x)||^2 / 2. While x + B stays in one linear piece of f and alpha -> infinity, that is the power
method: delta / epsilon -> +-v_1, the top right singular vector of J. So robustness in the small is the spectral norm of
the Jacobian, and the cosine of delta with v_1 shows how far this regime reaches.

Accuracy under this attack is an UPPER bound on robust accuracy: a stronger attack may break more.

Reference: A. Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018); K. Roth, Y. Kilcher,
T. Hofmann, "Adversarial training is a form of data-dependent operator norm regularization" (2020), theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from groundstate.energies.base import is_number, require
from groundstate.errors import NonFiniteError, UsageError
from groundstate.jacobian.function import Function, blame, frozen
from groundstate.scores import checked_labels

Norm = Literal["l2", "linf"]
Objective = Literal["cross_entropy", "logits"]

# A step this many radii long leaves nothing of the old delta in float64; a longer one could only overflow.
_LONGEST_STEP = 1e17


@dataclass(frozen=True)
class ProjectedAscent:
    """Projected gradient ascent in a ball, on all samples of a batch at once.

    Attributes:
        epsilon: Radius of the ball, in the units of x; 0 means no perturbation.
        norm: ``l2``, over all entries of a sample, or ``linf``.
        steps: Gradients per start.
        step_size: alpha; ``None``: 2.5 epsilon / steps, so that every point of the ball can be reached. In l2 that
            falls 2 % (at most 5 %) of the radius short of the worst case of a linear classifier; twice the step, 0.1 %.
        objective: ``cross_entropy`` (the attack) or ``logits`` (the power method; needs no labels).
        restarts: Random starts, of which the best counts.
        bounds: The box (low, high) of valid inputs, e.g. (0, 1) for images. It is enforced after the ball: the result
            lies in both, though in l2 it is not the nearest such point.
        training: Keep the model's own mode, as adversarial training does (batch normalization by the batch), in place
            of eval mode. Buffers and random states are put back either way.

    Raises:
        UsageError: a setting out of its range.
    """

    epsilon: float
    norm: Norm = "l2"
    steps: int = 10
    step_size: float | None = None
    objective: Objective = "cross_entropy"
    restarts: int = 1
    bounds: tuple[float, float] | None = None
    training: bool = False

    def __post_init__(self) -> None:
        require(is_number(self.epsilon) and self.epsilon >= 0, f"epsilon must be finite and >= 0, got {self.epsilon!r}")
        require(self.norm in get_args(Norm), f"norm must be 'l2' or 'linf', got {self.norm!r}")
        for name in ("steps", "restarts"):
            count = getattr(self, name)
            whole = isinstance(count, int) and not isinstance(count, bool)
            require(whole and count >= 1, f"{name} must be an integer of at least 1, got {count!r}")
        require(
            self.step_size is None or (is_number(self.step_size) and self.step_size > 0),
            f"step_size must be finite and > 0, or None for 2.5 epsilon / steps; got {self.step_size!r}",
        )
        require(
            self.objective in get_args(Objective),
            f"objective must be 'cross_entropy' or 'logits', got {self.objective!r}",
        )
        b = self.bounds
        require(
            b is None or (len(b) == 2 and all(map(is_number, b)) and b[0] < b[1]),
            f"bounds must be a finite pair (low, high) with low < high, or None; got {b!r}",
        )

    def perturb(self, f: Callable[[Tensor], Any], x: Tensor, y: Tensor | None, generator: torch.Generator) -> Tensor:
        """Returns the best delta seen, of the shape and dtype of x: add it to x.

        Of all points visited, over all restarts, the last one of the highest objective is kept for each sample; for
        ``cross_entropy`` a misclassified point beats every point that is not. Where the gradient is zero, delta does
        not move. An epsilon below the rounding of x has no effect on f.

        Args:
            f: A module or callable, ``(N, ...)`` to logits ``(N, C)``. Nothing of it changes: modes, buffers, random
                states and the ``.grad`` of parameters stay as they are.
            x: ``(N, ...)``, floating-point, within ``bounds``.
            y: Labels ``(N,)``; may be ``None`` for the objective ``logits``.
            generator: Source of the random starts, on any device. Not the global one: its state is put back.

        Raises:
            UsageError: empty or integer x, x outside of ``bounds``, labels missing or out of range, labels of a network
                with one output, an output that does not depend on x differentiably.
            NonFiniteError: x or an output of f is NaN or infinite.

        Cost: per restart, ``steps`` + 1 forward and ``steps`` backward passes (by the input only).

        The linear map diag(3, 1) stretches the first axis most:

        >>> def f(x):
        ...     return x * torch.tensor([3.0, 1.0])
        >>> attack = ProjectedAscent(0.5, objective="logits", steps=30, step_size=1e6)
        >>> delta = attack.perturb(f, torch.zeros(1, 2).double(), None, torch.Generator().manual_seed(0))
        >>> [round(abs(d), 6) for d in delta[0].tolist()]
        [0.5, 0.0]
        """
        self._check(x)
        if self.epsilon == 0:
            return torch.zeros_like(x)
        with _running(f, self.training) as run:
            return self._ascend(run, _plain(x), y, generator)[0]

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Returns where an ascent starts: a delta uniform in the ball, moved into the box, of the shape of x."""
        self._check(x)
        kind = _at_least_single(x).dtype

        def draw(source: Callable[..., Tensor], *shape: int) -> Tensor:
            return source(*shape, generator=generator, device=generator.device, dtype=kind).to(x.device)

        if self.norm == "linf":
            return self._project(x, (2 * draw(torch.rand, *x.shape) - 1) * self.epsilon)
        unit, _ = _unit(draw(torch.randn, *x.shape))
        radius = draw(torch.rand, len(x)) ** (len(x) / x.numel())
        return self._project(x, unit * self.epsilon * _per_sample(radius, x))

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
            what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise UsageError(
                f"x must be a floating-point tensor (N, ...) with at least one entry, got {what}; for integer inputs "
                "attack the part of the network behind the embedding"
            )
        low, high = (float(b) for b in x.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError("the input x has NaN or infinite entries; remove them")
        if self.bounds is not None:
            least, most = x.new_tensor(self.bounds).tolist()
            if low < least or high > most:
                raise UsageError(f"x must lie within bounds {self.bounds}, got {low:g}..{high:g}: rescale x or bounds")

    def _ascend(self, run: Function, x: Tensor, y: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns the best delta and whether it is misclassified, ``(N,)``; all False without labels."""
        require(y is not None or self.objective == "logits", "the objective 'cross_entropy' needs labels: give y")
        with torch.no_grad():
            origin = _at_least_single(run(x)) if self.objective == "logits" else None
        best, highest = torch.zeros_like(x), None
        fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        finite = torch.ones((), dtype=torch.bool, device=x.device)
        labels = None
        for _ in range(self.restarts):
            delta = self.start(x, generator)
            for step in range(self.steps + 1):
                last = step == self.steps
                point = (x + delta).requires_grad_(not last)
                with torch.set_grad_enabled(not last):
                    logits = run(point)
                z = _at_least_single(logits.detach())
                finite &= z.isfinite().all()
                if y is not None and labels is None:
                    labels = checked_labels(y, *z.shape)
                value, u = _error_logit(z, labels) if origin is None else _unit(z - origin)[::-1]
                wrong = fooled if labels is None else z.argmax(1) != labels
                better = value >= (-math.inf if highest is None else highest)
                if origin is None:
                    better = (wrong & ~fooled) | ((wrong == fooled) & better)
                best = torch.where(_per_sample(better, x), delta, best)
                highest = value if highest is None else torch.where(better, value, highest)
                fooled = torch.where(better, wrong, fooled)
                if not last:
                    delta = self._move(x, delta, _pull_back(logits, point, u))
        if not bool(finite):
            raise blame(run.f, x, "the output at x + delta")
        return best, fooled

    def _move(self, x: Tensor, delta: Tensor, grad: Tensor) -> Tensor:
        alpha = 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size
        grad = _at_least_single(grad)
        direction = _unit(grad)[0] if self.norm == "l2" else grad.sign()
        return self._project(x, _at_least_single(delta) + min(alpha, _LONGEST_STEP * self.epsilon) * direction)

    def _project(self, x: Tensor, delta: Tensor) -> Tensor:
        if self.norm == "l2":
            unit, length = _unit(delta)
            delta = torch.where(_per_sample(length > self.epsilon, x), unit * self.epsilon, delta)
        else:
            delta = delta.clamp(-self.epsilon, self.epsilon)
        delta = delta.to(x.dtype)
        if self.bounds is None:
            return delta
        low, high = x.new_tensor(self.bounds)
        up, down, shrink = high - x, low - x, 1 - torch.finfo(x.dtype).eps
        # x + (high - x) may round to above high: one or two last places less, and the sum itself is in the box
        up = torch.where(x + up > high, up * shrink, up)
        down = torch.where(x + down < low, down * shrink, down)
        return delta.clamp(down, up)


def robust_accuracy(
    f: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    epsilons: Sequence[float],
    generator: torch.Generator,
    *,
    attack: ProjectedAscent | None = None,
    batch: int = 512,
) -> list[float]:
    """Returns the accuracy under attack for each radius: an UPPER bound on robust accuracy.

    A sample that is broken at one radius counts as broken at all larger ones and is not attacked again, so the curve
    never rises. At radius 0 it is the clean accuracy. The model is in eval mode.

    Args:
        f: A module or callable, ``(N, ...)`` to logits ``(N, C)``.
        x: ``(N, ...)``, floating-point.
        y: Labels ``(N,)``.
        epsilons: Radii, in any order.
        generator: Source of the random starts.
        attack: Its settings; the radius in it is replaced. ``None``: the defaults of `ProjectedAscent`.
        batch: Samples per pass.

    Raises:
        UsageError, NonFiniteError: as of `ProjectedAscent.perturb`; also no radius, or an attack in training mode.

    The classifier sign(x) on points at distance 1 and 3 of its boundary:

    >>> f = lambda x: torch.cat([x, -x], 1)
    >>> x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])
    >>> robust_accuracy(f, x, y, [0, 2, 4], torch.Generator().manual_seed(0))
    [1.0, 0.5, 0.0]
    """
    attack = ProjectedAscent(0.0) if attack is None else attack
    require(not attack.training, "robust accuracy is measured in eval mode: give an attack with training=False")
    attacks = _at_radii(attack, epsilons, batch)
    attack._check(x)
    shares: dict[float, float] = {}
    with frozen(f) as run:
        x, y = _plain(x), y.detach()
        with torch.no_grad():
            logits = torch.cat([run(part) for part in x.split(batch)])
        if not bool(logits.isfinite().all()):
            raise blame(run.f, x, "the output")
        left = (logits.argmax(1) == checked_labels(y, *logits.shape)).nonzero()[:, 0]
        for epsilon, attack in sorted(attacks.items()):
            if epsilon > 0 and len(left):
                left = torch.cat(
                    [part[~attack._ascend(run, x[part], y[part], generator)[1]] for part in left.split(batch)]
                )
            shares[epsilon] = len(left) / len(x)
    return [shares[float(epsilon)] for epsilon in epsilons]


def alignment(delta: Tensor, v: Tensor) -> Tensor:
    """Returns |cos| of the angle between delta and v for each sample, ``(N,)`` in float64; 0 where one is zero.

    Args:
        delta: ``(N, ...)``.
        v: As many entries per sample, e.g. top right singular vectors ``(N, d)``; of any length.

    Raises:
        UsageError: no entries, or shapes that do not fit.
        NonFiniteError: an entry is NaN or infinite.

    >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 4.0]]))
    tensor([0.6000], dtype=torch.float64)
    """
    if delta.numel() == 0 or v.ndim == 0 or len(delta) != len(v) or delta.numel() != v.numel():
        raise UsageError(
            f"delta and v must have as many samples and entries, got shapes {tuple(delta.shape)} and {tuple(v.shape)}"
        )
    a, b = (_unit(t.detach().double().reshape(len(t), -1))[0] for t in (delta, v))
    cosine = (a * b).sum(1).abs()
    if not bool(cosine.isfinite().all()):
        raise NonFiniteError("delta or v has NaN or infinite entries: there is no angle")
    return cosine.clamp_max(1)


def alignment_curve(
    f: Callable[[Tensor], Any],
    x: Tensor,
    y: Tensor,
    v: Tensor,
    epsilons: Sequence[float],
    generator: torch.Generator,
    *,
    attack: ProjectedAscent | None = None,
    batch: int = 512,
) -> dict[Objective, list[float]]:
    """Returns the mean `alignment` of the perturbation with v for each radius, for both objectives.

    ``logits`` is the regime of the theorem: near 1 as epsilon -> 0, for enough steps of a large ``step_size``.
    ``cross_entropy`` is what an attack does; its u is q - e_y, not the top left singular vector, so it aligns less.

    Args:
        f: A module or callable, ``(N, ...)`` to logits ``(N, C)``.
        x: ``(N, ...)``, floating-point.
        y: Labels ``(N,)``.
        v: Top right singular vectors of the Jacobian at x, ``(N, d)``.
        epsilons: Radii, all positive, in any order.
        generator: Source of the random starts.
        attack: Its settings; radius and objective in it are replaced. ``None``: the defaults of `ProjectedAscent`.
        batch: Samples per pass; in training mode it also decides the batch statistics.

    Raises:
        UsageError, NonFiniteError: as of `ProjectedAscent.perturb` and `alignment`; also no radius, or radius 0.
    """
    attacks = _at_radii(ProjectedAscent(0.0) if attack is None else attack, epsilons, batch)
    require(min(attacks) > 0, "a perturbation of radius 0 has no direction: give positive epsilons")
    require(len(x) == len(y) == len(v), f"x, y and v must have as many samples, got {len(x)}, {len(y)}, {len(v)}")

    def mean(attack: ProjectedAscent) -> float:
        parts = zip(x.split(batch), y.split(batch), v.split(batch), strict=True)
        return float(torch.cat([alignment(attack.perturb(f, a, b, generator), c) for a, b, c in parts]).mean())

    kinds: tuple[Objective, ...] = ("logits", "cross_entropy")
    return {kind: [mean(replace(attacks[float(e)], objective=kind)) for e in epsilons] for kind in kinds}


@contextmanager
def _running(f: Callable[[Tensor], Any], training: bool) -> Iterator[Function]:
    """`frozen`, which puts modes, buffers and random states back; in the modes that f has now where ``training``."""
    own = [m for m in f.modules() if m.training] if training and isinstance(f, nn.Module) else []
    with frozen(f) as run:
        for m in own:
            m.training = True
            # statistics go into copies, since batch normalization changes them unseen; `frozen` puts the buffers back
            m._buffers.update({name: None if b is None else b.clone() for name, b in m._buffers.items()})
        yield run


def _at_radii(attack: ProjectedAscent, epsilons: Sequence[float], batch: int) -> dict[float, ProjectedAscent]:
    require(len(epsilons) > 0, "epsilons is empty: give at least one radius")
    require(isinstance(batch, int) and batch >= 1, f"batch must be an integer of at least 1, got {batch!r}")
    return {float(epsilon): replace(attack, epsilon=float(epsilon)) for epsilon in epsilons}


def _error_logit(z: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns m = log sum_{k != y} exp z_k - z_y, ``(N,)``, and dm/dz, ``(N, C)``; zero without labels."""
    if labels is None:
        return z.new_zeros(len(z)), torch.zeros_like(z)
    truth = torch.zeros_like(z, dtype=torch.bool).scatter_(1, labels[:, None], True)
    others = z.masked_fill(truth, -math.inf)
    return others.logsumexp(1) - z.gather(1, labels[:, None])[:, 0], others.softmax(1) - truth.to(z.dtype)


def _pull_back(logits: Tensor, point: Tensor, u: Tensor) -> Tensor:
    """Returns J^T u, by the input only."""
    grad = None
    if logits.requires_grad:
        (grad,) = torch.autograd.grad(logits, point, u.to(logits.dtype), allow_unused=True)
    if grad is None:
        raise UsageError(
            "the output of f does not depend on x by differentiable operations: remove no_grad, detach or rounding "
            "from its forward pass"
        )
    return grad


def _unit(v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns v / ||v||_2 and ||v||_2, ``(N,)``, per sample; zero stays zero, and no square over- or underflows."""
    flat = v.reshape(len(v), -1)
    top = flat.abs().amax(1, keepdim=True)
    flat = flat / torch.where(top == 0, 1.0, top)
    length = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return (flat / torch.where(length == 0, 1.0, length)).view(v.shape), (top * length)[:, 0]


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 1))


def _at_least_single(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _plain(x: Tensor) -> Tensor:
    """Returns x without a graph, as a tensor that autograd can use although it may come from inference mode."""
    return x.detach().clone() if x.is_inference() else x.detach()
