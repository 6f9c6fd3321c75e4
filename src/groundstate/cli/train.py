"""``groundstate train``: one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundstate.cli.console import Meter, Output, figure, percent, table
from groundstate.cli.options import SETTINGS, Out, refuse_idle, verb

if TYPE_CHECKING:
    from rich.table import Table

    from groundstate.training.config import TrainConfig


@verb(settings=[s.field for s in SETTINGS])
def train(
    output: Output,
    given: dict[str, Any],
    *,
    out: Out = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Continue the run of this folder.", metavar="RUN", rich_help_panel="Run"),
    ] = None,
) -> None:
    """Train one network, with an energy or without.

    The run folder (default: runs/DATE-ENERGY-HASH) gets run.json, metrics.jsonl, checkpoints/ and summary.json.
    """
    from groundstate.cli.runs import new_folder, read_config
    from groundstate.errors import UsageError
    from groundstate.training.config import TrainConfig
    from groundstate.training.loop import train as run

    if resume is None:
        config = TrainConfig.from_dict(given)
        folder = out or new_folder(config.energy, config.digest)
    else:
        if out is not None:
            raise UsageError("--resume names the folder already: leave out --out")
        config = TrainConfig.from_dict(read_config(resume).to_dict() | given)
        folder = resume
    refuse_idle(given, config, [config.energy])
    length = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    output.note(f"{config.energy} on {config.data}, seed {config.seed}, {length}: {folder}")
    with output.progress(config.epochs, "epoch") as meter:
        summary = run(config, folder, resume=resume is not None, progress=_Follow(meter, config))
    output.document("train", {"run": folder, "config": config.to_dict(), "summary": summary})
    output.show(summary_table(summary), f"Run folder: {folder}")


class _Follow:
    """Turns events of the loop into progress."""

    def __init__(self, meter: Meter, config: TrainConfig) -> None:
        self.meter, self.epochs, self.text = meter, config.epochs, ""

    def __call__(self, event: dict[str, Any]) -> None:
        if event["kind"] == "note":
            self.meter.line(event["text"])
        elif event["kind"] == "step":
            self.meter.update(round(self.epochs * event["step"] / event["total"], 2), self.text)
        elif event["kind"] == "epoch":
            self.text = f"validation {percent(event['val_accuracy'])}"
            self.meter.update(event["epoch"], self.text)
            self.meter.line(f"epoch {event['epoch']}/{self.epochs}: {epoch_line(event)}", crop=True)


def epoch_line(event: dict[str, Any]) -> str:
    """Returns the figures of an epoch in one line."""
    parts = []
    if event["train_loss"] is not None:
        parts.append(f"train loss {event['train_loss']:.4f} ({percent(event['train_accuracy'])})")
    if event["val_loss"] is not None:
        parts.append(f"val loss {event['val_loss']:.4f} ({percent(event['val_accuracy'])})")
    parts += [f"{name} {figure(value)}" for name, value in event["energies"].items()]
    return ", ".join(parts)


def summary_table(summary: dict[str, Any]) -> Table:
    """Returns the end of a run as a table of two columns."""
    rows: list[tuple[str, str]] = []
    for split in ("test", "val"):
        accuracy, loss = summary.get(f"{split}_accuracy"), summary.get(f"{split}_loss")
        rows.append((f"{split} accuracy, loss", f"{percent(accuracy)}, {figure(loss)}"))
    rows += [(name, figure(value)) for name, value in summary.get("energies", {}).items()]
    path = summary.get("path", {})
    rows += [(k.replace("_", " "), figure(path[k])) for k in ("path_energy", "length", "straightness") if k in path]
    rows += [(f"rank of {name}", figure(rank)) for name, rank in summary.get("ranks", {}).items()]
    rows += [
        (f"decompositions for {key}", f"{kept['decompositions']} of {kept['exact']}")
        for key, kept in summary.get("kept", {}).items()
    ]
    rows.append(("step", f"{figure(summary.get('step_ms', {}).get('median'))} ms"))
    return table(("", "value"), rows, title="Result")
