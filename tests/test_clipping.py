"""Clipping of singular values by a Gram matrix: against a float64 SVD, counts above the level, bounds that are kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from groundstate.norms import clipping as module
from groundstate.norms.clipping import clip_by_gram, probed_residual
from groundstate.norms.thresholding import project_operator_ball, singular_value_threshold

DTYPES = [torch.float32, torch.float64]
SHAPES = [(100, 100), (300, 100), (64, 64)]


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(s: Tensor, rows: int, seed: int) -> Tensor:
    u = torch.linalg.qr(random((rows, len(s)), seed)).Q
    return u * s @ torch.linalg.qr(random((len(s), len(s)), seed + 1)).Q.mT


def clipped(w: Tensor, t: float) -> Tensor:
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return (u * s.clamp_max(t)) @ vh


def spectra(n: int) -> dict[str, Tensor]:
    index = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "even": torch.linspace(2.0, 0.1, n, dtype=torch.float64),
        "power": index**-1.0,
        "decades": torch.logspace(0, -7, n, dtype=torch.float64),
        "low rank": torch.where(index <= 0.7 * n, 1.0, 0.0).double(),
        "ties": torch.where(index <= n // 2, 2.0, 0.01).double(),
        "one large": torch.where(index == 1, 100.0, 0.1 * torch.rand(n, dtype=torch.float64)).sort(descending=True)[0],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", list(spectra(2)))
def test_error_and_count_keep_their_promise(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    s = spectra(shape[1])[name]
    w = with_spectrum(s, shape[0], 3).to(dtype)
    lam, v = torch.linalg.eigh(w.mT @ w)
    eps = torch.finfo(dtype).eps
    done = 0
    for t in (0.8, 0.11, 0.03, 1e-3, 1e-5):
        allowed = 20 * eps * float(s.norm())
        for layout in (w, w.mT.contiguous().mT):
            found = clip_by_gram(layout, lam, v, t, allowed)
            if found is None:
                continue
            result, above = found
            # The bound, and rounding of the result, whose singular values are at most t, and of W itself.
            rounding = 4 * eps * (t * math.sqrt(len(s)) + float(s[0]))
            assert (result - clipped(w, t)).norm() <= allowed + rounding
            true = torch.linalg.svdvals(w.double())
            slack = 8 * eps * float(s[0])
            assert int((true > t + slack).sum()) <= above <= int((true > t - slack).sum())
            assert result.is_contiguous() == layout.is_contiguous()
            done += 1
    assert done >= 4  # of ten: it does not just refuse


def test_levels_amid_the_singular_values() -> None:
    # At a level that is itself a singular value, the one to each side of it and those that are tied with it.
    s = torch.linspace(2.0, 0.05, 90, dtype=torch.float64)
    s[40:50] = s[40].clone()
    w = with_spectrum(s, 120, 5).float()
    lam, v = torch.linalg.eigh(w.mT @ w)
    true = torch.linalg.svdvals(w.double())
    for i in (0, 1, 40, 45, 60, 88, 89):
        for t in (float(true[i]), float(true[i]) * (1 + 1e-7), float(true[i]) * (1 - 1e-7)):
            found = clip_by_gram(w, lam, v, t, 1e-4)
            assert found is not None
            assert (found[0] - clipped(w, t)).norm() <= 2e-5
            assert torch.linalg.svdvals(found[0].double())[0] <= t + 8 * 1.2e-7 * 2.0  # 8 eps * s_1


def test_it_refuses_what_it_cannot_show() -> None:
    w = with_spectrum(torch.logspace(0, -9, 80, dtype=torch.float64), 80, 7)
    lam, v = torch.linalg.eigh(w.mT @ w)
    assert clip_by_gram(w, lam, v, 1e-6, 1e-22) is None
    found = clip_by_gram(w, lam, v, 1e-6, 1e-11)
    assert found is not None
    assert (found[0] - clipped(w, 1e-6)).norm() <= 1e-11
    # Eigenvectors of another matrix, where nearly as much is allowed as is expected.
    even = with_spectrum(torch.linspace(2.0, 0.5, 80, dtype=torch.float64), 80, 8).float()
    lam, v = torch.linalg.eigh(even.mT @ even)
    tight = 3 * module._SAFETY * torch.finfo(torch.float32).eps * 0.4
    assert clip_by_gram(even, lam, torch.linalg.qr(v + 1e-3 * random((80, 80), 9).float()).Q, 0.1, tight) is None


def test_zero_matrices_of_every_kind() -> None:
    for n in (1, 2, 70):
        w = torch.zeros(n, n)
        found = clip_by_gram(w, torch.zeros(n), torch.eye(n), 0.5, 1e-6)
        assert found is not None
        assert found[1] == 0
        assert torch.equal(found[0], w)


def test_residuals_are_of_their_size() -> None:
    # The estimate, from four samples: at rounding for eigenvectors, else within a factor of what it estimates.
    z = with_spectrum(torch.linspace(3.0, 0.1, 60, dtype=torch.float64), 80, 1)
    lam, v = (x.flip(-1)[..., :10] for x in torch.linalg.eigh(z.mT @ z))
    assert probed_residual(z, v, lam, lam.rsqrt()) <= 1e-13
    turned = torch.linalg.qr(v + 1e-4 * random((60, 10), 3)).Q
    residual = (z.mT @ (z @ turned) - turned * lam) / lam.sqrt()
    expected = math.sqrt(1.25) * float(residual.norm())
    assert probed_residual(z, turned, lam, lam.rsqrt()) == pytest.approx(expected, rel=0.6)
    assert probed_residual(z, v[:, :0], lam[:0], lam[:0]) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_thresholds_far_below_the_largest_singular_value(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(50, 160, (1,), generator=generator))
    m = n + int(torch.randint(0, 3, (1,), generator=generator)) * n
    for name, s in spectra(n).items():
        w = with_spectrum(s, m, 10 * seed).to(dtype)
        for t in (float(s[0]) * 10 ** float(-5 * torch.rand(1, generator=generator)), float(s[n // 2]) or 1e-4):
            truth = w.double() - clipped(w, t)
            kept = torch.linalg.svdvals(truth)
            eps = torch.finfo(dtype).eps
            # As documented for the fast routes, and 6 eps * |s| more for rounding at the end and in the float64 SVDs.
            share = 8e-6 if dtype == torch.float32 else 1e-12
            bound = max(share * float(kept.norm()), 8 * eps * float(s.norm())) + 6 * eps * float(s.norm())
            for x in (w, w.mT):
                p = singular_value_threshold(x, t, "gram")
                assert (p - (truth if x is w else truth.mT)).norm() <= bound, name
                inside = project_operator_ball(x, t, "gram")
                assert torch.linalg.svdvals(inside.double())[0] <= t + 1e-5 * t + 4 * eps * float(s[0]), name
