"""A network as a plain function of a batch: the same value at every call, differentiable, and without side effects.

Inside `frozen` the module is in eval mode (batch statistics would couple the samples, dropout would make the function
random), eager (``torch.compile`` has no double backward), without autocast, with the attention kernel that can be
differentiated twice, and with gradients on, whatever the caller's mode. Afterwards modes, buffers and random states are
as before; ``.grad`` of parameters and ``requires_grad`` of inputs are never touched.

Which function: ``on`` names the output, ``wrt`` the input.

* ``on``: ``logits`` (the output as it is), ``probabilities`` (its softmax), ``loss`` (cross-entropy of each sample),
  ``output:KEY`` (an item of a tuple or dict), or the name of a layer.
* ``wrt``: ``input``, or the name of a layer whose output counts as the input (token embeddings, the start of a head).
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from groundstate.errors import NonFiniteError, UsageError, nearest
from groundstate.layers import unwrapped

OUTPUTS = ("logits", "probabilities", "loss")


class Function:
    """A network during `frozen`: call it on points ``(B, ...)`` to get outputs ``(B, C)``.

    Attributes:
        module: The network itself, without wrappers; ``None`` for a callable that is no module.
        modules: It and all modules in it.
        dtype: Of its first real parameter, ``None`` without any.
        grad_wanted: Whether the caller records gradients and some parameter asks for one.
        memo: The plan that `plan_for` found last, with the kind of points it is for.
    """

    def __init__(
        self,
        f: Callable[[Tensor], Any],
        on: str,
        y: Tensor | None,
        grad: bool,
        parameters: list[nn.Parameter],
        modules: list[nn.Module] | None = None,
    ) -> None:
        self.f, self.on, self.y = f, on, y
        self.module = f if isinstance(f, nn.Module) else None
        self.modules = [] if modules is None else modules
        self.dtype: torch.dtype | None = None
        self.parameters = parameters
        self.grad_wanted = grad and (bool(parameters) or self.module is None)
        self.start: tuple[str, Tensor] | None = None
        self.memo: tuple[Hashable, Any] | None = None
        self._logits = on in OUTPUTS or on.startswith("output:")

    def __call__(self, points: Tensor) -> Tensor:
        # a copy: what works in place must neither hit a leaf of autograd nor the tensor of the caller
        out = self._evaluate(points.clone() if points.is_leaf else points)
        if not isinstance(out, Tensor):
            raise UsageError(
                f"the output is a {type(out).__name__}, expected one tensor (batch, ...): choose with "
                "on='output:KEY' (an index or a key), or the name of a layer"
            )
        if out.ndim == 0 or len(out) != len(points):
            raise UsageError(
                f"the output has shape {tuple(out.shape)} for {len(points)} samples: expected one row per sample, the "
                "batch first"
            )
        out = out.flatten(1) if out.ndim > 1 else out[:, None]
        if not out.is_floating_point():
            raise UsageError(f"the output is {out.dtype}, expected floating point: choose a layer before it by on=")
        if self.on == "probabilities":
            return out.softmax(-1)
        if self.on == "loss":
            return functional.cross_entropy(out, self.targets(out), reduction="none")[:, None]
        return out

    def targets(self, logits: Tensor) -> Tensor:
        """Returns the labels as probabilities, shape and dtype of ``logits`` ``(B, C)``.

        Raises:
            UsageError: there are no labels, or they are neither classes ``(B,)`` nor probabilities ``(B, C)``.
        """
        y, classes = self.y, logits.shape[1]
        if y is None:
            raise UsageError("on='loss' needs the labels: give y")
        if y.is_floating_point() and y.shape == logits.shape:
            return y.to(logits.dtype)
        if y.is_floating_point() or y.is_complex() or y.ndim != 1:
            raise UsageError(
                f"on='loss' takes whole numbers (batch,) or probabilities (batch, {classes}) as y, got {y.dtype} of "
                f"shape {tuple(y.shape)}"
            )
        if int(y.min()) < 0 or int(y.max()) >= classes:
            raise UsageError(
                f"the labels y go from {int(y.min())} to {int(y.max())}, the outputs are {classes} classes"
            )
        return functional.one_hot(y.long(), classes).to(logits.dtype)

    def settle(self, value: Tensor) -> Tensor:
        """Returns ``value`` with its gradient by the parameters computed now, while the network is frozen.

        What runs in a later ``backward`` (recomputation of activation checkpoints, say) would see another mode.
        """
        if not self.grad_wanted or not value.requires_grad:
            return value.detach()
        if self.module is None:
            return value
        grads = torch.autograd.grad(value, self.parameters, allow_unused=True)
        pairs = [(p, g) for p, g in zip(self.parameters, grads, strict=True) if g is not None]
        return supplied(value, [p for p, _ in pairs], [g for _, g in pairs])

    def rows(self, index: Tensor) -> Function:
        """Returns this function for a part of the samples: their labels, and their inputs behind ``wrt``."""
        part = copy.copy(self)
        part.y = None if self.y is None else self.y[index]
        part.start = None if self.start is None else (self.start[0], self.start[1][index])
        return part

    def _evaluate(self, points: Tensor) -> Any:
        module = self.module
        if module is None or (self._logits and self.start is None):
            out = self.f(points)
        else:
            x = points
            with ExitStack() as hooks:
                if self.start is not None:
                    name, x = self.start
                    x = x.clone()  # what is before the layer may work in place
                    handle = layer(module, name).register_forward_hook(lambda *_: points)
                    hooks.callback(handle.remove)
                out = self.f(x) if self._logits else output_of(module, self.on, x)
        return _item(out, self.on.removeprefix("output:")) if self.on.startswith("output:") else out


@contextmanager
def frozen(f: Callable[[Tensor], Any], *, on: str = "logits", y: Tensor | None = None) -> Iterator[Function]:
    """Makes a `Function` of ``f`` for the body of a ``with`` statement.

    Args:
        f: A module (wrappers of DistributedDataParallel and ``torch.compile`` are looked through), or any callable.
        on: Which output; see the module's docstring.
        y: Labels, for ``on="loss"``.

    Raises:
        UsageError: ``on`` names no layer.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    >>> with frozen(model) as run:
    ...     bool((run(torch.ones(1, 2)) == model[0](torch.ones(1, 2))).all()), model.training
    (True, False)
    >>> model.training
    True
    """
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    f = unwrapped(f) if isinstance(f, nn.Module) else f
    modules = list(f.modules()) if isinstance(f, nn.Module) else []
    named = on not in OUTPUTS and not on.startswith("output:")
    if named and not isinstance(f, nn.Module):
        raise UsageError(f"on={on!r} names a layer, but f is a {type(f).__name__}, not a module")
    if named and isinstance(f, nn.Module):
        layer(f, on)
    parameters = list(dict.fromkeys(p for m in modules for p in m._parameters.values() if p is not None))
    _check_usable(modules, parameters)
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        _choose_kernels(stack, modules, parameters)
        stack.callback(_remember(modules, parameters))
        with torch.enable_grad():
            run = Function(f, on, y, grad, [p for p in parameters if p.requires_grad], modules)
            run.dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)
            yield run


@contextmanager
def function(
    f: Callable[[Tensor], Any], x: Tensor, y: Tensor | None = None, *, on: str = "logits", wrt: str = "input"
) -> Iterator[tuple[Function, Tensor]]:
    """Makes a `Function` and the points at which to differentiate it: ``x``, or the output of the layer ``wrt``.

    The points are new tensors in the dtype of the parameters, without a graph.

    Raises:
        UsageError: no sample, integers in place of real numbers, a layer that does not exist.
        NonFiniteError: the input has NaN or infinite entries.
    """
    with frozen(f, on=on, y=y) as run:
        x = _inputs(run, x, wrt)
        if y is not None and (not isinstance(y, Tensor) or y.ndim == 0):
            raise UsageError(f"y must be a tensor (batch, ...), got {type(y).__name__}")
        if y is not None and len(y) != len(x):
            raise UsageError(f"x has {len(x)} samples and y {len(y)}: expected as many")
        if wrt != "input":
            if run.module is None:
                raise UsageError(f"wrt={wrt!r} names a layer, but f is a {type(f).__name__}, not a module")
            with torch.no_grad():
                points = output_of(run.module, wrt, x.clone())
            if not isinstance(points, Tensor) or not points.is_floating_point() or len(points) != len(x):
                raise UsageError(f"the layer {wrt!r} does not give one real tensor (batch, ...): choose another one")
            run.start, x = (wrt, x), points.detach()
        yield run, x


def supplied(value: Tensor, parameters: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Returns ``value`` as a node whose gradient by each parameter is the given one."""
    made: Tensor = _Supplied.apply(value.detach(), grads, *parameters)  # pyright: ignore[reportAssignmentType]
    return made


class _Supplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (None, None, *[outputs[0].to(g.dtype) * g for g in ctx.saved_tensors])


def layer(module: nn.Module, name: str) -> nn.Module:
    """Returns the submodule of a name.

    Raises:
        UsageError: there is none; the nearest name is given.
    """
    known = dict(module.named_modules())
    if name not in known or not name:
        names = [n for n in known if n]
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise UsageError(
            f"the network has no layer {name!r}.{nearest(name, names)} Expected {', '.join(OUTPUTS)}, output:KEY or a "
            f"layer: {shown or 'none'}"
        )
    return known[name]


def output_of(module: nn.Module, name: str, x: Tensor) -> Any:
    """Returns the output of the layer ``name`` at ``x``; what follows it does not run.

    Raises:
        UsageError: the layer takes no part in the forward pass.
    """

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        raise _Found(output)

    handle = layer(module, name).register_forward_hook(stop)
    try:
        module(x)
    except _Found as found:
        return found.output
    finally:
        handle.remove()
    raise UsageError(f"the layer {name!r} takes no part in the forward pass: choose another one")


class _Found(BaseException):  # no Exception: a forward pass that catches those must not catch it
    def __init__(self, output: Any) -> None:
        self.output = output


def blame(f: Callable[[Tensor], Any], x: Tensor, what: str) -> NonFiniteError:
    """Returns the error for ``what`` that is not finite; it names the first tensor that is not: input or weight."""
    advice = "lower the learning rate or the strength, or start again from a good checkpoint"
    if not bool(torch.isfinite(x).all()):
        return NonFiniteError(f"{what} is not finite: the input x has NaN or infinite entries; remove them")
    if isinstance(f, nn.Module):
        module = unwrapped(f)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return NonFiniteError(f"{what} is not finite: {name!r} has NaN or infinite entries; {advice}")
    return NonFiniteError(f"{what} is not finite although input and weights are: it overflows; {advice}")


def _inputs(run: Function, x: Tensor, wrt: str) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise UsageError(f"x must be a tensor (batch, ...), got {type(x).__name__}")
    if len(x) == 0:
        raise UsageError("the batch is empty: give at least one sample")
    if not x.is_floating_point():
        if wrt == "input":
            raise UsageError(
                f"the input is {x.dtype}, which has no derivative: name the layer whose output counts as the input, "
                "e.g. wrt='embedding'"
            )
        return x.detach()
    # a ReLU turns NaN into a slope of zero: what follows would look sound
    if not math.isfinite(x.detach().sum().item()) and not bool(torch.isfinite(x.detach()).all()):
        raise NonFiniteError("the input x has NaN or infinite entries: remove those samples")
    points = x.detach() if run.dtype is None else x.detach().to(run.dtype)
    return points.clone() if points.is_inference() else points


def _item(out: Any, key: str) -> Any:
    try:
        return out[int(key)] if key.lstrip("-").isdigit() and not isinstance(out, dict) else out[key]
    except (KeyError, IndexError, TypeError):
        known = f"keys {', '.join(map(str, out))}" if isinstance(out, dict) else f"a {type(out).__name__}"
        raise UsageError(f"on='output:{key}' is not in the output, which is {known}") from None


def _choose_kernels(stack: ExitStack, modules: list[nn.Module], parameters: list[nn.Parameter]) -> None:
    """Autocast off, eager code, and kernels that have a second derivative."""
    devices = {p.device.type for p in parameters} or {"cpu", "cuda"}
    for device in devices:
        if device != "meta" and torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    if modules and all(type(m) in _PLAIN and not _compiled(m) for m in modules):
        return  # nothing that needs another kernel: saves some 20 microseconds a call
    from torch.nn.attention import SDPBackend, sdpa_kernel

    stack.enter_context(sdpa_kernel(SDPBackend.MATH))
    if "torch._dynamo" in sys.modules:  # nothing is compiled yet where it is not loaded
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    if "cuda" in devices and any(isinstance(m, nn.RNNBase) for m in modules):
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))


_PLAIN = frozenset(
    (nn.Sequential, nn.Linear, nn.Flatten, nn.ReLU, nn.Tanh, nn.GELU, nn.ELU, nn.Sigmoid, nn.SiLU, nn.Softplus,
     nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Identity)
)  # fmt: skip


def _compiled(m: nn.Module) -> bool:
    known = m.__dict__
    return known.get("_compiled_call_impl") is not None or "_orig_mod" in known.get("_modules", ())


def _check_usable(modules: list[nn.Module], parameters: list[nn.Parameter]) -> None:
    buffers = [b for m in modules for b in m._buffers.values() if b is not None]
    for tensor in (*parameters, *buffers):
        if nn.parameter.is_lazy(tensor):
            raise UsageError("the network has lazy layers without a shape: run one batch through it first")
        if tensor.is_inference():
            raise UsageError(
                "the network was made in inference mode, so nothing can be differentiated through it: make or load it "
                "outside torch.inference_mode(), or take copy.deepcopy(model) there"
            )


def _remember(modules: list[nn.Module], parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Sets eval mode and returns what brings back modes, buffers and random states."""
    training = [m for m in modules if m.training]
    buffers = [
        (m._buffers, name, b, b.detach().clone(), b._version)
        for m in modules
        for name, b in m._buffers.items()
        if b is not None
    ]
    state = torch.get_rng_state()
    device = next((p.device for p in parameters if p.is_cuda), None)
    device_state = None if device is None else torch.cuda.get_rng_state(device)
    for m in training:
        _set_mode(m, False)

    def restore() -> None:
        for m in training:
            _set_mode(m, True)
        for home, name, buffer, kept, version in buffers:
            home[name] = buffer
            # a batch normalization in train mode writes without counting a version
            if buffer._version != version or not torch.equal(buffer, kept):
                with torch.no_grad():
                    buffer.copy_(kept)
        if not torch.equal(state, torch.get_rng_state()):
            torch.set_rng_state(state)
        if device is not None and device_state is not None:
            torch.cuda.set_rng_state(device_state, device)

    return restore


def _set_mode(m: nn.Module, training: bool) -> None:
    if "training" in m.__dict__:
        m.__dict__["training"] = training  # what nn.Module.__setattr__ ends in, ten times as fast
    else:
        m.training = training  # a scripted module keeps it elsewhere
