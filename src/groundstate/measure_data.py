"""The samples that a network is measured on: what is wrong with them is said before anything is computed.

Idea: inputs x ``(B, ...)`` and targets y are looked at by themselves, then the network is run on them once. What it
gives for them says how they are scored::

    y whole numbers (B,) in 0..C-1,  outputs (B, C), C > 1      cross-entropy and accuracy
    y real, as many numbers as outputs                          mean squared error

One logit z of a binary network is no score of each of two classes: scored by its largest output it would always be
right. It is not scored, and a note says so; the logits (0, z) have the probabilities 1 - sigmoid(z) and sigmoid(z).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from groundstate.errors import GroundstateError, NonFiniteError, UsageError
from groundstate.jacobian.function import frozen
from groundstate.scores import ONE_LOGIT, checked_labels

_BATCH, _SMALL_BATCH = 1024, 128


def check_samples(x: Tensor, y: Tensor | None) -> None:
    """Looks at samples without running anything.

    Raises:
        UsageError: x, or y where there is one, is no dense tensor (batch, ...) with at least one sample, or they have
            different lengths.
        NonFiniteError: x or y has NaN or infinite entries.
    """
    for name, given in [("input x", x)] + ([] if y is None else [("target y", y)]):
        if wrong := _no_samples(given):
            raise UsageError(f"the {name} must be a tensor (batch, ...) with at least one sample, got {wrong}")
        if not bool(torch.isfinite(given).all()):
            raise NonFiniteError(f"the {name} has NaN or infinite entries: remove those samples")
    if y is not None and len(y) != len(x):
        raise UsageError(f"x has {len(x)} samples and y {len(y)}: give as many labels as inputs")


@contextmanager
def with_gradients(model: nn.Module | None) -> Iterator[None]:
    """Has copies stand in for the tensors of a network that were made in inference mode, where autograd refuses them.

    Those are its parameters and buffers, and tensors that are plain attributes of its modules. The network is otherwise
    itself, so what is known of it (a prior, hooks) holds; on leaving it has its own tensors again.
    """
    own: list[tuple[nn.Module, str, Tensor]] = []
    copies: dict[int, Tensor] = {}  # by the tensor: a tied weight stays tied
    for m in () if model is None else model.modules():
        for name, t in (*m._parameters.items(), *m._buffers.items(), *vars(m).items()):
            if isinstance(t, Tensor) and t.is_inference() and not nn.parameter.is_lazy(t):
                own.append((m, name, t))
    try:
        with torch.inference_mode(False):
            for m, name, t in own:
                if id(t) not in copies:
                    copy = t.detach().clone()
                    copies[id(t)] = nn.Parameter(copy, t.requires_grad) if isinstance(t, nn.Parameter) else copy
                setattr(m, name, copies[id(t)])
        yield
    finally:
        for m, name, t in own:
            setattr(m, name, t)


def outputs_of(model: nn.Module, x: Tensor) -> Tensor | None:
    """Returns the outputs of a network in eval mode, ``(B, C)``; ``None`` where they are not one real tensor.

    Raises:
        UsageError: it does not take x, or does not give one row for each sample; nothing of it changes.
    """
    with frozen(model) as run, torch.no_grad():
        try:
            out = run.f(x.clone())  # a copy: the network may work in place
        except (GroundstateError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever the forward pass raises on inputs that it was not made for
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise UsageError(
                f"the network does not take samples of {_form(x[0])} ({type(error).__name__}: {reason}): give x as "
                f"(batch, ...) in the shape and dtype that it was made for{_first_layer(model)}; one sample as x[None]"
            ) from error
    if not isinstance(out, Tensor) or not out.is_floating_point():
        return None
    if out.ndim == 0 or len(out) != len(x):
        raise UsageError(
            f"the network gives an output of shape {tuple(out.shape)} for x of shape {tuple(x.shape)}, expected one "
            f"row for each of {len(x)} samples: give x as (batch, ...), one sample as x[None]"
        )
    return out.flatten(1) if out.ndim > 1 else out[:, None]


def width(model: nn.Module, x: Tensor) -> int | None:
    """Returns the number C of outputs, after all samples went through; ``None`` and errors as of `outputs_of`."""
    found = None
    for part in x.split(_SMALL_BATCH):
        outputs = outputs_of(model, part)
        found = None if outputs is None else outputs.shape[1]
    return found


def targets(y: Tensor | None, outputs: int | None) -> Tensor | str:
    """Returns what the outputs are compared with, or in words why there is nothing.

    Args:
        y: What came as labels, after `check_samples`.
        outputs: Of the network, from `width`.

    Returns:
        Classes as int64 ``(B,)``, real targets ``(B, C)``, or a reason.

    Raises:
        UsageError: y is neither one class for each sample, nor real with as many numbers as outputs.

    >>> targets(torch.tensor([0, 2]), 3), targets(torch.tensor([0, 1]), None)
    (tensor([0, 2]), 'the output of the network is not one real tensor')
    """
    if y is None:
        return "there are no labels"
    if outputs is None:
        return "the output of the network is not one real tensor"
    if y.is_floating_point():
        if y[0].numel() == outputs:
            return y.reshape(len(y), -1)
        raise UsageError(
            f"the target y has {_form(y)}, the network {outputs} outputs: give classes as whole numbers ({len(y)},), "
            f"e.g. y.long(), or real targets ({len(y)}, {outputs})"
        )
    if outputs == 1:
        return f"the network has one output, not one for each class ({ONE_LOGIT})"
    return checked_labels(y, len(y), outputs)


def evaluate(model: nn.Module | None, data: Any) -> tuple[dict[str, float], list[str]]:
    """Returns loss and, for classes, accuracy; or a note that says why there are none.

    Args:
        model: The network; nothing of it changes.
        data: The pair ``(x, y)``; y may be ``None``.

    Raises:
        UsageError: there is no model, or data are no such pair or do not fit it.
        NonFiniteError: x or y has NaN or infinite entries.

    >>> evaluate(nn.Identity(), (torch.tensor([[0.0, 3.0], [0.0, 3.0]]), torch.tensor([1, 0])))[0]["accuracy"]
    0.5
    """
    if model is None:
        raise UsageError("data needs the model itself: a file or a state dict cannot be run")
    if not isinstance(data, tuple | list) or len(data) != 2:
        what = f"{len(data)} things" if isinstance(data, tuple | list) else f"a {type(data).__name__}"
        raise UsageError(f"data must be two tensors (x, y), inputs and labels, got {what}; without labels (x, None)")
    x, y = data
    check_samples(x, y)
    with with_gradients(model):
        return _scored(model, in_dtype_of(model, x), y)


def _scored(model: nn.Module, x: Tensor, y: Tensor | None) -> tuple[dict[str, float], list[str]]:
    goal = targets(y, width(model, x[:1]))
    if isinstance(goal, str):
        return {}, [f"loss, accuracy: left out: {goal}"]
    classes, loss, right = not goal.is_floating_point(), 0.0, 0
    for inputs, part in zip(x.split(_BATCH), goal.split(_BATCH), strict=True):
        outputs = outputs_of(model, inputs)
        if outputs is None:
            raise UsageError("the output of the network is one real tensor for some samples only")
        part = part.to(outputs.device)
        if classes:
            loss += float(nn.functional.cross_entropy(outputs, part, reduction="sum"))
            right += int((outputs.argmax(-1) == part).sum())
        else:
            loss += float(nn.functional.mse_loss(outputs.double(), part.double())) * len(part)
    return {"loss": loss / len(x)} | ({"accuracy": right / len(x)} if classes else {}), []


def in_dtype_of(model: nn.Module, x: Tensor) -> Tensor:
    """Returns real inputs in the dtype of the first real parameter, others as they are; detached."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return x.detach() if first is None or not x.is_floating_point() else x.detach().to(first.dtype)


def _no_samples(given: Any) -> str:
    """Says in what a thing differs from a dense tensor (batch, ...) with entries, and what to do; empty: in nothing."""
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__}: convert it, e.g. by torch.as_tensor"
    if given.is_meta:
        return "one on the meta device, which holds no numbers: make it on the CPU"
    if given.layout is not torch.strided:
        return f"one of layout {given.layout}: convert it by to_dense()"
    if given.ndim == 0:
        return "a single number: put it into a batch, as of t[None]"
    return "" if given.numel() else f"one of shape {tuple(given.shape)}, which is empty: give some"


def _form(t: Tensor) -> str:
    return f"dtype {str(t.dtype).removeprefix('torch.')} and shape {tuple(t.shape)}"


def _first_layer(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and not any(True for _ in module.children()):
            return f" (its first layer with weights is {name or 'the model'}, {str(module).splitlines()[0]})"
    return ""
