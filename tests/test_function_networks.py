"""Energies of the function for networks of all kinds, and what is remembered of a network and left on it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from groundstate.energies.dirichlet import Dirichlet
from groundstate.energies.jacobian import JacobianEnergy, JacobianFrobenius
from groundstate.errors import UsageError
from jacobian_helpers import ALL, EXACT, F64, PROBED, filled, gen, mixed, randn, same, value_and_gradient

# ---------------------------------------------------------------------- networks of all kinds


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.embed(x))
        return self.head(functional.scaled_dot_product_attention(h, h, h).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 2)
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        return self.head(checkpoint(self.body, h, use_reentrant=False) if self.on else self.body(h))


class Tied(nn.Module):
    """One weight at two places, and a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x.flatten(1)))))
        return self.twice(torch.relu_(self.twice(h)))[:, :2]


class Caching(nn.Module):
    """Keeps tensors of the last forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 6), nn.Linear(6, 2)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.tanh(self.body(x.flatten(1)))
        return self.head(self.last)


class Sampled(nn.Module):
    """Bilinear sampling of the input at places that depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.tanh(self.places(x.flatten(1))).view(-1, 1, 2, 2)
        return functional.grid_sample(x[:, None], grid, align_corners=False).flatten(1)


class CubeOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grads[0]


class Once(nn.Module):
    def __init__(self, own: bool = True) -> None:
        super().__init__()
        self.body, self.head, self.own = nn.Linear(12, 6), nn.Linear(6, 2), own

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        return self.head(CubeOnce.apply(h) if self.own else h**3)


KINDS = {cls.__name__: cls for cls in (Attention, Recurrent, Checkpointed, Tied, Caching, Sampled)}


def reference(name: str, model: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    """mean ||J||_F^2 by torch's own Jacobian in eval mode; its gradient by central differences."""
    model = copy.deepcopy(model).eval()
    if isinstance(model, Checkpointed):
        model.on = False

    def energy() -> float:
        total = 0.0
        for one in x:
            j = torch.autograd.functional.jacobian(model, one[None])
            assert isinstance(j, Tensor)
            total += float(j.square().sum())
        return total / len(x)

    here, slopes = energy(), []
    for seed in range(3):
        away = [randn(*p.shape, seed=100 * seed + i) for i, p in enumerate(model.parameters())]

        def at(h: float, away: list[Tensor] = away) -> float:
            with torch.no_grad():
                for p, d in zip(model.parameters(), away, strict=True):
                    p.add_(d, alpha=h)
                found = energy()
                for p, d in zip(model.parameters(), away, strict=True):
                    p.sub_(d, alpha=h)
            return found

        slopes.append((at(1e-5) - at(-1e-5)) / 2e-5)
    return here, torch.tensor(slopes, dtype=F64)


@pytest.mark.parametrize("name", KINDS)
def test_value_and_gradient_of_networks_of_all_kinds(name: str) -> None:
    model, x = filled(KINDS[name](), 8).train(), randn(3, 4, 3, seed=9)
    expected, slopes = reference(name, model, x)
    for _ in range(2):  # at first the choice is made, then it is used
        value, gradient = value_and_gradient(EXACT, model, x)
        assert value == pytest.approx(expected, rel=1e-9)
        for seed, slope in enumerate(slopes):
            away = [randn(*p.shape, seed=100 * seed + i).flatten() for i, p in enumerate(model.parameters())]
            # central differences with h = 1e-5
            assert float(torch.cat(away) @ gradient) == pytest.approx(float(slope), rel=1e-6, abs=1e-6 * expected)
    whole = Dirichlet(probes=2 if name != "Sampled" else 4, samples=None)
    assert value_and_gradient(whole, model, x)[0] == pytest.approx(expected, rel=1e-9)  # probes: all directions
    assert EXACT.estimate(model, x, probe=gen()).value == pytest.approx(expected, rel=1e-9)
    loss = model(x).square().sum()
    (loss + EXACT.value(model, x, probe=gen())).backward()  # beside a loss in train mode
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_network_without_second_derivative_is_differenced_with_a_warning() -> None:
    own, plain, x = filled(Once(), 10), filled(Once(own=False), 10), randn(4, 4, 3, seed=11)
    with pytest.warns(UserWarning, match=r"no derivative of the order needed .*finite differences"):
        value, gradient = value_and_gradient(EXACT, own, x)
    expected, slopes = value_and_gradient(EXACT, plain, x)
    assert value == pytest.approx(expected, rel=1e-7)  # central differences in float64
    assert float((gradient - slopes).norm()) <= 1e-6 * float(slopes.norm())
    value_and_gradient(EXACT, own, x)  # warned once
    with pytest.warns(UserWarning, match="finite differences are used"):
        PROBED.value(own, x, probe=gen())
    assert EXACT.estimate(own, x, probe=gen()).value == pytest.approx(expected, rel=1e-12)  # one derivative is there
    for energy in (
        Dirichlet(estimator="exact", route="loop"),
        JacobianFrobenius(route="batched"),
        Dirichlet(estimator="vjp"),
    ):
        with pytest.raises(UsageError, match="once_differentiable"):  # left to itself, autograd skips what is behind it
            energy.value(own, x, probe=gen())


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class Straight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(StraightThrough.apply(self.body(x)))


@pytest.mark.parametrize("energy", ALL[1:], ids=repr)
def test_derivatives_of_its_own_are_those_of_the_network(energy: JacobianEnergy) -> None:
    model, x = filled(Straight()), randn(4, 5)
    linear = nn.Sequential(model.body, model.head)  # what its derivative pretends
    same(energy, model, linear, x)


class NoGrad(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(5, 4), nn.Linear(4, 3), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "all":
            with torch.no_grad():
                return self.b(self.a(x))
        if self.how == "detach":
            return self.b(self.a(x).detach())
        with torch.no_grad():
            h = self.a(x)
        return self.b(h)


@pytest.mark.parametrize("how", ["all", "part", "detach"])
def test_a_network_that_detaches_is_refused(how: str) -> None:
    """Its Jacobian would come out as zero, or train layers that the loss does not reach."""
    model, x = filled(NoGrad(how)), randn(4, 5)
    for energy in ALL:
        for call in (energy.value, energy.estimate):
            with pytest.raises(UsageError, match=r"no gradient by the input.*no_grad"):
                call(model, x, probe=gen())
    assert float(Dirichlet(estimator="fd", samples=None).value(model, x, probe=gen()).detach()) > 0


def test_what_works_in_place_touches_neither_input_nor_value() -> None:
    model = filled(
        nn.Sequential(nn.ReLU(inplace=True), nn.Conv1d(1, 2, 3), nn.LeakyReLU(0.1, inplace=True), nn.Flatten())
    )
    x = randn(4, 1, 5, seed=12)
    kept, routes = x.clone(), ("loop", "batched", "jvp", "fd")
    for wrt in ("input", "0", "1"):
        found = [
            float(Dirichlet(estimator="exact", samples=None, route=r, wrt=wrt).value(model, x, probe=gen()).detach())
            for r in routes
        ]
        assert found == pytest.approx([found[0]] * 4, rel=1e-7)
        for estimator in ("vjp", "jvp", "fd"):
            Dirichlet(samples=None, estimator=estimator, wrt=wrt).value(model, x, probe=gen())
    assert torch.equal(x, kept)


def test_lazy_layers_and_inference_tensors_are_named() -> None:
    x = randn(4, 5, dtype=torch.float32)
    lazy = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2))
    with torch.inference_mode():
        made = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        given = randn(4, 5, dtype=torch.float32)
    for energy in ALL:
        with pytest.raises(UsageError, match="run one batch"):
            energy.value(lazy, x, probe=gen())
        with pytest.raises(UsageError, match="inference mode"):
            energy.value(made, x, probe=gen())
    lazy(x)
    for energy in ALL:
        energy.value(lazy, given, probe=gen())  # an input from inference mode is fine


# ---------------------------------------------------------------------- what is remembered, and what is left


def test_a_network_that_changes_is_seen_as_it_is() -> None:
    x = randn(6, 5, seed=13)
    for energy in ALL:
        model = mixed()

        def check(model: nn.Sequential = model, energy: JacobianEnergy = energy, rel: float = 1e-12) -> None:
            fresh = copy.deepcopy(model)
            for m in fresh.modules():
                m._forward_hooks.clear()
            a, b = (float(energy.value(f, x, probe=gen()).detach()) for f in (model, fresh))
            assert a == pytest.approx(b, rel=rel)

        check()
        model[1] = nn.GELU()  # another activation: the slopes are others
        check()
        model[3] = nn.Sequential(nn.LayerNorm(6, dtype=F64), nn.Tanh())  # no chain any more
        check()
        model[3] = nn.Tanh()
        model[0].weight = nn.Parameter(randn(8, 5, seed=14))
        check()
        model.load_state_dict(mixed(seed=15).state_dict())
        check()
        before = float(energy.value(model, x, probe=gen()).detach())
        handle = model[4].register_forward_hook(lambda _m, _i, out: 2 * out)
        twice = 4 if energy.traits.degree == 2 else 2
        assert float(energy.value(model, x, probe=gen()).detach()) == pytest.approx(twice * before, rel=1e-10)
        handle.remove()
        check()
        model.append(nn.Linear(3, 2, dtype=F64))
        check()
        model.float()
        check(rel=1e-6)
        assert energy.value(model, x, probe=gen()).dtype == torch.float32


def test_nothing_is_left_on_a_network_and_it_can_go() -> None:
    for make in (mixed, lambda: filled(Attention(), 16), lambda: filled(nn.Linear(5, 3))):
        model = make()
        x = randn(3, 4, 3) if isinstance(model, Attention) else randn(3, 5)
        bare = {n: set(vars(m)) for n, m in model.named_modules()}
        for energy in (*ALL, JacobianFrobenius(on="head" if isinstance(model, Attention) else "logits")):
            energy.value(model, x, probe=gen())
            energy.estimate(model, x, probe=gen())
        assert {n: set(vars(m)) for n, m in model.named_modules()} == bare
        for m in model.modules():
            assert not m._forward_hooks
            assert not m._forward_pre_hooks
            assert not m._backward_hooks
        copied = pickle.loads(pickle.dumps(model))
        same(EXACT, copied, copy.deepcopy(model), x)
        gone = weakref.ref(model)
        del model, m, copied
        gc.collect()
        assert gone() is None


def test_a_network_that_knows_its_parent_can_go_too() -> None:
    model = mixed()
    model[0].__dict__["parent"] = model
    PROBED.value(filled(nn.Sequential(model, nn.LayerNorm(3))), randn(3, 5), probe=gen())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_frozen_parameters_get_nothing_and_the_rest_the_same() -> None:
    x = randn(5, 5)
    for energy in ALL:
        for middle in (nn.ReLU, lambda: nn.LayerNorm(6)):
            full, part = (filled(nn.Sequential(nn.Linear(5, 6), middle(), nn.Linear(6, 3)), 17) for _ in range(2))
            frozen = next(part.parameters())
            frozen.requires_grad_(False)
            a = torch.autograd.grad(energy.value(full, x, probe=gen()), list(full.parameters()), allow_unused=True)
            left = list(part.parameters())[1:]
            b = torch.autograd.grad(energy.value(part, x, probe=gen()), left, allow_unused=True)
            for wanted, found in zip(a[1:], b, strict=True):
                assert (wanted is None) == (found is None)
                assert wanted is None or found is None or torch.allclose(wanted, found, rtol=1e-12)
            for p in part.parameters():
                p.requires_grad_(False)
            value = energy.value(part, x, probe=gen())
            assert not value.requires_grad
            assert float(value) == pytest.approx(float(energy.value(full, x, probe=gen()).detach()), rel=1e-12)
