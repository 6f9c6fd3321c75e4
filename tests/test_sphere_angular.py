"""Angular energies: their random means, ground states and certified floors, against closed forms and configurations."""

from __future__ import annotations

import math
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from scipy import integrate, special
from scipy.optimize import minimize
from torch import Tensor, nn

from groundstate import measure
from groundstate.energies import HypersphericalEnergy
from groundstate.errors import UsageError
from groundstate.norms import sphere
from groundstate.norms.sphere.floor import Floor, floor, uniformity
from groundstate.norms.sphere.levenshtein import quadrature_floor
from groundstate.norms.sphere.problem import AngularProblem, Problem, excess_angle, gegenbauer, log_ratio
from groundstate.norms.sphere.program import program_floor, worst
from groundstate.norms.sphere.references import (
    angle_density,
    ground_state,
    random_half_space,
    random_mean,
    welch_floor,
)

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def energy(u: Tensor, s: float, half_space: bool = False) -> float:
    return float(sphere.energy(u, s, angular=True, half_space=half_space))


def simplex(n: int) -> Tensor:
    return torch.eye(n, dtype=F64) - 1 / n


def polygon(n: int, d: int = 2, turn: float = 2 * math.pi) -> Tensor:
    angles = turn * torch.arange(n, dtype=F64) / n
    return torch.cat([torch.stack([angles.cos(), angles.sin()], 1), torch.zeros(n, d - 2, dtype=F64)], 1)


def cross(d: int) -> Tensor:
    return torch.cat([torch.eye(d, dtype=F64), -torch.eye(d, dtype=F64)])


def icosahedron() -> Tensor:
    golden = (1 + math.sqrt(5)) / 2
    rows = [[0.0, a, b * golden] for a, b in product((1.0, -1.0), repeat=2)]
    return torch.tensor([row[k:] + row[:k] for row in rows for k in range(3)], dtype=F64)


def half_of_e8() -> Tensor:
    rows = [[1.0 if k == i else sign if k == j else 0.0 for k in range(8)]
            for i, j in combinations(range(8), 2) for sign in (1.0, -1.0)]  # fmt: skip
    rows += [[0.5, *signs] for signs in product((0.5, -0.5), repeat=7) if math.prod(signs) > 0]
    return torch.tensor(rows, dtype=F64)


# ---------------------------------------------------------------------- random directions


def test_random_mean_in_closed_form() -> None:
    """The angle is uniform in d = 2; its density is sin(theta) / 2 in d = 3 and 2 sin^2(theta) / pi in d = 4."""
    si, ci = special.sici(math.pi)[0], special.sici(2 * math.pi)[1]
    known = {
        (2, 0.0): 1 - math.log(math.pi),
        (2, 0.5): 2 / math.sqrt(math.pi),
        (2, 0.99): 100 * math.pi**-0.99,
        (3, 1.0): si / 2,
        (4, 1.0): (np.euler_gamma + math.log(2 * math.pi) - ci) / math.pi,
    }
    for (d, s), value in known.items():
        assert random_mean(d, s, angular=True) == pytest.approx(value, rel=1e-13)  # rounding of float64
    for d, s in ((2, 1.0), (3, 2.0), (5, 7.0)):
        assert random_mean(d, s, angular=True) is None
        assert random_half_space(9, d, s, angular=True) is None
        assert uniformity(1.0, 9, d, s, angular=True) is None


@pytest.mark.parametrize(("d", "s"), [(3, 0.0), (3, 1.5), (6, 4.0), (40, 7.3), (4096, 1.0)])
def test_random_mean_is_the_integral_over_angles(d: int, s: float) -> None:
    def integrand(theta: float) -> float:
        f = -math.log(theta) if s == 0 else theta**-s
        return f * float(angle_density(torch.tensor(theta, dtype=F64), d))

    width = 1.5 * min(1.0, 9 / math.sqrt(d))  # the density is a peak of width 1 / sqrt(d) around pi / 2
    edges = [0.0, math.pi / 2 - width, math.pi / 2, math.pi / 2 + width, math.pi]
    value = sum(integrate.quad(integrand, a, b, limit=200)[0] for a, b in pairwise(edges))
    assert random_mean(d, s, angular=True) == pytest.approx(value, abs=3e-8)  # the tolerance of quad


@pytest.mark.parametrize("half_space", [False, True])
def test_random_mean_against_samples(half_space: bool) -> None:
    values = [energy(normal(40, 12, seed=k), 1.0, half_space) for k in range(100)]
    known = random_half_space(40, 12, 1.0, True) if half_space else random_mean(12, 1.0, True)
    # Five standard errors of the mean of 100 independent configurations.
    assert known == pytest.approx(float(np.mean(values)), abs=float(np.std(values)) / 2)


# ---------------------------------------------------------------------- ground states


@pytest.mark.parametrize("s", [0, 0.7, 1, 2, 9])
def test_ground_states_by_construction(s: float) -> None:
    antipodes = torch.tensor([[1.0, 0, 0], [-1, 0, 0]], dtype=F64)
    for u, half_space in (
        (antipodes, False),
        (simplex(3), False),
        (polygon(7), False),
        (polygon(6), False),
        (polygon(7, turn=math.pi), True),
        (simplex(9) @ torch.linalg.svd(simplex(9)).Vh[:8].T, True),
        (torch.eye(6, dtype=F64)[:4], True),
        (icosahedron()[[k for k in range(12) if icosahedron()[k].sum() > 0]], True),
        (half_of_e8(), True),
    ):
        n, d = u.shape
        exact = ground_state(n, d, s, half_space, angular=True)
        assert exact == pytest.approx(energy(u, s, half_space), rel=1e-12)  # rounding of float64
        assert floor(n, d, s, half_space, angular=True) == Floor(exact or math.nan, "exact ground state", True)
    assert energy(antipodes, s) == pytest.approx(-math.log(math.pi) if s == 0 else math.pi**-s, rel=1e-12)


def test_what_is_not_proved_is_not_called_exact() -> None:
    for n, d, half_space in ((4, 3, False), (6, 3, False), (12, 3, False), (60, 4, True), (5, 3, True)):
        assert ground_state(n, d, 1.0, half_space, angular=True) is None
    # The simplex is not the ground state of every angular energy: four points on a great circle have less.
    assert energy(polygon(4, 3), 0) < energy(simplex(4), 0)


# ---------------------------------------------------------------------- floors


@pytest.mark.parametrize("s", [0.0, 1.0, 4.0])
def test_floor_is_below_every_configuration(s: float) -> None:
    known = [simplex(4), simplex(9), cross(3), cross(5), icosahedron(), polygon(4, 3), polygon(6, 4), half_of_e8()]
    for u in [*known, normal(33, 5), normal(300, 40)]:
        n, d = u.shape
        # What attains the floor, it does to rounding.
        assert floor(n, d, s, angular=True).value <= energy(u, s) * (1 + 1e-12 * (1 if s else -1))
        if all(abs(float(c)) < 1 - 1e-9 for c in torch.cosine_similarity(u[:1], u[1:])):
            assert floor(n, d, s, True, angular=True).value <= energy(u, s, True) * (1 + 1e-12 * (1 if s else -1))


def test_floor_where_it_is_attained() -> None:
    """To what the verification takes off: the square for the logarithm, cross-polytopes, the icosahedron."""
    for u, s in ((polygon(4, 3), 0), (cross(3), 1), (cross(3), 4), (cross(5), 2), (icosahedron(), 1)):
        assert floor(*u.shape, s, angular=True).value == pytest.approx(energy(u, s), rel=1e-5)


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize(("n", "d", "s"), [(7, 3, 1.0), (10, 4, 2.0), (13, 3, 0.0), (24, 5, 1.0), (20, 8, 1.0)])
def test_floor_is_just_below_the_best_found(n: int, d: int, s: float, half_space: bool) -> None:
    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(flat).reshape(n, d)
        value, grad = sphere.energy_and_grad(w, s, angular=True, half_space=half_space)
        return float(value), grad.numpy().ravel()

    starts = [normal(n, d, seed=k).numpy().ravel() for k in range(3)]
    best = min(float(minimize(objective, x, jac=True, method="L-BFGS-B").fun) for x in starts)
    found = floor(n, d, s, half_space, angular=True).value
    # One percent: what floors and searches of three starts leave in these cases together.
    assert best - 0.01 * abs(best) <= found <= best + 1e-12


def test_largest_sum_of_angles() -> None:
    """Two antipodal piles attain it, where r_min only holds the points of a pile apart; nothing exceeds it."""
    for n in (4, 5, 9):
        pairs = n * (n - 1) / 2
        assert math.pi * (n // 2) * ((n + 1) // 2) / pairs == pytest.approx(math.pi / 2 + excess_angle(n), rel=1e-14)
        for seed in range(5):
            u = nn.functional.normalize(normal(n, 3, seed=seed), dim=1)
            angles = torch.arccos(u @ u.T)[tuple(torch.triu_indices(n, n, 1))]
            assert float(angles.mean()) < math.pi / 2 + excess_angle(n)


def test_half_space_potentials_are_absolutely_monotone() -> None:
    """The quadrature rests on it: so it stays below the program, and both are near one another."""
    for n, d, s in ((9, 4, 0.0), (20, 6, 1.0), (30, 5, 2.5)):
        problem = Problem(n, d, s, True, True)
        closed, _ = quadrature_floor(problem)
        verified, _, note = program_floor(problem)
        assert note == ""
        assert closed - 1e-7 * abs(closed) <= verified <= closed + 0.02 * abs(closed)
        assert problem.mean(closed) >= welch_floor(n, d, s, True) - 1e-13


def test_a_failing_solver_leaves_the_sum_of_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groundstate.norms.sphere.program.solve", lambda *_: (None, "time limit"))
    found = floor.__wrapped__(10, 3, 1.0, False, True)
    assert found.method == "sum of angles (linear program of degree 14 failed: time limit)"
    assert found.value == pytest.approx(2 * 9 / (10 * math.pi))  # the mean angle is at most pi n / (2 (n - 1))


@pytest.mark.parametrize(("n", "d"), [(10**6, 4096), (10**6, 3), (4, 10**6), (10**5, 2)])
def test_extreme_sizes(n: int, d: int) -> None:
    for half_space, s in product((False, True), (0, 2.5)):
        value = floor(n, d, s, half_space, angular=True).value
        assert math.isfinite(value)
        random = random_half_space(n, d, s, True) if half_space else random_mean(d, s, True)
        assert random is None or value < random


def test_large_exponents() -> None:
    assert floor(20, 5, 100.0, angular=True).value > (math.pi / 2 + excess_angle(20)) ** -100.0
    with pytest.raises(UsageError, match="smaller s"):
        floor(20, 5, 700.0, angular=True)


# ---------------------------------------------------------------------- the verification


def test_verification_is_a_lower_bound() -> None:
    """Whatever the combination is, the verified value is at most the minimum on a fine grid, and hardly less."""
    generator = np.random.default_rng(5)
    theta = np.linspace(0, math.pi, 200_001)[1:]
    for s in (0.0, 0.5, 1.0, 2.0, 3.5):
        for share in (1e-9, 0.03, 1.0):
            problem = AngularProblem(9, 4, s, angular=True)
            degrees = problem.degrees(18)
            weights = generator.exponential(size=len(degrees)) / (1 + degrees)
            x = np.concatenate([[generator.normal()], weights, [generator.exponential(), share]])
            r = 2 * np.sin(theta / 2)
            f = -np.log(theta) + (1 - share) * np.log(r) if s == 0 else theta**-s - (1 - share) * r**-s
            difference = f - gegenbauer(degrees, 4, theta) @ x[:-2] - x[-2] * (math.pi / 2 - theta)
            found = worst(problem, degrees, x)
            # The grid misses what lies between 0 and its first angle, and much of the spike there for s > 2.
            loose = 1e-3 if s > 2 else 1e-4
            least = min(difference.min(), 0.0)  # above 0 cells are not split any more
            assert least - loose * (1 - least) < found <= difference.min() + 1e-9


def test_curvature_bounds_the_second_derivative() -> None:
    for s, share in product((0.0, 1.0, 2.0, 4.3), (0.0, 0.2, 1.0)):
        problem = AngularProblem(9, 4, s, angular=True)
        x = np.array([share])
        low = np.linspace(0.05, math.pi - 0.011, 300)
        high, step = low + 0.01, 1e-4
        middle = (low + high) / 2
        before, value, after = (problem.rest(middle + shift, x)[0] for shift in (-step, 0, step))
        second = (after - 2 * value + before) / step**2
        # Differences of float64 values of size f over step^2.
        assert (second <= problem.curvature(low, high, x) + 1e-7 * (1 + middle**-s)).all()
        falling = problem.falling(high, x)
        assert (np.diff(value)[falling[1:]] < 0).all()
        if s <= 2:
            assert falling.all()


def test_the_ratio_of_arc_and_chord_keeps_its_digits() -> None:
    theta = np.array([1e-6, 1e-3, 0.1, 0.1999, 0.2001, 1.0, 3.0])
    # log(x / sin x) = sum of zeta(2k) / k (x / pi)^2k
    k = np.arange(1, 200)
    known = [float((special.zeta(2 * k) / k * (t / 2 / math.pi) ** (2 * k)).sum()) for t in theta]
    np.testing.assert_allclose(log_ratio(theta), known, rtol=2e-13)  # the rounding of log(1 + 2e-3)


# ---------------------------------------------------------------------- networks


@pytest.mark.parametrize("half_space", [False, True])
def test_measuring_shows_gap_and_uniformity(half_space: bool) -> None:
    torch.manual_seed(0)
    asked = HypersphericalEnergy(s=1.0, half_space=half_space, angular=True)
    (row, _) = measure(nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3)), [asked]).rows[::2]
    found = row.grounds[repr(asked)]
    ground = asked.ground(40, 30)
    assert found["floor"] == ground.floor
    assert found["random"] == ground.random
    assert 0 < (found["gap"] or 0) < 0.1
    # Uniform weights in a cube point nearly as evenly as normal ones; the spread of 40 neurons is a few percent.
    assert abs(found["uniformity"] or 1) < 0.2
