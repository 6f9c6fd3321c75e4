"""The polar factor: both routes against a float64 SVD, the choice between them, minimal norm, scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import polar as module
from groundstate.norms.polar import polar


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(s: Tensor, rows: int, columns: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A float64 matrix with singular values s and its polar factor on those that are not zero."""
    u, v = orthonormal(rows, len(s), seed), orthonormal(columns, len(s), seed + 1)
    return u * s @ v.mT, u * s.sign() @ v.mT


def decaying(n: int, condition: float) -> Tensor:
    return torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)


SHAPES = [(300, 100), (100, 300), (120, 20), (300, 200)]


@pytest.mark.parametrize("condition", [1.5, 20.0, 90.0, 1e3, 1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("route", ["auto", "svd", "gram"])
def test_float32_is_as_good_as_its_weights(shape: tuple[int, int], route: module.Route, condition: float) -> None:
    w = with_spectrum(decaying(min(shape), condition), *shape)[0].float()
    q, value = polar(w, route)
    exact, exact_value = polar(w.double(), "svd")
    # Conditions stay below 1 / (300 eps), where singular values begin to count as zero. The SVD in float32 errs by
    # eps * condition; a Gram matrix is only taken within 5e-5 (`_TRUST_SINGLE`).
    bound = max(1e-4, 1e-6 * condition)
    assert (q - exact).norm() <= bound * exact.norm()
    assert value.item() == pytest.approx(exact_value.item(), rel=2e-6)
    assert (q.dtype, value.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("condition", [1.5, 90.0, 1e3, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_keeps_ten_digits(shape: tuple[int, int], condition: float) -> None:
    w, exact = with_spectrum(decaying(min(shape), condition), *shape)
    for route in ("auto", "gram"):
        q, value = polar(w, route)
        # 1e-11 is what a Gram matrix is trusted to; beyond, the SVD (and the making of w) errs by eps * condition.
        assert (q - exact).norm() <= (2e-11 + 1e-15 * condition) * exact.norm()
        assert value.item() == pytest.approx(decaying(min(shape), condition).sum().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("route", ["auto", "svd", "gram"])
def test_rank_deficient_matrices_get_the_minimal_norm(
    shape: tuple[int, int], route: module.Route, dtype: torch.dtype
) -> None:
    s = torch.linspace(2, 1, 20, dtype=torch.float64) * (torch.arange(20) < 13)
    w, exact = with_spectrum(s, *shape)
    q, value = polar(w.to(dtype), route)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13  # rounding of w over its smallest nonzero singular value
    assert (q - exact).norm() <= tolerance * exact.norm()
    # 13 directions of length 1, not the min(shape) that a decomposition without a threshold would give.
    assert q.norm().item() == pytest.approx(13**0.5, rel=1e-5)
    assert value.item() == pytest.approx(s.sum().item(), rel=1e-5)


def test_a_batch_mixes_routes() -> None:
    good, bad = decaying(40, 2.0), decaying(40, 1e4)
    low = good * (torch.arange(40) < 5)
    batch = torch.stack([with_spectrum(s, 150, 40, k)[0] for k, s in enumerate((good, bad, low, good * 0))])
    for w in (batch, batch.float(), batch.mT, batch.float().reshape(2, 2, 150, 40)):
        q, value = polar(w)
        assert (q.shape, value.shape) == (w.shape, w.shape[:-2])
        flat, flat_q = w.reshape(-1, *w.shape[-2:]), q.reshape(-1, *w.shape[-2:])
        for one, one_q, one_value in zip(flat, flat_q, value.flatten()):
            exact, exact_value = polar(one.double() if one is not flat[2] else one, "svd")
            if one.dtype == torch.float32 and int((one.double().svd().S > 1e-6).sum()) < 40:
                exact, exact_value = polar(one, "svd")  # the kernel is one of float32
            assert (one_q - exact).norm() <= (2e-2 if one.dtype == torch.float32 else 1e-10) * (1 + exact.norm())
            assert one_value.item() == pytest.approx(exact_value.item(), rel=1e-5)


def test_nearly_square_matrices_go_to_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    gram, svd = module._by_gram, module.svd
    monkeypatch.setattr(module, "_by_gram", lambda *a: (taken.append("gram"), gram(*a))[1])
    monkeypatch.setattr(module, "svd", lambda *a: (taken.append("svd"), svd(*a))[1])
    polar(with_spectrum(decaying(200, 3.0), 200, 200)[0].float())
    assert taken == ["svd"]
    taken.clear()
    polar(with_spectrum(decaying(100, 3.0), 300, 100)[0].float())
    assert taken == ["gram"]
    taken.clear()
    polar(with_spectrum(decaying(100, 1e3), 300, 100)[0].float())
    assert taken == ["gram", "gram"]  # float32, then float64
    taken.clear()
    polar(with_spectrum(decaying(100, 1e6), 300, 100)[0])
    assert taken == ["gram", "svd"]  # float64 weights have nothing wider to go to


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales(dtype: torch.dtype) -> None:
    w = with_spectrum(decaying(100, 3.0), 300, 100)[0].to(dtype)
    exact, value = polar(w)
    for scale in (2.0**83, 2.0**-83, 2.0**-120):
        for route in ("auto", "gram", "svd"):
            q, scaled = polar(w * scale, route)
            assert torch.allclose(q, exact, rtol=0, atol=1e-5)  # float32 rounding
            assert scaled.item() == pytest.approx(value.item() * scale, rel=1e-5)


def test_empty_zero_and_bad_input() -> None:
    for shape in ((0, 3), (3, 0), (2, 0, 3), (0, 4, 3)):
        q, value = polar(torch.zeros(shape))
        assert (q.shape, value.shape) == (shape, shape[:-2])
    for route in ("auto", "gram", "svd"):
        q, value = polar(torch.zeros(300, 100), route)
        assert value == 0
        assert (q == 0).all()
    w = torch.ones(300, 100)
    w[7, 7] = torch.nan
    for route in ("auto", "gram", "svd"):
        with pytest.raises(NonFiniteError, match="1 NaN"):
            polar(w, route)
    with pytest.raises(UsageError, match="route must be"):
        polar(w, "fast")  # pyright: ignore[reportArgumentType]


def test_half_precision_and_views() -> None:
    w = with_spectrum(decaying(100, 3.0), 300, 100)[0].bfloat16()
    q, value = polar(w)
    exact, exact_value = polar(w.double(), "svd")
    assert q.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs()
    assert ((q.double() - exact).abs() <= ulp + 1e-6).all()
    assert value.item() == pytest.approx(exact_value.item(), rel=1e-5)
    parameter = torch.nn.Parameter(w.float())
    q, value = polar(parameter[:, ::2])
    assert not q.requires_grad
    assert not value.requires_grad
    assert torch.allclose(q, polar(parameter[:, ::2].detach().clone())[0], atol=1e-6)
