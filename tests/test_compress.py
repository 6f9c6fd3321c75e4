"""Factors are the best of their rank, are used only where they are smaller, and the account of them is true."""

from __future__ import annotations

import copy
import json
import math
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import groundstate as gs
from groundstate.compress import Compressed, Factorized, compress, truncate
from groundstate.compressed_folder import load
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
    assert same(load(tmp_path / "small"), smaller.model)
    names = {r.name for r in measure(tmp_path / "small", "nuclear").rows}
    assert names == set(smaller.model.state_dict())
    assert stat.S_IMODE((tmp_path / "small" / "model.safetensors").stat().st_mode) & 0o400
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_other_models_are_rebuilt_from_their_dense_form(tmp_path: Path) -> None:
    smaller = saved(tmp_path, Tied(), tolerance=1e-3)
    with pytest.raises(UsageError, match="give the dense model"):
        load(tmp_path / "small")
    rebuilt: Any = load(tmp_path / "small", Tied())
    assert same(rebuilt, smaller.model)
    assert rebuilt.a[0].weight is rebuilt.b[0].weight
    with pytest.raises(DataError):
        load(tmp_path / "small", mlp(22))


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
            load(tmp_path / "small")


@pytest.mark.parametrize(
    "change",
    [
        {"layers": {"0": 10**9}},
        {"layers": {"0": -1}},
        {"layers": {"1": 2}},
        {"layers": {"../../x": 2}},
        {"layers": {}},
        {"layers": 7},
        {"architecture": [{"type": "Linear", "in": 10**6, "out": 10**6, "bias": True, "dtype": "float32"}]},
        {"architecture": [{"type": "Linear", "in": 10**40, "out": 1, "bias": True, "dtype": "float32"}]},
        {"architecture": [{"type": "eval"}]},
        {"architecture": 3},
    ],
)
def test_description_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    saved(tmp_path, mlp(26), rank=2)
    path = tmp_path / "small" / "compressed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError) as caught:
        load(tmp_path / "small")
    assert "\n" not in str(caught.value)


def test_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        load(tmp_path)
