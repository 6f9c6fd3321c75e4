"""How weights are seen as matrices: every row a neuron, whatever the layer, and gradients find their way back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from groundstate import Regularizer
from groundstate.blocks import Block, select
from groundstate.energies import Nuclear, SquaredFrobenius, Term
from groundstate.measure import measure

LAYERS = {
    "linear": lambda: nn.Linear(5, 3, bias=False),
    "convolution": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv1d(4, 4, 3, groups=4, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, bias=False),
    "transposed grouped": lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, bias=False),
    "transposed depthwise": lambda: nn.ConvTranspose1d(4, 4, 3, groups=4, bias=False),
    "transposed, as many in as out": lambda: nn.ConvTranspose1d(4, 4, 3, bias=False),
}


def block_of(layer: nn.Module) -> Block:
    return Block("weight", layer.weight, layer)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_comes_back_in_the_shape_of_its_parameter(name: str) -> None:
    block = block_of(LAYERS[name]())
    for view in ("matrix", "neurons"):
        assert torch.equal(block.like(block.seen(view)), block.parameter)  # pyright: ignore[reportArgumentType]
    assert torch.equal(block.like(block.parameter.detach()), block.parameter)  # a gradient in its own shape


@pytest.mark.parametrize("name", [n for n in LAYERS if "transposed" in n])
def test_rows_of_a_transposed_convolution_are_its_output_channels(name: str) -> None:
    """Output channel c depends on row c alone: zero the other rows, and only channel c is left."""
    layer = LAYERS[name]()
    block = block_of(layer)
    kernel = layer.weight.shape[2:]
    x = torch.randn(2, 4, *(5,) * len(kernel))
    full = layer(x)
    with torch.no_grad():
        matrix = block.matrix.clone()
        for channel in range(full.shape[1]):
            alone = torch.zeros_like(matrix)
            alone[channel] = matrix[channel]
            layer.weight.copy_(block.like(alone))
            out = layer(x)
            torch.testing.assert_close(out[:, channel], full[:, channel])
            out[:, channel] = 0
            assert not out.any()


def test_groups_are_seen_apart() -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    seen = block_of(layer).seen("neurons")
    assert seen.shape == (2, 3, 18)
    torch.testing.assert_close(seen[1, 0], layer.weight[3].flatten())


def test_an_energy_acts_on_transposed_convolutions() -> None:
    """The hook adds what autograd through the matrix view gives; rounding of float64."""
    model = nn.Sequential(nn.ConvTranspose2d(3, 5, 2, groups=1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Regularizer(model, 0.5 * Nuclear()).attach(optimizer)
    before = model[0].weight.detach().clone()
    (0 * model(torch.randn(1, 3, 2, 2, dtype=torch.float64)).sum()).backward()
    optimizer.step()
    w = before.requires_grad_()
    torch.linalg.matrix_norm(w.transpose(0, 1).flatten(1), "nuc").backward()
    torch.testing.assert_close(model[0].weight.detach(), (before - 0.5 * w.grad).detach(), atol=1e-12, rtol=0)  # pyright: ignore


def test_they_are_measured_as_matrices() -> None:
    layer = nn.ConvTranspose2d(3, 5, 2)
    (row,) = [r for r in measure(layer, "nuclear").rows if r.name == "weight"]
    expected = torch.linalg.matrix_norm(layer.weight.detach().transpose(0, 1).flatten(1), "nuc")
    assert row.status == "analyzed"
    assert row.values["nuclear"] == pytest.approx(float(expected), rel=1e-5)  # float32


def test_a_path_energy_keeps_the_shape_of_its_gradient() -> None:
    model = nn.ConvTranspose1d(3, 5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reg = Regularizer(model, "1e-2*path_energy").attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(torch.randn(2, 3, 4)), torch.zeros(2, 5, 5)).backward()
        optimizer.step()
    assert reg.values()["path_energy"] > 0


def test_every_convolution_is_a_block() -> None:
    model = nn.ModuleDict({n.replace(" ", "_").replace(",", ""): make() for n, make in LAYERS.items()})
    assert len(select(model)) == len(LAYERS)
    term = Term(1.0, SquaredFrobenius())
    total = Regularizer(model, term).values()["squared_frobenius"]
    assert total == pytest.approx(sum(float(p.detach().square().sum()) for p in model.parameters()), rel=1e-5)
