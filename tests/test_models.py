"""Networks come from a spec and a seed, and from nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from groundstate.errors import UsageError
from groundstate.training.models import build, resolve


@pytest.mark.parametrize(
    ("spec", "inputs", "classes", "expected"),
    [
        ("auto", 64, 10, "mlp:64-32-10"),
        ("auto", 784, 10, "mlp:784-28-10"),
        ("auto", 7, 3, "mlp:7-32-3"),
        ("mlp:784-28-10", 784, 10, "mlp:784-28-10"),
        ("mlp:5-2", 5, 2, "mlp:5-2"),
    ],
)
def test_resolve(spec: str, inputs: int, classes: int, expected: str) -> None:
    assert resolve(spec, inputs, classes) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "mlp",
        "mlp:",
        "mlp:5",
        "mlp:5-",
        "mlp:5--2",
        "mlp:5-0-2",
        "mlp:5-a-2",
        "cnn:5-2",
        "mlp:5-2\n",
        "mlp:\u0665-2",
    ],
)
def test_a_spec_that_cannot_be_read(spec: str) -> None:
    with pytest.raises(UsageError, match="mlp:784-28-10"):
        build(spec, 5, 2, seed=0)


@pytest.mark.parametrize("spec", ["mlp:6-3-2", "mlp:5-3-3"])
def test_sizes_must_fit_the_data(spec: str) -> None:
    with pytest.raises(UsageError, match=r"write mlp:5-\.\.\.-2"):
        build(spec, 5, 2, seed=0)


def test_layers() -> None:
    model = build("mlp:5-4-3-2", 5, 2, seed=0)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(p.shape) for p in model.parameters()] == [(4, 5), (4,), (3, 4), (3,), (2, 3), (2,)]
    assert [type(m) for m in build("mlp:5-2", 5, 2, seed=0)] == [nn.Linear]


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    a = build("auto", 64, 10, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    b, c = build("auto", 64, 10, seed=5).state_dict(), build("auto", 64, 10, seed=6).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a)


def test_initialization_is_that_of_torch() -> None:
    torch.manual_seed(5)
    expected = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in build("auto", 64, 10, seed=5).state_dict().items())
