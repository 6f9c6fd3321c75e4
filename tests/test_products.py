"""Nuclear norms of products without the product, and the energy of attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundstate import Regularizer
from groundstate.energies.attention import AttentionNuclear
from groundstate.errors import NonFiniteError, UsageError
from groundstate.measure import measure
from groundstate.norms.polar import polar
from groundstate.norms.products import product_nuclear


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nuclear(w: Tensor) -> float:
    return float(torch.linalg.svdvals(w.detach()).sum())


@pytest.mark.parametrize("shapes", [((7, 3), (5, 3)), ((2, 6), (5, 6)), ((2, 3, 6, 4), (2, 3, 4, 4)), ((4, 1), (1, 1))])
def test_value_and_gradients_are_those_of_the_product(shapes: Any) -> None:
    a, b = normal(shapes[0], 1), normal(shapes[1], 2)
    value, by_a, by_b = product_nuclear(a, b)
    q, expected = polar(a @ b.mT)
    torch.testing.assert_close(value, expected)
    # the product has rank min(m, n, r); its polar factor P is of minimal norm, and dE = <P, dA B^T + A dB^T>
    torch.testing.assert_close(by_a, q @ b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_b, q.mT @ a, rtol=1e-9, atol=1e-9)


def test_expected_numbers() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(256, 32, dtype=torch.float64), torch.randn(256, 32, dtype=torch.float64)
    assert float(product_nuclear(a, b)[0]) == pytest.approx(8054.063035, abs=1e-6)
    bound = float(a.square().sum() + b.square().sum()) / 2
    assert bound == pytest.approx(8329.226462, abs=1e-6)


def test_balanced_factors_attain_the_bound() -> None:
    u, s, vh = torch.linalg.svd(normal((6, 5), 3), full_matrices=False)
    a, b = u * s.sqrt(), vh.mT * s.sqrt()
    value, by_a, by_b = product_nuclear(a, b)
    assert float(value) == pytest.approx(float(a.square().sum() + b.square().sum()) / 2)
    torch.testing.assert_close(by_a, a)  # the gradient of the bound, which touches the norm here
    torch.testing.assert_close(by_b, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_degenerate_factors(dtype: torch.dtype) -> None:
    a, b = normal((5, 3), 4, dtype), normal((4, 3), 5, dtype)
    value, by_a, by_b = product_nuclear(a, b)
    assert (by_a.dtype, by_b.dtype) == (dtype, dtype)
    assert float(value) == pytest.approx(nuclear(a.double() @ b.double().mT), rel=1e-5)
    zero, by_zero, by_other = product_nuclear(torch.zeros_like(a), b)
    assert float(zero) == 0.0
    assert not bool(by_zero.any())
    assert not bool(by_other.any())
    u, v = torch.ones(5, 1, dtype=dtype), torch.ones(4, 1, dtype=dtype)
    value, by_u, _ = product_nuclear(u.expand(5, 3), v.expand(4, 3))  # rank one: 3 u v^T
    assert float(value) == pytest.approx(3 * 20**0.5, rel=1e-5)
    torch.testing.assert_close(by_u.double(), torch.full((5, 3), 2 / 5**0.5).double(), rtol=1e-2, atol=0)  # bfloat16
    # factors orthogonal to one another, turned: the product is rounding, which counts as zero
    turn = torch.linalg.qr(normal((6, 6), 6))[0]
    one, other = turn[:, :3] @ normal((3, 4), 7), turn[:, 3:] @ normal((3, 5), 8)
    value, *grads = product_nuclear(one.mT.to(torch.float32), other.mT.to(torch.float32))
    assert float(value) == 0.0
    assert not any(bool(g.any()) for g in grads)


@pytest.mark.parametrize("exponent", [20, -20])
def test_any_scale(exponent: int) -> None:
    a, b = normal((5, 3), 9), normal((4, 3), 10)
    value, by_a, by_b = product_nuclear(a, b)
    scale = 10.0**exponent
    far, by_far, by_near = product_nuclear((scale * a).float(), b.float())
    assert float(far) == pytest.approx(scale * float(value), rel=1e-5)
    torch.testing.assert_close(by_far.double(), by_a, rtol=1e-4, atol=1e-5)  # float32
    torch.testing.assert_close(by_near.double() / scale, by_b, rtol=1e-4, atol=1e-5)
    both = product_nuclear((scale * a).float(), (scale * b).float())
    assert float(both[0]) == (math.inf if exponent > 0 else pytest.approx(0.0, abs=1e-37))  # 1e40, 1e-40 in float32
    assert all(bool(g.isfinite().all()) for g in both[1:])


def test_what_does_not_fit_is_named() -> None:
    for a, b in (
        (torch.ones(3, 2), torch.ones(3, 1)),
        (torch.ones(2, 3, 2), torch.ones(3, 2)),
        (torch.ones(2), 0 * torch.ones(2)),
    ):
        with pytest.raises(UsageError, match="expected factors"):
            product_nuclear(a, b)
    with pytest.raises(NonFiniteError, match="1 NaN or infinite"):
        product_nuclear(torch.tensor([[math.nan]]), torch.ones(1, 1))


class Grouped(nn.Module):
    """Attention with fewer heads of keys and values, which says the size of a head."""

    def __init__(self, d: int = 8, heads: int = 4, key_heads: int = 2, size: int = 3) -> None:
        super().__init__()
        self.q_proj = nn.Linear(d, heads * size, bias=False)
        self.k_proj = nn.Linear(d, key_heads * size, bias=False)
        self.v_proj = nn.Linear(d, key_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, d, bias=False)
        self.head_dim = size


def brute_force(q: Tensor, k: Tensor, v: Tensor, o: Tensor, heads: int) -> tuple[float, float]:
    """The two sums over heads, of the products themselves."""
    size = q.shape[0] // heads
    share = heads * size // k.shape[0]
    qk = vo = 0.0
    for h in range(heads):
        rows, shared = slice(h * size, (h + 1) * size), slice(h // share * size, (h // share + 1) * size)
        qk += nuclear(q[rows].mT @ k[shared])
        vo += nuclear(o[:, rows] @ v[shared])
    return qk, vo


def models() -> dict[str, tuple[nn.Module, Any]]:
    torch.manual_seed(0)
    packed = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    apart = nn.MultiheadAttention(8, 4, kdim=5, vdim=6, dtype=torch.float64)
    grouped = Grouped().double()
    return {
        "packed": (packed, (*packed.in_proj_weight.chunk(3), packed.out_proj.weight, 2)),
        "apart": (apart, (apart.q_proj_weight, apart.k_proj_weight, apart.v_proj_weight, apart.out_proj.weight, 4)),
        "grouped": (grouped, (*(getattr(grouped, f"{n}_proj").weight for n in "qkvo"), 4)),
    }


@pytest.mark.parametrize("kind", ["packed", "apart", "grouped"])
def test_attention_is_the_sum_over_heads(kind: str) -> None:
    model, (q, k, v, o, heads) = models()[kind]
    qk, vo = brute_force(q, k, v, o, heads)
    for energy, expected in (
        (AttentionNuclear(), qk + vo),
        (AttentionNuclear(vo=False), qk),
        (AttentionNuclear(qk=False), vo),
    ):
        placed, named = energy.for_model(model)
        weights = [p for _, p in named]
        assert {id(p) for p in weights} <= {id(p) for p in model.parameters()}
        value, grads = placed.value_and_grad(weights)
        assert float(value) == pytest.approx(expected)
        slopes = torch.autograd.grad(placed.value(weights), weights)
        for d, (g, s) in enumerate(zip(grads, slopes, strict=True)):
            torch.testing.assert_close(g, s)
            step = normal(tuple(g.shape), d)
            moved = [[w.detach() + (h * step if i == d else 0) for i, w in enumerate(weights)] for h in (1e-6, -1e-6)]
            slope = float(placed.value(moved[0]) - placed.value(moved[1])) / 2e-6
            assert slope == pytest.approx(float((g * step).sum()), rel=1e-6, abs=1e-7)  # h^2 and 1e-16 / h
        assert sum(float((g * w.detach()).sum()) for g, w in zip(grads, weights, strict=True)) == pytest.approx(
            2 * expected
        )


def test_attention_in_training_and_as_a_measure() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    q, k, v = model.self_attn.in_proj_weight.chunk(3)
    expected = sum(brute_force(q, k, v, model.self_attn.out_proj.weight, 2))
    table = measure(model, "attention_nuclear + nuclear")
    assert table.totals["attention_nuclear"] == pytest.approx(expected, rel=1e-5)  # float32
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    reg = Regularizer(model, 1.0 * AttentionNuclear()).attach(optimizer)
    assert list(reg.values()) == ["attention_nuclear"]
    x = torch.randn(2, 3, 8)
    before = reg.values()["attention_nuclear"]
    for _ in range(5):
        optimizer.zero_grad()
        (0 * model(x).sum()).backward()
        optimizer.step()
    assert reg.values()["attention_nuclear"] < 0.9 * before
    loss = Regularizer(model, AttentionNuclear(), coupling="loss").loss()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(reg.values()["attention_nuclear"], rel=1e-5)


def test_where_there_is_no_attention() -> None:
    with pytest.raises(UsageError, match="finds no attention in Linear"):
        Regularizer(nn.Linear(2, 2), AttentionNuclear())
    with pytest.raises(UsageError, match="finds no attention in Linear"):
        measure(nn.Linear(2, 2), "attention_nuclear")
    with pytest.raises(UsageError, match="its modules are not in the file"):
        measure({"weight": torch.ones(2, 2)}, "attention_nuclear")
    table = measure(nn.Linear(2, 2), "attention_nuclear + nuclear")
    assert any("finds no attention" in n for n in table.notes)
    assert not any("attention" in n for n in measure(nn.Linear(2, 2)).notes)
    with pytest.raises(UsageError, match="needs one of qk and vo"):
        AttentionNuclear(qk=False, vo=False)
    with pytest.raises(UsageError, match="qk must be True or False"):
        AttentionNuclear(qk=1)  # pyright: ignore[reportArgumentType]


def test_attention_that_cannot_be_read_is_named() -> None:
    silent = Grouped()
    del silent.head_dim
    with pytest.raises(UsageError, match="does not say into how many heads its 12 queries fall"):
        AttentionNuclear().for_model(silent)
    with pytest.raises(UsageError, match=r"k_proj.weight has 9 rows, which do not fit 4 heads of 3"):
        AttentionNuclear().for_model(Grouped(key_heads=3))
    wrapped = Grouped()
    nn.utils.parametrizations.weight_norm(wrapped.q_proj)
    with pytest.raises(UsageError, match=r"q_proj.weight is parametrized"):
        AttentionNuclear().for_model(wrapped)
    told = Grouped()
    del told.head_dim
    object.__setattr__(told, "num_heads", 4)
    placed, _ = AttentionNuclear().for_model(told)
    assert [heads.heads for heads in getattr(placed, "layers")] == [4]  # noqa: B009


def test_bad_weights_are_named() -> None:
    model = Grouped()
    with torch.no_grad():
        model.k_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="the attention 'Grouped': the weight"):
        Regularizer(model, AttentionNuclear()).values()
    assert "non-finite" in {r.status for r in measure(model, "nuclear + attention_nuclear").rows}
    with torch.no_grad():
        [p.zero_() for p in model.parameters()]
    placed, named = AttentionNuclear().for_model(model)
    value, grads = placed.value_and_grad([p for _, p in named])
    assert float(value) == 0.0
    assert not any(bool(g.any()) for g in grads)
    half = Grouped().bfloat16()
    placed, named = AttentionNuclear().for_model(half)
    assert {g.dtype for g in placed.value_and_grad([p for _, p in named])[1]} == {torch.bfloat16}
