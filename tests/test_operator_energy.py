"""D-SNR against the SVD, brute force and projected ascent; its gradient against differences of the norm itself."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from groundstate.attack import ProjectedAscent
from groundstate.energies import get, parse
from groundstate.energies.base import Estimate
from groundstate.energies.jacobian import JacobianSpectral
from groundstate.energies.operator_norm import DataDependentOperatorNorm
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.operator_norm import certified
from groundstate.regularizer import Regularizer

F64 = torch.float64
PAIRS = [(2, 2), (1, 2), (1, 1), (2, "inf"), ("inf", "inf"), ("inf", 1), ("inf", 2), (1.5, 3)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(*sizes: int, activation: type[nn.Module] = nn.Tanh, seed: int = 0, dtype: torch.dtype = F64) -> nn.Sequential:
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        modules += [nn.Linear(inputs, outputs, dtype=dtype), activation()]
    model = nn.Sequential(*modules[:-1])
    generator = seeded(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=F64).to(dtype) / p.shape[-1] ** 0.5
    return model


def points(count: int, inputs: int, seed: int = 5, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(count, inputs, generator=seeded(seed), dtype=F64).to(dtype)


class Opened(nn.Module):
    """The same function as ``model``, but no chain of layers: its Jacobian goes through autograd."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) + 0.0


def jacobians(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([torch.func.jacrev(lambda z: f(z[None])[0])(row) for row in x]).flatten(2)


def gradient(value: Tensor, model: nn.Module) -> Tensor:
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    pairs = zip(grads, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def energy(f: Any, x: Tensor, y: Tensor | None = None, *, seed: int = 1, **options: Any) -> Tensor:
    return DataDependentOperatorNorm(**{"samples": None, **options}).value(f, x, y, probe=seeded(seed))


def measured(f: Any, x: Tensor, y: Tensor | None = None, **options: Any) -> Estimate:
    return DataDependentOperatorNorm(**options).estimate(f, x, y, probe=seeded(1))


# ---------------------------------------------------------------------- values


def linear(a: Tensor, seed: int = 3) -> nn.Linear:
    layer = nn.Linear(a.shape[1], a.shape[0], dtype=a.dtype)
    layer.weight.data = a.clone()
    layer.bias.data = torch.randn(a.shape[0], generator=seeded(seed), dtype=a.dtype)
    return layer


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 2.0])
def test_linear_map_has_its_largest_singular_value(epsilon: float) -> None:
    a = torch.randn(6, 20, generator=seeded(1), dtype=F64)
    x = points(5, 20)
    value = energy(linear(a), x, epsilon=epsilon, iterations=60, squared=False)
    # 60 iterations leave 0.861^240; the difference quotient rounds by eps |f| / epsilon = 1e-12
    assert value.item() == pytest.approx(7.2493205, rel=1e-8)
    assert energy(linear(a), x, epsilon=epsilon, iterations=60).item() == pytest.approx(7.2493205**2, rel=1e-8)
    again = energy(linear(a, seed=4), 9 * x, epsilon=epsilon, iterations=60, squared=False)
    assert again.item() == pytest.approx(value.item(), rel=1e-8)


def test_the_error_falls_by_the_fourth_power_of_the_gap() -> None:
    a = torch.randn(6, 20, generator=seeded(1), dtype=F64)
    s = torch.linalg.svdvals(a)
    values = [energy(linear(a), points(50, 20), iterations=k, squared=False).item() for k in range(32)]
    assert all(value <= later for value, later in itertools.pairwise(values))
    # an error of 1e-7 follows the first order; it is known to 1e-15
    assert (s[0] - values[31]) / (s[0] - values[30]) == pytest.approx((s[1] / s[0]).item() ** 4, rel=1e-3)


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [("inf", 1, 19.75900666), ("inf", 2, 10.46596274), (1, 2, 2.89796562), ("inf", "inf", 9.86655749),
     (2, "inf", 3.51389836), (2, 2, 3.84146855)],
)  # fmt: skip
def test_known_norms_of_a_matrix(p: float | str, q: float | str, expected: float) -> None:
    a = torch.randn(4, 10, generator=seeded(2), dtype=F64)
    f = linear(a)
    if p == "inf" and q in (1, 2):  # by brute force: the maximum over a box is at a corner
        signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=10)), dtype=F64)
        assert float(torch.linalg.vector_norm(signs @ a.mT, q, dim=-1).max()) == pytest.approx(expected, rel=1e-8)
    found = measured(f, points(3, 10), p=p, q=q, squared=False)
    assert found.value == pytest.approx(expected, rel=1e-8)
    assert ("lower bound" in found.how) == (p == "inf" and q in (1, 2))
    # the best of many random starts finds the global maximum, and no start goes above it
    values = [energy(f, points(1, 10), p=p, q=q, squared=False, iterations=50, seed=s).item() for s in range(40)]
    assert max(values) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("wrap", [nn.Sequential, Opened])
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("samples", [1, 6])
def test_many_iterations_give_the_singular_value(wrap: Any, outputs: int, samples: int) -> None:
    model, x = wrap(net(7, 9, 8, outputs)), points(samples, 7)
    s1 = torch.linalg.svdvals(jacobians(model, x))[:, 0]
    # after 200 iterations the smallest gap here, s_2 / s_1 = 0.95, leaves 1e-18
    assert energy(model, x, iterations=200).item() == pytest.approx(s1.square().mean().item(), rel=1e-10)
    found = measured(model, x, squared=False)
    assert found.value == pytest.approx(s1.mean().item(), rel=1e-12)
    assert "bound" not in found.how
    if samples == 1:
        assert found.standard_error is None
    else:
        assert found.standard_error == pytest.approx(s1.std().item() / samples**0.5, rel=1e-9)


@pytest.mark.parametrize(("p", "q"), PAIRS)
@pytest.mark.parametrize("wrap", [nn.Sequential, Opened])
def test_training_never_exceeds_the_norm(wrap: Any, p: float | str, q: float | str) -> None:
    model, x = wrap(net(6, 10, 5, activation=nn.ReLU)), points(20, 6)
    found = measured(model, x, p=p, q=q)
    exact = certified(jacobians(model, x), float(p), float(q))
    assert ("lower bound" in found.how) == (exact is None)
    if exact is not None:
        assert found.value == pytest.approx(exact.square().mean().item(), rel=1e-12)
    values = [energy(model, x, p=p, q=q, iterations=k).item() for k in (0, 1, 3, 30)]
    assert all(
        a <= b * (1 + 1e-12) for a, b in itertools.pairwise([*values, found.value if exact is not None else 1e9])
    )
    assert values[-1] >= 0.7 * found.value  # a local maximum of some samples


@pytest.mark.parametrize(("on", "wrt"), [("probabilities", "input"), ("loss", "input"), ("2", "input"), ("4", "0")])
def test_outputs_and_inputs_of_choice(on: str, wrt: str) -> None:
    model, x, y = net(6, 7, 5, 4), points(5, 6), torch.tensor([0, 1, 2, 3, 0])
    parts = list(model)
    if wrt == "0":
        f, at = nn.Sequential(*parts[1:]), parts[0](x).detach()
    else:
        f, at = {"probabilities": nn.Sequential(model, nn.Softmax(-1)), "2": nn.Sequential(*parts[:3])}.get(on), x
    if f is None:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
        expected = g.norm(dim=-1)
    else:
        expected = torch.linalg.svdvals(jacobians(f, at))[:, 0]
    for wrapped in (model, Opened(model)) if on not in ("2", "4") else (model,):
        value = energy(wrapped, x, y, on=on, wrt=wrt, iterations=300, squared=False)
        assert value.item() == pytest.approx(expected.mean().item(), rel=1e-8)  # small gaps of the softmax


def test_a_convolutional_network_in_training_mode() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(12, 3)
    ).double()
    generator = seeded(7)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=F64)
    x = torch.randn(4, 1, 6, 6, generator=generator, dtype=F64)
    model.eval()
    expected = torch.linalg.svdvals(jacobians(model, x))[:, 0].square().mean().item()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert energy(model, x, iterations=100).item() == pytest.approx(expected, rel=1e-8)
    assert energy(model, x, iterations=100, epsilon=1e-6).item() == pytest.approx(expected, rel=1e-4)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("wrap", [nn.Sequential, Opened])
@pytest.mark.parametrize(("p", "q"), [(2, 2), (1, 2), (2, "inf"), ("inf", "inf"), (1.5, 3)])
@pytest.mark.parametrize("squared", [True, False])
def test_gradient_is_that_of_the_norm(wrap: Any, p: float | str, q: float | str, squared: bool) -> None:
    model, x = wrap(net(5, 8, 4)), points(3, 5)
    options: dict[str, Any] = {"p": p, "q": q, "squared": squared, "iterations": 300}
    g = gradient(energy(model, x, **options), model)
    direction = torch.randn(g.shape, generator=seeded(9), dtype=F64)
    values = []
    for step in (1e-5, -1e-5):
        start = 0
        moved = wrap(net(5, 8, 4))
        for w in moved.parameters():
            w.data += step * direction[start : start + w.numel()].view_as(w)
            start += w.numel()
        values.append(energy(moved, x, **options).item())
    # central differences err by h^2 and eps / h, both about 1e-10
    assert float(g @ direction) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_gradient_equals_that_of_the_exact_energy() -> None:
    model, x = net(6, 9, 4, activation=nn.ReLU), points(8, 6)
    exact = JacobianSpectral(samples=None).value(model, x, probe=seeded(1))
    found = energy(model, x, iterations=300, squared=False)
    expected, g = gradient(exact, model), gradient(found, model)
    # both are the gradient of the same piece: the direction v has converged to the root of the rounding or better
    assert float((g - expected).norm() / expected.norm()) < 1e-7


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.LeakyReLU])
@pytest.mark.parametrize(("p", "q", "epsilon"), [(2, 2, 0.0), ("inf", 2, 0.0), (2, 1, 0.1), (1.5, 3, 0.1)])
def test_products_of_a_chain_agree_with_autograd(
    activation: type[nn.Module], p: float | str, q: float | str, epsilon: float
) -> None:
    model, x = net(6, 9, 7, 4, activation=activation), points(8, 6)
    options: dict[str, Any] = {"p": p, "q": q, "epsilon": epsilon, "iterations": 3, "samples": 5}
    a, b = energy(model, x, **options), energy(Opened(model), x, **options)
    assert a.item() == pytest.approx(b.item(), rel=1e-12)
    assert torch.allclose(gradient(a, model), gradient(b, model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrap", [nn.Sequential, Opened])
@pytest.mark.parametrize(("p", "q"), [(2, 2), ("inf", 1), (1, 2)])
def test_short_lengths_give_the_jacobian(wrap: Any, p: float | str, q: float | str) -> None:
    model, x = wrap(net(6, 9, 4)), points(8, 6)
    a = energy(model, x, p=p, q=q, iterations=3)
    b = energy(model, x, p=p, q=q, iterations=3, epsilon=1e-6)
    assert a.item() == pytest.approx(b.item(), rel=1e-5)  # O(epsilon)
    assert torch.allclose(gradient(a, model), gradient(b, model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("p", "norm", "epsilon"), [(2, "l2", 1.0), ("inf", "linf", 0.1)])
def test_a_length_makes_it_projected_ascent(p: float | str, norm: Any, epsilon: float) -> None:
    model, x = net(6, 9, 4), points(1, 6)
    attack = ProjectedAscent(epsilon, norm=norm, steps=80, step_size=1e6, objective="logits", restarts=12)
    delta = attack.perturb(model, x, None, seeded(2))
    expected = ((model(x + delta) - model(x)).norm() / epsilon).item()
    options: dict[str, Any] = {"p": p, "epsilon": epsilon, "squared": False, "iterations": 80}
    found = max(energy(model, x, seed=s, **options).item() for s in range(8))
    assert found == pytest.approx(expected, rel=1e-9)  # both at the best of the local maxima, converged
    best = measured(model, x, **options)
    assert best.value <= expected * (1 + 1e-9)
    assert best.value >= 0.9 * expected
    assert "projected ascent" in best.how
    assert "lower bound" in best.how


# ---------------------------------------------------------------------- hard inputs


@pytest.mark.parametrize("epsilon", [0.0, 0.5])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("wrap", [nn.Sequential, Opened])
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_a_zero_network(epsilon: float, squared: bool, wrap: Any, p: Any, q: Any) -> None:
    model = wrap(net(4, 5, 3, activation=nn.ReLU))
    for w in model.parameters():
        w.data.zero_()
    x = points(3, 4)
    value = energy(model, x, epsilon=epsilon, squared=squared, p=p, q=q)
    assert value.item() == 0
    assert not gradient(value, model).any()
    assert measured(model, x, epsilon=epsilon, squared=squared, p=p, q=q).value == 0


def test_a_length_reaches_beyond_a_flat_piece() -> None:
    def f(z: Tensor) -> Tensor:
        return torch.relu(z.sum(-1, keepdim=True) - 1)

    x = torch.zeros(40, 3, dtype=F64)  # flat up to a distance of 1 / sqrt(3)
    assert energy(f, x).item() == 0
    found = energy(f, x, epsilon=2.0, squared=False, iterations=1)
    # a start on the right side climbs to the top (2 sqrt(3) - 1) / 2; the flat rest, at most 3 of 4, stays
    assert 0.25 * (2 * 3**0.5 - 1) / 2 < found.item() < (2 * 3**0.5 - 1) / 2


@pytest.mark.parametrize("scale", [1e18, 1e-18])
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_scales(scale: float, p: Any, q: Any) -> None:
    model, x = net(5, 6, 3, dtype=torch.float32), points(4, 5, dtype=torch.float32)
    a = energy(model, x, p=p, q=q, squared=False).item()
    cast(nn.Linear, model[2]).weight.data *= scale
    value = energy(model, x, p=p, q=q, squared=False)
    assert value.item() == pytest.approx(scale * a, rel=1e-5)  # float32
    assert gradient(value, model).isfinite().all()


def test_half_precision() -> None:
    model, x = net(5, 6, 3, dtype=torch.bfloat16), points(4, 5, dtype=torch.bfloat16)
    wide = net(5, 6, 3)
    value = energy(model, x)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(energy(wide, x.double()).item(), rel=0.05)  # some eps = 2^-8
    assert gradient(value, model).isfinite().all()


def test_overflow_and_what_is_not_finite_are_named() -> None:
    model, x = net(5, 6, 3, dtype=torch.float32), points(4, 5, dtype=torch.float32)
    cast(nn.Linear, model[2]).weight.data *= 1e25
    with pytest.raises(NonFiniteError, match="overflows"):
        energy(model, x)
    for wrap in (nn.Sequential, Opened):
        for p, q, epsilon in ((2, 2, 0.0), ("inf", 1, 0.0), (1.5, 3, 0.1)):
            bad = wrap(net(5, 6, 3))
            list(bad.parameters())[2].data[0, 0] = math.nan
            for run in (energy, measured):
                with pytest.raises(NonFiniteError, match=r"2\.weight' has NaN"):
                    run(bad, points(4, 5), p=p, q=q, epsilon=epsilon)
    with pytest.raises(NonFiniteError, match="input x has NaN"):
        energy(net(5, 6, 3), torch.full((2, 5), math.inf, dtype=F64))


def test_misuse_is_refused() -> None:
    model, x = net(4, 3), points(3, 4)
    for options in (
        {"p": 0.5}, {"q": "two"}, {"p": True}, {"p": math.nan}, {"iterations": -1}, {"iterations": 1.5},
        {"epsilon": -1.0}, {"epsilon": math.inf}, {"squared": 1}, {"samples": 0}, {"on": ""}, {"wrt": None},
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"^{next(iter(options))} must be"):
            DataDependentOperatorNorm(**options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="batch is empty"):
        energy(model, x[:0])
    with pytest.raises(UsageError, match="has no derivative"):
        energy(model, x.long())
    with pytest.raises(UsageError, match="needs the labels"):
        energy(model, x, on="loss")
    with pytest.raises(UsageError, match="below the rounding of the inputs"):
        energy(model, x + 10, epsilon=1e-17)
    with pytest.warns(UserWarning, match="close to rounding"):
        energy(model, x, epsilon=1e-14)


class Cube(torch.autograd.Function):
    """x^3 without a second derivative, with forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * outputs[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * tangents[0]


class Opaque(torch.autograd.Function):
    """x^3 whose gradient pretends not to depend on what came in, without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return (3 * ctx.saved_tensors[0] ** 2 * outputs[0]).detach()


class Cubic(nn.Module):
    def __init__(self, cube: type[torch.autograd.Function] | None) -> None:
        super().__init__()
        self.a, self.b, self.skip = (linear(points(*shape, seed=4) / 3) for shape in ((6, 5), (4, 6), (4, 5)))
        self.cube = cube

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h**3 if self.cube is None else self.cube.apply(h)) + self.skip(x)


@pytest.mark.parametrize(("cube", "fallback"), [(Cube, "jvp"), (Opaque, "differences")])
def test_networks_without_a_second_derivative(cube: Any, fallback: str) -> None:
    plain, hard, x = Cubic(None), Cubic(cube), points(4, 5)
    rel = 1e-12 if fallback == "jvp" else 1e-6  # the step of differences is sqrt(eps) of the inputs
    for p, q in ((2, 2), ("inf", 1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = energy(hard, x, p=p, q=q, iterations=20).item()
            assert measured(hard, x, p="inf", q=1).value == pytest.approx(
                measured(plain, x, p="inf", q=1).value, rel=rel
            )
        assert found == pytest.approx(energy(plain, x, p=p, q=q, iterations=20).item(), rel=rel)


def test_a_length_has_its_gradient_without_a_second_derivative() -> None:
    plain, hard, x = Cubic(None), Cubic(Opaque), points(4, 5)
    options: dict[str, Any] = {"iterations": 5, "epsilon": 0.5}
    a, b = energy(plain, x, **options), energy(hard, x, **options)
    assert a.item() == pytest.approx(b.item(), rel=1e-12)
    assert torch.allclose(gradient(a, plain), gradient(b, hard), rtol=1e-10, atol=1e-10)


class Once(torch.autograd.Function):
    """The gradient of x^3, which refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, upstream: Tensor) -> Tensor:
        return 3 * x**2 * upstream

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        raise RuntimeError("no second derivative")


class CubeOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return Once.apply(*ctx.saved_tensors, *outputs)


def test_differences_are_the_last_resort() -> None:
    plain, hard, x = Cubic(None), Cubic(CubeOnce), points(4, 5)
    expected = energy(plain, x, iterations=20)
    with pytest.warns(UserWarning, match="finite differences are used"):
        found = energy(hard, x, iterations=20)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)  # a step of sqrt(eps)
    assert torch.allclose(gradient(found, hard), gradient(expected, plain), rtol=1e-5, atol=1e-4)


def test_a_function_and_its_negative_are_alike() -> None:
    x = points(8, 6)
    values = []
    for sign in (1.0, -1.0):
        model = net(6, 9, 4, activation=nn.ReLU)
        for p in model[2].parameters():
            p.data *= sign
        values.append(energy(model, x, epsilon=1.0).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


# ---------------------------------------------------------------------- manners


@pytest.mark.parametrize("wrap", [nn.Sequential, Opened])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_nothing_of_the_caller_changes(wrap: Any, epsilon: float) -> None:
    model, x = wrap(net(4, 5, 3), nn.Dropout()) if wrap is nn.Sequential else wrap(net(4, 5, 3)), points(9, 4)
    x.requires_grad_()
    frozen_weight = next(iter(model.parameters())).requires_grad_(False)
    state = torch.get_rng_state()
    value = energy(model, x, epsilon=epsilon, samples=4)
    value.backward()
    measured(model, x, epsilon=epsilon, p="inf", q=2)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert x.requires_grad
    assert x.grad is None
    assert frozen_weight.grad is None
    assert not frozen_weight.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            inside = energy(model, x, epsilon=epsilon, samples=4)
        assert not inside.requires_grad
        assert inside.item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_the_generator_decides(epsilon: float) -> None:
    model, x = net(6, 7, 4), points(50, 6)
    first, again, other = (energy(model, x, epsilon=epsilon, samples=5, seed=s).item() for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_batch_is_the_mean_of_its_samples() -> None:
    model, x = Opened(net(6, 7, 4)), points(6, 6)
    whole = energy(model, x, iterations=200).item()
    singles = [energy(model, row[None], iterations=200).item() for row in x]
    assert whole == pytest.approx(sum(singles) / 6, rel=1e-9)


def test_many_outputs_are_measured_by_the_power_method() -> None:
    x = points(3, 300)
    a = points(280, 300, seed=8)
    a = a + 5 * torch.ones_like(a)  # a gap of more than 10
    found = measured(linear(a), x, squared=False)
    assert found.how == "power method, 20 iterations: a lower bound"
    assert found.value == pytest.approx(torch.linalg.matrix_norm(a, 2).item(), rel=1e-12)


def test_it_is_a_term_of_the_loss() -> None:
    model = net(6, 7, 4, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reg = Regularizer(model, parse("0.1*d_snr")).attach(optimizer)
    x = points(64, 6, dtype=torch.float32)
    before = measured(model, x).value
    for _ in range(100):
        optimizer.zero_grad()
        reg.loss(x).backward()
        optimizer.step()
    assert measured(model, x).value < 0.5 * before


@pytest.mark.parametrize("p", [math.inf, "inf", float("inf")])
def test_its_text_parses_back(p: float | str) -> None:
    made = DataDependentOperatorNorm(p=p, q=1, squared=False)
    assert repr(made) == "data_dependent_operator_norm(p='inf', q=1.0, squared=False)"
    (term,) = parse(repr(made)).terms
    assert term.energy == made
    assert get("d_snr") is DataDependentOperatorNorm
    assert (made.traits.degree, DataDependentOperatorNorm().traits.degree) == (1.0, 2.0)
