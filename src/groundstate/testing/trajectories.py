"""Contracts of the energies of a sequence of weights: the state, its independence of the weights, the added term."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from groundstate.energies.base import TrajectoryEnergy
from groundstate.testing import samples
from groundstate.testing.expect import expect, expect_close, size, untouched

Blocks = dict[str, Tensor]
_RATES = (0.1, 0.05, 0.2, 0.1)


def path(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> list[Blocks]:
    """Returns five random points of two blocks."""
    return [
        {
            "a": (scale * samples.normal((3, 2), 500 + i)).to(dtype),
            "b": (scale * samples.normal((4,), 510 + i)).to(dtype),
        }
        for i in range(len(_RATES) + 1)
    ]


def walk(energy: TrajectoryEnergy, points: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the state after the points, with one learning rate for all blocks of a step."""
    state = energy.init(points[0])
    for blocks, rate in zip(points[1:], _RATES):
        state = energy.observe(state, blocks, dict.fromkeys(blocks, rate))
    return state


def state_is_a_mapping_of_tensors(energy: TrajectoryEnergy) -> None:
    """The state can be saved: names to tensors without a graph; a copy of it goes on as the original does."""
    points = path()
    state = walk(energy, points[:3])
    for name, tensor in state.items():
        saved = isinstance(name, str) and isinstance(tensor, Tensor) and not tensor.requires_grad
        expect(saved, f"{energy!r}: the state entry {name!r} is not a plain tensor, so it cannot be saved")
    copy = {name: tensor.clone() for name, tensor in state.items()}
    for later in points[3:]:
        state = energy.observe(state, later, dict.fromkeys(later, 0.1))
        copy = energy.observe(copy, later, dict.fromkeys(later, 0.1))
    expect(state.keys() == copy.keys(), f"{energy!r}: a copied state gets other entries")
    expect(all(torch.equal(state[k], copy[k]) for k in state), f"{energy!r}: a copied state goes on differently")


def state_is_independent_of_the_weights(energy: TrajectoryEnergy) -> None:
    """The weights change in place after ``init`` and ``observe``, as optimizers do; the state must not follow."""
    points = path()
    weights = {name: w.clone() for name, w in points[0].items()}
    state = energy.init(weights)
    for blocks, rate in zip(points[1:], _RATES):
        for name, w in blocks.items():
            weights[name].copy_(w)
        state = energy.observe(state, weights, dict.fromkeys(weights, rate))
    for w in weights.values():
        w.fill_(1e6)
    expected = walk(energy, points)
    same = all(torch.equal(state[k], expected[k]) for k in expected)
    expect(same, f"{energy!r}: the state shares memory with the weights")


def homogeneous(energy: TrajectoryEnergy) -> None:
    """A path scaled by c has |c|^d times the energy, for the declared degree d."""
    degree = energy.traits.degree
    if degree is None:
        return
    value = energy.value(walk(energy, path()))
    for c in (2.0, -0.3):
        scaled = energy.value(walk(energy, path(scale=c)))
        what = f"{energy!r}: E of the path times {c:g} against |{c:g}|^{degree:g} E"
        expect_close(scaled, abs(c) ** degree * value, 1e-10 * size(abs(c) ** degree * value), what)


def term_has_its_gradient(energy: TrajectoryEnergy) -> None:
    """The gradient of the added term is the central difference of its value; zero before the first step."""
    points = path()
    start = energy.init(points[0])
    expect(size(*energy.term(start, points[0])[1].values()) == 0.0, f"{energy!r}: a term before the first step")
    state = walk(energy, points)
    now = {name: w + 0.1 * samples.normal(w.shape, 530) for name, w in points[-1].items()}
    value, grads = energy.term(state, now)
    for seed in (531, 532):
        away = {name: samples.normal(w.shape, seed) for name, w in now.items()}
        h = 1e-4
        ends = [energy.term(state, {n: w + s * h * away[n] for n, w in now.items()})[0].double() for s in (1, -1)]
        slope = sum(float((grads[n] * away[n]).sum()) for n in now)
        bound = 1e-6 * (size(*grads.values()) + size(value)) * sum(w.numel() for w in now.values())
        what = f"{energy!r}: <gradient of the term, D> against central differences"
        expect_close(torch.tensor(slope), ((ends[0] - ends[1]) / (2 * h)).cpu(), bound, what)


def rebase_counts_no_jump(energy: TrajectoryEnergy) -> None:
    """``rebase`` leaves the energy as it is, returns the length of the jump, and the path goes on from there."""
    points = path()
    state = walk(energy, points[:3])
    before = energy.value(state).clone()
    jump = {name: samples.normal(w.shape, 540) for name, w in points[2].items()}
    moved = {name: w + jump[name] for name, w in points[2].items()}
    state, length = energy.rebase(state, moved)
    expected = math.sqrt(sum(float(j.square().sum()) for j in jump.values()))
    expect_close(torch.tensor(length), torch.tensor(expected), 1e-6 * expected, f"{energy!r}: length of the jump")
    expect_close(energy.value(state), before, 1e-12 * size(before), f"{energy!r}: rebase changed the energy")
    shifted = {name: w + jump[name] for name, w in points[3].items()}
    state = energy.observe(state, shifted, dict.fromkeys(shifted, _RATES[2]))
    straight = walk(energy, points[:4])
    value = energy.value(straight)
    expect_close(energy.value(state), value, 1e-10 * size(value), f"{energy!r}: a step after rebase counts the jump")


def finite_along_degenerate_paths(energy: TrajectoryEnergy) -> None:
    """Weights at rest, half precisions and scales from 1e-25 to 1e25 give a finite float64 value and no NaN."""
    for dtype in samples.FLOATS:
        still = path(dtype)[:1] * 4
        value = energy.value(walk(energy, still))
        expect(
            value.dtype == torch.float64 and value.shape == (), f"{energy!r}: the value is {value.dtype} {value.shape}"
        )
        expect(bool(value.isfinite()), f"{energy!r}: weights at rest in {dtype} give {float(value)}")
        for scale in (1.0,) if dtype == torch.float16 else (1.0, *samples.EXTREMES):
            points = path(dtype, scale)
            value = energy.value(walk(energy, points))
            exact = energy.value(walk(energy, [{n: w.double() for n, w in blocks.items()} for blocks in points]))
            what = f"{energy!r} of a path in {dtype} near {scale:g} against float64"
            expect_close(value, exact, 10 * torch.finfo(dtype).eps * size(exact), what)


def inputs_and_generators_are_left_alone(energy: TrajectoryEnergy) -> None:
    """Nothing changes the weights or a global generator."""
    points = path()
    for blocks in points:
        for w in blocks.values():
            w.requires_grad_()
    tensors = [w for blocks in points for w in blocks.values()]
    with untouched(tensors, f"{energy!r}: init and observe"):
        state = walk(energy, points)
    with untouched([*tensors, *state.values()], f"{energy!r}: value, summary and term"):
        energy.value(state)
        energy.summary(state)
        energy.term(state, points[-1])


def summary_is_plain(energy: TrajectoryEnergy) -> None:
    """``summary`` gives floats by name, finite once the weights have moved."""
    figures = energy.summary(walk(energy, path()))
    expect(bool(figures), f"{energy!r}: the summary is empty")
    for name, figure in figures.items():
        expect(isinstance(figure, float) and math.isfinite(figure), f"{energy!r}: summary[{name!r}] is {figure!r}")


def explains_itself(energy: TrajectoryEnergy) -> None:
    """``explain`` says what a small term does to common optimizers."""
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    optimizers = (torch.optim.SGD([weight], lr=0.1, momentum=0.5), torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    for optimizer in (*optimizers, torch.optim.AdamW([weight], lr=0.1)):
        expect(bool(energy.explain(1e-4, optimizer).strip()), f"{energy!r}: explain says nothing")
