"""Learning to denoise from noisy images alone: the factorized Jacobian nuclear norm against supervised training.

    python experiments/denoising.py [--seeds 3] [--images 24000] [--epochs 2] [--workers 1]
    python experiments/denoising.py --report

MNIST in [-1, 1] with Gaussian noise of deviation sigma. One convolutional network of an encoder and a decoder, without
skip connections, is trained on 1/2 ||f(y) - target||^2, summed over the pixels, plus a penalty:

    nuclear       y      + eta 1/2 (||J_g(h(y))||_F^2 + ||J_h(y)||_F^2), by finite differences, eta = sigma^2
    sure          y      + sigma^2 div f(y), one random direction: Stein's unbiased estimate of the risk
    noise2noise   another noisy copy
    supervised    the clean image
    none          y

and compared by the PSNR (data range 2) on test images. Over all functions nothing is lost: Stein's estimate is the
objective with tr J in the place of ||J||_* >= tr J, and the best denoiser, whose J = Cov(x | y) / sigma^2 is symmetric
and positive semidefinite, makes them equal. What is lost is due to one network and its training. Other strengths are
scanned with one seed and compared on validation images, which takes clean ones. A killed experiment goes on where it
was.

References: C. Scarvelis, J. Solomon, "Nuclear norm regularization for deep learning" (2024); J. Lehtinen et
al., "Noise2Noise" (2018); C. Stein, "Estimation of the mean of a multivariate normal distribution" (1981); S. Ramani,
T. Blu, M. Unser, "Monte-Carlo SURE" (2008).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from common import arguments, complete, describe_machine, load, mean_std, saved, table
from torch import Tensor, nn

import groundstate as gs
from groundstate.energies.jacobian_nuclear import JacobianNuclear
from groundstate.jacobian.cuts import Split, check_cut
from groundstate.jacobian.factorized import looseness
from groundstate.jacobian.function import function
from groundstate.training.data import MNIST_MEAN, MNIST_STD
from groundstate.training.order import batch_order, keyed

SIGMAS = (1.0, 2.0)
METHODS = ("nuclear", "sure", "noise2noise", "supervised", "none")
STRENGTHS = (0.5, 2.0)
"""Of the scan, times sigma^2, beside the theory's 1."""
LONGER = 3
BATCH, RATE, STEP = 32, 3e-3, 1e-2
TEST, VALIDATION, JACOBIANS = 2000, 1000, 4
PENALTY = JacobianNuclear(method="factorized", cut="encoder", estimator="fd", sigma=STEP, samples=None)


class Task(NamedTuple):
    """One run; ``strength`` is of the nuclear norm, times sigma^2."""

    sigma: float
    method: str
    strength: float
    seed: int
    epochs: int

    def __str__(self) -> str:
        return f"sigma={self.sigma:g}, {title(self.method, self.strength)}, seed {self.seed}, {self.epochs} epochs"


class Images(NamedTuple):
    """Clean images and two noisy copies of each, ``(B, 1, 28, 28)``."""

    clean: Tensor
    noisy: Tensor
    again: Tensor


@lru_cache(maxsize=3)
def images(part: str, sigma: float, count: int, seed: int) -> Images:
    """Returns images of a split with noise that is a function of the arguments: each has the same noise in all runs."""
    split = load("mnist", count if part == "train" else None, seed if part == "train" else 0)
    pixels = {"train": split.train_x, "val": split.val_x, "test": split.test_x}[part][:count]
    clean = (2 * (pixels * MNIST_STD + MNIST_MEAN) - 1).reshape(-1, 1, 28, 28)
    generator = torch.Generator().manual_seed(keyed(part, sigma, seed))
    noisy, again = (clean + sigma * torch.randn(clean.shape, generator=generator) for _ in range(2))
    return Images(clean, noisy, again)


def network(seed: int, width: int = 8) -> nn.Sequential:
    """Returns an encoder to 4 ``width`` channels of 7x7 (twice as wide as the image) and a decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed(seed, "network"))
        encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.GELU(),
            nn.Conv2d(2 * width, 4 * width, 3, 1, 1), nn.GELU(),
        )  # fmt: skip
        decoder = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1), nn.GELU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.GELU(),
            nn.Conv2d(width, 1, 3, 1, 1),
        )  # fmt: skip
    model = nn.Sequential()
    model.add_module("encoder", encoder)
    model.add_module("decoder", decoder)
    return model


def divergence(model: nn.Module, y: Tensor, f: Tensor, generator: torch.Generator) -> Tensor:
    """Returns an estimate of the mean of tr J from one random direction, by a finite difference from f = f(y)."""
    v = torch.randn(y.shape, generator=generator)
    return (v * (model(y + STEP * v) - f)).sum() / (STEP * len(y))


def run(task: Task, *, count: int) -> dict[str, Any]:
    """Trains one network and measures it; equal seeds share images, noise, initial weights and order."""
    train = images("train", task.sigma, count, task.seed)
    start = time.process_time()
    model = network(task.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    steps = task.epochs * math.ceil(count / BATCH)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    penalty = gs.Regularizer(model, task.strength * task.sigma**2 * PENALTY, seed=task.seed).attach(optimizer)
    drawn = torch.Generator().manual_seed(keyed(task.seed, "directions"))
    targets = {"supervised": train.clean, "noise2noise": train.again}.get(task.method, train.noisy)
    for epoch in range(task.epochs):
        for index in batch_order(count, task.seed, epoch).split(BATCH):
            y = train.noisy[index]
            f = model(y)
            loss = (f - targets[index]).square().sum() / (2 * len(y))
            if task.method == "nuclear":
                loss = loss + penalty.loss(y)
            elif task.method == "sure":
                loss = loss + task.sigma**2 * divergence(model, y, f, drawn)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    seconds = time.process_time() - start
    return {
        **task._asdict(),
        "validation": psnr(model, images("val", task.sigma, VALIDATION, 0)),
        "test": psnr(model, images("test", task.sigma, TEST, 0)),
        "jacobian": jacobian(model, images("test", task.sigma, TEST, 0).noisy[:JACOBIANS]),
        "cpu_seconds": round(seconds, 1),
    }


def psnr(model: Any, given: Images) -> dict[str, float]:
    """Returns mean and deviation over the images of 10 log10(4 / MSE), in dB; nothing is clipped."""
    with torch.no_grad():
        pairs = zip(given.clean.split(500), given.noisy.split(500), strict=True)
        errors = [(model(y) - x).square().flatten(1).mean(1) for x, y in pairs]
    values = 10 * (4 / torch.cat(errors).double()).log10()
    return {"mean": float(values.mean()), "std": float(values.std())}


def jacobian(model: nn.Module, y: Tensor) -> dict[str, float]:
    """Returns exact means over a few images: tr J, ||J||_*, its two bounds, and how far J is from symmetric."""
    with function(model, y) as (f, points):
        found = looseness(Split(f, check_cut(f, points, "encoder"), points), points)
    j = torch.stack([torch.func.jacrev(model, chunk_size=98)(one[None]).reshape(784, 784) for one in y]).detach()
    found["trace"] = float(j.diagonal(dim1=1, dim2=2).sum(1).mean())
    found["asymmetry"] = float(((j - j.mT) / 2).square().sum().sqrt() / j.square().sum().sqrt())
    return found


def references(sigma: float, count: int) -> dict[str, dict[str, float]]:
    """Returns the PSNR of three denoisers in closed form: none, the mean image, and the best linear one.

    The last minimizes 1/2 mean ||A y - y||^2 + sigma^2 ||A||_* over matrices A, on centered noisy images: it keeps
    (1 - sigma^2 / variance)_+ of each principal component, which is the Wiener filter.
    """
    noisy = images("train", sigma, count, 0).noisy.flatten(1)
    mean = noisy.mean(0)
    variances, directions = torch.linalg.eigh((noisy - mean).T.double() @ (noisy - mean).double() / len(noisy))
    kept = 1 - sigma**2 / variances.clamp_min(sigma**2)
    a = ((directions * kept) @ directions.T).float()
    test = images("test", sigma, TEST, 0)
    return {
        "noisy image": psnr(lambda y: y, test),
        "mean image": psnr(lambda y: mean.reshape(1, 1, 28, 28).expand_as(y), test),
        "linear, closed form": psnr(lambda y: ((y.flatten(1) - mean) @ a + mean).reshape(y.shape), test),
    }


# ---------------------------------------------------------------------- tables

_JACOBIAN = {"trace": 1, "nuclear": 1, "product/nuclear": 2, "half_sum/nuclear": 2, "asymmetry": 2}


def title(method: str, strength: float) -> str:
    """Returns the name of a row."""
    return f"nuclear, eta = {strength:g} sigma^2" if method == "nuclear" else method


def rows_of(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the runs by row: the nuclear norm with the theory's strength and the one chosen, every other method."""
    pairs = dict.fromkeys([("nuclear", 1.0), ("nuclear", best(runs)), *((m, 1.0) for m in METHODS)])
    found = {title(*pair): [r for r in runs if (r["method"], r["strength"]) == pair] for pair in pairs}
    return {name: told for name, told in found.items() if told}


def best(runs: list[dict[str, Any]]) -> float:
    """Returns the strength with the highest validation PSNR among the nuclear runs of seed 0."""
    known = {r["strength"]: r["validation"]["mean"] for r in runs if r["method"] == "nuclear" and r["seed"] == 0}
    return max(known, key=known.__getitem__, default=1.0)


def psnr_table(runs: list[dict[str, Any]], closed: dict[str, dict[str, float]]) -> str:
    """Returns PSNRs, and their differences to supervised training with the same seed."""
    rows = [[name, "", f"{v['mean']:.2f}", f"{v['std']:.2f}", "", "", ""] for name, v in closed.items()]
    supervised = {r["seed"]: r["test"]["mean"] for r in runs if r["method"] == "supervised"}
    for name, told in rows_of(runs).items():
        gaps = [r["test"]["mean"] - supervised[r["seed"]] for r in told if r["seed"] in supervised]
        test, validation = ([r[k]["mean"] for r in told] for k in ("test", "validation"))
        spread = f"{mean_std([r['test']['std'] for r in told])[0]:.2f}"
        seconds = number([r["cpu_seconds"] for r in told], 0)
        gap = number(gaps) if gaps and name != "supervised" else ""
        rows.append([name, str(len(told)), number(test), spread, gap, number(validation), seconds])
    return table(["", "runs", "test, dB", "over images", "to supervised", "validation", "CPU-s"], rows)


def jacobian_table(runs: list[dict[str, Any]]) -> str:
    """Returns what the Jacobians are, and how loose the bound."""
    rows = [
        [name, *(number([r["jacobian"][k] for r in told], digits) for k, digits in _JACOBIAN.items())]
        for name, told in rows_of(runs).items()
    ]
    return table(["", *_JACOBIAN], rows)


def scan_table(runs: list[dict[str, Any]]) -> str:
    """Returns PSNRs by strength, seed 0."""
    told = sorted((r["strength"], r) for r in runs if r["method"] == "nuclear" and r["seed"] == 0)
    rows = [[f"{s:g}", f"{r['validation']['mean']:.2f}", f"{r['test']['mean']:.2f}"] for s, r in told]
    return table(["eta / sigma^2", "validation", "test"], rows)


def report(result: dict[str, Any]) -> str:
    """Returns the tables of every sigma, in Markdown."""
    parts = []
    for sigma in SIGMAS:
        for epochs in (result["epochs"], LONGER * result["epochs"]):
            runs = [r for r in result["runs"] if (r["sigma"], r["epochs"]) == (sigma, epochs)]
            if not runs:
                continue
            parts += [f"### sigma = {sigma:g}, {epochs} epochs"]
            parts += [psnr_table(runs, result["references"][f"{sigma:g}"]), "Jacobians:", jacobian_table(runs)]
            if epochs == result["epochs"]:
                parts += ["Strengths, seed 0:", scan_table(runs)]
    minutes = sum(r["cpu_seconds"] for r in result["runs"]) / 60
    parts.append(f"{result['images']} images; {len(result['runs'])} runs, {minutes:.1f} CPU-minutes of training.")
    return "\n\n".join(parts)


def number(values: list[float], digits: int = 2) -> str:
    """Returns mean and deviation."""
    mean, std = mean_std(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


# ---------------------------------------------------------------------- command


def main() -> None:
    """Runs what is not there yet, saving after every run, and prints the tables."""
    parser = arguments("denoising from noisy images alone", "denoising", seeds=3)
    parser.add_argument("--images", type=int, default=24000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--sigmas", type=float, nargs="*", choices=SIGMAS, default=list(SIGMAS))
    parser.add_argument("--strengths", type=float, nargs="*", default=list(STRENGTHS))
    longer = {"nargs": "*", "choices": METHODS, "default": list(METHODS[:-1])}
    parser.add_argument("--longer", **longer, help="trained 3 times as long, seed 0")
    options = parser.parse_args()
    asked = {"images": options.images, "epochs": options.epochs}
    result = saved(options.out, {**asked, "machine": describe_machine(), "references": {}, "runs": []})
    if options.report:
        print(report(result))
        return
    if (found := {k: result[k] for k in asked}) != asked:
        parser.error(f"{options.out} is of {found}, asked for {asked}: name another file with --out")
    for sigma in options.sigmas:
        if f"{sigma:g}" not in result["references"]:
            result["references"][f"{sigma:g}"] = references(sigma, options.images)

    def finish(tasks: list[Task]) -> None:
        done = {tuple(r[k] for k in Task._fields) for r in result["runs"]}
        waiting = [t for t in tasks if tuple(t) not in done]
        complete(result, partial(run, count=options.images), waiting, options)

    def tasks(seeds: Sequence[int], methods: Sequence[str], strength: float = 1.0, times: int = 1) -> list[Task]:
        epochs = times * options.epochs
        return [Task(sigma, m, strength, k, epochs) for k in seeds for sigma in options.sigmas for m in methods]

    finish(tasks([0], METHODS))
    finish([t for s in options.strengths for t in tasks([0], ["nuclear"], s)])
    for sigma in options.sigmas:
        chosen = best([r for r in result["runs"] if (r["sigma"], r["epochs"]) == (sigma, options.epochs)])
        finish([t for t in tasks(range(options.seeds), ["nuclear"], chosen) if t.sigma == sigma])
    finish(tasks(range(options.seeds), METHODS))
    if options.longer:
        finish(tasks([0], options.longer, times=LONGER))
    print(report(result))


if __name__ == "__main__":
    main()
