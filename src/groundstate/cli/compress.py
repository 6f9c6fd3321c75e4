"""``groundstate compress``: low-rank factors for the network of a run, with size, speed and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundstate.cli.console import Output, percent
from groundstate.cli.options import DataDir, verb

if TYPE_CHECKING:
    from torch import nn

    from groundstate.compress import Compressed
    from groundstate.energies.base import Sum
    from groundstate.training.config import TrainConfig
    from groundstate.training.data import Dataset

_RULES = ("tolerance", "cut", "energy", "rank", "output_tolerance")
_RULE, _TUNE = "Rule (exactly one)", "Fine-tune"
_KEEP = "keep"


@verb()
def compress(
    output: Output,
    given: dict[str, Any],
    *,
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="The smallest network that loses at most this many points of validation accuracy, e.g. 0.5.",
            metavar="POINTS",
            rich_help_panel=_RULE,
        ),
    ] = None,
    cut: Annotated[
        float | None,
        typer.Option(
            "--cut",
            help="Drop singular values below this share of the largest.",
            metavar="SHARE",
            rich_help_panel=_RULE,
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            help="Keep this share of each squared Frobenius norm, e.g. 0.99.",
            metavar="SHARE",
            rich_help_panel=_RULE,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Keep this many singular values.", metavar="R", rich_help_panel=_RULE),
    ] = None,
    output_tolerance: Annotated[
        float | None,
        typer.Option(
            "--output-tolerance",
            help="Let the logits of the validation inputs change by at most this share of their norm, e.g. 0.01.",
            metavar="SHARE",
            rich_help_panel=_RULE,
        ),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="With --output-tolerance: SVD of the weights, not of what they give."),
    ] = False,
    fine_tune: Annotated[
        int | None,
        typer.Option(
            "--fine-tune", help="Then train the factors for so many epochs.", metavar="EPOCHS", rich_help_panel=_TUNE
        ),
    ] = None,
    fine_tune_lr: Annotated[
        float | None,
        typer.Option(
            "--fine-tune-lr", help="Its learning rate (Adam). Default: 0.001.", metavar="RATE", rich_help_panel=_TUNE
        ),
    ] = None,
    fine_tune_energy: Annotated[
        str | None,
        typer.Option(
            "--fine-tune-energy",
            help="What is minimized with the loss, seen as before at the products of the factors: keep (the energy of "
            "the run), none, or another one. Default: keep.",
            metavar="keep|none|SPEC",
            rich_help_panel=_TUNE,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Data set: digits or mnist. Default: that of the run.", metavar="NAME"),
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="New folder for the network. Default: RUN/compressed-RULE.", metavar="DIR"),
    ] = None,
) -> None:
    """Factor the layers of a trained network where that makes them smaller.

    Writes the factorized network to a new folder and prints size, speed and accuracy before and after. Ends with exit
    code 1 where nothing gets smaller.
    """
    from groundstate.cli import compress_tables as tables
    from groundstate.cli.runs import load_run, read_config

    rule, value = _one_rule(dict(zip(_RULES, (tolerance, cut, energy, rank, output_tolerance))))
    tune = _Tune.of(fine_tune, fine_tune_lr, fine_tune_energy)
    folder = _folder(out, run, rule, value, weights_only, tune)
    model, sets, notes = load_run(run, data=data, data_dir=data_dir)
    for note in notes:
        output.note(f"warning: {note}")
    config = read_config(run)
    with _threads(config.threads):
        made = _made(model, sets, rule, value, not weights_only)
        facts = _facts(model, made, sets)
        if tune is not None:
            made = _tuned(output, made, sets, config, tune)
            as_cut = facts["test_accuracy"]["after"]
            facts["test_accuracy"] |= {"before_fine_tune": as_cut, "after": _accuracy(made.model, sets, "test")}
    made.save(folder)
    output.document("compress", {"run": run, "out": folder, "rule": {rule: value}, **made.to_dict(), **facts})
    shown = tables.of_layers(made.rows), *tables.of_randomized(made.rows), tables.of_totals(made, facts, sets)
    output.show(*shown, *tables.of_fine_tune(made), f"Factorized network: {folder}")


@dataclass(frozen=True)
class _Tune:
    """What was asked of the fine-tune; ``energy`` is ``None`` for that of the run."""

    epochs: int
    lr: float
    energy: Sum | None

    @classmethod
    def of(cls, epochs: int | None, lr: float | None, energy: str | None) -> _Tune | None:
        from groundstate.compress_tune import LR
        from groundstate.energies.registry import parse
        from groundstate.errors import UsageError

        for name, value in (("lr", lr), ("energy", energy)):
            if value is not None and epochs is None:
                raise UsageError(f"--fine-tune-{name} goes with --fine-tune EPOCHS")
        chosen = None if energy in (None, _KEEP) else parse(energy)
        return None if epochs is None else cls(epochs, LR if lr is None else lr, chosen)


def _folder(out: Path | None, run: Path, rule: str, value: float, weights_only: bool, tune: _Tune | None) -> Path:
    """Returns the folder to write, which is not there yet."""
    from groundstate.cli.runs import slug
    from groundstate.errors import UsageError

    if weights_only and rule != "output_tolerance":
        raise UsageError("--weights-only goes with --output-tolerance; the other rules cut weights anyway")
    ending = "-weights-only" * weights_only
    if tune is not None:
        ending += f"-tuned-{tune.epochs}" + (f"-{slug(repr(tune.energy))}" if tune.energy is not None else "")
    folder = out or run / f"compressed-{rule.replace('_', '-')}-{value:g}{ending}"
    if folder.exists():
        raise UsageError(f"{folder} exists: give the name of a new folder with --out")
    return folder


def _one_rule(values: dict[str, Any]) -> tuple[str, float]:
    from groundstate.errors import UsageError

    chosen = [(k, v) for k, v in values.items() if v is not None]
    if len(chosen) != 1:
        *most, last = (f"--{k.replace('_', '-')}" for k in values)
        named = ", ".join(f"--{k.replace('_', '-')}" for k, _ in chosen) or "none"
        raise UsageError(f"give exactly one of {', '.join(most)} and {last}; got {named}")
    return chosen[0]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The threads of the run: another number may give other last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _accuracy(model: nn.Module, sets: Dataset, split: str) -> float | None:
    from groundstate.training.evaluation import accuracy_and_loss

    return accuracy_and_loss(model, getattr(sets, f"{split}_x"), getattr(sets, f"{split}_y"))[0]


def _made(model: nn.Module, sets: Dataset, rule: str, value: Any, data_aware: bool) -> Compressed:
    """Compresses by one rule of the command line."""
    from groundstate.compress import compress as factor
    from groundstate.errors import ThresholdError

    def validation(m: nn.Module) -> float:
        return _accuracy(m, sets, "val") or 0.0

    if rule == "tolerance":
        value = _within(model, value, validation)
    options: dict[str, Any] = {"tolerance" if rule == "cut" else rule: value}
    if rule == "output_tolerance":
        options |= {"data": sets.val_x, "data_aware": data_aware}
    made = factor(model, **options, evaluate=validation, example=sets.val_x[:256])
    if not any(r.factored for r in made.rows):
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in made.rows if r.reason)
        raise ThresholdError(f"nothing gets smaller, so nothing was written ({reasons})")
    return made


def _within(model: nn.Module, points: float, accuracy: Callable[[nn.Module], float]) -> float:
    from groundstate.errors import ThresholdError, UsageError
    from groundstate.training.smallest import smallest_within

    if not 0 <= points <= 100:
        raise UsageError(f"--tolerance is in points of accuracy, from 0 to 100, got {points:g}")
    share = smallest_within(model, points / 100, accuracy)
    if share is None:
        raise ThresholdError(
            f"no smaller network keeps the validation accuracy within {points:g} points of {percent(accuracy(model))}: "
            "nothing was written; allow more points, or train with a nuclear energy"
        )
    return share


def _facts(model: nn.Module, made: Compressed, sets: Dataset) -> dict[str, Any]:
    """Returns what the test split, which chose nothing, says of the network as it was cut."""
    from groundstate.compress_output import output_change

    test = {key: _accuracy(m, sets, "test") for key, m in (("before", model), ("after", made.model))}
    facts: dict[str, Any] = {"test_accuracy": test}
    if "output_change" in made.totals and len(sets.test_x):
        facts["test_output_change"] = output_change(model, made.model, sets.test_x)
    return facts


def _tuned(output: Output, made: Compressed, sets: Dataset, config: TrainConfig, tune: _Tune) -> Compressed:
    """Trains the factors, with the energy of the run as far as it can act on them; names what of it cannot."""
    from groundstate.compress_energy import EnergyOnFactors
    from groundstate.compress_tune import tuned

    energy, left_out = tune.energy, []
    if energy is None:
        kept = EnergyOnFactors(made.model, config.energy, coupling=config.coupling, select=config.select)
        energy, left_out = kept.energy, kept.left_out
        for reason in left_out:
            output.note(f"warning: left out of the fine-tune: {reason}")
    train, held_out = (sets.train_x, sets.train_y), (sets.val_x, sets.val_y)
    how: dict[str, Any] = {"seed": config.seed, "batch_size": config.batch_size}
    made = tuned(made, train, held_out, tune.epochs, tune.lr, energy=energy, select=config.select, **how)
    return replace(made, fine_tune={**(made.fine_tune or {}), "energy_left_out": left_out})
