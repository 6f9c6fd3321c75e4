"""Energies of a dense network on the factors that took its place: E(B A), by the chain rule.

Energies of weights see W = B A as they saw the weight before: under its name, in its place among the layers, with the
patterns that selected it. With G = dE/dW at the product::

    dE/dB = G A^T,      dE/dA = B^T G

For the nuclear norm and balanced factors (B^T B = A A^T, as an SVD leaves them) these are B and A: the gradient of
(||A||_F^2 + ||B||_F^2) / 2, whose minimum over all factors of W is ||W||_*. Weights that stayed dense keep their values
in a fine-tune, and take part only in energies of the whole network. Energies of the function need no chain rule: they
are those of the factorized network. An energy of the path of training has no meaning after its end.

Reference: N. Srebro, J. Rennie, T. Jaakkola, "Maximum-margin matrix factorization" (2004), lemma 1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groundstate import blocks
from groundstate.blocks import Block, as_matrix
from groundstate.compress_factors import Factorized, dense_layer, replace_layers
from groundstate.energies.base import Energy, FunctionEnergy, MatrixEnergy, Sum, Term, TrajectoryEnergy
from groundstate.energies.registry import parse
from groundstate.regularizer import Regularizer

_ELSEWHERE = "it acts on none of the weights that were factored"


@dataclass(frozen=True)
class _Product:
    """The weight of a dense twin, and the factors whose product it is."""

    weight: nn.Parameter
    a: Tensor
    b: Tensor

    def refresh(self) -> None:
        """Sets the weight to the product, and its gradient to zero."""
        product = as_matrix(self.b.detach()) @ as_matrix(self.a.detach())
        with torch.no_grad():
            self.weight.copy_(product.reshape(self.weight.shape))
        self.weight.grad = torch.zeros_like(self.weight)

    def pull_back(self) -> None:
        """Adds the gradient of the weight to those of the factors, where they have any."""
        if self.weight.grad is None:
            return
        g, a, b = (as_matrix(t.detach()) for t in (self.weight.grad, self.a, self.b))
        for factor, gradient in ((self.a, b.mT @ g), (self.b, g @ a.mT)):
            if factor.grad is not None:
                factor.grad.add_(gradient.reshape(factor.shape))


class EnergyOnFactors:
    """The energies of a network acting on its factors in training: see the module's docstring.

    Terms that acted by a prox go on by their gradient: a prox of B A is no step of the factors. Those that only
    measured, or have strength 0, are dropped.

    Args:
        model: A factorized network.
        energy: Its energy, or a spec.
        coupling: Of the terms that name none.
        select: Patterns of weight names of the dense network.
        seed: Key of random probes.

    Attributes:
        energy: The terms that act.
        left_out: Each other one, with the reason why it cannot.

    Raises:
        UsageError: a term does not fit the network.

    >>> from groundstate.compress import compress
    >>> dense = nn.Linear(3, 3, bias=False)
    >>> _ = dense.weight.data.copy_(torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    >>> small = compress(dense, rank=1).model
    >>> acting = EnergyOnFactors(small, "0.5*nuclear@prox + path_energy")
    >>> acting.energy, acting.left_out
    (0.5*nuclear, ['path_energy: it is an energy of the steps of the training, which is over'])
    >>> for p in small.parameters():
    ...     p.grad = torch.zeros_like(p)
    >>> acting.add_gradients()
    >>> a, b = small.parameters()  # balanced, of length 2: the gradient of (||a||^2 + ||b||^2) / 2 is (a, b)
    >>> round(float(a.grad.norm()), 4), torch.allclose(a.grad, 0.5 * a), torch.allclose(b.grad, 0.5 * b)
    (1.0, True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        energy: Energy | Term | Sum | str,
        *,
        coupling: str = "grad",
        select: str | None = None,
        seed: int = 0,
    ) -> None:
        spec = parse(energy) if isinstance(energy, str) else Sum.of(energy)
        acting = [t for t in spec.terms if (t.coupling or coupling) != "monitor" and t.strength > 0]
        twin, self._products = _dense_twin(model) if acting else (model, [])
        names = self._names(twin, select) if acting else ""
        function: list[Term] = []
        kept: list[Term] = []
        self._of_weights: list[Regularizer] = []
        self.left_out: list[str] = []
        for given in acting:
            term = Term(given.strength, given.energy)
            if reason := self._refusal(term.energy, names):
                self.left_out.append(f"{term.energy!r}: {reason}")
                continue
            if isinstance(term.energy, FunctionEnergy):
                function.append(term)
            else:
                made = Regularizer(
                    twin, term, select=names if isinstance(term.energy, MatrixEnergy) else None, seed=seed
                )
                if not self._seen(made):
                    self.left_out.append(f"{term.energy!r}: {_ELSEWHERE}")
                    continue
                self._of_weights.append(made)
            kept.append(term)
        self.energy = Sum(tuple(kept))
        self._of_function = Regularizer(model, Sum(tuple(function)), seed=seed) if function else None

    def _names(self, twin: nn.Module, select: str | None) -> str:
        return ",".join(b.name for b in blocks.select(twin, select) if self._is_product(b))

    def _seen(self, regularizer: Regularizer) -> bool:
        return any(self._is_product(b) for p in regularizer.placed for b in p.blocks)

    def _is_product(self, block: Block) -> bool:
        return any(block.parameter is p.weight for p in self._products)

    @staticmethod
    def _refusal(energy: Energy, names: str) -> str | None:
        if isinstance(energy, TrajectoryEnergy):
            return "it is an energy of the steps of the training, which is over"
        if not energy.traits.differentiable:
            return "it has no gradient"
        return _ELSEWHERE if isinstance(energy, MatrixEnergy) and not names else None

    def attach(self, optimizer: Optimizer) -> None:
        """Lets the steps of the optimizer decide which samples and probes of energies of the function come next."""
        if self._of_function is not None:
            self._of_function.attach(optimizer)

    def loss(self, x: Tensor, y: Tensor) -> Tensor | float:
        """Returns the energies of the function on a batch, to be added to its loss."""
        return 0.0 if self._of_function is None else self._of_function.loss(x, y)

    def add_gradients(self) -> None:
        """Adds the gradients of the energies of weights to those of the factors: once per step, before it.

        Raises:
            NonFiniteError: names the energy and the weight; nothing was added.
        """
        if not self._of_weights:
            return
        for product in self._products:
            product.refresh()
        for regularizer in self._of_weights:
            regularizer.add_gradients()
        for product in self._products:
            product.pull_back()


def _dense_twin(model: nn.Module) -> tuple[nn.Module, list[_Product]]:
    """Returns a copy with dense layers again, of which only the products of factors can be trained."""
    twin = copy.deepcopy(model).requires_grad_(False)
    products: dict[int, _Product] = {}
    layers: dict[int, nn.Module] = {}
    for module, copied in list(zip(model.modules(), twin.modules(), strict=True)):
        if isinstance(module, Factorized) and isinstance(copied, Factorized):
            a, b = module.factors
            if id(a) not in products:
                products[id(a)] = _Product(nn.Parameter(module.weight.detach().clone()), a, b)
            layer = dense_layer(copied)
            layer.weight = products[id(a)].weight
            layer.register_parameter("bias", cast("nn.Parameter | None", copied.bias))
            layers[id(copied)] = layer
    return replace_layers(twin, layers), list(products.values())
