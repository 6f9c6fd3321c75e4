"""Where a network can be split in two, f = g after h, and the two halves.

The output a = h(x) of a submodule is a *cut* iff every path from the input to the output passes through it. Test: a
forward pass in which a fresh leaf takes the place of a must have no gradient by x left, and one by the leaf. A skip
connection across the boundary leaves a gradient by x; the first module that shows it is where the paths have met.

One forward pass with such a hook gives both halves at once: h(x) is what came to the boundary, and the output is g of
what the rest was given in its place. So estimators need no second pass for the half that they do not move, whatever the
architecture, and chains of ``nn.Sequential`` need nothing special (only `Split.g` alone runs their suffix directly).

A boundary may be a tuple, list or dict of tensors (an encoder with its skips): the tensors that the rest uses and the
input moves count together as one vector a. Not supported, with the reason given by `check_cut`: modules that run
several times (their output is not one place), that never run through ``__call__``, that run again in the backward pass
(inside an activation checkpoint: the second run would not see the hook), whose batch is not the first dimension, whose
output is the network's input or output (Identity, a wrapper of everything).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from groundstate.errors import UsageError
from groundstate.jacobian.function import OUTPUTS, Function, layer, output_of


@dataclass(frozen=True)
class Cut:
    """A verified boundary.

    Attributes:
        name: Dotted name of the submodule whose output it is.
        kind: Class of that module.
        width: Entries of a per sample.
        parts: Which tensors of the output make a, in the order of the output; ``None`` where it is one tensor.
    """

    name: str
    kind: str
    width: int
    parts: tuple[int, ...] | None = None


def find_cuts(run: Function, x: Tensor) -> list[Cut]:
    """Returns the cuts strictly between input and output, in the order of the forward pass.

    Boundaries that hold the same numbers (Identity, dropout in eval mode, Flatten, an ``nn.Sequential`` and its last
    child) appear once, under the name of the module that returned first: the innermost.

    Args:
        run: A function of `groundstate.jacobian.function.function`.
        x: Its points; the first two are used.

    Raises:
        UsageError: the function is no module.

    Cost: a forward pass on two samples for each cut, and a few more. It changes only with the architecture: keep it.

    >>> from groundstate.jacobian.function import function
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with function(model, torch.ones(1, 2, 2)) as (run, x):
    ...     [(cut.name, cut.kind, cut.width) for cut in find_cuts(run, x)]
    [('1', 'Linear', 3), ('2', 'ReLU', 3)]
    """
    run, x = _few(run, x)
    base = _Pass(run, x)
    cuts: list[Cut] = []
    known: set[Any] = set()
    for call in base.calls:
        if base.times(call.name) != 1 or call.key in known:
            continue
        known.add(call.key)
        if _bypassed(base, call):  # a look at the graph; most boundaries in a residual network end here
            continue
        found = _examine(run, x, base, call.name)
        if isinstance(found, Cut):
            key = call.key_of(found.parts)  # of a tuple, what counts may be the output of a module inside
            if found.parts is None or key not in known:
                cuts.append(found)
            known.add(key)
    return cuts


def check_cut(run: Function, x: Tensor, name: str) -> Cut:
    """Returns the cut at the output of the module ``name``, for a `Split`.

    Raises:
        UsageError: there is no such module, or its output is no cut; says why, names the first module after
            a skip connection, and lists the cuts that there are.

    Cost: two forward passes on two samples.
    """
    few, points = _few(run, x)
    layer(_module(few), name)
    found = _examine(few, points, _Pass(few, points), name)
    if isinstance(found, Cut):
        return found
    names = [cut.name for cut in find_cuts(run, x)]
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    kind = type(layer(_module(run), name)).__name__
    raise UsageError(
        f"the network cannot be split at {name!r} ({kind}): {found}. " + (f"It can be at: {shown}" if names else _NONE)
    )


class Split:
    """The two halves of a function at a cut: ``g(h(x))`` equals the function, and J = J_g(h(x)) J_h(x).

    Made for one batch, inside the ``with`` statement of its function. The cut is taken as verified.

    Attributes:
        run: The function.
        cut: Where it is split.
        x: The points of the batch.

    >>> from groundstate.jacobian.function import function
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    >>> with function(model, torch.ones(5, 2)) as (run, x):
    ...     split = Split(run, check_cut(run, x, "1"), x)
    ...     a = split.h(x)
    ...     a.shape, bool((split.g(a) == run(x)).all())
    (torch.Size([5, 3]), True)
    """

    def __init__(self, run: Function, cut: Cut, x: Tensor) -> None:
        self.run, self.cut, self.x = run, cut, x
        self._boundary = layer(_module(run), cut.name)

    def h(self, x: Tensor) -> Tensor:
        """Returns a ``(B, ...)``, several tensors joined as ``(B, width)``; what follows the boundary does not run."""
        points = self._moving(x)
        with ExitStack() as hooks:
            if self.run.start is not None:
                name, start = self.run.start
                given = points
                _hook(hooks, layer(_module(self.run), name), lambda *_: given)
                points = start
            output = output_of(_module(self.run), self.cut.name, points)
        return self._join(tree_flatten(output)[0])

    def g(self, a: Tensor) -> Tensor:
        """Returns the output ``(B, C)`` for a of `h`.

        Modules before the boundary run only where the way down to it is not all ``nn.Sequential``, at the points ``x``.
        """
        rest = None if self.cut.parts is not None else _rest(_module(self.run), self.cut.name)
        if rest is None or not (self.run.on in OUTPUTS or self.run.on.startswith("output:")):
            return self.both(self.x, a)[1]
        return Function(_chained(rest), self.run.on, self.run.y, self.run.grad_wanted, self.run.parameters)(a.clone())

    def both(self, x: Tensor, a: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns h(x) and g(a), by default g(h(x)), in one forward pass.

        The graph runs from the output to a and from h(x) to x, so that the Jacobian of each half can be taken of it.

        Raises:
            UsageError: the number of samples is not that of the batch, or the boundary did not run exactly once.
        """
        for points, what in ((x, "x"), (a, "a")):
            if points is not None and len(points) != len(self.x):
                raise UsageError(f"{what} has {len(points)} samples, the split was made for {len(self.x)}")
        came: list[Tensor] = []

        def swap(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            tensors, tree = tree_flatten(output)
            came.append(self._join(tensors))
            return tree_unflatten(self._parted(came[0] if a is None else a, tensors), tree)

        with ExitStack() as hooks:
            _hook(hooks, self._boundary, swap)
            out = self.run(self._moving(x))
        if len(came) != 1:
            raise UsageError(f"{self.cut.name!r} ran {len(came)} times in the forward pass, expected once")
        return came[0], out

    @staticmethod
    def _moving(x: Tensor) -> Tensor:
        """A copy, safe from in-place work, that needs a gradient: without, some layers run fused, not by submodules."""
        return (x if x.requires_grad else x.detach().requires_grad_()).clone()

    def _join(self, tensors: list[Any]) -> Tensor:
        chosen = [tensors[i] for i in self.cut.parts or (0,)]
        return chosen[0] if len(chosen) == 1 else torch.cat([_rows(t) for t in chosen], 1)

    def _parted(self, a: Tensor, tensors: list[Any]) -> list[Any]:
        parts, start = self.cut.parts or (0,), 0
        given = list(tensors)
        a = _rows(a)
        for i in parts:
            end = start + tensors[i][0].numel()
            # A copy: the rest may work in place, on what h(x) must keep.
            given[i] = a[:, start:end].reshape(tensors[i].shape).to(tensors[i].dtype, copy=True)
            start = end
        return given


_NONE = "There is no cut in this network: skip connections span all of it"


@dataclass(frozen=True)
class _Call:
    """One call of a module: its real tensors by place, with sums that keep their graph whatever happens in place."""

    name: str
    tensors: dict[int, Tensor]
    sums: list[Tensor]
    key: tuple[Any, ...]

    def key_of(self, parts: tuple[int, ...] | None) -> tuple[Any, ...]:
        return tuple(key for i, key in zip(self.tensors, self.key, strict=True) if parts is None or i in parts)


class _Pass:
    """One forward pass at fresh points, recording every call; leaves may take the place of one module's output."""

    def __init__(self, run: Function, x: Tensor, swapped: str | None = None) -> None:
        self.calls: list[_Call] = []
        self.came: _Call | None = None
        self.leaves: dict[int, Tensor] = {}
        self.plain = True
        self.x = x.detach().clone().requires_grad_()
        start = self.x.clone()
        self.start_key, self.start_node = (_key(start),), start.grad_fn
        with ExitStack() as hooks:
            for name, m in _module(run).named_modules():
                if name and name == swapped:
                    _hook(hooks, m, self._swap)
                if name:
                    _hook(hooks, m, self._recorder(name))
            self.out = run(start)
        self.end_key = (_key(self.out),)

    def times(self, name: str) -> int:
        return sum(call.name == name for call in self.calls)

    def _recorder(self, name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.calls.append(_call(name, tree_flatten(output)[0]))

        return record

    def _swap(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        tensors, tree = tree_flatten(output)
        self.plain = isinstance(output, Tensor)
        self.came = _call("", tensors)
        self.leaves = {i: t.detach().clone().requires_grad_() for i, t in self.came.tensors.items()}
        # clones, because the rest may work in place
        return tree_unflatten([self.leaves[i].clone() if i in self.leaves else t for i, t in enumerate(tensors)], tree)


def _call(name: str, tensors: list[Any]) -> _Call:
    real = {i: t for i, t in enumerate(tensors) if isinstance(t, Tensor) and t.is_floating_point()}
    return _Call(name, real, [t.sum() for t in real.values()], tuple(_key(t) for t in real.values()))


def _key(t: Tensor) -> tuple[Any, ...]:
    """The same for two tensors iff they are the same numbers in memory, up to their shape; in-place work changes it."""
    return t.untyped_storage().data_ptr(), t.storage_offset(), t.numel(), t._version


def _examine(run: Function, x: Tensor, base: _Pass, name: str) -> Cut | str:
    """Returns the cut at a module, or the reason why it is none."""
    if run.start is not None and name == run.start[0]:
        return "it is the input of the function"
    calls = [call for call in base.calls if call.name == name]
    if not calls:
        return "it takes no part in the forward pass"
    if len(calls) > 1:
        return f"it runs {len(calls)} times, so its output is not one place in the network"
    if not calls[0].tensors:
        return "it returns no real tensor"
    seen = _Pass(run, x, name)
    if seen.came is None or seen.times(name) != 1:
        return "it does not run the same way in every forward pass"
    again: list[bool] = []
    with ExitStack() as hooks:
        _hook(hooks, layer(_module(run), name), lambda *_: again.append(True))
        used = [i for i, leaf in seen.leaves.items() if _depends([seen.out.sum()], leaf)]
    if again:
        return "it runs again in the backward pass (inside an activation checkpoint), where no hook can split it"
    if not used:
        return "the output of the function does not depend on it"
    if _depends([seen.out.sum()], seen.x):
        return f"a skip connection goes around it, by which the input reaches {_where(run, seen, name)}"
    of_input = dict(zip(seen.came.tensors, seen.came.sums, strict=True))
    parts = tuple(i for i in used if _depends([of_input[i]], seen.x))
    if not parts:
        return "it does not depend on the input of the function"
    if calls[0].key_of(parts) == base.start_key:
        return "it returns the input of the function unchanged, so there is nothing before it"
    if calls[0].key_of(parts) == base.end_key:
        return "it returns the output of the function, so there is nothing after it"
    shapes = [tuple(seen.leaves[i].shape) for i in parts]
    if any(not shape or shape[0] != len(x) for shape in shapes):
        return f"it returns {' and '.join(map(str, shapes))} for {len(x)} samples: the batch is not the first dimension"
    width = sum(seen.leaves[i].numel() for i in parts) // len(x)
    module = layer(_module(run), name)
    return Cut(name, type(module).__name__, width, None if seen.plain else parts)


def _bypassed(seen: _Pass, call: _Call) -> bool:
    """Whether the graph of a pass has a path from the input to the output around the output of a call."""
    if any(t._is_view() for t in call.tensors.values()):
        return False  # in-place work may have rewritten its node: not known
    known = {total.grad_fn.next_functions[0][0] for total in call.sums if total.grad_fn is not None}
    ahead = [seen.out.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in known:
            continue
        if node is seen.start_node:
            return True
        known.add(node)
        ahead.extend(following for following, _ in node.next_functions)
    return False


def _where(run: Function, seen: _Pass, name: str) -> str:
    """Names the first module after the boundary that the input still reaches."""
    place = next(i for i, call in enumerate(seen.calls) if call.name == name)
    for call in seen.calls[place + 1 :]:
        if _depends(call.sums, seen.x):
            return f"{call.name!r} ({type(layer(_module(run), call.name)).__name__})"
    return f"the end of the forward pass of {type(_module(run)).__name__}"


def _depends(sums: list[Tensor], x: Tensor) -> bool:
    return any(
        s.requires_grad and torch.autograd.grad(s, x, retain_graph=True, allow_unused=True)[0] is not None for s in sums
    )


def _few(run: Function, x: Tensor) -> tuple[Function, Tensor]:
    index = torch.arange(min(len(x), 2), device=x.device)
    return run.rows(index), x[index]


def _module(run: Function) -> nn.Module:
    if run.module is None:
        raise UsageError(f"f is a {type(run.f).__name__}, not a module: only modules can be split at their layers")
    return run.module


def _hook(hooks: ExitStack, module: nn.Module, hook: Callable[..., Any]) -> None:
    hooks.callback(module.register_forward_hook(hook).remove)


def _rest(module: nn.Module, name: str) -> list[nn.Module] | None:
    """Returns the modules after ``name`` where all modules around it are plain ``nn.Sequential``, else ``None``."""
    rest: list[nn.Module] = []
    for key in name.split("."):
        if type(module).forward is not nn.Sequential.forward or module._forward_hooks:
            return None
        children = module._modules
        place = list(children).index(key)
        rest = [m for m in list(children.values())[place + 1 :] if m is not None] + rest
        module = module.get_submodule(key)
    return rest


def _rows(t: Tensor) -> Tensor:
    return t.reshape(len(t), -1)


def _chained(modules: Iterable[nn.Module]) -> Callable[[Tensor], Any]:
    def call(a: Any) -> Any:
        for module in modules:
            a = module(a)
        return a

    return call
