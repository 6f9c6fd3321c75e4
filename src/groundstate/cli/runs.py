"""Run folders as the verbs need them: their configuration, their network, and names for new ones."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from groundstate.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from groundstate.training.config import TrainConfig
    from groundstate.training.data import Dataset


def slug(text: str) -> str:
    """Returns a short name for files.

    >>> slug("0.001*nuclear@prox + schatten(p=0.5)")
    '0.001-nuclear-prox-schatten-p-0.5'
    """
    text = re.sub(r"e\+(?=\d)", "e", text.lower())  # 1e+30 is not 1e-30
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-.")[:60].strip("-.") or "run"


def new_folder(name: str, digest: str) -> Path:
    """Returns ``runs/<date>-<name>-<digest>``, with a number where that exists."""
    base = Path("runs") / f"{date.today():%Y%m%d}-{slug(name)}-{digest}"
    found, number = base, 1
    while found.exists():
        number += 1
        found = base.with_name(f"{base.name}-{number}")
    return found


def read_config(run: Path) -> TrainConfig:
    """Returns the configuration of a run folder.

    Raises:
        UsageError: the folder is no run folder.
        DataError: its ``run.json`` is damaged.
    """
    from groundstate.report.load import read_json
    from groundstate.training.config import TrainConfig
    from groundstate.training.recorder import RUN

    if not (run / RUN).is_file():
        raise UsageError(f"{run} is not a run folder (no {RUN}): give what `groundstate train` wrote")
    config = read_json(run / RUN).get("config")
    if not isinstance(config, dict):
        raise DataError(f"{run / RUN} has no configuration: restore it, or start a new run")
    try:
        return TrainConfig.from_dict(config)
    except TypeError as error:
        raise DataError(f"{run / RUN} has a damaged configuration ({error}): restore it, or start a new run") from None


def load_run(run: Path, data: str | None = None, data_dir: str | None = None) -> tuple[nn.Module, Dataset, list[str]]:
    """Returns the network of a run's newest checkpoint, its data, and notes on damaged checkpoints.

    Args:
        run: The run folder.
        data: Another data set than that of the run.
        data_dir: Where its files are, if not where the run had them.

    Raises:
        UsageError: it is no run folder, has no checkpoint yet, or its network does not fit the data.
        DataError: every checkpoint is damaged, or the data are.
    """
    from groundstate.training import checkpoint, models
    from groundstate.training import data as datasets

    config = read_config(run)
    found = checkpoint.load_latest(run / "checkpoints")
    if found is None:
        raise UsageError(f"{run} has no checkpoint yet: continue it with `groundstate train --resume {run}`")
    sets = datasets.load(
        data or config.data,
        data_dir or config.data_dir,
        val_size=config.val_size,
        train_size=config.train_size,
        label_noise=config.label_noise,
        seed=config.seed,
    )
    model = models.build(config.model, sets.inputs, sets.classes, config.seed)
    try:
        model.load_state_dict(found.tensors["weights"])
    except (KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(f"the weights of {found.path} do not fit {config.model} on {sets.name} ({reason})") from None
    return model.eval(), sets, found.notes
