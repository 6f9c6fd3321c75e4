"""What our loop costs over a loop written by hand, per step: 784-28-10, batches of 128, data in memory, one thread.

The opponent takes a batch by ``index_select`` and makes forward, backward and SGD with momentum; it reads no loss
and counts no hits. Ours checks the loss, keeps what the accuracy of the epoch needs, takes the time, heeds signals;
with what is monitored by default it also observes the path. Data are random numbers in the shape of MNIST.

    python benchmarks/loop_overhead.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from runner import compare, save
from torch.nn import functional

from groundstate.training import data, models
from groundstate.training.config import MONITOR, TrainConfig
from groundstate.training.loop import Run
from groundstate.training.order import batch_order
from groundstate.training.signals import StopRequest

STEPS = 40
LIMIT = 1.10


def random_data() -> data.Dataset:
    """Returns random numbers in the shape of MNIST."""
    generator = torch.Generator().manual_seed(0)
    splits = {}
    for split, size in (("train", 60_000), ("val", 0), ("test", 0)):
        splits[f"{split}_x"] = torch.randn(size, 784, generator=generator)
        splits[f"{split}_y"] = torch.randint(0, 10, (size,), generator=generator)
    return data.Dataset("random", **splits, inputs=784, classes=10, sha256={})


def by_hand(d: data.Dataset, config: TrainConfig, read: bool) -> Callable[[], object]:
    """Returns a function that makes `STEPS` steps of a plain loop; ``read``: with its loss and accuracy."""
    model = models.build(config.model, d.inputs, d.classes, config.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    order = batch_order(len(d.train_x), config.seed, 0)

    def steps() -> tuple[float, int]:
        total, hits = 0.0, 0
        for start in range(0, STEPS * config.batch_size, config.batch_size):
            index = order[start : start + config.batch_size]
            x, y = d.train_x.index_select(0, index), d.train_y.index_select(0, index)
            optimizer.zero_grad()
            logits = model(x)
            loss = functional.cross_entropy(logits, y)
            loss.backward()
            optimizer.step()
            if read:
                total += loss.item()
                hits += int((logits.argmax(1) == y).sum())
        return total, hits

    return steps


def ours(d: data.Dataset, config: TrainConfig, folder: Path) -> Callable[[], object]:
    """Returns a function that makes `STEPS` steps of our loop, from the start of an epoch."""
    with mock.patch.object(data, "load", return_value=d):
        run = Run(config, folder, StopRequest())

    def steps() -> None:
        run.at.step = 0
        run.at.new_epoch()
        for _ in range(STEPS):
            run.advance()
        run._count()  # the accuracy is counted at the end of an epoch; here its cost falls on these steps

    return steps


def main() -> None:
    """Runs the comparison and writes its result."""
    d = random_data()
    with tempfile.TemporaryDirectory() as name:

        def run(**settings: str) -> Callable[[], object]:
            config = TrainConfig(model="mlp:784-28-10", **settings)  # pyright: ignore[reportArgumentType]
            return ours(d, config, Path(name))

        config = TrainConfig(model="mlp:784-28-10")
        functions = {
            "by hand": by_hand(d, config, read=False),
            "by hand, loss and accuracy read": by_hand(d, config, read=True),
            "ours, nothing monitored": run(monitor="none"),
            "ours, monitored as by default": run(monitor=MONITOR),
            "ours, 1e-4*path_energy": run(monitor="none", energy="1e-4*path_energy"),
            "ours, 1e-4*nuclear": run(monitor="none", energy="1e-4*nuclear"),
        }
        result = compare(functions, rounds=60, threads=1)
    times = result["milliseconds"]
    base = times["by hand"]
    ratios = {k: {"median": v["median"] / base["median"], "min": v["min"] / base["min"]} for k, v in times.items()}
    ok = ratios["ours, nothing monitored"]["median"] <= LIMIT
    save("loop_overhead", {"steps": STEPS, **result, "ratio": ratios, "limit": {"allowed": LIMIT, "kept": ok}})


if __name__ == "__main__":
    main()
