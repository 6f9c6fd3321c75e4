"""The energy of networks with skip connections against closed forms and the dense eigenvalue sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundstate.couplings import place
from groundstate.energies import GraphEnergy, parse
from groundstate.energies.graph import WiredGraphEnergy
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import dag, graph
from groundstate.norms.dag import Wiring

F64 = torch.float64


def random_wiring(generator: torch.Generator) -> Wiring:
    """Up to six groups, some of one size, random forward edges and identities; not always connected."""

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    sizes = [(3, 5)[whole(0, 1)] if whole(0, 2) else whole(1, 6) for _ in range(whole(2, 6))]
    pairs = [(a, b) for b in range(len(sizes)) for a in range(b)]
    edges = [pair for pair in pairs if whole(0, 1)] or pairs[:1]
    identities = [(a, b) for a, b in pairs if sizes[a] == sizes[b] and not whole(0, 2)]
    return Wiring(tuple(sizes), tuple(edges), tuple(identities))


def random_layers(wiring: Wiring, generator: torch.Generator, dtype: torch.dtype = F64) -> list[Tensor]:
    shapes = [(wiring.sizes[b], wiring.sizes[a]) for a, b in wiring.edges]
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def matrix_sign_gradient(wiring: Wiring, layers: list[Tensor]) -> list[Tensor]:
    """2 sign(A) on the edges, zero on the kernel, from the dense adjacency of everything."""
    lam, v = torch.linalg.eigh(dag.adjacency(wiring, layers))
    sign = (v * (lam.sign() * (lam.abs() > 1e-10 * lam.abs().max()))) @ v.mT
    starts = [sum(wiring.sizes[:g]) for g in range(len(wiring.sizes))]
    place = [slice(s, s + n) for s, n in zip(starts, wiring.sizes, strict=True)]
    return [2 * sign[place[b], place[a]] for a, b in wiring.edges]


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Relative Frobenius distance over all layers."""
    difference = math.fsum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(difference / math.fsum(float(y.double().square().sum()) for y in b))


def test_equals_the_dense_eigenvalue_sum_on_random_graphs() -> None:
    generator = torch.Generator().manual_seed(1)
    kinds = set()
    for _ in range(150):
        wiring = random_wiring(generator)
        layers = random_layers(wiring, generator)
        lam = torch.linalg.eigvalsh(dag.adjacency(wiring, layers))
        value, grads = dag.energy_and_grad(wiring, layers)
        # Both sides are sums of at most 36 values with a few eps each; the gradient has the stated accuracy.
        assert float(value) == pytest.approx(float(lam.abs().sum()), rel=1e-12)
        assert distance(grads, matrix_sign_gradient(wiring, layers)) < 1e-8
        found = dag.components(wiring)
        kinds |= {c.colors is None for c in found}
        if all(c.colors is not None for c in found):
            assert torch.allclose(lam, -lam.flip(0), atol=1e-12)  # bipartite: a symmetric spectrum, rounding of sums
    assert kinds == {True, False}


def test_coloring() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):
        wiring = random_wiring(generator)
        found = dag.components(wiring)
        assert sorted(g for c in found for g in c.groups) == list(range(len(wiring.sizes)))
        small = torch.zeros(len(wiring.sizes), len(wiring.sizes), dtype=F64)
        for a, b in (*wiring.edges, *wiring.identities):
            small[a, b] = small[b, a] = 1
        for c in found:
            for a, b in (*wiring.edges, *wiring.identities):
                assert (a in c.groups) == (b in c.groups)
                if c.colors is not None and a in c.groups:
                    assert c.colors[c.groups.index(a)] != c.colors[c.groups.index(b)]
            part = small[list(c.groups)][:, list(c.groups)]
            lam = torch.linalg.eigvalsh(part)
            # A connected graph is bipartite where and only where -lambda_max is an eigenvalue too.
            assert (c.colors is not None) == (abs(float(lam[0] + lam[-1])) < 1e-9)


def test_closed_forms() -> None:
    one = torch.ones(1, 1, dtype=F64)
    triangle = Wiring((1, 1, 1), ((0, 1), (1, 2)), ((0, 2),))
    value, grads = dag.energy_and_grad(triangle, [one, one])
    assert float(value) == pytest.approx(4.0, rel=1e-14)  # the complete graph of three: 2, -1, -1
    assert [float(g) for g in grads] == pytest.approx([4 / 3, 4 / 3], rel=1e-14)  # 2 sign(A) = 2 (2 J / 3 - I)
    square = Wiring((1, 1, 1, 1), ((0, 1), (1, 2), (2, 3)), ((0, 3),))
    assert float(dag.energy_and_grad(square, [one] * 3)[0]) == pytest.approx(4.0, rel=1e-14)  # 2, 0, 0, -2
    # x + W x, W = 3 I on five neurons: five edges of weight 4.
    beside = Wiring((5, 5), ((0, 1),), ((0, 1),))
    value, grads = dag.energy_and_grad(beside, [3 * torch.eye(5, dtype=F64)])
    assert float(value) == pytest.approx(40.0, rel=1e-14)
    assert torch.allclose(grads[0], 2 * torch.eye(5, dtype=F64), atol=1e-14)
    # x + Q^T Q x, Q orthogonal: in the basis of Q, five triangles.
    q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=F64)).Q
    residual = Wiring((5, 5, 5), ((0, 1), (1, 2)), ((0, 2),))
    assert float(dag.energy_and_grad(residual, [q, q.mT.contiguous()])[0]) == pytest.approx(20.0, rel=1e-13)
    # Twice the same skip counts twice: two neurons, an edge of weight 2.
    assert float(dag.energy(Wiring((1, 1, 1), ((0, 1),), ((1, 2), (1, 2))), [0 * one])) == pytest.approx(4.0)


def test_a_chain_is_the_layered_graph() -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = (7, 5, 6, 3)
    wiring = Wiring(sizes, ((0, 1), (1, 2), (2, 3)))
    assert wiring.is_chain
    assert not Wiring(sizes, ((0, 1), (1, 2))).is_chain
    assert not Wiring((3, 3), ((0, 1),), ((0, 1),)).is_chain
    layers = random_layers(wiring, generator)
    assert torch.equal(dag.adjacency(wiring, layers), graph.adjacency(layers))
    for absolute in (False, True):
        value, grads = dag.energy_and_grad(wiring, layers, absolute)
        expected, slopes = graph.energy_and_grad(layers, absolute)
        assert float(value) == pytest.approx(float(expected), rel=1e-12)  # two routes to float64 accuracy
        assert distance(grads, slopes) < 1e-8


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("identities", [((0, 2),), ((0, 3),), ((0, 2), (0, 3), (1, 4))])
def test_gradient_is_the_derivative(absolute: bool, identities: tuple[tuple[int, int], ...]) -> None:
    generator = torch.Generator().manual_seed(5)
    wiring = Wiring((4, 5, 4, 4, 5), ((0, 1), (1, 2), (2, 3), (3, 4)), identities)
    layers = random_layers(wiring, generator)
    direction = random_layers(wiring, generator)
    grads = dag.energy_and_grad(wiring, layers, absolute)[1]
    slope = math.fsum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True))
    step = 1e-6
    ahead, behind = (
        float(dag.energy(wiring, [w + s * d for w, d in zip(layers, direction, strict=True)], absolute))
        for s in (step, -step)
    )
    # Central difference: error about eps * E / step = 1e-8.
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-7)
    leaves = [w.clone().requires_grad_() for w in layers]
    autograd = torch.autograd.grad(dag.energy(wiring, leaves, absolute), leaves)
    assert distance(grads, list(autograd)) < 1e-8


def test_skips_change_nothing_but_their_edges() -> None:
    """Without weights a skip is left: d edges of weight 1, and no gradient anywhere."""
    wiring = Wiring((3, 4, 3), ((0, 1), (1, 2)), ((0, 2),))
    value, grads = dag.energy_and_grad(wiring, [torch.zeros(4, 3), torch.zeros(3, 4)])
    assert float(value) == pytest.approx(6.0, rel=1e-6)
    assert not any(bool(g.any()) for g in grads)
    # Disconnected parts add up.
    apart = Wiring((2, 2, 1, 1), ((0, 1), (2, 3)))
    value, _ = dag.energy_and_grad(apart, [torch.eye(2), torch.tensor([[3.0]])])
    assert float(value) == pytest.approx(2 * 2 + 2 * 3, rel=1e-6)
    empty = Wiring((0, 2, 0), ((0, 1), (1, 2)), ((0, 2),))
    assert float(dag.energy_and_grad(empty, [torch.zeros(2, 0), torch.zeros(0, 2)])[0]) == 0.0


@pytest.mark.parametrize("decades", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("last", [2, 3])
def test_float32_is_accurate(decades: float, last: int) -> None:
    """Odd cycles and even ones; singular values near zero send the float32 decomposition to float64."""
    generator = torch.Generator().manual_seed(6)
    wiring = Wiring((30, 30, 30, 30), ((0, 1), (1, 2), (2, 3)), ((0, last),))
    layers = random_layers(wiring, generator, torch.float32)
    layers = [w * 10.0**-decades if k else w for k, w in enumerate(layers)]
    exact, slopes = dag.energy_and_grad(wiring, [w.double() for w in layers])
    value, grads = dag.energy_and_grad(wiring, layers)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(exact), rel=2e-6)  # float32 rounding of a sum of 120
    assert distance(grads, slopes) < 1e-5  # the stated float32 accuracy
    half = [w.bfloat16() for w in layers]
    again = dag.energy_and_grad(wiring, half)
    single = dag.energy_and_grad(wiring, [w.float() for w in half])
    assert torch.equal(again[0], single[0])
    assert [g.dtype for g in again[1]] == [torch.bfloat16] * 3


def test_refusals() -> None:
    wiring = Wiring((2, 3), ((0, 1),))
    with pytest.raises(UsageError, match=r"layer 1 must be a real floating matrix .* of shape \(3, 2\), got \(2, 3\)"):
        dag.energy_and_grad(wiring, [torch.ones(2, 3)])
    with pytest.raises(UsageError, match=r"has 1 weights .*, got 2"):
        dag.energy(wiring, [torch.ones(3, 2)] * 2)
    with pytest.raises(UsageError, match="identity edge must join groups of one size"):
        Wiring((2, 3), ((0, 1),), ((0, 1),))
    for pair in ((0, 0), (0, 2), (-1, 0)):
        with pytest.raises(UsageError, match="two different groups"):
            Wiring((2, 2), (pair,))
    for bad in (math.nan, math.inf):
        for compute in (dag.energy, dag.energy_and_grad):
            with pytest.raises(NonFiniteError, match="layer 1 of shape"):
                compute(wiring, [torch.full((3, 2), bad)])
    with pytest.raises(NonFiniteError, match="overflows"):
        dag.energy_and_grad(Wiring((9, 9), ((0, 1),), ((0, 1),)), [torch.full((9, 9), 3e38)])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.relu(self.inner(x)))


def residual_network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(9, 4), nn.ReLU(), Block(4), Block(4), nn.Linear(4, 3))


def test_the_energy_takes_a_residual_network() -> None:
    model = residual_network()
    weights = [p.detach() for n, p in model.named_parameters() if n.endswith("weight")]
    # Written out: groups 9, 4, 8, 4, 8, 4, 3.
    wiring = Wiring((9, 4, 8, 4, 8, 4, 3), ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)), ((1, 3), (3, 5)))
    for e in GraphEnergy.examples():
        expected, slopes = dag.energy_and_grad(wiring, weights, e.absolute)
        value, grads = e.value_and_grad(model)
        assert torch.equal(value, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, slopes, strict=True))
        assert float(e.value(model).detach()) == pytest.approx(float(expected), rel=1e-6)
        placed, named = e.for_model(model)
        assert isinstance(placed, WiredGraphEnergy)
        assert repr(placed) == repr(e)
        assert parse(repr(placed)).terms[0].energy == e
        assert named[2][0] == "2.outer.weight"


def test_a_residual_network_is_trained_with_it() -> None:
    model = residual_network()
    (term,) = parse("0.01*graph").terms
    placed = place(term, model, [], "grad")
    value, found = placed.value_and_gradients()
    expected, slopes = GraphEnergy().value_and_grad(model)
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert [b.name for b, _ in found][:2] == ["0.weight", "2.inner.weight"]
    assert all(torch.equal(g, s) for (_, g), s in zip(found, slopes, strict=True))
    assert placed.amortized(0.01) is not None
