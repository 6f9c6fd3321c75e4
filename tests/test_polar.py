"""The polar factor: its routes against a float64 SVD, the choice between them, minimal norm, scales."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import polar as module
from groundstate.norms.polar import polar, polar_and_spectrum
from groundstate.norms.polar_table import Constants


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
    # eps * condition; a Gram matrix is only taken within about 4e-4 (`_TRUST`).
    bound = max(5e-4, 1e-6 * condition)
    assert (q - exact).norm() <= bound * exact.norm()
    assert value.item() == pytest.approx(exact_value.item(), rel=5e-6)
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


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The routes that were taken, with the constants of the shipped table."""
    names: list[str] = []

    def spy(name: str, route: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *a, **k: (names.append(name), route(*a, **k))[1]

    for name in ("inverse_root", "split_polar", "double_polar", "svd_polar"):
        monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    monkeypatch.setattr(module, "constants", lambda device: Constants())
    return names


def test_the_shape_and_the_spectrum_choose_the_route(taken: list[str]) -> None:
    def of(s: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[str]:
        taken.clear()
        polar(with_spectrum(s, rows, columns)[0].to(dtype))
        return taken.copy()

    some = torch.linspace(1, 0.4, 100, dtype=torch.float64)
    assert of(some, 300, 100) == ["inverse_root"]
    assert of(some, 120, 100) == ["split_polar"]
    assert of(decaying(100, 1e3), 300, 100) == ["split_polar"]
    assert of(some * (torch.arange(100) < 99), 700, 100) == ["inverse_root", "split_polar"]  # not of full rank
    assert of(decaying(100, 1e7), 300, 100) == ["double_polar"]  # most singular values below a hundredth
    assert of(decaying(200, 1e7), 200, 200) == ["svd_polar"]
    assert of(decaying(40, 1e7), 40, 40) == ["double_polar"]
    assert of(decaying(80, 3.0), 80, 80) == ["svd_polar"]  # too small for anything else
    assert of(decaying(100, 3.0), 300, 100, torch.float64) == ["split_polar"]
    assert of(decaying(100, 1e6), 300, 100, torch.float64) == ["svd_polar"]  # there is nothing wider to go to


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "even": lambda n: torch.linspace(1, 0.3, n, dtype=torch.float64),
    "random": lambda n: torch.linspace(1, 0.5 / n, n, dtype=torch.float64),
    "decaying": lambda n: decaying(n, 1e3),
    "power": lambda n: torch.arange(1, n + 1, dtype=torch.float64) ** -0.7,
    "equal": lambda n: torch.ones(n, dtype=torch.float64),
    "outlier": lambda n: torch.cat([torch.ones(1), torch.full((n - 1,), 0.01)]).double(),
    "low rank": lambda n: torch.linspace(1, 0.5, n, dtype=torch.float64) * (torch.arange(n) < 0.6 * n),
    "one missing": lambda n: torch.linspace(1, 0.5, n, dtype=torch.float64) * (torch.arange(n) < n - 1),
    "steps": lambda n: 10.0 ** -(torch.arange(n, dtype=torch.float64) * 4 / n).floor(),
    "heavy tail": lambda n: torch.where(torch.arange(n) < n / 5, 1.0, 3e-3 * decaying(n, 10.0)),
}
CRAZY = (
    Constants(),
    Constants(tiny=0),
    Constants(tiny=1e9),
    Constants(0, 0, 0, 0, 0),
    Constants(9, 0, 0, 0, 9),
    Constants(0.7, 0, 0, 9, 9),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("route", module._ROUTES)
def test_no_route_and_no_table_is_wrong(
    route: module.Route, spectrum: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = dtype == torch.float32
    for (rows, columns), table in product(((160, 160), (100, 120), (130, 40)), CRAZY if route == "auto" else CRAZY[:1]):
        monkeypatch.setattr(module, "constants", lambda device, table=table: table)
        s = SPECTRA[spectrum](min(rows, columns))
        w, exact = with_spectrum(s, rows, columns)
        q, value = polar(w.to(dtype), route)
        off = float((q - exact).norm() / exact.norm())
        # What the routes promise; float32 weights are themselves rounded, which moves Q by eps * condition at most.
        assert off <= (1e-3 if single else 1e-10), f"{rows}x{columns} {table}: {off}"
        assert float(value) == pytest.approx(float(s.sum()), rel=2e-5 if single else 1e-9)
        assert q.dtype == value.dtype == dtype


def test_small_singular_values_on_both_sides_of_the_threshold() -> None:
    """Those below get none of Q, whatever the route."""
    n = 128
    zero = n * torch.finfo(torch.float32).eps
    for share, kept in ((0.5, n - 1), (0.8, n - 1), (1.4, n), (3.0, n)):
        s = torch.linspace(1, 0.1, n, dtype=torch.float64)
        s[-1] = share * zero
        w = with_spectrum(s, n, n)[0].float()
        for route in module._ROUTES:
            # A singular value of 1e-5 is rounded by 1e-7, so its direction by a few per cent.
            assert polar(w, route)[0].norm().square().item() == pytest.approx(kept, abs=0.2), (share, route)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_spectrum_comes_with_it(spectrum: str, dtype: torch.dtype) -> None:
    for rows, columns in ((160, 160), (100, 120), (130, 40)):
        s = SPECTRA[spectrum](min(rows, columns)).sort(descending=True).values
        w, exact = with_spectrum(s, rows, columns)
        q, found = polar_and_spectrum(w.to(dtype))
        # eps * condition of the rounded weights, up to 1e4 here
        assert (q - exact).norm() <= (3e-4 if dtype == torch.float32 else 1e-10) * exact.norm()
        assert torch.allclose(found.double(), s, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-11)
        assert bool((found.diff() <= 0).all())
    batch = torch.stack([with_spectrum(decaying(40, c), 60, 40)[0] for c in (2.0, 1e3)]).float() * 2.0**70
    q, found = polar_and_spectrum(torch.stack([batch, batch]).mT)
    assert (q.shape, found.shape) == ((2, 2, 40, 60), (2, 2, 40))
    assert torch.allclose(found[1], torch.linalg.svdvals(batch.double()).float(), rtol=1e-5)
    assert polar_and_spectrum(torch.zeros(2, 3, 4))[1].tolist() == [[0.0] * 3] * 2
    assert polar_and_spectrum(torch.zeros(0, 4))[1].shape == (0,)


def test_random_matrices_of_any_kind() -> None:
    """Finite, at most a unit of length per direction, and a value between the Frobenius norm and sqrt(n) times it."""
    generator = torch.Generator().manual_seed(0)

    def one_of(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(300):
        rows, columns = one_of(1, 2, 7, 33, 100, 130), one_of(1, 3, 20, 33, 100)
        kind = one_of(
            "dense", "sparse", "rank one", "duplicated", "graded", "ones", "scaled rows", "dead half", "dead some"
        )
        w = hostile(kind, rows, columns, generator)
        w = (w * one_of(1.0, 1e20, 1e-20, 1e-36)).to(one_of(torch.float32, torch.float64, torch.bfloat16))
        route = one_of("auto", "auto", "gram", "double", "express")
        q, value = polar(w, route)
        assert q.isfinite().all(), (kind, route, w.shape)
        assert float(q.double().norm()) <= min(rows, columns) ** 0.5 * 1.01
        norm = float(w.double().norm())
        assert norm * (1 - 1e-4) <= float(value) <= norm * min(rows, columns) ** 0.5 * (1 + 1e-4)
        # <Q, W> = ||W||_* says that Q is the polar factor wherever it is not zero; bfloat16 rounds Q to 2^-9.
        pairing = float((q.double() * w.double()).sum())
        assert pairing == pytest.approx(float(value), rel=1e-2 if w.dtype == torch.bfloat16 else 1e-3)


def hostile(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if kind == "sparse":
        w *= torch.rand(w.shape, generator=generator) < 0.05
    elif kind == "rank one":
        w = w[:, :1] * w[:1]
    elif kind == "duplicated":
        w[:, columns // 2 :] = w[:, : columns - columns // 2].clone()
    elif kind == "graded":
        w *= torch.logspace(0, -9, columns, dtype=torch.float64)
    elif kind == "ones":
        w = torch.ones_like(w)
    elif kind == "scaled rows":
        w *= torch.logspace(4, -4, rows, dtype=torch.float64)[:, None]
    elif kind == "dead half":
        w[:, : columns // 2] = 0
    elif kind == "dead some":
        w[:, ::5] = 0
    return w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales(dtype: torch.dtype) -> None:
    w = with_spectrum(decaying(100, 3.0), 300, 100)[0].to(dtype)
    exact, value = polar(w)
    for scale in (2.0**83, 2.0**-83, 2.0**-120):
        for route in module._ROUTES:
            q, scaled = polar(w * scale, route)
            assert torch.allclose(q, exact, rtol=0, atol=3e-5)  # float32 rounding
            assert scaled.item() == pytest.approx(value.item() * scale, rel=1e-5)


def test_empty_zero_and_bad_input() -> None:
    for shape in ((0, 3), (3, 0), (2, 0, 3), (0, 4, 3)):
        q, value = polar(torch.zeros(shape))
        assert (q.shape, value.shape) == (shape, shape[:-2])
    for route in module._ROUTES:
        q, value = polar(torch.zeros(300, 100), route)
        assert value == 0
        assert (q == 0).all()
    w = torch.ones(300, 100)
    w[7, 7] = torch.nan
    for route in module._ROUTES:
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
