"""The Gaussian log density against torch's multivariate normal, its limits, and hostile inputs."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.gaussian import negative_log_density, value_and_gradient

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=F64).to(dtype)


def covariance(phi: Tensor, c: float, d: float) -> Tensor:
    return c * (phi @ phi.mT + 1) + d * torch.eye(len(phi), dtype=phi.dtype)


def reference(f: Tensor, phi: Tensor, c: float, d: float) -> Tensor:
    """-sum_k log N(f_k; 0, K) by torch.distributions."""
    normal = torch.distributions.MultivariateNormal(f.new_zeros(len(f)), covariance(phi, c, d))
    return -normal.log_prob(f.mT).sum()


@pytest.mark.parametrize("method", ["auto", "cholesky", "woodbury"])
def test_known_number(method: Literal["auto", "cholesky", "woodbury"]) -> None:
    generator = seeded(0)
    phi, f = torch.randn(40, 7, generator=generator, dtype=F64), torch.randn(40, 3, generator=generator, dtype=F64)
    value = negative_log_density(f, phi, 0.3, 0.7, method=method)
    assert float(value) == pytest.approx(193.80522383901382, rel=1e-13)  # some hundred roundings of 1e-16


@pytest.mark.parametrize("method", ["cholesky", "woodbury"])
@pytest.mark.parametrize(("points", "features", "outputs"), [(9, 3, 2), (4, 7, 3), (1, 5, 1), (6, 0, 2), (5, 5, 1)])
def test_value_and_derivatives_are_those_of_the_normal(
    method: Literal["cholesky", "woodbury"], points: int, features: int, outputs: int
) -> None:
    f, phi = draw(1, points, outputs).requires_grad_(), draw(2, points, features)
    value, expected = negative_log_density(f, phi, 0.4, 0.2, method=method), reference(f, phi, 0.4, 0.2)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (grad,) = torch.autograd.grad(value, f, create_graph=True)
    (wanted,) = torch.autograd.grad(expected, f)
    assert torch.allclose(grad, wanted, rtol=1e-10, atol=1e-12)  # condition number below 1e3
    direction = draw(3, points, outputs)
    (twice,) = torch.autograd.grad((grad * direction).sum(), f)  # the Hessian is K^-1
    assert torch.allclose(covariance(phi, 0.4, 0.2) @ twice, direction, atol=1e-10)


def test_log_det_is_what_does_not_depend_on_f() -> None:
    phi = draw(4, 8, 3)
    for seed in (5, 6):
        f = draw(seed, 8, 2)
        short = negative_log_density(f, phi, 0.3, 0.5, log_det=False)
        assert torch.allclose(short, 0.5 * torch.trace(f.mT @ torch.linalg.solve(covariance(phi, 0.3, 0.5), f)))
        constant = negative_log_density(f, phi, 0.3, 0.5) - short
        assert torch.allclose(constant, negative_log_density(torch.zeros_like(f), phi, 0.3, 0.5))


def test_without_features_the_squares_are_left() -> None:
    f, phi = draw(7, 6, 2), draw(8, 6, 3)
    squares, constant = float(f.square().sum()) / 0.5, 6 * math.log(2 * math.pi * 0.25)  # 12 values
    for c in (0.0, 1e-14):  # R differs from its limit by c times some 10 in the first order
        assert float(negative_log_density(f, phi, c, 0.25, log_det=False)) == pytest.approx(squares, rel=1e-12)
        assert float(negative_log_density(f, phi, c, 0.25)) == pytest.approx(squares + constant, rel=1e-12)


def test_features_explain_values_for_less() -> None:
    phi = draw(9, 30, 4)
    explained = phi @ draw(10, 4, 2)
    other = draw(11, 30, 2)
    other *= explained.norm() / other.norm()
    cheap, dear = (float(negative_log_density(f, phi, 10.0, 0.1, log_det=False)) for f in (explained, other))
    assert cheap < dear / 10


@pytest.mark.parametrize("method", ["cholesky", "woodbury"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3, 1e5])
def test_single_precision(method: Literal["cholesky", "woodbury"], scale: float) -> None:
    """Beyond a condition number of 1e5 (here from 1e3 on) float32 is computed in float64."""
    phi, f = scale * draw(12, 60, 20, dtype=torch.float32), draw(13, 60, 3, dtype=torch.float32).requires_grad_()
    double = f.detach().double().requires_grad_()
    value = negative_log_density(f, phi, 0.5, 1.0, method=method)
    expected = negative_log_density(double, phi.double(), 0.5, 1.0)
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    (grad,), (wanted,) = torch.autograd.grad(value, f), torch.autograd.grad(expected, double)
    assert grad.dtype == torch.float32
    assert float((grad - wanted).norm() / wanted.norm()) < 5e-3  # eps32 * 1e5, the bound of the switch


def test_extreme_conditioning_is_refused() -> None:
    f = draw(14, 5, 2)
    for phi, c, d in ((1e20 * draw(15, 5, 3), 1.0, 1.0), (draw(15, 5, 3), 1e30, 1e-30), (1e200 * f, 1.0, 1.0)):
        with pytest.raises(UsageError, match=r"too ill-conditioned.*lower c, raise d"):
            negative_log_density(f, phi, c, d)
    tiny = negative_log_density(f, 1e-20 * draw(15, 5, 3), 1.0, 1.0)  # the constant feature is left
    assert float(tiny) == pytest.approx(float(negative_log_density(f, torch.zeros(5, 0, dtype=F64), 1.0, 1.0)))


@pytest.mark.parametrize("scale", [1e-20, 1e-30])
def test_tiny_values_keep_their_gradient(scale: float) -> None:
    phi, f = draw(16, 9, 2, dtype=torch.float32), draw(17, 9, 2, dtype=torch.float32)
    small = (scale * f).requires_grad_()
    (grad,) = torch.autograd.grad(negative_log_density(small, phi, 1.0, 1.0), small)
    wanted = torch.linalg.solve(covariance(phi.double(), 1.0, 1.0), small.detach().double())
    assert float((grad - wanted).norm() / wanted.norm()) < 1e-5  # condition number below 1e2 times eps32


def test_huge_values_are_named() -> None:
    with pytest.raises(NonFiniteError, match="overflows float32"):
        negative_log_density(torch.full((3, 1), 1e20), torch.zeros(3, 1), 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    f, phi = draw(18, 7, 2, dtype=dtype).requires_grad_(), draw(19, 7, 3, dtype=dtype)
    value = negative_log_density(f, phi, 0.5, 0.5)
    assert value.dtype == torch.float32
    assert torch.equal(value, negative_log_density(f.float(), phi.float(), 0.5, 0.5))
    value.backward()
    assert f.grad is not None
    assert f.grad.dtype == dtype


def test_bad_arguments_of_the_density() -> None:
    f, phi = draw(20, 4, 2), draw(21, 4, 3)
    bad: list[tuple[Any, Any, float, float, str]] = [
        (f, phi, -1.0, 1.0, "not negative"),
        (f, phi, math.nan, 1.0, "not negative"),
        (f, phi, 1.0, 0.0, "d is a variance"),
        (f, phi, 1.0, math.inf, "d is a variance"),
        (f[:0], phi[:0], 1.0, 1.0, "at least one"),
        (f[:3], phi, 1.0, 1.0, "same points"),
        (f[0], phi, 1.0, 1.0, "f must be a real"),
        (f, phi.long(), 1.0, 1.0, "phi must be a real"),
    ]
    for values, features, c, d, message in bad:
        with pytest.raises(UsageError, match=message):
            negative_log_density(values, features, c, d)
    with pytest.raises(UsageError, match="method must be"):
        negative_log_density(f, phi, 1.0, 1.0, method="qr")  # pyright: ignore[reportArgumentType]
    for i, name in enumerate(("function values f", "features phi")):
        pair = [f.clone(), phi.clone()]
        pair[i][1, 1] = math.nan
        with pytest.raises(NonFiniteError, match=f"the {name} of shape .* 1 NaN"):
            negative_log_density(pair[0], pair[1], 1.0, 1.0)


@pytest.mark.parametrize("method", ["cholesky", "woodbury"])
@pytest.mark.parametrize("log_det", [True, False])
def test_the_gradient_without_autograd(method: Literal["cholesky", "woodbury"], log_det: bool) -> None:
    for dtype, bound in ((F64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):  # some units in the last place
        f, phi = draw(22, 9, 4, dtype=dtype).requires_grad_(), draw(23, 9, 5, dtype=dtype)
        expected = negative_log_density(f, phi, 0.4, 0.2, method=method, log_det=log_det)
        (wanted,) = torch.autograd.grad(expected, f)
        value, grad = value_and_gradient(f, phi, 0.4, 0.2, method=method, log_det=log_det)
        assert torch.equal(value, expected)
        assert not value.requires_grad
        assert not grad.requires_grad
        assert grad.dtype == dtype
        assert float((grad - wanted).norm()) <= bound * float(wanted.norm())
