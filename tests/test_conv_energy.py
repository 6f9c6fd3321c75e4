"""Energies of convolutions as operators: geometry, exact measures, unbiased training steps, models and files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundstate import Regularizer
from groundstate.blocks import Block, as_matrix
from groundstate.energies.convolution import AtConvolution, ConvNuclear, ConvOperatorNorm, ConvSpectral
from groundstate.energies.registry import parse
from groundstate.energies.spectral import Nuclear, OperatorNorm
from groundstate.errors import NonFiniteError, UsageError
from groundstate.measure import measure
from groundstate.norms import conv
from groundstate.norms.conv_norm import gram_iteration_bound

LAYERS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(3, 4, 3),
    "strided": lambda: nn.Conv2d(2, 5, (3, 2), stride=(2, 1)),
    "dilated groups": lambda: nn.Conv1d(4, 6, 3, dilation=2, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "volume": lambda: nn.Conv3d(2, 2, 2, stride=(1, 2, 1)),
    "patches": lambda: nn.Conv2d(2, 5, 4, stride=4),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2),
    "transposed groups": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, dilation=2),
}


def layer(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind]().to(dtype)


def bound(energy: ConvSpectral, module: nn.Module) -> tuple[AtConvolution, Tensor]:
    weight = module.get_parameter("weight")
    found = energy.for_module(module, weight.shape)
    assert isinstance(found, AtConvolution)
    return found, as_matrix(weight.detach(), module)


def jacobian(module: Any, size: int) -> Tensor:
    """The matrix of a transposed convolution on a torus: an input large enough, its output folded."""
    axes = module.weight.ndim - 2
    steps = module.stride
    unit = torch.eye(module.in_channels * size**axes, dtype=torch.float64).view(-1, module.in_channels, *[size] * axes)
    with torch.no_grad():
        out = type(module).forward(module, unit) - (0 if module.bias is None else module.bias.view(-1, *[1] * axes))
    for axis, step in enumerate(steps, 2):
        n = size * step
        parts = out.split(n, axis)
        folded = parts[0]
        for part in parts[1:]:
            pad = list(folded.shape)
            pad[axis] = folded.shape[axis] - part.shape[axis]
            folded = folded + torch.cat([part, part.new_zeros(pad)], axis)
        out = folded
    return out.flatten(1)


@pytest.mark.parametrize("kind", ["transposed", "transposed groups"])
def test_a_transposed_convolution_is_the_operator_that_torch_applies(kind: str) -> None:
    module = layer(kind)
    size = 4
    at, w = bound(ConvNuclear(size=size), module)
    axes = module.get_parameter("weight").ndim - 2
    s = torch.linalg.svdvals(jacobian(module, size))
    assert float(at.value(w)) == pytest.approx(float(s.sum()) / size**axes)  # per point of its input, the coarser grid
    at, w = bound(ConvOperatorNorm(size=size), module)
    assert float(at.value(w)) == pytest.approx(float(s[0]))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_kernel_round_trips(kind: str) -> None:
    module = layer(kind)
    at, w = bound(ConvNuclear(), module)
    assert torch.equal(at.geometry.kernel(w), module.get_parameter("weight").detach())
    assert torch.equal(at.geometry.matrix(at.geometry.kernel(w)), w)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "energy", [ConvNuclear(size=3), ConvNuclear(size=4, smoothing=0.1), ConvOperatorNorm(size=3)], ids=str
)
def test_value_and_gradient(kind: str, energy: ConvSpectral) -> None:
    at, w = bound(energy, layer(kind))
    value, grad = at.value_and_grad(w)
    leaf = w.clone().requires_grad_()
    (slope,) = torch.autograd.grad(at.value(leaf), leaf)
    torch.testing.assert_close(at.value(w), value)
    torch.testing.assert_close(slope, grad)
    d = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = [float(at.value(w + h * d) - at.value(w - h * d)) / (2 * h) for h in (1e-4, 1e-5, 1e-6)]
    expected = float((grad * d).sum())
    # central differences: truncation h^2 over the gaps of singular values, rounding 1e-16 / h
    assert min(abs(s - expected) for s in slopes) < 1e-6 * float(grad.norm() * d.norm())
    if not isinstance(energy, ConvNuclear) or energy.smoothing == 0:
        assert float((grad * w).sum()) == pytest.approx(float(value))  # degree 1
    stack = torch.stack([w, 2 * w])
    values, grads = at.value_and_grad(stack)
    torch.testing.assert_close(values[0], value)
    torch.testing.assert_close(grads[0], grad)
    torch.testing.assert_close(at.value(stack), values)


@pytest.mark.parametrize("kind", ["plain", "strided", "dilated groups", "transposed", "patches"])
def test_a_training_step_is_unbiased(kind: str) -> None:
    at, w = bound(ConvNuclear(grid=2, smoothing=0.05), layer(kind))
    fine = ConvNuclear(size=40, smoothing=0.05)
    exact, slope = bound(fine, layer(kind))[0].value_and_grad(w)
    generator = torch.Generator().manual_seed(2)
    drawn = [at.step(w, {}, generator) for _ in range(300)]
    for values, expected in (
        (torch.stack([v for v, _ in drawn]), exact),
        (torch.stack([(g * slope).sum() for _, g in drawn]), slope.square().sum()),
    ):
        error = values.std() / len(values) ** 0.5
        assert abs(float(values.mean() - expected)) <= 3 * float(error) + 1e-6 * float(expected)  # the fine grid's own


def test_the_grid_falls_with_the_channels_and_rare_steps_are_unbiased() -> None:
    def plan(*shape: int, **options: Any) -> tuple[int, float]:
        module = nn.Conv2d(shape[1], shape[0], shape[2:], **options, device="meta")  # pyright: ignore[reportArgumentType]
        at = ConvNuclear().for_module(module, module.weight.shape)
        assert isinstance(at, AtConvolution)
        return at.geometry.affordable()

    assert plan(64, 3, 3, 3) == (8, 1.0)
    assert plan(64, 64, 3, 3) == (5, 1.0)
    assert plan(128, 64, 3, 3, stride=2) == (2, 1.0)  # four phases: 128 x 256
    assert plan(256, 256, 3, 3) == (1, 1.0)
    assert plan(512, 512, 3, 3) == (1, 0.5)
    assert plan(1024, 1024, 3, 3) == (1, 1 / 16)
    module = nn.Conv1d(416, 416, 3, bias=False)
    at, w = bound(ConvNuclear(), module)
    _, share = at.geometry.affordable()
    assert 0.9 < share < 1
    drawn = [at.step(w, {}, torch.Generator().manual_seed(seed)) for seed in range(12)]
    values = [float(v) for v, _ in drawn]
    assert all(bool(g.any()) == (v > 0) for v, (_, g) in zip(values, drawn, strict=True))
    # wide random symbols differ little from one frequency to the next: each draw is value / share, or zero
    exact = math.fsum(v for v in values if v > 0) / sum(v > 0 for v in values) * share
    assert [v for v in values if v > 0] == pytest.approx([exact / share] * sum(v > 0 for v in values), rel=0.02)


def test_an_explicit_grid_always_acts() -> None:
    at, w = bound(ConvNuclear(grid=1), nn.Conv1d(520, 520, 2, bias=False))
    assert all(float(at.step(w, {}, torch.Generator().manual_seed(seed))[0]) > 0 for seed in range(3))


def test_a_linear_weight_is_its_own_operator() -> None:
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    module = nn.Linear(3, 4)
    for energy, plain in ((ConvNuclear(), Nuclear()), (ConvOperatorNorm(), OperatorNorm())):
        assert energy.for_module(module, w.shape) is energy
        assert energy.value(w) == plain.value(w)
        assert torch.equal(energy.value_and_grad(w)[1], plain.value_and_grad(w)[1])
    patches = layer("patches")  # and so is a convolution of patches, in all of its frequencies
    at, w = bound(ConvNuclear(), patches)
    assert at.geometry.points(32) == [1, 1]
    torch.testing.assert_close(at.value(w), Nuclear().value(w))
    value, grad = at.step(w, {}, torch.Generator())
    torch.testing.assert_close((value, grad), Nuclear().value_and_grad(w))


def test_the_operator_norm_in_training_climbs_to_the_largest_on_the_grid() -> None:
    module = layer("strided", torch.float32)
    at, w = bound(ConvOperatorNorm(grid=6, size=6), module)
    exact, slope = at.value_and_grad(w)
    memory = at.remember(w, torch.Generator().manual_seed(4))
    values = []
    grad = torch.zeros_like(w)
    for _ in range(60):
        value, grad = at.step(w, memory, torch.Generator())
        values.append(float(value))
    assert values == sorted(values) or max(values) - values[-1] < 1e-5  # never falls, up to float32 rounding
    assert values[-1] == pytest.approx(float(exact), rel=1e-4)
    torch.testing.assert_close(grad, slope, rtol=0, atol=2e-2)  # vectors converge as the square root of the value
    # a bound from the other side
    assert float(exact) <= at.upper_bound(w) <= 1.02 * float(exact)
    kernel = module.get_parameter("weight").detach()
    assert gram_iteration_bound(kernel, 6, stride=(2, 1)) == at.upper_bound(w)


def test_ties_of_the_operator_norm_are_shared() -> None:
    """The identity has norm 1 at all frequencies: the gradient is the mean of all, the identity over its rank."""
    module = nn.Conv2d(3, 3, 3, bias=False, dtype=torch.float64)
    nn.init.dirac_(module.weight)
    at, w = bound(ConvOperatorNorm(size=4), module)
    value, grad = at.value_and_grad(w)
    assert float(value) == pytest.approx(1.0)
    torch.testing.assert_close(grad, w / 3)
    zero, none = at.value_and_grad(torch.zeros_like(w))
    assert float(zero) == 0.0
    assert not bool(none.any())
    memory = at.remember(torch.zeros_like(w), torch.Generator())
    zero, none = at.step(torch.zeros_like(w), memory, torch.Generator())
    assert float(zero) == 0.0
    assert not bool(none.any())


@pytest.mark.parametrize("kind", ["plain", "strided", "transposed groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype(kind: str, dtype: torch.dtype) -> None:
    for energy in (ConvNuclear(size=4), ConvOperatorNorm(size=4)):
        at, w = bound(energy, layer(kind, dtype))
        exact = at.value(w.double())
        value, grad = at.value_and_grad(w)
        assert (value.dtype, grad.dtype, grad.shape) == (torch.float32, dtype, w.shape)
        assert float(value) == pytest.approx(float(exact), rel=1e-5)
        step, grad = at.step(w, at.remember(w, torch.Generator()), torch.Generator())
        assert (step.dtype, grad.dtype, grad.shape) == (torch.float32, dtype, w.shape)


def test_bad_kernels_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3))
    with torch.no_grad():
        model[1].get_parameter("weight")[0, 0, 0, 0] = math.inf
    for energy in (ConvNuclear(), ConvOperatorNorm()):
        with pytest.raises(NonFiniteError, match=r"at 1.weight: .* 1 NaN or infinite"):
            Regularizer(model, energy, coupling="monitor").values()
        at, w = bound(energy, model[1])
        with pytest.raises(NonFiniteError):
            at.step(w, {"vectors": torch.zeros(34, 1, 2, 2)}, torch.Generator())


@pytest.mark.parametrize("options", [{"grid": 0}, {"grid": 1.5}, {"size": 0}, {"size": True}, {"smoothing": -1.0}])
def test_wrong_options_are_refused(options: Any) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        ConvNuclear(**options)


def test_specs() -> None:
    (term,) = parse("1e-3*conv_nuclear(grid=5, smoothing=0.1)").terms
    assert term.energy == ConvNuclear(grid=5, smoothing=0.1)
    assert ConvNuclear(smoothing=0.1).traits.degree is None
    at, _ = bound(ConvNuclear(grid=5), layer("plain"))
    assert repr(at) == "conv_nuclear(grid=5)"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Flatten(), nn.Linear(4 * 4 * 4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("spec", ["conv_nuclear(size=8)", "conv_nuclear(grid=2, size=8)", "conv_operator_norm(size=8)"])
def test_training_lowers_the_energy(spec: str) -> None:
    model = network()
    x = torch.randn(2, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    reg = Regularizer(model, f"1.0*{spec}").attach(optimizer)
    before = reg.values()[spec]
    assert list(reg.block_values()[spec]) == ["0.weight", "3.weight", "5.weight", "7.weight"]
    for _ in range(20):
        optimizer.zero_grad()
        (0 * model(x).sum()).backward()
        optimizer.step()
    assert reg.values()[spec] < 0.95 * before
    state = reg.state_dict()
    again = Regularizer(model, f"1.0*{spec}")
    again.load_state_dict(state)
    for key, kept in again.state_dict().items():
        assert torch.equal(kept, state[key]) if isinstance(kept, Tensor) else kept == state[key]


def test_gradients_arrive_in_the_layout_of_the_parameter() -> None:
    model = network().double().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    energy = ConvNuclear(size=3)
    for index in (0, 3, 5):
        module = model.get_submodule(str(index))
        weight = module.get_parameter("weight")
        at, w = bound(energy, module)
        grad = Block("w", weight, module).like(at.value_and_grad(w)[1])
        d = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        moved = [float(at.value(as_matrix(weight.detach() + h * d, module))) for h in (1e-6, -1e-6)]
        assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(float((grad * d).sum()), rel=1e-5, abs=1e-7)


def test_measure(tmp_path: Path) -> None:
    model = network()
    spec = "conv_nuclear(size=6) + conv_operator_norm(size=6) + nuclear"
    table = measure(model, spec)
    rows = {r.name: r.values for r in table.rows if r.status == "analyzed"}
    first = model.get_submodule("0").get_parameter("weight").detach()
    s = conv.singular_values(first, 6, stride=2)
    assert rows["0.weight"]["conv_nuclear(size=6)"] == pytest.approx(float(s.sum()) / 36, rel=1e-5)  # float32
    assert rows["0.weight"]["conv_operator_norm(size=6)"] == pytest.approx(float(s.max()), rel=1e-5)
    assert rows["7.weight"]["conv_nuclear(size=6)"] == pytest.approx(rows["7.weight"]["nuclear"], rel=1e-6)
    assert not any("assumed" in note for note in table.notes)
    placed = Regularizer(model, ConvNuclear(size=6), coupling="monitor").block_values()["conv_nuclear(size=6)"]
    for name, value in placed.items():
        assert rows[name]["conv_nuclear(size=6)"] == pytest.approx(value, rel=1e-6)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    bare = measure(tmp_path / "weights.pt", spec)
    (note,) = [note for note in bare.notes if "assumed" in note]
    assert "strides, dilations and groups are not in the file, 1 is assumed for 0.weight, 3.weight, 5.weight" in note
    row = next(r for r in bare.rows if r.name == "0.weight")
    plain = conv.singular_values(first, 6)
    assert row.values["conv_nuclear(size=6)"] == pytest.approx(float(plain.sum()) / 36, rel=1e-5)


class Odd(nn.Module):
    """A kernel whose convolution nobody but its own code knows."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(2, 2, 3, 3))
        self.linear = nn.Linear(2, 2)


def test_a_kernel_of_unknown_geometry_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cannot read a weight of shape \(2, 2, 3, 3\) of Odd.*select='!name'"):
        Regularizer(Odd(), ConvNuclear())
    Regularizer(Odd(), ConvNuclear(), select="!kernel")
    table = measure(Odd(), "conv_nuclear + nuclear")
    values = {r.name: r.values for r in table.rows if r.status == "analyzed"}
    assert "conv_nuclear" not in values["kernel"]
    assert "conv_nuclear" in values["linear.weight"]
    assert any(note.startswith("conv_nuclear:") and "kernel" in note for note in table.notes)
