"""Convolutions as operators: symbols against matrices built by brute force, means over grids, certified bounds."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import conv
from groundstate.norms.conv_norm import gram_iteration_bound
from groundstate.norms.polar import polar

# (out, in / groups, *kernel), options, size of the output: all of stride, dilation, groups, one to three axes, kernels
# larger than the torus, patches, strides beyond the kernel.
CASES: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
    ((3, 2, 3), {}, (6,)),
    ((2, 3, 5), {"stride": 2}, (5,)),
    ((4, 2, 3), {"stride": 3, "dilation": 2, "groups": 2}, (4,)),
    ((3, 2, 3, 3), {}, (5, 5)),
    ((3, 2, 3, 2), {"stride": 2, "dilation": (1, 3)}, (4, 3)),
    ((4, 2, 3, 3), {"stride": (2, 1), "groups": 2}, (3, 4)),
    ((2, 2, 5, 5), {"dilation": 2}, (3, 3)),
    ((3, 2, 1, 1), {"stride": 2}, (3, 2)),
    ((5, 1, 2, 2), {"stride": 2}, (2, 3)),
    ((6, 1, 3, 3), {"groups": 6}, (4, 4)),
    ((2, 2, 2, 3, 2), {"stride": (1, 2, 2), "dilation": (2, 1, 1)}, (3, 2, 2)),
]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fixture(start: float, shape: tuple[int, ...]) -> Tensor:
    """A kernel without random numbers: sin(a + 1.7 t + 0.013 t^2) at the flat index t."""
    t = torch.arange(math.prod(shape), dtype=torch.float64)
    return (start + 1.7 * t + 0.013 * t.square()).sin().view(shape)


def operator(kernel: Tensor, size: tuple[int, ...], stride: Any = 1, dilation: Any = 1, groups: int = 1) -> Tensor:
    """The matrix of a convolution on a torus, one column for each unit input; taps wrap around one by one."""
    axes = kernel.ndim - 2
    steps, spacing = conv.each(stride, axes, "stride"), conv.each(dilation, axes, "dilation")
    whole = [n * s for n, s in zip(size, steps, strict=True)]
    rows, columns = kernel.shape[0], kernel.shape[1] * groups
    matrix = torch.zeros(rows, *size, columns, *whole, dtype=kernel.dtype)
    for place in itertools.product(*map(range, size)):
        for tap in itertools.product(*map(range, kernel.shape[2:])):
            where = tuple((p * s + t * d) % n for p, s, t, d, n in zip(place, steps, tap, spacing, whole, strict=True))
            for g in range(groups):
                out = slice(g * rows // groups, (g + 1) * rows // groups)
                inner = slice(g * kernel.shape[1], (g + 1) * kernel.shape[1])
                matrix[(out, *place, inner, *where)] += kernel[(out, slice(None), *tap)]
    return matrix.reshape(rows * math.prod(size), -1)


def nuclear(s: Tensor) -> tuple[Tensor, Tensor]:
    return s.sum(-1), s.sign()


def smoothed(s: Tensor) -> tuple[Tensor, Tensor]:
    root = (s.square() + 0.09).sqrt()
    return (root - 0.3).sum(-1), s / root


@pytest.mark.parametrize(("shape", "options", "size"), CASES, ids=str)
def test_singular_values_are_those_of_the_operator(shape: Any, options: Any, size: Any) -> None:
    kernel = normal(shape, 1)
    expected = torch.linalg.svdvals(operator(kernel, size, **options))
    found = conv.singular_values(kernel, size, **options).flatten().sort(descending=True).values
    # the operator has zeros more where a phase has no tap, or where it is wide in a block
    padded = torch.zeros(max(len(expected), len(found)), dtype=torch.float64)
    padded[: len(found)] = found
    torch.testing.assert_close(padded[: len(expected)], expected, rtol=1e-11, atol=1e-11)  # float64 rounding


@pytest.mark.parametrize(("kernel_size", "stride", "dilation"), [((3,), 2, 2), ((3, 3), 1, 1), ((2, 2, 2), 1, 2)])
def test_brute_force_agrees_with_torch(kernel_size: Any, stride: int, dilation: int) -> None:
    axes = len(kernel_size)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1](
        2, 4, kernel_size, stride, dilation=dilation, groups=2, bias=False, dtype=torch.float64
    )
    size = (4,) * axes
    x = normal((1, 2, *(n * stride for n in size)), 2)
    reach = [d for k in reversed(kernel_size) for d in (0, (k - 1) * dilation)]
    out = layer(nn.functional.pad(x, reach, mode="circular"))
    matrix = operator(layer.weight.detach(), size, stride, dilation, 2)
    out = out[(..., *(slice(n) for n in size))]
    torch.testing.assert_close(out.flatten(), matrix @ x.flatten(), rtol=1e-12, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize(("shape", "options", "size"), CASES, ids=str)
def test_symbols_at_opposite_frequencies_are_conjugate_and_adjoint_is_one(shape: Any, options: Any, size: Any) -> None:
    kernel, angles = normal(shape, 3), normal((5, len(size)), 4)
    s = conv.symbol(kernel, angles, **options)
    torch.testing.assert_close(conv.symbol(kernel, -angles, **options), s.conj())
    g = torch.complex(normal(tuple(s.shape), 5), normal(tuple(s.shape), 6))
    back = conv.adjoint(g, angles, kernel.shape, **options)
    torch.testing.assert_close((g.conj() * s).real.sum(), (back * kernel).sum())


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("shape", "options", "size"), CASES, ids=str)
def test_gradients_match_differences(shape: Any, options: Any, size: Any, fast: bool, shifted: bool) -> None:
    kernel, d = normal(shape, 7), normal(shape, 8)
    shift = torch.rand(len(size), generator=torch.Generator().manual_seed(9)) if shifted else None
    _, grad = conv.mean_of(kernel, nuclear, size, shift, fast=fast, **options)

    def value(h: float) -> float:
        return float(conv.mean_of(kernel + h * d, nuclear, size, shift, with_gradient=False, **options)[0])

    # central differences: truncation h^2 over the smallest singular value squared, rounding 1e-16 / h
    slopes = [(value(h) - value(-h)) / (2 * h) for h in (1e-4, 1e-5, 1e-6)]
    assert min(abs(s - float((grad * d).sum())) for s in slopes) < 1e-7 * float(grad.norm() * d.norm())


def test_expected_numbers() -> None:
    kernel = fixture(0.2, (3, 2, 3, 3))
    value, grad = conv.mean_of(kernel, nuclear, 6)
    numbers = [float(value), float(conv.singular_values(kernel, 6).max()), float(grad.norm())]
    assert numbers == pytest.approx([6.3980823319, 9.1814244399, 1.2705393954], abs=1e-9)  # ten digits are known
    assert float((grad * kernel).sum()) == pytest.approx(6.3980823319, abs=1e-9)  # degree 1
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    s = conv.singular_values(kernel, 5)
    assert float(s.sum()) / 25 == pytest.approx(9.0852727, abs=1e-7)
    assert float(s.max()) == pytest.approx(8.6117800, abs=1e-7)


def test_a_random_shift_is_unbiased() -> None:
    """Mean over shifts of value and gradient against a fine grid, in standard errors; grids coarser than the kernel."""
    kernel = normal((4, 4, 3, 3), 10)
    generator = torch.Generator().manual_seed(11)
    exact, slope = conv.mean_of(kernel, smoothed, 48)  # a smooth function: the error of the grid is below 1e-6
    for grid in (1, 2, 4):
        drawn = [conv.mean_of(kernel, smoothed, grid, torch.rand(2, generator=generator)) for _ in range(400)]
        for values, expected in (
            (torch.stack([v for v, _ in drawn]), exact),
            (torch.stack([(g * slope).sum() for _, g in drawn]), slope.square().sum()),
        ):
            error = values.std() / len(values) ** 0.5
            assert abs(values.mean() - expected) <= 3 * error + 1e-6
        grads = torch.stack([g for _, g in drawn])
        error = grads.std(0) / len(grads) ** 0.5
        # 144 entries, all of two random numbers: over seeds the mean square of what one by one is standard normal
        # was 0.7 to 2.7
        assert float(((grads.mean(0) - slope) / error).square().mean()) < 4
    assert conv.mean_of(kernel, smoothed, 2)[0] != pytest.approx(float(exact), rel=1e-3)  # unshifted it is biased


def test_the_mean_over_all_shifts_is_the_mean_over_all_frequencies() -> None:
    """Without chance: the grids shifted by the multiples of 1/5 of a step make up the grid that is five times finer."""
    kernel = normal((3, 4, 3, 3), 20)
    parts = [
        conv.mean_of(kernel, nuclear, (3, 2), torch.tensor([i, j]) / 5, stride=(1, 2), fast=True)
        for i in range(5)
        for j in range(5)
    ]
    value, grad = conv.mean_of(kernel, nuclear, (15, 10), stride=(1, 2))
    # the Gram matrix damps what is below 3e-8 of the largest; shifts are float32
    torch.testing.assert_close(torch.stack([v for v, _ in parts]).mean(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.stack([g for _, g in parts]).mean(0), grad, rtol=1e-5, atol=1e-6)


def test_a_shift_by_whole_steps_is_none() -> None:
    kernel = normal((3, 2, 3, 3), 12)
    value, grad = conv.mean_of(kernel, nuclear, (4, 3))
    again, same = conv.mean_of(kernel, nuclear, (4, 3), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(again, value)
    torch.testing.assert_close(same, grad)


def test_where_each_phase_has_one_tap_the_matrix_tells_all() -> None:
    for shape, stride in (((3, 2, 1, 1), 3), ((5, 2, 4, 4), 4), ((4, 3, 2), (2,))):
        kernel = normal(shape, 13)
        assert conv.is_constant(shape[2:], stride)
        q, value = polar(kernel.flatten(1))
        found, grad = conv.mean_of(kernel, nuclear, 1, torch.tensor([0.3] * (len(shape) - 2)), stride=stride)
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(grad.flatten(1), q)


def test_single_precision_by_the_gram_matrix_agrees() -> None:
    kernel, shift = normal((24, 24, 3, 3), 14), torch.tensor([0.1, 0.7])
    exact, slope = conv.mean_of(kernel, nuclear, 4, shift)
    for fast, bound in ((False, 1e-4), (True, 2e-2)):  # square blocks: condition numbers to 1e3, squared by the Gram
        value, grad = conv.mean_of(kernel.float(), nuclear, 4, shift, fast=fast)
        assert grad.dtype == torch.float32
        assert float(value) == pytest.approx(float(exact), rel=1e-5)
        assert float((grad.double() - slope).norm() / slope.norm()) < bound
    half, grad = conv.mean_of(kernel.bfloat16(), nuclear, 4, shift)
    assert grad.dtype == torch.bfloat16
    assert float(half) == pytest.approx(float(exact), rel=1e-2)  # rounding of the kernel, 2^-9


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("scale", [1e20, 1e-20])
def test_any_scale(scale: float, fast: bool) -> None:
    kernel = normal((3, 5, 3), 15)
    value, grad = conv.mean_of(kernel.float(), nuclear, 4, fast=fast)
    far, slope = conv.mean_of((kernel * scale).float(), nuclear, 4, fast=fast)
    assert float(far) == pytest.approx(scale * float(value), rel=1e-5)
    torch.testing.assert_close(slope, grad, rtol=1e-3, atol=1e-3)  # float32


@pytest.mark.parametrize("fast", [False, True])
def test_degenerate_kernels(fast: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        value, grad = conv.mean_of(torch.zeros(3, 2, 3, dtype=dtype), nuclear, 4, fast=fast)
        assert float(value) == 0.0
        assert not bool(grad.any())
        # rank one, and taps that sum to zero: the symbol vanishes at frequency 0
        rank_one = normal((4, 1, 1), 16) * normal((1, 3, 1), 17) * torch.tensor([1.0, -1.0], dtype=torch.float64)
        value, grad = conv.mean_of(rank_one.to(dtype), nuclear, 8, fast=fast)
        size = normal((4, 1), 16).norm() * normal((1, 3), 17).norm()
        sines = 2 * (torch.arange(8, dtype=torch.float64) * math.pi / 8).sin().mean()
        assert float(value) == pytest.approx(float(size * sines), rel=1e-3 if dtype == torch.float32 else 1e-7)
        flat = grad.double().movedim(-1, 0)
        u, v = normal((4, 1), 16) / normal((4, 1), 16).norm(), normal((1, 3), 17) / normal((1, 3), 17).norm()
        inside = u @ (u.mT @ flat @ v.mT) @ v
        # null directions get nothing; those of the Gram matrix are damped by 1/7e-4 (1/3e-8) times the rounding
        assert float((flat - inside).norm()) < (1e-2 if dtype == torch.float32 else 1e-6)
    with pytest.raises(NonFiniteError, match="1 NaN or infinite"):
        conv.mean_of(torch.tensor([[[1.0, math.nan]]]), nuclear, 4, fast=fast)
    empty = conv.singular_values(torch.zeros(0, 2, 3), 4)
    assert empty.shape == (4, 1, 0)


def test_what_does_not_fit_is_named() -> None:
    kernel = torch.ones(3, 2, 3)
    with pytest.raises(UsageError, match="expected a real kernel"):
        conv.singular_values(torch.ones(3, 2), 4)
    with pytest.raises(UsageError, match="expected a real kernel"):
        conv.mean_of(torch.ones(3, 2, 2, dtype=torch.complex64), nuclear, 4)
    with pytest.raises(UsageError, match="3 output channels do not divide into 2 groups"):
        conv.singular_values(kernel, 4, groups=2)
    for wrong in (0, (1, 2), -1):
        with pytest.raises(UsageError, match="stride must be a whole number from 1"):
            conv.singular_values(kernel, 4, stride=wrong)
    with pytest.raises(UsageError, match="needs more than 4 points on axis 0"):
        gram_iteration_bound(kernel, 4, every_size=True)
    with pytest.raises(UsageError, match="iterations must be a whole number"):
        gram_iteration_bound(kernel, 4, iterations=-1)


@pytest.mark.parametrize(("shape", "options", "size"), CASES, ids=str)
def test_gram_iteration_bounds_the_norm(shape: Any, options: Any, size: Any) -> None:
    kernel = normal(shape, 18)
    norm = float(torch.linalg.matrix_norm(operator(kernel, size, **options), 2))
    bounds = [gram_iteration_bound(kernel, size, iterations=t, **options) for t in (0, 1, 4, 10)]
    assert bounds == sorted(bounds, reverse=True)  # more iterations never loosen it
    assert norm <= bounds[-1] <= norm * 36 ** (1 / 2**11) * (1 + 1e-9)  # r^(1 / 2^(t + 1)), r at most 36 here
    anywhere = gram_iteration_bound(kernel, 20, iterations=10, every_size=True, **options)
    sizes = [tuple(n + k for n in size) for k in (0, 1)]
    assert all(anywhere >= float(conv.singular_values(kernel, n, **options).max()) for n in sizes)


def test_the_bound_for_every_size_holds_for_zero_padding() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    unit = torch.eye(50, dtype=torch.float64).view(50, 2, 5, 5)
    padded = nn.functional.conv2d(unit, kernel, padding=1).flatten(1)
    s = torch.linalg.svdvals(padded)
    assert [float(s.sum()) / 25, float(s[0])] == pytest.approx([7.5891843, 8.0890960], abs=1e-6)
    bound = gram_iteration_bound(kernel, 64, iterations=10, every_size=True)
    assert float(s[0]) <= bound <= 1.05 * float(conv.singular_values(kernel, 64).max())


def test_the_bound_between_grid_points_is_needed_and_tight() -> None:
    """|1 - e^{i theta}| reaches 2 at theta = pi only, which an odd grid misses by the cosine of half a step."""
    kernel = torch.tensor([[[1.0, -1.0]]])
    on_grid = gram_iteration_bound(kernel, 5)
    assert on_grid == pytest.approx(2 * math.cos(math.pi / 10), rel=1e-9)
    assert 2.0 <= gram_iteration_bound(kernel, 5, every_size=True) < 2.2


@pytest.mark.parametrize("scale", [0.0, 1e20, 1e-20])
def test_the_bound_at_any_scale(scale: float) -> None:
    kernel = normal((3, 2, 3), 19)
    expected = scale * gram_iteration_bound(kernel, 8)
    assert gram_iteration_bound((scale * kernel).float(), 8) == pytest.approx(expected, rel=1e-6)
