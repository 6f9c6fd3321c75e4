"""Halley's iteration: its weights, its proof, what it refuses, and where the dispatch takes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from groundstate.norms import polar as module
from groundstate.norms.halley import halley_polar, weights
from groundstate.norms.polar import polar, polar_and_spectrum
from groundstate.norms.spectral import tolerance


def orthonormal(m: int, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q


def with_spectrum(m: int, s: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float32 matrix, and its polar factor."""
    u, v = orthonormal(m, len(s), seed), orthonormal(len(s), len(s), seed + 1)
    return (u * s @ v.mT).float(), u @ v.mT


def halley(w: Tensor) -> tuple[Tensor, Tensor] | None:
    return halley_polar(w, w.mT @ w, tolerance(w))


def spectra(n: int) -> dict[str, Tensor]:
    index = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "exponential": torch.logspace(0, -3, n, dtype=torch.float64),
        "power": index**-0.7,
        "even": torch.linspace(1, 0.5, n, dtype=torch.float64),
        "one small": torch.where(index < n, 1.0, 1e-3),
        "one large": torch.where(index > 1, 1e-2, 1.0),
        "equal": torch.ones(n, dtype=torch.float64),
    }


@pytest.mark.parametrize("lower", [1e-7, 1e-4, 1e-2, 0.3, 0.9, 1.0])
def test_weights_take_the_interval_where_they_say(lower: float) -> None:
    a, b, c, after = weights(lower)
    x = torch.logspace(torch.log10(torch.tensor(lower)), 0, 20001, dtype=torch.float64).clamp(lower, 1.0)
    image = x * (a + b * x.square()) / (1 + c * x.square())
    # Rounding of weights that are as large as 1 / lower, and of the interval's ends.
    assert float(image.min()) >= after * (1 - 1e-6)
    assert float(image.max()) <= 1 + 1e-6
    assert after >= lower
    if lower < 0.5:  # the best function of its degree attains both ends inside too, or a larger lower end existed
        assert float(image[1:-1].max()) == pytest.approx(1.0, abs=1e-3)
        assert float(image[2000:].min()) == pytest.approx(after, rel=1e-2)


@pytest.mark.parametrize("rows", [1.0, 1.2])
@pytest.mark.parametrize("n", [5, 60, 200])
def test_it_is_the_polar_factor(n: int, rows: float) -> None:
    for name, s in spectra(n).items():
        w, exact = with_spectrum(round(rows * n), s, seed=n)
        found = halley(w)
        assert found is not None, name
        q, value = found
        # 8e-4 is allowed for the estimated rounding, which is twice to ten times the true one; the series adds 1e-4.
        assert float((q.double() - exact).norm()) <= 6e-4 * n**0.5, name
        # A residual of 2e-4 moves every singular value by half of that at most, and mostly by far less.
        assert float(value) == pytest.approx(float(s.sum()), rel=3e-5), name


def test_a_matrix_without_full_rank_is_refused() -> None:
    for n in (4, 100):
        s = torch.logspace(0, -2, n, dtype=torch.float64)
        for few in (1, n // 2):
            s[-few:] = 0
            assert halley(with_spectrum(n, s)[0]) is None
        twins = with_spectrum(n, torch.logspace(0, -1, n, dtype=torch.float64))[0]
        twins[:, 1] = twins[:, 0]
        assert halley(twins) is None
        twins[:, 0] = 0
        assert halley(twins) is None
    assert halley(torch.zeros(6, 6)) is None


def test_singular_values_below_the_threshold_are_refused() -> None:
    n = 120
    s = torch.logspace(0, -2, n, dtype=torch.float64)
    for share, taken in ((0.9, False), (0.5, False), (0.0, False)):
        s[-1] = share * tolerance(torch.empty(n, n))
        assert (halley(with_spectrum(n, s)[0]) is not None) is taken


def test_a_wrong_start_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever inverse iteration says, a singular value that the interval leaves out shows in the residual."""
    for least in (0.0, 1e-5, 1e-4):
        s = torch.logspace(0, -1, 80, dtype=torch.float64)
        s[-1] = least
        monkeypatch.setattr("groundstate.norms.halley._smallest", lambda x, gram: 0.1)
        assert halley(with_spectrum(80, s)[0]) is None


def test_the_dispatch_takes_it_for_large_decaying_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def spy(tall: Tensor, gram: Tensor, zero: float) -> tuple[Tensor, Tensor] | None:
        found = halley_polar(tall, gram, zero)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(module, "halley_polar", spy)
    n = 400
    for rows in (n, n + 40):
        w, exact = with_spectrum(rows, torch.logspace(0, -3, n, dtype=torch.float64))
        for x, q in ((w, exact), (w.mT.contiguous(), exact.mT)):
            calls.clear()
            assert float((polar(x)[0].double() - q).norm()) <= 6e-4 * n**0.5
            assert calls == [True]
        assert len(polar_and_spectrum(w)[1]) == n  # which needs eigenvalues
        assert calls == [True]
    calls.clear()
    polar(torch.rand(n, n, generator=torch.Generator().manual_seed(0)) - 0.5)  # even enough for the Gram matrix
    polar(with_spectrum(300, torch.logspace(0, -3, 300, dtype=torch.float64))[0])
    assert not calls
