"""Singular value thresholding: every route against a float64 SVD, exact ranks, projections, what routes must refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from groundstate.energies.spectral import Nuclear
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import thresholding as module
from groundstate.norms.eigenvectors import eigenpairs, gram
from groundstate.norms.thresholding import (
    project_nuclear_ball,
    project_operator_ball,
    singular_value_threshold,
    threshold_with_subspace,
)

SHAPES = [(120, 120), (300, 100), (100, 300), (130, 60)]
ROUTES: tuple[module.Route, ...] = ("auto", "svd", "gram")
DTYPES = [torch.float32, torch.float64]


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(s: Tensor, rows: int, columns: int, seed: int = 1) -> Tensor:
    u = torch.linalg.qr(random((rows, len(s)), seed)).Q
    v = torch.linalg.qr(random((columns, len(s)), seed + 1)).Q
    return u * s @ v.mT


def exact(w: Tensor, t: float) -> Tensor:
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return (u * (s - t).clamp_min(0)[..., None, :]) @ vh


def rank(p: Tensor) -> int:
    """Singular values above rounding of the largest (all kept ones are far above it in these tests)."""
    s = torch.linalg.svdvals(p.double())
    return int((s > 50 * torch.finfo(p.dtype).eps * s[0]).sum()) if s[0] > 0 else 0


def spectrum(n: int) -> Tensor:
    return torch.linspace(3.0, 0.1, n, dtype=torch.float64)


def between(s: Tensor, r: int) -> float:
    """A threshold that r singular values survive."""
    return float((s[r - 1] + s[r]) / 2)


def refuse_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("fell back to the SVD")

    monkeypatch.setattr(module, "svd", refuse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_threshold_equals_a_float64_svd(shape: tuple[int, int], route: module.Route, dtype: torch.dtype) -> None:
    s = spectrum(min(shape))
    w = with_spectrum(s, *shape).to(dtype)
    for r in (1, 8, len(s) // 2, len(s) - 1):
        t = between(s, r)
        p = singular_value_threshold(w, t, route)
        expected = exact(w, t)
        # Rounding of W, eps * |s| of those kept, is all that the SVD promises either; 8e-6 is a fast route's share.
        bound = 8e-6 * expected.norm() + 8e-7 * s[:r].norm() if dtype == torch.float32 else 1e-11 * s[:r].norm()
        assert (p - expected).norm() <= bound
        assert rank(p) == r
        assert (p.dtype, p.shape) == (dtype, w.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(120, 120), (300, 100), (100, 300)], ids=str)
def test_large_matrices_do_without_an_svd(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = spectrum(min(shape))
    w = with_spectrum(s, *shape).to(dtype)
    refuse_the_svd(monkeypatch)
    for r in (0, 1, 20, len(s) - 1):
        t = between(s, r) if r else 3.2
        assert rank(singular_value_threshold(w, t)) == r
        if r <= 20:  # a clip far below the largest singular value is beyond a float32 Gram matrix
            project_operator_ball(w, t)
    project_nuclear_ball(w, 20.0)


def test_a_small_threshold_needs_no_svd_while_large_singular_values_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    s = torch.logspace(0, -4, 100, dtype=torch.float64)
    t = between(s, 60)
    square, tall = with_spectrum(s, 100, 100).float(), with_spectrum(s, 400, 100).float()
    few = with_spectrum(torch.logspace(0, -4, 100, dtype=torch.float64) ** 3, 100, 100).float()
    small = 1e-9
    truth = exact(few, small)
    # The allowance of a fast route: 8e-6 of the result and 8 eps of the singular values kept, |s| = 2.4 and 1.5.
    assert (singular_value_threshold(few, small, "gram") - truth).norm() <= 2e-5
    refuse_the_svd(monkeypatch)
    for w in (square, tall):
        assert (singular_value_threshold(w, t, "gram") - exact(w, t)).norm() <= 2e-5
    with pytest.raises(AssertionError, match="fell back"):
        singular_value_threshold(few, small, "gram")


@pytest.mark.parametrize("route", ROUTES)
def test_ties_at_the_threshold(route: module.Route) -> None:
    s = torch.cat([torch.full((10,), 2.0), torch.full((20,), 1.0), torch.full((70,), 0.2)]).double()
    for shape in ((100, 100), (260, 100)):
        w = with_spectrum(s, *shape)
        for x in (w, w.float()):
            p = singular_value_threshold(x, 1.0, route)
            # The twenty tied ones are within rounding of the threshold: kept or not, they weigh no more than that.
            assert (p - exact(w, 1.0)).norm() <= 100 * torch.finfo(x.dtype).eps
            assert rank(p) == 10
            above = singular_value_threshold(x, 0.9, route)
            assert rank(above) == 30
    q = torch.linalg.qr(random((120, 120))).Q
    assert singular_value_threshold(q, 1.0, route).norm() <= 1e-13
    assert torch.allclose(singular_value_threshold(3 * q, 1.0, route), 2 * q, rtol=0, atol=1e-13)


def test_what_is_known_without_a_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_the_svd(monkeypatch)
    for w in (random((5, 4)), random((2, 120, 110)).float(), torch.zeros(3, 3), torch.zeros(120, 120)):
        same = singular_value_threshold(w, 0.0)
        assert torch.equal(same, w)
        same.fill_(7.0)  # no memory is shared
        assert not (w == 7.0).any()
        for huge in (1e4, 1e30, 1e300):
            assert (singular_value_threshold(w, huge) == 0).all()
            assert torch.equal(project_operator_ball(w, huge), w)
            assert torch.equal(project_nuclear_ball(w, huge), w)
        assert (project_operator_ball(w, 0.0) == 0).all()
        assert (project_nuclear_ball(w, 0.0) == 0).all()
    for shape in ((0, 3), (3, 0), (2, 0, 3), (0, 4, 3)):
        for route in ROUTES:
            for operation in (singular_value_threshold, project_operator_ball, project_nuclear_ball):
                assert operation(torch.zeros(shape), 1.0, route).shape == shape


@pytest.mark.parametrize("route", ROUTES)
def test_shapes_with_one_side_of_one(route: module.Route) -> None:
    for shape in ((1, 1), (1, 5), (5, 1), (2, 1), (2, 2), (2, 3)):
        w = 3 * random(shape, 4)
        assert torch.allclose(singular_value_threshold(w, 1.0, route), exact(w, 1.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_batches_and_layouts(route: module.Route, dtype: torch.dtype) -> None:
    s = spectrum(100)
    batch = torch.stack([with_spectrum(s * c, 130, 100, k) for k, c in enumerate((1.0, 2.0, 1e-3, 0.0))]).to(dtype)
    for w in (batch, batch.mT, batch.reshape(2, 2, 130, 100)):
        for operation in (singular_value_threshold, project_operator_ball):
            result = operation(w, 1.51, route)
            assert result.shape == w.shape
            for one, of_one in zip(w.reshape(-1, *w.shape[-2:]), result.reshape(-1, *w.shape[-2:])):
                assert torch.allclose(operation(one, 1.51, "svd"), of_one, rtol=0, atol=1e-5)  # two float32 routes
    parameter = torch.nn.Parameter(batch[0].clone())
    with torch.inference_mode():
        inference = batch[0].clone()
    for w in (parameter[:, ::2], parameter.T[::2], batch[1:2].expand(3, -1, -1), inference):
        p = singular_value_threshold(w, 1.51, route)
        assert not p.requires_grad
        assert torch.allclose(p, singular_value_threshold(w.detach().clone(), 1.51, "svd"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_scales(route: module.Route, dtype: torch.dtype) -> None:
    s = spectrum(100)
    for shape in ((100, 100), (300, 100)):
        w = with_spectrum(s, *shape).to(dtype)
        t = between(s, 20)
        for scale in (2.0**83, 2.0**-83, 2.0**-120):
            scaled = singular_value_threshold(w * scale, t * scale, route)
            # A power of two commutes with every rounding, so only a different route could show.
            assert torch.allclose(scaled / scale, singular_value_threshold(w, t, route), rtol=0, atol=1e-5)
            inside = project_nuclear_ball(w * scale, 30 * scale, route)
            assert torch.allclose(inside / scale, project_nuclear_ball(w, 30.0, route), rtol=0, atol=1e-5)
    for tiny in (1e-41, 1e-45):  # subnormal in float32
        assert singular_value_threshold(torch.full((120, 120), tiny), 1e-45, route).isfinite().all()
    mixed = torch.stack([w, w * 2.0**-100, w * 2.0**100])
    p = singular_value_threshold(mixed, t, route)
    assert torch.allclose(p[0], singular_value_threshold(w, t), rtol=0, atol=1e-5)
    assert (p[1] == 0).all()
    assert torch.allclose(p[2] / 2.0**100, w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    w = with_spectrum(spectrum(100), 130, 100).to(dtype)
    for operation, level in (
        (singular_value_threshold, 1.5),
        (project_operator_ball, 1.5),
        (project_nuclear_ball, 40.0),
    ):
        result = operation(w, level)
        assert result.dtype == dtype
        expected = operation(w.double(), level, "svd")
        # Half a spacing of the rounded result, and the float32 error before it.
        assert ((result.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_moreau(shape: tuple[int, int], route: module.Route, dtype: torch.dtype) -> None:
    s = spectrum(min(shape))
    w = with_spectrum(s, *shape).to(dtype)
    small = 1e-5 if dtype == torch.float32 else 1e-11  # relative error of a route
    for t in (0.4, 1.3, 2.7):
        prox, clip = singular_value_threshold(w, t, route), project_operator_ball(w, t, route)
        assert (prox + clip - w).norm() <= 2 * small * w.norm()
        norms = torch.linalg.svdvals(clip.double())
        assert norms[0] <= t * (1 + small)
        # <prox, clip> = t * nuclear norm of prox: clip / t is a subgradient there.
        assert (prox * clip).sum().item() == pytest.approx(t * (s - t).clamp_min(0).sum().item(), rel=10 * small)
        # The other pair: w - projection on the nuclear ball is the prox of radius * operator norm, which clips.
        radius = float((s - t).clamp_min(0).sum())
        lowered = project_nuclear_ball(w, radius, route)
        assert (lowered - prox).norm() <= 10 * small * w.norm()
        assert torch.linalg.svdvals(lowered.double()).sum().item() == pytest.approx(radius, rel=10 * small)


def test_projections_leave_what_is_inside() -> None:
    w = with_spectrum(spectrum(100), 120, 100).float()
    total = float(spectrum(100).sum())
    for route in ROUTES:
        assert torch.equal(project_nuclear_ball(w, 1.001 * total, route), w)
        assert torch.allclose(project_operator_ball(w, 3.001, route), w, rtol=0, atol=1e-6)
        twice = project_nuclear_ball(project_nuclear_ball(w, 50.0, route), 50.0, route)
        assert torch.allclose(twice, project_nuclear_ball(w, 50.0, route), rtol=0, atol=1e-5)
    both = torch.stack([w, w / 100])
    assert torch.equal(project_nuclear_ball(both, 10.0)[1], w / 100)


@pytest.mark.parametrize("route", ROUTES)
def test_a_clip_far_below_the_largest_singular_value(route: module.Route) -> None:
    for top, count in ((1e3, 1), (100.0, 60), (20.0, 40)):
        s = torch.cat([torch.full((count,), top), torch.linspace(1, 0.1, 100 - count)]).double()
        for shape in ((300, 100), (100, 100)):
            w = with_spectrum(s, *shape).float()
            for radius in (0.999, 0.05):
                clip = project_operator_ball(w, radius, route)
                assert torch.linalg.svdvals(clip.double())[0] <= radius * (1 + 2e-5)
                # The weights and the SVD round by eps * |s|, in a matrix of singular values up to the radius.
                assert (clip - (w.double() - exact(w, radius))).norm() <= 1e-6 * s.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(120, 120), (300, 100), (100, 300)], ids=str)
def test_a_carried_subspace_follows_a_moving_matrix(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    s = torch.cat([torch.linspace(3, 1, 12), 0.002 * torch.linspace(1, 0.1, 80)]).double()
    w = with_spectrum(s, *shape)
    t = 0.01  # s_1 / t = 300: beyond a float32 Gram matrix
    _, subspace = threshold_with_subspace(w.to(dtype), t)
    assert subspace is not None
    assert subspace.shape[0] == min(shape)
    refuse_the_svd(monkeypatch)
    monkeypatch.setattr(module, "_by_gram", lambda *_: None)
    for step in range(4):
        w = w + 2e-5 * random(shape, step)
        moved = w.to(dtype)
        expected = exact(moved, t)
        p, subspace = threshold_with_subspace(moved, t, subspace=subspace)
        assert subspace is not None
        assert (p - expected).norm() <= (1e-5 if dtype == torch.float32 else 1e-11) * expected.norm()
        assert rank(p) == 12
        again = singular_value_threshold(moved, t, subspace=subspace)
        assert torch.allclose(again, p, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_subspace_costs_time_only(dtype: torch.dtype) -> None:
    s = torch.cat([torch.linspace(3, 1, 12), torch.linspace(0.5, 0.1, 108)]).double()
    w = with_spectrum(s, 120, 120).to(dtype)
    p, good = threshold_with_subspace(w, 0.8)
    assert good is not None
    lost = torch.linalg.svd(w).Vh[6:30].mT  # orthogonal to the six largest
    bad = {
        "of another matrix": torch.linalg.qr(random((120, 20), 9)).Q.to(dtype),
        "too narrow": good[:, :5],
        "zero": torch.zeros_like(good),
        "not finite": torch.full_like(good, torch.nan),
        "dependent": good[:, :1].expand(-1, 20),
        "without the largest": lost,
        "empty": good[:, :0],
        "in half precision": good.half(),
    }
    for what, subspace in bad.items():
        again, _ = threshold_with_subspace(w, 0.8, subspace=subspace)
        assert torch.allclose(again, p, rtol=0, atol=1e-5), what
        assert rank(again) == 12, what


def test_a_subspace_is_returned_where_it_helps() -> None:
    s = spectrum(100)
    w = with_spectrum(s, 130, 100)
    for route in ROUTES:
        for x in (w, w.mT):
            _, few = threshold_with_subspace(x, between(s, 10), route)
            assert few is not None
            assert few.shape == (100, 22)
            assert torch.allclose(few.mT @ few, torch.eye(22, dtype=torch.float64), rtol=0, atol=1e-12)
            assert threshold_with_subspace(x, between(s, 60), route)[1] is None
            assert threshold_with_subspace(x, 3.2, route)[1] is None
            assert threshold_with_subspace(x.expand(2, -1, -1), 1.5, route)[1] is None


def test_certificates_see_what_a_block_missed() -> None:
    z = with_spectrum(spectrum(60), 80, 60)
    assert module._bounded(z, 3.001**2)
    assert not module._bounded(z, 2.999**2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eigenvectors_in_part(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for n in (1, 2, 3, 50):
        for w in (
            random((n + 5, n), n),
            torch.eye(n, dtype=torch.float64),
            torch.zeros(n, n),
            random((n, 1)) + torch.zeros(n, n),
        ):
            g = gram(w.to(dtype))
            assert torch.allclose(g.tril(), (w.mT.to(dtype) @ w.to(dtype)).tril(), rtol=0, atol=200 * eps)
            full = g.tril() + g.tril(-1).mT
            lam, leading = eigenpairs(g)
            assert torch.allclose(lam, torch.linalg.eigvalsh(full).flip(0), rtol=0, atol=200 * n * eps)
            for k in {0, 1, n // 2, n}:
                v = leading(k)
                assert torch.allclose(v.mT @ v, torch.eye(k, dtype=dtype), rtol=0, atol=50 * eps)
                assert torch.allclose(full @ v, v * lam[:k], rtol=0, atol=200 * n * eps)


def test_misuse_and_bad_entries() -> None:
    w = random((120, 120))
    for operation in (singular_value_threshold, threshold_with_subspace, project_operator_ball, project_nuclear_ball):
        for bad in (-1.0, math.inf, math.nan):
            with pytest.raises(UsageError, match="finite and not negative"):
                operation(w, bad)
        with pytest.raises(UsageError, match="route must be"):
            operation(w, 1.0, "fast")  # pyright: ignore[reportArgumentType]
        with pytest.raises(UsageError, match="floating-point matrix"):
            operation(torch.ones(3, 3, dtype=torch.long), 1.0)
        for entry in (math.nan, math.inf):
            for shape in ((120, 120), (3, 2)):
                spoiled = random(shape)
                spoiled[1, 1] = entry
                for t in (0.0, 1.0):
                    with pytest.raises(NonFiniteError, match="1 NaN"):
                        operation(spoiled, t)
    for subspace in (torch.zeros(119, 3), torch.zeros(120), torch.zeros(120, 121)):
        with pytest.raises(UsageError, match="subspace"):
            singular_value_threshold(w, 1.0, subspace=subspace)
    with pytest.raises(UsageError, match="batches take none"):
        singular_value_threshold(w[None], 1.0, subspace=torch.zeros(120, 3))


def test_the_energy_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    w = with_spectrum(spectrum(120), 120, 120)
    expected = exact(w, 1.3)
    refuse_the_svd(monkeypatch)
    assert torch.allclose(Nuclear().prox(w, 1.3), expected, rtol=0, atol=1e-11)
    with pytest.raises(UsageError, match="step"):
        Nuclear().prox(w, -1.0)
    shrunk = Nuclear(smoothing=1e-9).prox(w, 1.3)  # the smoothed map, by its own route, tends to the same
    assert torch.allclose(shrunk, expected, rtol=0, atol=1e-6)


def test_a_zero_matrix_in_a_batch_and_single_rows_and_columns() -> None:
    w = torch.randn(3, 60, 300)
    w[1] = 0
    for route in ("auto", "gram"):
        assert module.project_nuclear_ball(w, 1.0, route)[1].count_nonzero() == 0
        assert module.singular_value_threshold(w, 1.0, route)[1].count_nonzero() == 0
        torch.testing.assert_close(
            module.project_nuclear_ball(w, 1.0, route), module.project_nuclear_ball(w, 1.0, "svd"), rtol=0, atol=1e-5
        )
    for shape in ((7, 1), (1, 7)):
        one = torch.randn(shape)
        size = float(torch.linalg.vector_norm(one))
        found = module.singular_value_threshold(one, 0.01, "gram")
        torch.testing.assert_close(found, one * (1 - 0.01 / size), rtol=1e-5, atol=0)  # a rounding or two


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_threshold_at_a_leading_singular_value_leaves_no_noise_of_full_rank(index: int) -> None:
    w = torch.randn(512, 512) / 512**0.5
    t = float(torch.linalg.svdvals(w.double())[index])
    s = torch.linalg.svdvals(module.singular_value_threshold(w, t).double())
    assert int((s > 1e-7 * t).sum()) <= index + 1  # t is one of them, to rounding; eps of what is left is 1e-9
