"""The options that verbs share: one for every field of `TrainConfig`, and ``--json``, ``--quiet``, ``--debug``.

Options are plain text and numbers here, so that the help needs no torch; `TrainConfig` checks them when a verb runs.
An option that is not given is ``None``, so that the defaults stand in one place and ``--resume`` sees what was given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from groundstate.cli.console import Output

if TYPE_CHECKING:
    from groundstate.training.config import TrainConfig


@dataclass(frozen=True)
class Setting:
    """An option for a field of `TrainConfig`.

    Attributes:
        field: Name of the field; the option is the name with dashes.
        kind: Type of its value.
        default: The default as the help shows it.
        help: What it does.
        panel: Heading in the help.
        metavar: Values that it takes.
    """

    field: str
    kind: type
    default: str
    help: str
    panel: str
    metavar: str | None = None

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return _flag(self.field)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


_ENERGY, _DATA, _TRAIN, _RUN = "Energy", "Data and model", "Training", "Run"

SETTINGS = (
    Setting("energy", str, "none", "What to minimize, e.g. '1e-3*nuclear + 1e-4*path_energy'.", _ENERGY, "SPEC"),
    Setting("coupling", str, "grad", "How terms that name no @coupling act.", _ENERGY, "grad|prox|loss|monitor"),
    Setting("every", int, "1", "Let energies act at every k-th step only, k times as strong.", _ENERGY, "K"),
    Setting(
        "gap", float, "none", "Keep gradients of nuclear, graph until this share of the energy opens.", _ENERGY, "SHARE"
    ),
    Setting("select", str, "all matrices", "Which weights, e.g. '*.weight,!4.weight'.", _ENERGY, "PATTERNS"),
    Setting("final_prox", float, "none", "Step length of one prox after the last step.", _ENERGY, "STEP"),
    Setting(
        "monitor",
        str,
        "nuclear + squared_frobenius + graph + path_energy",
        "Energies recorded at every epoch.",
        _ENERGY,
        "SPEC",
    ),
    Setting("data", str, "digits", "Data set; digits needs no network.", _DATA, "digits|mnist"),
    Setting("data_dir", str, "$GROUNDSTATE_DATA, else a download", "Folder with the files of MNIST.", _DATA, "DIR"),
    Setting("model", str, "auto", "Layer sizes: mlp:784-28-10, or auto.", _DATA, "SPEC"),
    Setting("train_size", int, "all", "Training samples kept.", _DATA, "N"),
    Setting("val_size", int, "20 % (digits), 5000 (mnist)", "Validation samples.", _DATA, "N"),
    Setting("label_noise", float, "0", "Share of training labels made wrong.", _DATA, "SHARE"),
    Setting("epochs", int, "10", "Passes over the training split.", _TRAIN, "N"),
    Setting("batch_size", int, "128", "Samples per step.", _TRAIN, "N"),
    Setting("optimizer", str, "sgd", "Optimizer.", _TRAIN, "sgd|adam|adamw"),
    Setting("lr", float, "0.1", "Learning rate.", _TRAIN, "RATE"),
    Setting("momentum", float, "0.9", "Momentum of sgd.", _TRAIN, "BETA"),
    Setting("weight_decay", float, "0", "Weight decay of the optimizer.", _TRAIN, "RATE"),
    Setting("schedule", str, "constant", "Learning rate over the run.", _TRAIN, "constant|linear|cosine"),
    Setting("clip", float, "none", "Largest norm of the gradient, energies included.", _TRAIN, "NORM"),
    Setting("accumulate", int, "1", "Micro-batches per step.", _TRAIN, "N"),
    Setting("nonfinite", str, "stop", "What to do at a loss that is not finite.", _TRAIN, "stop|skip|backoff"),
    Setting("seed", int, "0", "Key of initialization, data order and label noise.", _RUN, "S"),
    Setting("threads", int, "1", "Threads of torch.", _RUN, "T"),
    Setting("checkpoint_every", int, "1", "Epochs between checkpoints.", _RUN, "N"),
    Setting("checkpoint_steps", int, "none", "One more checkpoint every n steps.", _RUN, "N"),
    Setting("keep", int, "2", "Checkpoints kept.", _RUN, "N"),
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.", rich_help_panel="Output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel="Output")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel="Output")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder to write.", metavar="DIR", rich_help_panel="Run")]
DataDir = Annotated[str | None, typer.Option("--data-dir", help="Folder with the files of MNIST.", metavar="DIR")]


def refuse_idle(given: Collection[str], config: TrainConfig, energies: Iterable[str]) -> None:
    """Refuses options of a training that were given and that nothing takes; the defaults of energies pass.

    Raises:
        UsageError: names the option, and why it plays no part.
    """
    from groundstate import idle
    from groundstate.energies.registry import parse
    from groundstate.errors import UsageError

    acting = [e for e in energies if parse(e).terms]
    options = {o: _flag(o) for o in sorted(config.asked()) if o in given}
    reasons: dict[str, str] = {}
    if not acting:
        reasons |= dict.fromkeys(options, "without --energy")
    if config.optimizer != "sgd":
        reasons["momentum"] = f"with the optimizer {config.optimizer}"
    if config.data == "digits":
        reasons["data_dir"] = "with digits, which are embedded"
    for field, why in reasons.items():
        if field in given:
            raise UsageError(f"{_flag(field)} plays no part {why}: leave it out")
    idle.refuse_idle(options, {o for e in acting for o in config.taken(e)}, ", ".join(acting))


def without(config: TrainConfig, energies: Iterable[str]) -> list[str]:
    """Returns a line for each option that some energies do not take: which, and why."""
    from groundstate.energies.registry import parse
    from groundstate.idle import WHY

    acting = [e for e in energies if parse(e).terms]
    left = {o: ", ".join(e for e in acting if o not in config.taken(e)) for o in sorted(config.asked())}
    return [f"without {_flag(o)}: {found} ({WHY[o]})" for o, found in left.items() if found]


def verb(settings: Iterable[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of ``function(output, given, ...)``.

    The command has the parameters of the function after these two, the options ``--json``, ``--quiet`` and ``--debug``,
    and one option for each of ``settings``; those that were given arrive in ``given``.
    """
    chosen = [s for s in SETTINGS if s.field in set(settings)]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            p.replace(annotation=hints[p.name])
            for p in inspect.signature(function).parameters.values()
            if p.name not in ("output", "given")
        ]
        parameters = [*own, *map(_parameter, chosen), *_console_parameters()]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            values.pop("debug")
            output = Output(json=values.pop("json"), quiet=values.pop("quiet"))
            asked = {s.field: values.pop(s.field) for s in chosen}
            function(output, {k: v for k, v in asked.items() if v is not None}, **values)

        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameter(setting: Setting) -> inspect.Parameter:
    option = typer.Option(
        setting.flag,
        help=f"{setting.help} Default: {setting.default}.",
        metavar=setting.metavar,
        show_default=False,
        rich_help_panel=setting.panel,
    )
    return _keyword(setting.field, Annotated[setting.kind | None, option], None)


def _console_parameters() -> list[inspect.Parameter]:
    return [_keyword(name, kind, False) for name, kind in (("json", Json), ("quiet", Quiet), ("debug", Debug))]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
