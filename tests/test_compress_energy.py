"""Energies on factors are those of the dense weights that the factors stand for, in value, gradient, place and name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from groundstate.blocks import as_matrix
from groundstate.cli.main import app
from groundstate.compress import Factorized, compress
from groundstate.compress_energy import EnergyOnFactors
from groundstate.compress_tune import fine_tune
from groundstate.energies import GraphEnergy, LogDet, Nuclear, SquaredFrobenius
from groundstate.energies.base import MatrixEnergy
from groundstate.energies.dirichlet import Dirichlet
from groundstate.errors import NonFiniteError, UsageError
from groundstate.regularizer import Regularizer

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(model: nn.Module, seed: int) -> Any:
    g = generator(seed)
    for p in model.double().parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=F64) / max(p[0].numel(), 1) ** 0.5
    return model


def mlp(seed: int) -> Any:
    """12-14-10-3; at rank 3 the first two layers are factored."""
    return filled(nn.Sequential(nn.Linear(12, 14), nn.ReLU(), nn.Linear(14, 10), nn.ReLU(), nn.Linear(10, 3)), seed)


def perturbed(model: Any, seed: int) -> Any:
    """Factors that no SVD would give."""
    g = generator(seed)
    for m in model.modules():
        if isinstance(m, Factorized):
            for factor in m.factors:
                factor.data += 0.3 * torch.randn(factor.shape, generator=g, dtype=F64)
    return model


def gradients(model: nn.Module, energy: Any, **options: Any) -> dict[str, Tensor]:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    EnergyOnFactors(model, energy, **options).add_gradients()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def product(m: Any) -> Tensor:
    return as_matrix(m.factors[1]) @ as_matrix(m.factors[0])


CONV = nn.Sequential(nn.Conv2d(4, 9, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(9, 8, 3), nn.Flatten())


@pytest.mark.parametrize("energy", [SquaredFrobenius(), LogDet(0.1), Nuclear()], ids=repr)
@pytest.mark.parametrize("dense", [mlp(1), filled(CONV, 2)], ids=["linear", "conv"])
def test_gradient_is_that_of_the_energy_of_the_product(dense: nn.Module, energy: MatrixEnergy) -> None:
    small = perturbed(compress(dense, rank=3).model, 3)
    found = gradients(small, 0.7 * energy)
    factored = [m for m in small.modules() if isinstance(m, Factorized)]
    assert len(factored) == 2
    factors = [f for m in factored for f in m.factors]
    if isinstance(energy, Nuclear):  # of rank 3 for certain: autograd of an SVD would divide by zeros
        total = sum(torch.linalg.svdvals(product(m))[:3].sum() for m in factored)
    else:
        total = torch.stack([energy.value(product(m)) for m in factored]).sum()
    expected = torch.autograd.grad(torch.as_tensor(0.7 * total), factors)
    names = {id(p): k for k, p in small.named_parameters()}
    for factor, gradient in zip(factors, expected):
        assert (found.pop(names[id(factor)]) - gradient).norm() <= 1e-9 * gradient.norm()  # float64
    assert all(not g.any() for g in found.values())


def test_nuclear_norm_at_balanced_factors_is_half_their_squares() -> None:
    small = compress(mlp(4), rank=4).model
    found = gradients(small, "0.5*nuclear")
    for name, p in small.named_parameters():
        if name.endswith((".0.weight", ".1.weight")):
            assert (found[name] - 0.5 * p.detach()).norm() <= 1e-12 * p.detach().norm()  # float64


def test_energy_of_the_network_sees_products_and_dense_layers_in_their_places() -> None:
    small = perturbed(compress(mlp(5), rank=3).model, 6)
    found = gradients(small, 0.2 * GraphEnergy())
    first, second = small[0], small[2]
    layers = [product(first).detach().requires_grad_(), product(second).detach().requires_grad_(), small[4].weight]
    value = 0.2 * GraphEnergy().value(layers)
    g1, g2 = torch.autograd.grad(value, layers[:2])
    for name, m, g in (("0", first, g1), ("2", second, g2)):
        a, b = m.factors
        assert (found[f"{name}.0.weight"] - b.mT @ g).norm() <= 1e-9 * g.norm()  # float64
        assert (found[f"{name}.1.weight"] - g @ a.mT).norm() <= 1e-9 * g.norm()
    assert not found["4.weight"].any()


def test_patterns_ties_and_frozen_factors() -> None:
    small: Any = compress(mlp(7), rank=3).model
    found = gradients(small, "squared_frobenius", select="2.*,4.*")
    assert {k for k, g in found.items() if g.any()} == {"2.0.weight", "2.1.weight"}
    tied = filled(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), 8)
    tied[1].weight = tied[0].weight
    once: Any = compress(tied, rank=2).model
    a, b = once[0].factors
    found = gradients(once, "squared_frobenius")
    assert torch.allclose(found["0.0.weight"], 2 * b.mT @ b @ a)  # counted once, as a tied weight is
    alone = compress(tied[0], rank=2).model
    assert set(gradients(alone, "nuclear")) == {"0.weight", "1.weight", "1.bias"}
    small.get_submodule("0").requires_grad_(False)
    new = fine_tune(small.float(), (torch.randn(30, 12), torch.arange(30) % 3), 1, energy="0.1*nuclear").model
    assert all(torch.equal(p, q) for p, q in zip(new.get_submodule("0").parameters(), small[0].parameters()))


def test_what_cannot_act_is_named() -> None:
    small: Any = compress(mlp(9), rank=3).model
    found = EnergyOnFactors(
        small, "nuclear@prox + 2*dirichlet + path_energy + graph@monitor + 0*l1 + k_support(k=2)", coupling="loss"
    )
    assert repr(found.energy) == "nuclear + 2.0*dirichlet + k_support(k=2)"
    (reason,) = found.left_out
    assert reason.startswith("path_energy: ")
    assert EnergyOnFactors(small, "nuclear", coupling="monitor").energy.terms == ()
    data = torch.randn(20, 12, dtype=F64), torch.arange(20) % 3
    with pytest.raises(UsageError, match="path_energy: it is an energy of the steps"):
        fine_tune(small, data, 1, energy="nuclear + path_energy")
    with pytest.raises(UsageError, match="none of the weights that were factored"):
        fine_tune(small, data, 1, energy="nuclear", select="4.weight")
    with pytest.raises(UsageError, match="no weight is selected"):
        fine_tune(small, data, 1, energy="nuclear", select="nothing")
    small[0][0].weight.data.fill_(1e200)
    small[0][1].weight.data.fill_(1e200)
    with pytest.raises(NonFiniteError, match=r"nuclear at 0\.weight"):
        gradients(small, "nuclear")


def test_fine_tune_minimizes_loss_and_energy_and_leaves_no_trace() -> None:
    small = compress(mlp(10).float(), rank=3).model
    x = torch.randn(200, 12, generator=generator(11))
    y = (x[:, :3] + 0.5 * x[:, 3:6]).argmax(1)
    before = copy.deepcopy(small.state_dict())
    plain = fine_tune(small, (x, y), 6, 1e-2)
    assert all(
        torch.equal(p, q)
        for p, q in zip(plain.model.parameters(), fine_tune(small, (x, y), 6, 1e-2).model.parameters())
    )
    for spec in ("0.05*nuclear", "0.05*graph", "0.05*dirichlet(samples=None)", "0.02*nuclear + 0.05*dirichlet"):
        kept = fine_tune(small, (x, y), 6, 1e-2, energy=spec)
        again = fine_tune(small, (x, y), 6, 1e-2, energy=spec)
        assert all(torch.equal(p, q) for p, q in zip(kept.model.parameters(), again.model.parameters()))
        assert kept.losses == again.losses
        assert kept.losses[-1] < kept.losses[0]
        assert all(p.grad is None for p in kept.model.parameters())
        if "nuclear" in spec:
            assert nuclear(kept.model) < 0.9 * nuclear(plain.model)
        if "dirichlet" in spec:
            values = [Dirichlet().estimate(m, x, probe=generator(0)).value for m in (kept.model, plain.model)]
            assert values[0] < 0.8 * values[1]
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def nuclear(model: Any) -> float:
    return sum(float(torch.linalg.svdvals(product(m).detach()).sum()) for m in model if isinstance(m, Factorized))


def test_full_rank_factors_take_the_step_that_the_dense_weight_asks_for() -> None:
    """With A = 1, to first order a step of B is a step of W: the whole chain, against a plain `Regularizer`."""
    dense = filled(nn.Sequential(nn.Linear(6, 20, bias=False)), 12)
    small: Any = compress(dense, rank=4).model
    a, b = small[0].factors
    a.data, b.data = torch.eye(4, 6, dtype=F64), torch.randn(20, 4, generator=generator(13), dtype=F64)
    dense[0].weight.data = (b @ a).detach()
    dense[0].weight.grad = torch.zeros_like(dense[0].weight)
    Regularizer(dense, "0.3*mhe + 0.1*l1").add_gradients()
    found = gradients(small, "0.3*mhe + 0.1*l1")
    assert torch.allclose(found["0.1.weight"], dense[0].weight.grad[:, :4], rtol=1e-9, atol=1e-12)  # float64


# On the command line


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress") / "run"
    energy = "1e-2*nuclear + 1e-4*path_energy"
    made = call("train", "--epochs", 1, "--energy", energy, "--train-size", 200, "--out", folder)
    assert made.exit_code == 0, made.stderr
    return folder


@pytest.mark.parametrize(
    ("option", "energy", "ending"),
    [
        ((), "0.01*nuclear", ""),
        (("",), "none", "-none"),
        (("1e-1*dirichlet",), "0.1*dirichlet", "-0.1-dirichlet"),
        (("0.1*nuclear@prox + l1@monitor",), "0.1*nuclear", "-0.1-nuclear-prox-l1-monitor"),
    ],
    ids=["keep", "none", "spec", "couplings"],
)
def test_verb_keeps_the_energy_of_the_run_unless_told_otherwise(
    run: Path, option: tuple[str, ...], energy: str, ending: str
) -> None:
    chosen = [part for value in option for part in ("--fine-tune-energy", value)]
    result = call("compress", run, "--rank", 3, "--fine-tune", 1, *chosen, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["fine_tune"]
    assert found["energy"] == energy
    assert len(found["energy_left_out"]) == (not option)
    assert ("left out of the fine-tune: path_energy: " in result.stderr) == (not option)
    assert (
        json.loads((run / f"compressed-rank-3-tuned-1{ending}" / "compressed.json").read_text())["fine_tune"] == found
    )


def test_verb_says_what_the_fine_tune_minimized(run: Path, tmp_path: Path) -> None:
    for energy, words in (("keep", "the loss + 0.01*nuclear"), ("none", "the loss alone")):
        result = call(
            "compress", run, "--rank", 3, "--fine-tune", 2, "--fine-tune-energy", energy, "--out", tmp_path / energy
        )
        assert result.exit_code == 0, result.stderr
        assert f"Fine-tune: 2 epochs at learning rate 0.001, minimizing {words}\n" in result.stdout


def test_verb_refuses_an_energy_without_a_fine_tune_or_unknown(run: Path) -> None:
    for arguments, words in (
        (("--fine-tune-energy", "none"), "--fine-tune-energy goes with"),
        (("--fine-tune", 1, "--fine-tune-energy", "nucular"), "nuclear"),
        (("--fine-tune", 1, "--fine-tune-energy", "path_energy"), "cannot act on the factors"),
    ):
        refused = call("compress", run, "--rank", 4, *arguments)
        assert refused.exit_code == 2, arguments
        assert words in refused.stderr
    assert not list(run.glob("compressed-rank-4*"))
