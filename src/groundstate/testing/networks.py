"""Contracts of the energies of a whole network of layers W_1..W_L, in float64 unless said otherwise."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from groundstate.energies.base import NetworkEnergy
from groundstate.testing import samples
from groundstate.testing.expect import expect, expect_close, expect_nonfinite_error, inner, size, untouched


def gradient_equals_autograd(energy: NetworkEnergy) -> None:
    """``value_and_grad`` gives the value of ``value`` and its gradients by autograd, to 1e-8."""
    for widths in samples.WIDTHS:
        layers = samples.network(widths, 300)
        leaves = [w.clone().requires_grad_() for w in layers]
        expected = energy.value(leaves)
        slopes = torch.autograd.grad(expected, leaves)
        value, grads = energy.value_and_grad(layers)
        what = f"{energy!r} of layers {widths}"
        expect(value.shape == () == expected.shape, f"{what}: the value must be a scalar, got {tuple(value.shape)}")
        expect(len(grads) == len(layers), f"{what}: {len(grads)} gradients for {len(layers)} layers")
        expect_close(value, expected, 1e-10 * size(expected), f"{what}: value_and_grad against value")
        for number, (grad, slope) in enumerate(zip(grads, slopes), 1):
            bound = 1e-8 * (size(*slopes) + size(expected) / size(*layers))
            expect_close(grad, slope, bound, f"{what}: gradient of layer {number} against autograd of value")
            expect(not grad.requires_grad, f"{what}: the gradient of layer {number} keeps an autograd graph")


def gradient_matches_differences(energy: NetworkEnergy) -> None:
    """sum <gradient, D> is the central difference of the value along random directions D."""
    for widths in samples.WIDTHS:
        layers = samples.network(widths, 310)
        value, grads = energy.value_and_grad(layers)
        for seed in (320, 340):
            away = samples.network(widths, seed)
            slope = float(sum(inner(g, d) for g, d in zip(grads, away)))

            def at(h: float, away: list[Tensor] = away, layers: list[Tensor] = layers) -> float:
                return float(energy.value([w + h * d for w, d in zip(layers, away)]))

            slopes = [(at(h) - at(-h)) / (2 * h) for h in (1e-3, 1e-4, 1e-5, 1e-6)]
            nearest = min(slopes, key=lambda s: abs(s - slope))
            bound = 1e-6 * (size(*grads) + size(value) / size(*layers)) * sum(w.numel() for w in layers)
            what = f"{energy!r} of layers {widths}: <gradient, D> against central differences"
            expect_close(torch.tensor(slope), torch.tensor(nearest), bound, what)


def homogeneous(energy: NetworkEnergy) -> None:
    """With every layer scaled by c, E becomes |c|^d E for the declared d; sum <gradient, W> = d E."""
    degree = energy.traits.degree
    if degree is None:
        return
    for widths in samples.WIDTHS:
        layers = samples.network(widths, 350)
        value = energy.value(layers)
        for c in (2.0, -0.3, 7.0):
            what = f"{energy!r} of layers {widths}: E of all layers times {c:g} against |{c:g}|^{degree:g} E"
            expected = abs(c) ** degree * value
            expect_close(energy.value([c * w for w in layers]), expected, 1e-9 * size(expected), what)
        if energy.traits.differentiable:
            euler = sum((inner(g, w) for g, w in zip(energy.value_and_grad(layers)[1], layers)), torch.zeros(()))
            what = f"{energy!r} of layers {widths}: sum <gradient, W> against {degree:g} E"
            expect_close(euler, degree * value, 1e-8 * size(value) * max(1.0, degree), what)


def invariant(energy: NetworkEnergy) -> None:
    """Hidden neurons may be permuted or change their sign, in and out together, where that is declared."""
    for widths in samples.WIDTHS:
        layers = samples.network(widths, 360)
        value = energy.value(layers)
        for invariance in energy.traits.invariances:
            moved = _moved(invariance, layers)
            what = f"{energy!r} is declared {invariance!r}, layers {widths}"
            expect_close(energy.value(moved), value, 1e-9 * size(value), f"{what}: value")
            if energy.traits.differentiable and invariance != "scale":
                expected = _moved(invariance, energy.value_and_grad(layers)[1])
                bound = 1e-7 * (size(*expected) + size(value) / size(*layers))
                for grad, slope in zip(energy.value_and_grad(moved)[1], expected):
                    expect_close(grad, slope, bound, f"{what}: gradient")


def _moved(invariance: str, layers: list[Tensor]) -> list[Tensor]:
    """Permutes or flips every hidden neuron; as linear maps these move gradients as they move weights."""
    moved = list(layers)
    for hidden in range(len(layers) - 1):
        width = layers[hidden].shape[0]
        if invariance == "neuron_permutation":
            places = samples.order(width, 370 + hidden)
            moved[hidden], moved[hidden + 1] = moved[hidden][places], moved[hidden + 1][:, places]
        elif invariance == "neuron_sign":
            flip = samples.signs((width,), 380 + hidden)
            moved[hidden], moved[hidden + 1] = flip[:, None] * moved[hidden], moved[hidden + 1] * flip
    return [3 * w for w in layers] if invariance == "scale" else moved


def finite_at_degenerate_layers(energy: NetworkEnergy) -> None:
    """Value and gradients are finite at zero, rank-one, tied, empty and badly scaled layers, in every dtype."""
    for dtype in samples.FLOATS:
        for name, layers in samples.degenerate_networks(dtype).items():
            what = f"{energy!r} at {name} in {str(dtype).removeprefix('torch.')}"
            exact = energy.value([w.double() for w in layers])
            expect(not bool(exact.isnan()), f"{what}: value in float64 is NaN")
            value, grads = energy.value_and_grad(layers)
            expect_close(value, energy.value(layers), 1e-3 * size(exact), f"{what}: value_and_grad against value")
            small = torch.finfo(value.dtype).tiny
            expect_close(value, exact.to(value.dtype), 1e-3 * size(exact) + small, f"{what}: value against float64")
            for w, grad in zip(layers, grads, strict=True):
                expect(grad.shape == w.shape and grad.dtype == dtype, f"{what}: a gradient is {grad.dtype}")
                expect(bool(grad.isfinite().all()), f"{what}: a gradient is not finite")
                expect(name != "zero" or size(grad) == 0.0, f"{what}: the gradient of a zero network is not zero")


def layout_does_not_matter(energy: NetworkEnergy) -> None:
    """Transposed, strided and expanded layers give what contiguous copies give."""
    layers = [samples.normal((6, 8), 390)[:, ::2], samples.normal((6, 3), 391).mT, samples.normal((1, 3), 392)]
    layers[2] = layers[2].expand(2, 3)
    plain = [w.clone(memory_format=torch.contiguous_format) for w in layers]
    (value, grads), (expected, slopes) = energy.value_and_grad(layers), energy.value_and_grad(plain)
    expect_close(value, expected, 1e-9 * size(expected), f"{energy!r} of strided layers against copies")
    expect_close(energy.value(layers), expected, 1e-9 * size(expected), f"{energy!r}.value of strided layers")
    for grad, slope in zip(grads, slopes):
        expect_close(grad, slope, 1e-8 * size(*slopes), f"{energy!r}: gradient of strided layers against copies")


def inputs_and_generators_are_left_alone(energy: NetworkEnergy) -> None:
    """Nothing changes a layer or a global generator, and no gradient shares memory with a layer."""
    for dtype in (torch.float64, torch.float32):
        layers = [w.requires_grad_() for w in samples.network((4, 3, 2), 400, dtype)]
        with untouched(layers, f"{energy!r}.value"):
            energy.value(layers)
        with untouched(layers, f"{energy!r}.value_and_grad"):
            for grad in energy.value_and_grad(layers)[1]:
                grad.fill_(1.0)


def nonfinite_layers_are_named(energy: NetworkEnergy) -> None:
    """NaN and infinity in any layer raise `NonFiniteError`."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for place in range(3):
            for bad in (float("nan"), float("inf")):
                layers = samples.network((4, 3, 5, 2), 410, dtype)
                layers[place][1, 1] = bad
                what = f"{energy!r} in {str(dtype).removeprefix('torch.')} with {bad} in layer {place + 1}"
                expect_nonfinite_error(partial(energy.value, layers), f"{what}: value")
                if energy.traits.differentiable:
                    expect_nonfinite_error(partial(energy.value_and_grad, layers), f"{what}: gradient")
