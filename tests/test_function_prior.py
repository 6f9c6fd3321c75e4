"""The function-space prior against torch's multivariate normal, its limits, and what it must leave alone."""

from __future__ import annotations

import copy
import gc
import math
import statistics
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groundstate as gs
from groundstate.energies.function_prior import (
    FunctionSpacePrior,
    augmented_images,
    penultimate_features,
    set_context,
    set_prior,
)
from groundstate.errors import NonFiniteError, UsageError

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=F64).to(dtype)


def mlp(sizes: tuple[int, ...] = (6, 8, 3), seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Flatten()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for fan_in, fan_out in pairwise(sizes):
            parts += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).to(dtype)


def covariance(phi: Tensor, c: float, d: float) -> Tensor:
    return c * (phi @ phi.mT + 1) + d * torch.eye(len(phi), dtype=phi.dtype)


def reference(f: Tensor, phi: Tensor, c: float, d: float) -> Tensor:
    """-sum_k log N(f_k; 0, K) by torch.distributions."""
    normal = torch.distributions.MultivariateNormal(f.new_zeros(len(f)), covariance(phi, c, d))
    return -normal.log_prob(f.mT).sum()


def recorded(energy: FunctionSpacePrior, model: nn.Module, x: Tensor, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """The value, and the batches that the model saw."""
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    value = energy.value(model, x, probe=seeded(seed))
    handle.remove()
    return value, seen


@pytest.mark.parametrize("points", ["joint", "context"])
@pytest.mark.parametrize("context", ["augment", "noise"])
def test_value_and_gradient_are_those_of_the_definition(points: Any, context: Any) -> None:
    model, prior, x = mlp(dtype=F64), mlp(seed=1, dtype=F64), draw(30, 5, 6)
    set_prior(model, prior)
    scales = FunctionSpacePrior(c=0.5, d=0.3, v=2.0, points=points, context=context, context_size=None)
    paper = replace(scales, scaling="paper", train_size=700)
    value, (at,) = recorded(paper, model, x)
    assert len(at) == (10 if points == "joint" else 5)
    assert points == "context" or torch.equal(at[:5], x)
    density = reference(model(at), prior[:-1](at).detach(), 0.5, 0.3)
    squares = torch.stack([p.square().sum() for p in model.parameters()]).sum()
    expected = (density + squares / 4) / 700
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-11)
    normalized = scales.value(model, x, probe=seeded())  # the same probe: the same points
    for mine, factor in ((value, 1.0), (normalized, len(at) * 3 / 700)):  # s = N C / train_size
        grads = torch.autograd.grad(factor * mine, list(model.parameters()))
        wanted = torch.autograd.grad(expected, list(model.parameters()), retain_graph=True)
        for a, b in zip(grads, wanted):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)  # condition number below 1e3


def test_without_covariance_the_squared_logits_are_left() -> None:
    model, x = mlp(), draw(31, 4, 6, dtype=torch.float32)
    value, (at,) = recorded(FunctionSpacePrior(c=0.0, d=2.0), model, x)
    assert float(value.detach()) == pytest.approx(float(model(at).detach().square().mean()) / 4, rel=1e-5)


def test_normalized_strength_does_not_depend_on_the_sizes() -> None:
    model, x = mlp((64, 16, 10)), torch.rand(64, 64, generator=seeded(32))
    whole = FunctionSpacePrior(context="noise", context_size=None)
    for energy in (whole, replace(whole, points="joint")):
        usual = float(energy.value(model, x, probe=seeded()).detach())
        others = [
            energy.value(model, torch.cat([x] * 4), probe=seeded()),
            energy.value(model, x[:16], probe=seeded()),
            replace(energy, context_size=16).value(model, x, probe=seeded()),
        ]
        for other in others:  # of more points more is explained, so only the order of magnitude is kept
            assert 0.3 < float(other.detach()) / usual < 3
    paper = FunctionSpacePrior(points="joint", context_size=None, scaling="paper", train_size=1000)
    small, large = (float(paper.value(model, t, probe=seeded()).detach()) for t in (x, torch.cat([x] * 4)))
    assert large > 3 * small


def test_the_prior_network_is_made_once_frozen_and_the_same_for_equal_architectures() -> None:
    x, energy = draw(33, 4, 6, dtype=torch.float32), FunctionSpacePrior()
    one, two = mlp(seed=1), mlp(seed=2)
    two.load_state_dict(one.state_dict())
    first = energy.value(one, x, probe=seeded())
    assert torch.equal(first, energy.value(two, x, probe=seeded()))
    with torch.no_grad():  # training moves the model, not its prior network
        for p in one.parameters():
            p.add_(1.0)
    energy.value(one, x, probe=seeded()).backward()
    one.load_state_dict(two.state_dict())
    assert torch.equal(first, energy.value(one, x, probe=seeded()))
    assert not torch.equal(first, FunctionSpacePrior(prior_seed=1).value(one, x, probe=seeded()))
    set_prior(one, mlp(seed=5))
    assert not torch.equal(first, energy.value(one, x, probe=seeded()))
    set_prior(one, None)
    assert torch.equal(first, energy.value(one, x, probe=seeded()))


def test_the_default_prior_has_the_features_of_its_network() -> None:
    x, energy = draw(46, 4, 6), FunctionSpacePrior(c=1.0, prior_seed=3)
    for model in (mlp(dtype=F64), nn.Sequential(nn.Sequential(*mlp(dtype=F64)))):  # the second is run with hooks
        prior = copy.deepcopy(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for module in reversed(list(prior.modules())):
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
        made = energy.value(model, x, probe=seeded())
        set_prior(model, prior)
        assert torch.allclose(made, energy.value(model, x, probe=seeded()), rtol=1e-12)  # the seed draws in float32


def test_estimates() -> None:
    model, x = mlp((64, 16, 4)), torch.rand(200, 64, generator=seeded(47))
    energy = FunctionSpacePrior(context_size=20)
    found = energy.estimate(model, x, probe=seeded())
    assert found.samples == 200
    assert found.how == "contexts drawn: 10, without log det K and other constants"
    many = [float(energy.value(model, x, probe=seeded(k)).detach()) for k in range(60)]
    mean, deviation = statistics.fmean(many), statistics.stdev(many)
    assert found.standard_error is not None
    assert 0.4 < found.standard_error / (deviation / 10**0.5) < 1.9  # 9 degrees of freedom: within 1 in 1000
    assert abs(found.value - mean) < 5 * deviation / 10**0.5
    for other in (FunctionSpacePrior(points="joint"), FunctionSpacePrior(context_size=None)):
        assert other.estimate(model, x, probe=seeded()).standard_error is None
    assert energy.estimate(model, x[:39], probe=seeded()).standard_error is None
    with pytest.raises(UsageError, match="at least one sample"):
        energy.estimate(model, x[:0], probe=seeded())


def test_models_can_be_collected() -> None:
    def use() -> weakref.ref[nn.Module]:
        model = mlp()
        model.register_forward_hook(lambda *_: model and None)  # refers to the model
        set_context(model, torch.zeros(3, 6))
        FunctionSpacePrior(context="user").value(model, torch.ones(2, 6), probe=seeded())
        return weakref.ref(model)

    state = torch.get_rng_state()
    alive = use()
    gc.collect()
    assert alive() is None
    assert torch.equal(state, torch.get_rng_state())  # the default prior is drawn from a seed of its own


def test_penultimate_features() -> None:
    model, x = mlp(), draw(34, 4, 6, dtype=torch.float32)
    assert torch.equal(penultimate_features(model, x), model[:-1](x))
    conv = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(4, 1, 5, 5, generator=seeded(35))
    assert torch.equal(penultimate_features(conv, images), conv[:2](images).flatten(1))
    linear = nn.Linear(6, 2)
    assert torch.equal(penultimate_features(linear, x), x)
    with pytest.raises(UsageError, match="no penultimate features"):
        penultimate_features(nn.Sequential(nn.Flatten(), nn.ReLU()), x)
    with pytest.raises(UsageError, match="one row per point"):
        penultimate_features(nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.Linear(3, 2), Fold()), x)


class Fold(nn.Module):
    def forward(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows) // 2, -1)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.ones(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.head


@pytest.mark.parametrize(
    ("make", "name"),
    [(Own, "head"), (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 2)), "original0")],
)
def test_modules_without_reset_need_a_prior(make: Callable[[], nn.Module], name: str) -> None:
    model, x = make(), torch.ones(3, 6)
    with pytest.raises(UsageError, match=rf"{name}' of .* is not set by any reset_parameters.*set_prior"):
        FunctionSpacePrior().value(model, x, probe=seeded())
    assert bool(FunctionSpacePrior(c=0.0).value(model, x, probe=seeded()).isfinite())
    set_prior(model, mlp())
    assert bool(FunctionSpacePrior().value(model, x, probe=seeded()).isfinite())


def test_priors_that_share_weights_are_refused() -> None:
    model = mlp()
    for bad in (model, nn.Sequential(*model)):
        with pytest.raises(UsageError, match=r"shares '1.weight'"):
            set_prior(model, bad)
    with pytest.raises(UsageError, match="torch module"):
        set_prior(model, lambda x: x)  # pyright: ignore[reportArgumentType]


def test_batch_normalization_and_dropout() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    value = FunctionSpacePrior().value(model, draw(36, 5, 6, dtype=torch.float32), probe=seeded())
    assert value.requires_grad
    assert torch.equal(value, FunctionSpacePrior().value(model, draw(36, 5, 6, dtype=torch.float32), probe=seeded()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("energy", [*FunctionSpacePrior.examples(), FunctionSpacePrior(context="user")], ids=repr)
def test_nothing_is_touched(energy: FunctionSpacePrior) -> None:
    model, x = mlp(), draw(37, 5, 6, dtype=torch.float32).requires_grad_()
    given = mlp(seed=3)
    set_prior(model, given)
    set_context(model, lambda batch, generator: batch + torch.rand(batch.shape, generator=generator))
    weights, kept, state = x.detach().clone(), copy.deepcopy(given.state_dict()), torch.get_rng_state()
    first, again = (energy.value(model, x, probe=seeded(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in (x, *model.parameters(), *given.parameters()))
    assert torch.equal(weights, x.detach())
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), given.state_dict().values()))
    assert all(m.training for m in (model, given))
    assert not torch.equal(first, energy.value(model, x, probe=seeded(5)))  # another context
    with torch.no_grad():
        assert not energy.value(model, x, probe=seeded(4)).requires_grad
    with torch.inference_mode():
        assert torch.equal(first, energy.value(model, x, probe=seeded(4)))


@pytest.mark.parametrize("shape", [(9, 1, 28, 28), (6, 3, 8, 12), (5, 64), (1, 1, 4, 4)])
def test_augmented_images_stay_images(shape: tuple[int, ...]) -> None:
    model, x = mlp((math.prod(shape[1:]), 8, 3)), torch.rand(shape, generator=seeded(38)) * 3 - 1
    _, (at,) = recorded(FunctionSpacePrior(context_size=5), model, x)
    assert at.shape == (min(5, shape[0]), *shape[1:])
    assert float(x.min()) <= float(at.min())
    assert float(at.max()) <= float(x.max())
    assert all(not torch.equal(image, other) for image in at for other in x)


def test_augmentation_never_inverts() -> None:
    ramp = torch.linspace(0, 1, 16).repeat(16, 1).T.expand(50, 1, 16, 16)  # each row brighter: flips cannot hide it
    generator, shifts = seeded(39), set()
    for _ in range(200):
        made = augmented_images(ramp, generator)
        steps = made.mean((1, 3)).diff(dim=1)
        falls = steps < -1e-6  # rounding of the mean of 16 equal numbers
        assert int(falls.sum()) <= 50  # only where the last row meets the first, once in each image
        shifts.add(int(falls[0].nonzero()[0]) if bool(falls.any()) else -1)
    assert len(shifts) == 5  # a side of 16 moves by -2 to 2
    constant = augmented_images(torch.full((4, 1, 9, 9), 0.3), seeded(40))
    assert torch.allclose(constant, torch.full_like(constant, 0.3))  # range 0: clamped to it


def test_rows_that_are_no_images_are_permuted_by_feature() -> None:
    x = torch.arange(40.0).reshape(10, 4) * 1000
    _, (at,) = recorded(FunctionSpacePrior(points="context"), mlp((4, 5, 2)), x)
    spread = x.std(0, correction=0)
    assert bool((at != x).any())
    nearest = (at[:, None] - x[None]).abs().amin(1)  # each entry comes from its own column
    assert bool((nearest < 0.6 * spread).all())  # six deviations of the noise


def test_noise_lies_in_the_range_of_the_batch() -> None:
    x = draw(41, 7, 6, dtype=torch.float32)
    _, (at,) = recorded(FunctionSpacePrior(context="noise", points="context", context_size=200), mlp(), x)
    assert at.shape == (200, 6)
    assert float(x.min()) <= float(at.min()) < float(x.min()) + 0.1
    assert float(x.max()) - 0.1 < float(at.max()) <= float(x.max())


def test_contexts_of_the_user() -> None:
    model, x, own = mlp(), draw(42, 3, 6, dtype=torch.float32), draw(43, 20, 6)
    energy = FunctionSpacePrior(context="user", points="context", context_size=8)
    with pytest.raises(UsageError, match="call set_context"):
        energy.value(model, x, probe=seeded())
    set_context(model, own)  # float64: brought to the dtype of the model
    _, (at,) = recorded(energy, model, x)
    assert len(at) == 8
    assert all(any(torch.equal(row, point.float()) for point in own) for row in at)
    set_context(model, lambda batch, _generator: batch * 2)
    _, (at,) = recorded(energy, model, x)
    assert torch.equal(at, x * 2)
    for bad in (torch.ones(8, 5), torch.ones(0, 6), None):
        set_context(model, lambda _batch, _generator, bad=bad: bad)  # pyright: ignore[reportArgumentType]
        with pytest.raises(UsageError, match="the context must be"):
            energy.value(model, x, probe=seeded())
    for wrong, got in ((torch.ones(0, 6), r"shape \(0, 6\)"), (3, "int")):
        with pytest.raises(UsageError, match=f"a function or at least one point, got .*{got}"):
            set_context(model, wrong)  # pyright: ignore[reportArgumentType]


def test_nonfinite_inputs_and_weights_are_named() -> None:
    model, x, energy = mlp(), torch.ones(3, 6), FunctionSpacePrior()
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[1, 2] = bad
        with pytest.raises(NonFiniteError, match=r"the input x of shape \(3, 6\) has 1 NaN"):
            energy.value(model, broken, probe=seeded())
        set_context(model, broken)
        with pytest.raises(NonFiniteError, match="the context of shape"):
            FunctionSpacePrior(context="user", context_size=50).value(model, x, probe=seeded())
    with torch.no_grad():
        model.get_parameter("3.bias")[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"'3.bias' has NaN"):
        energy.value(model, x, probe=seeded())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = mlp((64, 8, 3), dtype=dtype)
    for energy in FunctionSpacePrior.examples():
        value = energy.value(model, torch.rand(4, 64, generator=seeded(44)), probe=seeded())
        assert value.dtype == (F64 if dtype == F64 else torch.float32)
        grads = torch.autograd.grad(value, list(model.parameters()))
        assert all(g.dtype == dtype and bool(g.isfinite().all()) for g in grads)


def test_bad_batches() -> None:
    model = mlp()
    for x, message in ((torch.ones(0, 6), "one sample"), (torch.tensor(1.0), "one sample"), ([1.0], "got list")):
        with pytest.raises(UsageError, match=message):
            FunctionSpacePrior().value(model, x, probe=seeded())  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match=r"torch\.Generator"):
        FunctionSpacePrior().value(model, torch.ones(3, 6), probe=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="torch module"):
        FunctionSpacePrior().value(lambda x: x, torch.ones(3, 6), probe=seeded())
    with pytest.raises(UsageError, match="no parameters"):
        FunctionSpacePrior().value(nn.ReLU(), torch.ones(3, 6), probe=seeded())


def test_bad_options() -> None:
    bad: list[tuple[str, Any, str]] = [
        *(("c", value, "c scales") for value in (-0.1, math.nan)),
        *(("d", value, "d is a variance") for value in (0.0, "1")),
        ("v", 0.0, "v is a variance"),
        *(("scaling", "mean", "normalized, paper"), ("scaling", "paper", "go together")),
        ("context", "solarize", "augment, noise, user"),
        ("points", "batch", "joint, context"),
        *(("context_size", value, "context_size must be") for value in (0, 2.5)),
        *(("train_size", 100, "go together"), ("train_size", 0, "train_size must be")),
        ("prior_seed", True, "prior_seed must be"),
    ]
    for name, value, message in bad:
        with pytest.raises(UsageError, match=message):
            FunctionSpacePrior(**{name: value})


def test_in_a_regularizer_it_makes_the_context_uncertain() -> None:
    """Cross-entropy fits the data in both runs; at the context only the prior asks for small logits."""
    generator = seeded(45)
    x = torch.randn(64, 6, generator=generator)
    y = (x[:, 0] > 0).long()
    away = 4 * torch.randn(200, 6, generator=generator)
    sizes = []
    for strength in (0.0, 1.0):
        model = mlp((6, 32, 2))
        set_context(model, away)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        energy = FunctionSpacePrior(c=0.0, context="user", context_size=None)
        reg = gs.Regularizer(model, strength * energy).attach(optimizer)
        for _ in range(150):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y) + reg.loss(x, y)
            loss.backward()
            optimizer.step()
        sizes.append(float(model(away).detach().square().mean()))
        assert float((model(x).argmax(1) == y).float().mean()) > 0.9
    assert sizes[1] < 0.2 * sizes[0]
