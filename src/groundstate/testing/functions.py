"""Contracts of the energies of the function that a network computes, in float64 unless said otherwise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from groundstate.energies.base import FunctionEnergy
from groundstate.errors import UsageError
from groundstate.testing import samples
from groundstate.testing.expect import expect, expect_close, expect_nonfinite_error, size, untouched

_BATCH, _INPUTS, _OUTPUTS = 6, 5, 3


def mlp(seed: int, activation: Callable[[], nn.Module] = nn.Tanh, widths: tuple[int, ...] = (5, 7, 6, 3)) -> nn.Module:
    """Returns a float64 multilayer perceptron."""
    parts: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        with torch.random.fork_rng(devices=[]):
            layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(samples.normal((outputs, inputs), seed + 2 * number) / inputs**0.5)
            layer.bias.copy_(samples.normal((1, outputs), seed + 2 * number + 1)[0])
        parts += [layer, activation()]
    return nn.Sequential(*parts[:-1])


def with_state(seed: int) -> nn.Module:
    """Returns a network, in train mode, with batch statistics and dropout."""
    first, last = mlp(seed, widths=(5, 8)), mlp(seed + 1, widths=(8, 3))
    return nn.Sequential(first, nn.BatchNorm1d(8, dtype=torch.float64), nn.ReLU(), nn.Dropout(0.5), last).train()


def batch(seed: int, count: int = _BATCH, classes: int = _OUTPUTS) -> tuple[Tensor, Tensor]:
    """Returns inputs and labels."""
    return samples.normal((count, _INPUTS), seed), torch.arange(count) % classes


def generator(seed: int = 0) -> torch.Generator:
    """Returns a source of probes."""
    return torch.Generator().manual_seed(seed)


def gradient_matches_differences(energy: FunctionEnergy) -> None:
    """With the same probes, <gradient, D> is the central difference of the value along random directions D."""
    model, (x, y) = mlp(500), batch(510)
    weights = list(model.parameters())
    value = energy.value(model, x, y, probe=generator())
    grads = torch.autograd.grad(value, weights, allow_unused=True)
    for seed in (520, 540):
        away = [samples.normal((w.numel(), 1), seed + i).view_as(w) for i, w in enumerate(weights)]
        slope = sum(float((g * d).sum()) for g, d in zip(grads, away) if g is not None)

        def at(h: float, away: list[Tensor] = away) -> float:
            with torch.no_grad():
                for w, d in zip(weights, away):
                    w.add_(d, alpha=h)
                found = float(energy.value(model, x, y, probe=generator()).detach())
                for w, d in zip(weights, away):
                    w.sub_(d, alpha=h)
            return found

        slopes = [(at(h) - at(-h)) / (2 * h) for h in (1e-3, 1e-4, 1e-5, 1e-6)]
        nearest = min(slopes, key=lambda s: abs(s - slope))
        bound = 1e-6 * (abs(slope) + float(value.detach()) + size(*(g for g in grads if g is not None)))
        what = f"{energy!r}: <gradient, D> against central differences"
        expect_close(torch.tensor(slope, dtype=torch.float64), torch.tensor(nearest, dtype=torch.float64), bound, what)


def homogeneous(energy: FunctionEnergy) -> None:
    """With the output scaled by c, E becomes |c|^d E for the declared d, where the output itself is looked at."""
    degree = energy.traits.degree
    if degree is None or getattr(energy, "on", "logits") != "logits":
        return
    model, (x, y) = mlp(550), batch(560)
    value = energy.value(model, x, y, probe=generator()).detach()
    for c in (2.0, -0.3):
        scaled = mlp(550)
        with torch.no_grad():
            for parameter in list(scaled.parameters())[-2:]:
                parameter.mul_(c)
        what = f"{energy!r}: E of the output times {c:g} against |{c:g}|^{degree:g} E"
        expect_close(energy.value(scaled, x, y, probe=generator()), abs(c) ** degree * value, 1e-8 * size(value), what)


def probes_decide_alone(energy: FunctionEnergy) -> None:
    """The same generator gives the same value, to the bit, whatever the global generators do."""
    model, (x, y) = mlp(570, nn.ReLU), batch(580)
    first = energy.value(model, x, y, probe=generator(3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        second = energy.value(model, x, y, probe=generator(3))
    expect(torch.equal(first, second), f"{energy!r}: two values of the same probes differ: {first} and {second}")


def leaves_no_trace(energy: FunctionEnergy) -> None:
    """Inputs, ``requires_grad``, ``.grad``, modes, buffers and global generators are as before, in train mode too."""
    model, (x, y) = with_state(590), batch(600)
    parts = list(model.parameters())
    buffers = [b.clone() for b in model.buffers()]
    for asked in (False, True):
        x.requires_grad_(asked)
        with untouched([x, *parts], f"{energy!r}.value"):
            energy.value(model, x, y, probe=generator())
        with untouched([x, *parts], f"{energy!r}.estimate"):
            energy.estimate(model, x, y, probe=generator())
    expect(all(m.training for m in model.modules()), f"{energy!r} left a module in eval mode")
    same = all(torch.equal(a, b) for a, b in zip(buffers, model.buffers()))
    expect(same, f"{energy!r} changed a buffer of the network")


def works_in_every_mode(energy: FunctionEnergy) -> None:
    """Under no_grad and in inference mode, with frozen parameters, the value is the same, without a graph."""
    model, (x, y) = mlp(610, nn.ReLU), batch(620)
    expected = energy.value(model, x, y, probe=generator())
    expect(expected.requires_grad, f"{energy!r}: the value has no gradient by the parameters")
    with torch.no_grad():
        value = energy.value(model, x, y, probe=generator())
    expect_close(value, expected, 1e-9 * size(expected), f"{energy!r} under no_grad")
    expect(not value.requires_grad, f"{energy!r} under no_grad: the value keeps a graph")
    with torch.inference_mode():
        value = energy.value(model, x, y, probe=generator())
        expect_close(value, expected, 1e-9 * size(expected), f"{energy!r} in inference mode")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    value = energy.value(model, x, y, probe=generator())
    expect_close(value, expected, 1e-9 * size(expected), f"{energy!r} with frozen parameters")


def estimates_are_plain(energy: FunctionEnergy) -> None:
    """``estimate`` gives a finite number of as many samples as there are, and no negative standard error."""
    for model, outputs in ((mlp(630), 3), (mlp(640, nn.ReLU, (5, 4, 1)), 1), (with_state(650), 3)):
        if outputs < energy.least_outputs:
            continue
        for count in (1, _BATCH):
            x, y = batch(660, count, outputs)
            found = energy.estimate(model, x, y, probe=generator())
            error = found.standard_error
            finite = abs(found.value) < float("inf") and (error is None or 0 <= error < float("inf"))
            expect(finite, f"{energy!r}: the estimate is {found}")
            expect(found.samples == count, f"{energy!r}: {found.samples} samples counted of {count}")


def finite_at_degenerate_networks(energy: FunctionEnergy) -> None:
    """Value and gradient are finite for zero and dead networks, one sample, one output, and in single precision."""
    for dtype in (torch.float64, torch.float32):
        for name, model in _degenerate().items():
            if name == "one output" and energy.least_outputs > 1:
                continue
            model.to(dtype)
            for count in (1, 4):
                x, y = batch(670, count, 1 if name == "one output" else _OUTPUTS)
                what = f"{energy!r} of {name}, {count} samples, {str(dtype).removeprefix('torch.')}"
                value = energy.value(model, x.to(dtype), y, probe=generator())
                expect(value.shape == () and bool(value.isfinite()), f"{what}: the value is {value}")
                if not value.requires_grad:
                    continue
                for grad in torch.autograd.grad(value, list(model.parameters()), allow_unused=True):
                    expect(grad is None or bool(grad.isfinite().all()), f"{what}: a gradient is not finite")


def _degenerate() -> dict[str, nn.Module]:
    zero, dead = mlp(680, nn.ReLU), mlp(690, nn.ReLU)
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
        list(dead.parameters())[1].fill_(-1e3)
    return {
        "a zero network": zero,
        "a dead network": dead,
        "one output": mlp(700, nn.ReLU, (5, 4, 1)),
        "a narrow network": mlp(710, nn.Tanh, (5, 1, 3)),
        "one layer": mlp(720, widths=(5, 3)),
    }


def bad_inputs_are_named(energy: FunctionEnergy) -> None:
    """NaN and infinity in the input or in a weight raise `NonFiniteError`; an empty or integer batch `UsageError`."""
    for bad in (float("nan"), float("inf")):
        model, (x, y) = mlp(730, nn.ReLU), batch(740)
        x[:, 2] = bad
        expect_nonfinite_error(lambda m=model, x=x, y=y: energy.value(m, x, y, probe=generator()), f"{energy!r}: x")
        model, (x, y) = mlp(730, nn.ReLU), batch(740)
        with torch.no_grad():
            next(iter(model.parameters()))[:, 1] = bad
        expect_nonfinite_error(
            lambda m=model, x=x, y=y: energy.value(m, x, y, probe=generator()), f"{energy!r}: a weight"
        )
    model, (x, y) = mlp(750), batch(760)
    for wrong, what in ((x[:0], "an empty batch"), (torch.ones(_BATCH, _INPUTS, dtype=torch.long), "integer inputs")):
        try:
            energy.value(model, wrong, y[: len(wrong)], probe=generator())
        except UsageError:
            continue
        expect(False, f"{energy!r}: {what} must be a UsageError")
