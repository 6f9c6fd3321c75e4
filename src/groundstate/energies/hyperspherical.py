"""Hyperspherical energy: how close the directions of the neurons of a layer come to one another.

    E_s = mean over pairs of ||u_i - u_j||^-s,  u_i = w_i / ||w_i||      (s = 0: -log of the distance)

Minimum hyperspherical energy (MHE) pushes neurons apart; measured only, it tells how redundant a layer is, on an
absolute scale: for every number of neurons and every dimension there is a certified lower bound, and the value of
random directions (`groundstate.norms.sphere.floor`).

In the half-space form a neuron and its opposite count as the same line. In an output layer opposite classes are not
redundant, so there the energy is always that of the full space. Neurons are rows: output channels of convolutions,
those of each group of a grouped convolution apart.

References: W. Liu, R. Lin, Z. Liu, L. Liu, Z. Yu, B. Dai, L. Song, "Learning towards minimum hyperspherical energy"
(2018). Its code has -log r^2 at s = 0, twice the energy here, and adds 1e-4 to squared norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from groundstate.energies.base import Estimate, FunctionEnergy, MatrixEnergy, Traits, is_number, require
from groundstate.energies.capabilities import Ground, Grounded
from groundstate.errors import NonFiniteError, UsageError
from groundstate.jacobian.function import blame, function
from groundstate.norms import sphere


@dataclass(frozen=True, repr=False)
class HypersphericalEnergy(MatrixEnergy, Grounded):
    """Mean repulsion energy of pairs of neurons on the unit sphere (MHE).

    Invariant under positive scaling of single neurons, common rotations of the inputs and the order of the neurons; so
    its gradient is orthogonal to each neuron and goes as 1 / ||w_i||. Neurons that are exactly zero are left out;
    pairs closer than 1e-6 (in half-space also to the opposite) count as that close and repel no longer.

    Attributes:
        s: Exponent, from 0 (the logarithm).
        half_space: Count a neuron's opposite too; at the last linear layer of a network the full space is kept.
        angular: Take angles in place of distances.

    Pitfall: the energy saturates where neurons are fewer than inputs: random directions are nearly orthogonal already.
    `CompressiveHypersphericalEnergy` looks at them through projections.

    >>> HypersphericalEnergy(s=2).value(torch.eye(3))  # distances sqrt(2)
    tensor(0.5000)
    """

    s: float = 1.0
    half_space: bool = False
    angular: bool = False

    name: ClassVar[str] = "mhe"
    aliases: ClassVar[tuple[str, ...]] = ("hyperspherical",)
    view: ClassVar[Any] = "neurons"
    smallest: ClassVar[tuple[int, int]] = (2, 2)
    quick_rows: ClassVar[int | None] = 8192
    traits: ClassVar[Traits] = Traits(
        formula="mean over pairs of ||u_i - u_j||^-s, u the directions of the neurons; s = 0: -log ||u_i - u_j||",
        reference="Liu, Lin, Liu, Liu, Yu, Dai, Song 2018, eqs. (1), (2), (4)",
        cost="3 N^2 d flops for value and gradient of N neurons with d weights, in blocks: memory 2 N d",
        convex=False,
        degree=0.0,
        invariances=("scale",),
    )

    def __post_init__(self) -> None:
        require(is_number(self.s) and self.s >= 0, f"s must be finite and not negative, got {self.s!r}")
        for field in ("half_space", "angular"):
            value = getattr(self, field)
            require(isinstance(value, bool), f"{field} must be True or False, got {value!r}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(s=2.0, half_space=True), cls(s=0.0), cls(angular=True)

    def value(self, w: Tensor) -> Tensor:
        """Returns E of each matrix of neurons in rows, ``(*batch, N, d)`` to ``(*batch,)``; autograd once.

        Zero where fewer than two neurons are not zero.

        Raises:
            UsageError: fewer than 2 neurons or 2 weights each.
            NonFiniteError: NaN or infinite weights.
        """
        return of_live(w, lambda x: (sphere.energy(x, **self._options),))[0]

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = of_live(w.detach(), lambda x: sphere.energy_and_grad(x, **self._options))
        return value, grad

    @property
    def _options(self) -> dict[str, Any]:
        return {"s": self.s, "half_space": self.half_space, "angular": self.angular, "on_zero": "exclude"}

    def at_output(self) -> HypersphericalEnergy:
        return replace(self, half_space=False)

    def ground(self, rows: int, columns: int) -> Ground:
        """Returns the certified floor for ``rows`` neurons of ``columns`` weights, and what random directions have."""
        from groundstate.norms.sphere import floor as floors
        from groundstate.norms.sphere import references

        if min(rows, columns) < 2:
            raise UsageError(f"{rows} neurons of {columns} weights have no hyperspherical energy: 2 x 2 at least")
        floor = floors.floor(rows, columns, self.s, self.half_space, self.angular)
        if self.half_space:
            random = references.random_half_space(rows, columns, self.s, self.angular)
        else:
            random = references.random_mean(columns, self.s, self.angular)
        return Ground(floor.value, random, floor.method)


def of_live(w: Tensor, compute: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Applies ``compute`` to the matrices ``(*batch, N, d)`` with at least two neurons; the results of others are zero.

    Args:
        w: The matrices.
        compute: Maps ``(k, N, d)`` to tensors that begin with k.

    Returns:
        Its results, with ``(*batch,)`` in place of k.
    """
    nonzero = (w != 0).any(-1)
    if w.shape[-2] > 1 and bool(nonzero.all()):
        return compute(w)
    live = nonzero.sum(-1) > 1
    if bool(live.all()):
        return compute(w)
    flat, index = w.flatten(0, -3) if w.ndim > 3 else w.reshape(-1, *w.shape[-2:]), live.flatten().nonzero()[:, 0]
    if not len(index):
        dead = (0 * flat.sum((-2, -1)), 0 * flat)
        return tuple(t.reshape(w.shape[:-2] + t.shape[1:]) for t in dead)
    found = []
    for part in compute(flat[index]):
        full = part.new_zeros(len(flat), *part.shape[1:]).index_copy(0, index, part)
        found.append(full.reshape(w.shape[:-2] + part.shape[1:]))
    return tuple(found)


@dataclass(frozen=True, repr=False)
class FeatureHypersphericalEnergy(FunctionEnergy):
    """Mean repulsion energy of the features of a batch on the unit sphere: how evenly a network spreads its samples.

    The same energy as of neurons, with the output of a layer at each sample as a row.

    Attributes:
        on: The features: ``logits`` (the output), or the name of a layer.
        s, half_space, angular: As of `HypersphericalEnergy`.

    >>> f = torch.nn.Identity()
    >>> FeatureHypersphericalEnergy(s=2).value(f, torch.eye(3), probe=torch.Generator())
    tensor(0.5000)
    """

    on: str = "logits"
    s: float = 2.0
    half_space: bool = False
    angular: bool = False

    name: ClassVar[str] = "feature_mhe"
    least_outputs: ClassVar[int] = 2
    traits: ClassVar[Traits] = Traits(
        formula="mean over pairs of samples of ||u_i - u_j||^-s, u the directions of their features",
        reference="Liu, Lin, Liu, Liu, Yu, Dai, Song 2018, applied to features",
        cost="one forward pass in eval mode and 3 B^2 d flops",
        convex=False,
        degree=0.0,
    )

    def __post_init__(self) -> None:
        HypersphericalEnergy(self.s, self.half_space, self.angular)
        require(isinstance(self.on, str) and self.on != "", f"on must be text, got {self.on!r}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(s=0.0, half_space=True)

    def value(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Tensor:
        """Returns E of the batch, a scalar; zero for fewer than two samples with features that are not zero.

        Raises:
            UsageError: no sample, integer inputs, a single feature.
            NonFiniteError: names the first tensor that is not finite.
        """
        energy = HypersphericalEnergy(self.s, self.half_space, self.angular)
        with function(f, x, y, on=self.on) as (run, points):
            features = run(points)
            if features.shape[1] < 2:
                raise UsageError(f"{self!r} needs two features at least, the output has {features.shape[1]}")
            try:
                return run.settle(energy.value(features))
            except NonFiniteError:
                raise blame(f, x, repr(self)) from None

    def estimate(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Estimate:
        """Measures E on all samples; the mean runs over pairs, so no standard error is given."""
        with torch.no_grad():
            return Estimate(float(self.value(f, x, y, probe=probe)), None, len(x), "all pairs")
