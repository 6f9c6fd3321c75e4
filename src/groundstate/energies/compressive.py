"""Compressive hyperspherical energy: the energy of neurons seen through projections to few dimensions.

In a high dimension random directions are nearly orthogonal and the energy nearly saturated, so its gradient says
little. Projected to k dimensions neurons crowd, and what was small differences counts::

    E(W) = mean over projections P of the hyperspherical energy of the rows of W P^T,   P  k x d

* ``random``: Gaussian projections, drawn anew at every step; cos(P u, P v) has the mean cos(u, v) up to O(1/k) and the
  deviation (1 - cos^2) / sqrt(k). One projection costs less than the full energy where k is well below d.
* ``angle-preserving``: P learned along with the network so that the cosines of the projected neurons stay those of the
  neurons (one gradient step on ||cos(W P^T) - cos(W)||_F for each step of training).
* ``adversarial``: P learned to raise the energy (ten gradient steps for each step of training), W to lower it.
* ``group``: coordinates in groups, each a projection; nothing is drawn or learned.

Reference: R. Lin, W. Liu, Z. Liu, C. Feng, Z. Yu, J. Rehg, L. Xiong, L. Song, "Regularizing neural networks via
minimizing hyperspherical energy" (2020). The learned projections here stay fixed while W moves (their code unrolls one
step of P into the gradient of W, which needs second derivatives of the energy).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from groundstate.energies.base import MatrixEnergy, Traits, is_number, is_whole, recording, refuse_unused, require
from groundstate.energies.capabilities import Evolving
from groundstate.energies.hyperspherical import HypersphericalEnergy

PROJECTIONS = ("random", "angle-preserving", "adversarial", "group")
_ADVERSARIAL_STEPS = 10


@dataclass(frozen=True, repr=False)
class CompressiveHypersphericalEnergy(MatrixEnergy, Evolving):
    """Mean hyperspherical energy of the neurons of a layer under projections to few dimensions (CoMHE).

    In training the projections are drawn anew, or learned, at every step (in inference mode nothing is learned);
    measured as a function of the weights alone they are Gaussian with the fixed key ``seed``. At the last linear layer
    of a network it is the full, unprojected energy of `HypersphericalEnergy`, as is usual. Weights with at most
    ``dimensions`` inputs are not projected.

    Attributes:
        projection: ``random``, ``angle-preserving``, ``adversarial`` or ``group``.
        dimensions: k, of each projection; for ``group`` the size of a group.
        count: Projections in the mean, drawn together (``random``).
        s: Exponent of the energy.
        half_space: Count a neuron's opposite too.
        rate: Learning rate of the learned projections.
        seed: Key of the projections that measuring uses.

    Pitfalls:
        Over Gaussian projections the gradient has a finite variance only for 2 s < k - 3: with s = 2 take 8
        ``dimensions`` at least, or leave layers with few inputs unprojected.
        The adversarial energy has no upper bound: with a large ``rate`` (0.1 in a layer of 16 neurons) its projections
        let neurons coincide, and training breaks down.

    >>> energy = CompressiveHypersphericalEnergy(projection="group", dimensions=2, half_space=False)
    >>> energy.value(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, -1.0]]))  # (1/2 + 1/4) / 2
    tensor(0.3750)
    """

    projection: str = "random"
    dimensions: int = 30
    count: int = 20
    s: float = 2.0
    half_space: bool = True
    rate: float = 0.01
    seed: int = 0

    name: ClassVar[str] = "comhe"
    view: ClassVar[Any] = "neurons"
    smallest: ClassVar[tuple[int, int]] = (2, 2)
    quick_rows: ClassVar[int | None] = 8192
    traits: ClassVar[Traits] = Traits(
        formula="mean over projections P of the hyperspherical energy of the rows of W P^T, P k x d",
        reference="Lin, Liu, Liu, Feng, Yu, Rehg, Xiong, Song 2020",
        cost="per projection 6 N d k + 3 N^2 k flops; adversarial: ten times",
        convex=False,
        degree=0.0,
    )

    def __post_init__(self) -> None:
        known = self.projection in PROJECTIONS
        require(known, f"projection must be one of {', '.join(PROJECTIONS)}, got {self.projection!r}")
        for name, least in (("dimensions", 2), ("count", 1), ("seed", 0)):
            value = getattr(self, name)
            require(is_whole(value, least), f"{name} must be a whole number from {least}, got {value!r}")
        require(is_number(self.rate) and self.rate > 0, f"rate must be finite and positive, got {self.rate!r}")
        if self.projection in ("random", "group"):
            refuse_unused(self, f"projection={self.projection!r}", "rate")
        if self.projection == "group":
            refuse_unused(self, "projection='group'", "count", "seed")
        self._energy()

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        small = cls(dimensions=3, count=4)
        return small, replace(small, projection="angle-preserving"), cls(projection="group", dimensions=2, s=0.0)

    def value(self, w: Tensor) -> Tensor:
        parts = self._projected(w, self._fixed(w))
        return self._energy().value(parts).mean(0)

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self._with(w.detach(), self._fixed(w))

    def at_output(self) -> MatrixEnergy:
        return HypersphericalEnergy(self.s)

    def remember(self, w: Tensor, probe: torch.Generator) -> dict[str, Tensor]:
        if self.projection in ("random", "group") or self._narrow(w):
            return {}
        with torch.inference_mode(False):  # it is to be learned later
            return {"projection": self._drawn(w, 1, probe)[0]}

    def step(self, w: Tensor, memory: dict[str, Tensor], probe: torch.Generator) -> tuple[Tensor, Tensor]:
        if "projection" in memory:
            if not torch.is_inference_mode_enabled():  # that is no step of training
                self._learn(w.detach(), memory["projection"])
            return self._with(w.detach(), memory["projection"][None])
        if self.projection == "group" or self._narrow(w):
            return self.value_and_grad(w)
        return self._with(w.detach(), self._drawn(w, self.count, probe))

    # ------------------------------------------------------------------ projecting

    def _energy(self) -> HypersphericalEnergy:
        return HypersphericalEnergy(self.s, self.half_space)

    def _narrow(self, w: Tensor) -> bool:
        return w.shape[-1] <= self.dimensions

    def _drawn(self, w: Tensor, count: int, probe: torch.Generator) -> Tensor:
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        drawn = torch.randn((count, self.dimensions, w.shape[-1]), generator=probe, dtype=torch.float32)
        return drawn.to(w.device, dtype)  # the same projections for weights of every dtype

    def _fixed(self, w: Tensor) -> Tensor | None:
        """Returns the projections that measuring uses; ``None``: groups of coordinates, or none at all."""
        if self.projection == "group" or self._narrow(w):
            return None
        return self._drawn(w, self.count, torch.Generator().manual_seed(self.seed))

    def _projected(self, w: Tensor, p: Tensor | None) -> Tensor:
        """Returns the projected neurons, ``(projections, *batch, N, k)``."""
        if p is not None:
            return (w.to(p.dtype) @ p.flatten(0, 1).mT).unflatten(-1, p.shape[:2]).movedim(-2, 0)
        if self._narrow(w):
            return w[None]
        whole = w.shape[-1] // self.dimensions * self.dimensions
        return w[..., :whole].unflatten(-1, (-1, self.dimensions)).movedim(-2, 0)

    def _with(self, w: Tensor, p: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = self._projected(w, p)
        values, grads = self._energy().value_and_grad(parts)
        grad = grads.movedim(0, -2).flatten(-2).div_(len(parts))
        if p is not None:
            grad = grad @ p.flatten(0, 1)
        elif not self._narrow(w):
            grad = functional.pad(grad, (0, w.shape[-1] % self.dimensions))
        return values.mean(0), grad.to(w.dtype)

    # ------------------------------------------------------------------ learning a projection

    def _learn(self, w: Tensor, p: Tensor) -> None:
        """Moves the projection by gradient steps: down the distortion of cosines, or up the energy."""
        with recording():
            w = w.to(p.dtype, copy=w.is_inference())
            for _ in range(1 if self.projection == "angle-preserving" else _ADVERSARIAL_STEPS):
                leaf = p.detach().requires_grad_()
                seen = w @ leaf.mT
                if self.projection == "angle-preserving":
                    goal = -torch.linalg.vector_norm(_cosines(seen) - _cosines(w))
                else:
                    goal = HypersphericalEnergy(self.s).value(seen).sum()
                (slope,) = torch.autograd.grad(goal, leaf)
                if bool(slope.isfinite().all()):
                    p.add_(slope, alpha=self.rate)


def _cosines(w: Tensor) -> Tensor:
    u = functional.normalize(w, dim=-1)
    return u @ u.mT
