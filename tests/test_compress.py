"""Factors are the best of their rank, are used only where they are smaller, and the account of them is true."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import groundstate as gs
from groundstate.cli.main import app
from groundstate.compress import Compressed, Factorized, LayerRow, compress, truncate
from groundstate.compress_output import output_change
from groundstate.compress_tune import fine_tune
from groundstate.compressed_folder import load_compressed
from groundstate.errors import DataError, NonFiniteError, UsageError
from groundstate.measure import measure


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(seed: int, m: int, n: int, r: int, noise: float = 0.0) -> Tensor:
    g = generator(seed)
    a, b = torch.randn(m, r, generator=g), torch.randn(r, n, generator=g)
    return a @ b + noise * torch.randn(m, n, generator=g)


def mlp(seed: int, noise: float = 1e-3) -> nn.Sequential:
    """64-48-40-10 with weights of rank 5 and a little noise."""
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 10))
    for k, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            layer.weight.data = low_rank(seed + k, layer.out_features, layer.in_features, 5, noise)
    return model


def relative(approximate: Tensor, exact: Tensor) -> float:
    return float((approximate - exact).norm() / exact.norm())


def test_the_package_gives_the_function() -> None:
    assert gs.compress is compress


def test_truncation_is_the_best_of_its_rank_and_counts_the_smaller_storage() -> None:
    w = torch.randn(20, 30, generator=generator(1), dtype=torch.float64)
    s = torch.linalg.svdvals(w)
    for tolerance in (0.0, 0.3, 0.6, 0.9):
        cut, rank, parameters = truncate(w, tolerance)
        assert rank == int((s >= tolerance * s[0]).sum())
        assert parameters == min(20 * 30, rank * 50)
        # Eckart-Young, in float64
        assert float((cut - w).norm()) == pytest.approx(float(s[rank:].norm()), abs=1e-12)
        assert float((cut - w).norm()) <= tolerance * float(s[0]) * math.sqrt(20) + 1e-12


def test_truncation_at_zero_drops_rounding_only() -> None:
    w = low_rank(2, 40, 30, 4)
    cut, rank, parameters = truncate(w, 0.0)
    assert (rank, parameters) == (4, 4 * 70)
    assert relative(cut, w) < 1e-5  # float32
    assert truncate(torch.zeros(5, 4), 0.0)[1:] == (0, 0)
    assert truncate(torch.zeros(0, 4), 0.0)[1:] == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_truncation_keeps_shape_and_dtype(dtype: torch.dtype) -> None:
    w = torch.randn(8, 3, 3, 3, generator=generator(3)).to(dtype)
    cut, _, parameters = truncate(w, 0.5)
    assert (cut.shape, cut.dtype) == (w.shape, dtype)
    assert parameters <= w.numel()


def test_factored_layers_compute_the_truncated_layer_and_the_error_is_exact() -> None:
    model = mlp(4, noise=0.05)
    smaller = compress(model, tolerance=0.1)
    x = torch.randn(17, 64, generator=generator(5))
    reference = copy.deepcopy(model)
    for name, layer in reference.named_modules():
        if isinstance(layer, nn.Linear):
            row = next(r for r in smaller.rows if r.name == name)
            cut, rank, parameters = truncate(layer.weight, 0.1)
            assert (row.rank, row.parameters_after) == (rank, parameters)
            if row.factored:
                assert row.relative_error == pytest.approx(relative(cut, layer.weight.detach()), rel=1e-3)  # float32
                layer.weight.data = cut
    with torch.no_grad():
        assert relative(smaller.model(x), reference(x)) < 1e-5  # float32, three layers


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"padding": 2, "padding_mode": "circular", "bias": False},
    ],
)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_convolutions_of_any_geometry(kind: Any, geometry: dict[str, Any]) -> None:
    conv = kind(6, 16, 3, **geometry)
    conv.weight.data = low_rank(6, 16, conv.weight[0].numel(), 3).reshape(conv.weight.shape)
    smaller = compress(nn.Sequential(conv), tolerance=1e-4)
    x = torch.randn(2, 6, *([9] * (conv.weight.ndim - 2)), generator=generator(7))
    (row,) = smaller.rows
    assert (row.factored, row.rank, row.parameters_after) == (True, 3, 3 * (16 + conv.weight[0].numel()))
    with torch.no_grad():
        assert relative(smaller.model(x), conv(x)) < 1e-5  # float32


def test_rules_choose_the_rank() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight.data = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))

    def rank(**rule: Any) -> int | None:
        return compress(model, **rule).rows[0].rank

    assert [rank(tolerance=t) for t in (0.0, 0.25, 0.26, 0.9)] == [4, 3, 2, 1]
    # squares 16, 4, 1, 0.25 of 21.25
    assert [rank(energy=e) for e in (0.5, 16 / 21.25, 0.76, 20 / 21.25, 0.96, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert [rank(rank=r) for r in (1, 3, 9)] == [1, 3, 4]


def test_layer_that_would_grow_is_left_with_the_reason() -> None:
    model = mlp(8)
    smaller = compress(model, rank=9)
    last = smaller.rows[-1]
    assert (last.name, last.factored, last.parameters_after) == ("4", False, 400)
    assert "9 * (10 + 40) = 450 parameters, not fewer than 400" in last.reason
    assert smaller.model.get_submodule("4").weight is not model[4].weight
    assert torch.equal(smaller.model.state_dict()["4.weight"], model.state_dict()["4.weight"])


def test_account_of_parameters_bytes_time_and_accuracy() -> None:
    model = mlp(9)
    seen: list[nn.Module] = []

    def accuracy(m: nn.Module) -> float:
        seen.append(m)
        return 0.5

    smaller = compress(model, tolerance=0.05, evaluate=accuracy, example=torch.ones(4, 64))
    totals = smaller.totals
    assert totals["parameters_before"] == sum(p.numel() for p in model.parameters())
    assert totals["parameters_after"] == sum(p.numel() for p in smaller.model.parameters())
    biases = 48 + 40 + 10
    assert totals["parameters_after"] == sum(r.parameters_after for r in smaller.rows) + biases
    assert totals["bytes_after"] == 4 * totals["parameters_after"]
    assert totals["ratio"] == totals["parameters_after"] / totals["parameters_before"]
    assert totals["latency_ms_before"] > 0
    assert totals["latency_ms_after"] > 0
    assert seen == [model, smaller.model]
    assert totals["accuracy_before"] == totals["accuracy_after"] == 0.5
    json.dumps(smaller.to_dict(), allow_nan=False)


def test_original_random_numbers_modes_and_dtype_stay() -> None:
    model = mlp(10).to(torch.float64)
    model[0].eval()
    model[2].requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    smaller = compress(model, tolerance=0.05, example=torch.ones(1, 64, dtype=torch.float64))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(v.dtype == torch.float64 for v in smaller.model.state_dict().values())
    assert not any(p.requires_grad for p in smaller.model.get_submodule("2").parameters())
    assert not smaller.model.get_submodule("0").training
    assert smaller.model.get_submodule("2").training


def test_names_are_those_of_a_plain_sequence_of_two_layers() -> None:
    smaller = compress(mlp(11), tolerance=0.05)
    assert {"0.0.weight", "0.1.weight", "0.1.bias"} <= set(smaller.model.state_dict())
    plain = nn.Sequential(nn.Linear(64, 5, bias=False), nn.Linear(5, 48))
    plain.load_state_dict(smaller.model.get_submodule("0").state_dict())
    x = torch.ones(1, 64)
    assert torch.equal(plain(x), smaller.model.get_submodule("0")(x))


def test_model_that_is_one_layer() -> None:
    layer = nn.Linear(20, 20)
    layer.weight.data = low_rank(12, 20, 20, 2)
    smaller = compress(layer, tolerance=0.01)
    assert isinstance(smaller.model, Factorized)
    assert smaller.model.rank == 2


class Tied(nn.Module):
    """Two layers with one weight, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30)
        self.d = self.c
        self.a.weight.data, self.c.weight.data = low_rank(13, 30, 30, 3), low_rank(14, 30, 30, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x))))


def test_tied_layers_share_their_factors() -> None:
    model = Tied()
    smaller = compress(model, tolerance=1e-3)
    new: Any = smaller.model
    assert new.a[0].weight is new.b[0].weight
    assert new.a[1].bias is not new.b[1].bias
    assert new.c is new.d
    assert smaller.totals["parameters_after"] == 2 * 3 * 60 + 3 * 30
    assert [r.parameters_after for r in smaller.rows] == [180, 0, 180]
    x = torch.randn(5, 30, generator=generator(15))
    with torch.no_grad():
        assert relative(new(x), model(x)) < 1e-4  # float32 through four layers of norm about 30


def test_what_cannot_be_factored_says_why() -> None:
    tied = nn.Linear(6, 50, bias=False)
    embedding = nn.Embedding(50, 6)
    tied.weight = embedding.weight
    model = nn.ModuleDict(
        {
            "embedding": embedding,
            "tied": tied,
            "grouped": nn.Conv2d(8, 8, 3, groups=2),
            "transposed": nn.ConvTranspose2d(8, 8, 3),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(9, 9)),
            "attention": nn.MultiheadAttention(8, 2),
            "plain": nn.Linear(30, 30),
        }
    )
    reasons = {r.name: r.reason for r in compress(model, rank=2).rows}
    assert "shared with embedding" in reasons["tied"]
    assert "groups=2" in reasons["grouped"]
    assert "ConvTranspose2d" in reasons["transposed"]
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"]
    assert reasons["plain"] == ""
    assert all(reasons[k] for k in reasons if k != "plain")


def test_transformer_layer_that_reads_its_weights_still_runs() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
    for linear, k in ((layer.linear1, 16), (layer.linear2, 17)):
        linear.weight.data = 0.1 * low_rank(k, linear.out_features, linear.in_features, 3)
    smaller = compress(layer, tolerance=1e-3)
    x = torch.randn(2, 5, 16, generator=generator(18))
    for module in (layer, smaller.model):
        module.eval()
    with torch.no_grad():
        assert relative(smaller.model(x), layer(x)) < 1e-5  # float32
    assert smaller.totals["ratio"] < 0.6


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "exactly one"),
        ({"rank": 2, "energy": 0.5}, "rank"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"rank": 0}, "rank"),
        ({"rank": 2.5}, "rank"),
        ({"rank": True}, "rank"),
    ],
)
def test_rule_that_cannot_be_used(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compress(mlp(19), **rule)


def test_models_that_cannot_be_compressed() -> None:
    with pytest.raises(UsageError, match="no linear or convolution layer"):
        compress(nn.Sequential(nn.ReLU()), rank=1)
    with pytest.raises(UsageError, match="Embedding"):
        compress(nn.Embedding(9, 9), rank=1)
    model = mlp(20)
    with torch.no_grad():
        next(model[2].parameters())[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="'2'"):
        compress(model, rank=1)


# On disk


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return list(one) == list(two) and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


def saved(tmp_path: Path, model: nn.Module, **rule: Any) -> Compressed:
    smaller = compress(model, **rule)
    smaller.save(tmp_path / "small")
    return smaller


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sequence_is_rebuilt_from_its_folder_alone(tmp_path: Path, dtype: torch.dtype) -> None:
    smaller = saved(tmp_path, mlp(21).to(dtype), tolerance=0.05)
    assert same(load_compressed(tmp_path / "small"), smaller.model)
    names = {r.name for r in measure(tmp_path / "small", "nuclear").rows}
    assert names == set(smaller.model.state_dict())
    assert stat.S_IMODE((tmp_path / "small" / "model.safetensors").stat().st_mode) & 0o400
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_other_models_are_rebuilt_from_their_dense_form(tmp_path: Path) -> None:
    smaller = saved(tmp_path, Tied(), tolerance=1e-3)
    with pytest.raises(UsageError, match="give the dense model"):
        load_compressed(tmp_path / "small")
    rebuilt: Any = load_compressed(tmp_path / "small", Tied())
    assert same(rebuilt, smaller.model)
    assert rebuilt.a[0].weight is rebuilt.b[0].weight
    with pytest.raises(DataError):
        load_compressed(tmp_path / "small", mlp(22))


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    smaller = saved(tmp_path, mlp(23), rank=2)
    with pytest.raises(UsageError, match="exists"):
        smaller.save(tmp_path / "small")


def test_every_single_flipped_bit_of_the_weights_is_found(tmp_path: Path) -> None:
    saved(tmp_path, mlp(24), rank=2)
    path = tmp_path / "small" / "model.safetensors"
    whole = path.read_bytes()
    g = generator(25)
    for _ in range(30):
        at = int(torch.randint(len(whole), (), generator=g))
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="compress the model again"):
            load_compressed(tmp_path / "small")


def linear(inputs: int, outputs: int) -> dict[str, Any]:
    """A linear layer as a description has it."""
    options = {"in_features": inputs, "out_features": outputs, "bias": True}
    return {"type": "Linear", "options": options, "dtype": "float32"}


@pytest.mark.parametrize(
    "change",
    [
        {"layers": {"0": 10**9}},
        {"layers": {"0": -1}},
        {"layers": {"1": 2}},
        {"layers": {"../../x": 2}},
        {"layers": {}},
        {"layers": 7},
        {"architecture": linear(10**6, 10**6)},
        {"architecture": linear(10**40, 1)},
        {"architecture": linear(-1, 1)},
        {"architecture": linear(64, 48) | {"dtype": "int64"}},
        {"architecture": linear(64, 48) | {"options": {"in_features": 64}}},
        {"architecture": {"type": "ReLU", "options": {"inplace": False}}},
        {"architecture": {"type": "Sequential", "parts": {"a.b": linear(64, 48)}}},
        {"architecture": {"type": "eval", "options": {}}},
        {"architecture": [linear(64, 48)]},
        {"architecture": 3},
    ],
)
def test_description_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    saved(tmp_path, mlp(26), rank=2)
    path = tmp_path / "small" / "compressed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError) as caught:
        load_compressed(tmp_path / "small")
    assert "\n" not in str(caught.value)


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load_compressed(tmp_path)


def convolutional(seed: int) -> nn.Sequential:
    """Layers of many kinds, nested, in sequence."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
    model = nn.Sequential(
        stem,
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(12, 16, (3, 1), stride=(1, 2), padding="valid" if seed % 2 else (1, 0), padding_mode="circular"),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d((2, 2)),
        nn.Flatten(),
        nn.LayerNorm(64),
        nn.GELU(approximate="tanh"),
    )
    model.add_module("head", nn.Linear(64, 30))
    norm: Any = stem[1]
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2.0)
    torch.random.set_rng_state(torch_state)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolutional_sequence_is_rebuilt_without_its_code(tmp_path: Path, dtype: torch.dtype) -> None:
    smaller = saved(tmp_path, convolutional(30).to(dtype), rank=3)
    assert sum(r.factored for r in smaller.rows) == 3
    rebuilt = load_compressed(tmp_path / "small")
    assert same(rebuilt, smaller.model)
    assert not any(m.training for m in rebuilt.modules())
    x = torch.randn(3, 2, 8, 8, generator=generator(31), dtype=dtype)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), smaller.model.eval()(x))


@pytest.mark.parametrize(
    "odd",
    [
        nn.AvgPool2d(2, divisor_override=3),
        nn.MaxPool2d(2, return_indices=True),
        nn.Bilinear(2, 2, 2),
        nn.PReLU(),
        nn.utils.parametrizations.weight_norm(nn.Linear(30, 30)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_what_a_description_cannot_say_needs_the_dense_model(tmp_path: Path, odd: nn.Module) -> None:
    saved(tmp_path, nn.Sequential(nn.Linear(30, 30), odd), rank=2)
    with pytest.raises(UsageError, match="give the dense model"):
        load_compressed(tmp_path / "small")


@pytest.mark.parametrize("damage", ["shape", "dtype", "missing", "unknown"])
def test_tensor_that_does_not_fit_is_named_even_if_the_checksum_is_right(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, mlp(27), rank=2)
    weights, description = (tmp_path / "small" / name for name in ("model.safetensors", "compressed.json"))
    tensors = load_file(weights)
    name = "2.1.weight"
    change = {
        "shape": {name: torch.ones(2, 40)},
        "dtype": {name: tensors[name].half()},
        "unknown": {"9.w": torch.ones(1)},
    }
    tensors |= change.get(damage, {})
    if damage == "missing":
        del tensors[name]
    save_file(tensors, weights)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    description.write_text(json.dumps(json.loads(description.read_text()) | {"sha256": digest}))
    for dense in (None, mlp(27)):
        with pytest.raises(DataError, match="9.w" if damage == "unknown" else name):
            load_compressed(tmp_path / "small", dense)


# By the output


def ragged(seed: int, samples: int, features: int) -> Tensor:
    """Inputs whose second moment is far from the identity, and singular."""
    x = torch.randn(samples, features, generator=generator(seed)) * torch.logspace(1, -2, features)
    x[:, features // 2] = 0
    return x + 0.3


def named(model: nn.Module, rows: list[LayerRow]) -> dict[str, tuple[LayerRow, Any]]:
    return {r.name: (r, model.get_submodule(r.name)) for r in rows if r.factored}


@pytest.mark.parametrize("aware", [True, False], ids=["data", "weights"])
@pytest.mark.parametrize("tolerance", [0.02, 0.2])
def test_output_tolerance_is_kept_and_no_rank_can_be_lowered(tolerance: float, aware: bool) -> None:
    model, x = mlp(40, noise=0.4).double(), ragged(41, 700, 64).double()
    smaller = compress(model, output_tolerance=tolerance, data=x, data_aware=aware)
    with torch.no_grad():
        y, z = model(x), smaller.model(x)
        assert relative(z, y) == pytest.approx(smaller.totals["output_change"], rel=1e-9)
        assert smaller.totals["output_change"] <= tolerance
        assert output_change(model, smaller.model, x) == pytest.approx(smaller.totals["output_change"], rel=1e-12)
        for layer, _ in ((m, r) for r, m in named(smaller.model, smaller.rows).values()):
            a, b = layer[0].weight.data, layer[1].weight.data
            layer[0].weight.data, layer[1].weight.data = a[:-1], b[:, :-1]  # the last term is the least
            assert layer.rank == 1 or relative(smaller.model(x), y) > tolerance
            layer[0].weight.data, layer[1].weight.data = a, b


@pytest.mark.parametrize("aware", [True, False], ids=["data", "weights"])
def test_errors_of_each_layer_are_what_they_say(aware: bool) -> None:
    model, x = mlp(42, noise=0.4).double(), ragged(43, 600, 64).double()
    smaller = compress(model, output_tolerance=0.3, data=x, data_aware=aware)
    with torch.no_grad():
        inputs = x
        for name, layer in model.named_children():
            if isinstance(layer, nn.Linear):
                row = next(r for r in smaller.rows if r.name == name)
                assert row.factored
                part: Any = smaller.model.get_submodule(name)
                exact, cut = inputs @ layer.weight.mT, inputs @ part.weight.mT
                assert row.output_error == pytest.approx(relative(cut, exact), rel=1e-5)  # root of a float64 Gram
                assert row.relative_error == pytest.approx(relative(part.weight, layer.weight), rel=1e-9)
                alone = copy.deepcopy(model)
                alone.get_submodule(name).weight = nn.Parameter(part.weight)
                assert row.network_error == pytest.approx(relative(alone(x), model(x)), rel=1e-9)
                assert row.rank is not None
                tail = torch.linalg.svdvals(exact)[row.rank :].norm() / exact.norm()
                if aware:
                    assert row.output_error == pytest.approx(float(tail), rel=1e-5)
                else:
                    assert row.output_error >= float(tail) * (1 - 1e-5)
            inputs = layer(inputs)
    assert {r.method for r in smaller.rows} == {"data-aware svd" if aware else "svd"}


@pytest.mark.parametrize("shape", [(50, 20), (20, 50), (30, 30)], ids=str)
def test_data_aware_factors_are_the_best_of_their_rank_for_the_output(shape: tuple[int, int]) -> None:
    """||(W - B A) X||_F is the tail of the singular values of W X, by Eckart and Young; X is not of full rank."""
    layer = nn.Linear(shape[1], shape[0]).double()
    layer.weight.data = torch.randn(shape, generator=generator(44), dtype=torch.float64)
    x = ragged(45, 400, shape[1]).double()
    smaller = compress(layer, output_tolerance=0.1, data=x).model
    assert isinstance(smaller, Factorized)
    y = x @ layer.weight.detach().mT
    best = torch.linalg.svdvals(y)[smaller.rank :].norm()
    assert float((x @ smaller.weight.detach().mT - y).norm()) == pytest.approx(float(best), rel=1e-9)
    weights = compress(layer, rank=smaller.rank).model
    assert isinstance(weights, Factorized)
    assert (x @ weights.weight.detach().mT - y).norm() > 1.2 * best


def test_data_that_show_few_directions_take_few_parameters() -> None:
    """Weights of full rank, inputs of rank 6: the first layer needs no more, whatever the tolerance."""
    model = nn.Sequential(nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 20))
    x = low_rank(46, 500, 60, 6)
    sizes = {
        aware: compress(model, output_tolerance=1e-3, data=x, data_aware=aware).rows[0].parameters_after
        for aware in (True, False)
    }
    assert sizes[True] <= 6 * 120
    assert sizes[False] == 3600


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("channels", [(3, 40), (16, 12)], ids=str)
def test_convolutions_by_their_output(kind: Any, channels: tuple[int, int]) -> None:
    conv = kind(*channels, 3, padding=1, stride=2).double()
    dimensions = conv.weight.ndim - 2
    x = torch.randn(20, channels[0], *([8] * dimensions), generator=generator(47), dtype=torch.float64)
    x = x + 3 * x.mean(1, keepdim=True)
    smaller = compress(nn.Sequential(conv), output_tolerance=0.3, data=x)
    (row,) = smaller.rows
    assert row.factored
    with torch.no_grad():
        bias = conv.bias.reshape(-1, *([1] * dimensions))
        y = conv(x) - bias
        assert row.output_error == pytest.approx(relative(smaller.model(x) - bias, y), rel=1e-6)
        assert row.rank is not None
        tail = torch.linalg.svdvals(y.movedim(1, -1).flatten(0, -2))[row.rank :].norm() / y.norm()
        assert row.output_error == pytest.approx(float(tail), rel=1e-6)  # root of a float64 Gram matrix


def test_tied_layers_modes_and_the_original_stay() -> None:
    model = Tied()
    model.a.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    smaller = compress(model, output_tolerance=0.05, data=ragged(48, 100, 30))
    new: Any = smaller.model
    assert new.a[0].weight is new.b[0].weight
    assert new.c is new.d
    assert [r.parameters_after for r in smaller.rows][1] == 0
    assert smaller.rows[0].output_error == smaller.rows[1].output_error
    assert not new.a.training
    assert not new.a[0].training
    assert new.b[0].training
    assert model.training
    assert not model.a.training
    assert not model.a._forward_hooks
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Two(nn.Module):
    """Two inputs, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y)


def test_several_inputs_and_a_layer_that_the_data_do_not_reach() -> None:
    x, y = low_rank(49, 60, 20, 3), low_rank(50, 60, 20, 2)
    rows = {r.name: r for r in compress(Two(), output_tolerance=0.01, data=(x, y)).rows}
    assert (rows["a"].rank, rows["b"].rank) == (3, 2)
    assert not rows["idle"].factored
    assert rows["idle"].reason == "the data give it no output"


def test_tolerance_that_nothing_smaller_keeps() -> None:
    model = nn.Sequential(nn.Linear(20, 20, bias=False))
    model[0].weight.data = torch.eye(20)
    x = torch.randn(500, 20, generator=generator(51))
    smaller = compress(model, output_tolerance=0.01, data=x)
    assert not smaller.rows[0].factored
    assert "within the tolerance" in smaller.rows[0].reason
    assert smaller.totals["output_change"] == 0.0


def test_output_rule_that_cannot_be_used() -> None:
    model, x = mlp(52), torch.ones(3, 64)
    for tolerance in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="output_tolerance"):
            compress(model, output_tolerance=tolerance, data=x)
    with pytest.raises(UsageError, match="go together"):
        compress(model, output_tolerance=0.1)
    with pytest.raises(UsageError, match="go together"):
        compress(model, rank=1, data=x)
    for data in (torch.ones(0, 64), (), (x, torch.ones(4, 64)), [x], torch.tensor(1.0)):
        with pytest.raises(UsageError, match="data must"):
            compress(model, output_tolerance=0.1, data=data)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NonFiniteError, match="outputs on the data"):
        compress(model, output_tolerance=0.1, data=x * math.nan)
    with pytest.raises(UsageError, match="all zero"):
        compress(nn.Sequential(nn.Linear(9, 9, bias=False)), output_tolerance=0.1, data=torch.zeros(3, 9))


# Large matrices


def test_large_matrix_of_a_small_rank_takes_a_randomized_svd_that_is_known_to_be_good() -> None:
    n, rank = 1024, 8
    g = generator(53)
    u, v = (torch.linalg.qr(torch.randn(n, 40, generator=g)).Q for _ in range(2))
    layer = nn.Linear(n, n, bias=False)
    layer.weight.data = u * 2.0 ** -torch.arange(40) @ v.mT
    smaller = compress(layer, rank=rank)
    (row,) = smaller.rows
    assert row.method == "randomized svd"
    assert row.randomized is not None
    # The tail of a geometric sequence: sigma_9 = 2^-8, and the norms of tail and whole as 2^-8
    assert row.relative_error == pytest.approx(2.0**-8, rel=1e-2)
    assert 2.0**-8 * (1 - 1e-4) <= row.randomized.spectral <= 2 * 2.0**-8
    assert row.randomized.from_best is not None
    assert 1 <= row.randomized.from_best <= 2
    best = row.randomized.best_frobenius
    assert best is None or best <= row.relative_error * (1 + 1e-2)
    json.dumps(smaller.to_dict(), allow_nan=False)
    assert torch.equal(
        compress(layer, rank=rank).model.state_dict()["0.weight"], smaller.model.state_dict()["0.weight"]
    )


def test_randomized_svd_that_is_too_far_from_the_best_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from groundstate import compress_factors as module

    monkeypatch.setattr(module, "_LARGE", 100)
    layer = nn.Linear(120, 120, bias=False)
    # a flat spectrum: the leading directions are hardly told from the others
    layer.weight.data = torch.linalg.qr(torch.randn(120, 120, generator=generator(54))).Q
    layer.weight.data *= torch.linspace(1.0, 0.5, 120)
    row = compress(layer, rank=15).rows[0]
    exact = torch.linalg.svdvals(layer.weight.detach().double())
    assert row.method == "svd"
    assert row.relative_error == pytest.approx(float(exact[15:].norm() / exact.norm()), rel=1e-5)  # float32
    monkeypatch.setattr(module, "_ALLOWED", 2.0)
    row = compress(layer, rank=15).rows[0]
    assert row.method == "randomized svd"
    assert row.randomized is not None
    assert row.randomized.best_frobenius == pytest.approx(float(exact[15:].norm() / exact.norm()), rel=1e-4)  # float32


def test_share_of_the_norm_of_a_large_matrix_is_kept_for_certain_by_an_adaptive_svd() -> None:
    n, energy = 512, 0.99
    g = generator(55)
    u, v = (torch.linalg.qr(torch.randn(k, n, generator=g, dtype=torch.float64)).Q for k in (600, n))
    s = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    layer = nn.Linear(n, 600, bias=False)
    layer.weight.data = (u * s @ v.mT).float()
    state = torch.random.get_rng_state()
    smaller = compress(layer, energy=energy)
    assert torch.equal(state, torch.random.get_rng_state())
    (row,) = smaller.rows
    mass = s.square().cumsum(0)
    least = int((mass < energy * mass[-1]).sum()) + 1
    assert row.method == "adaptive svd"
    assert row.rank is not None
    assert least <= row.rank <= least + 2
    weight = layer.weight.detach().double()
    error = weight - smaller.model.get_submodule("").weight.detach().double()  # pyright: ignore[reportCallIssue]
    assert float(error.norm() / weight.norm()) == pytest.approx(row.relative_error, rel=1e-4)  # float32
    assert row.relative_error <= math.sqrt(1 - energy) * (1 + 1e-5)  # float32
    assert row.randomized is not None
    assert float(torch.linalg.matrix_norm(error, 2)) <= row.randomized.spectral <= 2 * float(s[row.rank])
    assert row.randomized.failure <= 1e-10
    json.dumps(smaller.to_dict(), allow_nan=False)


def test_flat_spectra_and_thresholds_take_the_full_svd() -> None:
    layer = nn.Linear(512, 512, bias=False)
    layer.weight.data = torch.randn(512, 512, generator=generator(56))
    layer.weight.data[:, :200] *= 4
    s = torch.linalg.svdvals(layer.weight.detach().double())
    for energy in (0.5, 1.0):
        row = compress(layer, energy=energy).rows[0]
        mass = s.square().cumsum(0)
        assert row.rank == int((mass < energy * mass[-1] * (1 - 1e-12)).sum()) + 1
        assert (row.method, row.randomized) == ("svd" if row.factored else "", None)
    layer.weight.data = low_rank(57, 512, 512, 9)
    assert compress(layer, tolerance=0.1).rows[0].method == "svd"
    layer.weight.data.zero_()
    assert compress(layer, energy=0.9).rows[0].rank == 1


# Fine-tune


def labeled(seed: int, samples: int = 300) -> tuple[Tensor, Tensor]:
    x = torch.randn(samples, 64, generator=generator(seed))
    with torch.no_grad():
        return x, mlp(60, noise=0.4)(x).argmax(1)


def test_fine_tune_trains_the_factors_alone_and_always_alike() -> None:
    data = labeled(61)
    smaller = compress(mlp(60, noise=0.4), rank=4).model
    smaller.get_submodule("2").requires_grad_(False)
    smaller.append(nn.Dropout(0.1))
    before, state = copy.deepcopy(smaller.state_dict()), torch.random.get_rng_state()
    one, two = (fine_tune(smaller, data, epochs=3, lr=1e-2, seed=5) for _ in range(2))
    other = fine_tune(smaller, data, epochs=3, lr=1e-2, seed=6)
    assert same(one.model, two.model)
    assert one.losses == two.losses != other.losses
    assert one.losses[2] < 0.7 * one.losses[0]
    assert torch.equal(state, torch.random.get_rng_state())
    changed = {k for k, v in one.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{layer}.{k}" for layer in (0, 4) for k in ("0.weight", "1.weight", "1.bias")}
    assert all(torch.equal(v, before[k]) for k, v in smaller.state_dict().items())
    assert all(p.grad is None for m in (smaller, one.model) for p in m.parameters())


def test_fine_tune_keeps_dense_layers_statistics_modes_and_ties() -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30), nn.Linear(30, 30), nn.Linear(30, 4))
    model[2].weight = model[0].weight
    model[1].eval()
    smaller = compress(model, rank=4)
    assert [r.factored for r in smaller.rows] == [True, True, False]
    new: Any = fine_tune(smaller.model, (torch.randn(40, 30), torch.arange(40) % 4), 2).model
    assert new[0][0].weight is new[2][0].weight
    assert not torch.equal(new[0][0].weight, smaller.model.get_submodule("0.0").weight)
    assert torch.equal(new[3].weight, model[3].weight)
    assert torch.equal(new[1].running_mean, torch.zeros(30))
    assert new.training
    assert not new[1].training


def test_fine_tune_that_cannot_be_done() -> None:
    x, y = labeled(62, 20)
    smaller = compress(mlp(63), rank=3).model
    for options, words in (
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1, "lr": 0.0}, "lr"),
        ({"epochs": 1, "lr": math.inf}, "lr"),
        ({"epochs": 1, "seed": -1}, "seed"),
        ({"epochs": 1, "batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(UsageError, match=words):
            fine_tune(smaller, (x, y), **options)
    for data in ((x, y[1:]), (x[:0], y[:0])):
        with pytest.raises(UsageError, match="classes"):
            fine_tune(smaller, data, 1)
    with pytest.raises(UsageError, match="compress it first"):
        fine_tune(mlp(63), (x, y), 1)
    with pytest.raises(NonFiniteError, match="learning rate"):
        fine_tune(smaller, (x * math.inf, y), 1)


# On the command line


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compress") / "run"
    made = call("train", "--epochs", 2, "--energy", "1e-2*nuclear", "--train-size", 400, "--out", folder)
    assert made.exit_code == 0, made.stderr
    return folder


def test_verb_by_output_tolerance_with_fine_tune_saves_what_it_says(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    arguments = ("compress", run, "--output-tolerance", 0.2, "--data", "digits", "--out", out)
    result = call(*arguments, "--fine-tune", 2, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["totals"]["output_change"] <= 0.2
    assert 0 < found["test_output_change"] < 1
    assert set(found["test_accuracy"]) == {"before", "after", "before_fine_tune"}
    assert json.loads((out / "compressed.json").read_text())["fine_tune"] == found["fine_tune"]
    assert len(found["fine_tune"]["losses"]) == 2
    assert found["totals"]["accuracy_after"] == found["fine_tune"]["accuracy_after"]
    from groundstate.training.data import load
    from groundstate.training.evaluation import accuracy_and_loss

    sets = load("digits", train_size=400)
    rebuilt = load_compressed(out)
    assert accuracy_and_loss(rebuilt, sets.test_x, sets.test_y)[0] == found["test_accuracy"]["after"]
    assert accuracy_and_loss(rebuilt, sets.val_x, sets.val_y)[0] == found["totals"]["accuracy_after"]


def test_verb_prints_errors_of_outputs_and_names_its_folder(run: Path) -> None:
    result = call("compress", run, "--output-tolerance", 0.2, "--weights-only")
    assert result.exit_code == 0, result.stderr
    words = " ".join(result.stdout.split())  # a narrow terminal folds the header
    assert "alone" in words
    assert "logits" in words
    assert (run / "compressed-output-tolerance-0.2-weights-only" / "model.safetensors").exists()
    for arguments, words in (
        (("--rank", 3, "--weights-only"), "--weights-only goes with"),
        (("--rank", 3, "--fine-tune-lr", 0.1), "goes with --fine-tune"),
        (("--rank", 3, "--fine-tune", 0), "epochs"),
        (("--output-tolerance", 2), "output_tolerance"),
        (("--rank", 3, "--data", "mnits"), "mnist"),
        (("--rank", 3, "--output-tolerance", 0.1), "exactly one"),
    ):
        refused = call("compress", run, *arguments)
        assert refused.exit_code == 2, arguments
        assert words in refused.stderr
