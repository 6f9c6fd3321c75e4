"""Energies of singular values: published numbers, closed-form gradients, proximal maps, duals, bad matrices."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor

from groundstate.energies import Dualizable, MatrixEnergy, Proximable, Spectral, parse
from groundstate.energies.entrywise import Frobenius, SquaredFrobenius
from groundstate.energies.spectral import (
    KyFan,
    LogDet,
    Nuclear,
    OperatorNorm,
    Schatten,
    SpectralKSupport,
    StableRank,
)
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import spectral

CLASSES = (Nuclear, Schatten, OperatorNorm, KyFan, SpectralKSupport, LogDet, StableRank, SquaredFrobenius, Frobenius)
ENERGIES: list[MatrixEnergy] = [e for cls in CLASSES for e in cls.examples()]
NORMS = [e for e in ENERGIES if isinstance(e, Dualizable) and e.traits.degree == 1]
SHAPES = [(6, 4), (4, 6), (5, 5), (3, 2, 7, 4), (1, 5), (5, 1), (1, 1), (90, 70), (20, 90)]


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def waves(a: float, rows: int, columns: int) -> Tensor:
    """The fixture D(a; rows, columns) with entries sin(a + 1.3 i + 2.7 j + 0.9 i j)."""
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)
    return torch.sin(a + 1.3 * i + 2.7 * j + 0.9 * i * j)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(random((n, n), seed)).Q


def with_spectrum(s: list[float], rows: int, columns: int, seed: int = 1) -> Tensor:
    r = len(s)
    return orthogonal(rows, seed)[:, :r] * torch.tensor(s, dtype=torch.float64) @ orthogonal(columns, seed + 1)[:r]


def inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))


def test_published_numbers_of_a_fixture() -> None:
    w = waves(1, 6, 4)
    expected = [2.2934858963, 1.7782877613, 0.2268970466, 0.1210788759]
    assert spectral.singular_values(w).tolist() == pytest.approx(expected, abs=5e-11)  # given to 10 decimals
    value, grad = Nuclear().value_and_grad(w)
    assert value.item() == pytest.approx(4.4197495801, abs=5e-11)
    assert grad[0, 0].item() == pytest.approx(0.4741655997, abs=5e-11)
    assert Nuclear(smoothing=0.5).value(w).item() == pytest.approx(3.2581238844, abs=5e-11)
    assert LogDet(eps=0.5).value(w).item() == pytest.approx(5.9507918402, abs=5e-11)


@pytest.mark.parametrize(
    ("energy", "expected"),
    [
        (Nuclear(), 10.0),
        (SquaredFrobenius(), 30.0),
        (Frobenius(), 5.4772255751),
        (Nuclear(smoothing=0.5), 8.2520969409),
        (Schatten(p=0.5), 6.1462643699),
        (Schatten(p=2 / 3), 7.1873269748),
        (LogDet(eps=0.5), 12.2279564390),
        (StableRank(), 1.875),
        (OperatorNorm(), 4.0),
        (KyFan(k=2), 7.0),
        (KyFan(k=9), 10.0),
        (SpectralKSupport(k=1), 10.0),
        (SpectralKSupport(k=2), 7.0710678119),
        (SpectralKSupport(k=3), 5.8309518948),
        (SpectralKSupport(k=4), 5.4772255751),
        (SpectralKSupport(k=9), 5.4772255751),
    ],
    ids=repr,
)
def test_published_numbers_of_a_spectrum(energy: MatrixEnergy, expected: float) -> None:
    w = with_spectrum([4, 3, 2, 1], 7, 4)
    assert energy.value(w).item() == pytest.approx(expected, abs=1e-10)  # given to 10 decimals
    assert energy.value_and_grad(w.mT)[0].item() == pytest.approx(expected, abs=1e-10)
    assert isinstance(energy, Spectral)
    assert energy.of_singular_values(spectral.singular_values(w)).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_closed_form_equals_autograd(energy: MatrixEnergy) -> None:
    for number, shape in enumerate(SHAPES):
        w = random(shape, number).requires_grad_()
        value = energy.value(w)
        (expected,) = torch.autograd.grad(value.sum(), w)
        closed, grad = energy.value_and_grad(w)
        assert closed.shape == shape[:-2]
        assert not grad.requires_grad
        assert not closed.requires_grad
        assert torch.allclose(closed, value, rtol=1e-12, atol=0), shape  # two decompositions of one matrix
        size = expected.norm().clamp_min(1)
        assert ((grad - expected).norm() <= 1e-8 * size).all(), shape  # the bound that every energy keeps


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_gradient_is_the_directional_derivative(energy: MatrixEnergy) -> None:
    w, direction = random((8, 5), 3), random((8, 5), 4)
    h = 1e-6
    slope = (energy.value(w + h * direction) - energy.value(w - h * direction)) / (2 * h)
    _, grad = energy.value_and_grad(w)
    assert slope.item() == pytest.approx(inner(grad, direction).item(), rel=1e-7, abs=1e-7)  # h^2 and rounding / h


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_rank_deficient_gradients_are_minimal(energy: MatrixEnergy) -> None:
    low = with_spectrum([3.0, 2.0], 12, 5)
    row_space, column_space = torch.linalg.pinv(low) @ low, low @ torch.linalg.pinv(low)
    leaf = low.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(energy.value(leaf), leaf)
    for grad in (energy.value_and_grad(low)[1], by_autograd):
        # Nothing of the gradient lies outside the row and column space. Rounding of singular values (1e-16) costs
        # LogDet(eps=0.01), whose slope at zero is 2 / eps^2, the most.
        assert torch.allclose(column_space @ grad @ row_space, grad, rtol=0, atol=1e-10)
    zero = torch.zeros(4, 3)
    value, grad = energy.value_and_grad(zero)
    assert value.item() == 0
    assert (grad == 0).all()
    leaf = zero.clone().requires_grad_()
    (grad,) = torch.autograd.grad(energy.value(leaf), leaf)
    assert (grad == 0).all()


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_repeated_singular_values(energy: MatrixEnergy) -> None:
    for w in (torch.eye(6, dtype=torch.float64), 3 * orthogonal(6, 5)[:, :4], torch.eye(5)):
        value, grad = energy.value_and_grad(w)
        # At a multiple of an orthonormal matrix the gradient is a multiple of it too: all directions are alike.
        multiple = inner(grad, w) / inner(w, w)
        tolerance = 1e-5 if w.dtype == torch.float32 else 1e-12  # rounding of the decomposition, times slopes <= 40
        assert torch.allclose(grad, multiple * w, rtol=0, atol=tolerance)
        assert value.isfinite()
    _, grad = OperatorNorm().value_and_grad(torch.eye(5, dtype=torch.float64))
    assert torch.allclose(grad, torch.eye(5, dtype=torch.float64) / 5, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_degenerate_matrices(energy: MatrixEnergy, dtype: torch.dtype) -> None:
    shapes = [(0, 3), (3, 0), (2, 0, 4), (0, 3, 4), (1, 4), (4, 1), (1, 1)]
    scales = [1.0, 1e25, 1e-25, 1e-41, 0.0] if dtype is not torch.float16 else [1.0, 1e4, 1e-6, 0.0]
    cases = [random(shape, 6, dtype) for shape in shapes]
    cases += [(waves(1, 6, 4) * scale).to(dtype) for scale in scales]
    cases += [(with_spectrum([2.0], 6, 4) * scale).to(dtype) for scale in scales]
    for w in cases:
        before = w.clone()
        value, grad = energy.value_and_grad(w)
        assert value.shape == w.shape[:-2]
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (grad.shape, grad.dtype) == (w.shape, dtype)
        assert not value.isnan().any()
        if not isinstance(energy, SquaredFrobenius | Schatten | StableRank):
            assert value.isfinite().all()
            assert grad.isfinite().all()  # powers and the stable rank's slope 1 / sigma may leave the range
        assert torch.allclose(energy.value(w), value, rtol=1e-5, atol=0) or w.numel() == 0
        if isinstance(energy, Proximable):
            assert energy.prox(w, 0.1).shape == w.shape
            assert energy.prox(w, 0.1).isfinite().all()
        if isinstance(energy, Dualizable):
            assert energy.dual(w).isfinite().all()
            assert energy.lmo(w).isfinite().all()
            assert energy.lmo(w).dtype == dtype
        assert torch.equal(w, before)


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_scales_of_float32(energy: MatrixEnergy) -> None:
    degree = energy.traits.degree
    if degree is None:
        return
    w = waves(1, 6, 4)
    value, grad = energy.value_and_grad(w)
    for exponent in (80, -80, 100, -100):  # about 1e24, 1e-24, 1e30, 1e-30
        scale = 2.0**exponent
        scaled, scaled_grad = energy.value_and_grad((w * scale).float())
        if 1e-37 < value * scale**degree < 1e38:
            assert scaled.item() == pytest.approx(value.item() * scale**degree, rel=1e-5)  # float32 rounding
        if 1e-37 < scale ** (degree - 1) < 1e36:
            expected = grad * scale ** (degree - 1)
            error = (scaled_grad - expected).norm() / expected.norm()
            assert error <= 2e-3  # float32 rounding of W, times sigma_1 / sigma_r = 19, squared for p < 1


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_half_precision_is_float32_inside(energy: MatrixEnergy) -> None:
    w = random((40, 12), 7).bfloat16()
    value, grad = energy.value_and_grad(w)
    exact, exact_grad = energy.value_and_grad(w.double())
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)  # float32 rounding
    ulp = torch.finfo(torch.bfloat16).eps * exact_grad.abs()
    assert ((grad.double() - exact_grad).abs() <= ulp + 1e-5 * exact_grad.abs().max()).all()


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_layouts_and_autograd_views(energy: MatrixEnergy) -> None:
    w = random((10, 8), 8)
    parameter = torch.nn.Parameter(w.clone())
    views = [w.mT.contiguous().mT, w.repeat(1, 2)[:, ::2][:, :8].clone(), parameter, parameter[:, :8]]
    strided = torch.zeros(20, 8, dtype=torch.float64)
    strided[::2] = w
    views.append(strided[::2])
    value, grad = energy.value_and_grad(w)
    for view in (views[0], *views[2:]):
        again, again_grad = energy.value_and_grad(view)
        assert torch.allclose(again, value, rtol=1e-12, atol=0)  # another order of summation
        assert torch.allclose(again_grad, grad, rtol=0, atol=1e-10)
    expanded = w[:1].expand(4, 8)
    assert torch.allclose(energy.value_and_grad(expanded)[1], energy.value_and_grad(expanded.clone())[1], atol=1e-9)
    with torch.inference_mode():
        frozen = w.clone()
        assert energy.value_and_grad(frozen)[0] == value
    assert parameter.grad is None


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_batch_equals_loop(energy: MatrixEnergy) -> None:
    batch = torch.stack([random((40, 9), 9), with_spectrum([3.0, 1.0], 40, 9), torch.zeros(40, 9), waves(2, 40, 9)])
    for w in (batch, batch.float(), batch.mT):
        value, grad = energy.value_and_grad(w)
        for i in range(len(w)):
            one, one_grad = energy.value_and_grad(w[i])
            single = w.dtype == torch.float32
            assert value[i].item() == pytest.approx(one.item(), rel=1e-5 if single else 1e-10)
            # The route may differ: rounding of W's dtype times the condition number of the nonzero part.
            bound = (2e-3 if single else 1e-8) * (1 + float(one_grad.norm()))
            assert torch.allclose(grad[i], one_grad, rtol=0, atol=bound)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_nonfinite_weights_are_named(energy: MatrixEnergy, bad: float) -> None:
    w = random((5, 4), 10).float()
    w[2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"\(5, 4\) has 1 NaN or infinite"):
        energy.value(w)
    with pytest.raises(NonFiniteError, match=r"\(5, 4\) has 1 NaN or infinite"):
        energy.value_and_grad(w)


def test_refusals() -> None:
    for wrong in (torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.complex64)):
        for energy in (Nuclear(), SquaredFrobenius(), LogDet(eps=1.0)):
            with pytest.raises(UsageError, match="real floating-point matrix"):
                energy.value(wrong)
    for make in (
        lambda: Nuclear(smoothing=-1.0),
        lambda: Nuclear(smoothing=math.nan),
        lambda: Schatten(p=0.0),
        lambda: Schatten(p=math.inf),
        lambda: LogDet(eps=0.0),
        lambda: KyFan(k=0),
        lambda: SpectralKSupport(k=1.5),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(UsageError, match="must be"):
            make()


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_specs_and_pickles(energy: MatrixEnergy) -> None:
    assert parse(repr(energy)).terms[0].energy == energy
    again = pickle.loads(pickle.dumps(energy))
    assert again == energy
    assert again.traits == energy.traits


def test_traits_follow_the_exponent() -> None:
    assert (Schatten(p=0.5).traits.degree, Schatten(p=0.5).traits.convex) == (0.5, False)
    assert (Schatten(p=3).traits.degree, Schatten(p=3).traits.convex, Schatten(p=3).traits.smooth) == (3.0, True, True)
    assert (Nuclear().traits.degree, Nuclear(smoothing=1.0).traits.degree) == (1.0, None)
    assert Schatten.traits.degree is None


@pytest.mark.parametrize("energy", NORMS, ids=repr)
def test_prox_of_norms_satisfies_the_optimality_identity(energy: MatrixEnergy) -> None:
    assert isinstance(energy, Proximable)
    assert isinstance(energy, Dualizable)
    for w in (random((9, 6), 11), random((4, 3, 8), 12), with_spectrum([3.0, 3.0, 3.0, 0.5], 7, 6)):
        for step in (0.01, 0.7, 100.0):
            p = energy.prox(w, step)
            z = w - p
            # z is in step * subdifferential at p: rounding of sums of at most 54 terms.
            assert (energy.dual(z) <= step * (1 + 1e-10) + 1e-13).all()
            assert torch.allclose(inner(z, p), step * energy.value(p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("energy", [e for e in ENERGIES if isinstance(e, Proximable)], ids=repr)
def test_prox_is_stationary_and_not_beaten(energy: MatrixEnergy) -> None:
    assert isinstance(energy, Proximable)
    w = random((7, 5), 13)
    for step in (0.05, 0.5):
        p = energy.prox(w, step)

        def objective(u: Tensor, step: float = step) -> Tensor:
            return step * energy.value(u) + (u - w).square().sum((-2, -1)) / 2

        best = objective(p)
        nudges = random((300, 7, 5), 14) * torch.logspace(-6, 0, 300, dtype=torch.float64)[:, None, None]
        assert (objective(p + nudges) >= best - 1e-12).all()  # rounding of values of order 10
        for other in (w, torch.zeros_like(w), 0.5 * w):
            assert objective(other) >= best


def test_prox_refuses_steps_that_make_no_sense() -> None:
    for step in (-1e-3, math.nan, math.inf):
        for energy in (Nuclear(), SquaredFrobenius(), Frobenius(), LogDet(eps=1.0)):
            with pytest.raises(UsageError, match="step of a proximal map"):
                energy.prox(torch.eye(2), step)
    for energy in ENERGIES:
        if isinstance(energy, Proximable):
            w = random((5, 4), 30)
            assert torch.allclose(energy.prox(w, 0.0), w, rtol=0, atol=1e-13)  # rounding of one decomposition


def test_singular_value_thresholding_and_clipping_split_the_matrix() -> None:
    w = random((9, 6), 15)
    for step in (0.1, 1.0, 3.0):
        thresholded = Nuclear().prox(w, step)
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        clipped = u * s.clamp_max(step) @ vh
        assert torch.allclose(thresholded + clipped, w, rtol=0, atol=1e-13)  # Moreau; rounding of one product
        assert spectral.rank(thresholded) == (s > step).sum()
    low = Nuclear().prox(random((60, 40), 16).float(), 9.0)
    s = spectral.singular_values(random((60, 40), 16))
    assert spectral.rank(low) == (s > 9.0).sum()


@pytest.mark.parametrize("energy", NORMS, ids=repr)
def test_duality(energy: MatrixEnergy) -> None:
    assert isinstance(energy, Dualizable)
    for shape in ((7, 5), (3, 4, 6), (1, 4)):
        w, g = random(shape, 17), random(shape, 18)
        assert (inner(w, g).abs() <= energy.value(w) * energy.dual(g) * (1 + 1e-12)).all()
        u = energy.lmo(g)
        assert torch.allclose(inner(g, u), -energy.dual(g), rtol=1e-12, atol=0)
        assert torch.allclose(energy.value(u), torch.ones(shape[:-2], dtype=torch.float64), rtol=1e-12, atol=0)
        # A norm is the dual of its dual: its own subgradient attains it.
        _, grad = energy.value_and_grad(w)
        assert torch.allclose(energy.dual(grad), torch.ones(shape[:-2], dtype=torch.float64), rtol=1e-9, atol=0)
        assert torch.allclose(inner(grad, w), energy.value(w), rtol=1e-10, atol=0)


def test_smoothed_nuclear_minimizer_lies_on_the_boundary() -> None:
    energy, g = Nuclear(smoothing=0.1), random((6, 4), 19)
    u = energy.lmo(g)
    assert energy.value(u).item() == pytest.approx(1, rel=1e-9)  # accuracy of the bisection
    assert inner(g, u).item() == pytest.approx(-energy.dual(g).item(), rel=1e-12)
    others = random((200, 6, 4), 20)
    others /= Nuclear().value(others)[:, None, None]  # inside, since the smoothed value is below the norm
    assert (inner(g, others).abs() <= energy.dual(g)).all()


def test_inequalities_between_norms() -> None:
    for w in (random((9, 6), 21), random((6, 9), 22), with_spectrum([5.0, 0.1], 6, 6)):
        operator, frobenius, nuclear = (e.value(w) for e in (OperatorNorm(), Frobenius(), Nuclear()))
        slack = 1 + 1e-12  # rounding
        assert operator <= frobenius * slack
        assert frobenius <= nuclear * slack
        assert nuclear <= spectral.rank(w).sqrt() * frobenius * slack
        values = torch.stack([SpectralKSupport(k=k).value(w) for k in range(1, 8)])
        assert (values[1:] <= values[:-1] * slack).all()
        assert (torch.stack([KyFan(k=k).value(w) for k in range(1, 8)]).diff() >= -1e-12).all()
        assert 1 <= StableRank().value(w) * slack <= spectral.rank(w) * slack**2


@pytest.mark.parametrize("energy", ENERGIES, ids=repr)
def test_invariance_under_orthogonal_maps(energy: MatrixEnergy) -> None:
    w, p, q = random((6, 4), 23), orthogonal(6, 24), orthogonal(4, 25)
    value, grad = energy.value_and_grad(w)
    turned, turned_grad = energy.value_and_grad(p @ w @ q)
    assert turned.item() == pytest.approx(value.item(), rel=1e-11)  # rounding times the condition number
    assert torch.allclose(turned_grad, p @ grad @ q, rtol=0, atol=1e-9 * (1 + grad.norm().item()))


def test_log_det_by_cholesky_equals_log_det_by_singular_values() -> None:
    for eps in (1e-6, 1e-3, 0.1, 1.0, 30.0, 1e6):
        energy = LogDet(eps=eps)
        for w in (random((30, 8), 26), random((8, 30), 27), with_spectrum([2.0, 1.0], 9, 5)):
            s = torch.linalg.svdvals(w)
            exact = torch.log1p((s / eps).square()).sum()
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 3e-5)):
                # float32: rounding of W, times 2 / log(sigma / eps) or 2; of the kernel of the low-rank W at small eps
                if dtype == torch.float32 and len(s) == 5 and eps < 1e-2:
                    continue
                value, _ = energy.value_and_grad(w.to(dtype))
                assert value.item() == pytest.approx(exact.item(), rel=tolerance), (eps, dtype)
                assert energy.value(w.to(dtype)).item() == pytest.approx(exact.item(), rel=tolerance)


def test_the_svd_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.linalg.svd
    w = random((12, 5), 28)
    failing = {torch.float32}

    def svd(a: Tensor, full_matrices: bool = True) -> object:
        if a.dtype in failing:
            raise spectral.LinAlgError("did not converge")
        return original(a, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    u, s, vh = spectral.svd(w.float())
    assert u.dtype == torch.float32
    assert torch.allclose(u * s @ vh, w.float(), atol=1e-6)  # float32 rounding
    failing.add(torch.float64)
    for matrix in (w, w.mT, with_spectrum([3.0, 2.0], 8, 4), torch.zeros(3, 2, dtype=torch.float64)):
        u, s, vh = spectral.svd(matrix)
        assert torch.allclose(u * s[..., None, :] @ vh, matrix, rtol=0, atol=1e-12)
        assert torch.allclose(s, torch.linalg.svdvals(matrix), rtol=0, atol=1e-7)  # sqrt of Gram rounding
        assert torch.allclose(u.mT @ u, torch.eye(u.shape[1], dtype=torch.float64), atol=1e-12)

    def eigh(a: Tensor) -> object:
        raise spectral.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    with pytest.raises(NonFiniteError, match=r"\(12, 5\) .* converges"):
        spectral.svd(w)


def test_singular_values_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original, w = torch.linalg.svdvals, random((5, 12), 29)
    expected = original(w)
    failing = {torch.float32}

    def svdvals(a: Tensor) -> Tensor:
        if a.dtype in failing:
            raise spectral.LinAlgError("did not converge")
        return original(a)

    monkeypatch.setattr(torch.linalg, "svdvals", svdvals)
    assert torch.allclose(spectral.singular_values(w.float()).double(), expected, rtol=1e-6)  # float32 rounding
    failing.add(torch.float64)
    assert torch.allclose(spectral.singular_values(w), expected, rtol=1e-12)
    with pytest.raises(NonFiniteError, match="converges"):
        spectral.singular_values(w.requires_grad_())


def test_scale_is_an_exact_power_of_two() -> None:
    for exponent in (-140, -126, -41, 0, 41, 126):
        w = torch.tensor([[1.0]]) * 2.0**exponent
        work, scale = spectral.prepare(w)
        factor = 1.0 if scale is None else scale.item()
        assert math.frexp(factor)[0] == 0.5
        assert work.item() * factor == w.item()
