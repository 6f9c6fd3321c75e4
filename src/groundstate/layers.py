"""The ordered weight matrices of a network that is a plain chain of linear layers.

Idea: the order is read from the computation, not from the order of definition. The model is traced symbolically
(``torch.fx``); it is accepted only where every operation takes exactly the result of the one before and is either
``nn.Linear`` or one that adds no edges between neurons: an elementwise activation, dropout, identity or flattening.
Everything else (skip connections, convolutions, attention, normalization, shared or parametrized weights,
control flow) is refused by name, because the graph of such a network is not the chain W_1, ..., W_L.

Normalizations are refused too: they rescale every neuron by factors that the weights do not show. Who wants the energy
of the linear weights alone passes them as a list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, fx, nn

from groundstate.blocks import canonical
from groundstate.errors import UsageError

_ADVICE = "pass the weight matrices [W_1, ..., W_L] as a list to choose the graph yourself"

_EDGELESS = (
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
    chain = _read(root)
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
    found = _read(root).found
    _check_complete(root, found)
    return [(canonical(f"{target}.weight"), weight) for target, weight in found]


def _read(root: nn.Module) -> _Chain:
    tracer = _Tracer()
    try:
        graph = tracer.trace(root)
    except UsageError:
        raise
    except Exception as error:  # whatever the model's own forward raises on symbolic input
        reason = (str(error).strip() or "no message").splitlines()[0]
        _refuse(f"the forward pass of {type(root).__name__} cannot be traced ({type(error).__name__}: {reason})")
    return _Chain(root).read(graph)


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
        name = getattr(node.target, "__name__", node.target)
        reads_size = node.op == "call_method" and name in _SIZES
        reads_shape = node.op == "call_function" and name == "getattr" and node.args[1] in ("shape", "ndim")
        of_numbers = bool(node.all_input_nodes) and all(n in self.numbers for n in node.all_input_nodes)
        if reads_size or reads_shape or (node.op == "call_function" and of_numbers):
            self.numbers.add(node)
            return True
        return False

    def _step(self, node: fx.Node) -> None:
        where = self._describe(node)
        if node.op == "get_attr":
            _refuse(f"{where} is used directly in the forward pass, outside an nn.Linear")
        inputs = [n for n in node.all_input_nodes if n not in self.numbers]
        if node.op == "output":
            if node.args[0] is not self.current:
                _refuse("the output is not the result of the last step alone (several outputs, or a branch)")
            return
        if len(inputs) != 1:
            names = " and ".join(map(str, inputs)) or "no tensor"
            _refuse(f"{where} joins {names}: a skip connection or branch, not a chain")
        if inputs[0] is not self.current:
            _refuse(f"{where} takes {inputs[0]} although the last step gave {self.current}: a branch, not a chain")
        if node.op == "call_module":
            self._module(str(node.target), where)
        else:
            name = str(getattr(node.target, "__name__", node.target))
            self._function(name, where)
            self.steps.append(Step("", _called(node, name)))
        self.current = node

    def _module(self, target: str, where: str) -> None:
        module = self.root.get_submodule(target)
        if isinstance(module, nn.Linear):
            self._linear(target, module, where)
        elif isinstance(module, _OUTPUT_ONLY):
            self.ended_by = where
        elif isinstance(module, _NORMALIZATIONS):
            _refuse(f"{where} rescales the neurons by factors that the weights do not show")
        elif not isinstance(module, _EDGELESS):
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
        if self.found and self.found[-1][1].shape[0] != module.in_features:
            before, outputs = canonical(self.found[-1][0]), self.found[-1][1].shape[0]
            _refuse(f"{where} takes {module.in_features} inputs but {before!r} before it gives {outputs}")
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
