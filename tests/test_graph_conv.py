"""The graph energy of chains of convolutions against the dense adjacency of a torus, and the models that have one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundstate import Regularizer, measure
from groundstate.energies import GraphEnergy, parse
from groundstate.energies.graph import ConvolutionGraphEnergy
from groundstate.errors import NonFiniteError, UsageError
from groundstate.layers_conv import convolution_chain
from groundstate.norms import graph, graph_conv

F64 = torch.float64

# Channels, kernels and dilations of every layer, pixels per axis.
CASES: list[tuple[list[int], list[tuple[int, ...]], list[int], tuple[int, ...]]] = [
    ([2, 3], [(3,)], [1], (5,)),
    ([2, 3, 2], [(3,), (2,)], [1, 1], (5,)),
    ([3, 2, 3, 2], [(3,), (1,), (3,)], [1, 1, 2], (5,)),
    ([2, 3, 2], [(3, 3), (3, 2)], [1, 1], (4, 4)),
    ([1, 3, 2, 2], [(2, 3), (1, 1), (3, 3)], [2, 1, 1], (4, 4)),
    ([1, 2, 1], [(2, 1, 3), (1, 2, 2)], [1, 1], (2, 3, 2)),
]


def kernels_of(channels: list[int], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(channels))
    pairs = zip(itertools.pairwise(channels), shapes, strict=True)
    return [torch.randn(b, a, *k, generator=generator, dtype=F64) for (a, b), k in pairs]


def on_torus(kernel: Tensor, size: tuple[int, ...], dilation: int) -> Tensor:
    """The matrix of what torch applies to a periodic image, one column per unit input."""
    axes = len(size)
    conv = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    inputs = kernel.shape[1] * math.prod(size)
    units = torch.eye(inputs, dtype=kernel.dtype).view(inputs, kernel.shape[1], *size)
    for axis, n in enumerate(kernel.shape[2:], 2):  # as far as the kernel reaches beyond the image, wrapped around
        reach = torch.arange(size[axis - 2] + dilation * (n - 1)) % size[axis - 2]
        units = units.index_select(axis, reach)
    return conv(units, kernel, dilation=dilation).reshape(inputs, -1).mT


def dense(kernels: list[Tensor], size: tuple[int, ...], dilations: list[int]) -> Tensor:
    matrices = [on_torus(k, size, d) for k, d in zip(kernels, dilations, strict=True)]
    return graph.adjacency_energy(graph.adjacency(matrices)) / math.prod(size)


@pytest.mark.parametrize(("channels", "shapes", "dilations", "size"), CASES, ids=str)
def test_equals_the_dense_adjacency_of_the_torus(channels: Any, shapes: Any, dilations: Any, size: Any) -> None:
    kernels = [k.requires_grad_() for k in kernels_of(channels, shapes)]
    expected = dense(kernels, size, dilations)
    slopes = torch.autograd.grad(expected, kernels)
    value, grads = graph_conv.energy_and_grad(kernels, size, dilations)
    differentiable = graph_conv.energy(kernels, size, dilations)
    # Rounding of eigenvalues of at most 128 nodes, and of the gradients where singular values are well above zero.
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(differentiable, expected, rtol=1e-12, atol=0)
    for grad, by_svd, slope in zip(grads, torch.autograd.grad(differentiable, kernels), slopes, strict=True):
        torch.testing.assert_close(grad, slope, rtol=0, atol=1e-9)
        torch.testing.assert_close(by_svd, slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("channels", "shapes", "dilations", "size"), CASES[1:4], ids=str)
def test_gradient_equals_finite_differences(channels: Any, shapes: Any, dilations: Any, size: Any) -> None:
    kernels = kernels_of(channels, shapes)
    _, grads = graph_conv.energy_and_grad(kernels, size, dilations)
    generator = torch.Generator().manual_seed(1)
    steps = [1e-5 * torch.randn(k.shape, generator=generator, dtype=F64) for k in kernels]
    ends = [graph_conv.energy([k + s * d for k, d in zip(kernels, steps)], size, dilations) for s in (1, -1)]
    expected = sum(float((g * d).sum()) for g, d in zip(grads, steps, strict=True))
    # Curvature of order 1e-10 and cancellation of order 1e-14, both against a difference of order 1e-5.
    assert float(ends[0] - ends[1]) / 2 == pytest.approx(expected, rel=1e-6, abs=1e-11)


def test_parts_of_the_frequencies_give_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    channels, shapes, dilations, size = CASES[3]
    kernels = kernels_of(channels, shapes)
    kernels[1][:, 1] = kernels[1][:, 0]  # rank deficient at every frequency
    value, grads = graph_conv.energy_and_grad(kernels, size, dilations)
    monkeypatch.setattr(graph_conv, "_ENTRIES", 30)
    again, slopes = graph_conv.energy_and_grad(kernels, size, dilations)
    torch.testing.assert_close((again, slopes), (value, grads), rtol=1e-12, atol=1e-12)  # other orders of summation


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_kernels_of_one_point_are_the_graph_of_their_matrices(axes: int) -> None:
    matrices = [k[..., 0] for k in kernels_of([4, 6, 3, 5], [(1,)] * 3)]
    kernels = [w.view(*w.shape, *[1] * axes) for w in matrices]
    value, grads = graph_conv.energy_and_grad(kernels, 5)
    expected, slopes = GraphEnergy().value_and_grad(matrices)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)  # rounding
    for grad, slope in zip(grads, slopes, strict=True):
        torch.testing.assert_close(grad.view(slope.shape), slope, rtol=0, atol=1e-8)  # accuracy of the closed form


def test_one_edge() -> None:
    value, grads = graph_conv.energy_and_grad([torch.tensor([[[-3.0]]])], 7)
    assert float(value) == 6.0  # eigenvalues 3 and -3
    assert grads[0].tolist() == [[[-2.0]]]


@pytest.mark.parametrize("scale", [2.0**-1060, 1e-200, 1e-20, 1e20, 1e200])
def test_any_scale(scale: float) -> None:
    channels, shapes, dilations, size = CASES[1]
    kernels = kernels_of(channels, shapes)
    value, grads = graph_conv.energy_and_grad(kernels, size, dilations)
    scaled, slopes = graph_conv.energy_and_grad([k * scale for k in kernels], size, dilations)
    loose = 1e-2 if scale < 1e-300 else 1e-11  # subnormal numbers have few digits
    assert float(scaled) == pytest.approx(float(value) * scale, rel=loose)
    torch.testing.assert_close(slopes, grads, rtol=0, atol=loose)


def test_other_dtypes_agree_with_float64() -> None:
    channels, shapes, dilations, size = CASES[3]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kernels = [k.to(dtype) for k in kernels_of(channels, shapes)]
        value, grads = graph_conv.energy_and_grad(kernels, size, dilations)
        expected, slopes = graph_conv.energy_and_grad([k.double() for k in kernels], size, dilations)
        assert value.dtype == torch.float32
        assert {g.dtype for g in grads} == {dtype}
        assert float(value) == pytest.approx(float(expected), rel=1e-6)  # a few eps of float32
        for grad, slope in zip(grads, slopes, strict=True):  # float32 times sigma_1 / sigma_min; the rounding of dtype
            torch.testing.assert_close(grad.double(), slope, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_zero_and_empty_kernels() -> None:
    zero = torch.zeros(2, 3, 3, requires_grad=True)
    value, grads = graph_conv.energy_and_grad([zero, torch.zeros(1, 2, 3)], 4)
    assert float(value) == 0.0
    assert not any(g.any() for g in grads)
    graph_conv.energy([zero], 4).backward()
    assert zero.grad is not None
    assert not zero.grad.any()
    value, grads = graph_conv.energy_and_grad([torch.ones(0, 3, 3)], 4)
    assert float(value) == 0.0
    assert grads[0].shape == (0, 3, 3)
    assert float(graph_conv.energy([torch.ones(0, 3, 3)], 4)) == 0.0


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        inner = nn.Sequential(nn.Conv2d(3, 2, 3, dilation=2), nn.Dropout2d(0.1), nn.GELU())
        return nn.Sequential(nn.Conv2d(1, 3, 3, padding="same"), nn.ReLU(), inner, nn.Identity(), nn.Conv2d(2, 2, 1))


def test_the_energy_takes_a_model() -> None:
    model = network()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    placed, named = GraphEnergy().for_model(model)
    assert isinstance(placed, ConvolutionGraphEnergy)
    assert [n for n, _ in named] == ["0.weight", "2.0.weight", "4.weight"]
    assert convolution_chain(model)[1] == list(placed.dilations) == [(1, 1), (2, 2), (1, 1)]
    assert repr(placed) == "graph"
    assert parse(repr(placed)).terms[0].energy == GraphEnergy()
    expected, slopes = graph_conv.energy_and_grad(weights, 16, [1, 2, 1])
    for given in (weights, [w.flatten(1) for w in weights]):
        value, grads = placed.value_and_grad(given)
        assert torch.equal(value, expected)
        assert all(
            g.shape == w.shape and torch.equal(g.flatten(), s.flatten()) for g, w, s in zip(grads, given, slopes)
        )
    GraphEnergy().value(model).backward()
    for w, slope in zip(weights, slopes, strict=True):
        assert w.grad is not None
        torch.testing.assert_close(w.grad, slope, rtol=0, atol=1e-5)  # float32
    small = ConvolutionGraphEnergy(size=4)
    assert torch.equal(small.value_and_grad(model)[0], graph_conv.energy_and_grad(weights, 4, [1, 2, 1])[0])


@pytest.mark.parametrize("coupling", ["grad", "loss"])
def test_a_network_of_convolutions_is_trained_with_it(coupling: Any) -> None:
    model = network()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    before = [w.detach().clone() for w in weights]
    value, grads = GraphEnergy().value_and_grad(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = Regularizer(model, 0.01 * GraphEnergy(), coupling=coupling).attach(optimizer)
    assert reg.values()["graph"] == pytest.approx(float(value), rel=1e-6)  # float32
    x = torch.ones(1, 1, 6, 6)
    loss = 0 * model(x).sum()
    (loss + reg.loss(x) if coupling == "loss" else loss).backward()
    optimizer.step()
    for w, old, grad in zip(weights, before, grads, strict=True):
        torch.testing.assert_close(w.detach(), old - 0.1 * 0.01 * grad, rtol=0, atol=1e-6)  # float32
    assert reg.values()["graph"] < float(value)
    assert reg.placed[0].amortized(0.01) is not None


def test_it_is_measured() -> None:
    model = network()
    assert measure(model, "graph").totals["graph"] == pytest.approx(float(GraphEnergy().value(model).detach()))


def shared() -> nn.Module:
    conv = nn.Conv1d(2, 2, 3)
    return nn.Sequential(conv, nn.ReLU(), conv)


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + 1


class Scaled(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * super().forward(x)


REFUSED = [
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)), r"'1' \(MaxPool2d\) is neither a convolution nor elementwise"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)), r"'1' \(Flatten\) is neither"),
    (nn.Sequential(nn.Conv1d(1, 2, 3), nn.Linear(8, 2)), r"'1' \(Linear\) is neither"),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), r"'1' \(BatchNorm2d\) is neither"),
    (nn.Sequential(nn.Conv2d(1, 2, 3, stride=(1, 2))), r"'0' \(Conv2d\) has stride \(1, 2\)"),
    (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), r"'0' \(Conv2d\) has 2 groups"),
    (nn.Sequential(nn.ConvTranspose1d(2, 2, 3)), r"'0' \(ConvTranspose1d\) is neither"),
    (nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(3, 2, 3)), r"'1' \(Conv1d\) takes 3 channels"),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(1, 2, 3))), r"has a parametrized weight"),
    (nn.Sequential(Scaled(1, 2, 3)), r"'0' \(Scaled\) has a forward pass of its own"),
    (shared(), r"'2' \(Conv1d\) shares its weight with '0' \(Conv1d\)"),
    (Written(), r"Written is neither"),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_models_are_refused_by_name(model: nn.Module, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        GraphEnergy().for_model(model)
    assert "conv_nuclear" in str(caught.value)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no absolute=True"):
        GraphEnergy(absolute=True).for_model(network())
    with pytest.raises(UsageError, match="has no convolution"):
        convolution_chain(nn.Sequential(nn.ReLU()))
    with pytest.raises(UsageError, match="size must be"):
        ConvolutionGraphEnergy(size=0)
    with pytest.raises(UsageError, match="shapes"):
        ConvolutionGraphEnergy().value([torch.ones(2, 2)])
    k = torch.ones(2, 3, 3)
    for kernels, message in (
        ([], "at least one layer"),
        ([k, k], "do not fit"),
        ([k, torch.ones(1, 2, 3, 3)], "layer 2 must be a real kernel"),
        ([torch.ones(2, 3)], "layer 1 must be a real kernel"),
        ([k.long()], "layer 1 must be a real kernel"),
    ):
        with pytest.raises(UsageError, match=message):
            graph_conv.energy(kernels, 4)
    with pytest.raises(UsageError, match="as many dilations"):
        graph_conv.energy([k], 4, [1, 1])
    with pytest.raises(UsageError, match="size must be"):
        graph_conv.energy([k], 0)
    for bad in (math.nan, math.inf):
        broken = torch.full((1, 2, 3), bad)
        for call in (graph_conv.energy, graph_conv.energy_and_grad):
            with pytest.raises(NonFiniteError, match="layer 2"):
                call([k, broken], 4)
    with pytest.raises(NonFiniteError, match="overflows"):
        graph_conv.energy_and_grad([torch.full((4, 4, 3), 3e38)], 4)
