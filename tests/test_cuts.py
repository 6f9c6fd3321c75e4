"""Cuts of a network against dominators of random graphs; the factorized bound against exact norms and closed forms."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint_sequential

from groundstate.errors import NonFiniteError, UsageError
from groundstate.jacobian.cuts import Cut, Split, check_cut, find_cuts
from groundstate.jacobian.factorized import bounds, half_sum, is_kinked, looseness, tightest
from groundstate.jacobian.function import function

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(model: nn.Module, seed: int, scale: float = 0.6) -> nn.Module:
    """Weights from a private generator, in float64."""
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator(seed), dtype=F64))
            seed += 1
    return model


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def mlp(activation: type[nn.Module] = nn.ReLU, seed: int = 1) -> nn.Module:
    layers = nn.Sequential(
        nn.Linear(7, 9), activation(), nn.Linear(9, 6), activation(), nn.Linear(6, 4)
    )  # fmt: skip
    return seeded(layers, seed)


def names(model: Callable[[Tensor], Any], x: Tensor, **how: Any) -> list[str]:
    with function(model, x, **how) as (run, points):
        return [cut.name for cut in find_cuts(run, points)]


def refusal(model: nn.Module, x: Tensor, name: str, **how: Any) -> str:
    with function(model, x, **how) as (run, points), pytest.raises(UsageError) as caught:
        check_cut(run, points, name)
    return str(caught.value)


# ---------------------------------------------------------------------- networks


class Residual(nn.Module):
    """Two linear layers around an in-place ReLU, added to the input in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.relu(self.first(x)))
        out += x
        return out


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(2, 1))

    def forward(self, x: Tensor) -> dict[str, Any]:
        skip = self.a(x).tanh()
        deep = self.b(functional.avg_pool2d(skip, 2)).tanh()
        return {"deep": (deep, None), "skip": skip, "size": 4, "unused": skip * 2, "scale": self.scale}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.up, self.out = Encoder(), nn.Conv2d(4, 3, 1), nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.encoder(x)
        deep = functional.interpolate(self.up(found["deep"][0]), scale_factor=2.0)
        return self.out(torch.cat([deep, found["skip"].mul(found["scale"][0])], 1))


class PreNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = nn.Embedding(11, 8), nn.ModuleList([block(), block()]), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        kept = (tokens != 0)[..., None].to(x.dtype)  # depends on the tokens of the very sample
        return self.head((x * kept).sum(1) / kept.sum(1).clamp_min(1))


class Graph(nn.Module):
    """Node i takes a random nonempty set of nodes before it; node 0 is the input, the last one the output."""

    def __init__(self, parents: list[list[int]]) -> None:
        super().__init__()
        self.parents = parents
        self.nodes = nn.ModuleList([nn.Linear(3, 3) for _ in parents])

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for node, parents in zip(self.nodes, self.parents, strict=True):
            total = values[parents[0]]
            for p in parents[1:]:
                total = total + values[p]
            values.append(node(total).tanh())
        return values[-1]


def dominators(parents: list[list[int]]) -> set[int]:
    """Nodes without which no path leads from 0 to the last node, by removing each in turn."""

    def reached(without: int) -> bool:
        known = {0}
        for i, before in enumerate(parents, 1):
            if i != without and known.intersection(before):
                known.add(i)
        return len(parents) in known

    return {i for i in range(1, len(parents)) if not reached(i)}


# ---------------------------------------------------------------------- which boundaries are cuts


def test_cuts_of_random_graphs_are_their_dominators() -> None:
    g = generator(5)
    seen = 0
    for _ in range(25):
        parents: list[list[int]] = []
        for i in range(1, int(torch.randint(2, 8, (), generator=g)) + 1):
            # mostly the node before, sometimes another one too, so that there are cuts to find
            other = int(torch.randint(0, i, (), generator=g))
            jump = float(torch.rand((), generator=g)) < 0.35
            parents.append(sorted({i - 1, other} if jump else {i - 1}))
        if float(torch.rand((), generator=g)) < 0.3:
            parents.insert(1, [0])  # nodes off the path, or on one of two paths
        expected = {f"nodes.{i - 1}" for i in dominators(parents)}
        model, x = Graph(parents), normal(2, 3, seed=9, dtype=torch.float32)
        # The output of the last Linear is one too: its tanh follows.
        found = set(names(model, x)) - {f"nodes.{len(parents) - 1}"}
        assert found == expected, parents
        seen += len(expected)
        for i in range(len(parents) - 1):
            if f"nodes.{i}" not in expected:
                assert "cannot be split" in refusal(model, x, f"nodes.{i}")
    assert seen > 20  # the graphs were not all without cuts


def test_the_same_numbers_are_one_boundary() -> None:
    inner = nn.Sequential(nn.Identity(), nn.Linear(4, 3), nn.Dropout(0.5), nn.Unflatten(1, (3, 1)), nn.Flatten())
    model = nn.Sequential(nn.Flatten(), nn.Sequential(inner, nn.Tanh()), nn.Sequential(nn.Linear(3, 2)))
    x = normal(2, 2, 2, dtype=torch.float32)
    assert names(model, x) == ["1.0.1", "1.1"]
    with function(model, x) as (run, points):
        assert check_cut(run, points, "1.0") == Cut("1.0", "Sequential", 3)  # by another name, all the same
    assert "nothing before it" in refusal(model, x, "0")
    assert "nothing after it" in refusal(model, x, "2")
    assert "nothing after it" in refusal(model, x, "2.0")


def test_in_place_relu_is_another_boundary_than_what_it_overwrites() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    seeded(model, 3)
    x = normal(5, 4, seed=4)
    before = x.clone()
    assert names(model, x) == ["0", "1", "2"]
    with function(model, x) as (run, points):
        for name in ("0", "1", "2"):
            split = Split(run, check_cut(run, points, name), points)
            a = split.h(points)
            torch.testing.assert_close(split.g(a), model(before.clone()), rtol=1e-12, atol=1e-12)
            assert bool((a >= 0).all()) == (name != "1")
            half_sum(split, points, estimator="exact")
    assert torch.equal(x, before)


def test_a_residual_block_is_refused_by_its_name() -> None:
    model = nn.Sequential(nn.Linear(5, 6), Residual(6), Residual(6), nn.Linear(6, 3))
    x = normal(2, 5, dtype=torch.float32)
    assert names(model, x) == ["0", "1", "2"]
    for inside in ("first", "relu", "second"):
        message = refusal(model, x, f"2.{inside}")
        assert "skip connection" in message
        assert "the input reaches '2' (Residual)" in message
        assert "It can be at: 0, 1, 2" in message
    whole = Residual(5)
    assert names(whole, x) == []
    assert "the input reaches the end of the forward pass of Residual. There is no cut" in refusal(whole, x, "first")


def test_a_boundary_of_several_tensors() -> None:
    model, x = seeded(UNet(), 20), normal(3, 1, 4, 4, seed=21)
    with function(model, x) as (run, points):
        cuts = find_cuts(run, points)
        # "unused" and the parameter take no part: 4 * 2 * 2 of deep and 3 * 4 * 4 of skip; None and 4 pass through
        assert cuts == [Cut("encoder.a", "Conv2d", 48), Cut("encoder", "Encoder", 64, (0, 2))]
        split = Split(run, cuts[1], points)
        a = split.h(points)
        assert a.shape == (3, 64)
        torch.testing.assert_close(split.g(a), run(points), rtol=1e-12, atol=1e-12)
        _check_halves(split, points)
    for name in ("encoder.b", "up"):
        assert "skip connection" in refusal(model, x, name)


def test_names_that_cannot_be_cuts_say_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.unused, self.fixed = nn.Tanh(), nn.Linear(1, 1), nn.Embedding(4, 3)
            self.turned, self.a, self.b, self.dead = nn.Identity(), nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.dead(x)
            y = self.shared(self.turned(self.a(x).mT + 0).mT)
            return self.shared(self.b(y)) + self.fixed(torch.arange(2)).sum(0)

    model, x = Odd(), normal(2, 4, dtype=torch.float32)
    assert "runs 2 times" in refusal(model, x, "shared")
    assert "takes no part" in refusal(model, x, "unused")
    assert "output of the function does not depend on it" in refusal(model, x, "dead")
    assert "skip connection goes around" in refusal(model, x, "fixed")
    assert "batch is not the first" in refusal(model, x, "turned")
    assert "Did you mean 'shared'" in refusal(model, x, "share")
    assert names(model, x) == ["a", "b"]
    with function(torch.tanh, x) as (run, points), pytest.raises(UsageError, match="not a module"):
        find_cuts(run, points)


def test_recurrent_layers_pass_by_what_the_rest_uses() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model, x = seeded(Last(), 30), normal(3, 5, 3, seed=31)
    with function(model, x) as (run, points):
        (cut,) = find_cuts(run, points)
        assert cut == Cut("rnn", "LSTM", 20, (0,))
        _check_halves(Split(run, cut, points), points)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_transformers_are_cut_on_the_residual_stream(kind: str) -> None:
    blocks: dict[str, Callable[[], nn.Module]] = {
        "pre": lambda: PreNorm(8),
        "post": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True),
    }
    # frozen weights: without gradients PyTorch's own layer runs fused, without its submodules
    model = seeded(Transformer(blocks[kind]), 40, 0.4).requires_grad_(False)
    tokens = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9]])
    expected = {
        "pre": ["blocks.0", "blocks.1"],
        # after both norms of every block the stream is one tensor
        "post": ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2"],
    }
    with function(model, tokens, wrt="embed") as (run, points):
        cuts = find_cuts(run, points)
        assert [cut.name for cut in cuts] == expected[kind]
        for cut in cuts:
            split = Split(run, cut, points)
            torch.testing.assert_close(split.g(split.h(points)), run(points), rtol=1e-12, atol=1e-12)
        _check_halves(Split(run, cuts[-1], points), points)
    assert "it is the input of the function" in refusal(model, tokens, "embed", wrt="embed")
    if kind == "pre":
        assert "the input reaches 'blocks.0' (PreNorm)" in refusal(model, tokens, "blocks.0.up", wrt="embed")


@pytest.mark.parametrize("on", ["logits", "probabilities", "loss", "2"])
def test_splits_of_every_output(on: str) -> None:
    model, x = mlp(nn.Tanh), normal(6, 7, seed=50)
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    with function(model, x, y if on == "loss" else None, on=on) as (run, points):
        cuts = find_cuts(run, points)
        last = {"logits": 4, "probabilities": 5, "loss": 5, "2": 2}[on]
        assert [cut.name for cut in cuts] == [str(i) for i in range(last)]
        for cut in cuts:
            split = Split(run, cut, points)
            torch.testing.assert_close(split.g(split.h(points)), run(points), rtol=1e-12, atol=1e-12)
            _check_halves(split, points)


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU(), nn.Linear(3, 2)).train()
    before, x = copy.deepcopy(model.state_dict()), normal(4, 4, dtype=torch.float32)
    state = torch.get_rng_state()
    with function(model, x) as (run, points):
        split = Split(run, check_cut(run, points, "3"), points)
        for estimator in ("exact", "vjp"):
            run.settle(half_sum(split, points, estimator=estimator, probe=generator(0)).mean())
        looseness(split, points)
        tightest(run, points, find_cuts(run, points), probe=generator(1))
        with pytest.raises(UsageError):
            check_cut(run, points, "4")
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    assert torch.equal(state, torch.get_rng_state())


class Checkpointed(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)


def test_a_cut_inside_an_activation_checkpoint_is_refused() -> None:
    """Its second run, in the backward pass, would not see what took the place of its output."""
    layers, x = mlp(nn.Tanh), normal(3, 7)
    assert isinstance(layers, nn.Sequential)
    model = Checkpointed(layers)  # two segments: layers 0 and 1; the rest, which runs without a checkpoint
    assert names(model, x) == ["layers.1", "layers.2", "layers.3"]
    assert "runs again in the backward pass" in refusal(model, x, "layers.0")
    slopes = []
    for f, prefix in ((model, "layers."), (layers, "")):
        with function(f, x) as (run, points):
            split = Split(run, check_cut(run, points, f"{prefix}1"), points)
            value = run.settle(half_sum(split, points, estimator="fd", probe=generator(3)).sum())
        slopes.append(torch.autograd.grad(value, list(f.parameters())))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)


def test_one_item_of_several_outputs() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.a(x), "b": self.b(x).tanh()}

    model, x = seeded(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), Heads()), 55), normal(4, 5, seed=56)
    with function(model, x, on="output:b") as (run, points):
        cuts = find_cuts(run, points)
        assert [cut.name for cut in cuts] == ["0", "1", "2.b"]
        for cut in cuts:
            _check_halves(Split(run, cut, points), points)
        for name, why in (("2.a", "does not depend on it"), ("2", "nothing after it")):
            with pytest.raises(UsageError, match=why):
                check_cut(run, points, name)


def test_of_a_tuple_what_the_rest_uses_decides() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin(), self.inner(x)

    class Second(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[1].cos()

    model = nn.Sequential(Pair(), Second(), nn.Linear(4, 2))
    x = normal(2, 3, dtype=torch.float32)
    assert names(model, x) == ["0.inner", "1"]
    with function(model, x) as (run, points):
        assert check_cut(run, points, "0") == Cut("0", "Pair", 4, (1,))


class Counted(nn.Linear):
    runs = 0

    def forward(self, input: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(input)


def test_no_half_runs_more_often_than_it_must() -> None:
    first, second, third = Counted(4, 5), Counted(5, 3), Counted(3, 2)
    model = nn.Sequential(nn.Sequential(nn.Tanh(), first), nn.Sequential(nn.Tanh(), second, nn.Tanh()), third)
    x = normal(3, 4, dtype=torch.float32)

    def runs_of(call: Callable[[Split, Tensor], object], layers: nn.Module = model, name: str = "1.1") -> list[int]:
        with function(layers, x) as (run, points):
            split = Split(run, check_cut(run, points, name), points)
            first.runs = second.runs = third.runs = 0
            call(split, points)
            return [first.runs, second.runs, third.runs]

    assert runs_of(lambda split, points: split.h(points)) == [1, 1, 0]
    assert runs_of(lambda split, points: split.g(torch.ones(3, 3))) == [0, 0, 1]
    # one forward pass for vjp, and two for finite differences: the unmoved values of both halves are shared
    assert runs_of(lambda split, points: half_sum(split, points, estimator="vjp", probe=generator(0))) == [1, 1, 1]
    assert runs_of(lambda split, points: half_sum(split, points, estimator="fd", probe=generator(0))) == [2, 2, 2]
    assert runs_of(looseness) == [1, 1, 1]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * 1.0

    fd = {"estimator": "fd", "probe": generator(0)}
    assert runs_of(lambda split, points: half_sum(split, points, **fd), Wrapped(), "net.1.1") == [2, 2, 2]


# ---------------------------------------------------------------------- the bound


def _dense(split: Split, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """J_g, J_h and J of each sample by differentiating the halves as functions of one vector."""

    def of(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        at = at.detach()
        j = torch.autograd.functional.jacobian(lambda v: f(v).flatten(1).sum(0), at)  # samples are independent
        assert isinstance(j, Tensor)
        return j.transpose(0, 1).flatten(2)

    return of(split.g, split.h(x)), of(split.h, x), of(split.run, x)


def _check_halves(split: Split, x: Tensor) -> None:
    """The chain rule across the cut, and every exact number against dense Jacobians."""
    g, h, j = _dense(split, x)
    size = float(j.norm()) + 1e-9
    torch.testing.assert_close(g @ h, j, rtol=0, atol=1e-10 * size)
    found = bounds(split, x)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}  # float64, sums of some hundred squares
    torch.testing.assert_close(found["frobenius_g"], torch.linalg.matrix_norm(g), **close)
    torch.testing.assert_close(found["frobenius_h"], torch.linalg.matrix_norm(h), **close)
    torch.testing.assert_close(found["nuclear"], torch.linalg.matrix_norm(j, "nuc"), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(half_sum(split, x, estimator="exact").detach(), found["half_sum"], **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 6])
def test_the_order_of_the_bounds_holds_per_sample(dtype: torch.dtype, batch: int) -> None:
    rounding = 1 + 100 * torch.finfo(dtype).eps  # sums of some 60 squares
    for seed in range(6):
        model, x = mlp(seed=100 * seed).to(dtype), normal(batch, 7, seed=seed, dtype=dtype)
        with function(model, x) as (run, points):
            cuts = find_cuts(run, points)
            assert [cut.name for cut in cuts] == ["0", "1", "2", "3"]
            for cut in cuts:
                split = Split(run, cut, points)
                found = bounds(split, points)
                assert all(value.shape == (batch,) and value.dtype == dtype for value in found.values())
                assert bool((found["nuclear"] <= found["product"] * rounding).all())
                assert bool((found["product"] <= found["half_sum"] * rounding).all())
                means = looseness(split, points)
                assert means["half_sum/nuclear"] >= means["product/nuclear"] >= 1 / rounding
                if dtype == torch.float64:
                    _check_halves(split, points)


def test_after_the_activation_the_bound_is_tighter() -> None:
    """ReLU only removes rows of J_h, and the columns of J_g beside them count for nothing: J_g grows by those."""
    model, x = mlp(seed=7), normal(40, 7, seed=8)
    with function(model, x) as (run, points):
        before, after = (bounds(Split(run, check_cut(run, points, n), points), points) for n in ("0", "1"))
    assert bool((after["frobenius_h"] <= before["frobenius_h"]).all())
    assert bool((after["frobenius_g"] >= before["frobenius_g"]).all())
    torch.testing.assert_close(before["nuclear"], after["nuclear"], rtol=1e-10, atol=0)


def linear_net(*weights: Tensor) -> nn.Sequential:
    layers = nn.Sequential(*[nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=F64) for w in weights])
    with torch.no_grad():
        for p, w in zip(layers.parameters(), weights, strict=True):
            p.copy_(w)
    return layers


def test_the_balanced_split_of_a_matrix_reaches_its_nuclear_norm() -> None:
    a = torch.randn(8, 12, generator=generator(0), dtype=F64)
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    x = normal(3, 12, seed=1)
    balanced, by_identity = linear_net(s.sqrt()[:, None] * vh, u * s.sqrt()), linear_net(a, torch.eye(8, dtype=F64))
    with function(balanced, x) as (run, points):
        found = looseness(Split(run, check_cut(run, points, "0"), points), points)
    assert found["half_sum"] == pytest.approx(26.0431919, abs=5e-8)  # ||A||_*
    assert found["half_sum/nuclear"] == pytest.approx(1, abs=1e-13)
    assert found["product/nuclear"] == pytest.approx(1, abs=1e-13)
    with function(by_identity, x) as (run, points):
        found = looseness(Split(run, check_cut(run, points, "0"), points), points)
    assert found["half_sum"] == pytest.approx(56.7850792, abs=5e-8)
    assert found["half_sum/nuclear"] == pytest.approx(2.18, abs=5e-3)


def test_descent_on_the_half_sum_reaches_the_nuclear_norm() -> None:
    """At fixed product A the minimum over the splits is ||A||_*: follow h -> T h, g -> g T^-1 down."""
    a, x = normal(4, 5, seed=60), normal(1, 5)
    t, value = torch.eye(4, dtype=F64), torch.tensor(math.inf)
    for _ in range(400):
        model = linear_net(t @ a, torch.linalg.inv(t))
        with function(model, x) as (run, points):
            split = Split(run, check_cut(run, points, "0"), points)
            value = run.settle(half_sum(split, points, estimator="exact").sum())
        slopes = torch.autograd.grad(value, list(model.parameters()))
        # d(T A) = S T A, d(T^-1) = -T^-1 S for dT = S T
        s = slopes[0] @ (t @ a).mT - torch.linalg.inv(t).mT @ slopes[1]
        t = torch.linalg.matrix_exp(-0.05 * s) @ t
    assert value.item() == pytest.approx(torch.linalg.matrix_norm(a, "nuc").item(), rel=1e-6)  # linear convergence


def test_the_product_does_not_change_when_the_halves_are_rescaled() -> None:
    model, x, c = mlp(seed=70), normal(5, 7, seed=71), 3.0
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("2.weight", "2.bias"):
            scaled.get_parameter(name).mul_(c)
        scaled.get_parameter("4.weight").div_(c)
    with function(model, x) as (run, points):
        plain = bounds(Split(run, check_cut(run, points, "3"), points), points)
    with function(scaled, x) as (run, points):
        other = bounds(Split(run, check_cut(run, points, "3"), points), points)
    torch.testing.assert_close(other["product"], plain["product"], rtol=1e-12, atol=0)
    torch.testing.assert_close(other["nuclear"], plain["nuclear"], rtol=1e-10, atol=0)
    expected = (plain["frobenius_g"].square() / c**2 + plain["frobenius_h"].square() * c**2) / 2
    torch.testing.assert_close(other["half_sum"], expected, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- estimators


def _mean_and_error(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(values)
    return stacked.mean(0), stacked.std(0) / math.sqrt(len(values))


@pytest.mark.parametrize(("estimator", "activation"), [("vjp", nn.ReLU), ("fd", nn.Tanh), ("vjp", nn.Tanh)])
def test_estimators_are_unbiased(estimator: Any, activation: type[nn.Module]) -> None:
    model, x, probe = mlp(activation, seed=80), normal(4, 7, seed=81), generator(82)
    with function(model, x) as (run, points):
        split = Split(run, check_cut(run, points, "1"), points)
        exact = half_sum(split, points, estimator="exact", differentiable=False)
        drawn = [
            half_sum(split, points, estimator=estimator, probe=probe, sigma=1e-4, differentiable=False)
            for _ in range(1500)
        ]
    mean, error = _mean_and_error(drawn)
    # 4 standard errors; the bias of fd, O(sigma^2) = 1e-8, is far below
    assert bool(((mean - exact).abs() < 4 * error).all())
    assert bool((error < 0.05 * exact).all())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_gradients_by_the_parameters(activation: type[nn.Module]) -> None:
    """The exact one against torch.func, the mean of the estimators against the exact one."""
    model, x = mlp(activation, seed=90), normal(3, 7, seed=91)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def reference(p: dict[str, Tensor]) -> Tensor:
        parts = [{k: v for k, v in p.items() if (int(k[0]) < 2) == low} for low in (True, False)]
        h, g = nn.Sequential(*list(model.children())[:2]), nn.Sequential(*list(model.children())[2:])
        parts[1] = {f"{int(k[0]) - 2}{k[1:]}": v for k, v in parts[1].items()}
        a = functional_call(h, parts[0], (x,))
        jh = vmap(jacrev(lambda v: functional_call(h, parts[0], (v,))))(x)
        jg = vmap(jacrev(lambda v: functional_call(g, parts[1], (v,))))(a)
        return (jh.square().sum() + jg.square().sum()) / 2

    expected = torch.func.grad(reference)(parameters)
    with function(model, x) as (run, points):
        split = Split(run, check_cut(run, points, "1"), points)

        def slope(**how: Any) -> Tensor:
            value = run.settle(half_sum(split, points, **how).sum())
            grads = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
            return torch.cat([g.flatten() for g in grads])

        exact, truth = slope(estimator="exact"), torch.cat([g.flatten() for g in expected.values()])
        torch.testing.assert_close(exact, truth, rtol=1e-9, atol=1e-10)
        kinds = ("vjp", "fd") if activation is nn.Tanh else ("vjp",)
        for kind in kinds:
            probe = generator(92)
            mean, error = _mean_and_error([slope(estimator=kind, probe=probe, sigma=1e-4) for _ in range(300)])
            # 5 standard errors: the largest of some 180 entries; entries without noise agree to rounding over sigma
            assert bool(((mean - exact).abs() < 5 * error + 1e-6).all())


def test_kinks_choose_the_estimator_and_are_warned_of() -> None:
    relu = nn.TransformerEncoderLayer(4, 2, batch_first=True)
    assert all(map(is_kinked, (mlp(), relu, nn.Sequential(nn.MaxPool2d(2)), nn.PReLU(), nn.SELU(), nn.ELU(0.5))))
    assert is_kinked(nn.RNN(2, 2, nonlinearity="relu"))
    smooth = nn.TransformerEncoderLayer(4, 2, batch_first=True, activation="gelu")
    assert not any(map(is_kinked, (mlp(nn.GELU), smooth, nn.ELU(), nn.AvgPool2d(2), nn.RNN(2, 2))))
    x = normal(3, 7, seed=1)
    expected: list[tuple[type[nn.Module], Any]] = [(nn.ReLU, "vjp"), (nn.Tanh, "fd")]
    for activation, chosen in expected:
        with function(mlp(activation), x) as (run, points):
            split = Split(run, check_cut(run, points, "1"), points)
            auto, named = (half_sum(split, points, estimator=e, probe=generator(2)) for e in ("auto", chosen))
            assert torch.equal(auto, named)
    with function(mlp(), x) as (run, points):
        split = Split(run, check_cut(run, points, "1"), points)
        with pytest.warns(UserWarning, match=r"1/sigma.*estimator='vjp'"):
            half_sum(split, points, estimator="fd", probe=generator(0))
        half_sum(split, points, estimator="fd", probe=generator(0), differentiable=False)  # only the gradient is noisy


def test_finite_differences_are_guarded() -> None:
    x = normal(3, 7, seed=1, dtype=torch.float32)
    with function(mlp(nn.Tanh).float(), x) as (run, points):
        split = Split(run, check_cut(run, points, "1"), points)
        for sigma in (0.0, -1e-3, math.nan, math.inf):
            with pytest.raises(UsageError, match="sigma"):
                half_sum(split, points, estimator="fd", probe=generator(0), sigma=sigma)
        for sigma in (1e-6, 1e-12):  # at the second no entry changes at all
            with pytest.warns(UserWarning, match="close to rounding"):
                half_sum(split, points, estimator="fd", probe=generator(0), sigma=sigma)
        with pytest.raises(UsageError, match="give probe"):
            half_sum(split, points, estimator="vjp")
        with pytest.raises(UsageError, match="estimator must be"):
            half_sum(split, points, estimator="jvp")  # pyright: ignore[reportArgumentType]
        with pytest.raises(UsageError, match="has 2 samples, the split was made for 3"):
            half_sum(split, points[:2], estimator="exact")


def test_only_the_given_generator_decides() -> None:
    x = normal(3, 7, seed=1)
    with function(mlp(nn.Tanh), x) as (run, points):
        split = Split(run, check_cut(run, points, "1"), points)
        for estimator in ("vjp", "fd"):
            values = [half_sum(split, points, estimator=estimator, probe=generator(s)) for s in (3, 3, 4)]
            assert torch.equal(values[0], values[1])
            assert not torch.equal(values[0], values[2])


# ---------------------------------------------------------------------- the choice of the cut


def test_the_tightest_cut_is_that_of_the_exact_half_sums() -> None:
    model, x = mlp(seed=110), normal(32, 7, seed=111)
    with function(model, x) as (run, points):
        cuts = find_cuts(run, points)
        exact = tightest(run, points, cuts, estimator="exact")
        assert [cut for cut, _ in exact.table] == cuts
        expected = [float(bounds(Split(run, cut, points), points)["half_sum"].mean()) for cut in cuts]
        assert [value for _, value in exact.table] == pytest.approx(expected, rel=1e-12)
        assert exact.cut is cuts[expected.index(min(expected))]
        for estimator in ("vjp", "fd"):
            drawn = tightest(run, points, cuts, estimator=estimator, probe=generator(1), draws=64)
            assert [value for _, value in drawn.table] == pytest.approx(expected, rel=0.1)  # 2048 draws a cut


def test_narrow_cuts_are_shown_but_not_chosen() -> None:
    model = seeded(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 5)), 120)
    x = normal(8, 6, seed=121)
    with function(model, x) as (run, points):
        cuts = find_cuts(run, points)
        found = tightest(run, points, cuts, probe=generator(0))
        assert found.cut.name in ("0", "1")
        assert [cut.width for cut, _ in found.table] == [8, 8, 2, 2]
        with pytest.raises(UsageError, match=r"as wide as min\(inputs, outputs\) = 5.*2 \(2\), 3 \(2\)"):
            tightest(run, points, cuts[2:], probe=generator(0))
        with pytest.raises(UsageError, match="no cut to choose from"):
            tightest(run, points, [], probe=generator(0))
        with pytest.raises(UsageError, match="draws"):
            tightest(run, points, cuts, probe=generator(0), draws=0)


# ---------------------------------------------------------------------- hostile networks


@pytest.mark.parametrize("estimator", ["exact", "vjp", "fd"])
def test_a_dead_network_has_no_energy_and_no_gradient(estimator: Any) -> None:
    model, x = mlp(nn.Tanh), normal(3, 7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(0.0 if name.endswith("weight") else 1.0)
    with function(model, x) as (run, points), warnings.catch_warnings():
        warnings.simplefilter("error")
        split = Split(run, check_cut(run, points, "1"), points)
        value = run.settle(half_sum(split, points, estimator=estimator, probe=generator(0)).sum())
        assert looseness(split, points)["half_sum/nuclear"] == 1.0
    grads = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
    assert value.item() == 0.0
    assert all(bool((g == 0).all()) for g in grads)


def test_half_dead_is_infinitely_loose() -> None:
    model, x = mlp(nn.Tanh), normal(3, 7)
    nn.init.zeros_(model.get_parameter("4.weight"))
    with function(model, x) as (run, points):
        assert looseness(Split(run, check_cut(run, points, "1"), points), points)["half_sum/nuclear"] == math.inf


@pytest.mark.parametrize("estimator", ["exact", "vjp", "fd"])
def test_what_is_not_finite_is_named(estimator: Any) -> None:
    for bad in (math.nan, math.inf):
        model, x = mlp(nn.Softplus), normal(3, 7)
        with torch.no_grad():
            model.get_parameter("2.weight")[1, 1] = bad
        with function(model, x) as (run, points):
            split = Split(run, check_cut(run, points, "1"), points)
            with pytest.raises(NonFiniteError, match=r"2\.weight"):
                half_sum(split, points, estimator=estimator, probe=generator(0))
            with pytest.raises(NonFiniteError, match=r"2\.weight"):
                looseness(split, points)
            broken = points.clone()
            broken[0, 0] = bad
            with pytest.raises(NonFiniteError, match="input x"):
                half_sum(split, broken, estimator=estimator, probe=generator(0))


def test_scales() -> None:
    """Linear halves scaled by 1e-15 and 1e15 in float32: squares stay within its range, the value is exact."""
    for scale in (1e-15, 1e15):
        w = normal(3, 5, seed=3)
        model, x = linear_net(scale * w, scale * w[:, :3]).float(), normal(2, 5, dtype=torch.float32)
        expected = scale**2 * float(w.square().sum() + w[:, :3].square().sum()) / 2
        with function(model, x) as (run, points):
            split = Split(run, check_cut(run, points, "0"), points)
            assert half_sum(split, points, estimator="exact").tolist() == pytest.approx([expected] * 2, rel=1e-5)
    model = linear_net(1e25 * w, w[:, :3]).float()
    with function(model, x) as (run, points):
        split = Split(run, check_cut(run, points, "0"), points)
        with pytest.raises(NonFiniteError, match="overflows"):
            half_sum(split, points, estimator="exact")


def test_one_output_and_half_precision() -> None:
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), 130)
    x = normal(1, 4, seed=131)
    with function(model, x) as (run, points):
        split = Split(run, check_cut(run, points, "1"), points)
        exact = half_sum(split, points, estimator="exact", differentiable=False)
        _check_halves(split, points)
        drawn = half_sum(split, points, estimator="vjp", probe=generator(0))
        assert drawn.shape == (1,)
    with function(model.to(torch.bfloat16), x) as (run, points):
        split = Split(run, check_cut(run, points, "1"), points)
        for estimator in ("exact", "vjp"):
            value = half_sum(split, points, estimator=estimator, probe=generator(0))
            assert value.dtype == torch.float32
        torch.testing.assert_close(
            half_sum(split, points, estimator="exact", differentiable=False).double(), exact, rtol=0.05, atol=0
        )  # 8 bits, three layers
        with pytest.warns(UserWarning, match="close to rounding"):
            half_sum(split, points, estimator="fd", probe=generator(0))


def test_a_boundary_of_one_number_per_sample() -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.s, self.b = nn.Linear(3, 1), nn.Flatten(0), nn.Unflatten(0, (-1, 1))
            self.c = nn.Linear(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.s(self.a(x)) * 2.0))

    model, x = seeded(Squeezed(), 140), normal(4, 3, seed=141)
    with function(model, x) as (run, points):
        split = Split(run, check_cut(run, points, "s"), points)
        a = split.h(points)
        assert a.shape == (4,)
        torch.testing.assert_close(split.g(a), run(points), rtol=1e-12, atol=1e-12)
        for estimator in ("exact", "vjp", "fd"):
            assert half_sum(split, points, estimator=estimator, probe=generator(0)).shape == (4,)


def test_without_parameters_or_gradients_nothing_is_recorded() -> None:
    x = normal(3, 7)
    model = mlp(nn.Tanh)
    with torch.no_grad(), function(model, x) as (run, points):
        split = Split(run, check_cut(run, points, "1"), points)
        for estimator in ("exact", "vjp", "fd"):
            assert not half_sum(split, points, estimator=estimator, probe=generator(0)).requires_grad
    with torch.inference_mode(), function(model, normal(3, 7)) as (run, points):
        split = Split(run, check_cut(run, points, "1"), points)
        assert bool(half_sum(split, points, estimator="exact").isfinite().all())
