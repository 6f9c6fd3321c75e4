"""The energy of attention: nuclear norms of the products of its weights, head by head.

Idea: a head sees its queries and keys only through x^T W_Q^T W_K y, and its values and outputs through W_O W_V. So the
natural matrices of attention are these products, of rank at most the size of a head::

    E = sum over heads of ||W_Q^T W_K||_* + ||W_O W_V||_*

Weight decay on the factors is an upper bound of it, ||A B^T||_* <= (||A||_F^2 + ||B||_F^2) / 2, and acts like it in
training. Reference: S. Kobayashi, Y. Akram, J. von Oswald, "Weight decay induces low-rank attention layers" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from groundstate.blocks import canonical
from groundstate.energies.base import Energy, NetworkEnergy, Traits, require
from groundstate.energies.capabilities import OfModel
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.products import product_nuclear

Named = list[tuple[str, nn.Parameter]]


@dataclass(frozen=True)
class Heads:
    """Where the four weights of one attention module are in a list of parameters: ``(index, first, count)`` each.

    Attributes:
        query: Rows of the query weight ``(heads * size, d)``.
        key: Rows of the key weight, ``(key_heads * size, d)``; each serves heads / key_heads heads.
        value: Likewise.
        output: Columns of the output weight, ``(d, heads * size)``.
        heads: Of the queries.
        name: Of the module.
    """

    query: tuple[int, int, int]
    key: tuple[int, int, int]
    value: tuple[int, int, int]
    output: tuple[int, int, int]
    heads: int
    name: str = field(compare=False)


@dataclass(frozen=True, repr=False)
class AttentionNuclear(Energy, OfModel):
    """Nuclear norms of the products of attention weights per head, W_Q^T W_K and W_O W_V.

    Found are ``nn.MultiheadAttention`` and modules with linear layers ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``
    or ``out_proj`` that say their ``num_heads`` or ``head_dim``; keys and values may have fewer heads than queries.
    Biases, and what stands between the weights (rotations of the position, normalizations of queries and keys), take no
    part.

    Attributes:
        qk: Count W_Q^T W_K.
        vo: Count W_O W_V.

    >>> energy, weights = AttentionNuclear().for_model(nn.MultiheadAttention(4, 2))
    >>> [name for name, _ in weights]
    ['in_proj_weight', 'out_proj.weight']
    >>> energy.value([torch.eye(4).repeat(3, 1), 2 * torch.eye(4)])  # W_Q = W_K = W_V = I, two heads of two: 2 + 4 each
    tensor(12.)
    """

    qk: bool = True
    vo: bool = True

    name: ClassVar[str] = "attention_nuclear"
    traits: ClassVar[Traits] = Traits(
        formula="sum over heads of ||W_Q^T W_K||_* + ||W_O W_V||_*",
        reference="Kobayashi, Akram and von Oswald 2024",
        cost="per head 16 d size^2 flops for each product and an SVD of the size of a head",
        convex=False,
        degree=2.0,
    )

    def __post_init__(self) -> None:
        for name in ("qk", "vo"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be True or False, got {value!r}")
        require(self.qk or self.vo, "attention_nuclear needs one of qk and vo: with neither there is nothing to count")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(vo=False), cls(qk=False)

    def for_model(self, model: nn.Module) -> tuple[NetworkEnergy, Named]:
        found: dict[int, tuple[int, str, nn.Parameter]] = {}
        layers = []
        for prefix, module in model.named_modules():
            if (parts := _parts(module, canonical(f"{prefix}.") if prefix else "")) is None:
                continue
            heads, weights = parts
            places = []
            for name, parameter, first, rows in weights:
                index, _, _ = found.setdefault(id(parameter), (len(found), name, parameter))
                places.append((index, first, rows))
            query, key, value, output = places
            layers.append(Heads(query, key, value, output, heads, canonical(prefix) or type(module).__name__))
        if not layers:
            raise UsageError(
                f"{self!r} finds no attention in {type(model).__name__}: it knows nn.MultiheadAttention and modules "
                "with q_proj, k_proj, v_proj, o_proj (or out_proj) and num_heads (or head_dim)"
            )
        return AtAttention(self, tuple(dict.fromkeys(layers))), [(name, p) for _, name, p in found.values()]


@dataclass(frozen=True, repr=False)
class AtAttention(NetworkEnergy):
    """The energy of the attention modules of one model, as a function of the list of their weights."""

    energy: AttentionNuclear
    layers: tuple[Heads, ...]

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return ()

    @property
    def traits(self) -> Traits:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.energy.traits

    def __repr__(self) -> str:
        return repr(self.energy)

    def value(self, layers: Sequence[Tensor]) -> Tensor:
        value: Tensor = _Value.apply(self, *layers)  # pyright: ignore[reportAssignmentType]
        return value

    def value_and_grad(self, layers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            weights = [w.detach() for w in layers]
            grads = [torch.zeros_like(w) for w in weights]
            values = [self._at(heads, weights, grads) for heads in self.layers]
            return torch.stack(values).sum(), grads

    def _at(self, at: Heads, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        """Returns the value of one module and adds its gradients."""
        total = torch.zeros((), device=weights[0].device)
        products = [(at.query, at.key, False)] * self.energy.qk + [(at.output, at.value, True)] * self.energy.vo
        for one, other, columns in products:
            a, b = _slice(weights, one, columns), _slice(weights, other)
            try:
                total = total + _product(a, b, at.heads, _slice(grads, one, columns), _slice(grads, other))
            except NonFiniteError as error:
                raise NonFiniteError(f"the attention {at.name!r}: {error}") from None
        return total


def _slice(weights: list[Tensor], place: tuple[int, int, int], columns: bool = False) -> Tensor:
    """Returns a view of rows, or of columns as rows."""
    index, first, count = place
    return (weights[index].mT if columns else weights[index])[first : first + count]


def _product(a: Tensor, b: Tensor, heads: int, grad_a: Tensor, grad_b: Tensor) -> Tensor:
    """Returns the sum of ||A_h^T B_h||_* over heads, of the rows of a and b, and adds to their gradients."""
    a = a.unflatten(0, (heads, -1)).mT
    b = b.unflatten(0, (-1, a.shape[-1])).mT
    repeats = heads // len(b)
    value, by_a, by_b = product_nuclear(a, b.repeat_interleave(repeats, 0))
    grad_a += by_a.mT.flatten(0, 1)
    grad_b += by_b.unflatten(0, (-1, repeats)).sum(1).mT.flatten(0, 1)
    return value.sum()


class _Value(torch.autograd.Function):
    """The value, whose gradients are their closed form."""

    @staticmethod
    def forward(ctx: Any, energy: AtAttention, *layers: Tensor) -> Tensor:
        value, grads = energy.value_and_grad(layers)
        ctx.save_for_backward(*grads)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (None, *[outputs[0].to(g.dtype) * g for g in ctx.saved_tensors])


_Weight = tuple[str, nn.Parameter, int, int]


def _parts(module: nn.Module, prefix: str) -> tuple[int, list[_Weight]] | None:
    """Returns the heads of an attention module and its query, key, value and output weights; ``None`` for others."""
    if isinstance(module, nn.MultiheadAttention):
        return _of_torch(module, prefix)
    layers = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    output = "o_proj" if hasattr(module, "o_proj") else "out_proj"
    layers.append(getattr(module, output, None))
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return None
    names = [f"{prefix}{name}" for name in ("q_proj", "k_proj", "v_proj", output)]
    found = [_whole(name, layer) for name, layer in zip(names, layers, strict=True)]
    rows = found[0][1].shape[0]
    heads = getattr(module, "num_heads", None)
    if not isinstance(heads, int) and isinstance(size := getattr(module, "head_dim", None), int):
        heads = rows // size
    where = prefix.removesuffix(".") or type(module).__name__
    if not isinstance(heads, int) or heads < 1 or rows % heads:
        raise UsageError(f"the attention {where!r} does not say into how many heads its {rows} queries fall: num_heads")
    size = rows // heads
    for name, _, _, count in found[1:3]:
        if count % size or heads % max(1, count // size):
            raise UsageError(f"{name} has {count} rows, which do not fit {heads} heads of {size}")
    found[3] = (*found[3][:2], 0, found[3][1].shape[1])
    return heads, found


def _of_torch(module: nn.MultiheadAttention, prefix: str) -> tuple[int, list[_Weight]]:
    d = module.embed_dim
    if module.in_proj_weight is not None:
        packed = _parameter(f"{prefix}in_proj_weight", module, "in_proj_weight")
        found: list[_Weight] = [(f"{prefix}in_proj_weight", packed, i * d, d) for i in range(3)]
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        found = [(f"{prefix}{n}", _parameter(f"{prefix}{n}", module, n), 0, d) for n in names]
    return module.num_heads, [*found, _whole(f"{prefix}out_proj", module.out_proj)]


def _whole(name: str, layer: Any) -> _Weight:
    weight = _parameter(f"{name}.weight", layer, "weight")
    return f"{name}.weight", weight, 0, weight.shape[0]


def _parameter(name: str, module: nn.Module, short: str) -> nn.Parameter:
    parameter = module._parameters.get(short)
    if parameter is None:
        raise UsageError(f"{name} is parametrized (weight_norm, LoRA, ...): it is not a parameter of its own")
    return parameter
