"""Function-space empirical Bayes: a Gaussian prior on the values of the network, also where there are no data.

Idea: draw context points beside the batch and charge the network for logits there that its own random features do not
explain. At the N points X the logits F = f(X) of all outputs have the log density of a Gaussian process::

    R = -sum_k log N(f_k; 0, K) + ||theta||^2 / (2 v),     K = c (phi_0 phi_0^T + 1 1^T) + d I

with phi_0 the penultimate features of a frozen prior network: the same architecture at initial weights, or one that the
user gives. Away from the data the logits are pulled to 0, the predictions to uniform: they become uncertain there.

Reference: T. G. J. Rudner, S. Kapoor, S. Qiu, A. G. Wilson, "Function-Space Regularization in Neural Networks: A
Probabilistic Perspective" (2023), arXiv 2312.17162.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from groundstate.energies.base import Estimate, FunctionEnergy, Traits, is_number, is_whole, refuse_unused, require
from groundstate.errors import NonFiniteError, UsageError
from groundstate.jacobian.function import blame, frozen, supplied
from groundstate.layers import unwrapped
from groundstate.norms.gaussian import value_and_gradient
from groundstate.norms.spectral import working_dtype

Scaling = Literal["normalized", "paper"]
Context = Literal["augment", "noise", "user"]
Points = Literal["joint", "context"]
Sampler = Callable[[Tensor, torch.Generator], Tensor]

# What belongs to a model but not to an energy, for as long as the model lives.
_given_priors: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
_made_priors: WeakKeyDictionary[nn.Module, dict[Any, Callable[[Tensor], Tensor]]] = WeakKeyDictionary()
_contexts: WeakKeyDictionary[nn.Module, Tensor | Sampler] = WeakKeyDictionary()

_SMALLEST_IMAGE = 8  # a row of 64, 81, ... features counts as a square image, one of 4, 9, ..., 49 does not
_MOST_CONTEXTS = 16  # of one estimate


@dataclass(frozen=True, repr=False)
class FunctionSpacePrior(FunctionEnergy):
    """Negative log density of the logits under a Gaussian process with the features of a frozen prior network.

    With ``scaling="normalized"`` the value is R / (N C), N evaluated points and C outputs, without log det K and other
    constants: a strength means about the same for any batch, context and class count. With ``scaling="paper"`` it is
    R / train_size with all constants, so that mean cross-entropy + 1.0 * energy is the loss of the paper (where also
    ``points="joint", context_size=None``), whose strength grows with the number of points and falls with the size of
    the data set: it is the normalized form of strength N C / train_size, 0.043 for N = 256, C = 10, 60 000 images.

    The default prior network is made once per model and kept as long as it; its batch normalizations use the statistics
    of the points. Measured on MNIST (docs/function_prior.md), calibration error and AUROC on uniform noise in percent:
    without 1.6 and 98.3; strength 0.03 0.9 and 100.0; strength 1 4.8 and 99.8. A step takes 2.2 plain ones; 1.3 with
    ``Regularizer(..., every=4)``, hardly worse; 4.7 for ``"joint"`` with 128 points. c = 0 does as well there.

    Pitfalls: beyond the best strength confidence falls on the data too, with ``"joint"`` much sooner: choose it by the
    validation loss. A context like the outliers of the test leaks them, so images are neither inverted nor made noisy.

    Attributes:
        c: Covariance scale of the features, at least 0; 0 leaves ||F||^2 / (2 d) and needs no prior network.
        d: Variance that the features need not explain, above 0.
        v: Variance of a Gaussian prior on all parameters; ``None``: none.
        scaling: ``"normalized"`` or ``"paper"``.
        context: ``"augment"``: shifted and flipped images of the batch in other light (of 4 dimensions, or rows of 64,
            81, ... features), of others features permuted among the samples, with noise. ``"noise"``: uniform between
            the batch's least and largest entry. ``"user"``: from `set_context`.
        points: Where the prior acts: ``"context"`` alone, or ``"joint"``, the batch too, as in the paper.
        context_size: Number of context points; ``None``: that of the batch, which is also the most of ``"augment"``.
        train_size: Number of training samples; required by, and only for, ``scaling="paper"``.
        prior_seed: Key of the initial weights of the default prior network.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> set_context(model, torch.zeros(1, 2))  # logits 7 and 0; c = 0: 7^2 / (2 d) over two points
    >>> energy = FunctionSpacePrior(c=0.0, d=2.0, context="user", points="joint", context_size=1)
    >>> energy.value(model, torch.tensor([[3.0, 4.0]]), probe=torch.Generator()).item()
    6.125
    """

    c: float = 0.01
    d: float = 1.0
    v: float | None = None
    scaling: Scaling = "normalized"
    context: Context = "augment"
    points: Points = "context"
    context_size: int | None = 16
    train_size: int | None = None
    prior_seed: int = 0

    name: ClassVar[str] = "function_prior"
    aliases: ClassVar[tuple[str, ...]] = ("fs_eb",)
    traits: ClassVar[Traits] = Traits(
        formula="-sum_k log N(f_k(X); 0, c (phi phi^T + 1 1^T) + d I) + ||theta||^2 / (2 v), over N C or train_size",
        reference="Rudner, Kapoor, Qiu, Wilson 2023, arXiv 2312.17162",
        cost="forward and backward of the N points, a forward of the prior network, a Cholesky of size min(N, m + 1)",
        convex=False,
        degree=None,
        smooth=True,
    )

    def __post_init__(self) -> None:
        for name, kind in (("scaling", Scaling), ("context", Context), ("points", Points)):
            got, known = getattr(self, name), get_args(kind)
            require(got in known, f"{name} of function_prior must be one of {', '.join(known)}, got {got!r}")
        require(is_number(self.c) and self.c >= 0, f"c scales a covariance: finite, at least 0; got {self.c!r}")
        require(is_number(self.d) and self.d > 0, f"d is a variance: finite and above 0; got {self.d!r}")
        v_fits = self.v is None or (is_number(self.v) and self.v > 0)
        require(v_fits, f"v is a variance, finite and above 0, or None for no prior on the weights; got {self.v!r}")
        for name in ("context_size", "train_size"):
            got = getattr(self, name)
            require(got is None or is_whole(got, 1), f"{name} must be a whole number from 1, got {got!r}")
        require(is_whole(self.prior_seed), f"prior_seed must be a whole number from 0, got {self.prior_seed!r}")
        require(
            (self.scaling == "paper") == (self.train_size is not None),
            f"scaling='paper' and train_size, the number of training samples that it divides by, go together; got "
            f"scaling={self.scaling!r}, train_size={self.train_size!r}",
        )
        if self.c == 0:
            refuse_unused(self, "c=0, which needs no prior network,", "prior_seed")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        paper = cls(v=0.1, points="joint", context_size=None, scaling="paper", train_size=60_000)
        return cls(), cls(c=1.0, d=10.0, context="noise", context_size=3), paper

    def value(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Tensor:
        """Returns the energy; ``f`` is a module from ``(N, ...)`` to logits ``(N, C)``, ``y`` is not used.

        Raises:
            UsageError: no prior network or no context can be made, an empty batch, shapes that do not fit.
            NonFiniteError: x, the context, a weight or a feature is NaN or infinite, or the value overflows.
        """
        model = _module(f)
        require(isinstance(probe, torch.Generator), f"probe must be a torch.Generator, got {type(probe).__name__}")
        x = _checked(x, model, "input x")
        with frozen(model) as run:
            with torch.no_grad():
                context = self._context(model, x, probe)
                points = torch.cat([x, context]) if self.points == "joint" else context
                phi = _prior_features(model, self.prior_seed, points) if self.c > 0 else None
            with torch.set_grad_enabled(run.grad_wanted):
                logits = run(points)
                values = logits.detach()
                if not math.isfinite(float(values.sum())) and not bool(values.isfinite().all()):
                    raise blame(f, points, repr(self))
                phi = values[:, :0] if phi is None else phi
                energy, grad = value_and_gradient(values, phi, self.c, self.d, log_det=self.scaling == "paper")
                energy = supplied(energy, [logits], [grad])
                if self.v is not None:
                    squares = [p.to(working_dtype(p.dtype)).square().sum() for p in model.parameters()]
                    energy = energy + torch.stack(squares).sum() / (2 * self.v)
                return run.settle(energy / (self.train_size or logits.numel()))

    def estimate(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Estimate:
        """Measures E; of ``points="context"`` the mean over up to 16 contexts, from disjoint parts of the batch.

        The standard error is that of this mean. It is ``None`` for ``points="joint"``, where all points are coupled,
        and where the batch has fewer than two contexts of ``context_size``. Arguments and errors as of `value`.
        """
        x = _checked(x, _module(f), "input x")
        parts = [x]
        if self.points == "context" and self.context_size is not None and len(x) >= 2 * self.context_size:
            order = torch.randperm(len(x), generator=probe, device=probe.device).to(x.device)
            parts = x[order].tensor_split(min(_MOST_CONTEXTS, len(x) // self.context_size))
        with torch.no_grad():
            values = torch.stack([self.value(f, part, probe=probe) for part in parts])
        left_out = "" if self.scaling == "paper" else ", without log det K and other constants"
        return replace(Estimate.of(values, f"contexts drawn: {len(parts)}{left_out}"), samples=len(x))

    def _context(self, model: nn.Module, x: Tensor, probe: torch.Generator) -> Tensor:
        if self.context == "user":
            return _users_context(model, x, self.context_size, probe)
        if not x.is_floating_point():
            raise UsageError(f"context={self.context!r} needs real inputs, got {x.dtype}: convert, or see set_context")
        work = x.to(working_dtype(x.dtype))
        if self.context == "noise":
            low, high = (float(bound) for bound in work.aminmax())
            shape = (self.context_size or len(x), *x.shape[1:])
            return (low + (high - low) * _uniform(shape, work, probe)).to(x.dtype)
        order = torch.randperm(len(x), generator=probe, device=probe.device)[: self.context_size]
        base = work.index_select(0, order.to(x.device))
        side = math.isqrt(base[0].numel())
        if x.ndim == 2 and side >= _SMALLEST_IMAGE and side**2 == x.shape[1]:
            base = base.view(-1, 1, side, side)
        changed = augmented_images(base, probe) if base.ndim == 4 else _permuted_features(base.flatten(1), probe)
        return changed.view(-1, *x.shape[1:]).to(x.dtype)


def set_prior(model: nn.Module, prior: nn.Module | None) -> None:
    """Gives the prior network of ``model``, e.g. one with pretrained weights; ``None``: the default one again.

    It is evaluated in eval mode and never changed, and must stay as it is. It lives as long as the model and is saved
    with nothing: set it again after loading.

    Raises:
        UsageError: not a module, or it shares parameters with the model and would be trained with it.
    """
    model = _module(model)
    if prior is None:
        _given_priors.pop(model, None)
        return
    require(isinstance(prior, nn.Module), f"the prior network must be a torch module, got {type(prior).__name__}")
    own = {id(p) for p in model.parameters()}
    shared = next((name for name, p in prior.named_parameters() if id(p) in own), None)
    require(shared is None, f"the prior network shares {shared!r} with the model: give a copy (copy.deepcopy)")
    _given_priors[model] = prior


def set_context(model: nn.Module, sampler: Tensor | Sampler | None) -> None:
    """Gives the context points of ``context="user"``; ``None`` takes them back.

    Args:
        model: The model whose energy they are for; they live as long as it does and are saved with nothing.
        sampler: Points ``(M, *shape)`` to draw from with replacement, or a function of the batch and a generator that
            returns any number. The function must take its randomness from that generator, and not refer to the model.

    Raises:
        UsageError: no points, or neither a tensor nor a function.
    """
    model = _module(model)
    if sampler is None:
        _contexts.pop(model, None)
        return
    points = isinstance(sampler, Tensor) and sampler.ndim > 0 and len(sampler) > 0
    require(points or callable(sampler), f"the context must be a function or at least one point, got {_kind(sampler)}")
    _contexts[model] = sampler


def penultimate_features(network: nn.Module, points: Tensor) -> Tensor:
    """Returns the input ``(N, m)``, flattened, of the module with parameters that is called last; without a graph.

    Raises:
        UsageError: there is none, or its input is not real with one row per point.
    """
    last: list[tuple[nn.Module, Tensor]] = []

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        found = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if found is not None:
            last[:] = [(module, found)]

    with frozen(network) as run, torch.no_grad(), ExitStack() as hooks:
        for module in network.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(remember, with_kwargs=True).remove)
        run(points)
    if not last:
        raise UsageError(
            f"no module of the prior network {type(network).__name__} with parameters takes a tensor, so there are no "
            "penultimate features: give another network by set_prior(model, network)"
        )
    module, features = last[0]
    return _one_row_per_point(features, points, module)


def _one_row_per_point(features: Any, points: Tensor, last: nn.Module) -> Tensor:
    real = isinstance(features, Tensor) and features.is_floating_point() and features.ndim > 0
    require(
        real and len(features) == len(points),
        f"the last layer {type(last).__name__} of the prior network takes {_kind(features)} for {len(points)} points: "
        "expected real features, one row per point",
    )
    return features.flatten(1) if features.ndim > 1 else features[:, None]


def augmented_images(images: Tensor, probe: torch.Generator) -> Tensor:
    """Returns images ``(N, channels, height, width)`` shifted, flipped or not, and in other light, all in the same way.

    They move by up to an eighth, cyclically. Differences from a level between the least entry (then it is brightness)
    and the mean (contrast) change by a factor from 0.5 to 1.5, never below 0: nothing is inverted. All stays between
    the least and the largest entry. One change for all costs a third of one each, and the next step draws another.
    """
    low, high = (float(bound) for bound in images.aminmax())
    right, down, flip, gain, level = torch.rand(5, generator=probe, device=probe.device).tolist()
    shifts = [int(u * (2 * (side // 8) + 1)) - side // 8 for u, side in zip((down, right), images.shape[2:])]
    made = images.roll(shifts, (2, 3))
    if flip < 0.5:
        made = made.flip(3)
    gain, level = gain + 0.5, low + level * (float(made.mean()) - low)
    return made.mul_(gain).add_(level * (1 - gain)).clamp_(low, high)


def _permuted_features(rows: Tensor, probe: torch.Generator) -> Tensor:
    mixed = rows.gather(0, _uniform(rows.shape, rows, probe).argsort(0))
    noise = torch.randn(rows.shape, generator=probe, device=probe.device, dtype=rows.dtype).to(rows.device)
    return torch.addcmul(mixed, noise, 0.1 * rows.std(0, correction=0))


def _uniform(shape: tuple[int, ...], like: Tensor, probe: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=probe, device=probe.device, dtype=like.dtype).to(like.device)


def _users_context(model: nn.Module, x: Tensor, size: int | None, probe: torch.Generator) -> Tensor:
    sampler = _contexts.get(model)
    if sampler is None:
        raise UsageError("context='user' has no points: call set_context(model, points_or_function) first")
    if isinstance(sampler, Tensor):
        chosen = torch.randint(len(sampler), (size or len(x),), generator=probe, device=probe.device)
        context = sampler[chosen.to(sampler.device)]
    else:
        context = sampler(x, probe)
    fits = isinstance(context, Tensor) and context.ndim == x.ndim and context.shape[1:] == x.shape[1:]
    require(fits, f"the context must be points of shape {tuple(x.shape[1:])}, got {_kind(context)}")
    return _checked(context, model, "context").to(x)


def _checked(x: Any, model: nn.Module, what: str) -> Tensor:
    """Returns the points detached and in the dtype of the model's parameters."""
    if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == 0:
        raise UsageError(f"the {what} must be a tensor of at least one sample, the batch first, got {_kind(x)}")
    if not x.is_floating_point():
        return x.detach()
    if not math.isfinite(float(x.detach().sum())) and (bad := int((~x.detach().isfinite()).sum())):  # the sum is faster
        raise NonFiniteError(f"the {what} of shape {tuple(x.shape)} has {bad} NaN or infinite entries: remove them")
    first = _first_parameter(model)
    return x.detach() if first is None else x.detach().to(first.dtype)


def _prior_features(model: nn.Module, seed: int, points: Tensor) -> Tensor:
    given, first = _given_priors.get(model), _first_parameter(model)
    if given is not None:
        return penultimate_features(given, points)
    if first is None:
        raise UsageError(f"{type(model).__name__} has no parameters: no prior network can be made of it")
    made = _made_priors.setdefault(model, {})
    key = seed, first.dtype, first.device
    if key not in made:
        with torch.inference_mode(False):
            made[key] = _features_of(_reinitialized(model, seed).to(first.device))
    two = points if len(points) > 1 else torch.cat([points, points])  # batch statistics of one point are refused
    return made[key](two)[: len(points)]


def _features_of(prior: nn.Module) -> Callable[[Tensor], Tensor]:
    """Returns `penultimate_features` of a network that is ours; a sequence without state needs no hooks."""
    layers = list(prior) if type(prior) is nn.Sequential else []
    last = max((i for i, m in enumerate(layers) if next(m.parameters(), None) is not None), default=-1)
    if last < 0 or list(layers[last].children()) or next(prior.buffers(), None) is not None:
        return partial(penultimate_features, prior)
    before, end = nn.Sequential(*layers[:last]), layers[last]
    return lambda points: _one_row_per_point(before(points), points, end)


def _module(model: Any) -> nn.Module:
    require(isinstance(model, nn.Module), f"the model must be a torch module, got {type(model).__name__}")
    return unwrapped(model)


def _first_parameter(model: nn.Module) -> Tensor | None:
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def _kind(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _reinitialized(model: nn.Module, seed: int) -> nn.Module:
    """Returns a frozen copy on the CPU with the weights that its modules' ``reset_parameters`` draw from ``seed``."""
    advice = "give a prior network by set_prior(model, network)"
    try:
        prior = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    except Exception as error:  # deepcopy runs code of the model
        raise UsageError(f"{type(model).__name__} cannot be copied ({error}): {advice}") from error
    for p in prior.parameters():
        if p.is_floating_point() or p.is_complex():
            p.fill_(math.nan)  # shows below what was not reset
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in reversed(list(prior.modules())):  # a parent after its children, so that its scheme holds
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
                hooks.clear()  # they serve the model, and may keep it alive
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            if isinstance(module, _BatchNorm):
                module.running_mean = module.running_var = None  # eval mode then takes the statistics of the points
    left = next((name for name, p in prior.named_parameters() if p.isnan().any()), None)
    if left is not None:
        owner = prior.get_submodule(left.rpartition(".")[0])
        raise UsageError(
            f"{left!r} of {type(owner).__name__} is not set by any reset_parameters(), so the initial weights are not "
            f"known: add that method, or {advice}"
        )
    return prior
