"""What the iterations for the polar factor rest on: best coefficients, proved residuals, and the table of routes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from groundstate.errors import DataError
from groundstate.norms import polar_table, polar_tune
from groundstate.norms.polar_express import (
    coefficients,
    deviation,
    express,
    express_gram,
    next_step,
    symmetric_product,
)
from groundstate.norms.polar_table import Constants
from groundstate.norms.qdwh import halley_gram, halley_step, largest, qdwh, smallest, weights


def with_spectrum(s: Tensor, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(k, len(s), generator=generator, dtype=torch.float64)).Q for k in (rows, len(s)))
    return (u * s @ v.mT)[None]


@pytest.mark.parametrize("lower", [1e-8, 1e-5, 1e-3, 0.03, 0.3, 0.8, 0.99, 0.9995])
@pytest.mark.parametrize("upper", [1.0, 1.7])
def test_coefficients_are_best(lower: float, upper: float) -> None:
    a, b, c, error = coefficients(lower * upper, upper)
    x = torch.linspace(lower * upper, upper, 20001, dtype=torch.float64)
    off = 1 - (a * x + b * x**3 + c * x**5)
    assert float(off.abs().max()) <= error * (1 + 1e-6) + 1e-15  # the sign changes hold up to rounding
    if lower < 0.99:  # attained four times with alternating signs, which by Chebyshev no better quintic allows
        at = off.abs() > 0.999 * error
        signs = off[at].sign()
        assert int((signs[1:] != signs[:-1]).sum()) == 3
        assert float(off[0]) == pytest.approx(error, rel=1e-6)
        assert float(off[-1]) == pytest.approx(-error, rel=1e-6)


def test_taylor_polynomials_leave_what_the_bounds_say() -> None:
    """1 - (1 - r) p(r)^2 for the three polynomials, exactly, and the bounds from the norms of R."""
    for size in (0.01, 0.1, 0.25):
        r = torch.linspace(-size, size, 40, dtype=torch.float64)
        for target in (1.0, 0.05 * size**2, size**4 / 2):
            step = next_step(torch.diag(r)[None], 0.9999, 1.0, target)
            if step.residual.isinf():
                continue
            p = step.factor[0].diagonal()
            left = torch.linalg.vector_norm(1 - (1 - r) * p * p) / math.sqrt(40)
            assert float(left) <= float(step.residual) * (1 + 1e-9) <= target * (1 + 1e-9)
            assert float(p.max()) <= step.gain


@pytest.mark.parametrize("lower", [1e-4, 0.01, 0.2, 0.9])
@pytest.mark.parametrize("guess", [0.05, 1.0, 20.0])
def test_a_wrong_guess_costs_steps_not_accuracy(lower: float, guess: float) -> None:
    s = torch.logspace(0, math.log10(lower), 30, dtype=torch.float64)
    w = with_spectrum(s, 45)
    q, residual, gain = express(w, min(1.0, guess * lower), 1e-12, limit=40)
    true = float(torch.linalg.vector_norm(deviation(q.mT @ q))) / math.sqrt(30)
    assert true <= float(residual) + 1e-14  # proved, up to rounding in the test
    assert float(residual) <= 1e-12
    u, _, vh = torch.linalg.svd(w, full_matrices=False)
    # Rounding at condition 1 / lower.
    assert torch.allclose(q, u @ vh, rtol=0, atol=1e-12 + 1e-14 / lower)
    assert gain >= 1 / lower * 0.999  # the smallest singular value grew to 1


def test_a_missing_direction_is_never_proved() -> None:
    s = torch.linspace(1, 0.5, 30, dtype=torch.float64)
    s[-1] = 0
    w = with_spectrum(s, 40)
    _, residual, _ = express(w, 0.5, 1e-10)
    assert float(residual) >= 0.99 / math.sqrt(30) or residual.isnan()
    q, error = qdwh(w.float(), 30 * 1.2e-7, 1e-3, 1e-4, 0.5)
    assert error.isinf().all()
    assert q.shape == w.shape
    both = torch.cat([w, with_spectrum(s.clamp_min(0.4), 40)])
    q, error = qdwh(both, 30 * 2.2e-16, 1e-11, 1e-13, 0.5)
    assert error.isinf().tolist() == [True, False]
    u, _, vh = torch.linalg.svd(both[1], full_matrices=False)
    assert torch.allclose(q[1], u @ vh, rtol=0, atol=1e-12)


def test_gram_iteration_gives_the_inverse_root() -> None:
    s = torch.linspace(1, 0.3, 25, dtype=torch.float64)
    a = with_spectrum(s * s, 25)
    a = a @ a.mT
    lam, v = torch.linalg.eigh(a)
    start = torch.eye(25, dtype=torch.float64)[None] / lam.max().sqrt()
    z, residual, _ = express_gram(start, a / lam.max(), 0.09, 1e-12, limit=8)
    assert float(residual) <= 1e-12
    assert torch.allclose(z, v @ (lam.rsqrt()[..., None] * v.mT), rtol=1e-9)  # condition of A^(-1/2) is 11


@pytest.mark.parametrize("lower", [1e-6, 1e-3, 0.1, 0.6, 0.999])
def test_halley_weights_keep_one_and_lift_the_interval(lower: float) -> None:
    a, b, c, after = weights(lower)
    x = torch.logspace(math.log10(lower), 0, 5001, dtype=torch.float64)
    y = x * (a + b * x * x) / (1 + c * x * x)
    assert float(y[-1]) == pytest.approx(1, rel=1e-12)
    assert float(y.max()) <= 1 + 1e-12
    assert float(y.min()) == pytest.approx(after, rel=1e-6)  # cancellation in d at tiny l
    assert after > 3 * lower or after > 0.9


def test_halley_step_estimates_its_rounding() -> None:
    for power, n in ((-3.0, 60), (-4.0, 90), (-1.0, 60)):
        w = with_spectrum(torch.logspace(0, power, n, dtype=torch.float64), n + 9)
        exact = torch.linalg.svd(w, full_matrices=False)
        x, lower, gain, error = halley_step(w.float(), w.float().mT @ w.float(), 10**power, 1.0)
        after = torch.linalg.svd(x.double(), full_matrices=False)
        off = float((after.U @ after.Vh - exact.U @ exact.Vh).norm()) / math.sqrt(n)
        assert off <= float(error)
        assert float(after.S.min()) >= lower * 0.99
        assert float(after.S.max()) <= 1.001
        assert gain >= lower * 10**-power * 0.99


def test_estimates_of_the_extreme_singular_values() -> None:
    for n in (5, 40, 120):
        for s in (torch.logspace(0, -3, n), torch.linspace(1, 0.01, n), torch.ones(n)):
            w = with_spectrum(s.double(), n + 3).float()
            gram = w.mT @ w
            assert 0.9 <= float(largest(gram)) <= 1.03  # from below, with 2 per cent on top
            found = float(smallest(w, gram))
            assert 0.999 * float(s.min()) - 1e-6 <= found <= 3 * float(s.min())
    singular = with_spectrum(torch.linspace(1, 0, 40, dtype=torch.float64), 40).float()
    assert float(smallest(singular, singular.mT @ singular)) < 1e-5
    zero = torch.zeros(2, 4, 4)
    assert float(largest(zero).max()) < 1e-30
    assert smallest(zero, zero).tolist() == [0.0, 0.0]


def test_halley_on_the_gram_matrix_knows_its_limits() -> None:
    for s, fit in (
        (torch.linspace(1, 0.4, 64), True),
        (torch.ones(64), True),
        (torch.linspace(1, 0.4, 64) * (torch.arange(64) < 40), False),
        (torch.linspace(1, 0.4, 64) * (torch.arange(64) < 63), False),
        (torch.logspace(0, -3, 64), False),
    ):
        w = with_spectrum(s.double(), 200).float()
        q, value, error = halley_gram(w, 1e-4, 1e-5)
        assert bool(error.isfinite()) == fit
        if fit:
            u, _, vh = torch.linalg.svd(w.double(), full_matrices=False)
            assert (q - u @ vh).norm() <= float(error) * 8  # sqrt(64), as error is relative to ||Q||
            assert float(value) == pytest.approx(float(s.sum()), rel=1e-6)


@pytest.mark.parametrize("n", [3, 255, 257, 1030])
def test_symmetric_products(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(2, 7, n, generator=generator, dtype=torch.float64)
    assert torch.allclose(symmetric_product(a), a.mT @ a, rtol=0, atol=1e-13)
    if n < 1000:
        g = a.mT @ a
        assert torch.allclose(symmetric_product(g, g @ g), g @ g @ g, rtol=1e-10)  # norms of g^3 about 1e8


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "deep" / "polar.json"
    monkeypatch.setenv("GROUNDSTATE_POLAR_TABLE", str(path))
    polar_table.constants.cache_clear()
    yield path
    polar_table.constants.cache_clear()


def test_the_table_of_the_user_counts(table: Path) -> None:
    assert polar_table.location() == table
    assert polar_table.constants("cpu") == Constants()
    assert polar_table.constants("mps") == polar_table.constants("cuda")
    assert polar_table.write("cpu", Constants(side=50)) == table
    polar_table.write("cuda", Constants(side=70))
    assert (polar_table.constants("cpu").side, polar_table.constants("cuda").side) == (50, 70)
    table.write_text('{"cpu": {"side": 60}}', encoding="utf-8")  # what is not said keeps its default
    polar_table.constants.cache_clear()
    assert polar_table.constants("cpu") == Constants(side=60)


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"cpu": 3}', '{"cpu": {"sides": 3}}', '{"cpu": {"side": true}}', '{"cpu": {"side": NaN}}']
)
def test_a_broken_table_is_named(table: Path, text: str) -> None:
    table.parent.mkdir()
    table.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"polar\.json"):
        polar_table.constants("cpu")
    with pytest.raises(DataError, match="mend or delete"):
        polar_table.write("cpu", Constants())
    assert table.read_text(encoding="utf-8") == text


def test_the_file_is_plain_json(table: Path) -> None:
    polar_table.write("cpu", Constants())
    assert json.loads(table.read_text(encoding="utf-8"))["cpu"] == Constants()._asdict()


def test_tuning_only_moves_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tiny sizes; the times are whatever they are, the constants must be among what was tried."""
    monkeypatch.setattr(polar_tune, "_SIDES", (8, 12))
    monkeypatch.setattr(polar_tune, "_LARGE", (16, 24))
    monkeypatch.setattr(polar_tune, "_TALL", ((20, 4), (30, 5)))
    found = polar_tune.tune(repeat=1)
    assert found.side in (8, 12, 24)
    assert found.qdwh_side in (16, 24, 48)
    assert found.work in (320, 750, 1500)
    assert found._replace(side=0, work=0, qdwh_side=0) == Constants(side=0, work=0, qdwh_side=0)
