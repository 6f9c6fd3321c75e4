"""Networks, energies and dense Jacobians that the tests of the energies of the function share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from groundstate.energies.dirichlet import Dirichlet
from groundstate.energies.jacobian import JacobianEnergy, JacobianFrobenius, JacobianSpectral
from groundstate.energies.jacobian_nuclear import JacobianNuclear

F64 = torch.float64
M = TypeVar("M", bound=nn.Module)
EXACT = Dirichlet(estimator="exact", samples=None)
PROBED = Dirichlet(samples=None)
ALL = (PROBED, EXACT, JacobianFrobenius(samples=None), JacobianSpectral(samples=None), JacobianNuclear(samples=None))
BY_ROUTE: dict[str, Callable[[str], JacobianEnergy]] = {
    "dirichlet": lambda r: Dirichlet(samples=None, estimator="exact", route=r),
    "frobenius": lambda r: JacobianFrobenius(samples=None, route=r),
    "spectral": lambda r: JacobianSpectral(samples=None, route=r),
    "nuclear": lambda r: JacobianNuclear(samples=None, method="exact", route=r),
}


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=F64).to(dtype)


def filled(model: M, seed: int = 0, dtype: torch.dtype = F64) -> M:
    """With weights from a seed of their own; not so small that singular values drown."""
    g = gen(seed)
    with torch.no_grad():
        for p in model.to(dtype).parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64) * (1.5 / (p[0].numel() if p.ndim > 1 else 4)) ** 0.5)
    return model


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    parts = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), activation())]
    return filled(nn.Sequential(*parts[:-1]), seed)


def mixed(dtype: torch.dtype = F64, seed: int = 1) -> nn.Sequential:
    """A kinked and a smooth activation."""
    return filled(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), seed, dtype)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + torch.tanh(self.a(x)))


def dense(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """J of every sample, ``(B, C, n)``, differentiable: one call of torch's own Jacobian per sample."""
    rows = []
    for i in range(len(x)):
        j = torch.autograd.functional.jacobian(f, x[i : i + 1], create_graph=True)
        assert isinstance(j, Tensor)
        rows.append(j.reshape(-1, x[i].numel()))
    return torch.stack(rows)


def value_and_gradient(energy: JacobianEnergy, f: Any, x: Tensor, parameters: Any = None) -> tuple[float, Tensor]:
    parameters = list(f.parameters() if parameters is None else parameters)
    value = energy.value(f, x, probe=gen(5))
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return float(value.detach()), torch.cat([g.flatten() for g in flat]).double()


def same(energy: JacobianEnergy, f: Any, g: Any, x: Tensor, parameters: Any = None, rel: float = 1e-10) -> None:
    """Both functions, of the same parameters in the same order, have the same energy and gradient, up to rounding."""
    a, slope_a = value_and_gradient(energy, f, x, parameters)
    b, slope_b = value_and_gradient(energy, g, x, parameters)
    assert a == pytest.approx(b, rel=rel), energy
    assert a > 0
    assert float((slope_a - slope_b).norm()) <= 10 * rel * float(slope_b.norm()), energy
