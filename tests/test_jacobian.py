"""Energies of the Jacobian by every route against dense Jacobians, for networks, outputs and inputs of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groundstate.energies.dirichlet import Dirichlet
from groundstate.energies.jacobian import JacobianEnergy
from groundstate.errors import UsageError
from groundstate.jacobian import exact
from groundstate.jacobian.function import function
from groundstate.jacobian.plan import plan_for
from jacobian_helpers import BY_ROUTE, Skip, dense, filled, gen, mlp, randn

ROUTES = ("closed_form", "loop", "batched", "jvp", "fd")


def svdvals(j: Tensor) -> Tensor:
    return torch.linalg.svdvals(j)


OF_JACOBIAN: dict[str, Callable[[Tensor], Tensor]] = {
    "dirichlet": lambda j: j.square().sum((1, 2)),
    "frobenius": lambda j: j.square().sum((1, 2)).sqrt(),
    "spectral": lambda j: svdvals(j)[:, 0],
    "nuclear": lambda j: svdvals(j).sum(1),
}


# ---------------------------------------------------------------------- routes against dense Jacobians


class Functional(nn.Module):
    """Activations and reshapes as functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.a(x.view(x.shape[0], -1)))
        h = functional.dropout(torch.tanh(self.b(h)), 0.5, self.training)
        return self.c(functional.leaky_relu(h, negative_slope=0.2))


class PerPosition(nn.Module):
    """Linear layers on the last of three dimensions: a chain of modules, but not of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Scalars(nn.Module):
    """Takes one number per sample, ``(B,)``."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x[:, None])))


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    chain: bool = True


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.GELU(),
        nn.AvgPool2d(2, 1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


NETS = {
    "relu": Net(lambda: mlp(6, 8, 7, 3), (6,)),
    "leaky": Net(lambda: mlp(6, 8, 7, 3, activation=lambda: nn.LeakyReLU(0.2, inplace=True)), (6,)),
    "prelu": Net(lambda: mlp(6, 8, 3, activation=nn.PReLU), (6,)),
    "tanh": Net(lambda: mlp(6, 8, 7, 3, activation=nn.Tanh), (6,)),
    "gelu": Net(lambda: mlp(6, 8, 3, activation=nn.GELU), (6,)),
    "functional": Net(Functional, (2, 3)),
    "inputs first": Net(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(6, 3)), (2, 3)),
    "activation last": Net(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh()), (4,)),
    "slopes last, many outputs": Net(lambda: nn.Sequential(nn.Linear(2, 5), nn.Softplus()), (2,)),
    "dropout": Net(lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Dropout(0.7), nn.Linear(9, 4)).train(), (5,)),
    "only matrices": Net(lambda: nn.Sequential(nn.Linear(5, 4), nn.Identity(), nn.Linear(4, 3)), (5,)),
    "one matrix": Net(lambda: nn.Linear(5, 3), (5,)),
    "autoencoder": Net(lambda: mlp(4, 8, 9, activation=nn.ReLU), (4,)),
    "narrow": Net(lambda: mlp(5, 2, 4, activation=nn.Tanh), (5,)),
    "one output": Net(lambda: mlp(5, 8, 1), (5,)),
    "one input": Net(lambda: mlp(1, 8, 3, activation=nn.Tanh), (1,)),
    "one of each": Net(lambda: mlp(1, 4, 1, activation=nn.Tanh), (1,)),
    "convolutions": Net(convolutional, (2, 6, 6), chain=False),
    "batch norm": Net(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)).train(),
        (5,),
        chain=False,
    ),
    "layer norm": Net(lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (5,), chain=False),
    "skip": Net(Skip, (5,), chain=False),
    "scalars": Net(Scalars, (), chain=False),
    "per position": Net(PerPosition, (3, 2), chain=False),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", NETS)
def test_every_route_gives_values_and_gradients_of_the_dense_jacobian(name: str, route: str) -> None:
    net = NETS[name]
    model, x = filled(net.make(), 1), randn(4, *net.shape, seed=2)
    agree(model, x, route, net.chain, lambda x: model(x.clone()))


def agree(
    model: nn.Module, x: Tensor, route: str, chain: bool, f: Callable[[Tensor], Tensor], start: Tensor | None = None,
    y: Tensor | None = None, **which: str,
) -> None:  # fmt: skip
    """All four energies by ``route`` against those of the dense Jacobian of ``f``, with gradients."""
    refused = "no closed form" if route == "closed_form" and not chain else None
    if route == "jvp" and (which.get("on") in ("probabilities", "loss") or any(map(is_layer_norm, model.modules()))):
        refused = "forward mode cannot be differentiated here"  # torch has no formula, or a wrong one
    if refused:
        with pytest.raises(UsageError, match=refused):
            _with(BY_ROUTE["nuclear"](route), **which).value(model, x, y, probe=gen())
        return
    modes = [m.training for m in model.modules()]
    model.eval()
    j, parameters = dense(f, x if start is None else start), list(model.parameters())
    for m, mode in zip(model.modules(), modes, strict=True):
        m.training = mode
    # products of float64 matrices; by central differences (eps |f| / h, h = eps^(1/3)) 1e-10 for J, a little more after
    # the square root of a Gram and in the gradient
    accuracy = 1e-6 if route == "fd" else 1e-10
    for energy, of in OF_JACOBIAN.items():
        expected = of(j).mean()
        found = _with(BY_ROUTE[energy](route), **which).value(model, x, y, probe=gen())
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=accuracy), (energy, route)
        wanted = torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True)
        given = torch.autograd.grad(found, parameters, allow_unused=True)
        scale = max(float(w.abs().max()) for w in wanted if w is not None)
        for w, g in zip(wanted, given, strict=True):
            w, g = (torch.zeros(()) if t is None else t for t in (w, g))
            assert float((w - g).abs().max()) <= 10 * accuracy * scale, (energy, route)
    assert [m.training for m in model.modules()] == modes


def is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)


def _with(energy: JacobianEnergy, **which: str) -> JacobianEnergy:
    return type(energy)(**{**vars(energy), **which})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_on_names_the_output(route: str, activation: type[nn.Module]) -> None:
    model, x, y = mlp(6, 8, 7, 4, activation=activation, seed=3), randn(5, 6, seed=4), torch.arange(5) % 4
    soft = randn(5, 4, seed=5).abs()

    def losses(targets: Tensor) -> Callable[[Tensor], Tensor]:
        each = iter(range(5))
        return lambda x: functional.cross_entropy(model(x), targets[next(each)][None])[None]

    agree(model, x, route, True, lambda x: model(x).softmax(-1), on="probabilities")
    agree(model, x, route, True, losses(y), y=y, on="loss")
    agree(model, x, route, True, losses(soft), y=soft, on="loss")
    agree(model, x, route, True, model[:2], on="1")
    agree(model, x, route, True, model[:3], on="2")


class Both(nn.Module):
    """Tuple and dictionary outputs, and a middle layer with a skip around it."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind, self.body, self.head = kind, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> object:
        h = torch.tanh(self.body(x))
        out = self.head(h) + h[:, :3]
        return {"h": h, "out": out} if self.kind is dict else (h, out)


@pytest.mark.parametrize("route", ROUTES)
def test_outputs_in_tuples_and_dictionaries_are_chosen_by_key(route: str) -> None:
    x = randn(4, 5, seed=6)
    for kind, key in ((dict, "out"), (tuple, 1), (tuple, -1)):
        model = filled(Both(kind), 7)
        agree(model, x, route, False, lambda x, model=model, key=key: model(x)[key], on=f"output:{key}")
        with pytest.raises(UsageError, match="output:KEY"):
            Dirichlet().value(model, x, probe=gen())
    with pytest.raises(UsageError, match="a tuple"):
        Dirichlet(on="output:2").value(filled(Both(tuple)), x, probe=gen())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(11, 3), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.rest(self.embedding(tokens))

    def rest(self, h: Tensor) -> Tensor:
        return self.head(functional.silu(self.mix(h.flatten(1))))


@pytest.mark.parametrize("route", ROUTES)
def test_wrt_names_the_input(route: str) -> None:
    model, x = mlp(6, 8, 7, 3, seed=8), randn(4, 6, seed=9)
    agree(model, x, route, True, model[2:], model[:2](x).detach(), wrt="1")
    agree(model, x, route, True, model[3:], model[:3](x).detach(), wrt="2")  # then an activation comes first
    both = {"wrt": "1", "on": "2"}
    agree(model, x, route, True, model[2:3], model[:2](x).detach(), **both)
    text = filled(Tokens(), 10)
    assert isinstance(text, Tokens)
    tokens = torch.randint(11, (4, 4), generator=gen(11))
    agree(text, tokens, route, False, text.rest, text.embedding(tokens).detach(), wrt="embedding")
    with pytest.raises(UsageError, match="wrt='embedding'"):
        Dirichlet().value(text, tokens, probe=gen())


def test_an_output_before_the_input_is_an_error() -> None:
    model = mlp(5, 4, 3, activation=nn.Tanh)
    with pytest.raises(UsageError, match="no gradient by the input"):
        Dirichlet(on="0", wrt="1").value(model, randn(4, 5), probe=gen())


# ---------------------------------------------------------------------- the choice of a route


def test_the_choice_is_made_once_and_told() -> None:
    model, x = filled(convolutional(), 38), randn(3, 2, 6, 6, seed=39)
    for differentiable in (False, True):
        with function(model, x) as (run, points):
            plan = plan_for(run, points)
            name = exact.chosen(run, points, plan, "auto", differentiable)
            assert name in ("loop", "batched")
            assert plan.routes[differentiable][0] == name
            assert "ms" in plan.routes[differentiable][1]
            assert plan_for(run, points) is plan
    with function(mlp(2, 8, 40, activation=nn.Tanh), randn(3, 2)) as (run, points):
        assert exact.chosen(run, points, plan_for(run, points), "auto", False) == "closed_form"
    wide = filled(nn.Sequential(nn.Linear(2, 40), nn.LayerNorm(40)))
    with function(wide, randn(3, 2)) as (run, points):  # 40 passes back, or 2 forward
        assert exact.chosen(run, points, plan_for(run, points), "auto", False) == "jvp"
    for wrong in ("svd", ""):
        with pytest.raises(UsageError, match="route must be"):
            Dirichlet(route=wrong)


def test_large_batches_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = filled(Skip(), 40), randn(10, 5, seed=41)
    with function(model, x) as (run, points):
        whole = exact.output_gram(run, points, route="loop")
        monkeypatch.setattr(exact, "_LARGEST", 3 * 15)
        parts = exact.output_gram(run, points, route="loop")
    assert torch.allclose(whole, parts, rtol=1e-13)  # the same products in other batches
