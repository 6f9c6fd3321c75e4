"""What the routes to the polar factor rest on: best coefficients, proved residuals, symmetric products, the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from groundstate.cli.main import app
from groundstate.norms import polar_table, polar_tune
from groundstate.norms.polar_express import coefficients, inverse_root
from groundstate.norms.polar_gram import complete_symmetric, fill_symmetric, symmetric_product
from groundstate.norms.polar_table import Constants


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("n", [2, 60, 300])
def test_the_residual_of_an_inverse_root_is_within_the_target(n: int, share: float) -> None:
    w = random(round(n / share), n)
    gram = (w.mT @ w).float()
    z = inverse_root(gram, 4e-4)
    assert (z is not None) or share > 0.2 or n == 2  # a random matrix of this shape is what was guessed
    if z is not None:
        lam, v = torch.linalg.eigh(w.mT @ w)
        off = w @ z.double() - w @ (v * lam.rsqrt() @ v.mT)
        # The estimate of the residual from a few vectors may be half the truth.
        assert float(off.norm()) <= 8e-4 * n**0.5


def test_a_missing_or_a_small_direction_is_never_proved() -> None:
    n = 100
    u, v = torch.linalg.qr(random(150, n)).Q, torch.linalg.qr(random(n, n, seed=1)).Q
    for least in (0.0, 1e-4, 0.01, 0.03):
        for few in (1, 3, 10):
            for largest in (1.0, 3.0):
                s = torch.linspace(1, 0.7, n, dtype=torch.float64)
                s[-few:], s[0] = least, largest
                for basis in (v, torch.eye(n, dtype=torch.float64)):
                    w = u * s @ basis.mT
                    assert inverse_root((w.mT @ w).float(), 4e-4) is None
    assert inverse_root(torch.zeros(3, 3), 1e-4) is None


@pytest.mark.parametrize("n", [1, 2, 3, 127, 259, 801])
def test_symmetric_products(n: int) -> None:
    a = random(n, 330)
    exact = a @ a.mT
    out = torch.full((n, n), torch.nan, dtype=torch.float64)
    assert torch.allclose(symmetric_product(a), exact, rtol=0, atol=1e-11)
    assert symmetric_product(a, out=out) is out
    assert torch.allclose(out, exact, rtol=0, atol=1e-11)
    assert torch.allclose(symmetric_product(torch.stack([a, 2 * a]))[1], 4 * exact, rtol=0, atol=1e-11)
    if n > 1:
        out.fill_(torch.nan)[: n // 2, : n // 2] = exact[: n // 2, : n // 2]
        complete_symmetric(out, a)
        assert torch.allclose(out.tril(), exact.tril(), rtol=0, atol=1e-11)
        fill_symmetric(out, exact, exact)
        assert torch.allclose(out, exact @ exact, rtol=1e-9)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "deep" / "polar.json"
    monkeypatch.setenv("GROUNDSTATE_POLAR_TABLE", str(path))
    polar_table.constants.cache_clear()
    yield path
    polar_table.constants.cache_clear()


def test_the_table_of_the_user_counts(table: Path) -> None:
    assert polar_table.location() == table
    assert polar_table.constants("cpu") == polar_table.constants("mps") == Constants()
    assert polar_table.write("cpu", Constants(tiny=50)) == table
    polar_table.write("cuda", Constants(tiny=70))
    assert (polar_table.constants("cpu").tiny, polar_table.constants("cuda").tiny) == (50, 70)
    assert json.loads(table.read_text(encoding="utf-8"))["cpu"] == Constants(tiny=50)._asdict()
    table.write_text('{"cpu": {"tiny": 60}}', encoding="utf-8")  # what is not said keeps its default
    polar_table.constants.cache_clear()
    assert polar_table.constants("cpu") == Constants(tiny=60)


@pytest.mark.parametrize(
    "text",
    ["", "[1]", '{"cpu": 3}', '{"cpu": {"sides": 3}}', '{"cpu": {"tiny": true}}', '{"cpu": {"tiny": NaN}}', "\x00"],
)
def test_a_broken_table_is_ignored_and_replaced(table: Path, text: str) -> None:
    table.parent.mkdir()
    table.write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"polar\.json is not used"):
        assert polar_table.constants("cpu") == Constants()
    assert polar_table.constants("cpu") == Constants()  # said once
    with pytest.warns(UserWarning, match="bench --tune"):
        polar_table.write("cpu", Constants(tiny=3))
    assert polar_table.constants("cpu") == Constants(tiny=3)


def test_a_table_that_cannot_be_read_is_ignored(table: Path) -> None:
    table.mkdir(parents=True)
    with pytest.warns(UserWarning, match="is not used"):
        assert polar_table.constants("cpu") == Constants()


def test_tuning_moves_constants_to_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for times, expected in ((0.5, (0.0, 0.0, 2.0, 2.0)), (2.0, (12.0, 16.0, Constants().even, 0.03))):
        monkeypatch.setattr(polar_tune, "_SIDES", (8, 12))
        monkeypatch.setattr(polar_tune, "_SQUARES", (16,))
        monkeypatch.setattr(polar_tune, "faster", lambda *a, times=times: times)
        found = polar_tune.tune(repeat=1)
        assert (found.tiny, found.square, found.even, found.small) == expected
        assert found.aspect == Constants().aspect


def test_the_command_shows_and_writes(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polar_tune, "_SIDES", (4, 6))
    monkeypatch.setattr(polar_tune, "_SQUARES", (5,))
    monkeypatch.setattr(polar_tune, "_TALL", 8)
    monkeypatch.setattr(polar_tune, "_SQUARE", 12)
    shown = CliRunner().invoke(app, ["bench"])
    assert shown.exit_code == 0
    assert "--tune" in shown.stdout
    assert not table.exists()
    found = CliRunner().invoke(app, ["bench", "--tune", "--repeat", "1", "--json"])
    assert found.exit_code == 0, found.stderr
    body = json.loads(found.stdout)
    assert body["tuned"]
    assert body["constants"]["cpu"] == polar_table.constants("cpu")._asdict()
    assert CliRunner().invoke(app, ["bench", "--repeat", "0"]).exit_code == 2
