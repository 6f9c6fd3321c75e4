"""Energies of convolutions as operators, not as matrices: those of the linear map from image to image.

Idea: a convolution with stride, dilation and groups on a periodic image has many more singular values than its kernel
reshaped to a matrix: those of its symbols, one small matrix per frequency (`groundstate.norms.conv`). An energy of
them is taken per output point, so that it does not depend on the size of the image. In training it is estimated
without bias on a coarse grid of frequencies that is shifted anew at every step; as a measure it is exact.

A linear weight is its own operator: there the energy is the plain one. The geometry is read off the module that owns a
weight by `for_module`, which whoever places an energy on a model calls.

Reference: H. Sedghi, V. Gupta, P. Long, "The singular values of convolutional layers" (2019).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from groundstate.energies.base import MatrixEnergy, Traits, is_whole, require
from groundstate.energies.capabilities import Evolving, OfModule, Spectral
from groundstate.energies.spectral import Nuclear, OperatorNorm
from groundstate.energies.unitarily_invariant import UnitarilyInvariant
from groundstate.errors import UsageError
from groundstate.norms import conv, conv_norm
from groundstate.norms.spectral import tolerance, working_dtype

# Without a given grid: at most this many frequencies per axis, and as many as keep frequencies * channels^3 below a
# bound; one frequency may cost eight times as much, and beyond that is looked at in some steps only. A step then costs
# some percent of a training step, on wide layers too.
_MOST_PER_AXIS = 8
_WORK = 1 << 23
_AT_LEAST = 8 * _WORK


@dataclass(frozen=True)
class Geometry:
    """What makes an operator of a kernel: the shape ``(out, in / groups, *k)`` and the keywords of the convolution."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}

    def kernel(self, w: Tensor) -> Tensor:
        """Returns a weight seen as a matrix in the shape of its kernel; of a transposed one that of its adjoint."""
        if not self.transposed:
            return w.reshape(self.shape)
        inner = self.shape[0] // self.groups
        split = w.reshape(self.groups, -1, inner, *self.shape[2:])
        return split.transpose(1, 2).reshape(self.shape)

    def matrix(self, kernel: Tensor) -> Tensor:
        """The inverse of `kernel`."""
        if not self.transposed:
            return kernel.flatten(1)
        return kernel.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    def points(self, most: int) -> list[int]:
        """Returns the frequencies per axis, ``most`` or one where all have the same singular values."""
        axes = len(self.shape) - 2
        return [1] * axes if self.constant else [most] * axes

    @property
    def constant(self) -> bool:
        """Whether the singular values are the same at all frequencies."""
        return conv.is_constant(self.shape[2:], self.stride, self.dilation)

    def affordable(self) -> tuple[int, float]:
        """Returns the frequencies per axis for one training step, and the share of the steps to look at them."""
        columns = self.shape[1] * len(conv.phases(self.shape[2:], self.stride, self.dilation))
        cost = max(1, self.groups * min(self.shape[0] // self.groups, columns) ** 3)
        per_axis = int((_WORK / cost) ** (1 / (len(self.shape) - 2)) + 1e-9)
        return max(1, min(_MOST_PER_AXIS, per_axis)), min(1.0, _AT_LEAST / cost)


@dataclass(frozen=True, repr=False)
class ConvSpectral(MatrixEnergy, Spectral, OfModule):
    """A function of the singular values of a convolution per output point; of a linear weight the plain one.

    Attributes:
        grid: Frequencies per axis in training; ``None`` chooses them by the number of channels.
        size: Frequencies per axis, points of the output, as a measure.
    """

    grid: int | None = None
    size: int = 32

    def __post_init__(self) -> None:
        require(self.grid is None or is_whole(self.grid, 1), f"grid must be a whole number from 1, got {self.grid!r}")
        require(is_whole(self.size, 1), f"size must be a whole number from 1, got {self.size!r}")

    @abstractmethod
    def plain(self) -> UnitarilyInvariant:
        """Returns the same energy of a matrix."""

    @abstractmethod
    def measured(self, kernel: Tensor, geometry: Geometry, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """Returns value and gradient on the full grid."""

    @abstractmethod
    def remembered(self, kernel: Tensor, geometry: Geometry, probe: torch.Generator) -> dict[str, Tensor]:
        """Returns what is kept of a kernel in training."""

    @abstractmethod
    def trained(
        self, kernel: Tensor, geometry: Geometry, memory: dict[str, Tensor], probe: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Returns value and gradient at one training step."""

    def value(self, w: Tensor) -> Tensor:
        return self.plain().value(w)

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.plain().value_and_grad(w)

    def of_singular_values(self, s: Tensor) -> Tensor:
        return self.plain().of_singular_values(s)

    def for_module(self, module: nn.Module | None, shape: Sequence[int]) -> MatrixEnergy:
        if len(shape) <= 2:
            return self
        axes = len(shape) - 2
        if module is None:
            return AtConvolution(self, Geometry(tuple(shape), (1,) * axes, (1,) * axes))
        if not isinstance(module, nn.modules.conv._ConvNd):
            raise UsageError(
                f"{self!r} cannot read a weight of shape {tuple(shape)} of {type(module).__name__}: its stride, "
                "dilation and groups are not known; leave it out with select='!name'"
            )
        stride, dilation = tuple(map(int, module.stride)), tuple(map(int, module.dilation))
        return AtConvolution(self, Geometry(tuple(shape), stride, dilation, module.groups, module.transposed))


@dataclass(frozen=True, repr=False)
class AtConvolution(MatrixEnergy, Evolving):
    """An energy of operators with the geometry of one convolution: of its weight as a matrix ``(out, in * taps)``."""

    energy: ConvSpectral
    geometry: Geometry

    quick_rows: ClassVar[int | None] = 128

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return ()

    def __repr__(self) -> str:
        return repr(self.energy)

    def value(self, w: Tensor) -> Tensor:
        matrices = w.reshape(-1, *w.shape[-2:])
        values = [_Value.apply(one, self) for one in matrices]
        return torch.stack(values).view(w.shape[:-2])  # pyright: ignore[reportArgumentType]

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.measured(one, True) for one in w.detach().reshape(-1, *w.shape[-2:])]
        return torch.stack([v for v, _ in found]).view(w.shape[:-2]), torch.stack([g for _, g in found]).view(w.shape)

    def measured(self, w: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
        """Returns the value and the gradient (zero if it is not asked for) of one weight."""
        value, grad = self.energy.measured(self.geometry.kernel(w.detach()), self.geometry, with_gradient)
        return value.to(working_dtype(w.dtype)), self.geometry.matrix(grad)

    def remember(self, w: Tensor, probe: torch.Generator) -> dict[str, Tensor]:
        with torch.inference_mode(False):  # steps of training write to it later
            return self.energy.remembered(self.geometry.kernel(w.detach()), self.geometry, probe)

    def step(self, w: Tensor, memory: dict[str, Tensor], probe: torch.Generator) -> tuple[Tensor, Tensor]:
        kernel = self.geometry.kernel(w.detach())
        value, grad = self.energy.trained(kernel, self.geometry, memory, probe)
        return value.to(working_dtype(w.dtype)), self.geometry.matrix(grad)

    def upper_bound(self, w: Tensor) -> float:
        """Returns a certified bound of the operator norm of one weight on periodic images of the measured size."""
        kernel = self.geometry.kernel(w.detach())
        return conv_norm.gram_iteration_bound(kernel, self.energy.size, **self.geometry.options)


class _Value(torch.autograd.Function):
    """The exact value, whose gradient is its closed form."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, energy: AtConvolution) -> Tensor:
        value, grad = energy.measured(w, ctx.needs_input_grad[0])
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = ctx.saved_tensors
        return outputs[0].to(grad.dtype) * grad, None


@dataclass(frozen=True, repr=False)
class ConvNuclear(ConvSpectral):
    """Nuclear norm of a convolution as an operator, per output point; of a linear weight its nuclear norm.

    The reshaped kernel has another nuclear norm: there each tap sees inputs of its own. For kernels of one point, and
    where the stride is the size of the kernel, the two agree.

    Attributes:
        grid: Frequencies per axis in training, shifted at random: value and gradient are unbiased for the mean over all
            frequencies on any grid, and spread less on a finer one. By default, in two dimensions, 8 x 8 up to 50
            channels, 5 x 5 for 64, 2 x 2 for 128, one frequency from 204; for more than 406 it is looked at in a share
            (406 / channels)^3 of the steps only, drawn at random, and counted that much more.
        size: Frequencies per axis, points of the output, as a measure: exact for periodic images of that size.
        smoothing: e, as for `Nuclear`, in the units of the singular values of the operator.

    Pitfalls: measured at 512 channels and size 32 it takes a minute. Float32 singular values below 7e-4 of the largest
    get too small a slope in training.

    >>> model = nn.Conv1d(1, 1, 2, bias=False)
    >>> w = torch.tensor([[1.0, 2.0]])  # at two frequencies: 1 + 2 and 1 - 2
    >>> ConvNuclear(size=2).for_module(model, model.weight.shape).value(w), ConvNuclear().value(w)
    (tensor(2.), tensor(2.2361))
    """

    smoothing: float = 0.0

    name: ClassVar[str] = "conv_nuclear"
    traits: ClassVar[Traits] = Traits(
        formula="mean over frequencies of sum_i sigma_i(S(theta)), S the symbol of the convolution",
        reference="Sedghi, Gupta and Long 2019",
        cost="training: per frequency a complex eigh of the smaller channel side; measuring: size^d / 2 complex SVDs",
        convex=True,
        degree=1.0,
        invariances=("orthogonal", "permutation"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        own = Nuclear(self.smoothing).traits  # refuses a wrong smoothing
        object.__setattr__(self, "traits", replace(type(self).traits, degree=own.degree, smooth=own.smooth))

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(smoothing=0.5)

    def plain(self) -> UnitarilyInvariant:
        return Nuclear(self.smoothing)

    def measured(self, kernel: Tensor, geometry: Geometry, with_gradient: bool) -> tuple[Tensor, Tensor]:
        grid = geometry.points(self.size)
        return conv.mean_of(kernel, self._of(kernel), grid, with_gradient=with_gradient, **geometry.options)

    def remembered(self, kernel: Tensor, geometry: Geometry, probe: torch.Generator) -> dict[str, Tensor]:
        return {}

    def trained(
        self, kernel: Tensor, geometry: Geometry, memory: dict[str, Tensor], probe: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        most, share = geometry.affordable() if self.grid is None else (self.grid, 1.0)
        grid, constant = geometry.points(most), geometry.constant
        drawn = torch.rand(len(grid) + 1, generator=probe, dtype=torch.float64)
        if constant:
            share = 1.0  # without noise of its own: nothing to average
        if float(drawn[-1]) >= share:
            return torch.zeros((), dtype=torch.float64, device=kernel.device), torch.zeros_like(kernel)
        shift = None if constant else drawn[:-1]
        value, grad = conv.mean_of(kernel, self._of(kernel), grid, shift, fast=True, **geometry.options)
        return value / share, grad / share

    def _of(self, kernel: Tensor) -> conv.OfSingularValues:
        plain, tie = self.plain(), tolerance(kernel.flatten(1))
        return lambda s: (plain._value(s), plain._gradient(s, tie))


@dataclass(frozen=True, repr=False)
class ConvOperatorNorm(ConvSpectral):
    """Operator norm of a convolution: the Lipschitz constant of the map from image to image.

    The largest singular value of the reshaped kernel is another number, and no upper bound. In training the largest
    ||S v|| over the frequencies of the grid acts, v by power iteration that goes on from step to step. The measure is
    the exact norm for periodic images; `AtConvolution.upper_bound` certifies one by Gram iteration, and
    `groundstate.norms.conv_norm.gram_iteration_bound` one for every size and zero padding.

    Attributes:
        grid: Frequencies per axis in training; by default 8.
        size: Frequencies per axis, points of the output, as a measure.

    Reference: also B. Delattre, Q. Barthelemy, A. Araujo, A. Allauzen, "Efficient bound of Lipschitz constant for
    convolutional layers by Gram iteration" (2023).

    >>> model = nn.Conv1d(1, 1, 2, bias=False)
    >>> ConvOperatorNorm().for_module(model, model.weight.shape).value(torch.tensor([[1.0, -2.0]]))
    tensor(3.)
    """

    name: ClassVar[str] = "conv_operator_norm"
    traits: ClassVar[Traits] = Traits(
        formula="max over frequencies of sigma_1(S(theta)), S the symbol of the convolution",
        reference="Sedghi, Gupta and Long 2019",
        cost="training: 2 products of S and of S^H with a vector per frequency; measuring: size^d / 2 complex SVDs",
        convex=True,
        degree=1.0,
        invariances=("orthogonal", "permutation"),
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def plain(self) -> UnitarilyInvariant:
        return OperatorNorm()

    def measured(self, kernel: Tensor, geometry: Geometry, with_gradient: bool) -> tuple[Tensor, Tensor]:
        grid = geometry.points(self.size)
        return conv_norm.norm_and_gradient(kernel, grid, with_gradient=with_gradient, **geometry.options)

    def remembered(self, kernel: Tensor, geometry: Geometry, probe: torch.Generator) -> dict[str, Tensor]:
        return {"vectors": self._power(kernel, geometry, None, probe)[2]}

    def trained(
        self, kernel: Tensor, geometry: Geometry, memory: dict[str, Tensor], probe: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        value, grad, vectors = self._power(kernel, geometry, memory["vectors"], probe)
        memory["vectors"].copy_(vectors)
        return value, grad

    def _power(
        self, kernel: Tensor, geometry: Geometry, v: Tensor | None, probe: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        grid = geometry.points(self.grid or _MOST_PER_AXIS)
        return conv_norm.power_step(kernel, v, grid, generator=probe, **geometry.options)
