"""Projected ascent against the power method, closed worst cases of linear classifiers and a plain reference loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groundstate.attack import Norm, ProjectedAscent, alignment, alignment_curve, robust_accuracy
from groundstate.errors import NonFiniteError, UsageError

F64 = torch.float64
NORMS: tuple[Norm, ...] = ("l2", "linf")


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def fill(model: nn.Sequential, seed: int = 0) -> nn.Sequential:
    """Weights from a seed of their own, not from the global generator."""
    g = gen(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=F64) * 0.6)
    return model


def mlp(dtype: torch.dtype = F64, seed: int = 0) -> nn.Sequential:
    return fill(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), seed).to(dtype)


def size(delta: Tensor, norm: Norm) -> Tensor:
    flat = delta.double().flatten(1)
    return flat.norm(dim=1) if norm == "l2" else flat.abs().amax(1)


def linear_map() -> Tensor:
    return randn(6, 20, seed=1)


def by_power_method(a: Tensor, start: Tensor, iterations: int) -> Tensor:
    v = start
    for _ in range(iterations):
        v = v @ a.T @ a
        v = v / v.norm(dim=1, keepdim=True)
    return v


# Projected ascent as a power method


def test_long_steps_on_a_linear_map_are_the_power_method() -> None:
    a, x = linear_map(), randn(8, 20, seed=3)
    attack = ProjectedAscent(0.1, steps=5, step_size=1e12, objective="logits")
    start = attack.start(x, gen())
    delta = attack.perturb(lambda p: p @ a.T + 1, x, None, gen())
    # a step of 1e12 keeps 1e-13 of the old delta; x + delta rounds delta / epsilon to 1e-14; five iterations
    torch.testing.assert_close(delta / 0.1, by_power_method(a, start, 5), rtol=0, atol=1e-11)


def test_the_longer_the_steps_the_nearer_the_power_method() -> None:
    a, x = linear_map(), torch.zeros(32, 20, dtype=F64)
    cosines = []
    for step_size in (0.01, 0.1, 1, 10, 1e6):
        attack = ProjectedAscent(0.1, steps=5, step_size=step_size, objective="logits")
        target = by_power_method(a, attack.start(x, gen()), 5)
        cosines.append(float(alignment(attack.perturb(lambda p: p @ a.T, x, None, gen()), target).mean()))
    assert cosines == sorted(cosines)
    # 1 - cos falls as 1 / step_size^2 once the steps are longer than the radius
    assert 0.3 < cosines[0] < 0.9
    assert cosines[1] > 0.95
    assert 1 - cosines[3] < 1e-5
    assert 1 - cosines[4] < 1e-14


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5)])
def test_many_steps_find_the_top_singular_vector(dtype: torch.dtype, tolerance: float) -> None:
    a = linear_map()
    s, vh = torch.linalg.svd(a)[1:]
    x = randn(4, 20, dtype=dtype)
    attack = ProjectedAscent(0.1, steps=60, step_size=1e6, objective="logits")  # (s_2 / s_1)^120 = 2e-8
    delta = attack.perturb(lambda p: p @ a.to(dtype).T, x, None, gen())
    # float32: x + delta keeps delta to 1e-6 of its length, the difference of logits to 1e-6
    assert float((1 - alignment(delta, vh[0].expand(4, 20))).max()) < tolerance
    gain = (delta.double() @ a.T).norm(dim=1) / 0.1
    torch.testing.assert_close(gain, s[0].expand(4), rtol=tolerance, atol=0)


def test_no_scale_of_the_map_matters() -> None:
    a, x = linear_map().float(), torch.zeros(3, 20)
    attack = ProjectedAscent(0.1, steps=4, step_size=1e3, objective="logits")
    expected = attack.perturb(lambda p: p @ a.T, x, None, gen())
    for scale in (1e-30, 1e30):  # squares of logits leave the range of float32
        got = attack.perturb(lambda p, c=scale: p @ (c * a).T, x, None, gen())
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # rounding of the scaled map


@pytest.mark.parametrize("epsilon", [1e-20, 1e20])
def test_no_scale_of_the_ball_matters(epsilon: float) -> None:
    a, x = linear_map().float(), torch.zeros(3, 20)
    unit = ProjectedAscent(1.0, steps=4, objective="logits").perturb(lambda p: p @ a.T, x, None, gen())
    delta = ProjectedAscent(epsilon, steps=4, objective="logits").perturb(lambda p: p @ a.T, x, None, gen())
    torch.testing.assert_close(delta / epsilon, unit, rtol=0, atol=1e-5)  # four steps in float32


# Closed worst cases


@pytest.mark.parametrize("norm", NORMS)
def test_linear_classifier_worst_case(norm: Norm) -> None:
    w, x, epsilon = randn(20), randn(12, 20, seed=1), 0.3

    def f(p: Tensor) -> Tensor:
        return torch.stack([p @ w, -(p @ w)], 1)

    y = (x @ w < 0).long()
    worst = (x @ w).abs() - epsilon * (w.norm() if norm == "l2" else w.abs().sum())
    for attack, tolerance in (
        # one step is enough when it is longer than the ball; 1e-9 is its own share of the old delta
        (ProjectedAscent(epsilon, norm, step_size=1e9), 1e-9),
        # what the documentation of step_size says of the default and of twice that
        (ProjectedAscent(epsilon, norm), 0.05 * epsilon * float(w.norm())),
        (ProjectedAscent(epsilon, norm, step_size=5 * epsilon / 10), 1e-3 * epsilon * float(w.norm())),
    ):
        delta = attack.perturb(f, x, y, gen())
        sign = 1.0 - 2 * y
        margin = sign * ((x + delta) @ w)
        assert bool((margin >= worst - 1e-12).all())  # no attack can do better
        torch.testing.assert_close(margin, worst, rtol=0, atol=tolerance)


@pytest.mark.parametrize("norm", NORMS)
def test_robust_accuracy_of_a_linear_classifier(norm: Norm) -> None:
    w, x = randn(20), randn(200, 20, seed=1)
    margin = (x @ w) / (w.norm() if norm == "l2" else w.abs().sum())
    y = (randn(200, seed=2) * 0.02 + margin < 0).long()  # some labels are wrong
    margin = torch.where(y == 0, margin, -margin)
    epsilons = [0.5, 0.0, 0.05, 0.2, 0.2]
    attack = ProjectedAscent(0, norm, steps=2, step_size=1e6)
    got = robust_accuracy(lambda p: torch.stack([p @ w, -(p @ w)], 1), x, y, epsilons, gen(), attack=attack, batch=64)
    assert got == [float((margin > e).double().mean()) for e in epsilons]


def test_no_linear_classifier_is_broken_inside_its_margin() -> None:
    w, x = randn(5, 8), randn(100, 8, seed=1)
    z = x @ w.T
    y = z.argmax(1)
    gaps = z.gather(1, y[:, None]) - z
    distance = (gaps / (w[y][:, None] - w[None]).norm(dim=2)).nan_to_num(math.inf).amin(1)
    for epsilon in (0.1, 0.4, 1.0):
        bound = float((distance > epsilon).double().mean())
        (got,) = robust_accuracy(lambda p: p @ w.T, x, y, [epsilon], gen(), attack=ProjectedAscent(0, steps=40))
        assert bound <= got <= bound + 0.03  # an upper bound, and a near one: cross-entropy weighs all classes


def test_a_sure_network_hides_no_gradient() -> None:
    # the softmax of float32 rounds to 1: the gradient of cross-entropy itself is exactly zero
    w, x = 1e4 * randn(6, dtype=torch.float32), randn(9, 6, dtype=torch.float32, seed=1)

    def f(p: Tensor) -> Tensor:
        return torch.stack([p @ w, -(p @ w)], 1)

    y = (x @ w < 0).long()
    point = x.clone().requires_grad_()
    assert not bool(torch.autograd.grad(functional.cross_entropy(f(point), y), point)[0].any())
    reach = 1.02 * float((x @ w).abs().max() / w.norm())
    assert robust_accuracy(f, x, y, [0, reach], gen()) == [1.0, 0.0]


# Against a plain loop


def reference(attack: ProjectedAscent, f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The same ascent of cross-entropy by autograd through the loss, keeping every point."""
    assert attack.step_size is not None
    g, points, ranks = gen(), [], []
    for _ in range(attack.restarts):
        delta = attack.start(x, g)
        for _ in range(attack.steps + 1):
            delta = delta.detach().requires_grad_()
            z = f(x + delta)
            loss = functional.cross_entropy(z, y, reduction="none")
            (grad,) = torch.autograd.grad(loss.sum(), delta)
            points.append(delta.detach())
            ranks.append(torch.stack([(z.argmax(1) != y).double(), loss.detach()], 1))
            if attack.norm == "l2":
                delta = delta + attack.step_size * grad / grad.norm(dim=1, keepdim=True)
                delta = delta * (attack.epsilon / delta.norm(dim=1, keepdim=True)).clamp_max(1)
            else:
                delta = (delta + attack.step_size * grad.sign()).clamp(-attack.epsilon, attack.epsilon)
    best = [max(range(len(points)), key=lambda i, n=n: tuple(ranks[i][n].tolist())) for n in range(len(x))]
    return torch.stack([points[i][n] for n, i in enumerate(best)])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("epsilon", [0.05, 0.5, 2.0])
def test_equals_the_plain_loop(norm: Norm, epsilon: float) -> None:
    f, x = mlp(), randn(40, 6, seed=5)
    y = torch.randint(4, (40,), generator=gen(6))
    attack = ProjectedAscent(epsilon, norm, steps=7, step_size=epsilon / 2, restarts=3)
    # the same arithmetic in float64, some twenty steps long; a sign or a kink would have to be met to 1e-12
    torch.testing.assert_close(attack.perturb(f, x, y, gen()), reference(attack, f, x, y), rtol=0, atol=1e-8)


def test_more_restarts_are_never_worse() -> None:
    f, x = mlp(), randn(30, 6, seed=5)
    attack = ProjectedAscent(1.0, steps=4, objective="logits")

    def gain(restarts: int) -> Tensor:
        return (f(x + replace(attack, restarts=restarts).perturb(f, x, None, gen())) - f(x)).norm(dim=1).detach()

    one, five = gain(1), gain(5)
    assert bool((five >= one - 1e-12).all())  # the first start is the same
    assert bool((five > one + 1e-6).any())


# Balls and boxes


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_ball_and_box_hold(norm: Norm, dtype: torch.dtype) -> None:
    f, rounding = mlp(dtype), 4 * torch.finfo(dtype).eps
    y = torch.arange(64) % 4
    for seed, (low, high) in enumerate([(0.0, 1.0), (-2.1179, 2.64), (-0.3, -0.1), (1.3, 7.7)]):
        least, most = torch.tensor([low, high], dtype=dtype)
        x = least + (most - least) * torch.rand(64, 6, generator=gen(seed), dtype=F64).to(dtype)
        x[:2], x[2:4] = least, most
        x = x.clamp(least, most)
        for epsilon in (1e-3, 0.3, 5.0):
            attack = ProjectedAscent(epsilon, norm, steps=4, bounds=(low, high))
            for delta in (attack.perturb(f, x, y, gen()), attack.start(x, gen())):
                assert delta.shape == x.shape
                assert delta.dtype == dtype
                assert float(size(delta, norm).max()) <= epsilon * (1 + rounding)
                assert bool((x + delta >= least).all())  # exactly, also where high - x rounds up
                assert bool((x + delta <= most).all())


@pytest.mark.parametrize("norm", NORMS)
def test_starts_are_uniform_in_the_ball(norm: Norm) -> None:
    x, attack = torch.zeros(20000, 3, dtype=F64), ProjectedAscent(2.0, norm)
    start = attack.start(x, gen())
    share = (size(start, norm) / 2) ** 3  # of the volume inside: uniform in [0, 1]
    # five standard errors of means of 20000
    assert abs(float(share.mean()) - 1 / 2) < 5 * math.sqrt(1 / 12 / 20000)
    assert abs(float(share.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / 20000)
    assert float(start.mean(0).abs().max()) < 5 * 2 / math.sqrt(20000)


def test_radius_zero_is_no_perturbation() -> None:
    x = randn(3, 6)
    assert torch.equal(ProjectedAscent(0).perturb(mlp(), x, torch.zeros(3).long(), gen()), torch.zeros_like(x))


# Degenerate functions and shapes


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("objective", ["logits", "cross_entropy"])
def test_a_zero_gradient_does_not_move(norm: Norm, objective: Any) -> None:
    first = nn.Linear(6, 5)
    nn.init.constant_(first.bias, -1e3)
    dead = nn.Sequential(first, nn.ReLU(), nn.Linear(5, 3)).double()
    x, attack = randn(4, 6), ProjectedAscent(0.5, norm, objective=objective)
    delta = attack.perturb(dead, x, torch.zeros(4).long(), gen())
    assert torch.equal(delta, attack.start(x, gen()))


@pytest.mark.parametrize("shape", [(1, 6), (3, 1, 2, 3), (5,), (1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = randn(*shape, dtype=torch.float32)
    weight = randn(x[0].numel(), 3, dtype=torch.float32, seed=1)
    for norm, objective in itertools.product(NORMS, ("logits", "cross_entropy")):
        attack = ProjectedAscent(0.5, norm, objective=objective, restarts=2)
        delta = attack.perturb(lambda p: p.reshape(len(p), -1) @ weight, x, torch.zeros(len(x)).long(), gen())
        assert delta.shape == x.shape
        assert bool(delta.isfinite().all())


def test_one_sample_equals_its_batch() -> None:
    f, x, y = mlp(), randn(1, 6), torch.tensor([2])
    attack = ProjectedAscent(0.5)
    pair = attack.perturb(f, x.repeat(2, 1), y.repeat(2), gen())
    assert pair[0].shape == attack.perturb(f, x, y, gen())[0].shape
    assert not torch.equal(pair[0], pair[1])  # each sample has a start of its own


@pytest.mark.parametrize("labels", [0, 1])
def test_one_output_is_no_score_of_each_class(labels: int) -> None:
    f, x, y = fill(nn.Sequential(nn.Linear(6, 1)).double()), randn(5, 6), torch.full((5,), labels)
    calls: dict[str, Callable[[], Any]] = {
        "robust accuracy": lambda: robust_accuracy(f, x, y, [0.0, 0.1], gen()),
        "attack": lambda: ProjectedAscent(0.1).perturb(f, x, y, gen()),
        "curve": lambda: alignment_curve(f, x, y, x, [0.1], gen()),
    }
    for call in calls.values():
        with pytest.raises(UsageError, match=r"no score of each class: .* torch.cat\(\[0 \* z, z\], 1\)"):
            call()
    power = ProjectedAscent(0.1, objective="logits", step_size=1e9).perturb(f, x, None, gen())  # needs no classes
    w = f[0].weight.detach().expand(5, -1)
    assert torch.allclose(alignment(power, w), torch.ones(5, dtype=F64), rtol=0, atol=1e-9)  # of the long step


# What must stay as it was


def noisy() -> nn.Sequential:
    return fill(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_no_trace_is_left(training: bool, mode: Callable[[], Any]) -> None:
    f, x, y = noisy(), randn(10, 6).requires_grad_(), torch.zeros(10).long()
    f[1].eval()  # a mixed mode, to be brought back as it was
    before = {k: v.clone() for k, v in f.state_dict().items()}
    state, modes, seen = torch.get_rng_state(), [m.training for m in f.modules()], []
    f[3].register_forward_hook(lambda m, *_: seen.append(m.training))
    with mode():
        delta = ProjectedAscent(0.5, training=training).perturb(f, x, y, gen())
        again = ProjectedAscent(0.5, training=training).perturb(f, x.detach().clone(), y.clone(), gen())
    assert seen == [training] * 22
    assert torch.equal(delta, again)
    assert not delta.requires_grad
    assert modes == [m.training for m in f.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in f.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in f.parameters())
    assert x.requires_grad
    assert x.grad is None


def test_training_mode_normalizes_by_the_batch() -> None:
    f, x, y = noisy(), randn(10, 6), torch.zeros(10).long()
    f[3] = nn.Dropout(0.0)
    before = {k: v.clone() for k, v in f.state_dict().items()}
    attack = ProjectedAscent(0.5, training=True)
    by_batch = attack.perturb(f, x, y, gen())
    assert all(torch.equal(before[k], v) for k, v in f.state_dict().items())
    assert not torch.allclose(by_batch, replace(attack, training=False).perturb(f, x, y, gen()))
    f.eval()
    assert torch.equal(attack.perturb(f, x, y, gen()), replace(attack, training=False).perturb(f, x, y, gen()))


def test_frozen_parameters_and_generators() -> None:
    f, x, y = mlp().requires_grad_(False), randn(5, 6), torch.zeros(5).long()
    attack, g = ProjectedAscent(0.5), gen(3)
    first, second = attack.perturb(f, x, y, g), attack.perturb(f, x, y, g)
    assert not torch.equal(first, second)
    assert torch.equal(first, attack.perturb(f, x, y, gen(3)))
    assert not any(p.requires_grad for p in f.parameters())


# Curves


def test_curve_never_rises_and_starts_clean() -> None:
    f, x = mlp(), randn(120, 6)
    y = f(x).argmax(1)
    y[::5] = (y[::5] + 1) % 4
    radii = [0, 0.1, 0.3, 1.0, 3.0]
    curve = robust_accuracy(f, x, y, radii, gen(), batch=50)
    assert curve[0] == pytest.approx(0.8)
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.2
    assert curve[::-1] == robust_accuracy(f, x, y, radii[::-1], gen(), batch=50)
    (alone,) = robust_accuracy(f, x, y, [1.0], gen(1))
    assert abs(alone - curve[3]) < 0.05  # other starts


def test_alignment_by_hand() -> None:
    delta = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1e-30, 0.0], [1e30, 0.0]])
    v = torch.tensor([[1e20, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    got = alignment(delta.reshape(4, 1, 2), v)
    torch.testing.assert_close(got, torch.tensor([0.5**0.5, 0, 1, 0], dtype=F64), rtol=1e-15, atol=0)


def test_alignment_curve_of_linear_maps() -> None:
    a, x = linear_map(), randn(20, 20, seed=3)
    y, v = torch.arange(20) % 6, torch.linalg.svd(a)[2][0].expand(20, 20)
    attack = ProjectedAscent(0, steps=40, step_size=1e6)
    curve = alignment_curve(lambda p: p @ a.T, x, y, v, [0.01, 1.0], gen(), attack=attack, batch=8)
    assert list(curve) == ["logits", "cross_entropy"]
    assert min(curve["logits"]) > 1 - 1e-9  # (s_2 / s_1)^80 = 6e-6 is the sine of the angle
    assert max(curve["cross_entropy"]) < 0.9  # u is q - e_y there
    one = a[:1]  # a single row has one right singular vector, whatever u is
    curve = alignment_curve(
        lambda p: torch.cat([p @ one.T, 0 * p[:, :1]], 1), x, y % 2, one.expand(20, 20), [0.1], gen(), attack=attack
    )
    assert min(curve["logits"] + curve["cross_entropy"]) > 1 - 1e-12


def test_alignment_falls_with_the_radius() -> None:
    f, x = mlp(), randn(60, 6, seed=8)
    y = f(x).argmax(1)
    jacobians = torch.stack([torch.autograd.functional.jacobian(f, row) for row in x])  # pyright: ignore[reportCallIssue, reportArgumentType]
    v = torch.linalg.svd(jacobians)[2][:, 0]
    curve = alignment_curve(f, x, y, v, [1e-6, 3.0], gen(), attack=ProjectedAscent(0, steps=30, step_size=1e3))
    assert curve["logits"][0] > 0.99  # the theorem's regime: no kink within 1e-6, sixty steps of power method
    assert curve["logits"][1] < curve["logits"][0] - 0.02


# Misuse


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": math.nan}, "epsilon"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"norm": "l1"}, "'linf'"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": math.inf}, "step_size"),
        ({"objective": "margin"}, "objective"),
        ({"restarts": 0}, "restarts"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"bounds": (0.0, math.nan)}, "bounds"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ProjectedAscent(**{"epsilon": 1.0, **settings})


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(0, 6), torch.zeros(0).long(), "at least one entry"),
        (torch.zeros(2, 6).long(), torch.zeros(2).long(), "embedding"),
        (torch.zeros(2, 6), None, "labels"),
        (torch.zeros(2, 6), torch.tensor([0, 3]), "0..2"),
        (torch.zeros(2, 6), torch.tensor([0]), "shape"),
        (torch.full((2, 6), 1.5), torch.zeros(2).long(), "within bounds"),
    ],
)
def test_inputs_that_do_not_fit(x: Tensor, y: Tensor | None, words: str) -> None:
    attack = ProjectedAscent(1.0, bounds=(0.0, 1.0))
    with pytest.raises(UsageError, match=words):
        attack.perturb(nn.Linear(6, 3), x, y, gen())


def test_a_function_without_derivative_is_refused() -> None:
    model, x, y = nn.Linear(6, 3), torch.zeros(2, 6), torch.zeros(2).long()
    for f in (lambda p: model(p).detach(), lambda p: model(torch.zeros_like(p)), lambda p: model(p.round().detach())):
        with pytest.raises(UsageError, match="does not depend on x"):
            ProjectedAscent(1.0).perturb(f, x, y, gen())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(value: float) -> None:
    x, y = torch.zeros(2, 6), torch.zeros(2).long()
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight[1, 2] = value
    f = nn.Sequential(layer)
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        ProjectedAscent(1.0).perturb(f, x, y, gen())
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        robust_accuracy(f, x, y, [0.0], gen())
    x[0, 0] = value
    with pytest.raises(NonFiniteError, match="input x"):
        ProjectedAscent(1.0).perturb(nn.Linear(6, 3), x, y, gen())


def test_curves_that_cannot_be() -> None:
    f, x, y = mlp(), randn(4, 6), torch.zeros(4).long()
    with pytest.raises(UsageError, match="epsilons is empty"):
        robust_accuracy(f, x, y, [], gen())
    with pytest.raises(UsageError, match="epsilon must be finite"):
        robust_accuracy(f, x, y, [-1.0], gen())
    with pytest.raises(UsageError, match="batch"):
        robust_accuracy(f, x, y, [1.0], gen(), batch=0)
    with pytest.raises(UsageError, match="eval mode"):
        robust_accuracy(f, x, y, [1.0], gen(), attack=ProjectedAscent(0, training=True))
    with pytest.raises(UsageError, match="radius 0"):
        alignment_curve(f, x, y, x, [0.0, 1.0], gen())
    with pytest.raises(UsageError, match="as many samples"):
        alignment_curve(f, x, y, x[:3], [1.0], gen())
    with pytest.raises(UsageError, match="as many samples and entries"):
        alignment(x, x[:, :5])
    with pytest.raises(NonFiniteError, match="angle"):
        alignment(x, x * math.nan)
