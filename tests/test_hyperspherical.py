"""Hyperspherical energies on networks: which neurons, which layers, which projections, and what training keeps."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundstate import Regularizer
from groundstate.energies import (
    CompressiveHypersphericalEnergy,
    FeatureHypersphericalEnergy,
    GramDeterminant,
    HypersphericalEnergy,
    MinimumAngle,
    SoftOrthogonality,
    SpectralIsometry,
    Uniformity,
)
from groundstate.errors import NonFiniteError, UsageError

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_pairs(w: Tensor, s: float, half_space: bool = False) -> float:
    """The definition, pair by pair."""
    points = [x / x.norm() for x in w]
    if half_space:
        points += [-p for p in points]
    energies = [
        -math.log(float((a - b).norm())) if s == 0 else float((a - b).norm()) ** -s for a, b in combinations(points, 2)
    ]
    return sum(energies) / len(energies)


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("half_space", [False, True])
def test_the_definition(s: float, half_space: bool) -> None:
    w = normal(7, 5, seed=1)
    value = HypersphericalEnergy(s=s, half_space=half_space).value(w)
    assert float(value) == pytest.approx(by_pairs(w, s, half_space), rel=1e-12)  # rounding of float64


def test_neurons_of_a_network() -> None:
    """Filters of a grouped convolution by group, output channels of a transposed one, rows of a linear layer."""
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 5, 2), nn.Flatten(), nn.Linear(20, 4), nn.Linear(4, 3)
    ).double()
    found = Regularizer(model, "mhe(s=2)").block_values()["mhe(s=2)"]
    conv, transposed = model[0].weight.detach(), model[1].weight.detach()
    by_group = sum(by_pairs(g.flatten(1), 2.0) for g in conv.chunk(2))
    assert found["0.weight"] == pytest.approx(by_group, rel=1e-12)
    assert found["1.weight"] == pytest.approx(by_pairs(transposed.transpose(0, 1).flatten(1), 2.0), rel=1e-12)
    assert found["3.weight"] == pytest.approx(by_pairs(model[3].weight.detach(), 2.0), rel=1e-12)


def test_the_output_layer_is_always_in_full_space() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    reg = Regularizer(model, "mhe(s=1, half_space=True)")
    (found,) = reg.block_values().values()
    assert found["0.weight"] == pytest.approx(by_pairs(model[0].weight.detach(), 1.0, True), rel=1e-12)
    assert found["2.weight"] == pytest.approx(by_pairs(model[2].weight.detach(), 1.0, False), rel=1e-12)


def test_weights_with_one_neuron_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
    assert list(Regularizer(model, "mhe").block_values()["mhe"]) == ["0.weight"]
    with pytest.raises(UsageError, match="at least 2 x 2"):
        Regularizer(nn.Linear(4, 1), "mhe")


def test_zero_neurons_are_left_out_and_stay() -> None:
    w = normal(5, 4)
    w[2] = 0
    value, grad = HypersphericalEnergy(s=1).value_and_grad(w)
    kept = w[[0, 1, 3, 4]]
    assert float(value) == pytest.approx(by_pairs(kept, 1.0), rel=1e-12)
    assert not grad[2].any()
    assert grad[0].any()
    for too_few in (torch.zeros(3, 4), torch.ones(1, 4)):
        nothing, grad = HypersphericalEnergy().value_and_grad(too_few)
        assert float(nothing) == 0.0
        assert not grad.any()


def test_gradients_are_orthogonal_to_their_neurons() -> None:
    w = normal(6, 5)
    for energy in (HypersphericalEnergy(s=0), CompressiveHypersphericalEnergy(dimensions=3, count=2), MinimumAngle(),
                   Uniformity(), GramDeterminant()):  # fmt: skip
        grad = energy.value_and_grad(w)[1]
        assert float((grad * w).sum(-1).abs().max()) <= 1e-10 * float(grad.abs().max()), energy  # invariance to scale


def test_simplex_is_the_ground_state() -> None:
    """Centered unit vectors of equal angles attain the floor: no gap, no gradient."""
    simplex = torch.eye(5, dtype=torch.float64) - 0.2
    energy = HypersphericalEnergy(s=2)
    value, grad = energy.value_and_grad(simplex)
    ground = energy.ground(5, 5)
    assert float(value) == pytest.approx(ground.floor, rel=1e-12)
    assert float(grad.abs().max()) < 1e-14
    assert ground.random is not None
    assert ground.random > ground.floor


def test_minimizing_reaches_the_floor_in_training() -> None:
    """40 neurons in 64 dimensions form a simplex; prox-free plain descent by the hook alone, in float64."""
    torch.manual_seed(0)
    model = nn.Linear(64, 40, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    reg = Regularizer(model, "mhe(s=2)").attach(optimizer)
    before = reg.values()["mhe(s=2)"]
    for _ in range(300):
        optimizer.zero_grad()
        (0 * model.weight.sum()).backward()
        optimizer.step()
    floor = HypersphericalEnergy(s=2).ground(40, 64).floor
    assert before > floor * 1.01
    assert reg.values()["mhe(s=2)"] == pytest.approx(floor, rel=1e-4)  # where 300 steps get


# ---------------------------------------------------------------------- projections


def test_random_projections_keep_cosines_up_to_the_law() -> None:
    """cos(P u, P v) - cos(u, v) has the deviation (1 - c^2) / sqrt(k): to 5 % with 6000 pairs of neurons."""
    w, k = normal(48, 400, seed=2), 30
    energy = CompressiveHypersphericalEnergy(dimensions=k, count=6)
    projected = energy._projected(w, energy._fixed(w))
    exact = F.normalize(w, dim=-1) @ F.normalize(w, dim=-1).mT
    u = F.normalize(projected, dim=-1)
    pairs = torch.triu_indices(48, 48, 1)
    error = ((u @ u.mT) - exact)[:, pairs[0], pairs[1]] / (1 - exact.square())[pairs[0], pairs[1]]
    assert float(error.std()) == pytest.approx(1 / math.sqrt(k), rel=0.05)
    assert abs(float(error.mean())) < 0.02


@pytest.mark.parametrize("shape", [(6, 40), (3, 6, 40)])
@pytest.mark.parametrize("count", [1, 4])
def test_all_projections_at_once_are_their_mean(shape: tuple[int, ...], count: int) -> None:
    w = normal(*shape, seed=5)
    energy = CompressiveHypersphericalEnergy(dimensions=9, count=count)
    value, grad = energy.step(w, {}, torch.Generator().manual_seed(3))
    leaf = w.clone().requires_grad_()
    drawn = torch.randn((count, 9, 40), generator=torch.Generator().manual_seed(3)).double()
    one = HypersphericalEnergy(s=2, half_space=True)
    mean = torch.stack([one.value(leaf @ p.mT) for p in drawn]).mean(0)
    torch.testing.assert_close(value, mean.detach(), rtol=1e-12, atol=0)  # rounding of float64
    torch.testing.assert_close(grad, torch.autograd.grad(mean.sum(), leaf)[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(energy.value(w), energy.value_and_grad(w)[0], rtol=1e-12, atol=0)


def test_projections_are_drawn_anew_at_every_step_and_measured_the_same() -> None:
    model = nn.Sequential(nn.Linear(80, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reg = Regularizer(model, "comhe(dimensions=10, count=2)").attach(optimizer)
    grads = []
    values = []
    for _ in range(2):
        optimizer.zero_grad()
        (0 * sum(p.sum() for p in model.parameters())).backward()
        optimizer.step()
        grads.append(model[0].weight.grad.clone())
        values.append(reg.values())
    assert not torch.equal(*grads)
    assert values[0] == values[1]


@pytest.mark.parametrize("projection", ["angle-preserving", "adversarial"])
def test_learned_projections_learn_and_are_saved(projection: str) -> None:
    def run(steps: int, state: dict | None = None) -> tuple[Regularizer, nn.Module]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 12), nn.ReLU(), nn.Linear(12, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        reg = Regularizer(model, f"comhe(projection={projection!r}, dimensions=8)").attach(optimizer)
        if state is not None:
            model.load_state_dict(state["model"])
            reg.load_state_dict(state["reg"])
        for _ in range(steps):
            optimizer.zero_grad()
            (0 * sum(p.sum() for p in model.parameters())).backward()
            optimizer.step()
        return reg, model

    whole = run(6)
    first = run(3)
    copy = {k: v.clone() if isinstance(v, Tensor) else v for k, v in first[0].state_dict().items()}
    resumed = run(3, {"model": first[1].state_dict(), "reg": copy})
    for a, b in zip(whole[1].parameters(), resumed[1].parameters()):
        assert torch.equal(a, b)
    (memory,) = [v for k, v in whole[0].state_dict().items() if k.startswith("memory/")]
    (start,) = [v for k, v in run(0)[0].state_dict().items() if k.startswith("memory/")]
    w = run(0)[1][0].weight.detach()

    def goal(p: Tensor) -> float:
        if projection == "adversarial":
            return -float(HypersphericalEnergy(s=2).value(w @ p.mT))
        u, v = F.normalize(w @ p.mT, dim=-1), F.normalize(w, dim=-1)
        return float((u @ u.mT - v @ v.mT).norm())

    assert goal(memory) < goal(start)


@pytest.mark.parametrize("projection", ["angle-preserving", "adversarial"])
def test_in_inference_mode_learned_projections_are_used_and_stay(projection: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(60, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    for mode in (False, True):  # in which the regularizer is made
        with torch.inference_mode(mode):
            reg = Regularizer(model, f"comhe(projection={projection!r}, dimensions=8)@loss")
        (start,) = [v for k, v in reg.state_dict().items() if k.startswith("memory/")]
        with torch.inference_mode():
            found = float(reg.loss())
        (after,) = [v for k, v in reg.state_dict().items() if k.startswith("memory/")]
        assert torch.equal(start, after)
        hidden, output = (p.detach() for p in model.parameters() if p.ndim == 2)
        half = HypersphericalEnergy(s=2, half_space=True).value(hidden @ start.mT)
        expected = float(half + HypersphericalEnergy(s=2).value(output))
        assert found == pytest.approx(expected, rel=1e-6)  # the sum is a float32 number
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        reg.attach(optimizer)  # what the steps of an optimizer learn is kept
        reg.loss().backward()
        optimizer.step()
        (learned,) = [v for k, v in reg.state_dict().items() if k.startswith("memory/")]
        assert not torch.equal(start, learned)


def test_weights_made_in_inference_mode_have_a_loss_with_learned_projections() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(60, 12), nn.ReLU(), nn.Linear(12, 3))
    for spec in ("comhe(projection='adversarial', dimensions=8)", "mma"):
        assert bool(Regularizer(model, f"{spec}@loss").loss().isfinite())


def test_a_state_of_other_weights_is_refused() -> None:
    spec = "comhe(projection='adversarial', dimensions=8)"
    reg = Regularizer(nn.Sequential(nn.Linear(60, 12), nn.Linear(12, 3)), spec)
    other = Regularizer(nn.Sequential(nn.Linear(50, 12), nn.Linear(12, 3)), spec)
    with pytest.raises(UsageError, match="memory"):
        other.load_state_dict(reg.state_dict())


def test_groups_of_coordinates() -> None:
    """The mean of the energies of the sub-vectors; what is left over plays no part."""
    w = normal(5, 11)
    energy = CompressiveHypersphericalEnergy(projection="group", dimensions=4, s=1.0)
    expected = (by_pairs(w[:, :4], 1.0, True) + by_pairs(w[:, 4:8], 1.0, True)) / 2
    value, grad = energy.value_and_grad(w)
    assert float(value) == pytest.approx(expected, rel=1e-12)
    assert not grad[:, 8:].any()


def test_few_inputs_are_not_projected_and_outputs_not_compressed() -> None:
    w = normal(5, 6)
    energy = CompressiveHypersphericalEnergy(dimensions=6)
    assert torch.equal(energy.value(w), HypersphericalEnergy(s=2, half_space=True).value(w))
    assert energy.at_output() == HypersphericalEnergy(s=2)


# ---------------------------------------------------------------------- features


def test_features_are_the_rows_of_a_batch() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = normal(8, 4)
    for on, features in (("logits", model(x)), ("1", model[:2](x))):
        energy = FeatureHypersphericalEnergy(on=on, s=1.0)
        value = energy.value(model, x, probe=GENERATOR)
        assert float(value.detach()) == pytest.approx(by_pairs(features.detach(), 1.0), rel=1e-12)
        (grad,) = torch.autograd.grad(value, model[0].weight)
        (expected,) = torch.autograd.grad(HypersphericalEnergy(s=1.0).value(features), model[0].weight)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_one_feature_is_refused() -> None:
    with pytest.raises(UsageError, match="two features"):
        FeatureHypersphericalEnergy().value(nn.Linear(4, 1), torch.randn(3, 4), probe=GENERATOR)


# ---------------------------------------------------------------------- neighbors


def test_neighbors_by_their_definitions() -> None:
    w = normal(6, 4, seed=3)
    u = F.normalize(w, dim=-1)
    c = u @ u.mT
    angles = torch.arccos(c - 3 * torch.eye(6, dtype=c.dtype).clamp_max(0)).fill_diagonal_(math.inf)
    assert float(MinimumAngle().value(w)) == pytest.approx(-float(angles.min(-1).values.mean()), rel=1e-10)
    pairs = torch.triu_indices(6, 6, 1)
    squared = (2 - 2 * c)[pairs[0], pairs[1]]
    assert float(Uniformity(t=3).value(w)) == pytest.approx(float(torch.exp(-3 * squared).mean().log()), rel=1e-10)
    kernel = torch.exp(2 * c - 2) + 1e-6 * torch.eye(6)
    assert float(GramDeterminant().value(w)) == pytest.approx(-float(torch.logdet(kernel)), rel=1e-8)
    for matrix in (w, w.mT):  # the smaller side, whichever it is
        gram = w.mT @ w - torch.eye(4)
        assert float(SoftOrthogonality().value(matrix)) == pytest.approx(float(gram.square().sum()), rel=1e-10)
        norm = float(torch.linalg.matrix_norm(gram, 2)) ** 2
        assert float(SpectralIsometry().value(matrix)) == pytest.approx(norm, rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-6, 1e-4, 1e-2, 1.0])
def test_the_smallest_angle_is_accurate_at_both_of_its_ends(gap: float, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for sign, angle in ((-1.0, math.pi - gap), (1.0, gap)):
        w = torch.tensor([[2.0, 0.0, 0.0], [sign * 3 * math.cos(gap), 3 * math.sin(gap), 0.0]], dtype=dtype)
        value, grad = MinimumAngle().value_and_grad(w)
        # directions, distances and arc tangent round once each
        assert float(value) == pytest.approx(-angle, rel=4 * eps)
        # the angle's gradient by a neuron is a unit vector over the neuron's norm; none where no direction is left
        lengths = torch.zeros(2, dtype=dtype) if gap == 0.0 else torch.tensor([1 / 2, 1 / 3], dtype=dtype)
        torch.testing.assert_close(grad.norm(dim=1), lengths, rtol=16 * eps, atol=0.0)


def test_uniformity_of_the_sphere() -> None:
    """The value of uniform directions on S^63, -3.875235590 at t = 2, to the deviation of 3000 samples."""
    value = Uniformity(t=2.0).value(normal(3000, 64, seed=4))
    assert float(value) == pytest.approx(-3.875235590, abs=2e-3)


def test_advice_on_overflow_names_only_what_the_energy_has() -> None:
    w = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1e-5, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="smaller s") as caught:
        HypersphericalEnergy(s=70.0).value(w)  # 1e5^70 is beyond float64
    assert "r_min" not in str(caught.value)


def test_nan_is_named() -> None:
    w = normal(4, 3)
    w[1, 1] = math.nan
    for energy in (
        MinimumAngle(),
        Uniformity(),
        GramDeterminant(),
        HypersphericalEnergy(),
        CompressiveHypersphericalEnergy(),
    ):
        with pytest.raises(NonFiniteError):
            energy.value(w)
