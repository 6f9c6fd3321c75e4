"""The energy of the whole layered graph of a network, not of its layers one by one.

Idea: neurons are nodes, weights are edges, A is the symmetric adjacency of all d_0 + ... + d_L neurons::

    E = sum_i |lambda_i(A)| = 2 ||B||_*,     B the weights between neurons of even and of odd layers

It lies between two sums of layer norms::

    2 max(sum over odd l, sum over even l of ||W_l||_*)  <=  E  <=  2 sum_l ||W_l||_*

and reaches the right end only where W_{l+1} W_l = 0 at every hidden layer. So at fixed layer norms, minimizing E aligns
the output directions of a layer with the input directions of the next: that is what it adds to the nuclear norm.

Skip connections ``x + f(x)`` are edges of weight 1 from the neurons of x to those of the sum (`groundstate.norms.dag`).
In a chain of convolutions the channels at all pixels are nodes, E is per pixel (`groundstate.norms.graph_conv`).

Reference: I. Gutman, "The energy of a graph" (1978); V. Nikiforov, "The energy of graphs and matrices" (2007).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor, nn

from groundstate.energies.base import NetworkEnergy, Traits, is_whole, require
from groundstate.energies.capabilities import Anchor, Anchored, OfModel
from groundstate.errors import UsageError
from groundstate.layers import network_graph
from groundstate.layers_conv import convolution_chain, has_convolution
from groundstate.norms import dag, graph, graph_conv
from groundstate.norms.subgradient import inner, rounding


@dataclass(frozen=True, repr=False)
class GraphEnergy(NetworkEnergy, Anchored, OfModel):
    """Energy of the layered graph: sum of |eigenvalues| of its adjacency.

    Invariant under relabeling the neurons of a layer and under changing the sign of a neuron (its incoming and outgoing
    weights together). Not invariant under the rescaling of a ReLU neuron. Biases do not take part. In float32, singular
    values of B below max(shape of B) * 1.2e-7 of the largest count as kernel and get no gradient; a net trained with a
    strong graph term has such values, so convert its weights to float64 where their gradient matters. Convex for
    ``absolute=False`` but not for ``absolute=True``, so ``traits.convex``, which speaks of all instances, is False.

    Attributes:
        absolute: Take |W_l| in place of W_l: the energy of the graph with nonnegative weights. Its gradient is zero at
            weights that are zero.

    >>> import torch
    >>> GraphEnergy().value([torch.eye(2), torch.ones(1, 2)])
    tensor(5.4641)
    """

    absolute: bool = False

    name: ClassVar[str] = "graph"
    traits: ClassVar[Traits] = Traits(
        formula="sum_i |lambda_i(A)| = 2 ||B||_*, A the adjacency of all neurons; absolute=True: of |W|",
        reference="Gutman 1978; Nikiforov 2007 (E(A) = ||A||_*)",
        cost="one eigh of size n (nodes of the smaller color class), linear in depth for deep networks, + 4 n_l d_l "
        "d_{l-1} flops per layer",
        convex=False,
        degree=1.0,
        invariances=("neuron_sign", "neuron_permutation"),
    )

    def __post_init__(self) -> None:
        require(isinstance(self.absolute, bool), f"absolute must be True or False, got {self.absolute!r}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(absolute=True)

    def value(self, layers: Sequence[Tensor] | nn.Module) -> Tensor:
        """Returns E as a scalar that autograd differentiates (by a dense SVD; for training use `value_and_grad`).

        Args:
            layers: W_1..W_L, W_l of shape ``(d_l, d_{l-1})``, or a model that `network_graph` can read, with or without
                skip connections, or `convolution_chain`.

        Raises:
            UsageError: the layers do not fit one another, or the model cannot be read; the module is named.
            NonFiniteError: a weight is NaN or infinite.
        """
        if isinstance(layers, nn.Module):
            placed, named = self.for_model(layers)
            return placed.value([p for _, p in named])
        return graph.energy(layers, self.absolute)

    def value_and_grad(self, layers: Sequence[Tensor] | nn.Module) -> tuple[Tensor, list[Tensor]]:
        """Returns E and dE/dW_l per layer, in closed form; the minimal-norm subgradient on the kernel.

        Arguments and errors as of `value`.
        """
        if isinstance(layers, nn.Module):
            placed, named = self.for_model(layers)
            return placed.value_and_grad([p for _, p in named])
        return graph.energy_and_grad(layers, self.absolute)

    def for_model(self, model: nn.Module) -> tuple[GraphEnergy, list[tuple[str, nn.Parameter]]]:
        """Returns the energy that takes its place on the weights of a model, and these weights, by canonical names.

        That is itself for a chain of layers, `WiredGraphEnergy` for a network with skip connections, and
        `ConvolutionGraphEnergy` for a chain of convolutions.

        Raises:
            UsageError: the model cannot be read; says which module or operation, and why. Convolutions with
                ``absolute=True``.
        """
        if has_convolution(model):
            named, dilations = convolution_chain(model)
            shapes = tuple(tuple(p.shape) for _, p in named)
            return ConvolutionGraphEnergy(self.absolute, shapes, tuple(dilations)), named
        named, wiring = network_graph(model)
        return self if wiring.is_chain else WiredGraphEnergy(self.absolute, wiring), named

    def bounded(self) -> bool:
        return not self.absolute

    def anchor(self, weights: Sequence[Tensor]) -> Anchor:
        value, grads = self.value_and_grad(weights)
        return Anchor(float(value), grads, 0.0, rounding(grads, weights, float(value)))


_ONE_EDGE = dag.Wiring((1, 1), ((0, 1),))


@dataclass(frozen=True, repr=False)
class WiredGraphEnergy(GraphEnergy):
    """The graph energy of a network with skip connections, of which the weights alone do not tell the graph.

    `GraphEnergy.for_model` makes it. It is written like the energy whose place it takes.

    Attributes:
        wiring: The groups of neurons and what joins them.

    A weight of 3 and a residual connection around it: one edge of weight 4.

    >>> import torch
    >>> WiredGraphEnergy(wiring=dag.Wiring((1, 1), ((0, 1),), ((0, 1),))).value([torch.tensor([[3.0]])])
    tensor(8.)
    """

    wiring: dag.Wiring = _ONE_EDGE

    def __repr__(self) -> str:
        return repr(GraphEnergy(self.absolute))

    def value(self, layers: Sequence[Tensor] | nn.Module) -> Tensor:
        """Returns E as of `GraphEnergy.value`, by the dense adjacency."""
        if isinstance(layers, nn.Module):
            return super().value(layers)
        return dag.energy(self.wiring, layers, self.absolute)

    def value_and_grad(self, layers: Sequence[Tensor] | nn.Module) -> tuple[Tensor, list[Tensor]]:
        """Returns E and dE/dW_l as of `GraphEnergy.value_and_grad`; identity edges have no gradient."""
        if isinstance(layers, nn.Module):
            return super().value_and_grad(layers)
        return dag.energy_and_grad(self.wiring, layers, self.absolute)

    def anchor(self, weights: Sequence[Tensor]) -> Anchor:
        found = super().anchor(weights)  # identity edges carry a part of the energy that no gradient sees
        return found._replace(shift=found.value - inner(found.gradients, weights))


@dataclass(frozen=True, repr=False)
class ConvolutionGraphEnergy(GraphEnergy):
    """The graph energy per pixel of a chain of convolutions of stride 1, on a periodic image.

    `GraphEnergy.for_model` makes it. It is written like the energy whose place it takes. Float32 kernels are computed
    in float32.

    Attributes:
        shapes: Of the kernels, ``(out, in, *k)``: the weights may come as matrices.
        dilations: Of every layer, one per axis.
        size: Pixels of the image per axis, that is frequencies.

    >>> import torch
    >>> ConvolutionGraphEnergy(shapes=((1, 1, 2),), dilations=((1,),), size=2).value([torch.tensor([[1.0, 2.0]])])
    tensor(4.)
    """

    shapes: tuple[tuple[int, ...], ...] = ((1, 1, 1),)
    dilations: tuple[tuple[int, ...], ...] = ((1,),)
    size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.absolute, "the graph energy of convolutions has no absolute=True: leave it out")
        require(is_whole(self.size, 1), f"size must be a whole number from 1, got {self.size!r}")

    def __repr__(self) -> str:
        return repr(GraphEnergy(self.absolute))

    def for_model(self, model: nn.Module) -> tuple[GraphEnergy, list[tuple[str, nn.Parameter]]]:
        """Returns what `GraphEnergy.for_model` does, with the size of this one."""
        placed, named = super().for_model(model)
        return replace(placed, size=self.size) if isinstance(placed, ConvolutionGraphEnergy) else placed, named

    def value(self, layers: Sequence[Tensor] | nn.Module) -> Tensor:
        """Returns E as of `GraphEnergy.value`; the layers are kernels, or matrices ``(out, in * prod(k))``."""
        if isinstance(layers, nn.Module):
            return super().value(layers)
        return graph_conv.energy(self._kernels(layers), self.size, self.dilations)

    def value_and_grad(self, layers: Sequence[Tensor] | nn.Module) -> tuple[Tensor, list[Tensor]]:
        """Returns E and its gradients as of `GraphEnergy.value_and_grad`, in the shapes of the layers given."""
        if isinstance(layers, nn.Module):
            return super().value_and_grad(layers)
        value, grads = graph_conv.energy_and_grad(self._kernels(layers), self.size, self.dilations)
        return value, [g.reshape(w.shape) for g, w in zip(grads, layers, strict=True)]

    def _kernels(self, layers: Sequence[Tensor]) -> list[Tensor]:
        given = [tuple(w.shape) for w in layers]
        if [w.numel() for w in layers] != [math.prod(shape) for shape in self.shapes]:
            raise UsageError(f"expected the weights of kernels of shapes {list(self.shapes)}, got {given}")
        return [w.reshape(shape) for w, shape in zip(layers, self.shapes, strict=True)]
