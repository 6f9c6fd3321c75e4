"""Random means, exact ground states and certified floors on the sphere, against tables, brute force and each other."""

from __future__ import annotations

import math
from itertools import combinations, pairwise, permutations, product

import numpy as np
import pytest
import torch
from scipy import integrate, special
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.sphere import program
from groundstate.norms.sphere.floor import Floor, floor, gap, uniformity
from groundstate.norms.sphere.levenshtein import quadrature_floor
from groundstate.norms.sphere.problem import Problem, gegenbauer
from groundstate.norms.sphere.program import program_floor, worst
from groundstate.norms.sphere.references import (
    _SPORADIC,
    angle_cdf,
    angle_density,
    ground_state,
    random_half_space,
    random_mean,
    universal_code,
    welch_floor,
)

F64 = torch.float64
# Values printed with 9 (floors: 6) digits are off by half a unit of the last one, or by one where they were truncated.
TABLE, SIX = 1e-9, 0.6e-6

# (n, s = 1, s = 0, s = 2): totals over pairs of the best known configurations in d = 3.
THOMSON = (
    (7, 14.452977414, -8.182477864, 10.25),
    (8, 19.675287861, -10.428017781, 14.336791084),
    (9, 25.759986531, -12.887752726, 19.252868784),
    (10, 32.716949460, -15.563123389, 25.041359722),
    (11, 40.596450508, -18.420479721, 31.834721637),
    (13, 58.853230612, -24.866721876, 47.773308981),
    (16, 92.911655303, -36.106152162, 78.772649031),
    (20, 150.881568334, -54.011129975, 133.936978568),
    (22, 185.287536149, -64.206007762, 167.665785636),
)


def brute_force(u: Tensor, s: float) -> float:
    """The mean over pairs, distances from differences."""
    r = torch.pdist(u / u.norm(dim=1, keepdim=True))
    return float((-r.log() if s == 0 else r**-s).mean())


def both_signs(u: Tensor) -> Tensor:
    return torch.cat([u, -u])


def e8() -> Tensor:
    """The 240 roots: permutations of (+-1, +-1, 0^6), and (+-1/2)^8 with an even number of minus signs."""
    rows = []
    for i, j in combinations(range(8), 2):
        for a, b in product((1.0, -1.0), repeat=2):
            row = [0.0] * 8
            row[i], row[j] = a, b
            rows.append(row)
    rows += [list(signs) for signs in product((0.5, -0.5), repeat=8) if math.prod(signs) > 0]
    return torch.tensor(rows, dtype=F64)


def cell_600() -> Tensor:
    """The 120 icosians: 8 of (+-1, 0, 0, 0), 16 of (+-1/2)^4, 96 even permutations of (+-phi, +-1, +-1/phi, 0) / 2."""
    phi = (1 + math.sqrt(5)) / 2
    rows = [[float(x) for x in row] for row in (*torch.eye(4).tolist(), *(-torch.eye(4)).tolist())]
    rows += [list(signs) for signs in product((0.5, -0.5), repeat=4)]
    for p in permutations(range(4)):
        if sum(p[i] > p[j] for i, j in combinations(range(4), 2)) % 2 == 0:
            for a, b, c in product((0.5, -0.5), repeat=3):
                row = [a * phi, b, c / phi, 0.0]
                rows.append([row[i] for i in p])
    return torch.tensor(rows, dtype=F64)


def lines_28() -> Tensor:
    """28 equiangular lines in d = 7: the permutations of (3, 3, -1^6), orthogonal to (1^8)."""
    rows = torch.full((28, 8), -1.0, dtype=F64)
    for row, pair in zip(rows, combinations(range(8), 2)):
        row[list(pair)] = 3.0
    basis = torch.linalg.svd(torch.ones(1, 8, dtype=F64)).Vh[1:]
    return rows @ basis.T


@pytest.mark.parametrize(
    ("d", "expected"),
    [
        (3, (-0.193147181, 1.0, None)),
        (8, (-0.308333333, 0.752552551, 0.6)),
        (27, (-0.336773431, 0.717791182, 0.520833333)),
        (30, (-0.337804356, 0.716639134, 0.518518519)),
        (64, (-0.342573846, 0.711396457, 0.508196721)),
        (256, (-0.345591276, 0.708151507, 0.501976285)),
        (512, (-0.346083875, 0.707626904, 0.500982318)),
    ],
)
def test_random_mean_table(d: int, expected: tuple[float | None, ...]) -> None:
    for s, value in enumerate(expected):
        found = random_mean(d, s)
        assert found == (None if value is None else pytest.approx(value, abs=TABLE))


@pytest.mark.parametrize(("d", "s"), [(2, 0.0), (2, 0.5), (3, 1.5), (5, 3.2), (40, 1.0), (40, 7.3), (4096, 1.0)])
def test_random_mean_is_the_integral_over_angles(d: int, s: float) -> None:
    def integrand(theta: float) -> float:
        r = 2 * math.sin(theta / 2)
        return (-math.log(r) if s == 0 else r**-s) * float(angle_density(torch.tensor(theta, dtype=F64), d))

    # The density is a peak of width 1 / sqrt(d) around pi / 2.
    edges = [
        0.0,
        math.pi / 2 * (1 - 3 / math.sqrt(d + 7)),
        math.pi / 2,
        math.pi / 2 * (1 + 3 / math.sqrt(d + 7)),
        math.pi,
    ]
    value = sum(integrate.quad(integrand, a, b, limit=200)[0] for a, b in pairwise(edges))
    # The quadrature's own tolerance is 1.5e-8, its singular end at theta = 0 included.
    assert random_mean(d, s) == pytest.approx(value, abs=3e-8)


@pytest.mark.parametrize(("d", "s"), [(3, 2.0), (2, 1.0), (5, 4.0), (3, 17.0)])
def test_random_mean_diverges(d: int, s: float) -> None:
    assert random_mean(d, s) is None
    assert random_half_space(9, d, s) is None
    assert uniformity(1.0, 9, d, s) is None


def test_random_half_space_against_samples() -> None:
    generator = torch.Generator().manual_seed(3)
    means = [brute_force(both_signs(torch.randn(40, 12, generator=generator, dtype=F64)), 1.0) for _ in range(100)]
    # Five standard errors of the mean of 100 independent configurations.
    error = 5 * float(np.std(means)) / 10
    assert random_half_space(40, 12, 1.0) == pytest.approx(float(np.mean(means)), abs=error)


@pytest.mark.parametrize("d", [2, 3, 4, 5, 17, 64, 513])
def test_angle_law(d: int) -> None:
    theta = torch.linspace(0, math.pi, 201, dtype=F64)
    expected = special.betainc((d - 1) / 2, (d - 1) / 2, np.sin(theta.numpy() / 2) ** 2)
    # Sums of up to d / 2 terms of order 1.
    torch.testing.assert_close(angle_cdf(theta, d), torch.from_numpy(expected), rtol=0, atol=1e-14 * d)
    slope = torch.autograd.functional.jvp(lambda x: angle_cdf(x, d), theta[1:-1], torch.ones(199, dtype=F64))[1]
    torch.testing.assert_close(slope, angle_density(theta[1:-1], d), rtol=1e-9, atol=1e-12 * d)
    outside = torch.tensor([-0.5, 4.0])
    assert angle_density(outside, d).tolist() == [0.0, 0.0]
    assert angle_cdf(outside, d).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("n", "d", "expected"),
    [
        (10, 9, (-0.399253849, 0.670820393, 0.45)),
        (64, 100, (-0.354447769, 0.701560760, 0.492187500)),
        (100, 256, (-0.351598758, 0.703562364, 0.495)),
        (1000, 999, (-0.347073840, 0.706753139, 0.4995)),
        (128, 64, (-0.349302516, 0.705476019, 0.498031496)),
        (512, 256, (-0.347251816, 0.706701484, 0.499510763)),
        (12, 3, (-0.327365836825, 0.744928076631, 0.590909090909)),
        (120, 4, (-0.266664750002, 0.811845441975, 0.755602240896)),
        (16, 5, (-0.350526344716, 0.713385274820, 0.520833333333)),
        (27, 6, (-0.336030088777, 0.724517230259, 0.538461538462)),
        (240, 8, (-0.314320349952, 0.744464725959, 0.577057182706)),
        (112, 21, (-0.342474654629, 0.712803360999, 0.511824324324)),
        (162, 21, (-0.340013921342, 0.715013728395, 0.515700483092)),
        (100, 22, (-0.343970179056, 0.711377675845, 0.509259259259)),
        (891, 22, (-0.335715878175, 0.719016736889, 0.523096129838)),
        (552, 23, (-0.337015603608, 0.717637614951, 0.520341802783)),
        (4600, 23, (-0.335239437465, 0.719496666840, 0.524162861492)),
        (196560, 24, (-0.335475988833, 0.719248410069, 0.523775812860)),
        (5, 3, (-0.4420507155, 0.6474691495, 0.425)),
    ],
)
def test_ground_state_table(n: int, d: int, expected: tuple[float, ...]) -> None:
    for s, value in enumerate(expected):
        assert ground_state(n, d, s) == pytest.approx(value, abs=TABLE)
        assert floor(n, d, s) == Floor(ground_state(n, d, s) or math.nan, "exact ground state", True)


def test_codes_are_two_designs() -> None:
    """Seen from one point, the inner products and their squares sum to 0 and n / d, the point itself included."""
    known = [*_SPORADIC, (27, 6), (325, 52), (2752, 301), (953344, 28861)]
    for n, d in known:
        code = universal_code(n, d)
        assert code is not None
        assert sum(count for _, count in code) == n - 1
        # Sums of up to a million terms of order 1.
        assert 1 + math.fsum(c * count for c, count in code) == pytest.approx(0, abs=1e-9)
        assert 1 + math.fsum(c * c * count for c, count in code) == pytest.approx(n / d, rel=1e-12)


@pytest.mark.parametrize("s", [0, 0.7, 1, 2, 9])
def test_ground_states_by_construction(s: float) -> None:
    # The energy from differences of float64 vectors: rounding only.
    assert ground_state(240, 8, s) == pytest.approx(brute_force(e8(), s), rel=1e-12)
    assert ground_state(120, 4, s) == pytest.approx(brute_force(cell_600(), s), rel=1e-12)
    angles = 2 * math.pi * torch.arange(7, dtype=F64) / 7
    polygon = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert ground_state(7, 2, s) == pytest.approx(brute_force(polygon, s), rel=1e-12)
    half = torch.stack([(angles / 2).cos(), (angles / 2).sin()], dim=1)
    assert ground_state(7, 2, s, half_space=True) == pytest.approx(brute_force(both_signs(half), s), rel=1e-12)
    simplex = torch.eye(9, dtype=F64) - 1 / 9
    assert ground_state(9, 8, s) == pytest.approx(brute_force(simplex, s), rel=1e-12)
    assert ground_state(9, 8, s, half_space=True) == pytest.approx(brute_force(both_signs(simplex), s), rel=1e-12)
    eye = torch.eye(6, dtype=F64)[:4]
    assert ground_state(4, 6, s, half_space=True) == pytest.approx(brute_force(both_signs(eye), s), rel=1e-12)
    bipyramid = torch.zeros(5, 3, dtype=F64)
    bipyramid[:2, 2] = torch.tensor([1.0, -1.0])
    turns = 2 * math.pi * torch.arange(3, dtype=F64) / 3
    bipyramid[2:, :2] = torch.stack([turns.cos(), turns.sin()], dim=1)
    assert ground_state(5, 3, s) == pytest.approx(brute_force(bipyramid, s), rel=1e-12)


def test_half_of_an_antipodal_code() -> None:
    assert ground_state(120, 8, 1.0, half_space=True) == ground_state(240, 8, 1.0)
    assert ground_state(6, 3, 1.0, half_space=True) == ground_state(12, 3, 1.0)
    assert ground_state(8, 5, 1.0, half_space=True) is None  # 16 points in d = 5, but not with their antipodes
    assert ground_state(8, 3, 1.0) is None
    assert ground_state(5, 3, 16.0) is None


def test_welch_numbers() -> None:
    for s, value in enumerate((-0.343244203, 0.710765280, 0.507026997)):
        # Printed with 9 digits, of which 7 are right: s = 2 below is a rational number.
        assert welch_floor(700, 64, s) == pytest.approx(value, rel=1e-7)
    # t = 636 / (64 * 699) = 53 / 3728, and f(r-) + f(r+) = 1 / (1 - t) for s = 2.
    assert welch_floor(700, 64, 2) == pytest.approx((699 * 3728 / 3675 + 0.25) / 1399, rel=1e-14)


@pytest.mark.parametrize("s", [0, 1, 2, 5.5])
def test_welch_is_attained_by_an_equiangular_tight_frame(s: float) -> None:
    energy = brute_force(both_signs(lines_28()), s)
    assert welch_floor(28, 7, s) == pytest.approx(energy, rel=1e-12)
    found = floor(28, 7, s, half_space=True)
    # Levenshtein's quadrature gives the same, less a rounding allowance.
    assert found.value == pytest.approx(energy, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "d", "expected"),
    [
        (64, 27, (-0.350792, 0.705119, 0.498369)),
        (128, 27, (-0.344177, 0.710818, 0.507924)),
        (128, 30, (-0.345105, 0.709835, 0.506073)),
        (256, 40, (-0.343774, 0.710650, 0.507125)),
        (512, 64, (-0.344404, 0.709690, 0.505085)),
        (4096, 64, (-0.342845, 0.711115, 0.507624)),
    ],
)
def test_floor_table(n: int, d: int, expected: tuple[float, ...]) -> None:
    for s, value in enumerate(expected):
        assert floor(n, d, s).value == pytest.approx(value, abs=SIX)


@pytest.mark.parametrize("row", THOMSON, ids=lambda row: str(row[0]))
def test_floor_in_three_dimensions(row: tuple[int, float, float, float]) -> None:
    n, pairs = row[0], row[0] * (row[0] - 1) / 2
    for s, total in zip((1, 0, 2), row[1:]):
        assert floor(n, 3, s).value <= (total + 1e-9) / pairs
    assert floor(n, 3, 1).value >= 0.995 * row[1] / pairs


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (4, 3), (5, 3), (6, 3), (12, 3), (27, 6), (240, 8), (120, 4)])
def test_program_and_quadrature_where_the_truth_is_known(n: int, d: int, s: float) -> None:
    exact = ground_state(n, d, s) or math.nan
    problem = Problem(n, d, s)
    verified, _, note = program_floor(problem)
    closed, _ = quadrature_floor(problem)
    assert note == ""
    assert verified <= exact + 1e-14
    assert closed <= exact + 1e-14
    if (n, d) != (5, 3):
        # The solver's feasibility tolerance, and what the verification takes off. Sharp codes attain the program.
        assert verified == pytest.approx(exact, rel=1e-6)
    if (n, d) not in ((5, 3), (120, 4)):
        # The 600-cell needs degree 17, above the quadrature's 11.
        assert closed == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("half_space", [False, True])
def test_program_of_enough_degree_is_at_least_the_quadrature(half_space: bool) -> None:
    """Interpolating at the quadrature's nodes is one choice that the program has, so neither can be far off."""
    generator = torch.Generator().manual_seed(11)
    for _ in range(5):
        d = int(torch.randint(3, 30, (), generator=generator))
        n = int(d * (1.2 + 4 * torch.rand((), generator=generator))) + 2
        s = float(3 * torch.rand((), generator=generator))
        problem = Problem(n, d, s, half_space)
        closed, degree = quadrature_floor(problem)
        verified, _, _ = program_floor(problem)
        assert degree <= 14
        assert verified >= closed - 1e-7 * abs(closed)
        if half_space:
            assert problem.mean(closed) >= welch_floor(n, d, s) - 1e-13


def test_verification_is_a_lower_bound() -> None:
    """Whatever h is, the verified value is at most the minimum of f - h on a fine grid, and hardly less."""
    generator = np.random.default_rng(5)
    theta = np.linspace(0, math.pi, 200_001)[1:]
    for half_space in (False, True):
        for s in (0.0, 1.0, 3.5):
            problem = Problem(9, 4, s, half_space)
            degrees = problem.degrees(18)
            h = np.append(generator.normal(), generator.exponential(size=len(degrees)) / (1 + degrees))
            angles = theta[theta <= problem.end]
            difference = problem.potential(angles) - gegenbauer(degrees, 4, angles) @ h
            found = worst(problem, degrees, h)
            if difference.min() < 0:
                assert difference.min() - 1e-7 < found <= difference.min()
            else:
                assert found <= difference.min()


@pytest.mark.parametrize("half_space", [False, True])
def test_curvature_bounds_the_second_derivative(half_space: bool) -> None:
    for s in (0.0, 1.0, 4.3):
        problem = Problem(9, 4, s, half_space)
        low = np.linspace(0.05, problem.end - 0.011, 300)
        high, step = low + 0.01, 1e-4
        middle = (low + high) / 2
        f = problem.potential
        second = (f(middle + step) - 2 * f(middle) + f(middle - step)) / step**2
        # Differences of float64 values of size f over step^2.
        assert (second <= problem.curvature(low, high, np.empty(0)) + 1e-7 * (1 + f(middle))).all()


def test_floor_is_below_any_configuration() -> None:
    generator = torch.Generator().manual_seed(2)
    for n, d in ((33, 5), (90, 3), (700, 3), (300, 40)):
        u = torch.randn(n, d, generator=generator, dtype=F64)
        for s in (0, 1.5):
            assert floor(n, d, s).value < brute_force(u, s)
            assert floor(n, d, s, half_space=True).value < brute_force(both_signs(u), s)


@pytest.mark.parametrize(
    ("n", "d"), [(10**6, 4096), (10**6, 3), (10**9, 3), (5000, 4096), (10**6, 24), (3, 10**6), (10**5, 2)]
)
def test_extreme_sizes(n: int, d: int) -> None:
    for half_space in (False, True):
        for s in (0, 2.5):
            value = floor(n, d, s, half_space).value
            assert math.isfinite(value)
            random = random_half_space(n, d, s) if half_space else random_mean(d, s)
            assert random is None or value < random


def test_floor_grows_with_the_number_of_points() -> None:
    for half_space in (False, True):
        values = [floor(n, 4, 1.0, half_space).value for n in range(5, 40, 5)]
        # The least mean energy grows with n; so do the floors, up to what the verification takes off.
        assert all(b > a - 1e-7 for a, b in pairwise(values))


def test_large_exponents() -> None:
    assert floor(20, 3, 60.0).value > floor(20, 3, 50.0).value * 1e-6
    assert floor(20, 5, 300.0).value > 0
    for call in (
        lambda: floor(20, 5, 5000.0),
        lambda: ground_state(20, 30, 5000.0),
        lambda: welch_floor(20, 5, 5000.0),
    ):
        with pytest.raises(UsageError, match="smaller s"):
            call()


def test_a_failing_solver_leaves_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "solve", lambda *_: (None, "time limit"))
    found = floor.__wrapped__(9, 3, 1.0)
    assert found.method == "Levenshtein quadrature, degree 3 (linear program of degree 14 failed: time limit)"
    assert 0.99 * 25.759986531 / 36 < found.value < 25.759986531 / 36


def test_scores() -> None:
    lowest, random = floor(64, 27, 2), random_mean(27, 2) or math.nan
    assert uniformity(lowest.value, 64, 27, 2) == pytest.approx(1)
    assert uniformity(random, 64, 27, 2) == pytest.approx(0)
    assert (uniformity(0.6, 64, 27, 2) or 0) < 0
    half = random_half_space(64, 27, 2) or math.nan
    assert uniformity(half, 64, 27, 2, half_space=True) == pytest.approx(0)
    assert gap(1.01 * lowest.value, lowest) == pytest.approx(0.01)
    assert gap(-0.3, -0.4) == pytest.approx(0.25)
    with pytest.raises(UsageError, match="floor of 0"):
        gap(1.0, 0.0)
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteError):
            gap(bad, 1.0)
        with pytest.raises(NonFiniteError):
            uniformity(bad, 9, 3, 1.0)


def test_published_logs() -> None:
    """A classifier of 100 classes in d = 256, in the conventions of the original code, and a network's hidden floor."""
    code = universal_code(100, 256)
    assert code is not None
    c = code[0][0]
    angle = math.acos(c) / math.pi + 1e-4
    computed = [
        *(10 * (ground_state(100, 256, 2) or 0), 10 * (ground_state(100, 256, 1) or 0)),
        *(20 * (ground_state(100, 256, 0) or 0), -10 * math.log(angle), 1 / angle, angle**-2),
    ]
    assert computed == pytest.approx([4.9500, 7.0356, -7.0320, 6.8654, 1.9868, 3.9475], abs=0.6e-4)
    shapes = [(64, 27), (64, 576), (64, 576), (128, 576), (128, 1152), (128, 1152)]
    shapes += [(256, 1152), (256, 2304), (256, 2304), (256, 4096)]
    floors = [floor(n, d, 2, half_space=True).value for n, d in shapes]
    # t = 37 / (27 * 63), so f(r-) + f(r+) = 1701 / 1664.
    assert floors[0] == pytest.approx((63 * 1701 / 1664 + 0.25) / 127, rel=1e-12)
    assert sum(floors) == pytest.approx(5.0002, abs=0.6e-4)


@pytest.mark.parametrize(
    ("n", "d", "s"),
    [
        *((1, 3, 1), (0, 3, 1), (5, 1, 1), (5.0, 3, 1), (5, 3.5, 1), (True, 3, 1), ("5", 3, 1)),
        *((5, 3, -0.1), (5, 3, math.nan), (5, 3, math.inf), (5, 3, "1"), (5, 3, None)),
    ],
)
def test_bad_input(n: int, d: int, s: float) -> None:
    for function in (floor, ground_state, welch_floor, random_half_space):
        with pytest.raises(UsageError):
            function(n, d, s)
    with pytest.raises(UsageError):
        uniformity(0.5, n, d, s)


def test_integers_of_numpy_are_integers() -> None:
    assert floor(np.int64(4), np.int32(3), np.float32(1)) == floor(4, 3, 1)
