"""One layer as two: W (m x n) = B A of rank r takes r (m + n) numbers, in the place of m n.

A weight is written as a sum of terms of rank 1, the best first, W = sum_i b_i a_i^T, so that the factors of every rank
are the first terms. For the best approximation of the weight they are b_i = sigma_i^(1/2) u_i and a_i = sigma_i^(1/2)
v_i (Eckart and Young 1936). A convolution ``(out, in, *kernel)`` is cut as ``(out, in * kernel)``: a convolution to r
channels, then a 1x1 one.

Where a rank far below the sides of a large matrix is asked for, the terms come from a randomized SVD, whose error is
measured; where the smallest possible error is cheap, a result more than 1 % above it is thrown away for that of the
full SVD. Where a share of the norm is to be kept, an adaptive SVD finds the rank, up to an eighth of the smaller side,
and its Frobenius error, which is exact, certifies it; else the full one does. A threshold for singular values takes the
full SVD always: the bound of the values not found is a third to a half too large, and comes under a threshold only at
so many columns that little time is saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from groundstate.blocks import as_matrix
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.randomized import adaptive_svd, low_rank_error, randomized_svd, smallest_error
from groundstate.norms.spectral import svd

DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Dense = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

_LARGE, _WELL_BELOW = 1024, 8  # where a randomized SVD, with its checks, is several times as fast as a full one
_CHEAP = 2048  # up to this side the smallest possible error is computed too
_ALLOWED = 1.01
_ADAPTIVE = 512  # from here on an adaptive SVD was 2 to 12 times as fast as a full one; in vain it loses up to 31 %
_BLOCK = 64


class Factorized(nn.Sequential):
    """Two layers in the place of one; their weights are named ``<layer>.0.weight`` and ``<layer>.1.weight``.

    ``weight`` and ``bias`` give the layer they stand for, for code that reads them.
    """

    @property
    def weight(self) -> Tensor:
        """The product of the factors, in the shape of the dense weight."""
        a, b = self.factors
        return (as_matrix(b) @ as_matrix(a)).reshape(b.shape[0], *a.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """The bias of the dense layer."""
        bias = self[1].bias
        return bias if isinstance(bias, Tensor) else None

    @property
    def rank(self) -> int:
        """The number of channels between the two factors."""
        return self.factors[0].shape[0]

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The weights A and B of the two layers."""
        a, b = (cast(Tensor, part.weight) for part in self)
        return a, b


@dataclass(frozen=True)
class RandomizedError:
    """What is known of the error of a randomized SVD, relative to the largest singular value or the norm of W.

    Attributes:
        spectral: ||W - B A||_2 / ||W||_2 is at most this.
        failure: Probability that it is not.
        from_best: That bound over the smallest error that the rank allows is at most this; ``None`` where W has no
            larger rank, or the rank was found by the error.
        best_frobenius: The smallest possible ||W - B A||_F / ||W||_F, where it was cheap and rounding does not
            hide it.
    """

    spectral: float
    failure: float
    from_best: float | None
    best_frobenius: float | None


@dataclass(frozen=True)
class Terms:
    """A weight as a sum of terms of rank 1, the best first.

    Attributes:
        b: ``(m, R)``, the columns b_i.
        a: ``(R, n)``, the rows a_i.
        s: ``(R,)``, what each term adds to the norm that is cut, descending.
        method: How they were found: ``svd``, ``randomized svd``, ``adaptive svd`` or ``data-aware svd``.
        error: Of a randomized SVD.
        chosen: The rank, where it was found with the terms.
    """

    b: Tensor
    a: Tensor
    s: Tensor
    method: str = "svd"
    error: RandomizedError | None = None
    chosen: int | None = None

    def pair(self, rank: int, like: nn.Parameter) -> tuple[nn.Parameter, nn.Parameter]:
        """Returns the factors A ``(r, in, *kernel)`` and B ``(out, r, 1, ...)`` of a rank, as new parameters."""
        a = self.a[:rank].to(like.dtype).reshape(rank, *like.shape[1:])
        b = self.b[:, :rank].to(like.dtype).reshape(-1, rank, *([1] * (like.ndim - 2)))
        first, second = (
            nn.Parameter(f.clone(memory_format=torch.contiguous_format), requires_grad=like.requires_grad)
            for f in (a, b)
        )
        return first, second


@dataclass
class Layer:
    """A weight that can be factored, and the modules that hold it.

    Attributes:
        name: Name of the first of them.
        weight: The dense weight.
        modules: All of them; they share the factors.
        terms: The weight as a sum of terms of rank 1, once it is known.
    """

    name: str
    weight: nn.Parameter
    modules: list[nn.Module]
    terms: Terms | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """``(m, n)`` of the weight as a matrix."""
        m = self.weight.shape[0]
        return m, self.weight.numel() // m if m else 0

    @property
    def largest(self) -> int:
        """The largest rank with fewer parameters than the weight, 0 where there is none."""
        m, n = self.sides
        return (m * n - 1) // (m + n) if m and n else 0

    def parameters(self, rank: int | None) -> int:
        """The parameters at a rank, or of the weight for ``None``."""
        return self.weight.numel() if rank is None else rank * sum(self.sides)

    def factorized(self, rank: int) -> dict[int, Factorized]:
        """Returns the two layers of that rank for each module, by its ``id``."""
        if self.terms is None:
            raise UsageError(f"the terms of {self.name!r} are not known yet")
        pair = self.terms.pair(rank, self.weight)
        return {id(module): build_factors(module, *pair) for module in self.modules}


def terms_of(
    name: str, weight: Tensor, generator: torch.Generator, *, rank: int | None = None, energy: float | None = None
) -> Terms:
    """Returns the terms of the singular value decomposition of a weight.

    Args:
        name: For messages.
        weight: Of two or more dimensions.
        generator: For a randomized SVD, which gives only the terms that are needed.
        rank: All that will be needed; well below the sides of a large matrix they come from a randomized SVD.
        energy: The share of the squared norm that will be needed; of a large matrix an adaptive SVD is tried.

    Raises:
        NonFiniteError: the weight holds NaN or infinities.
    """
    matrix = finite_matrix(name, weight)
    small, found = min(matrix.shape), None
    if rank is not None and small >= _LARGE and rank * _WELL_BELOW <= small:
        found = _randomized(matrix, rank, generator)
    elif energy is not None and energy < 1 and small >= _ADAPTIVE:
        found = _adaptive(matrix, energy, generator)
    return _balanced(*svd(matrix)) if found is None else found


def finite_matrix(name: str, weight: Tensor) -> Tensor:
    """Returns the weight as a detached matrix; raises `NonFiniteError` where it is not finite."""
    matrix = as_matrix(weight.detach())
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"the weight of {name!r} holds NaN or infinities: restore it from an earlier checkpoint")
    return matrix


def _randomized(matrix: Tensor, rank: int, generator: torch.Generator) -> Terms | None:
    """Terms from a randomized SVD, or ``None`` where it is known to be worse than the full one."""
    u, s, vh = randomized_svd(matrix, rank + 1, oversample=9, generator=generator)
    beyond = float(s[rank])  # at most sigma_{rank + 1}, the smallest possible error
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    measured = low_rank_error(matrix, u, s, vh, generator=generator)
    best = smallest_error(matrix, rank) if min(matrix.shape) <= _CHEAP else None
    if best is not None and measured.frobenius > _ALLOWED * best:
        return None
    largest, whole = float(s[0]), float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    error = RandomizedError(
        min(measured.spectral / largest, 1.0) if largest else 0.0,  # W minus its projection is not longer than W
        measured.failure,
        measured.spectral / beyond if beyond else None,
        None if best is None else best / whole,
    )
    found = _balanced(u, s, vh)
    return Terms(found.b, found.a, found.s, "randomized svd", error)


def _adaptive(matrix: Tensor, energy: float, generator: torch.Generator) -> Terms | None:
    """Terms that hold a share of the squared norm, or ``None`` where too many would be needed."""
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    most = min(matrix.shape) // _WELL_BELOW
    u, s, vh = adaptive_svd(matrix, math.sqrt(1 - energy), block=_BLOCK, most=most, generator=generator)
    if not len(s) or float(torch.linalg.vector_norm(s, dtype=torch.float64)) < math.sqrt(energy) * total:
        return None  # it gave up
    measured = low_rank_error(matrix, u, s, vh, generator=generator)
    if measured.frobenius > math.sqrt(1 - energy) * total:
        return None
    error = RandomizedError(min(measured.spectral / float(s[0]), 1.0), measured.failure, None, None)
    found = _balanced(u, s, vh)
    return Terms(found.b, found.a, found.s, "adaptive svd", error, len(s))


def _balanced(u: Tensor, s: Tensor, vh: Tensor) -> Terms:
    root = s.sqrt()
    return Terms(u * root, root[:, None] * vh, s)


def projected(weight: Tensor, basis: Tensor, s: Tensor, method: str) -> Terms:
    """Returns the terms of U U^T W for orthonormal columns U ``(m, R)``: b_i = u_i, a_i = W^T u_i, balanced."""
    matrix = as_matrix(weight.detach()).to(basis.dtype)
    a = basis.mT @ matrix
    length = torch.linalg.vector_norm(a, dim=1, keepdim=True)
    root = torch.where(length > 0, length.sqrt(), 1.0)
    return Terms(basis * root.mT, a / root, s, method)


def frobenius_error(weight: Tensor, a: Tensor, b: Tensor) -> float:
    """Returns ||W - B A||_F / ||W||_F of factors as they are stored; 0 for a weight of zeros."""
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    matrix, left, right = (as_matrix(t.detach()).to(work) for t in (weight, b, a))
    largest = float(matrix.abs().amax()) or 1.0
    exponent = math.frexp(largest)[1]  # halved into both factors: neither overflows where the product does not
    half = 2.0 ** (-(exponent // 2)), 2.0 ** (exponent // 2 - exponent)
    matrix = matrix * half[0] * half[1]
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    residual = matrix - (left * half[0]) @ (right * half[1])
    return float(torch.linalg.vector_norm(residual, dtype=torch.float64)) / total if total else 0.0


def truncate(w: Tensor, tolerance: float) -> tuple[Tensor, int, int]:
    """Drops the singular values below ``tolerance * sigma_1``.

    Args:
        w: A weight of two or more dimensions, seen as ``(out, in * kernel)``.
        tolerance: Between 0 and 1; at 0 only rounding is dropped (see `cut`).

    Returns:
        ``(w_truncated, rank, parameters)``: the truncated weight in shape and dtype of ``w``, the rank r that is left,
        and min(m n, r (m + n)), the numbers needed to store it.

    >>> cut_weight, rank, parameters = truncate(torch.diag(torch.tensor([4.0, 2.0, 0.1])), 0.1)
    >>> rank, parameters, round(float(cut_weight[2, 2]), 6)
    (2, 9, 0.0)
    """
    if not 0 <= tolerance < 1:
        raise UsageError(f"tolerance must be at least 0 and less than 1 (a fraction of sigma_1), got {tolerance!r}")
    matrix = as_matrix(w.detach())
    m, n = matrix.shape
    u, s, vh = svd(matrix)
    r = cut(s, max(m, n), tolerance=tolerance)
    cut_matrix = (u[:, :r] * s[:r]) @ vh[:r]
    return cut_matrix.to(w.dtype).reshape(w.shape), r, min(m * n, r * (m + n))


def cut(
    s: Tensor, longest: int, *, tolerance: float | None = None, energy: float | None = None, rank: int | None = None
) -> int:
    """Returns the rank that one rule leaves of singular values in descending order.

    Args:
        s: Singular values ``(r,)``.
        longest: The longer side of the matrix: values up to ``longest * eps * sigma_1`` are rounding and never kept by
            ``tolerance``.
        tolerance: Keep sigma_i >= tolerance * sigma_1.
        energy: Keep the fewest that hold this fraction of sum_i sigma_i^2.
        rank: Keep this many.
    """
    if s.numel() == 0 or float(s[0]) == 0.0:
        return 0
    relative = s.double() / s[0].double()
    if tolerance is not None:
        rounding = longest * torch.finfo(s.dtype).eps
        return int(((relative >= tolerance) & (relative > rounding)).sum())
    if energy is not None:
        mass = relative.square().cumsum(0)
        return min(int((mass < energy * mass[-1] * (1 - 1e-12)).sum()) + 1, len(s))
    return min(rank or 0, len(s))


def build_factors(module: nn.Module, a: nn.Parameter, b: nn.Parameter) -> Factorized:
    """Builds the two layers around given factors; draws no random numbers."""
    r = a.shape[0]
    options: dict[str, Any] = {"device": "meta", "dtype": a.dtype}
    first: nn.Module
    second: nn.Module
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, r, bias=False, **options)
        second = nn.Linear(r, module.out_features, bias=False, **options)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kind: Any = type(module)
        geometry = {k: getattr(module, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        first = kind(module.in_channels, r, module.kernel_size, bias=False, **geometry, **options)
        second = kind(r, module.out_channels, 1, bias=False, **options)
    else:
        raise UsageError(f"{type(module).__name__} cannot be factored")
    first.weight, second.weight = a, b
    second.register_parameter("bias", cast("nn.Parameter | None", module.bias))
    return Factorized(first, second).train(module.training)


def dense_layer(module: Factorized) -> nn.Module:
    """Returns a layer on the meta device that could stand in the place of the factors."""
    first: Any = module[0]
    options: dict[str, Any] = {"bias": module.bias is not None, "device": "meta", "dtype": first.weight.dtype}
    out = module.factors[1].shape[0]
    if isinstance(first, nn.Linear):
        return nn.Linear(first.in_features, out, **options)
    geometry = {k: getattr(first, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    return type(first)(first.in_channels, out, **geometry, **options)


def replace_layers(model: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """Puts each module in the place of the one with that ``id``, in place; returns the model."""
    if id(model) in replaced:
        return replaced[id(model)]
    for parent in list(model.modules()):
        for short, child in list(parent._modules.items()):
            if id(child) in replaced:
                setattr(parent, short, replaced[id(child)])
    return model
