"""Every registered energy keeps every contract; a new file brings them along; a broken energy fails each of them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from groundstate.energies import Energy, MatrixEnergy, NetworkEnergy, Traits, parse, register, registered, unregister
from groundstate.energies.base import Estimate
from groundstate.energies.dirichlet import Dirichlet
from groundstate.energies.entrywise import L1, Frobenius
from groundstate.energies.graph import GraphEnergy
from groundstate.energies.path_energy import PathEnergy
from groundstate.energies.spectral import Nuclear, OperatorNorm, StableRank
from groundstate.measure import measure
from groundstate.norms import spectral
from groundstate.testing import CONTRACTS, Contract, cases, check, contracts_for

NEW_ENERGY = '''
"""Huber's function of the singular values: quadratic for small ones, the nuclear norm for large ones."""

from dataclasses import dataclass

import torch

from groundstate.energies.base import Traits, require
from groundstate.energies.unitarily_invariant import SpectralProximable


@dataclass(frozen=True, repr=False)
class HuberNuclear(SpectralProximable):
    """Sum of s^2 / (2 delta) for singular values up to delta and s - delta / 2 above: smooth and convex."""

    delta: float = 1.0

    name = "huber_nuclear"
    traits = Traits(
        formula="sum_i huber_delta(sigma_i)",
        reference="Huber 1964, applied to singular values",
        cost="one SVD",
        convex=True,
        degree=None,
        invariances=("orthogonal", "permutation"),
        smooth=True,
    )

    def __post_init__(self):
        require(self.delta > 0, f"delta must be positive, got {self.delta!r}")

    @classmethod
    def examples(cls):
        return cls(), cls(delta=0.25)

    def _value(self, s):
        small = s.clamp_max(self.delta)
        return (small * (small / (2 * self.delta)) + (s - small)).sum(-1)

    def _gradient(self, s, tie):
        return (s / self.delta).clamp_max(1.0)

    def _prox(self, s, step):
        return torch.where(s > self.delta + step, s - step, s / (1 + step / self.delta))
'''


@pytest.mark.parametrize(("energy", "contract"), cases(), ids=str)
def test_contract(energy: Energy, contract: Contract) -> None:
    contract(energy)


@contextmanager
def registered_while(source: ModuleType | type[Energy]) -> Iterator[None]:
    register(source)
    try:
        yield
    finally:
        unregister(source)


@pytest.fixture
def new_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The energy above in a file of its own, loaded as a module."""
    path = tmp_path / "huber_nuclear_energy.py"
    path.write_text(NEW_ENERGY, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_one_file_adds_an_energy(new_module: ModuleType) -> None:
    with registered_while(new_module):
        assert registered()["huber_nuclear"] is new_module.HuberNuclear
        pairs = cases(new_module.HuberNuclear)
        # Two examples, each with its 5 common, 12 matrix, 1 invariance, 1 convexity and 3 proximal contracts.
        assert len(pairs) == 2 * 22
        for energy, contract in pairs:
            contract(energy)
        (term,) = parse("1e-3*huber_nuclear(delta=0.25)@prox").terms
        assert (term.strength, term.coupling, term.energy) == (1e-3, "prox", new_module.HuberNuclear(delta=0.25))
        first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
        with torch.no_grad():
            first.weight.copy_(torch.diag(torch.tensor([3.0, 0.5])))  # 3 - 1/2 + 0.5^2 / 2
            second.weight.copy_(torch.tensor([[3.0, 4.0]]))  # 5 - 1/2
        table = measure(model, "huber_nuclear")
        assert table.totals["huber_nuclear"] == pytest.approx(2.625 + 4.5, rel=1e-6)  # float32
    assert "huber_nuclear" not in registered()


@pytest.mark.parametrize(
    ("right", "wrong", "contract"),
    [
        ("(s / self.delta)", "(s / (1.001 * self.delta))", "matrices.gradient_equals_autograd"),
        ("degree=None", "degree=1.0", "matrices.homogeneous"),
        ('("orthogonal", "permutation")', '("orthogonal", "sign")', "matrices.invariant"),
        ("s / (1 + step / self.delta)", "s / (1 + 2 * step / self.delta)", "proximal.prox_minimizes"),
    ],
)
def test_a_mistake_in_a_new_file_is_named(tmp_path: Path, right: str, wrong: str, contract: str) -> None:
    assert right in NEW_ENERGY
    module = ModuleType("mistaken_energy")
    sys.modules["mistaken_energy"] = module
    try:
        exec(compile(NEW_ENERGY.replace(right, wrong), "mistaken_energy.py", "exec"), module.__dict__)
        with registered_while(module), pytest.raises(AssertionError, match=f"^{contract}: .*huber_nuclear"):
            check(module.HuberNuclear())
    finally:
        del sys.modules["mistaken_energy"]


# One broken energy for each contract, made from one that keeps it.


@dataclass(frozen=True, repr=False)
class Rounded(Frobenius):
    """Prints its field with two digits."""

    scale: float = 0.0

    @classmethod
    def examples(cls) -> Any:
        return (cls(scale=0.123456),)

    def __repr__(self) -> str:
        return f"mutant(scale={self.scale:.2f})"


class Thawed(Frobenius):
    """Not declared frozen itself, so it takes new attributes."""


def mutant(base: type[Energy], **changes: Any) -> Callable[[], Energy]:
    """An energy called ``mutant`` that is like ``base`` but for some methods or traits."""
    facts = {key: changes.pop(key) for key in list(changes) if key in Traits.__dataclass_fields__}
    body = {"__doc__": base.__doc__, "name": "mutant", "traits": replace(base.traits, **facts), **changes}
    return dataclass(frozen=True, repr=False)(type(f"Mutant{base.__name__}", (base,), body))


def scaled_gradient(base: Any, factor: float) -> Callable[..., Any]:
    def value_and_grad(self: Any, w: Any) -> Any:
        value, grad = base.value_and_grad(self, w)
        return value, [factor * g for g in grad] if isinstance(grad, list) else factor * grad

    return value_and_grad


def half_detached(base: Any) -> Callable[..., Tensor]:
    return lambda self, w: 0.5 * (base.value(self, w) + base.value(self, w).detach())


def draws(method: Callable[..., Any]) -> Callable[..., Any]:
    def drawing(self: Any, *args: Any) -> Any:
        torch.rand(())
        return method(self, *args)

    return drawing


def dense(w: Tensor) -> Tensor:
    """Reads the memory as if the weight were contiguous, where there is enough of it."""
    return w if 0 in w.stride() else torch.as_strided(w, w.shape, torch.empty(w.shape, device="meta").stride())


def full_polar(self: Any, w: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = spectral.svd(w)
    return s.sum(-1), (u @ vh).to(w.dtype)


def first_pair(self: Any, w: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = spectral.svd(w)
    return s[..., 0], (u[..., :1] @ vh[..., :1, :]).to(w.dtype)


def aliasing(self: Any, blocks: Any) -> dict[str, Tensor]:
    return PathEnergy.init(self, blocks) | {f"last/{name}": w.detach() for name, w in blocks.items()}


def doubled_term(self: Any, state: Any, blocks: Any) -> tuple[Tensor, dict[str, Tensor]]:
    value, grads = PathEnergy.term(self, state, blocks)
    return 2 * value, grads


def per_batch(self: Any, w: Tensor) -> Tensor:
    return Frobenius.value(self, w) / (w.shape[0] if w.ndim > 2 else 1)


def unsafe_prox(self: Any, w: Tensor, step: float) -> Tensor:
    return w * (1 - step / torch.linalg.vector_norm(w, dim=(-2, -1), keepdim=True)).clamp_min(0)


def brittle_gradient(self: Any, layers: Any) -> tuple[Tensor, list[Tensor]]:
    value, grads = GraphEnergy.value_and_grad(self, layers)
    return value, [g * (value / value) for g in grads]


def exact(value: Callable[..., Any]) -> Callable[[], Energy]:
    """A Dirichlet energy with another value, without random probes."""
    return mutant(Dirichlet, value=value)


def plain_dirichlet(self: Any, f: Any, x: Tensor, y: Any = None, *, probe: Any) -> Tensor:
    """As one would write it: differentiates at x itself, in the mode the network is in."""
    x.requires_grad_()
    out = f(x)
    rows = [torch.autograd.grad(out[:, c].sum(), x, create_graph=True)[0] for c in range(out.shape[1])]
    return torch.stack([r.square().sum() for r in rows]).sum() / len(x)


def around(change: Callable[[Tensor, Any], Tensor]) -> Callable[..., Tensor]:
    def value(self: Any, f: Any, x: Tensor, y: Any = None, *, probe: Any) -> Tensor:
        return change(Dirichlet.value(self, f, x, y, probe=probe), f)

    return value


def forgiving(self: Any, f: Any, x: Tensor, y: Any = None, *, probe: Any) -> Tensor:
    return Dirichlet.value(self, f, x.nan_to_num(0.0, 0.0, 0.0), y, probe=probe)


MUTANTS: dict[str, Callable[[], Energy]] = {
    "common.traits_are_filled": mutant(Frobenius, reference=" "),
    "common.examples_are_instances": mutant(Frobenius, examples=classmethod(lambda cls: ())),
    "common.repr_parses_back": lambda: mutant(Rounded)(scale=0.123456),  # pyright: ignore[reportCallIssue]
    "common.copies_are_equal": mutant(Frobenius, __reduce__=lambda self: (Frobenius, ())),
    "common.is_frozen": Thawed,
    "matrices.batch_equals_loop": mutant(Frobenius, value=per_batch),
    "matrices.shapes_and_dtypes_are_kept": mutant(Frobenius, value=lambda self, w: Frobenius.value(self, w)[..., None]),
    "matrices.single_agrees_with_double": mutant(
        L1, value=lambda self, w: L1.value(self, w.bfloat16() if w.dtype == torch.float32 else w)
    ),
    "matrices.layout_does_not_matter": mutant(L1, value=lambda self, w: L1.value(self, dense(w))),
    "matrices.inputs_and_generators_are_left_alone": mutant(L1, value=draws(L1.value)),
    "matrices.nonfinite_weights_are_named": mutant(L1, value=lambda self, w: L1.value(self, w.nan_to_num())),
    "matrices.gradient_equals_autograd": mutant(Nuclear, value_and_grad=scaled_gradient(Nuclear, 1 + 1e-6)),
    "matrices.gradient_matches_differences": mutant(
        L1, value=half_detached(L1), value_and_grad=MatrixEnergy.value_and_grad
    ),
    "matrices.homogeneous": mutant(Frobenius, degree=2.0),
    "matrices.invariant": mutant(L1, invariances=("orthogonal",)),
    "matrices.convex": mutant(StableRank, convex=True),
    "degenerate.finite_at_degenerate_weights": mutant(Frobenius, value=lambda self, w: w.square().sum((-2, -1)).sqrt()),
    "degenerate.gradient_is_zero_at_zero": mutant(
        L1, value_and_grad=lambda self, w: (L1.value(self, w.detach()), torch.where(w < 0, -1.0, 1.0).to(w.dtype))
    ),
    "degenerate.gradient_lies_in_the_range": mutant(Nuclear, value_and_grad=full_polar),
    "degenerate.gradient_is_shared_among_ties": mutant(OperatorNorm, value_and_grad=first_pair),
    "proximal.prox_minimizes": mutant(Nuclear, prox=lambda self, w, step: Nuclear.prox(self, w, 1.01 * step)),
    "proximal.prox_is_safe": mutant(Frobenius, prox=unsafe_prox),
    "proximal.prox_is_stationary": mutant(Nuclear, prox=lambda self, w, step: Nuclear.prox(self, w, 1.01 * step)),
    "proximal.duality": mutant(Frobenius, dual=lambda self, g: 0.99 * Frobenius.dual(self, g)),
    "proximal.lmo_attains_the_dual": mutant(Nuclear, lmo=lambda self, g: -Nuclear.lmo(self, g)),
    "proximal.moreau": mutant(L1, prox=lambda self, w, step: L1.prox(self, w, 0.99 * step)),
    "networks.finite_at_degenerate_layers": mutant(GraphEnergy, value_and_grad=brittle_gradient),
    "networks.layout_does_not_matter": mutant(
        GraphEnergy, value=lambda self, layers: GraphEnergy.value(self, [dense(w) for w in layers])
    ),
    "networks.inputs_and_generators_are_left_alone": mutant(
        GraphEnergy, value_and_grad=draws(GraphEnergy.value_and_grad)
    ),
    "networks.nonfinite_layers_are_named": mutant(
        GraphEnergy, value=lambda self, layers: GraphEnergy.value(self, [w.nan_to_num() for w in layers])
    ),
    "networks.gradient_equals_autograd": mutant(GraphEnergy, value_and_grad=scaled_gradient(GraphEnergy, 1 + 1e-6)),
    "networks.gradient_matches_differences": mutant(
        GraphEnergy, value=half_detached(GraphEnergy), value_and_grad=NetworkEnergy.value_and_grad
    ),
    "networks.homogeneous": mutant(GraphEnergy, degree=2.0),
    "networks.invariant": mutant(
        GraphEnergy, value=lambda self, layers: GraphEnergy.value(self, layers) + layers[0][0].abs().sum()
    ),
    "functions.probes_decide_alone": exact(around(lambda value, f: value * (1 + torch.rand(())))),
    "functions.leaves_no_trace": exact(plain_dirichlet),
    "functions.works_in_every_mode": exact(around(lambda value, f: value * (1 + float(torch.is_grad_enabled())))),
    "functions.estimates_are_plain": mutant(
        Dirichlet, estimate=lambda self, f, x, y=None, *, probe: Estimate(float("nan"), None, len(x))
    ),
    "functions.finite_at_degenerate_networks": exact(around(lambda value, f: value * (value / value).detach())),
    "functions.bad_inputs_are_named": exact(forgiving),
    "functions.gradient_matches_differences": exact(around(lambda value, f: 0.5 * (value + value.detach()))),
    "functions.homogeneous": mutant(Dirichlet, degree=1.0),
    "trajectories.state_is_a_mapping_of_tensors": mutant(
        PathEnergy, init=lambda self, blocks: PathEnergy.init(self, blocks) | {"note": 1.0}
    ),
    "trajectories.state_is_independent_of_the_weights": mutant(PathEnergy, init=aliasing),
    "trajectories.term_has_its_gradient": mutant(
        PathEnergy, term=doubled_term
    ),
    "trajectories.rebase_counts_no_jump": mutant(PathEnergy, rebase=lambda self, state, blocks: (state, 0.0)),
    "trajectories.finite_along_degenerate_paths": mutant(
        PathEnergy, value=lambda self, state: PathEnergy.value(self, state).float()
    ),
    "trajectories.inputs_and_generators_are_left_alone": mutant(PathEnergy, observe=draws(PathEnergy.observe)),
    "trajectories.summary_is_plain": mutant(PathEnergy, summary=lambda self, state: {"path_energy": float("nan")}),
    "trajectories.explains_itself": mutant(PathEnergy, explain=lambda self, strength, optimizer: ""),
    "trajectories.homogeneous": mutant(PathEnergy, degree=1.0),
}  # fmt: skip


def test_every_contract_has_a_broken_energy() -> None:
    names = [contract.name for contract in CONTRACTS]
    assert len(set(names)) == len(names)
    assert set(names) == set(MUTANTS)


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
def test_a_broken_energy_is_caught(contract: Contract) -> None:
    energy = MUTANTS[contract.name]()
    assert contract in contracts_for(energy)
    cls = type(energy)
    with registered_while(cls), pytest.raises(AssertionError) as caught:
        contract(energy)
    assert repr(energy) in str(caught.value) or cls.__name__ in str(caught.value)


def test_what_is_not_declared_is_not_asked() -> None:
    assert {"matrices.homogeneous", "matrices.invariant"} <= {c.name for c in contracts_for(StableRank())}  # degree 0
    names = {contract.name for contract in contracts_for(StableRank())}
    assert not names & {"matrices.convex", "proximal.prox_minimizes", "proximal.duality", "networks.invariant"}
    measured_only = mutant(StableRank, differentiable=False)()
    assert not {c.name for c in contracts_for(measured_only)} & {
        "matrices.gradient_equals_autograd",
        "degenerate.gradient_is_zero_at_zero",
    }
    for contract in contracts_for(measured_only):
        if not contract.name.startswith("common."):  # those read its spec, for which it must be registered
            contract(measured_only)
