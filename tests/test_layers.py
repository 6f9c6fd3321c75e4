"""Which models can be ordered or read as a graph, and by which name the others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundstate.errors import UsageError
from groundstate.layers import network_graph, ordered_layers
from groundstate.norms.dag import Wiring


class OutOfOrder(nn.Module):
    """Defined last to first, with functions, methods, dropout and a reshape by the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.middle = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.1)
        self.first = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        x = F.relu(self.first(x))
        x = self.drop(self.middle(x).tanh())
        return F.log_softmax(self.last(x), dim=1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 4)
        self.fc2 = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(F.relu(self.cell(x)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.mixing = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.mixing)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.auxiliary = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 3)
        self.right = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


class Transposing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).transpose(1, 2)


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def shared() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in ordered_layers(model)]


# torch.compile imports torch.utils.mkldnn, which uses a function that torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_sequential_nested_and_wrapped() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Dropout(0.5)), nn.Identity(), nn.Linear(5, 2)
    )
    expected = ["1.0.weight", "3.weight"]
    assert names(model) == expected
    assert [w is model.get_parameter(n) for n, w in ordered_layers(model)] == [True, True]
    assert names(nn.DataParallel(model)) == expected
    assert names(torch.compile(model)) == expected  # pyright: ignore[reportArgumentType]
    inner = nn.Sequential(torch.compile(nn.Linear(4, 3)), nn.Linear(3, 2))  # pyright: ignore[reportArgumentType]
    assert names(inner) == ["0.weight", "1.weight"]
    assert names(nn.Linear(3, 2)) == ["weight"]


def test_order_is_that_of_the_forward_pass() -> None:
    assert names(OutOfOrder()) == ["first.weight", "middle.weight", "last.weight"]


REFUSED = [
    (Residual(), r"operation 'add' joins x and fc2: a skip connection"),
    (nn.Sequential(Residual(), nn.Linear(4, 2)), r"operation 'add' in '0' joins"),
    (Recurrent(), r"'cell' \(Linear\) is used twice"),
    (shared(), r"'2' \(Linear\) shares its weight with '0'"),
    (Branching(), r"Branching cannot be traced \(TraceError"),
    (Functional(), r"'mixing' is used directly in the forward pass"),
    (Unused(), r"'auxiliary.weight' of shape \(2, 3\) takes no part"),
    (TwoHeads(), r"'right' \(Linear\) takes x although the last step gave left"),
    (Transposing(), r"operation 'transpose' is not an elementwise activation"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), r"'0' \(Conv2d\) is neither"),
    (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), r"'1' \(BatchNorm1d\) rescales the neurons"),
    (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), r"'1' \(LayerNorm\) rescales the neurons"),
    (nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3)), r"'0' \(Embedding\) is neither"),
    (nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1), nn.Linear(2, 2)), r"'1' \(Softmax\) mixes the neurons before '2'"),
    (nn.Sequential(OutOfOrder(), nn.Linear(2, 5)), r"operation 'log_softmax' in '0' mixes the neurons before '1'"),
    (nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2)), r"'1' \(Linear\) takes 4 inputs but '0' before it gives 3"),
    (nn.Sequential(ScaledLinear(3, 2)), r"'0' \(ScaledLinear\) has a forward pass of its own"),
    (nn.Sequential(nn.ReLU()), r"has no nn.Linear"),
    (nn.MultiheadAttention(8, 2), r"MultiheadAttention cannot be traced"),
    (nn.TransformerEncoderLayer(8, 2), r"TransformerEncoderLayer cannot be traced"),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))), r"'0' .*has a parametrized weight"),
]


@pytest.mark.parametrize(
    ("model", "reason"), REFUSED, ids=[type(m).__name__ + str(i) for i, (m, _) in enumerate(REFUSED)]
)
def test_refused_by_name(model: nn.Module, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        ordered_layers(model)
    assert "as a list" in str(caught.value)
    assert "\n" not in str(caught.value)


# Skip connections


class Written(nn.Module):
    """Linear layers a, b, ... of given (in, out), and a forward pass given as a function of the module and x."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], *shapes: tuple[int, int]) -> None:
        super().__init__()
        for name, (inputs, outputs) in zip("abcdef", shapes, strict=False):
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))
        # An activation whose network is linear, so that the paths of the graph can be summed.
        self.act = nn.LeakyReLU(1.0)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(4, elementwise_affine=False)
        self.scale = nn.Parameter(torch.ones(4))
        self.written = forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


def twice(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.a(x))
    h = h + m.c(m.act(m.b(h)))
    return m.f(m.act(h + m.e(m.act(m.d(h)))))


def shared_sum(m: Any, x: Tensor) -> Tensor:
    """The result of a is used by the sum and by b: it is a group of its own."""
    h = m.a(x)
    return m.b(h) + (h + x)


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.act(m.a(x.flatten(1)))
    h += m.drop(m.b(h))
    return h


READ = [
    (Written(twice, (5, 4), (4, 6), (6, 4), (4, 3), (3, 4), (4, 2)),
     Wiring((5, 4, 6, 4, 3, 4, 2), ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)), ((1, 3), (3, 5)))),
    (Written(lambda m, x: x + m.a(x), (4, 4)), Wiring((4, 4), ((0, 1),), ((0, 1),))),
    (Written(lambda m, x: x + m.act(m.a(x)), (4, 4)), Wiring((4, 4, 4), ((0, 1),), ((0, 2), (1, 2)))),
    (Written(lambda m, x: m.a(x) + m.b(x), (4, 3), (4, 3)), Wiring((4, 3), ((0, 1), (0, 1)))),
    (Written(lambda m, x: torch.add(m.b(m.act(m.a(x))), x).add(x), (4, 5), (5, 4)),
     Wiring((4, 5, 4), ((0, 1), (1, 2)), ((0, 2), (0, 2)))),
    (Written(lambda m, x: m.a(x + x), (4, 3)), Wiring((4, 4, 3), ((1, 2),), ((0, 1), (0, 1)))),
    (Written(shared_sum, (4, 4), (4, 4)), Wiring((4, 4, 4), ((0, 1), (1, 2)), ((1, 2), (0, 2)))),
    (Written(in_place, (4, 4), (4, 4)), Wiring((4, 4, 4), ((0, 1), (1, 2)), ((1, 2),))),
    (Written(lambda m, x: m.b(m.act(m.a(x))), (4, 3), (3, 2)), Wiring((4, 3, 2), ((0, 1), (1, 2)))),
]  # fmt: skip


@pytest.mark.parametrize(("model", "wiring"), READ, ids=[str(i) for i in range(len(READ))])
def test_graphs_are_read(model: nn.Module, wiring: Wiring) -> None:
    named, found = network_graph(model)
    assert found == wiring
    assert [w is model.get_parameter(n) for n, w in named] == [True] * len(wiring.edges)


@pytest.mark.parametrize(("model", "wiring"), READ, ids=[str(i) for i in range(len(READ))])
def test_the_paths_of_the_graph_sum_to_the_network(model: nn.Module, wiring: Wiring) -> None:
    """With linear activations the network is (1 - N)^-1 from input to output, N the directed edges of the graph."""
    named, found = network_graph(model.double().eval())
    starts = [sum(found.sizes[:g]) for g in range(len(found.sizes))]
    place = [slice(s, s + n) for s, n in zip(starts, found.sizes, strict=True)]
    directed = torch.zeros(sum(found.sizes), sum(found.sizes), dtype=torch.float64)
    for (source, target), (_, w) in zip(found.edges, named, strict=True):
        directed[place[target], place[source]] += w.detach()
    for source, target in found.identities:
        directed[place[target], place[source]] += torch.eye(found.sizes[source], dtype=torch.float64)
    paths = torch.linalg.inv(torch.eye(len(directed), dtype=torch.float64) - directed)
    x = torch.randn(3, found.sizes[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = x @ paths[place[-1], place[0]].mT
    assert torch.allclose(model(x), expected, atol=1e-12)  # rounding of products of at most 30 terms


def test_a_chain_is_read_as_a_chain() -> None:
    for model in (OutOfOrder(), nn.Linear(3, 2), nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.GELU())):
        named, wiring = network_graph(model)
        assert named == ordered_layers(model)
        assert wiring.is_chain
        assert wiring.sizes == (named[0][1].shape[1], *(w.shape[0] for _, w in named))


UNREAD = [
    (lambda m, x: torch.cat([m.a(x), x], dim=1), r"operation 'cat' joins a and x: of joins only the sum"),
    (lambda m, x: m.a(x) * x, r"operation 'mul' joins a and x: of joins only the sum"),
    (lambda m, x: x - m.a(x), r"operation 'sub' joins x and a"),
    (lambda m, x: x + 0.5 * m.a(x), r"operation 'mul' is not an elementwise activation"),
    (lambda m, x: torch.add(x, m.a(x), alpha=2), r"operation 'add' joins x and a"),
    (lambda m, x: x + m.norm(m.a(x)), r"'norm' \(LayerNorm\) rescales the neurons"),
    (lambda m, x: m.scale + m.a(x), r"'scale' is used directly in the forward pass"),
    (lambda m, x: m.a(x) + 1.0, r"operation 'add' mixes the neurons, or adds what is no result"),
    (lambda m, x: m.a(m.a(x)) + x, r"'a' \(Linear\) is used twice"),
    (lambda m, x: x + torch.softmax(m.a(x), 1), r"operation 'softmax' mixes the neurons"),
    (lambda m, x: (m.a(x), x), r"the output is not one tensor"),
    (lambda m, x: [m.act(x), m.a(x)][1], r"'act' \(LeakyReLU\) gives a result that nothing uses"),
    (lambda m, x: m.a(x) + m.b(x), r"operation 'add' adds results of 3 and 4 neurons"),
    (lambda m, x: m.a(x) + m.b(m.a.weight), r"'a.weight' is used directly"),
    (lambda m, x: m.b(m.a(x)) + x, r"'b' \(Linear\) takes 4 inputs but what comes before it has 3"),
]  # fmt: skip


@pytest.mark.parametrize(("forward", "reason"), UNREAD, ids=[str(i) for i in range(len(UNREAD))])
def test_graphs_that_cannot_be_read(forward: Callable[[Any, Tensor], Any], reason: str) -> None:
    model = Written(forward, (4, 3 if "3" in reason else 4), (4, 4))
    with pytest.raises(UsageError, match=reason) as caught:
        network_graph(model)
    assert "as a list" in str(caught.value)


def test_what_is_no_graph_of_linear_layers_is_refused_there_too() -> None:
    for model, reason in REFUSED:
        if type(model) is Residual or type(model[0] if isinstance(model, nn.Sequential) else model) is Residual:
            continue
        if isinstance(model, TwoHeads):
            reason = "the output is not one tensor"
        if "takes 4 inputs" in reason:
            reason = r"'1' \(Linear\) takes 4 inputs but what comes before it has 3"
        with pytest.raises(UsageError, match=reason):
            network_graph(model)
