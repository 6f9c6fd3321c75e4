"""The table holds every tensor; its numbers are those of independent formulas; memory stays that of one tensor."""

from __future__ import annotations

import copy
import csv
import importlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import groundstate as gs
from groundstate.energies import L1, GraphEnergy, MatrixEnergy, Nuclear, SquaredFrobenius, registered
from groundstate.energies.function_prior import set_prior
from groundstate.energies.graph import ConvolutionGraphEnergy
from groundstate.errors import UsageError
from groundstate.jacobian import exact
from groundstate.measure import Row, Table, measure


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(seed: int, *widths: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    g = generator(seed)
    layers: list[nn.Module] = []
    for m, n in zip(widths[1:], widths[:-1], strict=True):
        layer = nn.Linear(n, m, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(m, n, generator=g, dtype=torch.float64))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def rows(table: Table) -> dict[str, Row]:
    return {r.name: r for r in table.rows}


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().double() for p in model.parameters() if p.ndim == 2]


def test_the_package_gives_the_function_even_after_the_module_of_its_name_was_imported() -> None:
    assert gs.measure is measure


def test_values_ranks_and_totals_are_those_of_independent_formulas() -> None:
    model = mlp(1, 12, 9, 7)
    table = measure(model, "nuclear + squared_frobenius + l1")
    for name, w in zip(("0.weight", "2.weight"), weights(model), strict=True):
        row, s = rows(table)[name], np.linalg.svd(w.numpy(), compute_uv=False)
        p = s / s.sum()
        # float32 singular values: a few rounding errors of 6e-8 each
        assert row.values["nuclear"] == pytest.approx(s.sum(), rel=1e-6)
        assert row.values["squared_frobenius"] == pytest.approx((s**2).sum(), rel=1e-6)
        assert row.values["l1"] == pytest.approx(float(w.abs().sum()), rel=1e-6)
        assert row.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)
        assert row.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-5)
        assert (row.sigma_max, row.sigma_min) == pytest.approx((s[0], s[-1]), rel=1e-4)
        assert row.rank == min(w.shape)
    for key, total in table.totals.items():
        assert total == pytest.approx(sum(r.values[key] for r in table.rows if r.status == "analyzed"), rel=1e-12)
    assert table.parameters == sum(p.numel() for p in model.parameters())


def test_all_is_every_matrix_energy_and_the_network_energies() -> None:
    table = measure(mlp(2, 6, 5, 4))
    matrix = {repr(c.examples()[0]) for c in registered().values() if issubclass(c, MatrixEnergy)}
    assert set(rows(table)["0.weight"].values) == matrix
    assert set(table.totals) >= matrix | {"graph"}


def test_shared_singular_values_give_what_each_energy_gives_alone() -> None:
    w = torch.randn(8, 6, generator=generator(3), dtype=torch.float64)
    for cls in registered().values():
        if issubclass(cls, MatrixEnergy):
            for energy in cls.examples():
                (row,) = measure({"fc.weight": w}, energy).rows
                # float64, two routes to the same singular values; smoothed square roots lose a few digits
                assert row.values[repr(energy)] == pytest.approx(float(energy.value(w)), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("energies", ["nuclear + l1", [Nuclear(), "l1"], Nuclear() + L1(), (3e-4 * Nuclear(), L1())])
def test_energies_may_be_given_in_any_form_and_strength_plays_no_part(energies: Any) -> None:
    table = measure(mlp(4, 5, 4), energies)
    assert set(table.totals) == {"nuclear", "l1"}
    assert table.totals == measure(mlp(4, 5, 4), "nuclear + l1").totals


def test_numerical_rank_counts_what_rounding_does_not_explain() -> None:
    g = generator(5)
    a, b = torch.randn(40, 3, generator=g), torch.randn(3, 30, generator=g)
    (row,) = measure({"w": a @ b}, "none").rows
    assert row.rank == 3


@pytest.mark.parametrize("w", [torch.zeros(4, 3), torch.zeros(0, 3), torch.zeros(3, 0)])
def test_zero_and_empty_matrices_have_rank_zero(w: Tensor) -> None:
    (row,) = measure({"w": w}, "nuclear").rows
    assert (row.status, row.rank, row.effective_rank, row.stable_rank) == ("analyzed", 0, 0.0, 0.0)
    assert row.values["nuclear"] == 0.0


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_ranks_do_not_depend_on_the_scale(scale: float) -> None:
    w = torch.randn(7, 5, generator=generator(6))
    (row,) = measure({"w": w * scale}, "nuclear").rows
    (reference,) = measure({"w": w}, "nuclear").rows
    assert row.rank == reference.rank == 5
    assert row.effective_rank == pytest.approx(reference.effective_rank, rel=1e-5)  # float32 rounding of w * scale
    assert row.values["nuclear"] == pytest.approx(reference.values["nuclear"] * scale, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_any_floating_dtype_is_measured_at_its_stored_values(dtype: torch.dtype) -> None:
    w = torch.randn(6, 5, generator=generator(7)).to(dtype)
    (row,) = measure({"w": w}, "squared_frobenius").rows
    assert row.values["squared_frobenius"] == pytest.approx(float(w.double().square().sum()), rel=1e-6)
    assert row.rank == 5


class Experts(nn.Module):
    """A stack of expert matrices, as mixtures keep them."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.gate = nn.Parameter(w)


def test_stack_of_experts_is_a_batch_of_matrices_and_convolutions_are_not() -> None:
    w = torch.randn(4, 6, 5, generator=generator(8))
    expected = sum(float(torch.linalg.svdvals(v.double()).sum()) for v in w)
    for source, name in ((Experts(w), "gate"), ({"mlp.experts.up": w}, "mlp.experts.up")):
        row = rows(measure(source, "nuclear"))[name]
        assert (row.matrices, row.rank) == (4, 20)
        assert row.values["nuclear"] == pytest.approx(expected, rel=1e-6)  # float32 sums
    flat = float(torch.linalg.svdvals(w.reshape(4, 30).double()).sum())
    conv = nn.Conv1d(6, 4, 5)
    conv.weight.data.copy_(w)
    for source, name in ((conv, "weight"), ({"conv1.weight": w}, "conv1.weight"), ({"w": w}, "w")):
        row = rows(measure(source, "nuclear"))[name]
        assert row.matrices == 1
        assert row.values["nuclear"] == pytest.approx(flat, rel=1e-6)
    wide = torch.randn(2, 20, 17, generator=generator(9))
    assert measure({"ff.up": wide}, "nuclear").rows[0].matrices == 2  # no kernel has length 17


def test_every_tensor_is_listed_with_the_reason_it_was_skipped() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 9, bias=False))
    model[3].weight = model[0].weight
    table = measure(model, "nuclear")
    found = rows(table)
    assert set(found) == set(model.state_dict())
    assert found["0.weight"].reason == "embedding"
    assert (found["3.weight"].status, found["3.weight"].alias_of) == ("alias", "0.weight")
    assert found["1.weight"].status == "analyzed"
    assert all(r.reason for r in table.rows if r.status != "analyzed")
    assert table.summary() == {"tensors": len(found), "analyzed": 1, "skipped": 7, "alias": 1, "non-finite": 0}


def test_tied_weights_count_once() -> None:
    w = torch.randn(4, 4, generator=generator(10))
    assert measure({"a": w, "b": w}, "nuclear").totals == measure({"a": w}, "nuclear").totals


def test_nan_is_named_and_left_out_of_the_totals() -> None:
    model = mlp(11, 5, 4, 3)
    good = measure(model, "nuclear")
    with torch.no_grad():
        weight = next(model[2].parameters())
        weight[0, :2], weight[1, 0] = math.nan, math.inf
    table = measure(model, "nuclear + graph")
    row = rows(table)["2.weight"]
    assert row.status == "non-finite"
    assert "2 NaN and 1 infinite of 12 entries" in row.reason
    assert table.non_finite == ["2.weight"]
    assert table.totals == {"nuclear": rows(good)["0.weight"].values["nuclear"]}
    assert any("2.weight" in n for n in table.notes)


def test_nan_in_a_bias_is_found_and_infinite_masks_are_ordinary() -> None:
    table = measure({"fc.bias": torch.tensor([math.nan, 1.0]), "mask": torch.tensor([-math.inf])}, "nuclear")
    assert [r.status for r in table.rows] == ["non-finite", "skipped"]


@pytest.mark.parametrize("widths", [(1, 5), (5, 1)])
def test_an_analyzed_row_says_why_an_energy_has_no_value(widths: tuple[int, int]) -> None:
    table = measure(nn.Linear(*widths), "mhe + mma + nuclear")
    row = table.rows[0]
    assert (row.status, set(row.values)) == ("analyzed", {"nuclear"})
    assert row.reason.startswith(f"mhe, mma: {widths[1]} x {widths[0]} (neurons x weights of each) is too small")
    assert set(table.totals) == {"nuclear"}
    assert "mhe, mma: no total: no weight has a value; the reason is in the row" in table.notes
    assert row.reason in table.to_csv()
    assert measure(nn.Linear(2, 2), "mhe").rows[0].reason == ""


def test_energies_have_totals_of_the_weights_that_have_values_and_none_without() -> None:
    """Of all per-weight energies: those that a weight of one neuron, or no weight, has no value of have no total."""
    table = measure(mlp(25, 6, 5, 1))
    only = measure(mlp(25, 5, 1))
    assert set(only.totals) == set(only.rows[0].values) | {"graph"}
    assert set(table.totals) - set(only.totals) == {"comhe(dimensions=3, count=4)", "mgd", "mhe", "mma", "uniformity"}
    for key in set(table.totals) - set(only.totals):
        assert table.totals[key] == rows(table)["0.weight"].values[key]
        assert any(key in n and "the total is without 2.weight" in n for n in table.notes)
        assert any(key in n and "no total: no weight has a value" in n for n in only.notes)
    assert "mhe" not in json.loads(json.dumps(only.to_dict()))["totals"]
    for state in ({"bias": torch.ones(3)}, {"w": torch.full((3, 3), math.nan)}):
        empty = measure(state, "mhe + nuclear")
        assert empty.totals == {}
        assert "mhe, nuclear: no total: no tensor is an analyzed weight" in empty.notes


# Network energies


def test_graph_energy_of_a_model_and_of_its_file_agree(tmp_path: Path) -> None:
    model = mlp(12, 7, 6, 5, 4, 3, 4, 5)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    adjacency = torch.zeros(34, 34, dtype=torch.float64)
    start = 0
    for w in weights(model):
        m, n = w.shape
        adjacency[start + n : start + n + m, start : start + n] = w
        start += n
    expected = float(torch.linalg.eigvalsh(adjacency + adjacency.T).abs().sum())
    for source in (model, tmp_path / "model.safetensors", model.state_dict()):
        assert measure(source, "graph").totals["graph"] == pytest.approx(expected, rel=1e-5)  # float32 weights
    assert any("taken from names" in n for n in measure(tmp_path / "model.safetensors").notes)


def test_graph_energy_that_cannot_be_had_is_a_note_or_an_error_where_it_is_all_that_was_asked() -> None:
    state = {"encoder.weight": torch.randn(4, 4, generator=generator(13)), "x": torch.ones(3, 3)}
    table = measure(state)
    assert "graph" not in table.totals
    assert any(n.startswith("graph: the order") for n in table.notes)
    with pytest.raises(UsageError, match="order of the layers"):
        measure(state, GraphEnergy())
    with pytest.raises(UsageError):
        measure(nn.LSTM(3, 3), "graph")


def test_graph_energy_of_wide_convolutions_is_left_out_by_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes 2 + 4 and 3, one matrix for each of the 9 frequencies of 16 pixels: 9 * 3^2 * 6 = 486."""
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Conv1d(3, 4, 1))
    value = measure(model, "graph").totals["graph"]
    module = importlib.import_module("groundstate.measure")
    monkeypatch.setattr(module, "MAX_QUICK_COST", 485)
    assert any("9 matrices of 3 x 6" in n and "by name" in n for n in measure(model).notes)
    assert measure(model, "graph").totals["graph"] == value
    monkeypatch.setattr(module, "MAX_QUICK_COST", 486)
    assert measure(model).totals["graph"] == value
    monkeypatch.setattr(module, "MAX_COST", 485)
    table = measure(model, "graph + nuclear")
    assert set(table.totals) == {"nuclear"}
    assert any("ConvolutionGraphEnergy(size=4)" in n for n in table.notes)
    with pytest.raises(UsageError, match="9 matrices"):
        measure(model, "graph")
    fewer = ConvolutionGraphEnergy(size=4)
    assert measure(model, fewer).totals["graph"] == pytest.approx(float(fewer.value(model).detach()), rel=1e-6)


def test_energies_that_weights_do_not_have_are_refused() -> None:
    with pytest.raises(UsageError, match="path_energy"):
        measure(mlp(14, 3, 2), "path_energy")
    with pytest.raises(UsageError, match="nuclear"):
        measure(mlp(14, 3, 2), "nucler")


def test_model_without_data_is_listed() -> None:
    table = measure(nn.Sequential(nn.Linear(3, 2, device="meta")))
    assert [r.status for r in table.rows] == ["skipped", "skipped"]
    assert any("meta device" in n for n in table.notes)


# Output


def test_json_and_csv_are_safe_to_open(tmp_path: Path) -> None:
    hostile = ["=cmd|'/c calc'!A1", "+1", "-1", "@x", "\t=1", "a\x1b[31mb\nc", "\ud800", "<script>"]
    table = measure({n: torch.ones(2, 2) for n in hostile}, "nuclear")
    (tmp_path / "table.csv").write_text(table.to_csv(), "utf-8")
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(lines) == len(hostile)
    for line in lines:
        assert not line["name"].lstrip().startswith(("=", "+", "-", "@"))
        assert line["name"].isprintable()
        assert float(line["nuclear"]) == pytest.approx(2.0, rel=1e-6)  # the all-ones 2x2 matrix has sigma = (2, 0)
    text = json.dumps(table.to_dict(), allow_nan=False)
    assert [r["name"] for r in json.loads(text)["rows"]] == hostile


def test_numbers_that_json_cannot_write_become_text() -> None:
    table = Table([Row("w", (1,), "float32", 1, "analyzed", values={"x": math.inf})], {"x": math.nan})
    document = json.loads(json.dumps(table.to_dict(), allow_nan=False))
    assert (document["totals"]["x"], document["rows"][0]["values"]["x"]) == ("nan", "inf")


def test_progress_is_told_of_every_tensor() -> None:
    calls: list[tuple[int, int, str]] = []
    measure(mlp(15, 4, 3), "nuclear", progress=lambda *a: calls.append(a))
    assert calls == [(1, 2, "0.weight"), (2, 2, "0.bias")]


# Data, and what measuring must not change


def test_data_gives_loss_and_accuracy() -> None:
    model = nn.Sequential(mlp(16, 6, 4), nn.Dropout(0.5))
    x, y = torch.randn(3000, 6, generator=generator(17)), torch.arange(3000) % 4
    table = measure(model, SquaredFrobenius(), data=(x, y))
    with torch.no_grad():
        out = model[0](x)
    assert table.evaluation["accuracy"] == pytest.approx(float((out.argmax(1) == y).double().mean()), rel=1e-12)
    expected = float(nn.functional.cross_entropy(out, y))
    assert table.evaluation["loss"] == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    assert model.training
    with pytest.raises(UsageError, match="the model itself"):
        measure(model.state_dict(), "nuclear", data=(x, y))
    with pytest.raises(UsageError, match="as many labels"):
        measure(model, "nuclear", data=(x, y[:5]))
    assert measure(model, "nuclear", data=(x, None)).evaluation == {}


def test_loss_of_real_targets_is_the_mean_squared_error() -> None:
    model, x = mlp(19, 6, 4), torch.randn(1500, 6, generator=generator(20))
    y = torch.randn(1500, 4, generator=generator(21))
    with torch.no_grad():
        expected = float((model(x).double() - y.double()).square().mean())
    found = measure(model, "nuclear", data=(x, y)).evaluation
    assert found == pytest.approx({"loss": expected}, rel=1e-6)  # float32 outputs
    one = nn.Sequential(model, nn.Linear(4, 1))
    with torch.no_grad():
        expected = float((one(x)[:, 0].double() - y[:, 0].double()).square().mean())
    assert measure(one, "nuclear", data=(x, y[:, 0])).evaluation == pytest.approx({"loss": expected}, rel=1e-6)


def test_a_single_logit_is_not_scored_and_its_energies_are() -> None:
    model, x, y = mlp(22, 6, 5, 1), torch.randn(20, 6, generator=generator(23)), torch.arange(20) % 2
    for labels in (y, torch.zeros_like(y)):
        table = measure(model, "nuclear + dirichlet", data=(x, labels))
        assert table.evaluation == {}
        assert table.totals["nuclear"] > 0
        assert table.function is not None
        assert table.function.energies["dirichlet"].value > 0
        assert any(n.startswith("loss, accuracy: left out: the network has one output") for n in table.notes)


@pytest.mark.parametrize("data", [torch.ones(2, 3), (torch.ones(2, 3),), torch.ones(3, 3), None])
def test_data_must_be_a_pair(data: Any) -> None:
    if data is None:
        data = (torch.ones(2, 6), torch.zeros(2).long(), 1)
    with pytest.raises(UsageError, match=r"two tensors \(x, y\)"):
        measure(mlp(24, 3, 2), "nuclear", data=data)


def test_measuring_changes_neither_weights_nor_the_random_numbers() -> None:
    model = mlp(18, 6, 5, 4)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    measure(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), before, strict=True))


class Scaled(nn.Module):
    """Tied weights, a recurrent layer, buffers, and a tensor that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.norm = nn.LSTM(3, 4, batch_first=True), nn.BatchNorm1d(4)
        self.down, self.up = nn.Linear(4, 4), nn.Linear(4, 4)
        self.up.weight = self.down.weight
        self.scale = torch.tensor([1.0, 2.0, 0.5, 1.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(self.norm(self.recurrent(x)[0][:, -1])))) * self.scale


@pytest.mark.parametrize("inside", [False, True])
def test_networks_from_inference_mode_are_measured_as_others(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "time", SimpleNamespace(perf_counter=lambda: 0.0))  # no route is the faster one
    x, y = torch.randn(12, 5, 3, generator=generator(26)), torch.arange(12) % 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(26)
        plain = Scaled()
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        made = Scaled()
        made.load_state_dict(plain.state_dict())
    before, tensors = {k: v.clone() for k, v in made.state_dict().items()}, list(made.parameters())
    with torch.inference_mode(inside):
        found = measure(made, "all", data=(x, y))
    expected = measure(plain, "all", data=(x, y))
    assert found.to_dict() == expected.to_dict()
    assert found.function is not None
    assert found.function.robustness
    assert found.notes == expected.notes
    assert all(a is b for a, b in zip(made.parameters(), tensors, strict=True))
    assert all(t.is_inference() for t in (*made.parameters(), *made.buffers(), made.scale))
    assert made.up.weight is made.down.weight
    assert made.training
    assert all(torch.equal(before[k], v) for k, v in made.state_dict().items())
    with pytest.raises(UsageError, match=r"copy.deepcopy\(model\)"):
        gs.Regularizer(made, "dirichlet").loss(x)
    copied = copy.deepcopy(made)
    assert gs.Regularizer(copied, "dirichlet").loss(x).requires_grad


def test_networks_from_inference_mode_are_measured_as_they_are_now() -> None:
    x = torch.randn(8, 6, generator=generator(30))
    with torch.inference_mode():
        made = mlp(31, 6, 5, 3)
    for factor in (1.0, 2.0):
        with torch.inference_mode():
            made[2].weight.mul_(factor)
        function = measure(made, "dirichlet", data=(x, None)).function
        expected = measure(copy.deepcopy(made), "dirichlet", data=(x, None)).function
        assert function is not None
        assert expected is not None
        assert function.energies == expected.energies  # both in closed form


def test_a_prior_given_to_a_network_from_inference_mode_is_its_prior() -> None:
    x = torch.randn(8, 3, generator=generator(27))
    plain, prior = mlp(28, 3, 5, 2), mlp(29, 3, 5, 2)
    with torch.inference_mode():
        made = mlp(28, 3, 5, 2)
        made.load_state_dict(plain.state_dict())
    values = []
    for model in (plain, made):
        set_prior(model, prior)
        function = measure(model, "function_prior", data=(x, None)).function
        assert function is not None
        values.append(function.energies["function_prior"])
    assert values[0] == values[1]


@pytest.mark.parametrize("source", [{}, nn.ReLU()])
def test_nothing_to_measure(source: Any) -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        measure(source)


# Memory

MEASURE = """
import json, sys, torch
torch.set_num_threads(1)
from groundstate.measure import measure

def peak():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

measure({"w": torch.randn(200, 64)}, "all")  # loads scipy too, for the floors of hyperspherical energies
warm, calls = peak(), []
table = measure(sys.argv[1], "all", progress=lambda *a: calls.append(a))
print(json.dumps({"warm": warm, "peak": peak(), "calls": len(calls), "counts": table.summary()}))
"""
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc/self/status")


def transformer_file(path: Path, width: int, layers: int, vocabulary: int) -> tuple[int, int]:
    """Writes a transformer's weights piece by piece; returns how many tensors and the bytes of the largest."""
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for k in range(layers):
        names = {f"attn.{p}_proj.weight": (width, width) for p in "qkvo"}
        names |= {"mlp.up.weight": (4 * width, width), "mlp.down.weight": (width, 4 * width), "norm.weight": (width,)}
        shapes |= {f"model.layers.{k}.{n}": s for n, s in names.items()}
    head, at = {}, 0
    for name, shape in shapes.items():
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": (at, at := at + 4 * math.prod(shape))}
    raw, draw = json.dumps(head).encode(), np.random.default_rng(19)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for shape in shapes.values():
            file.write((draw.standard_normal(shape, dtype=np.float32) * 0.02).tobytes())
    return len(shapes), max(4 * math.prod(s) for s in shapes.values())


def measured(path: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@linux
def test_memory_of_a_file_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    count, largest = transformer_file(tmp_path / "model.safetensors", width=448, layers=6, vocabulary=2048)
    size = (tmp_path / "model.safetensors").stat().st_size
    found = measured(tmp_path / "model.safetensors")
    assert found["calls"] == found["counts"]["tensors"] == count
    assert found["counts"]["analyzed"] == 36
    # three times the largest tensor, and 30 MB for work space of decompositions, blocks of cosines and linear programs
    assert found["peak"] - found["warm"] <= 3 * largest + 30e6
    assert 3 * largest + 30e6 < size


@linux
@pytest.mark.slow
def test_memory_of_a_file_of_500_megabytes(tmp_path: Path) -> None:
    count, largest = transformer_file(tmp_path / "model.safetensors", width=1024, layers=7, vocabulary=32000)
    assert 480e6 < (tmp_path / "model.safetensors").stat().st_size < 520e6
    found = measured(tmp_path / "model.safetensors")
    assert found["calls"] == found["counts"]["tensors"] == count
    assert found["peak"] <= 3 * largest + 600e6


@pytest.mark.parametrize("energy", ["l1", "nuclear", "graph"])
def test_values_beyond_float32_agree_with_those_of_a_regularizer(energy: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.sign(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))) * 3e37)
    measured = measure(model, energy).totals[energy]
    assert math.isfinite(measured)
    assert gs.Regularizer(model, f"{energy}@monitor").values()[energy] == pytest.approx(measured, rel=1e-5)
