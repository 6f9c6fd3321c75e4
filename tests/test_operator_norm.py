"""The (p, q) operator norm against brute force, closed forms and its own duality."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.operator_norm import certified, conjugate, dual_vector, lp_norm, operator_norm, power_method

F64 = torch.float64
INF = math.inf
EXPONENTS = (1, 1.3, 2, 3, INF)
PAIRS = list(product(EXPONENTS, EXPONENTS))
CLOSED = [(p, q) for p, q in PAIRS if p == 1 or q == INF or p == q == 2]
OPEN = [pair for pair in PAIRS if pair not in CLOSED]
# Of float64 sums and powers of at most a few dozen numbers.
ROUNDING = 1e-13


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=F64).to(dtype)


def norm(matrix: Tensor, p: float, q: float, restarts: int = 8, iterations: int = 50) -> Tensor:
    return operator_norm(matrix, p, q, restarts=restarts, iterations=iterations, generator=seeded(0))[0]


def maps(j: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """J v and J^T u."""
    return lambda v: (j @ v[..., None])[..., 0], lambda u: (j.mT @ u[..., None])[..., 0]


def by_signs(j: Tensor, q: float) -> Tensor:
    """||J||_{inf->q} exactly: the maximum of a convex function over a cube is at a corner."""
    corners = torch.tensor(list(product([1.0, -1.0], repeat=j.shape[-1])), dtype=F64)
    return lp_norm(corners @ j.mT, q).amax(-1)


def by_angle(j: Tensor, p: float, q: float) -> Tensor:
    """||J||_{p->q} of a matrix of two columns: all directions, to 1e-4 rad."""
    angle = torch.linspace(0, math.pi, 31416, dtype=F64)
    v = torch.stack([angle.cos(), angle.sin()], -1)
    return (lp_norm(v @ j.mT, q) / lp_norm(v, p)).amax(-1)


@pytest.mark.parametrize("p", [1, 1.0000001, 1.3, 2, 3, 100.0, INF])
def test_lp_norm_is_its_definition(p: float) -> None:
    v = gaussian(1, 3, 5)
    expected = v.abs().amax(-1) if p == INF else v.abs().pow(p).sum(-1).pow(1 / p)
    assert torch.allclose(lp_norm(v, p), expected, rtol=ROUNDING)


@pytest.mark.parametrize("p", [1, 1 + 1e-9, 1.5, 2, 7, 1e9, 1e300, INF])
def test_lp_norm_and_dual_vector_at_any_scale(p: float) -> None:
    v = torch.tensor([3.0, -4.0, 0.0, 4.0])
    reference, dual = lp_norm(v.double(), p), dual_vector(v.double(), p)
    for scale in (1e30, 1e20, 1.0, 1e-20, 1e-30):
        # float32 eps times a condition number of a few; float64 agrees beyond that
        assert float(lp_norm(v * scale, p)) == pytest.approx(float(reference) * scale, rel=1e-6)
        assert torch.allclose(dual_vector(v * scale, p).double(), dual, atol=1e-6)


@pytest.mark.parametrize("p", EXPONENTS)
def test_lp_norm_of_hostile_vectors(p: float) -> None:
    assert float(lp_norm(torch.zeros(4), p)) == 0
    assert lp_norm(torch.zeros(3, 0), p).tolist() == [0.0, 0.0, 0.0]
    assert float(lp_norm(torch.tensor([1.0, -INF]), p)) == INF
    assert math.isnan(float(lp_norm(torch.tensor([1.0, math.nan]), p)))
    half = gaussian(2, 50, dtype=torch.bfloat16)
    assert torch.equal(lp_norm(half, p), lp_norm(half.float(), p))


@pytest.mark.parametrize("p", EXPONENTS)
def test_the_gradient_of_lp_norm_is_the_dual_vector(p: float) -> None:
    v = gaussian(3, 2, 6).requires_grad_()
    (grad,) = torch.autograd.grad(lp_norm(v, p).sum(), v)
    assert torch.allclose(grad, dual_vector(v, conjugate(p)), atol=ROUNDING)
    assert v.grad is None
    (grad,) = torch.autograd.grad(lp_norm(v * 0, p).sum(), v)
    assert torch.equal(grad, torch.zeros_like(v))


@pytest.mark.parametrize("p", [1, 1.01, 1.3, 2, 3, 50, INF])
def test_dual_vector_attains_the_dual_norm(p: float) -> None:
    w, other = gaussian(4, 20, 7), gaussian(5, 100, 20, 7)
    v, other = dual_vector(w, p), other / lp_norm(other, p)[..., None]
    assert torch.allclose(lp_norm(v, p), torch.ones(20, dtype=F64), rtol=ROUNDING)
    assert torch.allclose((w * v).sum(-1), lp_norm(w, conjugate(p)), rtol=ROUNDING)
    assert bool(((w * other).sum(-1) <= (w * v).sum(-1) * (1 + ROUNDING)).all())  # Hoelder


def test_dual_vector_by_hand() -> None:
    w = torch.tensor([1.0, -8.0, 0.0, 8.0])
    assert dual_vector(w, 1).tolist() == [0, -1, 0, 0]  # the first of the largest entries
    assert dual_vector(w, INF).tolist() == [1, -1, 0, 1]
    # p = 4, p* - 1 = 1/3: cube roots 1, -2, 0, 2 over (1 + 16 + 16)^(1/4)
    assert torch.allclose(dual_vector(w, 4), torch.tensor([1.0, -2, 0, 2]) / 33**0.25)
    for p in EXPONENTS:
        assert torch.equal(dual_vector(torch.zeros(2, 3), p), torch.zeros(2, 3))
        assert dual_vector(torch.zeros(2, 0), p).shape == (2, 0)
        for bad in (math.nan, INF):  # a sign or a largest entry must not hide it
            assert bool(dual_vector(torch.tensor([5.0, bad, 1.0]), p).isnan().all())
        assert dual_vector(torch.ones(3, dtype=torch.bfloat16, requires_grad=True), p).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [0.99, 0, -1, math.nan, -INF, "2", None, True, 2j])
def test_exponents_that_are_no_norm_are_refused(p: float) -> None:
    j = torch.ones(2, 2)
    message = r"must be a number in \[1, inf\]"
    for of_vector in (lp_norm, dual_vector):
        with pytest.raises(UsageError, match=message):
            of_vector(j, p)
    for pair in ((p, 2), (1, p), (2, p)):
        for of_matrix in (norm, certified):
            with pytest.raises(UsageError, match=message):
                of_matrix(j, *pair)
        with pytest.raises(UsageError, match=message):
            power_method(*maps(j), torch.ones(2), *pair, 1)


def test_reference_matrix() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        j = torch.randn(4, 10, dtype=F64)
    expected = {
        (INF, 1): 19.75900666,
        (INF, 2): 10.46596274,
        (1, 2): 2.89796562,
        (INF, INF): 9.86655749,
        (2, INF): 3.51389836,
        (2, 2): 3.84146855,
    }
    for (p, q), value in expected.items():
        exact = certified(j, p, q)
        for computed in (norm(j, p, q), by_signs(j, q) if exact is None else exact):
            assert float(computed) == pytest.approx(value, abs=6e-9)  # eight printed decimals


@pytest.mark.parametrize("q", [1, 1.3, 2, 3, INF])
def test_brute_force_over_the_corners_of_the_cube(q: float) -> None:
    j = gaussian(6, 40, 4, 8)
    exact = by_signs(j, q)
    for iterations, restarts in ((0, 5), (1, 1), (3, 8), (50, 1)):
        assert bool((norm(j, INF, q, restarts, iterations) <= exact * (1 + ROUNDING)).all())
    assert torch.allclose(norm(j, INF, q, restarts=64), exact, rtol=ROUNDING)
    # (2, 1) and the like by duality: the transposed maps have the cube as the dual ball of their outputs.
    assert torch.allclose(norm(j.mT, conjugate(q), 1, restarts=64), exact, rtol=ROUNDING)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_brute_force_over_all_directions_of_the_plane(p: float, q: float) -> None:
    j = gaussian(7, 20, 3, 2)
    exact, value = by_angle(j, p, q), norm(j, p, q, restarts=16, iterations=300)
    # The grid misses a smooth maximum by its curvature times (1e-4)^2, a kink by its slope times 1e-4.
    assert bool((value >= exact * (1 - 1e-9)).all())
    assert bool((value <= exact * (1 + 1e-3)).all())


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_duality(p: float, q: float) -> None:
    j = gaussian(8, 12, 3, 4)
    value, dual = norm(j, p, q, 32, 150), norm(j.mT, conjugate(q), conjugate(p), 32, 150)
    # Rounding in closed form; else the power method, linearly convergent, stops after 150 iterations.
    assert torch.allclose(value, dual, rtol=ROUNDING if (p, q) in CLOSED else 1e-6)


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_the_vectors_attain_the_value(p: float, q: float) -> None:
    j = gaussian(9, 2, 3, 4, 6).requires_grad_()
    value, u, v, exact = operator_norm(j, p, q, generator=seeded(0))
    assert (value.shape, u.shape, v.shape) == ((2, 3), (2, 3, 4), (2, 3, 6))
    assert exact is ((p, q) in CLOSED)
    assert not any(x.requires_grad for x in (value, u, v))
    assert j.grad is None
    bilinear = (u[..., None, :] @ j.detach() @ v[..., None])[..., 0, 0]
    assert torch.allclose(bilinear, value, rtol=ROUNDING)
    for x, r in ((v, p), (u, conjugate(q))):
        assert torch.allclose(lp_norm(x, r), torch.ones_like(value), rtol=ROUNDING)
    closed = certified(j, p, q)
    assert (closed is not None) is exact
    if closed is not None:
        assert torch.allclose(closed, value, rtol=ROUNDING)
        (grad,) = torch.autograd.grad(closed.sum(), j)
        assert torch.allclose(grad, u[..., None] * v[..., None, :], atol=1e-12)  # singular vectors: eps / gap


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_a_row_and_a_column_are_exact(p: float, q: float) -> None:
    w = gaussian(10, 5, 7)
    # The first start is the maximizer itself, up to the rounding of powers.
    assert torch.allclose(norm(w[:, None, :], p, q, 1), lp_norm(w, conjugate(p)), rtol=ROUNDING)
    assert torch.allclose(norm(w[:, :, None], p, q, 1), lp_norm(w, q), rtol=ROUNDING)


@pytest.mark.parametrize(("p", "q"), OPEN)
def test_never_below_any_row_or_column(p: float, q: float) -> None:
    j = gaussian(11, 30, 5, 9)
    value = norm(j, p, q, restarts=3, iterations=0)
    least = torch.cat([lp_norm(j, conjugate(p)), lp_norm(j.mT, q)], -1).amax(-1)
    assert bool((value >= least * (1 - ROUNDING)).all())


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_the_value_never_falls(p: float, q: float) -> None:
    j, v, last = gaussian(12, 25, 5, 7), gaussian(13, 25, 7), torch.zeros(25, dtype=F64)
    upper = certified(j, p, q)
    for _ in range(12):
        value, _, v = power_method(*maps(j), v, p, q, 1)
        assert bool((value >= last * (1 - ROUNDING)).all())
        assert upper is None or bool((value <= upper * (1 + ROUNDING)).all())
        last = value


def test_error_shrinks_by_the_fourth_power_of_the_singular_value_ratio() -> None:
    s = torch.tensor([1.0, 0.861, 0.6], dtype=F64)
    left, right = torch.linalg.qr(gaussian(14, 5, 3)).Q, torch.linalg.qr(gaussian(15, 8, 3)).Q
    j = left @ s.diag() @ right.mT
    start = right.sum(-1)
    errors = []
    for k in range(25):
        value, _, _ = power_method(*maps(j), start, 2, 2, k)
        # v_k is proportional to sum_i s_i^(2k) v_i.
        assert float(value) == pytest.approx(float(((s ** (4 * k + 2)).sum() / (s ** (4 * k)).sum()).sqrt()), rel=1e-13)
        errors.append(1 - float(value))
    # The next correction is the error itself, 1e-7 at k = 24; an error of 1e-7 is known to 1e-9 of it.
    assert errors[24] / errors[23] == pytest.approx(0.861**4, rel=1e-6)


def test_spectral_norm_with_equal_singular_values() -> None:
    j = torch.linalg.qr(gaussian(16, 6, 6)).Q * 3
    values = torch.stack([norm(j, 2, 2), power_method(*maps(j), gaussian(17, 6), 2, 2, 0)[0]])  # any v is a maximizer
    assert values.tolist() == pytest.approx([3, 3], rel=ROUNDING)
    many = gaussian(18, 7, 6, 4)
    assert torch.allclose(norm(many, 2, 2), torch.linalg.svdvals(many)[:, 0], rtol=ROUNDING)


def test_ties() -> None:
    for p, q in PAIRS:
        # All ones: v is the constant vector, so m^(1/q) n^(1 - 1/p).
        expected = 4 ** (1 / q) * 5 ** (1 - 1 / p)
        assert float(norm(torch.ones(4, 5, dtype=F64), p, q)) == pytest.approx(expected, rel=ROUNDING)
        # The identity: n^(1/q - 1/p) for q <= p, else 1.
        expected = max(1.0, 4 ** (1 / q - 1 / p))
        assert float(norm(torch.eye(4, dtype=F64), p, q)) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(("p", "q"), [(2, 2), (3, 2), (INF, 1), (INF, 2), (3, 1.3), (2, 1)])
def test_positive_matrices_have_one_limit_for_p_at_least_q(p: float, q: float) -> None:
    j = gaussian(19, 5, 6).abs() + 0.1
    values = power_method(*maps(j), gaussian(20, 40, 6).abs() + 0.01, p, q, 200)[0]
    assert torch.allclose(values, norm(j, p, q, 32).expand(40), rtol=ROUNDING)


@pytest.mark.parametrize(("p", "q"), [(2, 2), (INF, 1), (INF, 2), (1, 2), (1.3, 3)])
def test_the_jacobian_of_a_network(p: float, q: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x, start = gaussian(21, 5, 6), gaussian(22, 5, 6)
    j = torch.func.vmap(torch.func.jacrev(net))(x).detach()

    leaf, cotangent = x.clone().requires_grad_(), torch.zeros(5, 4, dtype=F64, requires_grad=True)

    def apply_transpose(u: Tensor) -> Tensor:  # in the caller's grad mode
        return torch.autograd.grad(net(leaf), leaf, u, create_graph=True)[0]

    def apply(v: Tensor) -> Tensor:
        return torch.autograd.grad(apply_transpose(cotangent), cotangent, v)[0]

    by_network = power_method(apply, apply_transpose, start, p, q, 6)
    for got, expected in zip(by_network, power_method(*maps(j), start, p, q, 6)):
        assert torch.allclose(got, expected, atol=1e-11)  # rounding, amplified over six iterations
        assert not got.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_homogeneity(p: float, q: float) -> None:
    j = gaussian(23, 3, 4, 5)
    value = norm(j, p, q)
    for factor in (-2.5, 1e20, 1e-20, 1e200, 1e-200):
        assert torch.allclose(norm(j * factor, p, q) / abs(factor), value, rtol=1e-12)
    single = norm(j.float(), p, q)
    for factor in (1e20, 1e-20):  # float32 overflows at 3e38: squares do
        scaled, u, v, _ = operator_norm(j.float() * factor, p, q, generator=seeded(0))
        assert torch.allclose(scaled / factor, single, rtol=1e-4)  # of a few hundred float32 roundings
        assert bool(torch.cat([u, v], -1).isfinite().all())
        closed = certified(j.float() * factor, p, q)
        assert closed is None or torch.allclose(closed, scaled, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("p", "q"), [(2, 2), (INF, 1), (1, 2), (2, INF), (3, 1.3)])
def test_half_precision_is_computed_in_float32(p: float, q: float, dtype: torch.dtype) -> None:
    j = gaussian(24, 3, 4, 6, dtype=dtype)
    half, single = (operator_norm(x, p, q, generator=seeded(0)) for x in (j, j.float()))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(half[:3], single[:3]))
    value, *vectors = power_method(*maps(j), gaussian(25, 3, 6, dtype=dtype), p, q, 10)
    assert [x.dtype for x in (value, *vectors)] == [torch.float32, dtype, dtype]
    # A lower bound up to the half-precision product J v: eps is 2^-7 for bfloat16.
    assert bool((value <= norm(j.float(), p, q, 32) * (1 + 2 * torch.finfo(dtype).eps)).all())


@pytest.mark.parametrize(("p", "q"), [(2, 2), (INF, 1), (1, 2), (2, INF), (3, 1.3)])
def test_a_batch_is_its_matrices(p: float, q: float) -> None:
    j = gaussian(26, 4, 3, 5) * torch.tensor([1.0, 0.0, 1e8, 1e60], dtype=F64)[:, None, None]
    single = torch.stack([norm(x, p, q, 3) for x in j])  # three starts: none is random
    assert torch.allclose(norm(j, p, q, 3), single, rtol=ROUNDING, atol=0)
    assert norm(j[:1], p, q, 3).shape == (1,)


def test_randomness_is_the_generators() -> None:
    j = gaussian(27, 6, 12)
    before = torch.get_rng_state()
    first, again = (torch.cat(operator_norm(j, INF, 1, iterations=2, generator=seeded(5))[1:3]) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())
    assert float(norm(j, INF, 1, restarts=40)) >= float(norm(j, INF, 1, restarts=4))


@pytest.mark.parametrize(("p", "q"), [(2, 2), (1, 1), (INF, INF), (1.3, INF), (INF, 1), (2, 3)])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (2, 1, 5), (0, 4), (3, 0), (0, 3, 4), (2, 0, 0)])
def test_zero_and_empty_matrices(shape: tuple[int, ...], p: float, q: float) -> None:
    j = torch.zeros(shape, requires_grad=True)
    value, u, v, _ = operator_norm(j, p, q, generator=seeded(0))
    assert (value.shape, u.shape, v.shape) == (shape[:-2], shape[:-1], shape[:-2] + shape[-1:])
    assert torch.equal(value, torch.zeros(shape[:-2]))
    assert torch.equal(u, torch.zeros(shape[:-1]))
    if j.numel():
        assert torch.allclose(lp_norm(v, p), torch.ones(shape[:-2]))
    closed = certified(j, p, q)
    if closed is not None:
        assert torch.equal(closed, torch.zeros(shape[:-2]))
        (grad,) = torch.autograd.grad(closed.sum(), j)
        assert torch.equal(grad, torch.zeros(shape))


def test_the_power_method_on_zero_maps_and_zero_starts() -> None:
    j = torch.zeros(2, 3, 4)
    j[1] = 1.0
    for p, q in PAIRS:
        value, u, v = power_method(*maps(j), torch.ones(2, 4), p, q, 3)
        assert torch.equal(torch.cat([value[:1], u[0]]), torch.zeros(4))
        assert torch.allclose(lp_norm(v, p), torch.ones(2))
        assert float(value[1]) == pytest.approx(3 ** (1 / q) * 4 ** (1 - 1 / p), rel=1e-5)  # float32
    with pytest.raises(UsageError, match="1 of 2 starts"):
        power_method(*maps(j), torch.tensor([[0.0], [1.0]]).expand(2, 4), 2, 2, 3)
    with pytest.raises(UsageError, match="1 of 1 starts"):
        power_method(*maps(torch.ones(3, 0)), torch.ones(0), 2, 2, 3)
    for scale in (1e38, 1e-38):  # the l_1 norm of the first is beyond float32
        value = power_method(*maps(j[1]), torch.full((4,), scale), 2, 1, 2)[0]
        assert float(value) == pytest.approx(6, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize(("p", "q"), PAIRS[::2])
def test_nonfinite_inputs_are_refused(p: float, q: float, bad: float) -> None:
    j = torch.ones(2, 3, 4)
    j[1, 2, 0] = bad
    for use in (norm, certified):
        with pytest.raises(NonFiniteError, match="1 NaN or infinite"):
            use(j, p, q)
    for iterations in (0, 4):
        with pytest.raises(NonFiniteError, match=r"for 1 of 2 maps"):
            power_method(*maps(j), torch.ones(2, 4), p, q, iterations)
    with pytest.raises(NonFiniteError, match="start"):
        power_method(*maps(torch.ones(4, 4)), torch.tensor([1.0, 1.0, bad, 1.0]), p, q, 1)
    with pytest.raises(NonFiniteError, match="1 of 1 maps"):  # on the way back, where a sign could hide it
        power_method(lambda v: v, lambda u: u * bad, torch.ones(3), p, q, 1)


def test_misuse_is_named() -> None:
    j = torch.ones(3, 4)
    for wrong in (j.to(torch.complex64), j.long(), torch.ones(4)):
        for use in (norm, certified):
            with pytest.raises(UsageError, match="real floating-point matrix"):
                use(wrong, INF, 1)
    for wrong in (j.to(torch.complex64), j.long(), torch.tensor(1.0)):
        for of_vector in (lp_norm, dual_vector):
            with pytest.raises(UsageError, match="real floating-point vector"):
                of_vector(wrong, 2)
    for restarts in (0, 1.5, True):
        with pytest.raises(UsageError, match="restarts must be a whole number of at least 1"):
            operator_norm(j, 1, 1, restarts=restarts, generator=seeded(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="iterations must be a whole number of at least 0"):
        power_method(*maps(j), torch.ones(4), 2, 2, -1)
    with pytest.raises(UsageError, match=r"linear map of \(4,\) to \(\*\(\), m\), got \(2, 3\)"):
        power_method(lambda v: torch.ones(2, 3), maps(j)[1], torch.ones(4), 2, 2, 1)
    with pytest.raises(UsageError, match=r"linear map of \(3,\) to \(4,\), got \(3,\)"):
        power_method(maps(j)[0], lambda u: u, torch.ones(4), 2, 2, 1)
