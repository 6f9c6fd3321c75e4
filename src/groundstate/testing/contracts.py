"""Which contracts an energy must keep: chosen by its capabilities, none skipped inside.

Idea: capabilities are types (`MatrixEnergy`, `Proximable`, ...), so the table below says it all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from groundstate.energies.base import Energy, FunctionEnergy, MatrixEnergy, NetworkEnergy, TrajectoryEnergy
from groundstate.energies.capabilities import Dualizable, Proximable
from groundstate.energies.registry import registered
from groundstate.testing import common, degenerate, functions, matrices, networks, proximal, trajectories


@dataclass(frozen=True)
class Contract:
    """One promise, as a function of an energy that raises ``AssertionError`` where it is broken.

    Attributes:
        run: The function; its docstring is the promise.
        applies: Whether the promise is asked of an energy.
    """

    run: Callable[[Any], None]
    applies: Callable[[Energy], bool]

    @property
    def name(self) -> str:
        """The name of the promise, e.g. ``matrices.gradient_equals_autograd``."""
        return f"{self.run.__module__.rpartition('.')[2]}.{self.run.__name__}"

    def __call__(self, energy: Energy) -> None:
        self.run(energy)

    def __str__(self) -> str:
        return self.name


def _group(*runs: Callable[[Any], None], when: Callable[[Energy], bool]) -> tuple[Contract, ...]:
    return tuple(Contract(run, when) for run in runs)


def _matrix(energy: Energy) -> bool:
    return isinstance(energy, MatrixEnergy)


def _network(energy: Energy) -> bool:
    return isinstance(energy, NetworkEnergy)


def _function(energy: Energy) -> bool:
    return isinstance(energy, FunctionEnergy)


def _trajectory(energy: Energy) -> bool:
    return isinstance(energy, TrajectoryEnergy)


def _prox(energy: Energy) -> bool:
    return isinstance(energy, MatrixEnergy) and isinstance(energy, Proximable)


def _dual(energy: Energy) -> bool:
    return isinstance(energy, MatrixEnergy) and isinstance(energy, Dualizable)


def _differentiable(kind: Callable[[Energy], bool]) -> Callable[[Energy], bool]:
    return lambda energy: kind(energy) and energy.traits.differentiable


def _homogeneous(kind: Callable[[Energy], bool]) -> Callable[[Energy], bool]:
    return lambda energy: kind(energy) and energy.traits.degree is not None


def _invariant(kind: Callable[[Energy], bool]) -> Callable[[Energy], bool]:
    return lambda energy: kind(energy) and bool(energy.traits.invariances)


CONTRACTS: tuple[Contract, ...] = (
    *_group(
        common.traits_are_filled,
        common.examples_are_instances,
        common.repr_parses_back,
        common.copies_are_equal,
        common.is_frozen,
        when=lambda energy: True,
    ),
    *_group(
        matrices.batch_equals_loop,
        matrices.shapes_and_dtypes_are_kept,
        matrices.single_agrees_with_double,
        matrices.layout_does_not_matter,
        matrices.inputs_and_generators_are_left_alone,
        matrices.nonfinite_weights_are_named,
        when=_matrix,
    ),
    *_group(matrices.gradient_equals_autograd, matrices.gradient_matches_differences, when=_differentiable(_matrix)),
    *_group(matrices.homogeneous, when=_homogeneous(_matrix)),
    *_group(matrices.invariant, when=_invariant(_matrix)),
    *_group(matrices.convex, when=lambda energy: _matrix(energy) and energy.traits.convex),
    *_group(degenerate.finite_at_degenerate_weights, when=_matrix),
    *_group(degenerate.gradient_is_zero_at_zero, when=_differentiable(_matrix)),
    *_group(
        degenerate.gradient_lies_in_the_range,
        degenerate.gradient_is_shared_among_ties,
        when=_differentiable(_invariant(_matrix)),
    ),
    *_group(proximal.prox_minimizes, proximal.prox_is_safe, when=_prox),
    *_group(
        proximal.prox_is_stationary,
        when=lambda energy: (
            _differentiable(_prox)(energy) and (energy.traits.smooth or energy.traits.degree is not None)
        ),
    ),
    *_group(proximal.duality, proximal.lmo_attains_the_dual, when=_dual),
    *_group(proximal.moreau, when=lambda energy: _prox(energy) and _dual(energy) and proximal.is_norm(energy)),
    *_group(
        networks.finite_at_degenerate_layers,
        networks.layout_does_not_matter,
        networks.inputs_and_generators_are_left_alone,
        networks.nonfinite_layers_are_named,
        when=_network,
    ),
    *_group(networks.gradient_equals_autograd, networks.gradient_matches_differences, when=_differentiable(_network)),
    *_group(networks.homogeneous, when=_homogeneous(_network)),
    *_group(networks.invariant, when=_invariant(_network)),
    *_group(
        functions.probes_decide_alone,
        functions.leaves_no_trace,
        functions.works_in_every_mode,
        functions.estimates_are_plain,
        functions.finite_at_degenerate_networks,
        functions.bad_inputs_are_named,
        when=_function,
    ),
    *_group(
        functions.gradient_matches_differences,
        when=lambda energy: _function(energy) and not energy.traits.surrogate,
    ),
    *_group(functions.homogeneous, when=_homogeneous(_function)),
    *_group(
        trajectories.state_is_a_mapping_of_tensors,
        trajectories.state_is_independent_of_the_weights,
        trajectories.term_has_its_gradient,
        trajectories.rebase_counts_no_jump,
        trajectories.finite_along_degenerate_paths,
        trajectories.inputs_and_generators_are_left_alone,
        trajectories.summary_is_plain,
        trajectories.explains_itself,
        when=_trajectory,
    ),
    *_group(trajectories.homogeneous, when=_homogeneous(_trajectory)),
)


def contracts_for(energy: Energy) -> tuple[Contract, ...]:
    """Returns the contracts that the energy must keep, by its capabilities and traits."""
    return tuple(contract for contract in CONTRACTS if contract.applies(energy))


def cases(*classes: type[Energy]) -> list[tuple[Energy, Contract]]:
    """Returns every example of the energies with each of its contracts, for ``pytest.mark.parametrize``.

    Args:
        classes: Energies; by default every registered one.
    """
    energies = [example for cls in (classes or tuple(registered().values())) for example in cls.examples()]
    return [(energy, contract) for energy in energies for contract in contracts_for(energy)]


def check(energy: Energy) -> None:
    """Runs every contract of one energy.

    Raises:
        AssertionError: the first broken contract, with the energy, the input and the numbers.
    """
    for contract in contracts_for(energy):
        try:
            contract(energy)
        except AssertionError as error:
            raise AssertionError(f"{contract.name}: {error}") from error
