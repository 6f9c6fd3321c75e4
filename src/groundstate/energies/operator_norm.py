"""The data-dependent operator norm (D-SNR): how far a perturbation of each sample can move the output.

    E = mean_x ||J(x)||_{p->q}^2,    ||J||_{p->q} = max over ||v||_p <= 1 of ||J v||_q = max of u^T J v, ||u||_q* <= 1

``squared=False``: without the square. No hidden 1/2: the paper's (lambda / 2) (u^T J v)^2 has the strength lambda / 2.
Instead of an exact spectrum, which needs as many passes as there are outputs, a few iterations of the power method find
v without a graph, from a random u; then v is kept and ||J v||_q is differentiated. At the maximizer that is the
gradient of the norm (envelope theorem), before it that of a lower bound.

With epsilon > 0 the perturbation has a length, and J v is the difference (f(x + epsilon v) - f(x)) / epsilon: the loss
that the paper trains with. Its power iterations follow the gradient at x + epsilon v, that is, they are projected
gradient ascent with an infinite step on ||f(x + epsilon v) - f(x)||_q in the l_p ball; for epsilon -> 0 they become the
power method. So adversarial training on the logits and D-SNR are one method.

Reference: K. Roth, Y. Kilcher, T. Hofmann, "Adversarial training is a form of data-dependent operator norm
regularization" (2020), eqs. (8), (9) and theorem 1.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from groundstate.energies.base import Estimate, Traits, is_number, is_whole, require
from groundstate.energies.jacobian import MAX_OUTPUTS, spectra
from groundstate.energies.sample_mean import SampleMean
from groundstate.errors import NonFiniteError, UsageError
from groundstate.jacobian import exact, probes
from groundstate.jacobian.chain import output_and_slopes
from groundstate.jacobian.function import Function, blame, function
from groundstate.jacobian.plan import Plan, plan_for
from groundstate.norms.operator_norm import conjugate, dual_vector, lp_norm, operator_norm
from groundstate.norms.spectral import working_dtype

MEASURED_ITERATIONS = 20
_CONVERGED = 150  # iterations; before, the gradient with v held fixed is not the slope of the value
MEASURED_STARTS = 8
_PART, _ENTRIES = 512, 2**25  # samples measured at once, and entries of their Jacobians


@dataclass(frozen=True, repr=False)
class DataDependentOperatorNorm(SampleMean):
    """Mean over samples of the squared (p, q) operator norm of the Jacobian: the worst small perturbation.

    In training a lower bound of the norm for each sample, by power iterations. Measured on all samples by `estimate`,
    exactly where there is a closed form.

    Attributes:
        p: Norm of the perturbations: a number from 1, or ``"inf"`` (kept as this text, so that ``repr`` parses back).
        q: Norm of the changes of the output, likewise.
        iterations: Power iterations, each one J v and one J^T u; 0 takes v from J^T u of a random u. On a trained
            784-128-128-10 the norm for (2, 2) was 25, 9, 5, 3, 1 % too low after 0, 1, 2, 3, 5 of them.
        epsilon: Length of the perturbation in units of the input; 0 is the Jacobian itself. Lengths of about 1 (images
            in [0, 1], p = 2) are those of adversarial attacks.
        squared: Whether the norm is squared, per sample.
        on, wrt, samples: See `SampleMean`.

    Cost of a training step on 784-128-128-10 at batch 128, in plain steps: 2.8 (2.3 with 1 iteration); with epsilon > 0
    3.4 (2.6 and 3.0 with 1 and 2); with all samples 6; 4.3 where the network is no plain chain of layers. On a small
    convolutional network 2.6. For (2, 2) and few outputs `JacobianSpectral` is exact, at 3.5 and 4.

    Pitfalls: for (p, q) other than (2, 2) the power method may stop at a local maximum, however many iterations it
    makes: from one start it stayed 6 % (inf, 1), 10 % (2, inf) or 13 % (1, 2) too low on that network. With epsilon > 0
    and kinks (ReLU) the gradient jumps where a unit flips.

    >>> w = torch.nn.Linear(2, 2, bias=False); _ = w.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> x = torch.ones(1, 2)
    >>> round(DataDependentOperatorNorm(iterations=30).value(w, x, probe=torch.Generator()).item(), 4)
    16.0
    >>> DataDependentOperatorNorm(p="inf", q=1, squared=False).value(w, x, probe=torch.Generator()).item()
    7.0
    """

    p: float | str = 2.0
    q: float | str = 2.0
    iterations: int = 3
    epsilon: float = 0.0
    squared: bool = True

    name: ClassVar[str] = "data_dependent_operator_norm"
    aliases: ClassVar[tuple[str, ...]] = ("d_snr",)
    traits: ClassVar[Traits] = Traits(
        formula="mean_x max over ||v||_p <= 1 of ||J(x) v||_q^2, or of ||(f(x + eps v) - f(x)) / eps||_q^2",
        reference="Roth, Kilcher, Hofmann 2020, eqs. (8), (9)",
        cost="of 32 samples: iterations + 1 products with J and with J^T, then one of them differentiated",
        convex=False,
        degree=2.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("p", "q"):
            object.__setattr__(self, name, _exponent(name, getattr(self, name)))
        require(is_whole(self.iterations, 0), f"iterations must be a whole number from 0, got {self.iterations!r}")
        finite = is_number(self.epsilon) and self.epsilon >= 0
        require(finite, f"epsilon must be finite and not negative, got {self.epsilon!r}")
        require(isinstance(self.squared, bool), f"squared must be True or False, got {self.squared!r}")
        if not self.squared:
            object.__setattr__(self, "traits", replace(type(self).traits, degree=1.0))
        if self.iterations < _CONVERGED:
            object.__setattr__(self, "traits", replace(self.traits, surrogate=True))

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        many = cls(iterations=_CONVERGED)
        other = replace(many, p="inf", q=1.0, squared=False)
        return cls(), many, replace(many, epsilon=0.1), other, replace(many, on="probabilities", samples=None)

    def in_training(self, run: Function, points: Tensor, probe: torch.Generator) -> Tensor:
        norms = self._stretched(run, points, probe, self.iterations, run.grad_wanted)
        return norms.square() if self.squared else norms

    def estimate(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Estimate:
        """Measures every sample: exactly for (2, 2), (1, q) and (p, inf), else the best of 8 starts.

        Exact only for epsilon = 0 and up to 256 outputs (for (2, 2): outputs or inputs). Otherwise the value is a lower
        bound, and ``how`` says so: of the power method, or with epsilon > 0 of projected ascent, which has to be
        restarted for (2, 2) too, as f(x + epsilon v) and f(x - epsilon v) differ. The standard error is of sampling.

        Raises:
            UsageError: as `value`.
            NonFiniteError: names the first tensor that is not finite.
        """
        with function(f, x, y, on=self.on, wrt=self.wrt) as (run, points):
            try:
                norms, how = self._measured(run, points, probe, f)
            except NonFiniteError:
                raise blame(f, x, repr(self)) from None
            values = norms.double().square() if self.squared else norms
            if not bool(values.isfinite().all()):
                raise blame(f, x, repr(self))
        return Estimate.of(values, how)

    def _measured(self, run: Function, points: Tensor, probe: torch.Generator, f: Any) -> tuple[Tensor, str]:
        """Returns the norms of all samples without a graph, ``(B,)``, and how they were found."""
        p, q = float(self.p), float(self.q)
        outputs, inputs = plan_for(run, points).outputs, points[0].numel()
        index = torch.arange(len(points), device=points.device)
        if self.epsilon == 0 and p == q == 2 and min(outputs, inputs) <= MAX_OUTPUTS:
            s, how = spectra(run, points, "auto", f)
            return s[:, 0], how
        if self.epsilon == 0 and outputs <= MAX_OUTPUTS:
            size = max(1, min(_PART, _ENTRIES // (outputs * inputs)))
            jacobians = (exact.by_loop(run.rows(i), points[i], False) for i in index.split(size))
            found = [operator_norm(j, p, q, restarts=MEASURED_STARTS, generator=probe) for j in jacobians]
            bound = f"power method on J, best of {MEASURED_STARTS} starts: a lower bound"
            return torch.cat([norms for norms, *_ in found]), "closed form of J" if found[0][-1] else bound
        iterations = max(MEASURED_ITERATIONS, self.iterations)
        starts = 1 if self.epsilon == 0 and p == q == 2 else MEASURED_STARTS
        norms = [
            torch.stack([self._stretched(run.rows(i), points[i], probe, iterations, False) for _ in range(starts)])
            for i in index.split(_PART)
        ]
        method = f"projected ascent at length {self.epsilon:g}" if self.epsilon > 0 else "power method"
        best = "" if starts == 1 else f", best of {starts} starts"
        return torch.cat(norms, 1).amax(0), f"{method}, {iterations} iterations{best}: a lower bound"

    def _stretched(
        self, run: Function, points: Tensor, probe: torch.Generator, iterations: int, differentiable: bool
    ) -> Tensor:
        """Returns ||J v||_q, or the change of the output per length, for the v found; ``(B,)``, differentiable."""
        p, q = float(self.p), float(self.q)
        plan = plan_for(run, points)
        here = _Linearization(run, points, plan, differentiable)
        u = probes.sphere(len(points), plan.outputs, 1, probe, working_dtype(points.dtype))[:, 0].to(points)
        if self.epsilon > 0:
            v = self._ascend(here, u, probe, iterations)
            moved = here.points + self.epsilon * v.view_as(points)
            with torch.set_grad_enabled(differentiable):
                change = run(moved) - here.out
            _check_step(points, moved, here.out, change, self.epsilon)
            return _inner(change, _direction(change.detach(), conjugate(q))) / self.epsilon
        with torch.no_grad():
            v = _direction(here.transpose(u), p)
            for _ in range(iterations):
                v = _direction(here.transpose(_direction(here.apply(v), conjugate(q))), p)
        return here.stretched(v, q, differentiable)

    @torch.no_grad()
    def _ascend(self, here: _Linearization, u: Tensor, probe: torch.Generator, iterations: int) -> Tensor:
        """Returns v, ``(B, n)``: each iteration goes to where the gradient at x + epsilon v points."""
        p, dual = float(self.p), conjugate(float(self.q))
        w = here.transpose(u)
        flat = _largest(w) == 0
        v = _direction(w, p)
        if bool(flat.any()):  # a sample where f is constant around x may still change at length epsilon
            random = torch.randn(w.shape, generator=probe, dtype=working_dtype(w.dtype)).to(w)
            v = torch.where(flat, _direction(random, p), v)
        # a random sign, not that of J^T u: so f and -f start at the same place
        coin = torch.randint(0, 2, (len(v), 1), generator=probe).to(v) * 2 - 1
        v = v * coin * v.gather(-1, v.abs().argmax(-1, keepdim=True)).sign()
        for _ in range(iterations):
            points = here.points + self.epsilon * v.view_as(here.points)
            there = _Linearization(here.run, points, here.plan, False)
            w = there.transpose(_direction((there.out - here.out).detach(), dual))
            v = torch.where(_largest(w) == 0, v, _direction(w, p))
        return v


class _Linearization:
    """A function at its points with J v and J^T u there.

    Masked products for a chain. Else J^T u is a backward pass, and J v the derivative of J^T u by u, which costs one
    pass (forward mode takes three to seven times as long); forward mode or differences where that does not work.

    Attributes:
        out: The output ``(B, C)``; with the graph to the parameters where that is asked for.
    """

    def __init__(self, run: Function, points: Tensor, plan: Plan, differentiable: bool) -> None:
        self.run, self.plan, self.points = run, plan, points.detach()
        self.chain = None if run.on in ("probabilities", "loss") else plan.chain
        self._linear: tuple[Tensor, Tensor] | None = None
        if self.chain is not None:
            self.out, self._slopes = output_and_slopes(self.chain, self.points, differentiable)
            return
        self._leaf = points.detach().requires_grad_()
        with torch.enable_grad():
            self.out = exact.connected(run(self._leaf))

    def apply(self, v: Tensor) -> Tensor:
        """Returns J v, ``(B, n)`` to ``(B, C)``; differentiable by the parameters for a chain and in forward mode."""
        if self.chain is not None:
            for i, slope in enumerate(self._slopes):
                v = v if slope is None else v * slope
                v = v @ self.chain.linear[i].weight.mT if i < len(self.chain.linear) else v
            return v
        if "J v" not in self.plan.facts:
            self.plan.facts["J v"] = self._way()
        return self._apply(v, str(self.plan.facts["J v"]))

    def transpose(self, u: Tensor, differentiable: bool = False) -> Tensor:
        """Returns J^T u, ``(B, C)`` to ``(B, n)``."""
        if self.chain is not None:
            for i in range(len(self._slopes) - 1, -1, -1):
                slope = self._slopes[i]
                u = u if slope is None else u * slope
                u = u @ self.chain.linear[i - 1].weight if i > 0 else u
            return u
        (g,) = torch.autograd.grad(
            self.out, self._leaf, u, create_graph=differentiable, retain_graph=True, allow_unused=True
        )
        return (torch.zeros_like(self._leaf) if g is None else g).flatten(1)

    def stretched(self, v: Tensor, q: float, differentiable: bool) -> Tensor:
        """Returns ||J v||_q = u^T J v for the best u, ``(B,)``; differentiable by the parameters with u and v kept."""
        kind = "products"
        if differentiable and self.chain is None:
            kind = probes.usable(self.run, self.points, True)
        with torch.set_grad_enabled(differentiable and kind != "vjp"):
            y = self.apply(v) if kind in ("products", "vjp") else self._apply(v, kind)
        u = _direction(y.detach(), conjugate(q))
        return _inner(self.transpose(u, True), v) if kind == "vjp" else _inner(y, u)

    def _apply(self, v: Tensor, way: str) -> Tensor:
        if way == "jvp":
            return exact.jvp(self.run, self.points, v.view_as(self.points))[1]
        if way == "fd":
            size = max(1e-3, float(self.points.square().mean().sqrt())) * v.shape[-1] ** 0.5
            length = lp_norm(v, 2)[:, None].to(v.dtype)
            step = torch.finfo(v.dtype).eps ** 0.5 * size / torch.where(length > 0, length, 1.0)
            return (self.run(self.points + (step * v).view_as(self.points)) - self.out) / step
        if self._linear is None:
            u = torch.zeros_like(self.out).requires_grad_()
            self._linear = u, self.transpose(u, True)
        u, g = self._linear
        return torch.autograd.grad(g, u, v, retain_graph=True)[0]

    def _way(self) -> str:
        """Returns the first way to J v that agrees with J^T u on one sample."""
        index = torch.zeros(1, dtype=torch.long, device=self.points.device)
        one = _Linearization(self.run.rows(index), self.points[index], self.plan, False)
        u = torch.linspace(1.0, 2.0, self.out.shape[1]).to(self.out)[None]
        w = one.transpose(u)
        v = _direction(w, 2)
        expected = float(_inner(v, w))
        if not math.isfinite(expected):
            raise NonFiniteError("the Jacobian has NaN or infinite entries")
        for way in ("double backward", "jvp"):
            try:
                found = float(_inner(one._apply(v, way), u))
            except (RuntimeError, NotImplementedError):
                continue
            if abs(found - expected) <= 1e3 * torch.finfo(v.dtype).eps * expected:
                return way
        return "fd"


def _direction(w: Tensor, p: float) -> Tensor:
    """The `dual_vector` of w; for p = 2 by a quarter of its operations, which here are much of the cost."""
    if p != 2:
        return dual_vector(w, p)
    work = w.to(working_dtype(w.dtype))
    work = work / _largest(work).clamp_min(torch.finfo(work.dtype).tiny)
    # the sum of squares is between 1 and n now, or 0
    return (work / work.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-30)).to(w.dtype)


def _largest(w: Tensor) -> Tensor:
    """The largest magnitude of each row, ``(B, 1)``; NaN where one is NaN."""
    return w.abs().amax(-1, keepdim=True)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of the rows, ``(B,)``."""
    dtype = working_dtype(a.dtype)
    return (a.to(dtype) * b.to(dtype)).sum(-1)


def _check_step(points: Tensor, moved: Tensor, out: Tensor, change: Tensor, epsilon: float) -> None:
    largest, size = float(_largest(change.detach()).max()), float(_largest(out.detach()).max())
    if largest == 0 and bool((moved == points).all()):
        raise UsageError(
            f"epsilon={epsilon:g} is below the rounding of the inputs (up to {float(points.abs().max()):.2g} in "
            f"{points.dtype}): use a larger one, epsilon=0 for the Jacobian, or float64"
        )
    if 0 < largest < 1e3 * torch.finfo(out.dtype).eps * size:
        warnings.warn(
            f"epsilon={epsilon:g} changes the output by {largest:.2g} of {size:.2g}, close to rounding: use a larger "
            "one, epsilon=0 for the Jacobian, or float64",
            stacklevel=5,
        )


def _exponent(name: str, value: object) -> float | str:
    number = math.inf if value == "inf" else value
    valid = isinstance(number, int | float) and not isinstance(number, bool) and number >= 1
    require(valid, f"{name} must be a number from 1 or 'inf', got {value!r}")
    return "inf" if number == math.inf else float(number)  # pyright: ignore[reportArgumentType]
