"""What a network does to its inputs: figures by hand and by brute force, what is left out and why, and no trace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundstate import measure_function as module
from groundstate.attack import ProjectedAscent, robust_accuracy
from groundstate.energies.dirichlet import Dirichlet
from groundstate.energies.function_prior import FunctionSpacePrior
from groundstate.energies.jacobian import JacobianSpectral
from groundstate.energies.jacobian_nuclear import JacobianNuclear
from groundstate.errors import NonFiniteError, UsageError
from groundstate.measure import measure
from groundstate.measure_function import RADII, FunctionTable, measure_function
from groundstate.outliers import FAMILIES, families
from groundstate.scores import auroc, calibration, predictive_entropy

PARTS = ("cuts", "robustness", "alignment", "calibration", "outliers")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(*matrices: list[list[float]]) -> nn.Sequential:
    layers = []
    for rows in matrices:
        w = torch.tensor(rows, dtype=torch.float64)
        layers.append(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=torch.float64))
        layers[-1].weight.data.copy_(w)
    return nn.Sequential(*layers)


def network(seed: int, *widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    made: list[nn.Module] = []
    for n, m in pairwise(widths):
        made += [nn.Linear(n, m), activation()]
    model = nn.Sequential(*made[:-1])
    draw = generator(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw) / (p.shape[-1] ** 0.5 if p.ndim > 1 else 10))
    return model


def data(seed: int, n: int, inputs: int, classes: int) -> tuple[Tensor, Tensor]:
    draw = generator(seed)
    return torch.randn(n, inputs, generator=draw), torch.randint(classes, (n,), generator=draw)


@pytest.fixture(scope="module")
def sample() -> tuple[nn.Sequential, Tensor, Tensor]:
    return network(1, 6, 8, 7, 4), *data(2, 50, 6, 4)


@pytest.fixture(scope="module")
def found(sample: tuple[nn.Sequential, Tensor, Tensor]) -> FunctionTable:
    return measure_function(*sample)


# Figures by hand and by brute force


def test_linear_network_by_hand() -> None:
    """J = W2 W1 = diag(3, 8) at every sample, J_h = W1 and J_g = W2 at the cut."""
    table = measure_function(linear([[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 2.0]]), data(3, 9, 2, 2)[0])
    exact = 1e-9  # float64; the Gram squares the singular values and takes a root
    values = {name: e.value for name, e in table.energies.items()}
    assert values["dirichlet"] == pytest.approx(73.0, rel=exact)
    assert values["jacobian_nuclear"] == pytest.approx(11.0, rel=exact)
    assert values["jacobian_spectral"] == pytest.approx(8.0, rel=exact)
    assert values["jacobian_frobenius"] == pytest.approx(math.sqrt(73.0), rel=exact)
    assert table.energies["dirichlet"].standard_error == pytest.approx(0.0, abs=1e-9)
    expected = {
        "s_1": 8.0,
        "s_r": 3.0,
        "rank": 2.0,
        "stable_rank": 73 / 64,
        "effective_rank": 121 / 73,
        "second": 3 / 8,
    }
    assert table.spectrum == pytest.approx(expected, rel=exact)
    (cut,) = table.cuts
    assert (cut.pop("name"), cut.pop("kind"), cut.pop("width")) == ("0", "Linear", 2)
    by_hand = {"nuclear": 11.0, "frobenius_h": 5.0, "frobenius_g": math.sqrt(5.0), "half_sum": 15.0}
    by_hand |= {"product": 5 * math.sqrt(5.0), "half_sum/nuclear": 15 / 11, "product/nuclear": 5 * math.sqrt(5.0) / 11}
    assert cut == pytest.approx(by_hand, rel=exact)


def test_spectrum_and_energies_are_means_over_the_samples(
    sample: tuple[nn.Sequential, Tensor, Tensor], found: FunctionTable
) -> None:
    model, x, _ = sample
    twin = network(1, 6, 8, 7, 4).double()
    twin.load_state_dict(model.state_dict())
    jacobians = torch.stack([torch.autograd.functional.jacobian(twin, one) for one in x.double()])  # pyright: ignore
    s = torch.linalg.svdvals(jacobians)
    close = 1e-4  # float32, and the root of a Gram: up to sqrt(eps) for the small values
    squared = s.square().sum(1)
    gc = found.energies["dirichlet"]
    assert gc.value == pytest.approx(float(squared.mean()), rel=close)
    assert gc.standard_error == pytest.approx(float(squared.std() / 50**0.5), rel=1e-3)
    assert found.energies["jacobian_nuclear"].value == pytest.approx(float(s.sum(1).mean()), rel=close)
    means = {"s_1": s[:, 0], "s_r": s[:, -1], "second": s[:, 1] / s[:, 0], "stable_rank": squared / s[:, 0].square()}
    means["effective_rank"] = s.sum(1).square() / squared
    for name, values in means.items():
        rounding = 3e-4 * float(s[:, 0].mean()) if name == "s_r" else 0.0  # the root of eps, of the largest
        assert found.spectrum[name] == pytest.approx(float(values.mean()), rel=1e-3, abs=rounding), name
    assert [(c["name"], c["kind"], c["width"]) for c in found.cuts] == [
        *(("0", "Linear", 8), ("1", "ReLU", 8), ("2", "Linear", 7), ("3", "ReLU", 7)),
    ]
    for cut in found.cuts:
        assert cut["nuclear"] == pytest.approx(float(s[:32].sum(1).mean()), rel=close)
        assert 1 <= cut["product/nuclear"] <= cut["half_sum/nuclear"]


def test_accuracy_under_attack_starts_clean_and_never_rises(
    sample: tuple[nn.Sequential, Tensor, Tensor], found: FunctionTable
) -> None:
    model, x, y = sample
    clean = float((model(x).argmax(1) == y).double().mean())
    assert list(found.robustness) == ["l2", "linf"]
    for curve in found.robustness.values():
        assert curve["accuracy"][0] == pytest.approx(clean)
        assert curve["accuracy"] == sorted(curve["accuracy"], reverse=True)
        assert curve["share"] == list(RADII)
    spread = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    assert found.robustness["l2"]["epsilon"] == pytest.approx([r * spread for r in RADII], rel=1e-5)
    deviation = float(x.std(correction=0))
    assert found.robustness["linf"]["epsilon"] == pytest.approx([r * deviation for r in RADII], rel=1e-5)


def test_accuracy_of_a_linear_classifier_is_that_of_its_margins() -> None:
    x = torch.linspace(0.1, 40.0, 60, dtype=torch.float64)[:, None]
    table = measure_function(linear([[1.0], [-1.0]]), x, torch.zeros(60, dtype=torch.long))
    for curve in table.robustness.values():
        for epsilon, accuracy in zip(curve["epsilon"], curve["accuracy"]):
            # the distance to the boundary is x; an attack may fall 5 % short of its radius
            assert float((x > epsilon).double().mean()) <= accuracy <= float((x > 0.95 * epsilon).double().mean())


def test_alignment_of_a_linear_network_is_perfect_in_the_theorem_s_regime() -> None:
    w = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 2.0, 1.0]])
    table = measure_function(linear(w.tolist()), *data(4, 40, 3, 2))
    curve = table.alignment
    assert len(curve["epsilon"]) == len(curve["share"]) == len(RADII)
    # 20 iterations from a random start; (s_2 / s_1)^40 < 1e-7 here, but a start may lie near the second vector
    assert min(curve["theorem"]) > 0.999
    v = torch.linalg.svd(w.double())[2][0]
    across = (w[0] - w[1]).double()  # with two classes the cross-entropy has this one direction
    expected = float((across @ v).abs() / across.norm())
    # what is left of a random start in 20 steps
    assert curve["cross_entropy"] == pytest.approx([expected] * len(RADII), abs=0.05)


def test_calibration_and_outliers_are_those_of_the_scores(
    sample: tuple[nn.Sequential, Tensor, Tensor], found: FunctionTable
) -> None:
    model, x, y = sample
    with torch.no_grad():
        logits = model(x)
        assert found.calibration == pytest.approx(calibration(logits, y), rel=1e-5)
        expected = {
            family: auroc(predictive_entropy(logits), predictive_entropy(model(outliers)))
            for family, outliers in families(x, generator(0)).items()
        }
    assert found.outliers == pytest.approx(expected, abs=2 / 50**2)  # a tie in float32 moves one pair
    assert list(expected) == ["uniform", "gaussian", "inverted", "permuted"]  # six features are no square image


# What is left out, and why


@pytest.mark.parametrize(
    ("model", "y", "says"),
    [
        (network(5, 6, 5, 3), None, "no labels"),
        (network(5, 6, 5, 3), torch.zeros(20, 3), "no classes"),
        (network(5, 6, 5, 1), torch.zeros(20), "no classes"),
        (network(5, 6, 5, 1), torch.zeros(20, dtype=torch.long), "one output"),
    ],
)
def test_labels_that_are_no_classes_leave_energies_and_cuts(model: nn.Module, y: Tensor | None, says: str) -> None:
    table = measure_function(model, data(6, 20, 6, 3)[0], y, energies=[Dirichlet()], whole=True)
    assert len(table.cuts) == 2
    assert "dirichlet" in table.energies
    assert not any(getattr(table, part) for part in PARTS[1:])
    (note,) = table.notes
    assert says in note
    assert note.startswith("robustness, alignment, calibration, outliers: left out: ")


def test_more_outputs_than_inputs() -> None:
    table = measure_function(network(7, 3, 8, 20, activation=nn.Tanh), *data(8, 30, 3, 20))
    assert table.spectrum["rank"] <= 3
    assert all(getattr(table, part) for part in PARTS)
    assert table.alignment["theorem"][0] > 0.9


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_a_network_that_cannot_be_split() -> None:
    table = measure_function(Residual(), *data(9, 20, 4, 4))
    assert not table.cuts
    assert "cuts: left out: the network cannot be split at any layer, so there is no bound over a cut" in table.notes
    assert all(getattr(table, part) for part in PARTS[1:])


def test_wide_cuts_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(75, 4))
    draw = generator(10)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw) / 5)
    x = torch.randn(40, 1, 5, 5, generator=draw)
    exact = {c["name"]: c for c in measure_function(model, x).cuts}
    monkeypatch.setattr(module, "_CUT_PASSES", 75 + 4)  # enough for the first cut alone
    table = measure_function(model, x)
    first, *others = table.cuts
    assert first == exact[first["name"]]
    assert [c["name"] for c in others] == ["1"]
    for cut in others:
        whole = exact[cut["name"]]
        assert cut["draws"] == 8
        assert not {"product", "frobenius_g", "frobenius_h"} & set(cut)
        assert cut["nuclear"] == pytest.approx(whole["nuclear"], rel=1e-4)  # float32
        assert cut["half_sum"] == pytest.approx(whole["half_sum"], rel=0.25)  # 256 probes: some 5 % of deviation
        assert cut["half_sum/nuclear"] == pytest.approx(cut["half_sum"] / cut["nuclear"])


def test_an_energy_that_fails_is_a_note_and_the_others_stay() -> None:
    model, (x, y) = network(11, 6, 5, 3), data(12, 20, 6, 3)
    energies = [Dirichlet(on="no.such"), Dirichlet(), JacobianSpectral(on="no.such", samples=None)]
    table = measure_function(model, x, y, energies=energies)
    assert list(table.energies) == ["dirichlet"]
    assert len(table.notes) == 1  # one reason, both energies before it
    assert "dirichlet(on='no.such'), jacobian_spectral" in table.notes[0]


def test_token_inputs_have_no_derivative_but_probabilities() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    x = torch.randint(9, (20, 3), generator=generator(13))
    y = torch.arange(20) % 3
    table = measure_function(model, x, y)
    assert not table.cuts
    assert not table.robustness
    assert table.calibration["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    assert any("wrt='embedding'" in note for note in table.notes)
    behind = Dirichlet(wrt="0")
    assert list(measure_function(model, x, y, energies=[behind]).energies) == [repr(behind)]


def test_overflow_is_a_note_and_a_bad_weight_an_error() -> None:
    model, (x, y) = network(14, 4, 5, 3), data(15, 20, 4, 3)
    for p in model.parameters():
        p.data.mul_(1e15)  # the squares of the Jacobian's entries are beyond float32, its outputs are not
    table = measure_function(model, x, y)
    assert "dirichlet" not in table.energies
    assert any("overflows" in note for note in table.notes)
    assert table.calibration["accuracy"] == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    json.dumps(table.to_dict(), allow_nan=False)
    model[0].weight.data[0, 0] = math.nan  # pyright: ignore
    with pytest.raises(NonFiniteError, match=r"'0\.weight'"):
        measure_function(model, x, y)


def test_samples_without_spread_have_no_radii() -> None:
    for x, y in ((torch.ones(1, 4), torch.tensor([0])), (torch.ones(6, 4), torch.zeros(6, dtype=torch.long))):
        table = measure_function(network(16, 4, 5, 3), x, y)
        assert not table.robustness
        assert not table.alignment
        assert table.calibration
        assert any(
            note.startswith("robustness, alignment: left out: the samples are all the same") for note in table.notes
        )
    assert measure_function(network(16, 4, 5, 3), torch.ones(1, 4)).energies["dirichlet"].standard_error is None


def test_a_dead_network_has_zero_energies_and_no_direction() -> None:
    model, (x, y) = network(17, 4, 5, 3), data(18, 20, 4, 3)
    for p in model.parameters():
        p.data.zero_()
    table = measure_function(model, x, y)
    assert table.energies["dirichlet"].value == table.spectrum["s_1"] == table.spectrum["second"] == 0.0
    assert {c["product/nuclear"] for c in table.cuts} == {1.0}
    assert any(n.startswith("alignment: left out: the Jacobian is zero") for n in table.notes)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((torch.ones(0, 4), None), "at least one"),
        (([1.0], None), "a tensor"),
        ((torch.ones(5, 4), torch.zeros(3, dtype=torch.long)), "5 samples and y 3"),
        ((torch.ones(5, 4), torch.full((5,), 7)), r"0\.\.2"),
    ],
)
def test_bad_data(arguments: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        measure_function(network(19, 4, 5, 3), *arguments)
    with pytest.raises(NonFiniteError, match="input x"):
        measure_function(network(19, 4, 5, 3), torch.tensor([[1.0, 2.0, 3.0, math.inf]]))
    with pytest.raises(UsageError, match="samples"):
        measure_function(network(19, 4, 5, 3), torch.ones(5, 4), samples=0)


IMAGES = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(18, 3))
TOKENS = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
LATE = torch.zeros(300, 3, dtype=torch.long)
LATE[299] = 9  # the last sample alone is out of range


@pytest.mark.parametrize(
    ("model", "x", "y", "says"),
    [
        (None, torch.ones(6, 7), torch.zeros(6).long(), r"samples of dtype float32 and shape \(7,\).*in_features=4"),
        (None, torch.ones(4), torch.zeros(4).long(), r"one sample as x\[None\]"),
        (IMAGES, torch.ones(1, 5, 5), torch.zeros(1).long(), r"one sample as x\[None\]"),
        (IMAGES[:1], torch.ones(1, 5, 5), torch.zeros(1).long(), r"\(2, 3, 3\).*one sample as x\[None\]"),
        (None, torch.ones(6, 4).long(), torch.zeros(6).long(), "int64"),
        (TOKENS, LATE, torch.zeros(300).long(), "out of range"),
        (None, torch.ones(0, 4), torch.zeros(0).long(), r"input x.*\(0, 4\), which is empty"),
        (None, torch.ones(6, 4).to_sparse(), torch.zeros(6).long(), "to_dense"),
        (None, torch.ones(6, 4, device="meta"), torch.zeros(6).long(), "meta"),
        (None, torch.tensor(1.0), torch.zeros(1).long(), "input x.*single number"),
        (None, [[1.0] * 4], torch.zeros(1).long(), "input x.*a list: convert"),
        (None, torch.ones(1, 4), [0], "target y.*a list: convert"),
        (None, torch.ones(1, 4), torch.tensor(0), "target y.*single number"),
        (None, torch.ones(6, 4), torch.zeros(5).long(), "6 samples and y 5: give as many"),
        (None, torch.ones(6, 4), torch.full((6,), 3), r"0\.\.2 for 3 classes, got 3\.\.3: number"),
        (None, torch.ones(6, 4), torch.full((6,), -1), r"0\.\.2 for 3 classes, got -1\.\.-1: number"),
        (None, torch.ones(6, 4), torch.zeros(6), r"dtype float32 and shape \(6,\), the network 3.*long"),
        (None, torch.ones(6, 4), torch.zeros(6).bool(), "got torch.bool: pass class numbers"),
        (None, torch.ones(6, 4), torch.zeros(6, 3).long(), "argmax"),
    ],
)
def test_data_that_do_not_fit_the_network_are_one_line(model: nn.Module | None, x: Any, y: Any, says: str) -> None:
    model = network(19, 4, 5, 3) if model is None else model
    for measured in (
        lambda: measure_function(model, x, y),
        lambda: measure_function(model, x, y, energies=[Dirichlet()]),
        lambda: measure(model, "nuclear", data=(x, y)),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            measured()
        assert "\n" not in str(caught.value)


def test_targets_that_are_not_finite_are_an_error() -> None:
    for x, y, name in ((math.nan, 0.0, "input x"), (0.0, math.inf, "target y")):
        with pytest.raises(NonFiniteError, match=name):
            measure(network(19, 4, 3), "nuclear", data=(torch.full((5, 4), x), torch.full((5, 3), y)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.inner(x), 1


def test_an_output_that_is_no_tensor_is_not_scored_and_an_item_of_it_measured() -> None:
    x, y = data(29, 20, 4, 3)
    item = Dirichlet(on="output:0")
    table = measure(Pair(), ["nuclear", item], data=(x, y))
    assert table.evaluation == {}
    assert any(n.startswith("loss, accuracy: left out: the output of the network is not one") for n in table.notes)
    assert table.function is not None
    assert list(table.function.energies) == [repr(item)]


# What it must not change, and what it depends on


def test_no_trace_on_the_model_the_data_or_the_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = data(20, 30, 6, 3)
    copy = x.clone()
    state = torch.random.get_rng_state()
    measure_function(model, x, y)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(x, copy)
    assert not x.requires_grad


def test_the_seed_decides_and_a_part_does_not_depend_on_the_others(
    sample: tuple[nn.Sequential, Tensor, Tensor], found: FunctionTable
) -> None:
    model, x, y = sample
    assert measure_function(model, x, y).to_dict() == found.to_dict()
    few = [measure_function(model, x, samples=20, seed=seed, energies=[Dirichlet()]).to_dict() for seed in (3, 3, 4)]
    assert few[0] == few[1]
    assert few[0]["samples"] == 20
    assert few[0] != few[2]
    for energy in (Dirichlet(), FunctionSpacePrior(), JacobianNuclear()):
        alone = measure_function(model, x, y, energies=[energy])
        assert alone.energies[repr(energy)] == found.energies[repr(energy)]
    attack = ProjectedAscent(0.0, steps=20)
    again = robust_accuracy(model, x, y, found.robustness["l2"]["epsilon"], generator(0), attack=attack)
    assert again == found.robustness["l2"]["accuracy"]


def test_energies_that_are_named_are_measured_alone(sample: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = sample
    calls: list[tuple[int, int, str]] = []
    table = measure_function(model, x, y, energies=[Dirichlet()], progress=lambda *a: calls.append(a))
    assert calls == [(1, 2, "spectrum"), (2, 2, "dirichlet")]
    assert table.spectrum
    assert not any(getattr(table, part) for part in PARTS)
    assert not measure_function(model, x, y, energies=[Dirichlet(on="probabilities")]).spectrum  # it shares none
    assert measure_function(model, x, energies=[Dirichlet()], whole=True).cuts
    by_name = measure(model, "nuclear + dirichlet", data=(x, y)).function
    assert by_name is not None
    assert list(by_name.energies) == ["dirichlet"]
    assert not by_name.cuts
    everything = measure(model, "all", data=(x[:8], y[:8])).function
    assert everything is not None
    assert all(getattr(everything, part) for part in PARTS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_come_in_the_dtype_of_the_parameters(dtype: torch.dtype) -> None:
    model, (x, y) = network(21, 6, 5, 3), data(22, 20, 6, 3)
    single = measure_function(model, x, y)
    table = measure_function(model.to(dtype), x, y)
    rel = 0.05 if dtype == torch.bfloat16 else 1e-4  # weights have 8 bits in bfloat16
    assert table.energies["dirichlet"].value == pytest.approx(single.energies["dirichlet"].value, rel=rel)
    assert all(getattr(table, part) for part in PARTS)


def test_json_is_strict(found: FunctionTable) -> None:
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["energies"]["dirichlet"]["value"] == found.energies["dirichlet"].value
    assert document["energies"]["dirichlet"]["samples"] == 50
    # J is zero and J_h is not: the bound is infinitely loose
    table = measure_function(linear([[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]), data(23, 5, 2, 2)[0])
    assert table.cuts[0]["half_sum/nuclear"] == math.inf
    assert json.loads(json.dumps(table.to_dict(), allow_nan=False))["cuts"][0]["half_sum/nuclear"] is None


# Outliers


def test_each_family_is_what_it_says() -> None:
    x = 3 + 2 * torch.randn(4000, 3, 4, 4, generator=generator(24))
    found = families(x, generator(25))
    assert tuple(found) == FAMILIES
    assert all(o.shape == x.shape and o.dtype == x.dtype for o in found.values())
    low, high = float(x.min()), float(x.max())
    uniform, gaussian = found["uniform"], found["gaussian"]
    assert low <= float(uniform.min()) < float(uniform.max()) <= high
    # 192 000 draws: means and deviations to five standard errors
    assert float(uniform.mean()) == pytest.approx((low + high) / 2, abs=5 * (high - low) / (12 * 192_000) ** 0.5)
    assert float(gaussian.mean()) == pytest.approx(float(x.mean()), abs=5 * 2 / 192_000**0.5)
    assert float(gaussian.std()) == pytest.approx(float(x.std()), rel=5 / (2 * 192_000) ** 0.5)
    assert torch.allclose(found["inverted"] + x, torch.tensor(low + high), atol=1e-5)  # float32
    assert torch.equal(found["rotated"][0, 0, :, 0], x[0, 0, 0].flip(0))
    flat, moved = x.flatten(1), found["permuted"].flatten(1)
    order = [int((flat[0] == value).nonzero()[0, 0]) for value in moved[0]]
    assert sorted(order) == list(range(48))
    assert torch.equal(moved, flat[:, order])  # the same order for all samples


def test_families_of_rows_and_of_few_features() -> None:
    x = torch.arange(18.0).reshape(2, 9)
    assert torch.equal(families(x, generator(0))["rotated"][1].reshape(3, 3), x[1].reshape(3, 3).rot90())
    assert list(families(torch.ones(5, 1), generator(0))) == ["uniform", "gaussian", "inverted"]
    assert "rotated" not in families(torch.ones(5, 6), generator(0))
    assert "rotated" not in families(torch.ones(5, 1, 4, 6), generator(0))
    one = families(torch.tensor([[2.0]]), generator(0))  # a single number has no spread, and no NaN
    assert {float(o) for o in one.values()} == {2.0}
    for scale in (1e-20, 1e20, 1e38):
        wild = families(scale * torch.tensor([[-1.0, 2.0], [3.0, -3.0]]), generator(0))
        assert all(bool(o.isfinite().all()) for name, o in wild.items() if name != "gaussian" or scale < 1e38)
    assert families(torch.ones(2, 4, dtype=torch.bfloat16), generator(0))["uniform"].dtype == torch.bfloat16


def test_families_repeat_by_seed_and_refuse_what_has_no_range() -> None:
    x = torch.randn(3, 4, generator=generator(26))
    again = families(x, generator(27))
    assert all(torch.equal(o, again[name]) for name, o in families(x, generator(27)).items())
    assert not torch.equal(families(x, generator(28))["uniform"], again["uniform"])
    for bad in (torch.ones(3, 4, dtype=torch.long), torch.ones(0, 4), torch.ones(4)):
        with pytest.raises(UsageError, match="real inputs"):
            families(bad, generator(0))
    with pytest.raises(NonFiniteError):
        families(torch.tensor([[math.nan, 1.0]]), generator(0))
