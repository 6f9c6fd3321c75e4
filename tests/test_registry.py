"""Energies are found by name and specs are read; what cannot be read is refused with the nearest name."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import groundstate.energies as package
from groundstate.energies import COUPLINGS, Energy, Sum, Term, get, parse, register, registered, registry, unregister
from groundstate.energies.capabilities import Dualizable, Proximable
from groundstate.energies.entrywise import Frobenius, SquaredFrobenius
from groundstate.energies.path_energy import PathEnergy
from groundstate.energies.spectral import KyFan, LogDet, Nuclear, Schatten
from groundstate.errors import UsageError

NAMES = (
    "frobenius", "graph", "k_support", "ky_fan", "l1", "log_det", "nuclear", "operator", "path_energy", "schatten",
    "squared_frobenius", "stable_rank",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Halved(Frobenius):
    """Half of the Frobenius norm, under a name of its own."""

    name: ClassVar[str] = "halved"
    aliases: ClassVar[tuple[str, ...]] = ("half_frobenius",)

    def value(self, w: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().value(w)


@pytest.fixture
def halved() -> Any:
    register(Halved)
    yield Halved
    unregister(Halved)


def test_every_energy_in_the_folder_is_found() -> None:
    found = registered()
    assert set(NAMES) <= set(found)
    assert list(found) == sorted(found)
    for name, cls in found.items():
        assert cls.name == name
        assert get(name) is cls
        assert get(cls.__name__) is cls
        assert getattr(package, cls.__name__) is cls


def test_the_readme_has_a_row_of_every_energy_with_its_options_and_capabilities() -> None:
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    cells = [line.strip("|").split("|") for line in text.partition("## Energies")[2].splitlines() if line[:3] == "| `"]
    listed: list[str] = []
    for first, *others in cells:
        for spec in re.findall("`([^`]+)`", first):
            name, _, given = spec.rstrip(")").partition("(")
            cls = registered()[name]
            listed.append(name)
            fields = cls.__dataclass_fields__
            options = [option.partition("=") for option in given.split(", ") if option]
            if all(value for *_, value in options):
                assert repr(parse(spec)) == name, f"{spec} is not {name} with its defaults"
            assert {option for option, *_ in options} >= {k for k, f in fields.items() if f.default is MISSING}
            assert {option for option, *_ in options} <= set(fields)
            if len(others) == 3:
                able = tuple(issubclass(cls, kind) for kind in (Proximable, Dualizable))
                assert tuple(o.strip() == "yes" for o in others[1:]) == able, spec
    assert sorted(listed) == [n for n, c in registered().items() if c.__module__.startswith("groundstate.")]


def test_an_unknown_class_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NuclearFusion"):
        _ = package.NuclearFusion


def test_registered_by_hand_and_taken_back(halved: type[Energy]) -> None:
    register(halved)  # a second time is no second energy
    assert registered()["halved"] is halved
    assert get("half_frobenius") is halved
    assert parse("2*half_frobenius") == Sum((Term(2.0, Halved()),))
    unregister(halved)
    assert "halved" not in registered()
    unregister(halved)  # no longer there: nothing happens
    with pytest.raises(UsageError, match="unknown energy 'halved'"):
        get("halved")


def test_an_entry_point_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("plugin_energies")
    cls = type("Halved", (Halved,), {"name": "from_plugin", "__module__": "plugin_energies"})
    vars(module).update(Halved=cls, imported=Halved)  # what a module merely imports is not its own
    monkeypatch.setitem(__import__("sys").modules, "plugin_energies", module)
    point = EntryPoint("any", "plugin_energies", "groundstate.energies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "groundstate.energies" else [])
    assert registered()["from_plugin"] is cls
    assert "halved" not in registered()


def test_two_energies_of_one_name_are_refused() -> None:
    other = type("Other", (Halved,), {"name": "nuclear"})
    register(other)
    try:
        with pytest.raises(UsageError, match=r"two energies are named 'nuclear': .*Nuclear and .*Other; rename"):
            registered()
    finally:
        unregister(other)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("none", Sum()),
        ("", Sum()),
        ("  nuclear ", Sum.of(Nuclear())),
        ("1e-3*nuclear", Sum.of(1e-3 * Nuclear())),
        ("nuclear*1e-3", Sum.of(1e-3 * Nuclear())),
        ("2*(3*nuclear)", Sum.of(6.0 * Nuclear())),
        ("0*nuclear", Sum.of(0.0 * Nuclear())),
        ("schatten(p=0.5)", Sum.of(Schatten(p=0.5))),
        ("Schatten(p=0.5)", Sum.of(Schatten(p=0.5))),
        ("path_energy(clock='lr')", Sum.of(PathEnergy(clock="lr"))),
        ("1e-4*nuclear@prox", Sum.of((1e-4 * Nuclear()).via("prox"))),
        ("(1e-4*nuclear)@prox", Sum.of((1e-4 * Nuclear()).via("prox"))),
        ("(nuclear + 2*ky_fan(k=2))@monitor", Sum.of(Nuclear().via("monitor"), (2.0 * KyFan(k=2)).via("monitor"))),
        ("0.5*(nuclear + 2*frobenius)", Sum.of(0.5 * Nuclear(), 1.0 * Frobenius())),
        (
            "1e-3*nuclear + 1e-4*path_energy + log_det(eps=0.1)@grad",
            1e-3 * Nuclear() + 1e-4 * PathEnergy() + LogDet(eps=0.1).via("grad"),
        ),
    ],
)
def test_specs(spec: str, expected: Sum) -> None:
    assert parse(spec) == expected
    assert parse(repr(expected)) == expected


terms = st.builds(
    Term,
    # Any finite strength: repr of a float reads back exactly.
    st.floats(min_value=0, max_value=1e300),
    st.one_of(
        st.just(Nuclear()),
        st.builds(Schatten, p=st.floats(min_value=1e-3, max_value=100)),
        st.builds(KyFan, k=st.integers(1, 10**6)),
        st.builds(LogDet, eps=st.floats(min_value=1e-30, max_value=1e30)),
        st.builds(PathEnergy, clock=st.sampled_from(["step", "lr"])),
    ),
    st.sampled_from([None, *COUPLINGS]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(terms, max_size=4))
def test_what_is_printed_reads_back(parts: list[Term]) -> None:
    total = Sum(tuple(parts))
    assert parse(repr(total)) == total


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nuclaer", "unknown energy 'nuclaer'. Did you mean 'nuclear'?"),
        ("1e-3*nuclear + pathenergy", "Did you mean 'path_energy'?"),
        ("zzz", "unknown energy 'zzz'. Known: "),
        ("-1*nuclear", "must be finite and not negative"),
        ("1e999*nuclear", "must be finite and not negative"),
        ("nuclear -", "cannot read the energy"),
        ("nuclear - l1", "cannot read"),
        ("nuclear*l1", "expected number*energy"),
        ("True*nuclear", "expected number*energy"),
        ("3", "cannot read '3'"),
        ("nuclear@proxy", "coupling must be one of loss, grad, prox, monitor, got 'proxy'"),
        ("nuclear@3", "after @ comes loss, grad, prox or monitor"),
        ("(2*nuclear@prox + l1)@grad", "2.0*nuclear@prox names its coupling already, and @grad in"),
        ("schatten", "'schatten' has an option missing"),
        ("schatten(0.5)", "give options by name"),
        ("schatten(q=0.5)", "no option 'q'"),
        ("schatten(p=0.5, **x)", "give options by name"),
        ("schatten(p=open('x'))", "options must be plain numbers or strings"),
        ("schatten(p=-1)", "p must be finite and positive, got -1"),
        ("ky_fan(k=0)", "k must be a whole number from 1, got 0"),
        ("comhe(rate=0.1)", "rate=0.1 of comhe plays no part with projection='random'"),
        ("comhe(projection='group', count=3)", "count=3 of comhe plays no part with projection='group'"),
        ("comhe(projection='group', seed=3)", "seed=3 of comhe plays no part"),
        ("dirichlet(estimator='exact', probes=2)", "probes=2 of dirichlet plays no part with estimator='exact'"),
        ("dirichlet(estimator='vjp', sigma=0.1)", "sigma=0.1 of dirichlet plays no part with estimator='vjp'"),
        ("jacobian_nuclear(method='exact', cut='0')", "cut='0' of jacobian_nuclear plays no part with method='exact'"),
        ("jacobian_nuclear(method='factorized', route='loop')", "route='loop' of jacobian_nuclear plays no part"),
        ("jacobian_nuclear(estimator='exact', sigma=0.1)", "sigma=0.1 of jacobian_nuclear plays no part"),
        ("function_prior(c=0, prior_seed=1)", "prior_seed=1 of function_prior plays no part with c=0"),
        ("nuclear(smoothin=1)", "no option 'smoothin'. Did you mean 'smoothing'?"),
        ("__import__('os').system('true')", "cannot read"),
        ("lambda: nuclear", "cannot read"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(spec: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "spec", ["schatten(p='a')", "nuclear(smoothing='x')", "path_energy(clock=3)", "ky_fan(k=1.5)", "graph(absolute=1)"]
)
def test_an_option_of_the_wrong_type_is_refused(spec: str) -> None:
    with pytest.raises(UsageError):
        parse(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "(" * 300 + "nuclear" + ")" * 300,
        "nuclear" + " + nuclear" * 5000,
        "-" * 5000 + "nuclear",
        "nuclear\0",
        "nucl\u00e9",
    ],
    ids=("parentheses", "terms", "signs", "null", "accent"),
)
def test_hostile_specs_end_in_a_short_usage_error(spec: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_only_energies_can_be_added() -> None:
    assert Nuclear() + SquaredFrobenius() == Sum.of(Nuclear(), SquaredFrobenius())
    assert 2 * (0.5 * Nuclear() + Frobenius()) == Nuclear() + 2.0 * Frobenius()
    with pytest.raises(UsageError, match="only energies can be added, got int"):
        _ = Nuclear() + 3  # pyright: ignore[reportOperatorIssue]
