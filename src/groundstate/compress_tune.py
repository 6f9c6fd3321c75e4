"""A short training of the factors alone, after a network was factored.

The factors of an SVD are where that training starts: B A stays of rank r whatever the step, so the parameters do not
grow again. The data loss (cross-entropy) is minimized, with the energies given (`groundstate.compress_energy`), by Adam
with a rate that falls to 0 as half a cosine. Everything else in the network, biases of layers that stayed dense
included, keeps its values. The result is a pure function of network, data, energy and seed (to the last bits, which
depend on the number of threads).

Reference: D. Kingma, J. Ba, "Adam" (2015); I. Loshchilov, F. Hutter, "SGDR" (2017), equation 5.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from groundstate.compress import Compressed
from groundstate.compress_energy import EnergyOnFactors
from groundstate.compress_factors import Factorized
from groundstate.energies.base import Energy, Sum, Term, is_number, is_whole
from groundstate.errors import NonFiniteError, UsageError
from groundstate.training.evaluation import accuracy_and_loss
from groundstate.training.order import batch_order, keyed

LR = 1e-3


@dataclass(frozen=True)
class FineTuned:
    """A network after its factors were trained.

    Attributes:
        model: The network, in the mode of the original.
        losses: Mean cross-entropy of each epoch, over the batches as they were seen.
        energy: The terms that acted.
    """

    model: nn.Module
    losses: list[float]
    energy: Sum


def fine_tune(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    lr: float = LR,
    seed: int = 0,
    *,
    batch_size: int = 128,
    energy: Energy | Term | Sum | str = "none",
    select: str | None = None,
) -> FineTuned:
    """Trains the factors of a copy of a factorized network; the model itself and global generators are not changed.

    Args:
        model: A network of logits, as `groundstate.compress.compress` returns it. Factors that need no gradient stay.
        data: Inputs and classes, samples first.
        epochs: Passes over the data, from 1.
        lr: Learning rate of Adam at the start.
        seed: Key of the order of the samples, and of dropout.
        batch_size: Samples per step.
        energy: What is minimized with the loss, of the products of the factors or of the function, with strengths; by
            gradients, whatever the coupling (`groundstate.compress_energy.EnergyOnFactors`).
        select: Patterns of weight names of the dense network that energies of weights see; default: all.

    Raises:
        UsageError: nothing was factored (or nothing that may be trained), or an argument cannot be used; an energy of
            the path of training, or one of weights that all stayed dense.
        NonFiniteError: a loss, an energy or a factor is not finite.

    Cost: as training with Adam and the energy.

    >>> from groundstate.compress import compress
    >>> small = compress(nn.Sequential(nn.Linear(8, 8)), rank=1).model
    >>> tuned = fine_tune(small, (torch.eye(8), torch.arange(8)), epochs=3)
    >>> len(tuned.losses), tuned.losses[2] < tuned.losses[0]
    (3, True)
    """
    _check(data, epochs, lr, seed, batch_size)
    x, y = data
    new = copy.deepcopy(model)
    factors = [p for m in new.modules() if isinstance(m, Factorized) for p in m.parameters() if p.requires_grad]
    factors = list({id(p): p for p in factors}.values())
    if not factors:
        raise UsageError("the network has no factors that may be trained: compress it first")
    optimizer = torch.optim.Adam(factors, lr=lr)
    energies = EnergyOnFactors(new, energy, select=select, seed=seed)
    if energies.left_out:
        raise UsageError(f"an energy that cannot act on the factors: {'; '.join(energies.left_out)}; leave it out")
    energies.attach(optimizer)
    steps = math.ceil(len(x) / batch_size)
    modes = [(m, m.training) for m in new.modules()]
    losses: list[float] = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(keyed(seed, "fine-tune"))
        new.train()
        _keep_statistics(new)
        for epoch in range(epochs):
            total = 0.0
            for step, index in enumerate(batch_order(len(x), seed, epoch).split(batch_size)):
                share = (epoch * steps + step) / (epochs * steps)
                optimizer.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * share))
                total += len(index) * _step(new, optimizer, factors, energies, x[index], y[index])
            losses.append(total / len(x))
    for module, training in modes:
        module.training = training
    if not all(bool(torch.isfinite(p).all()) for p in factors):
        raise NonFiniteError("the factors are not finite after the last step: lower the learning rate")
    return FineTuned(new, losses, energies.energy)


def tuned(
    compressed: Compressed,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    epochs: int,
    lr: float,
    *,
    energy: Energy | Term | Sum | str = "none",
    select: str | None = None,
    **more: int,
) -> Compressed:
    """Returns a compressed network with trained factors, and what that did to its accuracy in its account.

    Args:
        compressed: What `groundstate.compress.compress` returned.
        train: Inputs and classes to train on.
        held_out: Inputs and classes for ``accuracy_after`` and for ``fine_tune["accuracy_before"]``.
        epochs: See `fine_tune`, as the rest.
        lr: Learning rate.
        energy: See `fine_tune`.
        select: See `fine_tune`.
        **more: ``seed`` and ``batch_size``.
    """
    found = fine_tune(compressed.model, train, epochs, lr, energy=energy, select=select, **more)
    before, after = (accuracy_and_loss(m, *held_out)[0] for m in (compressed.model, found.model))
    account = {"epochs": epochs, "lr": lr, **more, "energy": repr(found.energy), "losses": found.losses}
    totals = compressed.totals if after is None else compressed.totals | {"accuracy_after": after}
    return replace(
        compressed,
        model=found.model,
        totals=totals,
        fine_tune=account | {"accuracy_before": before, "accuracy_after": after},
    )


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    factors: list[nn.Parameter],
    energies: EnergyOnFactors,
    x: Tensor,
    y: Tensor,
) -> float:
    loss = functional.cross_entropy(model(x), y)
    value = loss.item()
    if not math.isfinite(value):
        raise NonFiniteError(f"the data loss is {value} while the factors are trained: lower the learning rate")
    whole = loss + energies.loss(x, y)
    for factor, gradient in zip(factors, torch.autograd.grad(whole, factors, allow_unused=True)):
        factor.grad = gradient
    energies.add_gradients()
    optimizer.step()
    optimizer.zero_grad()
    return value


def _keep_statistics(model: nn.Module) -> None:
    """Puts batch normalizations in eval mode: their statistics are none of the factors."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _check(data: tuple[Tensor, Tensor], epochs: int, lr: float, seed: int, batch_size: int) -> None:
    if not isinstance(data, tuple) or len(data) != 2 or len(data[0]) != len(data[1]) or len(data[0]) == 0:
        raise UsageError(
            "data must be inputs and as many classes, at least one sample: fine_tune(model, (x, y), epochs)"
        )
    for name, value, least in (("epochs", epochs, 1), ("seed", seed, 0), ("batch_size", batch_size, 1)):
        if not is_whole(value, least):
            raise UsageError(f"{name} must be a whole number from {least}, got {value!r}")
    if not is_number(lr) or lr <= 0:
        raise UsageError(f"lr must be finite and positive, got {lr!r}")
