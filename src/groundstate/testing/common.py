"""Contracts of every energy: what it declares, and that it is a plain, frozen, readable value."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, is_dataclass
from typing import get_args

from groundstate.energies.base import Energy, Invariance, MatrixEnergy, NetworkEnergy
from groundstate.energies.registry import parse
from groundstate.testing.expect import expect

_OF_MATRICES = {"orthogonal", "permutation", "sign", "scale"}
_OF_NETWORKS = {"neuron_sign", "neuron_permutation", "scale"}


def traits_are_filled(energy: Energy) -> None:
    """Formula, reference, cost and docstring are there; degree and invariances make sense."""
    cls, traits = type(energy), energy.traits
    for field in ("formula", "reference", "cost"):
        expect(bool(getattr(traits, field).strip()), f"{energy!r}: traits.{field} is empty")
    degree = traits.degree
    expect(degree is None or math.isfinite(degree), f"{energy!r}: traits.degree must be finite or None, got {degree!r}")
    known = set(get_args(Invariance))
    if isinstance(energy, MatrixEnergy):
        known = _OF_MATRICES
    elif isinstance(energy, NetworkEnergy):
        known = _OF_NETWORKS
    unknown = [i for i in traits.invariances if i not in known]
    expect(not unknown, f"{energy!r}: unknown invariances {unknown} for this kind of energy; known: {sorted(known)}")
    expect("scale" not in traits.invariances or degree == 0, f"{energy!r}: invariance 'scale' means degree 0")
    own = (cls.__doc__ or "").strip()
    expect(bool(own) and not own.startswith(f"{cls.__name__}("), f"{energy!r}: the class has no docstring")


def examples_are_instances(energy: Energy) -> None:
    """``examples()`` gives at least one instance of the class, each of them different."""
    cls = type(energy)
    examples = cls.examples()
    expect(len(examples) > 0, f"{cls.__name__}.examples() is empty: contracts and benchmarks would see nothing")
    expect(all(type(e) is cls for e in examples), f"{cls.__name__}.examples() holds instances of another class")
    expect(len(set(examples)) == len(examples), f"{cls.__name__}.examples() holds the same instance twice")


def repr_parses_back(energy: Energy) -> None:
    """``parse(repr(e))`` is e, with strength and coupling too."""
    expect(type(energy).name.isidentifier(), f"the name {type(energy).name!r} cannot stand in a spec")
    for term in (1.0 * energy, 1e-3 * energy, (2.5e-7 * energy).via("monitor")):
        terms = parse(repr(term)).terms
        expect(terms == (term,), f"parse({repr(term)!r}) gives {terms!r}, expected the term that was printed")
    both = 0.5 * energy + energy.via("grad")
    expect(parse(repr(both)) == both, f"parse({repr(both)!r}) does not give back the sum")


def copies_are_equal(energy: Energy) -> None:
    """Pickle and deepcopy give an equal energy with equal hash, print and traits."""
    try:
        pickled = pickle.loads(pickle.dumps(energy))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(f"{energy!r} cannot be pickled: {error}") from error
    for how, other in (("pickle", pickled), ("deepcopy", copy.deepcopy(energy))):
        expect(type(other) is type(energy) and other == energy, f"{how} of {energy!r} gives {other!r}")
        expect(hash(other) == hash(energy), f"{how} of {energy!r} has another hash")
        expect(repr(other) == repr(energy), f"{how} of {energy!r} prints as {other!r}")
        expect(other.traits == energy.traits, f"{how} of {energy!r} has other traits")


def is_frozen(energy: Energy) -> None:
    """The energy is a dataclass whose fields, old or new, cannot be set."""
    expect(is_dataclass(energy), f"{type(energy).__name__} is not a dataclass")
    for field in (*type(energy).__dataclass_fields__, "anything"):
        try:
            setattr(energy, field, getattr(energy, field, None))
        except FrozenInstanceError:
            continue
        raise AssertionError(f"{energy!r}: {field!r} can be set; declare the class @dataclass(frozen=True, repr=False)")
