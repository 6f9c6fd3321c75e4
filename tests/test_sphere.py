"""The hyperspherical energy against exact codes, doubled neurons, a dense float64 form, and every bad input."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import sphere
from groundstate.norms.sphere.blocks import block_size
from groundstate.norms.sphere.parallel import rounds, run

F64 = torch.float64
BLOCK = block_size(torch.device("cpu"))
LAWS = [(s, half, angular) for s in (0, 1, 2, 0.7, 5) for half in (False, True) for angular in (False, True)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def dense(w: Tensor, s: float, half_space: bool = False, angular: bool = False) -> tuple[Tensor, Tensor]:
    """Value and gradient by autograd through all pairs, from differences, in float64; half-spaces by doubling."""
    w = w.detach().double().requires_grad_()
    u = w / w.norm(dim=-1, keepdim=True)
    if half_space:
        u = torch.cat([u, -u])
    i, j = torch.triu_indices(len(u), len(u), 1)
    if half_space:  # a neuron and its own antipode do not depend on w
        own = j == i + len(w)
        i, j = i[~own], j[~own]
    r = (u[i] - u[j]).norm(dim=-1)
    if angular:
        r = 2 * torch.atan2(r, (u[i] + u[j]).norm(dim=-1))
    f = -r.log() if s == 0 else r.pow(-s)
    total, count = f.sum(), len(u)
    if half_space:
        opposite = math.pi if angular else 2.0
        total = total + len(w) * (-math.log(opposite) if s == 0 else opposite**-s)
    value = total / (count * (count - 1) / 2)
    (grad,) = torch.autograd.grad(value, w)
    return value.detach(), grad


def error(a: Tensor, b: Tensor) -> float:
    """Relative distance of a from the reference b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


# ---------------------------------------------------------------------------------------------------- exact codes


def simplex(n: int) -> Tensor:
    return torch.eye(n, dtype=F64) - 1 / n


def cross_polytope(d: int) -> Tensor:
    return torch.cat([torch.eye(d, dtype=F64), -torch.eye(d, dtype=F64)])


def signs(*values: float) -> Iterator[tuple[float, ...]]:
    return itertools.product(*[(-v, v) if v else (0.0,) for v in values])


def icosahedron() -> Tensor:
    phi = (1 + math.sqrt(5)) / 2
    return torch.tensor([p[k:] + p[:k] for p in signs(0, 1, phi) for k in range(3)], dtype=F64)


def six_hundred_cell() -> Tensor:
    phi = (1 + math.sqrt(5)) / 2
    even = [
        p for p in itertools.permutations(range(4)) if sum(p[i] > p[j] for i in range(4) for j in range(i, 4)) % 2 == 0
    ]
    points = [tuple(v[k] for k in p) for v in signs(phi, 1, 1 / phi, 0) for p in even]
    points += [*signs(1, 1, 1, 1), *(tuple(2.0 * t * (k == i) for k in range(4)) for i in range(4) for t in (-1, 1))]
    return torch.tensor(points, dtype=F64)


def e8_roots() -> Tensor:
    points = [
        tuple(a * (k == i) + b * (k == j) for k in range(8))
        for i, j in itertools.combinations(range(8), 2)
        for a, b in signs(1, 1)
    ]
    points += [p for p in signs(*[0.5] * 8) if sum(x < 0 for x in p) % 2 == 0]
    return torch.tensor(points, dtype=F64)


CODES = [
    ("simplex10", simplex(10), (-0.399253849, 0.670820393, 0.45)),
    ("simplex64", simplex(64), (-0.354447769, 0.701560760, 0.4921875)),
    ("simplex1000", simplex(1000), (-0.347073840, 0.706753139, 0.4995)),
    ("cross128", cross_polytope(64), (-0.349302516, 0.705476019, 0.498031496)),
    ("cross512", cross_polytope(256), (-0.347251816, 0.706701484, 0.499510763)),
    ("icosahedron", icosahedron(), (-0.327365836825, 0.744928076631, 0.590909090909)),
    ("600-cell", six_hundred_cell(), (-0.266664750002, 0.811845441975, 0.755602240896)),
    ("E8", e8_roots(), (-0.314320349952, 0.744464725959, 0.577057182706)),
]


@pytest.mark.parametrize(("points", "expected"), [c[1:] for c in CODES], ids=[c[0] for c in CODES])
def test_universally_optimal_codes(points: Tensor, expected: tuple[float, ...]) -> None:
    for s, known in enumerate(expected):
        value, grad = sphere.energy_and_grad(points, s)
        assert float(value) == pytest.approx(known, abs=1e-9)  # the digits of the table
        assert float(grad.abs().max()) < 1e-12  # a ground state is stationary, up to float64 rounding
        single = sphere.energy(points.float(), s)
        assert float(single) == pytest.approx(known, rel=1e-6)  # float32, 240 neurons and more


def test_codes_have_the_right_number_of_points() -> None:
    assert [len(c[1]) for c in CODES] == [10, 64, 1000, 128, 512, 12, 120, 240]


def test_half_of_an_antipodal_code_is_the_code_in_a_half_space() -> None:
    for points in (e8_roots(), six_hundred_cell(), icosahedron()):
        first = torch.tensor([next(x for x in p if x) > 0 for p in points.tolist()])
        for s in (0, 1, 2):
            half, grad = sphere.energy_and_grad(points[first], s, half_space=True)
            assert float(half) == pytest.approx(float(sphere.energy(points, s)), rel=1e-14)
            assert float(grad.abs().max()) < 1e-12


def test_orthonormal_rows_are_the_half_space_minimum() -> None:
    w = torch.linalg.qr(gaussian(9, 9))[0][:7]
    for s, f_root2, f_2 in ((0, -math.log(2) / 2, -math.log(2)), (1, 2**-0.5, 0.5), (2, 0.5, 0.25)):
        value, grad = sphere.energy_and_grad(w, s, half_space=True)
        assert float(value) == pytest.approx((2 * 7 * 6 * f_root2 + 7 * f_2) / (7 * 13), rel=1e-14)
        assert float(grad.abs().max()) < 1e-14


def test_random_directions_have_the_closed_form_mean() -> None:
    # The standard error of a pair mean over 2000 neurons is some 1e-5.
    w = gaussian(2000, 64, dtype=torch.float32)
    for s, known in ((0, -0.342573846), (1, 0.711396457), (2, 0.508196721)):
        assert float(sphere.energy(w, s)) == pytest.approx(known, rel=2e-4)


# ------------------------------------------------------------------------------------------- against the dense form


@pytest.mark.parametrize(("s", "half", "angular"), LAWS)
@pytest.mark.parametrize(("n", "d"), [(2, 2), (3, 2), (7, 3), (60, 5), (130, 64)])
def test_equals_the_dense_form(n: int, d: int, s: float, half: bool, angular: bool) -> None:
    w = gaussian(n, d, seed=n) * (1 + torch.arange(n, dtype=F64))[:, None]
    # The reference differentiates through differences and has rounding of its own: r^-s-1 at near pairs.
    for dtype, value_error, grad_error in ((F64, 1e-12, 1e-11), (torch.float32, 1e-6, 1e-5)):
        x = w.to(dtype)
        value, grad = sphere.energy_and_grad(x, s, half_space=half, angular=angular)
        known, slope = dense(x, s, half, angular)
        assert value.dtype == dtype
        assert grad.dtype == dtype
        assert error(value, known) < value_error
        assert error(grad, slope) < grad_error


@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])
def test_blocks_add_up(n: int) -> None:
    w = gaussian(n, 6, seed=n)
    for s, half in ((1, False), (2, True)):
        value, grad = sphere.energy_and_grad(w, s, half_space=half)
        known, slope = dense(w, s, half)
        assert error(value, known) < 1e-12
        assert error(grad, slope) < 1e-10  # some thousand near pairs, whose reference loses digits
        single, coarse = sphere.energy_and_grad(w.float(), s, half_space=half)
        assert error(single, sphere.energy(w.float().double(), s, half_space=half)) < 1e-6
        assert error(coarse, sphere.energy_and_grad(w.float().double(), s, half_space=half)[1]) < 1e-5


def test_half_space_equals_doubling() -> None:
    w = gaussian(700, 64)
    for s in (0, 1, 2, 3.5):
        doubled = sphere.energy(torch.cat([w, -w]), s)
        assert float(sphere.energy(w, s, half_space=True)) == pytest.approx(float(doubled), rel=1e-14)


@pytest.mark.parametrize(("s", "half", "angular"), LAWS)
def test_gradcheck(s: float, half: bool, angular: bool) -> None:
    w = gaussian(6, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sphere.energy(x, s, half_space=half, angular=angular), w)


def test_autograd_weighs_the_gradient_of_each_matrix() -> None:
    w = gaussian(3, 5, 4).requires_grad_()
    (grad,) = torch.autograd.grad((sphere.energy(w) * torch.tensor([1.0, -2.0, 0.0], dtype=F64)).sum(), w)
    known = sphere.energy_and_grad(w)[1]
    assert torch.equal(grad, known * torch.tensor([1.0, -2.0, 0.0], dtype=F64)[:, None, None])
    assert w.grad is None


# ------------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize(("s", "half", "angular"), [(0, False, False), (1, True, False), (2, True, True)])
def test_invariances(s: float, half: bool, angular: bool) -> None:
    w = gaussian(50, 12)
    value, grad = sphere.energy_and_grad(w, s, half_space=half, angular=angular)
    q = torch.linalg.qr(gaussian(12, 12, seed=5))[0]
    scales = torch.rand(50, 1, generator=generator(1), dtype=F64) + 0.01
    order = torch.randperm(50, generator=generator(2))
    for moved, expected in ((w @ q.mT, grad @ q.mT), (w * scales, grad / scales), (w[order], grad[order])):
        other, slope = sphere.energy_and_grad(moved, s, half_space=half, angular=angular)
        assert float(other) == pytest.approx(float(value), rel=1e-13)
        assert error(slope, expected) < 1e-12
    radial = (grad * w).sum(-1).abs() / (grad.norm(dim=-1) * w.norm(dim=-1))
    assert float(radial.max()) < 1e-13
    if half:
        flipped = torch.where(torch.rand(50, 1, generator=generator(3)) < 0.5, -w, w)
        assert float(sphere.energy(flipped, s, half_space=half, angular=angular)) == pytest.approx(
            float(value), rel=1e-13
        )


def test_float32_gradient_is_tangent() -> None:
    w = gaussian(600, 40, dtype=torch.float32)
    grad = sphere.energy_and_grad(w, 1)[1].double()
    radial = (grad * w).sum(-1).abs() / (grad.norm(dim=-1) * w.double().norm(dim=-1))
    assert float(radial.max()) < 1e-6  # rounding of the gradient to float32


def test_batch_equals_loop() -> None:
    for shape in ((2, 3, 10, 4), (40, 9, 3), (2, BLOCK + 5, 3)):
        w = gaussian(*shape)
        value, grad = sphere.energy_and_grad(w, 2, half_space=True)
        each = [sphere.energy_and_grad(x, 2, half_space=True) for x in w.flatten(0, -3)]
        assert value.shape == shape[:-2]
        assert error(value.flatten(), torch.stack([v for v, _ in each])) < 1e-14
        assert error(grad.flatten(0, -3), torch.stack([g for _, g in each])) < 1e-13
    assert sphere.energy(gaussian(0, 4, 3)).shape == (0,)
    assert sphere.energy_and_grad(gaussian(2, 0, 4, 3))[1].shape == (2, 0, 4, 3)


def test_noncontiguous_and_untouched_inputs() -> None:
    w = gaussian(8, 30, 5)
    for x in (w.mT, w[:, ::3], w.permute(1, 0, 2), w[0].T, w[0].flip(0)):
        before = x.clone()
        value, grad = sphere.energy_and_grad(x, 1)
        known, slope = sphere.energy_and_grad(x.contiguous(), 1)
        assert torch.equal(x, before)
        assert error(value, known) < 1e-14
        assert error(grad, slope) < 1e-13


@pytest.mark.usefixtures("threads")
def test_the_same_bits_for_any_number_of_threads() -> None:
    w = gaussian(5 * BLOCK + 3, 16, dtype=torch.float32)
    w[17], w[-1] = w[900], -w[3]
    made = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(sphere.energy_and_grad(w, 1, half_space=True))
        assert torch.get_num_threads() == threads
    for value, grad in made[1:]:
        assert torch.equal(value, made[0][0])
        assert torch.equal(grad, made[0][1])


@pytest.mark.usefixtures("threads")
def test_threads_of_others_keep_their_setting_and_errors_come_through() -> None:
    torch.set_num_threads(4)
    w = gaussian(3 * BLOCK, 8, dtype=torch.float32)
    sphere.energy(w)
    seen: list[int] = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [4]
    w[5] = w[2 * BLOCK + 1]
    with pytest.raises(UsageError, match=f"neurons 5 and {2 * BLOCK + 1} point the same way"):
        sphere.energy(w, on_duplicate="error")
    with torch.inference_mode():
        assert float(sphere.energy(w)) > 0


@pytest.mark.parametrize("players", range(9))
def test_rounds_meet_each_pair_once_and_nobody_twice_at_a_time(players: int) -> None:
    games = rounds(players)
    assert sorted(g for played in games for g in played) == [(i, j) for i in range(players) for j in range(i, players)]
    for played in games[1:]:
        names = [name for g in played for name in g]
        assert len(names) == len(set(names))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads_used", [1, 3])
def test_progress_counts_to_the_end(threads_used: int) -> None:
    torch.set_num_threads(threads_used)
    w, seen = gaussian(3 * BLOCK + 1, 4), []

    def show(done: int, total: int) -> None:
        seen.append((threading.current_thread(), done, total))

    value = sphere.energy(w, progress=show)
    assert {s[0] for s in seen} == {threading.current_thread()}
    assert seen[-1][1:] == (10, 10)  # four blocks
    assert [s[1] for s in seen] == sorted({s[1] for s in seen})

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sphere.energy(w, progress=interrupt)
    assert torch.equal(sphere.energy(w), value)


@pytest.mark.usefixtures("threads")
def test_games_of_a_player_keep_their_order() -> None:
    torch.set_num_threads(3)
    order: dict[int, list[int]] = {k: [] for k in range(5)}
    games = [((i, j), (i, j, k)) for k, (i, j) in enumerate(g for played in rounds(5)[1:] * 20 for g in played)]

    def play(i: int, j: int, number: int) -> None:
        for player in (i, j):
            order[player].append(number)
        time.sleep(1e-4 * (number % 3))

    run(play, games, torch.device("cpu"))
    assert sum(map(len, order.values())) == 2 * len(games)
    assert all(numbers == sorted(numbers) for numbers in order.values())


def test_one_block_is_the_same_with_and_without_threads(threads: None) -> None:
    w = gaussian(3, 20, 9, dtype=torch.float32)
    w[1, 4] = 2 * w[1, 7]  # a duplicate
    seen: list[tuple[int, int]] = []
    made = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found = sphere.energy_and_grad(w, 2, half_space=True, progress=lambda *done: seen.append(done))
        made.append([*found, sphere.duplicates(w)])
    assert all(torch.equal(a, b) for a, b in zip(*made))
    assert seen == [(1, 1), (1, 1)]


# ------------------------------------------------------------------------------------------------------- near pairs


@pytest.mark.parametrize("angle", [0.1, 0.05, 0.01, 1e-3, 3e-4, 1e-4, 1e-5])
@pytest.mark.parametrize("sign", [1, -1])
def test_near_pairs_in_float32(angle: float, sign: int) -> None:
    w = gaussian(600, 256, seed=4)
    u = w[0] / w[0].norm()
    v = w[1] - (w[1] @ u) * u
    w[599] = sign * 3 * (math.cos(angle) * u + math.sin(angle) * v / v.norm())
    w = w.float()
    for s, angular in ((0, False), (1, False), (2, False), (2, True)):
        value, grad = sphere.energy_and_grad(w, s, half_space=True, angular=angular)
        known, slope = sphere.energy_and_grad(w.double(), s, half_space=True, angular=angular)
        assert error(value, known) < 1e-6
        assert error(grad, slope) < 1e-5
        few = w[[*range(20), 599]]
        value, grad = sphere.energy_and_grad(few, s, half_space=True, angular=angular)
        known, slope = dense(few, s, True, angular)
        assert error(value, known) < 1e-6
        assert error(grad, slope) < 1e-5


def test_nearly_collapsed_layer() -> None:
    for spread in (1e-2, 1e-4):
        w = (1 + spread * gaussian(120, 20, seed=6)).float()
        for s in (0, 1, 2):
            value, grad = sphere.energy_and_grad(w, s)
            known, slope = dense(w, s)
            assert error(value, known) < 1e-6
            assert error(grad, slope) < 1e-5


def test_angular_gradient_vanishes_between_antipodes() -> None:
    w = torch.cat([torch.eye(3), -torch.eye(3)])
    value, grad = sphere.energy_and_grad(w, 1, angular=True)
    assert float(value) == pytest.approx((12 * 2 / math.pi + 3 / math.pi) / 15, rel=1e-6)
    assert float(grad.abs().max()) < 1e-7


# -------------------------------------------------------------------------------------------- duplicates and zeros


@pytest.mark.parametrize(("half", "other"), [(False, 2.0), (True, 2.0), (True, -2.0)])
@pytest.mark.parametrize("angular", [False, True])
def test_duplicates_are_clipped_without_gradient(half: bool, other: float, angular: bool) -> None:
    w = gaussian(5, 4)
    w[3] = other * w[1]
    for s in (0, 1, 2):
        value, grad = sphere.energy_and_grad(w, s, half_space=half, angular=angular, r_min=1e-3)
        distinct, slope = sphere.energy_and_grad(w[[0, 1, 2, 4]], s, half_space=half, angular=angular)
        assert bool(value.isfinite())
        assert bool(grad.isfinite().all())
        assert float(value) > float(distinct)
        # What neuron 0 feels is what two neurons at the place of 1 do.
        count, fewer = (5 * 9, 4 * 7) if half else (5 * 4, 4 * 3)
        x = w[0].clone().requires_grad_()
        (twice,) = torch.autograd.grad(_pair(x, w[1], s, half, angular), x)
        assert error(grad[0] * count, slope[0] * fewer + 2 * twice) < 1e-10
    assert int(sphere.duplicates(w, half_space=half)) == 1
    with pytest.raises(UsageError, match="neurons 1 and 3"):
        sphere.energy(w, half_space=half, angular=angular, on_duplicate="error")


def _pair(a: Tensor, b: Tensor, s: float, half: bool, angular: bool) -> Tensor:
    """f of the pair (a, b), and of (a, -b) in a half-space."""
    c = torch.dot(a, b) / (a.norm() * b.norm())
    total = torch.zeros((), dtype=a.dtype)
    for x in (c, -c) if half else (c,):
        r = torch.acos(x) if angular else (2 - 2 * x).sqrt()
        total = total + (-r.log() if s == 0 else r**-s)
    return total


def test_duplicate_energy_is_that_of_r_min() -> None:
    w = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    for s, r_min, known in ((0, 1e-6, -math.log(1e-6)), (1, 1e-6, 1e6), (2, 0.5, 4.0)):
        value, grad = sphere.energy_and_grad(w, s, r_min=r_min)
        assert float(value) == pytest.approx(known, rel=1e-6)
        assert not bool(grad.any())


def test_an_antipode_is_no_duplicate_in_full_space() -> None:
    w = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert float(sphere.energy(w, 1, on_duplicate="error")) == pytest.approx(0.5)
    assert int(sphere.duplicates(w)) == 0
    with pytest.raises(UsageError, match="neurons 0 and 1 are antipodes"):
        sphere.energy(w, 1, half_space=True, on_duplicate="error")


def test_all_neurons_equal() -> None:
    w = torch.ones(40, 7)
    value, grad = sphere.energy_and_grad(w, 2)
    assert float(value) == pytest.approx(1e12, rel=1e-6)
    assert not bool(grad.any())
    assert int(sphere.duplicates(w)) == 40 * 39 // 2


def test_zero_neurons() -> None:
    w = gaussian(3, 9, 4)
    w[1, 2] = w[1, 7] = w[2, 0] = 0
    assert sphere.zero_neurons(w).tolist() == [0, 2, 1]
    with pytest.raises(UsageError, match="3 of 27 neurons are zero"):
        sphere.energy(w)
    value, grad = sphere.energy_and_grad(w, 1, half_space=True, on_zero="exclude")
    for k in range(3):
        live = (w[k] != 0).any(-1)
        known, slope = sphere.energy_and_grad(w[k, live], 1, half_space=True)
        assert float(value[k]) == pytest.approx(float(known), rel=1e-14)
        assert error(grad[k, live], slope) < 1e-14
        assert not bool(grad[k, ~live].any())
    w[1, 5] = w[1, 6]
    with pytest.raises(UsageError, match="neurons 5 and 6"):  # numbered as given, zeros included
        sphere.energy(w, on_zero="exclude", on_duplicate="error")
    assert sphere.duplicates(w, on_zero="exclude").tolist() == [0, 1, 0]
    with pytest.raises(UsageError, match="only 1 of 3 neurons are not zero"):
        sphere.energy(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]), on_zero="exclude")


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (torch.ones(1, 3), "at least 2 neurons"),
        (torch.ones(0, 3), "at least 2 neurons"),
        (torch.ones(5, 1), "no directions"),
        (torch.ones(5, 0), "no directions"),
        (torch.ones(5), "rows"),
        (torch.ones(5, 3, dtype=torch.long), "real floating"),
        (torch.ones(5, 3, dtype=torch.complex64), "real floating"),
    ],
    ids=["one", "none", "line", "point", "vector", "integer", "complex"],
)
def test_refuses_what_has_no_pairs_or_directions(w: Tensor, message: str) -> None:
    for call in (sphere.energy, sphere.energy_and_grad, sphere.duplicates):
        with pytest.raises(UsageError, match=message):
            call(w)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", ["error", "exclude"])
def test_refuses_nonfinite_weights(bad: float, policy: sphere.OnZero) -> None:
    for dtype in (torch.float32, F64, torch.bfloat16):
        w = torch.ones(4, 3, dtype=dtype)
        w[1] = 0
        w[2, 1] = bad
        with pytest.raises(NonFiniteError, match="1 NaN or infinite"):
            sphere.energy(w, on_zero=policy)


@pytest.mark.parametrize("s", [-1, math.nan, math.inf, True, "1", None])
def test_refuses_bad_exponents(s: float) -> None:
    with pytest.raises(UsageError, match="s must be a finite number"):
        sphere.energy(torch.eye(3), s)


def test_refuses_unknown_policies() -> None:
    w = torch.eye(3)
    with pytest.raises(UsageError, match="on_zero"):
        sphere.energy(w, on_zero="drop")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="on_duplicate"):
        sphere.energy(w, on_duplicate="drop")  # pyright: ignore[reportArgumentType]
    for r_min in (0.0, -1.0, 0.6, math.nan):
        with pytest.raises(UsageError, match="r_min"):
            sphere.energy(w, r_min=r_min)


def test_any_scale() -> None:
    w = gaussian(30, 6)
    value, grad = sphere.energy_and_grad(w, 1)
    for scale in (1e20, 1e-20, 1e150, 1e-150, 1e300, 1e-300):
        for dtype, tolerance in ((F64, 1e-12), (torch.float32, 1e-5)):
            if dtype == torch.float32 and not 1e-30 < scale < 1e30:
                continue
            other, slope = sphere.energy_and_grad((w * scale).to(dtype), 1)
            assert float(other) == pytest.approx(float(value), rel=tolerance)
            assert error(slope.double() * scale, grad) < tolerance
    mixed = w * torch.logspace(-200, 200, 30, dtype=F64)[:, None]
    assert float(sphere.energy(mixed, 1)) == pytest.approx(float(value), rel=1e-12)


def test_overflow_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match=r"gradient .* overflows"):
        sphere.energy_and_grad(torch.tensor([[1e-42, 0.0], [0.0, 1.0]]))
    with pytest.raises(NonFiniteError, match=r"value .* overflows"):
        sphere.energy(torch.ones(2, 3), 10)  # 1e60 in float32
    assert float(sphere.energy(torch.ones(2, 3, dtype=F64), 10)) == pytest.approx(1e60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    w = gaussian(200, 50).to(dtype)
    value, grad = sphere.energy_and_grad(w, 2)
    known, slope = sphere.energy_and_grad(w.float(), 2)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert float(value) == float(known)
    assert torch.equal(grad, slope.to(dtype))
    x = w.clone().requires_grad_()
    sphere.energy(x, 2).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, grad)


def test_second_derivative_is_refused() -> None:
    w = gaussian(4, 3).requires_grad_()
    (grad,) = torch.autograd.grad(sphere.energy(w), w, create_graph=True)
    assert torch.equal(grad, sphere.energy_and_grad(w)[1])
    with pytest.raises(UsageError, match="no second derivative"):
        torch.autograd.grad((grad + w).square().sum(), w)


def test_measuring_needs_no_gradient() -> None:
    w = gaussian(5, 3)
    assert not sphere.energy(w).requires_grad
    with torch.no_grad():
        assert not sphere.energy(w.requires_grad_()).requires_grad
    assert w.grad is None
    assert w.requires_grad


def test_large_exponents_stay_accurate_in_float32() -> None:
    w = gaussian(300, 8, dtype=torch.float32)
    value, grad = sphere.energy_and_grad(w, 30)
    known, slope = sphere.energy_and_grad(w.double(), 30)
    assert error(value, known) < 1e-6
    assert error(grad, slope) < 1e-5
