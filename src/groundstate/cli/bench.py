"""``groundstate bench``: the constants that choose the way to a polar factor, and what is fastest on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from groundstate.cli.console import Output, table
from groundstate.cli.options import verb


@verb()
def bench(
    output: Output,
    given: dict[str, Any],
    *,
    tune: Annotated[bool, typer.Option("--tune", help="Measure the constants here and keep them.")] = False,
    repeat: Annotated[int, typer.Option("--repeat", help="Timings of each, of which the median counts.")] = 15,
) -> None:
    """Show or measure what decides how nuclear energies are computed. Only speed depends on it."""
    import torch

    from groundstate.errors import UsageError
    from groundstate.norms import polar_table, polar_tune

    if repeat < 1:
        raise UsageError(f"--repeat must be at least 1, got {repeat}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    before = {device: polar_table.constants(device) for device in devices}
    after = {device: polar_tune.tune(device, repeat) for device in devices} if tune else before
    where = str(polar_table.location())
    for device in devices if tune else ():
        polar_table.write(device, after[device])
    body: dict[str, Any] = {"constants": {d: c._asdict() for d, c in after.items()}, "file": where, "tuned": tune}
    output.document("bench", body)
    rows = [
        (device, name, f"{getattr(polar_table.Constants(), name):g}", f"{value:g}")
        for device, found in after.items()
        for name, value in found._asdict().items()
    ]
    output.show(table(("device", "constant", "default", "here"), rows, left=2))
    output.show(f"written: {where}" if tune else f"Measure them on this machine: groundstate bench --tune ({where})")
