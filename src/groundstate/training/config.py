"""The full description of one training run: plain values, so that a run folder reproduces itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self, cast

from groundstate.energies.base import COUPLINGS, Coupling, is_number, is_whole
from groundstate.energies.registry import parse
from groundstate.errors import UsageError, nearest
from groundstate.idle import OF_ENERGY, taken

MONITOR = "nuclear + squared_frobenius + graph + path_energy"

_CHOICES = {
    "coupling": COUPLINGS,
    "data": ("digits", "mnist"),
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("constant", "linear", "cosine"),
    "nonfinite": ("stop", "skip", "backoff"),
}
_COUNTS = ("every", "epochs", "batch_size", "accumulate", "threads", "checkpoint_every", "keep")
_NOT_NEGATIVE = ("lr", "momentum", "weight_decay", "label_noise")
_POSITIVE_IF_GIVEN = ("clip", "final_prox", "gap")
_COUNT_IF_GIVEN = ("checkpoint_steps", "train_size")
_TEXT = ("energy", "monitor", "model")
_TEXT_IF_GIVEN = ("select", "data_dir")
_FREE = ("data_dir", "checkpoint_every", "checkpoint_steps", "keep", "threads")
"""Options that decide how a run goes, not what comes out (threads but for the last bits)."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, how, and what to watch.

    Attributes:
        energy: Spec of the energy, e.g. ``"1e-3*nuclear"``; ``"none"`` is the baseline.
        coupling: Coupling of the terms that name none.
        every: Let energies act at every k-th step only, k times as strong.
        gap: Keep the gradients of nuclear, graph and the like until this share of the energy opens; default: none.
        select: Patterns of weight names; default: all matrices.
        data: ``digits`` (embedded) or ``mnist``.
        data_dir: Folder with local copies of the data.
        model: ``mlp:784-28-10`` or ``auto``.
        epochs: Passes over the training split.
        batch_size: Samples per optimizer step.
        optimizer: sgd, adam or adamw.
        lr: Learning rate; momentum (sgd) and weight_decay as in torch.
        schedule: Learning rate over the run: constant, linear or cosine to 0.
        clip: Largest gradient norm, energies included; default: no clipping.
        accumulate: Micro-batches per optimizer step.
        seed: Key of initialization, data order and label noise.
        threads: Threads of torch; results depend on it in the last bits.
        final_prox: Step length of one prox after the last step; default: none.
        nonfinite: stop, skip (at most 10 in a row) or backoff (last checkpoint, half the learning rate).
        checkpoint_every: Epochs between checkpoints; checkpoint_steps adds one every n steps.
        keep: Checkpoints kept, at least 2.
        val_size, train_size, label_noise: The splits; see `groundstate.training.data.load`.
        monitor: Spec of the energies recorded at the end of every epoch; ``"none"``: nothing.
    """

    energy: str = "none"
    coupling: str = "grad"
    every: int = 1
    gap: float | None = None
    select: str | None = None
    data: str = "digits"
    data_dir: str | None = None
    model: str = "auto"
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    clip: float | None = None
    accumulate: int = 1
    seed: int = 0
    threads: int = 1
    final_prox: float | None = None
    nonfinite: str = "stop"
    checkpoint_every: int = 1
    checkpoint_steps: int | None = None
    keep: int = 2
    val_size: int | None = None
    train_size: int | None = None
    label_noise: float = 0.0
    monitor: str = MONITOR

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = nearest(str(value), choices)
                raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}.{hint}")
        parse(self.energy)
        if acting := [t for t in parse(self.monitor).terms if t.coupling not in (None, "monitor")]:
            raise UsageError(f"monitor only measures, got {acting[0]!r}: put terms that act into energy")
        if self.keep < 2:
            raise UsageError(
                f"keep must be at least 2, so that a damaged checkpoint has a predecessor, got {self.keep}"
            )
        if self.label_noise > 1:
            raise UsageError(f"label_noise is a share from 0 to 1, got {self.label_noise!r}")
        if self.accumulate > self.batch_size:
            raise UsageError(f"accumulate ({self.accumulate}) must not exceed batch_size ({self.batch_size})")

    def _check_kinds(self) -> None:
        for name in (*_TEXT, *_TEXT_IF_GIVEN):
            value = getattr(self, name)
            if not isinstance(value, str) and not (value is None and name in _TEXT_IF_GIVEN):
                raise UsageError(f"{name} must be text, got {value!r}")
        for name in (*_COUNTS, *_COUNT_IF_GIVEN):
            value = getattr(self, name)
            if not is_whole(value, 1) and not (value is None and name in _COUNT_IF_GIVEN):
                raise UsageError(f"{name} must be a whole number from 1, got {value!r}")
        if self.val_size is not None and not is_whole(self.val_size):
            raise UsageError(f"val_size must be a whole number from 0, got {self.val_size!r}")
        if not is_whole(self.seed) or self.seed >= 2**63:
            raise UsageError(f"seed must be a whole number from 0, got {self.seed!r}")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise UsageError(f"{name} must be finite and not negative, got {value!r}")
        for name in _POSITIVE_IF_GIVEN:
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise UsageError(f"{name} must be finite and positive, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads `to_dict`.

        Raises:
            UsageError: an option is unknown (the nearest one is named) or has a value that cannot be used.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f"unknown option {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
        return cls(**values)

    def taken(self, energy: str) -> frozenset[str]:
        """Returns the options of energies that an energy takes, see `groundstate.idle`."""
        return OF_ENERGY & taken(parse(energy), cast(Coupling, self.coupling))

    def asked(self) -> frozenset[str]:
        """Returns the options of energies that are not at their defaults."""
        return frozenset(o for o in OF_ENERGY if getattr(self, o) != getattr(type(self), o))

    def for_energy(self, energy: str) -> Self:
        """Returns the configuration with another energy: what this one does not take goes back to its default.

        >>> config = TrainConfig(every=4, final_prox=2.0)
        >>> [(c.every, c.final_prox) for c in map(config.for_energy, ("nuclear", "graph", "none"))]
        [(4, 2.0), (4, None), (1, None)]
        """
        idle = self.asked() - self.taken(energy)
        return replace(self, energy=energy, **{o: getattr(type(self), o) for o in idle})

    def differences(self, other: TrainConfig) -> list[str]:
        """Returns ``"name: mine -> other's"`` for every option that decides the result and differs."""
        mine, theirs = (c.for_energy(c.energy).to_dict() for c in (self, other))
        return [f"{k}: {mine[k]!r} -> {theirs[k]!r}" for k in mine if mine[k] != theirs[k] and k not in _FREE]

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that name the configuration."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
