"""The graph energy against the dense eigenvalue sum, named graphs, and its own bounds."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from groundstate.energies import GraphEnergy, parse
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import graph
from groundstate.norms.staircase import Blocks, inverse_root, poles, selected_inverse, spans

F64 = torch.float64


def fixture(sizes: tuple[int, ...], start: float = 1.0) -> list[Tensor]:
    """W_l[i, j] = sin(a + 1.3 i + 2.7 j + 0.9 i j), a = start + l - 1: no random numbers."""

    def block(a: float, rows: int, columns: int) -> Tensor:
        i, j = torch.arange(rows, dtype=F64)[:, None], torch.arange(columns, dtype=F64)
        return torch.sin(a + 1.3 * i + 2.7 * j + 0.9 * i * j)

    return [block(start + l0, rows, columns) for l0, (columns, rows) in enumerate(pairwise(sizes))]


def random_net(sizes: list[int], generator: torch.Generator, dtype: torch.dtype = F64) -> list[Tensor]:
    return [torch.randn(b, a, generator=generator, dtype=dtype) for a, b in pairwise(sizes)]


def random_sizes(generator: torch.Generator, depth: int = 8, width: int = 50) -> list[int]:
    layers = int(torch.randint(1, depth + 1, (), generator=generator))
    return torch.randint(1, width + 1, (layers + 1,), generator=generator).tolist()


def matrix_sign_gradient(layers: list[Tensor]) -> list[Tensor]:
    """2 sign(A) on the edges, zero on the kernel: the minimal-norm subgradient from the dense adjacency."""
    lam, v = torch.linalg.eigh(graph.adjacency(layers))
    sign = (v * (lam.sign() * (lam.abs() > 1e-10 * lam.abs().max()))) @ v.mT
    grads, source = [], 0
    for w in layers:
        target = source + w.shape[1]
        grads.append(2 * sign[target : target + w.shape[0], source:target])
        source = target
    return grads


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Relative Frobenius distance over all layers."""
    difference = math.fsum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(difference / math.fsum(float(y.double().square().sum()) for y in b))


def by_svd(layers: list[Tensor]) -> tuple[float, list[Tensor]]:
    """E and minimal-norm gradient of float32 layers from a float64 SVD, with the kernel of float32."""
    b = graph.biadjacency(layers).double()
    u, s, vh = torch.linalg.svd(b, full_matrices=False)
    whole = 2 * (u * (s > max(b.shape) * torch.finfo(torch.float32).eps * s[0])) @ vh
    p = spans((layers[0].shape[1], *(w.shape[0] for w in layers)))
    return 2 * float(s.sum()), [whole[p[k - 1], p[k]].mT if k % 2 else whole[p[k], p[k - 1]] for k in range(1, len(p))]


def complete(n: int) -> Tensor:
    return torch.ones(n, n, dtype=F64) - torch.eye(n, dtype=F64)


def path(n: int) -> Tensor:
    return torch.diag(torch.ones(n - 1, dtype=F64), 1) + torch.diag(torch.ones(n - 1, dtype=F64), -1)


def cycle(n: int) -> Tensor:
    a = path(n)
    a[0, -1] = a[-1, 0] = 1
    return a


def cube() -> Tensor:
    corners = torch.arange(8)
    return torch.tensor([[float(int(i ^ j).bit_count() == 1) for j in corners] for i in corners], dtype=F64)


def ring_eigenvalues(n: int) -> float:
    return math.fsum(abs(2 * math.cos(2 * math.pi * k / n)) for k in range(n))


def path_eigenvalues(n: int) -> float:
    return math.fsum(abs(2 * math.cos(math.pi * k / (n + 1))) for k in range(1, n + 1))


NAMED = [
    *((f"path{n}", path(n), path_eigenvalues(n)) for n in (2, 3, 8, 13)),
    *((f"cycle{n}", cycle(n), ring_eigenvalues(n)) for n in (3, 5, 8, 12)),
    *((f"complete{n}", complete(n), 2.0 * (n - 1)) for n in (2, 4, 9)),
    ("cube", cube(), 12.0),
    ("star7", graph.adjacency([torch.ones(1, 6, dtype=F64)]), 2 * math.sqrt(6)),
    ("bipartite4x7", graph.adjacency([torch.ones(4, 7, dtype=F64)]), 2 * math.sqrt(28)),
    ("edgeless", torch.zeros(4, 4, dtype=F64), 0.0),
]


@pytest.mark.parametrize(("a", "expected"), [n[1:] for n in NAMED], ids=[n[0] for n in NAMED])
def test_named_graphs(a: Tensor, expected: float) -> None:
    # Backward error of a symmetric eigensolver: a few eps per eigenvalue, n <= 13.
    assert float(graph.adjacency_energy(a)) == pytest.approx(expected, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([torch.ones(4, 7)], 2 * math.sqrt(28)),
        ([torch.ones(1, 9)], 6.0),
        ([torch.ones(1, 1)] * 7, path_eigenvalues(8)),
        ([torch.eye(4), torch.eye(4)], 4 * 2 * math.sqrt(2)),
    ],
    ids=["bipartite", "star", "path", "paths"],
)
def test_named_layered_graphs(layers: list[Tensor], expected: float) -> None:
    for dtype, tolerance in ((F64, 1e-13), (torch.float32, 1e-6)):  # a few eps of the dtype
        w = [x.to(dtype) for x in layers]
        assert float(graph.energy(w)) == pytest.approx(expected, rel=tolerance)
        assert float(graph.energy_and_grad(w)[0]) == pytest.approx(expected, rel=tolerance)


def test_equals_the_dense_eigenvalue_sum_on_200_random_nets() -> None:
    generator = torch.Generator().manual_seed(20240)
    for _ in range(200):
        layers = random_net(random_sizes(generator), generator)
        dense = float(graph.adjacency_energy(graph.adjacency(layers)))
        value, grads = graph.energy_and_grad(layers)
        # 1e-12: the stated accuracy; both sides are sums of at most 450 values with a few eps each.
        assert float(value) == pytest.approx(dense, rel=1e-12)
        assert float(graph.energy(layers)) == pytest.approx(dense, rel=1e-12)
        # 1e-8: the stated accuracy. Kernels, also double ones (widths differ at random), get the minimal-norm element.
        assert distance(grads, matrix_sign_gradient(layers)) < 1e-8


@pytest.mark.parametrize("absolute", [False, True])
def test_gradient_equals_autograd_of_the_dense_form(absolute: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    for sizes in ([12, 5], [9, 4, 6], [20, 7, 9, 3], [6, 5, 4, 3], [8, 3, 9, 4, 7, 2]):
        layers = random_net(sizes, generator)
        leaves = [w.clone().requires_grad_() for w in layers]
        a = graph.adjacency([w.abs() for w in leaves] if absolute else leaves)
        dense = torch.autograd.grad(torch.linalg.eigvalsh(a).abs().sum(), leaves)
        thin = torch.autograd.grad(graph.energy(leaves, absolute), leaves)
        closed = graph.energy_and_grad(layers, absolute)[1]
        assert distance(closed, list(dense)) < 1e-8  # the stated accuracy
        assert distance(closed, list(thin)) < 1e-8


@pytest.mark.parametrize("absolute", [False, True])
def test_directional_derivative_and_homogeneity(absolute: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    layers = random_net([11, 6, 8, 3], generator)
    direction = random_net([11, 6, 8, 3], generator)
    value, grads = graph.energy_and_grad(layers, absolute)
    step = 1e-6
    ahead, behind = (
        float(graph.energy_and_grad([w + s * d for w, d in zip(layers, direction)], absolute)[0]) for s in (step, -step)
    )
    slope = math.fsum(float((g * d).sum()) for g, d in zip(grads, direction))
    # Central difference: error about eps * E / step = 1e-8 absolute, slope of order 1.
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-7)
    euler = math.fsum(float((g * w).sum()) for g, w in zip(grads, layers))
    assert euler == pytest.approx(float(value), rel=1e-12)  # degree one: <grad, W> = E, rounding only
    assert float(graph.energy_and_grad([-3 * w for w in layers], absolute)[0]) == pytest.approx(
        3 * float(value), rel=1e-12
    )


REFERENCE = [
    ((6, 5, 4, 3), 25.5235441065, 20.3214326684),
    ((4, 8, 16, 3), 63.6126135864, 42.5158122401),
    ((2, 16, 4), 33.1070406214, 24.6782115762),
]


@pytest.mark.parametrize(("sizes", "signed", "absolute"), REFERENCE)
def test_reference_values(sizes: tuple[int, ...], signed: float, absolute: float) -> None:
    layers = fixture(sizes)
    # The reference numbers are given to 10 decimals.
    assert float(graph.energy_and_grad(layers)[0]) == pytest.approx(signed, abs=1e-9)
    assert float(graph.energy_and_grad(layers, absolute=True)[0]) == pytest.approx(absolute, abs=1e-9)


def test_reference_gradient() -> None:
    layers = fixture((6, 5, 4, 3))
    grads = graph.energy_and_grad(layers)[1]
    norms = [float(g.norm()) for g in grads]
    shares = [float((g * w).sum()) for g, w in zip(grads, layers)]
    assert norms == pytest.approx([3.5746335277, 2.6873770004, 2.9515948315], abs=1e-9)
    assert [float(g[0, 0]) for g in grads] == pytest.approx([0.9650366817, 0.8415774327, -0.3543008893], abs=1e-9)
    assert shares == pytest.approx([11.0618489029, 7.8403698219, 6.6213253817], abs=1e-9)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((784, 128, 128, 10), 211.7753425), ((784, 28, 10), 36.7567569), ((64, *[128] * 12, 10), 1084.248182)],
    ids=["784-128-128-10", "784-28-10", "64-128x12-10"],
)
def test_reference_initializations(sizes: tuple[int, ...], expected: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        single = [nn.Linear(a, b).weight.detach() for a, b in pairwise(sizes)]
    double = [w.double() for w in single]
    value, exact = graph.energy_and_grad(double)
    assert float(value) == pytest.approx(expected, rel=1e-8)  # the reference numbers have 10 digits
    value, grads = graph.energy_and_grad(single)
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert distance(grads, exact) < 1e-5  # the stated float32 accuracy


def test_a_widening_net_keeps_every_edge() -> None:
    """Reading W as (in, out) would overlap blocks here: 4-8-16-3 lost 44 edges that way."""
    layers = fixture((4, 8, 16, 3))
    a = graph.adjacency(layers)
    assert a.shape == (31, 31)
    assert torch.equal(a, a.mT)
    assert int((a != 0).sum()) == 2 * sum(w.numel() for w in layers)


def test_bounds() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(30):
        layers = random_net(random_sizes(generator, width=20), generator)
        nuclear = [float(torch.linalg.svdvals(w).sum()) for w in layers]
        frobenius = math.sqrt(2 * math.fsum(float(w.square().sum()) for w in layers))
        rank = int(torch.linalg.matrix_rank(graph.adjacency(layers)))
        e = float(graph.energy_and_grad(layers)[0])
        slack = 1e-12 * e  # rounding where a bound is attained
        assert 2 * max(sum(nuclear[::2]), sum(nuclear[1::2])) <= e + slack
        assert e <= 2 * sum(nuclear) + slack
        assert frobenius <= e + slack
        assert e <= math.sqrt(rank) * frobenius + slack  # McClelland


def test_reaches_the_layer_sum_where_consecutive_layers_are_orthogonal() -> None:
    generator = torch.Generator().manual_seed(6)
    q = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=F64)).Q
    first = q[:, :4] @ torch.randn(4, 6, generator=generator, dtype=F64)
    second = torch.randn(5, 4, generator=generator, dtype=F64) @ q[:, 4:].mT
    nuclear = sum(float(torch.linalg.svdvals(w).sum()) for w in (first, second))
    assert float(graph.energy_and_grad([first, second])[0]) == pytest.approx(2 * nuclear, rel=1e-12)


@pytest.mark.parametrize("absolute", [False, True])
def test_invariances(absolute: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    layers = random_net([7, 6, 5, 4], generator)
    sign = torch.randint(0, 2, (6,), generator=generator, dtype=F64) * 2 - 1
    order = torch.randperm(6, generator=generator)
    changed = [(layers[0] * sign[:, None])[order], (layers[1] * sign)[:, order], layers[2]]
    value = float(graph.energy_and_grad(layers, absolute)[0])
    assert float(graph.energy_and_grad(changed, absolute)[0]) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("sizes", [[5, 1, 1, 5], [8, 2, 9, 1, 7], [1, 30, 1], [30, 1, 30]])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_structural_kernels_get_the_minimal_norm_gradient(sizes: list[int], dtype: torch.dtype) -> None:
    layers = random_net(sizes, torch.Generator().manual_seed(8), dtype)
    reference = matrix_sign_gradient([w.double() for w in layers])
    tolerance = 1e-8 if dtype == F64 else 1e-5  # the stated accuracies
    assert distance(graph.energy_and_grad(layers)[1], reference) < tolerance
    leaves = [w.clone().requires_grad_() for w in layers]
    assert distance(list(torch.autograd.grad(graph.energy(leaves), leaves)), reference) < tolerance


@pytest.mark.parametrize("decades", [1, 2, 3, 4])
def test_float32_stays_accurate_on_decaying_spectra(decades: int) -> None:
    """The route changes with the spectrum (float32 Gram, float64 Gram, float64 product); the accuracy does not."""
    generator = torch.Generator().manual_seed(9)
    u = torch.linalg.qr(torch.randn(120, 40, generator=generator, dtype=F64)).Q
    v = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=F64)).Q
    first = (v * torch.logspace(0, -decades, 40, dtype=F64)) @ u.mT
    single = [first.float(), 10.0**-decades * torch.randn(10, 40, generator=generator)]
    double = [w.double() for w in single]
    value, grads = graph.energy_and_grad(single)
    exact, exact_grads = graph.energy_and_grad(double)
    assert float(value) == pytest.approx(float(exact), rel=1e-6)  # float32 rounding of a sum
    assert distance(grads, exact_grads) < 1e-5  # the stated float32 accuracy


def test_float32_singular_values_below_its_own_rounding_are_kernel() -> None:
    generator = torch.Generator().manual_seed(10)
    low = torch.randn(60, 5, generator=generator) @ torch.randn(5, 40, generator=generator)
    noisy = low + 1e-7 * torch.randn(60, 40, generator=generator)
    grad = graph.energy_and_grad([noisy])[1][0]
    assert float(grad.norm()) == pytest.approx(2 * math.sqrt(5), rel=1e-4)  # five directions, not forty


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("scale", [1e25, 1e-25, 1e-38, 1e37])
def test_any_scale(dtype: torch.dtype, absolute: bool, scale: float) -> None:
    layers = random_net([9, 5, 4], torch.Generator().manual_seed(11), dtype)
    value, grads = graph.energy_and_grad(layers, absolute)
    scaled, scaled_grads = graph.energy_and_grad([w * scale for w in layers], absolute)
    # The scaled weights are rounded, in float32 near 1e-38 to subnormals of 7 digits at most.
    tolerance = 1e-12 if dtype == F64 else 2e-5
    assert float(scaled) / scale == pytest.approx(float(value), rel=tolerance)
    assert distance(scaled_grads, grads) < max(tolerance, 1e-8)
    dense = graph.energy([w * scale for w in layers], absolute)
    assert float(dense) / scale == pytest.approx(float(value), rel=tolerance)


def test_zeros_and_empty_layers() -> None:
    for sizes in ([4, 3, 2], [4, 0, 2], [0, 3]):
        layers = [torch.zeros(b, a) for a, b in pairwise(sizes)]
        for absolute in (False, True):
            value, grads = graph.energy_and_grad(layers, absolute)
            assert float(value) == 0.0
            assert [g.shape for g in grads] == [w.shape for w in layers]
            assert all(not g.any() for g in grads)
            leaves = [w.clone().requires_grad_() for w in layers]
            dense = graph.energy(leaves, absolute)
            assert float(dense.detach()) == 0.0
            assert all(not g.any() for g in torch.autograd.grad(dense, leaves))
    mixed = [torch.zeros(3, 4), torch.ones(2, 3)]
    value, grads = graph.energy_and_grad(mixed, absolute=True)
    assert float(value) == pytest.approx(2 * math.sqrt(6), rel=1e-6)
    assert not grads[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    layers = [w.to(dtype) for w in random_net([9, 5, 4], torch.Generator().manual_seed(12), torch.float32)]
    value, grads = graph.energy_and_grad(layers)
    single, single_grads = graph.energy_and_grad([w.float() for w in layers])
    assert value.dtype == torch.float32
    assert torch.equal(value, single)
    assert all(torch.equal(g, s.to(dtype)) for g, s in zip(grads, single_grads))


def test_layouts_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(13)
    layers = random_net([9, 70, 4], generator)
    value, grads = graph.energy_and_grad(layers)
    views = [w.mT.contiguous().mT for w in layers]
    wide = [torch.stack([w, w], dim=-1)[..., 0].requires_grad_() for w in layers]
    for other in (views, wide):
        again, again_grads = graph.energy_and_grad(other)
        assert float(again) == pytest.approx(float(value), rel=1e-13)  # other summation orders only
        assert distance(again_grads, grads) < 1e-12
    before = [w.clone() for w in layers]
    graph.energy_and_grad(layers, absolute=True)
    assert all(torch.equal(a, b) for a, b in zip(before, layers))


# The spectrum, deep networks and their partial fractions


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("sizes", [(30, 12, 9, 4), (5, 1, 1, 5), (8, 2, 9, 1, 7), (6, *[24] * 21, 3), (4, 0, 2)])
def test_the_spectrum_is_that_of_the_biadjacency(sizes: tuple[int, ...], dtype: torch.dtype, absolute: bool) -> None:
    layers = random_net(list(sizes), torch.Generator().manual_seed(16), dtype)
    value, grads, sigma = graph.energy_grad_and_spectrum(layers, absolute)
    b = graph.biadjacency([w.double().abs() if absolute else w.double() for w in layers])
    exact = torch.linalg.svdvals(b)
    assert sigma.dtype == dtype
    assert sigma.shape == exact.shape
    if not exact.numel():
        return
    tolerance = 1e-8 if dtype == F64 else 1e-5  # the stated accuracies, relative to the largest
    assert float((sigma - exact).abs().max()) < tolerance * float(exact[0])
    assert float(value) == pytest.approx(2 * float(sigma.double().sum()), rel=1e-8 if dtype == F64 else 1e-6)
    again, slopes = graph.energy_and_grad(layers, absolute)
    assert float(again) == pytest.approx(float(value), rel=1e-12 if dtype == F64 else 1e-6)
    assert distance(grads, slopes) < (1e-8 if dtype == F64 else 1e-5)
    scaled = graph.energy_grad_and_spectrum([w * 2.0**-90 for w in layers], absolute)[2]
    assert torch.allclose(scaled * 2.0**90, sigma, rtol=1e-5, atol=tolerance * float(exact[0]))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("sizes", [(6, *[24] * 21, 3), (16, *[16, 40] * 9, 8), (10, *[130] * 11, 10)])
def test_deep_networks(sizes: tuple[int, ...], absolute: bool) -> None:
    """Deep enough for partial fractions in every dtype (the last: in float32 only), against the dense SVD."""
    generator = torch.Generator().manual_seed(17)
    layers = [w / math.sqrt(w.shape[1]) for w in random_net(list(sizes), generator)]
    leaves = [w.clone().requires_grad_() for w in layers]
    dense = graph.energy(leaves, absolute)
    slopes = list(torch.autograd.grad(dense, leaves))
    value, grads = graph.energy_and_grad(layers, absolute)
    assert float(value) == pytest.approx(float(dense.detach()), rel=1e-12)  # the stated accuracies
    assert distance(grads, slopes) < 1e-8
    single = [w.float() for w in layers]
    exact, slopes = graph.energy_and_grad([w.double() for w in single], absolute)
    value, grads = graph.energy_and_grad(single, absolute)
    assert float(value) == pytest.approx(float(exact), rel=1e-6)
    assert distance(grads, slopes) < 1e-5


def test_a_deep_network_with_a_kernel() -> None:
    """A neuron without edges, and a layer of rank 3: partial fractions are left for the eigendecomposition."""
    layers = random_net([6, *[24] * 21, 3], torch.Generator().manual_seed(18))
    layers[4][3] = 0
    layers[5][:, 3] = 0
    layers[9] = layers[9][:, :3] @ layers[9][:3]
    reference = matrix_sign_gradient(layers)
    assert distance(graph.energy_and_grad(layers)[1], reference) < 1e-8
    single = [w.float() for w in layers]
    assert distance(graph.energy_and_grad(single)[1], by_svd(single)[1]) < 1e-5


def tridiagonal(generator: torch.Generator, sizes: list[int], shift: float) -> tuple[Tensor, Blocks]:
    """A positive definite block tridiagonal matrix, and its blocks."""
    m = torch.zeros(sum(sizes), sum(sizes), dtype=F64)
    places = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    for i, j in [(k, k) for k in range(len(sizes))] + [(k, k + 1) for k in range(len(sizes) - 1)]:
        m[places[i], places[j]] = torch.randn(sizes[i], sizes[j], generator=generator, dtype=F64)
    a = m.mT @ m + shift * torch.eye(len(m), dtype=F64)
    return a, ([a[p, p] for p in places], [a[q, p] for p, q in pairwise(places)])


@pytest.mark.parametrize("sizes", [[5], [3, 7, 1, 4], [60, 110, 49], [0, 3, 0]])
def test_blocks_of_inverse_and_inverse_root(sizes: list[int]) -> None:
    a, blocks = tridiagonal(torch.Generator().manual_seed(19), sizes, 0.1)
    lam, v = torch.linalg.eigh(a)
    places = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    for dense, found, tolerance in (
        ((v / lam) @ v.mT, selected_inverse(*blocks), 1e-11),  # eps times a condition number of 1e4
        ((v / lam.sqrt()) @ v.mT, inverse_root(*blocks, float(lam[0]) / 9, 2 * float(lam[-1]), 1e-13), 1e-11),
        ((v / lam.sqrt()) @ v.mT, inverse_root(*blocks, float(lam[0]) / 9, 2 * float(lam[-1]), 1e-5), 1e-5),
    ):
        assert found is not None
        scale = float(dense.norm())
        for i, p in enumerate(places):
            assert float((found[0][i] - dense[p, p]).norm()) < tolerance * scale
        for i, (p, q) in enumerate(pairwise(places)):
            assert float((found[1][i] - dense[q, p]).norm()) < tolerance * scale
    indefinite = [block - 2 * float(lam[0]) * torch.eye(len(block), dtype=F64) for block in blocks[0]]
    assert selected_inverse(indefinite, blocks[1]) is None


@pytest.mark.parametrize("ratio", [1.0, 1.5, 1e2, 1e6, 1e12])
@pytest.mark.parametrize("error", [1e-3, 1e-7, 1e-13])
def test_partial_fractions_are_as_good_as_they_say(ratio: float, error: float) -> None:
    terms = poles(0.3, 0.3 * ratio, error)
    for k in range(301):
        x = 0.3 * ratio ** (k / 300)
        wrong = abs(math.sqrt(x) * math.fsum(w / (x + t) for w, t in terms) - 1)
        assert wrong < error + 1e-15 * math.sqrt(ratio)  # rounding of the elliptic functions at small moduli
    assert len(terms) <= 2 + math.log(4 / error) * (math.log(4) + math.log(ratio) / 2) / math.pi**2 * 1.2


@pytest.mark.parametrize("sizes", [(40, 12, 4), (30, 20, 20, 5), (9, 2, 9), (7, 1, 7), (120, 64, 64, 10)])
@pytest.mark.parametrize("shape", ["uniform", "sparse", "rank one", "apart"])
def test_nonnegative_layers_in_float32(sizes: tuple[int, ...], shape: str) -> None:
    """With and without a dominant eigenvalue: the largest is taken out only where that is accurate."""
    layers = random_net(list(sizes), torch.Generator().manual_seed(20), torch.float32)
    if shape == "sparse":
        layers = [w * (w > 0.8) for w in layers]
    elif shape == "rank one":
        layers = [w[:, :1] @ w[:1] for w in layers]
    elif shape == "apart":  # two disconnected halves, with two equal Perron eigenvalues
        layers = [torch.block_diag(w, w) for w in layers]
    value, grads = graph.energy_and_grad(layers, absolute=True)
    expected, slopes = by_svd([w.abs() for w in layers])
    assert float(value) == pytest.approx(expected, rel=1e-6)
    assert distance(grads, [g * w.sign() for g, w in zip(slopes, layers, strict=True)]) < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_nonfinite_weights_name_their_layer(bad: float, absolute: bool, dtype: torch.dtype) -> None:
    layers = random_net([5, 4, 3], torch.Generator().manual_seed(14), dtype)
    layers[1][0, 2] = bad
    for compute in (graph.energy, graph.energy_and_grad):
        with pytest.raises(NonFiniteError, match=r"layer 2 of shape \(3, 4\) has 1 NaN"):
            compute(layers, absolute)
    with pytest.raises(NonFiniteError, match="adjacency"):
        graph.adjacency_energy(torch.full((2, 2), bad))


def test_overflow_is_named() -> None:
    with pytest.raises(NonFiniteError, match="overflows"):
        graph.energy_and_grad([torch.full((30, 30), 3e38)])


def test_layers_that_do_not_fit_are_named() -> None:
    with pytest.raises(UsageError, match=r"layers 1 and 2 do not fit.*\(4, 5\) has 4 outputs.*\(3, 6\) takes 6 inputs"):
        GraphEnergy().value([torch.ones(4, 5), torch.ones(3, 6)])
    with pytest.raises(UsageError, match="at least one layer"):
        GraphEnergy().value([])
    with pytest.raises(UsageError, match="layer 1 must be a real floating matrix"):
        GraphEnergy().value([torch.ones(4)])
    with pytest.raises(UsageError, match="layer 2 must be a real floating matrix"):
        GraphEnergy().value_and_grad([torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int64)])


def test_adjacency_energy_refuses_what_is_no_undirected_graph() -> None:
    with pytest.raises(UsageError, match="square"):
        graph.adjacency_energy(torch.ones(2, 3))
    with pytest.raises(UsageError, match="must be symmetric"):
        graph.adjacency_energy(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))


def test_adjacency_energy_gradient_is_the_matrix_sign() -> None:
    a = torch.randn(9, 9, generator=torch.Generator().manual_seed(15), dtype=F64)
    a = (a + a.mT).requires_grad_()
    (grad,) = torch.autograd.grad(graph.adjacency_energy(a), a)
    eye = torch.eye(9, dtype=F64)
    assert torch.allclose(grad @ grad, eye, atol=1e-12)  # sign(A)^2 = I, rounding of a 9 x 9 product
    assert torch.allclose(grad @ a, a @ grad, atol=1e-11)


def test_the_energy_takes_a_model() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4))
    weights = [model.get_parameter("1.weight"), model.get_parameter("3.weight")]
    for e in GraphEnergy.examples():
        assert torch.equal(e.value(model), e.value(weights))
        value, grads = e.value_and_grad(model)
        e.value(model).backward()
        assert float(value) == pytest.approx(float(e.value(model).detach()), rel=1e-6)
        assert distance([w.grad for w in weights if w.grad is not None], grads) < 1e-5
        model.zero_grad()


def test_spec_and_pickle() -> None:
    assert parse("0.5*graph(absolute=True)").terms[0].energy == GraphEnergy(absolute=True)
    for e in GraphEnergy.examples():
        assert parse(repr(e)).terms[0].energy == e
        assert pickle.loads(pickle.dumps(e)) == e
    with pytest.raises(UsageError, match="True or False"):
        GraphEnergy(absolute=2)  # pyright: ignore[reportArgumentType]


def test_deep_networks_of_rank_one_layers_give_a_value_and_a_gradient() -> None:
    # Pivots of exactly zero, met at random: torch raises where others report that the matrix is not definite.
    singular = [torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2)]
    assert selected_inverse(singular, [torch.zeros(2, 2)]) is None
    for dtype in (torch.float32, torch.bfloat16):
        for width in (32, 40):
            sizes = [20] + [width] * 19 + [10]
            layers = [(torch.randn(b, 1) @ torch.randn(1, a) / a).to(dtype) for a, b in pairwise(sizes)]
            value, gradients = graph.energy_and_grad(layers)
            truth = torch.linalg.eigvalsh(graph.adjacency([w.double() for w in layers])).abs().sum()
            assert abs(float(value / truth) - 1) < 1e-4  # float32 and ways that promise 1e-3 of the gradient
            assert all(g.isfinite().all() for g in gradients)
