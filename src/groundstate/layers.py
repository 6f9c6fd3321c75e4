"""The weight matrices of a network of linear layers, and what they join: a chain, or a graph with skip connections.

Idea: the order is read from the computation, not from the order of definition. The model is traced symbolically
(``torch.fx``); it is a chain only where every operation takes exactly the result of the one before and is either
``nn.Linear`` or one that adds no edges between neurons: an elementwise activation, dropout, identity or flattening.
Everything else (convolutions, attention, shared or parametrized weights, control flow) is refused by name, because the
graph of such a network is not the chain W_1, ..., W_L; normalizations too, which rescale every neuron by factors that
the weights do not show. Who wants the energy of the linear weights alone passes them as a list.

`network_graph` reads sums too. The neurons of ``x + f(x)`` are one group: the last weights of f lead to it, and an
identity edge from x does. An activation makes a group of its own of what it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from groundstate.blocks import canonical
from groundstate.errors import UsageError
from groundstate.norms.dag import Wiring

_ADVICE = "pass the weight matrices [W_1, ..., W_L] as a list to choose the graph yourself"

EDGELESS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold, nn.Sigmoid, nn.LogSigmoid,
    nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Identity, nn.Dropout, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.Flatten,
)  # fmt: skip
_NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_OUTPUT_ONLY = (nn.Softmax, nn.LogSoftmax)
_EDGELESS_FUNCTIONS = frozenset((
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "celu", "selu", "gelu", "silu",
    "mish", "softplus", "softsign", "softshrink", "hardshrink", "tanhshrink", "threshold", "sigmoid", "sigmoid_",
    "logsigmoid", "hardsigmoid", "tanh", "tanh_", "hardtanh", "hardswish", "sin", "cos", "erf", "dropout",
    "alpha_dropout", "flatten", "contiguous", "clone", "float", "double", "to",
))  # fmt: skip
_SAME = (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SAME_FUNCTIONS = frozenset(("dropout", "alpha_dropout", "contiguous", "clone", "float", "double", "to"))
_SUMS = frozenset(("add", "add_", "iadd"))
_RESHAPES = frozenset(("view", "reshape"))
_SIZES = frozenset(("size", "dim", "numel"))
_OUTPUT_FUNCTIONS = frozenset(("softmax", "log_softmax"))


@dataclass(frozen=True)
class Step:
    """One operation of a chain: a linear layer, or an operation that adds no edges (``linear`` is ``None``).

    Attributes:
        name: The dotted name of its module, empty for a function.
        run: What is done, tensor to tensor.
        linear: The layer, where it is one.
    """

    name: str
    run: Callable[[Tensor], Tensor]
    linear: nn.Linear | None = None


def chain_steps(model: nn.Module) -> list[Step]:
    """Returns the operations of a chain of linear layers in the order of the forward pass.

    Functions are recorded as they are called now: with the dropout of eval mode, if the model is in eval mode.

    Raises:
        UsageError: see `ordered_layers`; or the chain ends with a softmax, which is not elementwise.
    """
    root = unwrapped(model)
    if type(root) is nn.Linear:
        return [Step("", root, root)]
    chain = _Chain(root).read(_traced(root))
    if chain.ended_by is not None:
        _refuse(f"{chain.ended_by} mixes the neurons")
    return chain.steps


def ordered_layers(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the weights of a chain of linear layers, by canonical name, in the order of the forward pass.

    Args:
        model: ``nn.Sequential`` (nested or not) or any module whose forward pass is a chain; wrappers of
            ``DistributedDataParallel`` and ``torch.compile`` are looked through.

    Returns:
        ``[("0.weight", W_1), ("2.weight", W_2), ...]`` with W_l of shape ``(d_l, d_{l-1})``.

    Raises:
        UsageError: the model is not such a chain; says which module or operation, and why.

    >>> ordered_layers(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))[1][0]
    '2.weight'
    """
    root = unwrapped(model)
    if type(root) is nn.Linear:
        return [("weight", _weight("the model", root))]
    found = _Chain(root).read(_traced(root)).found
    _check_complete(root, found)
    return [(canonical(f"{target}.weight"), weight) for target, weight in found]


def network_graph(model: nn.Module) -> tuple[list[tuple[str, nn.Parameter]], Wiring]:
    """Returns the weights of a network of linear layers with or without skip connections, and what they join.

    Args:
        model: Made of what `ordered_layers` accepts and of sums of two results of one width, as in ``x + f(x)``.

    Returns:
        The weights as of `ordered_layers` and the `Wiring`: the groups of neurons, the input as group 0, where each
        weight leads from and to, and the identity edges.

    Raises:
        UsageError: an operation cannot be read; says which, and why.

    >>> network_graph(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))[1]
    Wiring(sizes=(4, 3, 2), edges=((0, 1), (1, 2)), identities=())
    """
    root = unwrapped(model)
    if type(root) is nn.Linear:
        return [("weight", _weight("the model", root))], Wiring((root.in_features, root.out_features), ((0, 1),))
    network = _Network(root)
    network.read(_traced(root))
    _check_complete(root, network.found)
    return [(canonical(f"{target}.weight"), weight) for target, weight in network.found], network.wiring()


def _traced(root: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        return tracer.trace(root)
    except UsageError:
        raise
    except Exception as error:  # whatever the model's own forward raises on symbolic input
        reason = (str(error).strip() or "no message").splitlines()[0]
        _refuse(f"the forward pass of {type(root).__name__} cannot be traced ({type(error).__name__}: {reason})")


def unwrapped(module: nn.Module) -> nn.Module:
    """Looks through DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


class _Tracer(fx.Tracer):
    """Records every torch.nn module, linear or not, as one step and looks through wrappers inside the model."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inner = unwrapped(m)
        return super().call_module(inner, forward if inner is m else inner.forward, args, kwargs)


class _Chain:
    """Walks a traced graph and keeps the linear layers, refusing the first step that breaks the chain."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.found: list[tuple[str, nn.Parameter]] = []
        self.steps: list[Step] = []
        self.owners: dict[int, str] = {}
        self.numbers: set[fx.Node] = set()  # sizes read from the input, not tensors of the chain
        self.current: fx.Node | None = None
        self.ended_by: str | None = None

    def read(self, graph: fx.Graph) -> _Chain:
        """Fills ``found`` and ``steps``."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif not self._is_number(node):
                self._step(node)
        if not self.found:
            _refuse(f"{type(self.root).__name__} has no nn.Linear in its forward pass")
        return self

    def _input(self, node: fx.Node) -> None:
        if not node.users:
            return
        if self.current is not None:
            _refuse(f"the forward pass takes more than one input ({self.current} and {node})")
        self.current = node

    def _is_number(self, node: fx.Node) -> bool:
        """Sizes such as x.size(0) or x.shape[0]."""
        of_numbers = bool(node.all_input_nodes) and all(n in self.numbers for n in node.all_input_nodes)
        if _reads_size(node) or (node.op == "call_function" and of_numbers):
            self.numbers.add(node)
            return True
        return False

    def _step(self, node: fx.Node) -> None:
        where = self._describe(node)
        if node.op == "get_attr":
            _refuse(f"{where} is used directly in the forward pass, outside an nn.Linear")
        inputs = [n for n in node.all_input_nodes if n not in self.numbers]
        if node.op == "output":
            self._output(node)
        else:
            self._follow(node, inputs, where)

    def _output(self, node: fx.Node) -> None:
        if node.args[0] is not self.current:
            _refuse("the output is not the result of the last step alone (several outputs, or a branch)")

    def _follow(self, node: fx.Node, inputs: list[fx.Node], where: str) -> None:
        if len(inputs) != 1:
            _refuse(f"{_joins(where, inputs)}: a skip connection or branch, not a chain")
        if inputs[0] is not self.current:
            _refuse(f"{where} takes {inputs[0]} although the last step gave {self.current}: a branch, not a chain")
        self._apply(node, where)
        self.current = node
        for (before, w), (_, following) in pairwise(self.found[-2:]):
            if w.shape[0] != following.shape[1]:
                takes = f"{where} takes {following.shape[1]} inputs"
                _refuse(f"{takes} but {canonical(before)!r} before it gives {w.shape[0]}")

    def _apply(self, node: fx.Node, where: str) -> None:
        if node.op == "call_module":
            self._module(str(node.target), where)
        else:
            self._function(_name(node), where)
            self.steps.append(Step("", _called(node, _name(node))))

    def _module(self, target: str, where: str) -> None:
        module = self.root.get_submodule(target)
        if isinstance(module, nn.Linear):
            self._linear(target, module, where)
        elif isinstance(module, _OUTPUT_ONLY):
            self.ended_by = where
        elif isinstance(module, _NORMALIZATIONS):
            _refuse(f"{where} rescales the neurons by factors that the weights do not show")
        elif not isinstance(module, EDGELESS):
            _refuse(f"{where} is neither linear nor elementwise")
        self.steps.append(Step(target, module, module if isinstance(module, nn.Linear) else None))

    def _function(self, name: str, where: str) -> None:
        if name in _OUTPUT_FUNCTIONS:
            self.ended_by = where
        elif name in _RESHAPES:
            if self.found:
                _refuse(f"{where} reshapes after the first linear layer")
        elif name not in _EDGELESS_FUNCTIONS:
            _refuse(f"{where} is not an elementwise activation")

    def _linear(self, target: str, module: nn.Linear, where: str) -> None:
        if self.ended_by is not None:
            _refuse(f"{self.ended_by} mixes the neurons before {where}")
        weight = _weight(where, module)
        if id(weight) in self.owners:
            first = self.owners[id(weight)]
            twice = "is used twice" if first == target else f"shares its weight with {canonical(first)!r}"
            _refuse(f"{where} {twice}: its edges would stand in the graph twice")
        self.owners[id(weight)] = target
        self.found.append((target, weight))

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            target = str(node.target)
            return f"{canonical(target)!r} ({type(self.root.get_submodule(target)).__name__})"
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        inside = canonical(str(stack[-1][0])) if stack else ""
        kind = repr(str(node.target)) if node.op == "get_attr" else f"operation {node.name!r}"
        return f"{kind} in {inside!r}" if inside else kind


@dataclass
class _Neurons:
    """A group of neurons, or edges to one not yet made: where from, and the number of the weight (None: identity)."""

    group: int | None
    width: int | None
    incoming: list[tuple[int, int | None]] = field(default_factory=list)


class _Network(_Chain):
    """Walks a traced graph with sums and branches, and keeps the groups of neurons and what joins them."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.neurons: dict[fx.Node, _Neurons] = {}
        self.sizes: list[int | None] = []
        self.edges: dict[int, tuple[int, int]] = {}
        self.identities: list[tuple[int, int]] = []

    def wiring(self) -> Wiring:
        """Returns what was read; widths known at one end of an identity edge hold at the other."""
        for _ in self.sizes:
            for a, b in self.identities:
                self._settle(b, self.sizes[a], "a sum")
                self._settle(a, self.sizes[b], "a sum")
        if len(sizes := [n for n in self.sizes if n is not None]) != len(self.sizes):
            _refuse("a sum joins results whose width no linear layer tells")
        return Wiring(tuple(sizes), tuple(self.edges[i] for i in range(len(self.found))), tuple(self.identities))

    def _input(self, node: fx.Node) -> None:
        super()._input(node)
        if self.current is node:
            self.neurons[node] = _Neurons(0, None)
            self.sizes.append(None)

    def _output(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node) or result not in self.neurons:
            _refuse("the output is not one tensor")
        self._made(self.neurons[result])
        if unused := [n for n in self.neurons if not n.users]:
            _refuse(f"{self._describe(unused[0])} gives a result that nothing uses")

    def _follow(self, node: fx.Node, inputs: list[fx.Node], where: str) -> None:
        name = _name(node)
        if node.op != "call_module" and name in _SUMS and len(node.args) == 2 and not node.kwargs:
            result = self._sum(node, where)
        elif len(inputs) != 1:
            _refuse(f"{_joins(where, inputs)}: of joins only the sum of two results can be read")
        else:
            result = self.neurons[inputs[0]]
            module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Linear):
                source = self._made(result)
                self._settle(source, module.in_features, where)
                result = _Neurons(None, module.out_features, [(source, len(self.found))])
            elif not isinstance(module, _SAME) and (module is not None or name not in _SAME_FUNCTIONS):
                self._made(result)
            self._apply(node, where)
        self.neurons[node] = result
        if sum(not _reads_size(user) for user in node.users) > 1:
            self._made(result)

    def _sum(self, node: fx.Node, where: str) -> _Neurons:
        parts = [self.neurons[a] for a in node.args if isinstance(a, fx.Node) and a in self.neurons]
        if len(parts) != 2 or self.ended_by is not None:
            _refuse(f"{self.ended_by or where} mixes the neurons, or adds what is no result of the network")
        widths = {w for p in parts if (w := p.width if p.group is None else self.sizes[p.group]) is not None}
        if len(widths) > 1:
            _refuse(f"{where} adds results of {' and '.join(map(str, sorted(widths)))} neurons")
        incoming = [edge for p in parts for edge in (p.incoming if p.group is None else [(p.group, None)])]
        return _Neurons(None, min(widths, default=None), incoming)

    def _made(self, neurons: _Neurons) -> int:
        """The group of neurons, made now if it was not: its incoming edges lead to it from here on."""
        if neurons.group is None:
            neurons.group = len(self.sizes)
            self.sizes.append(neurons.width)
            for source, number in neurons.incoming:
                if number is None:
                    self.identities.append((source, neurons.group))
                else:
                    self.edges[number] = (source, neurons.group)
        return neurons.group

    def _settle(self, group: int, width: int | None, where: str) -> None:
        if width is not None and self.sizes[group] not in (None, width):
            _refuse(f"{where} takes {width} inputs but what comes before it has {self.sizes[group]}")
        self.sizes[group] = self.sizes[group] if width is None else width


def _joins(where: str, inputs: list[fx.Node]) -> str:
    return f"{where} joins {' and '.join(map(str, inputs)) or 'no tensor'}"


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _reads_size(node: fx.Node) -> bool:
    """x.size(0), x.shape and the like."""
    shape = node.op == "call_function" and _name(node) == "getattr" and node.args[1] in ("shape", "ndim")
    return shape or (node.op == "call_method" and _name(node) in _SIZES)


def _called(node: fx.Node, name: str) -> Callable[[Tensor], Tensor]:
    """Returns what a node does to its one tensor: for a ReLU the module, which closed forms know.

    A reshape is a flattening: only those before the first layer pass.
    """
    if name in ("relu", "relu_"):
        return nn.ReLU()
    if name in _RESHAPES:
        return nn.Flatten()
    others, named = node.args[1:], dict(node.kwargs)
    if node.op == "call_method":
        return lambda h: getattr(h, name)(*others, **named)
    if node.args:
        return lambda h: node.target(h, *others, **named)  # pyright: ignore[reportCallIssue]
    return lambda h: node.target(**{k: h if isinstance(v, fx.Node) else v for k, v in named.items()})  # pyright: ignore[reportCallIssue]


def _weight(where: str, module: nn.Linear) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if weight is None:
        _refuse(f"{where} has a parametrized weight (weight_norm, spectral_norm, ...): it is not a parameter")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        _refuse(f"{where} is lazy and not yet initialized: run one batch through the model first")
    if type(module).forward is not nn.Linear.forward:
        _refuse(f"{where} has a forward pass of its own")
    return weight


def _check_complete(root: nn.Module, found: list[tuple[str, nn.Parameter]]) -> None:
    known = {id(weight) for _, weight in found}
    for name, parameter in root.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in known:
            _refuse(f"{canonical(name)!r} of shape {tuple(parameter.shape)} takes no part in the forward pass")


def _refuse(why: str) -> NoReturn:
    raise UsageError(f"the layers cannot be ordered: {why}; {_ADVICE}")
