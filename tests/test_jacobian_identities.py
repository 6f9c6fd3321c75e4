"""Energies of the Jacobian: identities, degenerate cases, variances of probes, and minimizers in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from groundstate.energies.dirichlet import Dirichlet
from groundstate.energies.jacobian import JacobianEnergy, JacobianSpectral
from groundstate.energies.jacobian_nuclear import JacobianNuclear
from groundstate.jacobian import exact, probes
from groundstate.jacobian.function import function
from groundstate.norms import gram
from groundstate.training import data
from jacobian_helpers import BY_ROUTE, F64, dense, filled, gen, mlp, randn


def linear(a: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(a.shape[1], a.shape[0], bias=bias is not None, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(a)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def values(model: nn.Module, x: Tensor) -> dict[str, float]:
    return {n: float(make("auto").value(model, x, probe=gen()).detach()) for n, make in BY_ROUTE.items()}


# ---------------------------------------------------------------------- identities


def test_linear_map_has_the_norms_of_its_matrix_everywhere() -> None:
    a = torch.randn(6, 20, generator=gen(1), dtype=F64)
    s = torch.linalg.svdvals(a)
    for model in (linear(a), linear(a, randn(6, seed=2))):
        for x in (randn(3, 20, seed=3), 1e3 * randn(1, 20, seed=4), torch.zeros(2, 20, dtype=F64)):
            found = values(model, x)
            # the reference numbers have 8 digits
            assert found["dirichlet"] == pytest.approx(150.29588, rel=1e-7)
            assert found["nuclear"] == pytest.approx(28.130321, rel=1e-7)
            assert found["spectral"] == pytest.approx(7.2493205, rel=1e-7)
            assert found["frobenius"] == pytest.approx(math.sqrt(found["dirichlet"]), rel=1e-14)
    with function(linear(a), randn(3, 20)) as (run, x):
        found = gram.singular_values(exact.output_gram(run, x))
    assert torch.allclose(found, s.expand(3, -1), rtol=1e-13)  # Gram of condition below 10
    assert float(s[1] / s[0]) == pytest.approx(0.861002, rel=1e-5)
    assert float(gram.stable_rank(found)[0]) == pytest.approx(float(s.square().sum() / s[0] ** 2), rel=1e-12)
    assert float(gram.effective_rank(found)[0]) == pytest.approx(float(s.sum() ** 2 / s.square().sum()), rel=1e-12)


def test_finite_differences_of_a_linear_map_are_exact_for_every_step() -> None:
    a, x = torch.randn(6, 20, generator=gen(1), dtype=F64), randn(50, 20, seed=5)
    model = linear(a, randn(6, seed=6))
    v = torch.randn(50, 20, generator=gen(7), dtype=F64)
    for sigma in (1e-3, 1e-1, 1.0, 10.0):
        with function(model, x) as (run, points):
            found = probes.squared_norms(run, points, generator=gen(7), estimator="fd", sigma=sigma)
        # rounding of f divided by the step
        assert torch.allclose(found, (v @ a.T).square().sum(1), rtol=1e-12 / sigma)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_softmax_head(activation: type[nn.Module]) -> None:
    model, x = mlp(6, 8, 4, activation=activation, seed=12), randn(5, 6, seed=13)
    p, j = model(x).softmax(-1), dense(model, x)
    head = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) @ j
    found = JacobianNuclear(on="probabilities").value(model, x, probe=gen())
    # one direction is lost (rows of the head sum to zero), so the Gram is singular: sqrt(eps) of s_1 at most
    expected = torch.linalg.svdvals(head.detach()).sum(1).mean()
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-8)


def test_symmetries() -> None:
    x = randn(7, 6, seed=14)
    base = mlp(6, 8, 8, 4, seed=15)
    before = values(base, x)

    def after(change: Callable[[nn.Sequential], None], x: Tensor = x) -> list[float]:
        model = mlp(6, 8, 8, 4, seed=15)
        with torch.no_grad():
            change(model)
        found = values(model, x)
        return [found[n] / before[n] for n in ("dirichlet", "frobenius", "spectral", "nuclear")]

    def rescale(m: nn.Sequential) -> None:
        m[0].weight.mul_(3.0), m[0].bias.mul_(3.0), m[2].weight.div_(3.0)

    def scale_output(m: nn.Sequential) -> None:
        m[4].weight.mul_(-2.0), m[4].bias.mul_(-2.0)

    turn, mirror = torch.linalg.qr(randn(4, 4, seed=16)).Q, torch.linalg.qr(randn(6, 6, seed=17)).Q
    ones = [1.0] * 4
    exactly = {"rel": 1e-12}  # a few roundings
    assert after(rescale) == pytest.approx(ones, **exactly)
    assert after(scale_output) == [4.0, 2.0, 2.0, 2.0]  # powers of two round nothing
    assert after(lambda m: m[4].weight.copy_(turn @ m[4].weight)) == pytest.approx(ones, **exactly)
    assert after(lambda m: m[0].weight.copy_(m[0].weight @ mirror.T), x @ mirror.T) == pytest.approx(ones, **exactly)
    assert after(lambda m: m[4].bias.add_(5.0)) == ones
    assert after(lambda m: m[0].weight.div_(2.0), 2.0 * x) == [0.25, 0.5, 0.5, 0.5]


def kinks(model: nn.Sequential) -> list[float]:
    w, b = (p.detach().flatten() for p in model[0].parameters())
    inside = sorted(float(t) for t in -b / w if -3 < float(t) < 3)
    return [-3.0, *inside, 3.0]


def test_one_dimensional_relu_net_by_its_exact_kinks() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the reference number is of this draw
        model = nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Linear(20, 1)).double()
    pieces = torch.tensor(list(pairwise(kinks(model))), dtype=F64)
    middle, length = pieces.mean(1, keepdim=True), pieces.diff(dim=1)[:, 0]
    with function(model, middle) as (run, points):
        squares = exact.output_gram(run, points)[:, 0, 0].detach()
    assert float((squares * length).sum() / 6) == pytest.approx(0.0099035205, rel=1e-8)  # 8 digits
    assert float((squares.sqrt() * length).sum() / 6) == pytest.approx(0.0896167056, rel=1e-8)
    grid = (torch.arange(20000, dtype=F64)[:, None] + 0.5) / 20000 * 6 - 3
    # each of at most 20 kinks puts half a cell on the wrong side
    assert float(Dirichlet(samples=None).estimate(model, grid, probe=gen()).value) == pytest.approx(0.0099035, rel=1e-3)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    smooth=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_inequalities(widths: list[int], smooth: bool, seed: int) -> None:
    model = mlp(*widths, activation=nn.Tanh if smooth else nn.ReLU, seed=seed)
    x = randn(3, widths[0], seed=seed + 1)
    with function(model, x) as (run, points):
        m = exact.output_gram(run, points).detach()
    s = gram.singular_values(m)
    assert torch.allclose(s, torch.linalg.svdvals(dense(model, x)), atol=1e-7 * float(1 + s.max()))  # sqrt(eps) of s_1
    top, gc, nuclear = s[:, 0], gram.trace(m), s.sum(1)
    rank = (s > 0).sum(1)
    room = 1 + 1e-9  # rounding of the comparisons
    assert bool((top.square() <= gc * room).all() and (gc <= nuclear.square() * room + 1e-300).all())
    assert bool((nuclear.square() <= rank * gc * room).all())
    product = math.prod(float(torch.linalg.matrix_norm(p.detach(), 2)) for p in model.parameters() if p.ndim == 2)
    assert bool((top <= product * room).all())
    for cut in range(1, len(model)):
        a = model[:cut](x).detach()
        g, h = (dense(f, at).square().sum((1, 2)).sqrt() for f, at in ((model[cut:], a), (model[:cut], x)))
        assert bool((nuclear <= g * h * room + 1e-7).all())
        assert bool((g * h <= (g.square() + h.square()) / 2 * room).all())


def test_samples_do_not_influence_one_another() -> None:
    body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3)).train()
    model, x = filled(body, 18), randn(6, 5, seed=19)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    for make in BY_ROUTE.values():
        energy = make("loop")
        with torch.no_grad():
            whole, permuted = (float(energy.value(model, some, probe=gen())) for some in (x, x[order]))
            singles = [float(energy.value(model, one[None], probe=gen())) for one in x]
        assert whole == pytest.approx(sum(singles) / 6, rel=1e-13)  # sums in another order
        assert whole == pytest.approx(permuted, rel=1e-13)


@pytest.mark.parametrize("route", ["closed_form", "loop"])
@pytest.mark.parametrize("energy", BY_ROUTE)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softplus])
def test_gradcheck(activation: type[nn.Module], energy: str, route: str) -> None:
    model, x = mlp(4, 5, 3, activation=activation, seed=20), randn(2, 4, seed=21)
    made = BY_ROUTE[energy](route)
    # the entries of the parameters are moved in place, so the value follows although it takes no argument
    assert torch.autograd.gradcheck(lambda *_: made.value(model, x, probe=gen()), tuple(model.parameters()))


# ---------------------------------------------------------------------- degenerate Jacobians


def gradient(energy: JacobianEnergy, model: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(energy.value(model, x, probe=gen()), [next(model.parameters())])
    return g


@pytest.mark.parametrize("route", ["closed_form", "loop", "batched"])
def test_nuclear_gradient_is_of_minimal_norm_where_the_jacobian_lacks_rank(route: str) -> None:
    energy, x = JacobianNuclear(samples=None, method="exact", route=route), randn(3, 6, seed=22)
    a = randn(4, 2, seed=23) @ randn(2, 6, seed=24)
    u, _, vh = torch.linalg.svd(a)
    polar = u[:, :2] @ vh[:2]
    # singular values of the Gram below 8 C eps of the largest count as zero; the others are right to eps / their share
    assert torch.allclose(gradient(energy, linear(a), x), polar, atol=1e-12)
    by_autograd = torch.autograd.functional.jacobian(lambda a: torch.linalg.svdvals(a).sum(), a)
    assert isinstance(by_autograd, Tensor)
    assert float((by_autograd - polar).norm() / polar.norm()) > 0.5  # what differentiating an SVD gives instead

    model = mlp(6, 8, 4, seed=25)  # and through a network: two outputs alike
    with torch.no_grad():
        model[2].weight[1] = model[2].weight[0]
    j = dense(model, x)
    u, s, vh = torch.linalg.svd(j.detach(), full_matrices=False)
    g = (u * (s > 1e-10)[:, None, :]) @ vh
    (expected,) = torch.autograd.grad((g * j).sum() / 3, [model[0].weight])
    assert torch.allclose(gradient(energy, model, x), expected, atol=1e-12)


@pytest.mark.parametrize("route", ["closed_form", "loop", "batched", "fd"])
def test_a_zero_jacobian_has_no_energy_and_no_gradient(route: str) -> None:
    dead, x = mlp(5, 6, 3, seed=26), randn(4, 5, seed=27)
    with torch.no_grad():
        dead[0].bias.fill_(-1e3)
    for model in (dead, linear(torch.zeros(3, 5, dtype=F64))):
        for make in BY_ROUTE.values():
            value = make(route).value(model, x, probe=gen())
            assert float(value.detach()) == 0
            grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
            assert all(g is None or not g.any() for g in grads)


def test_equal_singular_values() -> None:
    q = torch.linalg.qr(randn(6, 4, seed=28)).Q.T
    x = randn(2, 6, seed=29)
    assert torch.allclose(gradient(JacobianNuclear(), linear(3 * q), x), q, atol=1e-12)  # products of 4 x 4 matrices
    exactly = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=F64)
    assert torch.equal(gradient(JacobianSpectral(), linear(exactly), randn(2, 3)), exactly / 6)
    found = gradient(JacobianSpectral(), linear(3 * q), x)  # tied up to rounding: some subgradient
    assert float(torch.linalg.svdvals(found).sum()) == pytest.approx(1.0, rel=1e-10)
    assert float((found * q).sum()) == pytest.approx(1.0, rel=1e-10)


def test_second_derivatives_of_the_energy_are_refused_and_never_wrong() -> None:
    model, x = mlp(5, 6, 3, seed=30), randn(4, 5, seed=31)
    for make in BY_ROUTE.values():
        for network, route in ((model, "closed_form"), (nn.Sequential(model, nn.Unflatten(1, (3, 1))), "loop")):
            value = make(route).value(network, x, probe=gen())
            (grad,) = torch.autograd.grad(value, [model[0].weight], create_graph=True)
            with pytest.raises(RuntimeError):
                torch.autograd.grad(grad.square().sum(), [model[0].weight])


# ---------------------------------------------------------------------- probes


def spread(estimator: str, count: int, model: nn.Module, x: Tensor, draws: int = 100_000) -> tuple[float, float]:
    with function(model, x.expand(draws, -1)) as (run, points):
        found = probes.squared_norms(run, points, generator=gen(32), estimator=estimator, probes=count).detach()
    return float(found.mean()), float(found.var())


@pytest.mark.parametrize("closed", [True, False])
def test_mean_and_variance_of_every_probe(closed: bool) -> None:
    model, x = mlp(6, 7, 4, activation=nn.Tanh, seed=33), randn(1, 6, seed=34)
    m = (lambda j: j @ j.T)(dense(model, x)[0].detach())
    if not closed:
        model = nn.Sequential(model, nn.Unflatten(1, (2, 2)))  # no chain
    trace, squared = float(m.trace()), float((m @ m).trace())
    sphere = 2 * (4 * squared - trace**2) / 6
    expected = {("vjp", 1): sphere, ("jvp", 1): 2 * squared, ("jvp", 3): 2 * squared / 3, ("fd", 1): 2 * squared}
    for (estimator, count), variance in expected.items():
        mean, found = spread(estimator, count, model, x)
        # 1e5 draws: 1 % for the variance of these distributions; the step of fd adds some 1e-4
        assert found == pytest.approx(variance, rel=0.05), estimator
        assert mean == pytest.approx(trace, abs=5 * math.sqrt(variance / 1e5) + 1e-3 * trace * (estimator == "fd"))
    assert spread("vjp", 2, model, x, 20_000)[1] < sphere / 2  # orthonormal directions: better than two drawn alone
    mean, found = spread("vjp", 4, model, x, 100)
    assert mean == pytest.approx(trace, rel=1e-13)  # as many as there are outputs: nothing left to chance
    assert found < 1e-24 * trace**2


def test_one_vjp_probe_has_a_usable_gradient() -> None:
    """A net trained on digits: the gradient of one probe against the exact one, on the same samples."""
    digits = data.load("digits")
    x, y = digits.train_x.double(), digits.train_y
    model = mlp(64, 128, 128, 10, seed=35)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    batches = torch.randint(len(x), (150, 64), generator=gen(36))
    for batch in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    weights = list(model.parameters())[::2]

    def at(energy: Dirichlet, seed: int = 0) -> Tensor:
        grads = torch.autograd.grad(energy.value(model, x[:128], probe=gen(seed)), weights)
        return torch.cat([g.flatten() for g in grads])

    full = at(Dirichlet(estimator="exact", samples=None))
    errors = [float((at(Dirichlet(samples=None), seed) - full).norm() / full.norm()) for seed in range(25)]
    assert torch.tensor(errors).median() <= 0.55
    mean = torch.stack([at(Dirichlet(samples=None), seed) for seed in range(25)]).mean(0)
    assert (mean - full).norm() / full.norm() <= 0.2  # unbiased: falls like 1 / sqrt(25), with twice the room


def test_the_gradient_at_kinks_is_that_of_the_linear_pieces() -> None:
    """w relu(x - b), x ~ N(0, 1): the population value, without a gradient by b, that of the border."""
    w, b = 1.5, 0.5
    model = nn.Sequential(linear(torch.ones(1, 1, dtype=F64), torch.tensor([-b])), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        model[2].weight.fill_(w)
    quantiles = (torch.arange(4000, dtype=F64)[:, None] + 0.5) / 4000
    x = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)
    value = Dirichlet(estimator="exact", samples=None).value(model, x, probe=gen())
    assert float(value.detach()) == pytest.approx(0.6942, rel=1e-3)  # w^2 Phi(-b), one sample of 4000 near b
    slope, bias = torch.autograd.grad(value, [model[2].weight, model[0].bias], allow_unused=True)
    assert float(slope) == pytest.approx(2 * float(value.detach()) / w, rel=1e-12)
    assert bias is None or not bias.any()


# ---------------------------------------------------------------------- a minimizer in closed form


def test_a_linear_denoiser_shrinks_singular_values() -> None:
    """min over A of |A Y - Y|^2 / (2 N) + eta |A|_* is A = U diag((1 - N eta / s^2)_+) U^T."""
    count, eta = 40, 0.3
    y = torch.randn(6, count, generator=gen(), dtype=F64)
    y = y * torch.tensor([4, 3, 2, 1, 0.5, 0.2], dtype=F64)[:, None]
    u, s, _ = torch.linalg.svd(y, full_matrices=False)
    shrink = (1 - count * eta / s.square()).clamp_min(0)
    # the reference numbers have 6 and 11 digits
    assert shrink.tolist() == pytest.approx([0.981484, 0.977133, 0.892474, 0.493658, 0, 0], abs=1e-6)
    best = linear(u * shrink @ u.T)
    nuclear = JacobianNuclear(method="exact", samples=None)

    def objective(model: nn.Module) -> Tensor:
        return (model(y.T) - y.T).square().sum() / (2 * count) + eta * nuclear.value(model, y.T, probe=gen())

    assert float(objective(best).detach()) == pytest.approx(1.2192022290, rel=1e-10)
    (g,) = torch.autograd.grad(objective(best) - eta * nuclear.value(best, y.T, probe=gen()), [best.weight])
    (n,) = torch.autograd.grad(nuclear.value(best, y.T, probe=gen()), [best.weight])
    rest = -g / eta - n  # in the subdifferential: n on the range of A, at most 1 and orthogonal beside it
    assert float((u[:, :4].T @ rest).abs().max()) < 1e-12
    assert float((rest @ u[:, :4]).abs().max()) < 1e-12
    assert float(torch.linalg.matrix_norm(rest, 2)) <= 1

    start = linear(0.3 * randn(6, 6, seed=37))
    for step, times in ((0.05, 150), (0.01, 40), (0.002, 40), (4e-4, 40)):  # subgradients: the steps must fall
        for _ in range(times):
            (slope,) = torch.autograd.grad(objective(start), [start.weight])
            with torch.no_grad():
                start.weight.sub_(step * slope)
    # the last step length times the squared subgradient, 6 eta^2
    assert float(objective(start).detach()) == pytest.approx(1.2192022290, abs=1e-3)
