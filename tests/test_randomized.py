"""Randomized SVD: its result against a float64 SVD, its error against the true one, and its bound against bad luck."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.randomized import adaptive_svd, low_rank_error, randomized_svd, smallest_error


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(s: Tensor, m: int, n: int, seed: int = 1) -> Tensor:
    """A float64 matrix with singular values s."""
    u, v = (
        torch.linalg.qr(torch.randn(k, len(s), generator=generator(seed + k), dtype=torch.float64)).Q for k in (m, n)
    )
    return u * s @ v.mT


def powers(n: int, exponent: float) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64) ** -exponent


def product(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    return (u * s[..., None, :]) @ vh


def norms(e: Tensor) -> tuple[float, float]:
    return float(torch.linalg.matrix_norm(e, 2)), float(torch.linalg.matrix_norm(e))


SHAPES = [(80, 60), (60, 80), (150, 40), (60, 60)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("exponent", [0.5, 1.0, 3.0])
def test_error_is_near_the_best_and_never_below_it(shape: tuple[int, int], exponent: float) -> None:
    s = powers(min(shape), exponent)
    w = with_spectrum(s, *shape)
    for rank in (1, 5, 12):
        u, found, vh = randomized_svd(w, rank, generator=generator(rank))
        eye = torch.eye(rank, dtype=torch.float64)
        assert (u.mT @ u - eye).norm() < 1e-13  # float64
        assert (vh @ vh.mT - eye).norm() < 1e-13
        assert (found <= s[:rank] * (1 + 1e-13)).all()  # Ritz values stay below the singular values
        spectral, frobenius = norms(w - product(u, found, vh))
        # Ten columns and two passes: the expected excess is below (1 + small)^(1/5) even for exponent 0.5
        # (Halko et al., theorem 10.7 and corollary 10.10); 10 % is far beyond what was ever seen.
        assert float(s[rank]) * (1 - 1e-12) <= spectral <= 1.1 * float(s[rank])
        best = float(s[rank:].norm())
        assert best * (1 - 1e-12) <= frobenius <= 1.02 * best


def test_a_matrix_of_low_rank_is_found_exactly() -> None:
    w = with_spectrum(torch.tensor([3.0, 2.0, 1e-3], dtype=torch.float64), 50, 30)
    for power in (0, 1, 2):
        u, s, vh = randomized_svd(w, 3, oversample=0, power=power, generator=generator(2))
        assert norms(w - product(u, s, vh))[0] < 1e-13  # float64
    error = low_rank_error(w, u, s, vh, generator=generator(3))
    assert error.frobenius < 1e-13
    assert error.spectral < 1e-13


def test_batches_are_matrices_one_by_one() -> None:
    w = torch.stack([with_spectrum(powers(20, 3.0), 30, 20, seed) for seed in (1, 5)])
    u, s, vh = randomized_svd(w, 4, generator=generator(1))
    assert (u.shape, s.shape, vh.shape) == ((2, 30, 4), (2, 4), (2, 4, 20))
    assert torch.linalg.matrix_norm(w - product(u, s, vh), 2).max() <= 1.1 * 5.0**-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_measured_error_is_the_true_one_and_the_bound_holds(shape: tuple[int, int]) -> None:
    """1e-10 is the chance of one failure: none may be seen in a few hundred tries."""
    for seed in range(60):
        w = with_spectrum(powers(min(shape), 0.3 + 0.05 * (seed % 40)), *shape, seed=seed)
        u, s, vh = randomized_svd(w, 1 + seed % 9, oversample=seed % 4, power=seed % 3, generator=generator(seed))
        spectral, frobenius = norms(w - product(u, s, vh))
        found = low_rank_error(w, u, s, vh, generator=generator(1000 + seed))
        assert found.frobenius == pytest.approx(frobenius, rel=1e-12)
        assert spectral * (1 - 1e-12) <= found.spectral <= frobenius
        # At most (10 sqrt(2 / pi) times the longest of ten probes of E^9 over its norm)^(1/9); a probe is no longer
        # than 3 sqrt(150) but for chance: (8 * 37)^(1/9) < 2.
        assert found.spectral <= 2 * spectral
        assert found.failure == (0.0 if found.spectral == found.frobenius else pytest.approx(1e-10))


def test_bound_fails_as_rarely_as_it_says() -> None:
    """With one probe the lemma allows one failure in ten; E of rank 1 is its worst case, P(|w| < 0.125) = 0.0997."""
    e = torch.zeros(8, 8, dtype=torch.float64)
    e[0, 0] = 1.0
    nothing = torch.zeros(8, 0), torch.zeros(0), torch.zeros(0, 8)
    bounds = torch.tensor([low_rank_error(e, *nothing, probes=1, generator=generator(k)).spectral for k in range(2000)])
    share = float((bounds < 1).double().mean())
    assert abs(share - 0.0997) < 5 * math.sqrt(0.1 * 0.9 / 2000)  # five deviations of a share of 2000
    assert bounds.max() <= 1.0  # the Frobenius norm is a bound too


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adaptive_rank_keeps_the_tolerance_and_little_more(shape: tuple[int, int], norm: Any) -> None:
    s = powers(min(shape), 1.5)
    w = with_spectrum(s, *shape)
    tail = s if norm == "spectral" else s.square().flip(0).cumsum(0).flip(0).sqrt()
    for tolerance in (0.5, 0.1, 0.02):
        u, found, vh = adaptive_svd(w, tolerance, norm=norm, block=4, generator=generator(4))
        spectral, frobenius = norms(w - product(u, found, vh))
        whole = float(s[0]) if norm == "spectral" else float(s.norm())
        assert (spectral if norm == "spectral" else frobenius) <= tolerance * whole * (1 + 1e-12)
        least = int((tail > tolerance * whole).sum())
        # The spectral bound may be twice too large: singular values fall by 2 in 1.6 times as many ranks.
        most = least + 4 if norm == "frobenius" else math.ceil(2.0 ** (1 / 1.5) * least) + 4
        assert least <= len(found) <= most


def test_adaptive_rank_at_the_ends() -> None:
    assert adaptive_svd(torch.zeros(5, 3), 0.1, generator=generator(1))[1].shape == (0,)
    assert adaptive_svd(torch.zeros(0, 3), 0.1, generator=generator(1))[0].shape == (0, 0)
    w = torch.randn(9, 7, generator=generator(5), dtype=torch.float64)
    for block in (1, 3, 50):
        u, s, vh = adaptive_svd(w, 0.0, block=block, generator=generator(6))
        assert len(s) == 7
        assert (w - product(u, s, vh)).norm() < 1e-13  # float64
    low = with_spectrum(torch.tensor([2.0, 1.0], dtype=torch.float64), 40, 30)
    assert len(adaptive_svd(low, 0.0, generator=generator(7))[1]) == 2
    assert len(adaptive_svd(low.float(), 0.0, generator=generator(7))[1]) == 2


def test_adaptive_rank_is_the_smallest_or_one_more_after_the_last_pass() -> None:
    for exponent, tolerance in ((0.7, 0.5), (1.0, 0.2), (1.5, 0.02)):
        s = powers(200, exponent)
        w = with_spectrum(s, 300, 200)
        tail = s.square().flip(0).cumsum(0).flip(0).sqrt()
        least = int((tail > tolerance * float(s.norm())).sum())
        assert 8 <= least <= 60
        for seed in range(5):
            found = adaptive_svd(w, tolerance, block=10, generator=generator(seed))[1]
            assert least <= len(found) <= least + 1 + least // 20  # without the last pass it is a tenth more


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_adaptive_svd_gives_up_where_the_rank_allowed_will_not_do(norm: Any) -> None:
    w = with_spectrum(powers(100, 0.3), 120, 100)
    u, s, vh = adaptive_svd(w, 0.1, norm=norm, block=5, most=30, generator=generator(3))
    # what one block takes of this spectrum foretells that six will not do; in the spectral norm nothing is foretold
    assert len(s) == (10 if norm == "frobenius" else 30)
    error = low_rank_error(w, u, s, vh, generator=generator(4))
    assert (error.spectral if norm == "spectral" else error.frobenius) > 0.1 * norms(w)[norm == "frobenius"]
    low = with_spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 50, 40)
    for most in (3, 4, 40, 100):
        assert len(adaptive_svd(low, 0.01, norm=norm, most=most, generator=generator(5))[1]) == 3
    assert len(adaptive_svd(low, 0.01, norm=norm, most=2, generator=generator(5))[1]) == 2
    assert len(adaptive_svd(low, 0.01, norm=norm, most=0, generator=generator(5))[1]) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_any_scale_in_single_precision(scale: float) -> None:
    w = (with_spectrum(powers(40, 1.0), 60, 40) * scale).float()
    u, s, vh = randomized_svd(w, 5, generator=generator(8))
    exact = w.double()
    frobenius = float((exact - product(u.double(), s.double(), vh.double())).norm())
    found = low_rank_error(w, u, s, vh, generator=generator(9))
    assert found.frobenius == pytest.approx(frobenius, rel=1e-4)  # float32, the error is a third of the norm
    assert found.spectral >= (1 - 1e-4) * float(torch.linalg.matrix_norm(exact - product(u, s, vh).double(), 2))
    assert smallest_error(w, 5) == pytest.approx(float(powers(40, 1.0)[5:].norm()) * scale, rel=1e-2)
    assert len(adaptive_svd(w, 0.3, block=8, generator=generator(10))[1]) <= 10


def test_half_precision_zeros_and_one_row() -> None:
    u, s, vh = randomized_svd(torch.ones(6, 5, dtype=torch.bfloat16), 1, generator=generator(1))
    assert (u.dtype, s.tolist()) == (torch.float32, pytest.approx([math.sqrt(30)], rel=1e-6))
    u, s, vh = randomized_svd(torch.zeros(6, 5), 2, generator=generator(1))
    assert s.tolist() == [0.0, 0.0]
    assert low_rank_error(torch.zeros(6, 5), u, s, vh, generator=generator(2)) == (0.0, 0.0, 0.0)
    assert randomized_svd(torch.tensor([[3.0, 4.0]]), 1, generator=generator(1))[1].tolist() == pytest.approx([5.0])


def test_smallest_error_is_the_tail_or_none() -> None:
    s = powers(50, 0.7)
    w = with_spectrum(s, 50, 70)
    for rank in (0, 1, 20, 49):
        assert smallest_error(w, rank) == pytest.approx(float(s[rank:].norm()), rel=1e-8)  # float64, condition 16
        assert smallest_error(w.mT, rank) == smallest_error(w, rank)
    assert smallest_error(w, 50) == 0.0
    hidden = torch.diag(torch.tensor([1.0, 1e-6]))  # 1e-12 is below the rounding of a float32 Gram matrix
    assert smallest_error(hidden, 1) is None


def test_only_the_generator_is_used_and_it_decides() -> None:
    w = torch.randn(30, 20, generator=generator(1))
    state = torch.random.get_rng_state()
    one, two = (randomized_svd(w, 3, power=0, generator=generator(2)) for _ in range(2))
    other = randomized_svd(w, 3, power=0, generator=generator(3))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one[1], other[1])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 4}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": 1, "oversample": -1}, "oversample"),
        ({"rank": 1, "power": 1.5}, "power"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        randomized_svd(torch.ones(5, 3), **options, generator=generator(1))


def test_what_is_refused() -> None:
    g = generator(1)
    for bad in (math.nan, math.inf):
        w = torch.ones(5, 3)
        w[1, 1] = bad
        with pytest.raises(NonFiniteError):
            randomized_svd(w, 1, generator=g)
        with pytest.raises(NonFiniteError):
            adaptive_svd(w, 0.1, generator=g)
    for tolerance in (-0.1, 1.0, math.nan):
        with pytest.raises(UsageError, match="tolerance"):
            adaptive_svd(torch.ones(5, 3), tolerance, generator=g)
    with pytest.raises(UsageError, match="norm"):
        adaptive_svd(torch.ones(5, 3), 0.1, norm="nuclear", generator=g)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="block"):
        adaptive_svd(torch.ones(5, 3), 0.1, block=0, generator=g)
    with pytest.raises(UsageError, match="most"):
        adaptive_svd(torch.ones(5, 3), 0.1, most=-1, generator=g)
    with pytest.raises(UsageError, match="one matrix"):
        adaptive_svd(torch.ones(2, 5, 3), 0.1, generator=g)
    with pytest.raises(UsageError, match="probes"):
        low_rank_error(torch.ones(2, 2), torch.ones(2, 1), torch.ones(1), torch.ones(1, 2), probes=0, generator=g)
    with pytest.raises(UsageError, match="floating"):
        randomized_svd(torch.ones(3, 3, dtype=torch.int64), 1, generator=g)
