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
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeGuard, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from groundstate.energies.base import FunctionEnergy, Traits, require
from groundstate.errors import NonFiniteError, UsageError
from groundstate.jacobian.function import blame, frozen
from groundstate.layers import unwrapped
from groundstate.norms.gaussian import negative_log_density
from groundstate.norms.spectral import working_dtype

Scaling = Literal["normalized", "paper"]
Context = Literal["augment", "noise", "user"]
Points = Literal["joint", "context"]
Sampler = Callable[[Tensor, torch.Generator], Tensor]

# What belongs to a model but not to an energy, for as long as the model lives.
_given_priors: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
_made_priors: WeakKeyDictionary[nn.Module, dict[Any, nn.Module]] = WeakKeyDictionary()
_contexts: WeakKeyDictionary[nn.Module, Tensor | Sampler] = WeakKeyDictionary()

_SMALLEST_IMAGE = 8  # a row of 64, 81, ... features counts as a square image, one of 4, 9, ..., 49 does not


@dataclass(frozen=True, repr=False)
class FunctionSpacePrior(FunctionEnergy):
    """Negative log density of the logits under a Gaussian process with the features of a frozen prior network.

    With ``scaling="normalized"`` the value is R / (N C), N evaluated points and C outputs, without log det K and other
    constants: a strength means about the same for any batch, context and class count. With ``scaling="paper"`` it is
    R / train_size with all constants, so that mean cross-entropy + 1.0 * energy is the loss of the paper, whose
    strength grows with the number of points and falls with the size of the data set. Strength s of the normalized form
    acts as the paper's loss where s = N C / train_size: 0.043 for 256 joint points, 10 classes, 60 000 images.

    The network is evaluated in eval mode at all points at once; nothing of it changes. The default prior network is
    made once per model and kept as long as it; its batch normalizations use the statistics of the points.

    Pitfalls: confidence falls on the data too, so the calibration error (ECE) rises while outliers are found better. An
    MLP on the 8x8 digits (3 seeds), ECE and AUROC on uniform noise in percent: without 1.4 and 92.5; strength 0.25 10
    and 100; with ``points="context"`` 3.0 and 100, at strength 0.05 1.9 and 100. Report both, and prefer
    ``points="context"`` where calibration counts. A context like the test set of outliers leaks it, so the built-in
    ones never invert or solarize. In the normalized form the weight prior, a part of R, falls as N grows.

    Attributes:
        c: Covariance scale of the features, at least 0; 0 leaves ||F||^2 / (2 d).
        d: Variance that the features need not explain, above 0.
        v: Variance of a Gaussian prior on all parameters; ``None``: none.
        scaling: ``"normalized"`` or ``"paper"``.
        context: ``"augment"``: shifted, flipped, brightened, blurred or noisy images of the batch (of 4 dimensions, or
            rows of 64, 81, ... features); features permuted among the samples, with noise, of any other batch.
            ``"noise"``: uniform between the batch's least and largest entry. ``"user"``: from `set_context`.
        points: Where the prior acts: ``"joint"``, batch and context, or ``"context"`` alone.
        context_size: Number of context points; ``None``: as many as the batch has (a user's sampler: as it gives).
        train_size: Number of training samples; required by, and only for, ``scaling="paper"``.
        prior_seed: Key of the initial weights of the default prior network.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> set_context(model, torch.zeros(1, 2))  # logits 7 and 0; c = 0: 7^2 / (2 d) over two points
    >>> energy = FunctionSpacePrior(c=0.0, d=2.0, context="user")
    >>> energy.value(model, torch.tensor([[3.0, 4.0]]), probe=torch.Generator()).item()
    6.125
    """

    c: float = 0.01
    d: float = 1.0
    v: float | None = None
    scaling: Scaling = "normalized"
    context: Context = "augment"
    points: Points = "joint"
    context_size: int | None = None
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
        require(_finite(self.c) and self.c >= 0, f"c scales a covariance: finite, at least 0; got {self.c!r}")
        require(_finite(self.d) and self.d > 0, f"d is a variance: finite and above 0; got {self.d!r}")
        v_fits = self.v is None or (_finite(self.v) and self.v > 0)
        require(v_fits, f"v is a variance, finite and above 0, or None for no prior on the weights; got {self.v!r}")
        for name in ("context_size", "train_size"):
            got = getattr(self, name)
            require(got is None or (_whole(got) and got > 0), f"{name} must be a whole number from 1, got {got!r}")
        require(_whole(self.prior_seed), f"prior_seed must be a whole number, got {self.prior_seed!r}")
        require(
            (self.scaling == "paper") == (self.train_size is not None),
            f"scaling='paper' and train_size, the number of training samples that it divides by, go together; got "
            f"scaling={self.scaling!r}, train_size={self.train_size!r}",
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(),
            cls(c=1.0, d=10.0, context="noise", points="context", context_size=16),
            cls(v=0.1, scaling="paper", train_size=60_000),
        )

    def value(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Tensor:
        """Returns the energy as a scalar that autograd differentiates by the parameters of ``f``.

        Args:
            f: A module from ``(N, ...)`` to logits ``(N, C)``.
            x: The batch ``(B, ...)``, of at least one sample.
            y: Not used.
            probe: Generator of the context points; the only randomness.

        Raises:
            UsageError: no prior network or no context can be made, an empty batch, shapes that do not fit.
            NonFiniteError: x, the context, a weight or a feature is NaN or infinite, or the value overflows.
        """
        model = _module(f)
        require(isinstance(probe, torch.Generator), f"probe must be a torch.Generator, got {type(probe).__name__}")
        x = _checked(x, model, "input x")
        prior = _prior_network(model, self.prior_seed)
        with torch.no_grad():
            context = self._context(model, x, probe)
            points = torch.cat([x, context]) if self.points == "joint" else context
        phi = penultimate_features(prior, points)
        with frozen(model) as run, torch.set_grad_enabled(run.grad_wanted):
            logits = run(points)
            if not bool(logits.detach().isfinite().all()):
                raise blame(f, points, repr(self))
            energy = negative_log_density(logits, phi, self.c, self.d, log_det=self.scaling == "paper")
            if self.v is not None:
                squares = [p.to(working_dtype(p.dtype)).square().sum() for p in model.parameters()]
                energy = energy + torch.stack(squares).sum() / (2 * self.v)
            return run.settle(energy / (self.train_size or logits.numel()))

    def _context(self, model: nn.Module, x: Tensor, probe: torch.Generator) -> Tensor:
        if self.context == "user":
            return _users_context(model, x, self.context_size, probe)
        if not x.is_floating_point():
            raise UsageError(f"context={self.context!r} needs real inputs, got {x.dtype}: convert, or see set_context")
        size = self.context_size or len(x)
        work = x.to(working_dtype(x.dtype))
        if self.context == "noise":
            low, high = (float(bound) for bound in work.aminmax())
            return (low + (high - low) * _uniform((size, *x.shape[1:]), work, probe)).to(x.dtype)
        order = torch.randperm(len(x), generator=probe, device=probe.device)
        base = work[order[torch.arange(size, device=order.device) % len(x)].to(x.device)]
        side = math.isqrt(base[0].numel())
        if x.ndim == 4:
            changed = augmented_images(base, probe)
        elif x.ndim == 2 and side >= _SMALLEST_IMAGE and side**2 == x.shape[1]:
            changed = augmented_images(base.reshape(size, 1, side, side), probe)
        else:
            changed = _permuted_features(base.reshape(size, -1), probe)
        return changed.reshape(base.shape).to(x.dtype)


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
            returns points. The function must take its randomness from that generator, and not refer to the model.

    Raises:
        UsageError: no points, or neither a tensor nor a function.
    """
    model = _module(model)
    if sampler is None:
        _contexts.pop(model, None)
        return
    if isinstance(sampler, Tensor):
        require(sampler.ndim > 0 and len(sampler) > 0, f"the context of shape {tuple(sampler.shape)} has no points")
    else:
        require(callable(sampler), f"the context must be a tensor or a function, got {type(sampler).__name__}")
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
    if features.ndim == 0 or len(features) != len(points) or not features.is_floating_point():
        raise UsageError(
            f"the last layer {type(module).__name__} of the prior network takes {features.dtype} of shape "
            f"{tuple(features.shape)} for {len(points)} points: expected real features, one row per point"
        )
    return features.reshape(len(points), -1)


def augmented_images(images: Tensor, probe: torch.Generator) -> Tensor:
    """Returns images ``(N, channels, height, width)`` shifted by up to an eighth, flipped or not, and in other light.

    Brightness and contrast change by factors from 0.5 to 1.5 (never below 0: no inversion); then the first half is
    blurred and the second made noisy; all stays between the least and the largest entry.
    """
    n, channels, height, width = images.shape
    low, high = (float(bound) for bound in images.aminmax())
    u = _uniform((6, n, 1), images, probe)
    rows, columns = _shifted(height, u[0]), _shifted(width, u[1])
    columns = torch.where(u[2] < 0.5, width - 1 - columns, columns)
    index = (rows[:, :, None] * width + columns[:, None, :]).reshape(n, 1, -1).expand(-1, channels, -1)
    made = images.flatten(2).gather(2, index).flatten(1)
    gain, contrast = 0.5 + u[3], 0.5 + u[4]
    offset = low + gain * ((1 - contrast) * made.mean(1, keepdim=True) - low)
    made.mul_(gain * contrast).add_(offset)
    half = n // 2
    noise = _uniform((n - half, made.shape[1]), images, probe).sub_(0.5)
    made[half:] += noise.mul_(0.35 * (high - low) * u[5, half:])  # standard deviations up to 0.1 of the range
    made = made.view_as(images)
    made[:half] = _blurred(_blurred(made[:half], 2), 3)
    return made.clamp_(low, high)


def _blurred(images: Tensor, dim: int) -> Tensor:
    """Returns the means with weights 1/4, 1/2, 1/4 along a dimension, the edge repeated."""
    side = images.shape[dim]
    padded = torch.cat([images.narrow(dim, 0, 1), images, images.narrow(dim, side - 1, 1)], dim)
    return (padded.narrow(dim, 0, side) + padded.narrow(dim, 2, side)).add_(images, alpha=2).mul_(0.25)


def _shifted(side: int, u: Tensor) -> Tensor:
    """Returns the pixels 0..side-1 moved by up to side / 8, ``(N, side)``; those outside repeat the edge."""
    most = side // 8
    shift = (u * (2 * most + 1)).long() - most
    return (torch.arange(side, device=u.device) + shift).clamp_(0, side - 1)


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
    if not fits or len(context) == 0 or (size is not None and len(context) != size):
        got = tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise UsageError(f"the context must be {size or 'some'} points of shape {tuple(x.shape[1:])}, got {got}")
    return _checked(context, model, "context").to(x)


def _checked(x: Any, model: nn.Module, what: str) -> Tensor:
    """Returns the points detached and in the dtype of the model's parameters."""
    if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == 0:
        got = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"the {what} must be a tensor of at least one sample, the batch first, got {got}")
    if not x.is_floating_point():
        return x.detach()
    if not bool(x.detach().sum().isfinite()) and (bad := int((~x.detach().isfinite()).sum())):  # the sum is faster
        raise NonFiniteError(f"the {what} of shape {tuple(x.shape)} has {bad} NaN or infinite entries: remove them")
    first = _first_parameter(model)
    return x.detach() if first is None else x.detach().to(first.dtype)


def _prior_network(model: nn.Module, seed: int) -> nn.Module:
    given, first = _given_priors.get(model), _first_parameter(model)
    if given is not None:
        return given
    if first is None:
        raise UsageError(f"{type(model).__name__} has no parameters: no prior network can be made of it")
    made = _made_priors.setdefault(model, {})
    key = seed, first.dtype, first.device
    if key not in made:
        with torch.inference_mode(False):
            made[key] = _reinitialized(model, seed).to(first.device)
    return made[key]


def _module(model: Any) -> nn.Module:
    require(isinstance(model, nn.Module), f"the model must be a torch module, got {type(model).__name__}")
    return unwrapped(model)


def _first_parameter(model: nn.Module) -> Tensor | None:
    return next((p for p in model.parameters() if p.is_floating_point()), None)


def _finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


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
