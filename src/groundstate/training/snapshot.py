"""What the next training step depends on, as tensors and plain values, and back.

Weights, optimizer state, trajectories and step counts of the regularizers, the state of the global generator, and the
counters of the run. The order of the data is no part of it: it is a pure function of seed and epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groundstate.errors import DataError
from groundstate.regularizer import Regularizer
from groundstate.training.checkpoint import Checkpoint


@dataclass
class Counters:
    """Where a run stands.

    Attributes:
        step: Steps made, skipped ones included.
        lr_scale: Factor on the learning rate, halved by every backoff.
        bad_in_a_row: Steps skipped since the last good one.
        backoffs: How often the run went back.
        loss: Sum of the data loss over the samples of this epoch so far.
        correct: Samples of this epoch that were classified right.
        seen: Samples of this epoch so far.
        sum_squared_before: Sum of ||w_t - w_{t-1}||^2 up to the start of this epoch.
        seconds: Time spent.
    """

    step: int = 0
    lr_scale: float = 1.0
    bad_in_a_row: int = 0
    backoffs: int = 0
    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    sum_squared_before: float = 0.0
    seconds: float = 0.0

    def new_epoch(self) -> None:
        """Sets the sums of an epoch to zero."""
        self.loss, self.correct, self.seen = 0.0, 0, 0


def pack(
    model: nn.Module, optimizer: Optimizer, regularizers: Mapping[str, Regularizer], counters: Counters
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Returns ``(tensors, state)`` for `groundstate.training.checkpoint.save`."""
    tensors = {
        "weights": dict(model.state_dict()),
        "random": {"torch": torch.get_rng_state()},
        "optimizer": {
            f"{index}/{name}": value
            for index, entry in optimizer.state_dict()["state"].items()
            for name, value in entry.items()
            if isinstance(value, Tensor)
        },
    }
    state: dict[str, Any] = {"counters": asdict(counters)}
    for name, regularizer in regularizers.items():
        values = regularizer.state_dict()
        tensors[name] = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        state[name] = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
    return {group: named for group, named in tensors.items() if named}, state


def unpack(
    found: Checkpoint, model: nn.Module, optimizer: Optimizer, regularizers: Mapping[str, Regularizer]
) -> Counters:
    """Puts the state of a checkpoint back; returns its counters.

    Raises:
        DataError: the checkpoint is whole but not of this model, optimizer and regularizers.
    """
    try:
        counters = Counters(**found.state["counters"])
        model.load_state_dict(found.tensors["weights"])
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in found.tensors.get("optimizer", {}).items():
            index, _, name = key.partition("/")
            entries.setdefault(int(index), {})[name] = value.clone()
        optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
        for name, regularizer in regularizers.items():
            regularizer.load_state_dict({**found.state[name], **found.tensors.get(name, {})})
        torch.set_rng_state(found.tensors["random"]["torch"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{found.path} does not fit this run ({why[:200]}): start a new run") from None
    return counters
