"""Comparisons that name the energy, the input and the numbers when they fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor

from groundstate.errors import NonFiniteError


def expect(condition: bool, message: str) -> None:
    """Raises ``AssertionError`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise AssertionError(message)


def expect_close(actual: Tensor, expected: Tensor, bound: float | Tensor, what: str) -> None:
    """Raises unless shapes agree and every entry differs by at most ``bound``; equal infinities agree."""
    expect(actual.shape == expected.shape, f"{what}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return
    a, b = actual.detach().double(), expected.detach().double()
    gap = torch.where(a == b, 0.0, (a - b).abs())
    worst = float(gap.max()) if bool(gap.isfinite().all()) else float("inf")
    at = int(gap.nan_to_num(nan=torch.inf).flatten().argmax())
    limit = float(bound)
    expect(
        worst <= limit,
        f"{what}: expected {float(b.flatten()[at]):.12g}, got {float(a.flatten()[at]):.12g} "
        f"(differs by {worst:.3g}, allowed {limit:.3g})",
    )


def size(*tensors: Tensor) -> float:
    """Returns the largest absolute entry of the tensors, 0 for none; the scale of a relative tolerance."""
    return max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Returns <a, b> for each matrix of a batch."""
    return (a * b).sum((-2, -1))


def expect_nonfinite_error(call: Callable[[], object], what: str) -> None:
    """Raises unless ``call`` raises `NonFiniteError`."""
    try:
        result = call()
    except NonFiniteError:
        return
    except Exception as error:
        raise AssertionError(f"{what}: expected NonFiniteError, got {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what}: expected NonFiniteError, got the result {result!r}")


@contextmanager
def untouched(tensors: Iterable[Tensor], what: str) -> Iterator[None]:
    """Raises if the body changes a tensor, its ``requires_grad`` or ``grad``, or a global random generator."""
    watched = list(tensors)
    before = [(t.detach().clone(), t.requires_grad) for t in watched]
    generators = _generators()
    yield
    for t, (copy, requires_grad) in zip(watched, before):
        expect(torch.equal(t.detach(), copy), f"{what} changed its input in place")
        expect(t.requires_grad == requires_grad, f"{what} changed requires_grad of its input")
        expect(t.grad is None, f"{what} wrote into .grad of its input")
    for name, state, now in zip(("torch", "numpy", "random"), generators, _generators()):
        expect(state == now, f"{what} drew from the global generator of {name}: use a generator of its own")


def _generators() -> tuple[object, object, object]:
    return torch.get_rng_state().tolist(), str(numpy.random.get_state(legacy=False)), random.getstate()
