"""The two MNIST scripts that groundstate began with, as command lines: baseline and regularized, then the plots.

The strength ``mu`` multiplies the energy as the scripts define it: `nuclear_norm` and `global_adjacency` are energies
of a symmetric graph, so a layer counts twice its nuclear norm; `layerwise` counts it once; `global` path energy counts
every weight twice. The graph is oriented correctly and enters once, unlike in the first version of the scripts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from groundstate.errors import GroundstateError
from groundstate.training.config import TrainConfig
from groundstate.training.loop import train
from groundstate.training.recorder import METRICS, read_metrics

SPECTRAL = {
    "layerwise": (1.0, "nuclear", 1.0, "sum of nuclear norms"),
    "nuclear_norm": (2.0, "nuclear", 2.0, "2 x sum of nuclear norms"),
    "frobenius_norm": (1.0, "squared_frobenius", 1.0, "sum of squared weights"),
    "global_adjacency": (1.0, "graph", 1.0, "energy of the whole graph"),
}
PATH = {
    "blocks": (1.0, "path_energy", 1.0, "sum of ||w_t - w_(t-1)||^2"),
    "global": (2.0, "path_energy", 2.0, "sum of ||w_t - w_(t-1)||^2, both triangles"),
}
_COLORS = {"baseline": "#4c72b0", "regularized": "#c44e52"}
Run = tuple[list[dict[str, Any]], dict[str, Any]]


def main(script: str, argv: list[str] | None = None) -> int:
    """Runs one of the scripts and returns its exit code.

    Args:
        script: Path of the script; its folder's name says which one it is and its ``plots`` folder takes the figures.
        argv: Arguments; default: those of the process.
    """
    methods = SPECTRAL if "spectral" in Path(script).name else PATH
    parser = argparse.ArgumentParser(description="Train an MLP on MNIST with and without an energy, and plot both.")
    parser.add_argument("--method", choices=list(methods), default=next(iter(methods)))
    parser.add_argument("--mu", type=float, default=1e-4, help="strength (default: 0.0001)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[28], help="hidden widths (default: 28)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-dir", default=None, help="folder with the four MNIST files")
    parser.add_argument("--plots", type=Path, default=Path(script).parent / "plots", help="folder for the figures")
    options = parser.parse_args(argv)
    try:
        _compare(options, methods)
    except GroundstateError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _compare(options: argparse.Namespace, methods: dict[str, tuple[float, str, float, str]]) -> None:
    factor, energy, _, _ = methods[options.method]
    config = TrainConfig(
        data="mnist",
        data_dir=options.data_dir,
        model="mlp:" + "-".join(map(str, [784, *options.hidden, 10])),
        epochs=options.epochs,
        lr=0.1,
        momentum=0.9,
        batch_size=128,
        val_size=0,
        seed=options.seed,
        threads=options.threads,
    )
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, spec in (("baseline", "none"), ("regularized", f"{factor * options.mu!r}*{energy}")):
            out = Path(folder) / label

            def show(event: dict[str, Any], label: str = label) -> None:
                if event["kind"] == "epoch" and event["epoch"] > 0:
                    print(_line(label, event, methods[options.method]), flush=True)

            summary = train(replace(config, energy=spec), out, progress=show)
            print(f"{label}: test accuracy {100 * summary['test_accuracy']:.2f} %", flush=True)
            runs[label] = ([r for r in read_metrics(out / METRICS) if r["kind"] == "epoch"], summary)
    options.plots.mkdir(parents=True, exist_ok=True)
    _plot_all(options, methods, runs)


def _energy(record: dict[str, Any], method: tuple[float, str, float, str]) -> float:
    _, energy, factor, _ = method
    return factor * (record["path_epoch_sum_squared"] if energy == "path_energy" else record["energies"][energy])


def _line(label: str, event: dict[str, Any], method: tuple[float, str, float, str]) -> str:
    return (
        f"{label} epoch {event['epoch']}: train loss {event['train_loss']:.4f}, train accuracy "
        f"{100 * event['train_accuracy']:.2f} %, {method[3]} {_energy(event, method):.4g}"
    )


def _plot_all(
    options: argparse.Namespace, methods: dict[str, tuple[float, str, float, str]], runs: dict[str, Run]
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    method, label = methods[options.method], f"{options.method}, mu = {options.mu:g}"
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, (records, summary) in runs.items():
        trained = [r for r in records if r["train_loss"] is not None]
        epochs, color = [r["epoch"] for r in trained], _COLORS[name]
        left.plot(epochs, [r["train_loss"] for r in trained], color=color, label=name)
        right.plot(epochs, [100 * r["train_accuracy"] for r in trained], color=color, label=f"{name}, training")
        right.plot(epochs[-1:], [100 * summary["test_accuracy"]], "o", color=color, label=f"{name}, test at the end")
    left.set(xlabel="epoch", ylabel="cross-entropy, without the energy", title="training loss")
    right.set(xlabel="epoch", ylabel="accuracy, %", title="accuracy")
    _save(figure, (left, right), label, options.plots / f"loss_accuracy_plot_method={options.method}.png")

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    path = method[1] == "path_energy"
    for name, (records, _) in runs.items():
        shown = records[1:] if path else records
        axis.plot([r["epoch"] for r in shown], [_energy(r, method) for r in shown], color=_COLORS[name], label=name)
    axis.set(xlabel="epoch", ylabel=method[3] + (" per epoch" if path else ""), ylim=(0, None))
    stem = "path_energy" if path else "spectral_energy"
    _save(figure, (axis,), label, options.plots / f"{stem}_during_training_method={options.method}.png")
    if path:
        return
    layers = list(runs["baseline"][1]["spectra"])
    figure, axes = pyplot.subplots(1, len(layers), figsize=(4 * len(layers), 4), layout="constrained", squeeze=False)
    for axis, layer in zip(axes[0], layers, strict=True):
        every = [s for _, summary in runs.values() for s in summary["spectra"][layer]]
        for name, (_, summary) in runs.items():
            values = summary["spectra"][layer]
            axis.hist(values, bins=30, range=(0, max(every)), alpha=0.6, color=_COLORS[name], label=name)
        axis.set(title=layer, xlabel="singular value", ylabel="count")
    target = options.plots / f"eigenvalue_distribution_by_layer_method={options.method}.png"
    _save(figure, tuple(axes[0]), label, target)


def _save(figure: Any, axes: tuple[Any, ...], title: str, path: Path) -> None:
    for axis in axes:
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    print(f"saved {path}")
