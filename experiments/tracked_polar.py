"""Is a polar factor that follows its weight by matrix products better than one that is renewed now and then?

Idea: W = Q H moves by little in a step. With M = Q^T W and a stale eigenbasis (V, s) of H, one step of Newton's method
for "M is symmetric, the columns of W lie in those of Q", and one of Newton and Schulz for "Q^T Q = I", bring Q along::

    O = V [ (V^T (M - M^T) V)_ij / (s_i + s_j) ] V^T,   Q <- Q + Q O + (W - Q M) V S^-1 V^T,   Q <- Q (3 I - Q^T Q) / 2

V only preconditions, so it may be old; s is read off the diagonal of V^T M V, and floored at max(s_1 / 100,
||M - M^T||_2). A step counts if ||I - Q^T Q||_F < 1/2 before the last product, ||M - M^T||_F is smaller after it, and
no number on the diagonal is negative: where a singular value of a square W crosses zero, det Q must jump, while M can
stay symmetric without being positive. Else W is decomposed again. The last product leaves no singular value of Q above
1, so that <Q, W> <= ||W||_*. From above, any orthonormal V will do: ||W||_* <= sum_i ||W v_i||.

All methods follow the same recorded trajectories of weights; the error is that of Q at every step, renewed there or
not. A cost is the number of operations times their times, measured in turns in the middle of the trajectory.

Reference: N. Higham, "Functions of Matrices" (2008), chapter 8.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from column_bounds import anchor, bounds
from common import arguments, describe_machine, load, mlp, save_json, saved, table
from torch import Tensor
from torch.nn import functional

import groundstate as gs
from groundstate.energies import Nuclear
from groundstate.norms.polar import polar
from groundstate.norms.spectral import tolerance
from groundstate.training.order import batch_order, keyed

SMALL, LARGE = (784, 128, 128, 10), (784, 512, 512, 10)
FIRST, STEPS, FEWER = 200, 400, 120  # the steps of a trajectory; fewer of the large network
BATCH, JUDGED, ROUNDS = 128, 100, 15
PERIODS = (1, 2, 3, 5, 8, 12, 20, 35, 60)
OLDEST, NEVER = 20, 10**9  # follows with one basis
SHOWN, JUDGING = ("mean", "median", "p90", "max"), ("mean", "p90", "max")  # a median at every 2nd step says nothing
WON = 0.8  # of the error of the other at equal cost
FLOOR, ORTHOGONAL, CROSSED = 1e-2, 0.5, 1e-6


class Tracked:
    """The polar factor of one weight, followed.

    Attributes:
        q: The factor, in the shape of the weight.
        v: The eigenbasis of the last decomposition.
        decompositions, follows, refused: How often each was done, and how often a follow did not count.
        oldest: Follows after which the basis is renewed.
    """

    def __init__(self, oldest: int = NEVER) -> None:
        self.q = self.v = torch.empty(0)
        self.decompositions = self.follows = self.refused = 0
        self.oldest = self.age = oldest

    def decompose(self, w: Tensor) -> None:
        """Sets the factor exactly."""
        self.decompositions, self.age = self.decompositions + 1, 0
        tall = upright(w)
        if tall.shape[1] <= 0.7 * tall.shape[0]:
            wide = tall.double()
            squares, v = torch.linalg.eigh(wide.mT @ wide)
            s = squares.clamp_min(0).sqrt()
            kept = s > tolerance(w) * s[-1]
            q = wide @ ((v * torch.where(kept, 1 / s, 0.0)) @ v.mT)
        else:
            u, s, vh = torch.linalg.svd(tall, full_matrices=False)
            kept, v = s > tolerance(w) * s[0], vh.mT
            q = (u * kept) @ vh
        self.v = v.to(w.dtype)
        self.q = q.to(w.dtype).mT if w.shape[0] < w.shape[1] else q.to(w.dtype)

    def follow(self, w: Tensor) -> bool:
        """Brings the factor along and returns whether that counts; it is unchanged otherwise.

        With m >= n, 6 m n^2 + 5 n^3 multiplications (9 n^3 for a square matrix), those of the tests included.
        """
        self.follows += 1
        wide, v = w.shape[0] < w.shape[1], self.v
        tall, q = (w.mT, self.q.mT) if wide else (w, self.q)
        turned = v.mT @ (q.mT @ tall) @ v
        skew = turned - turned.mT
        before = float(torch.linalg.matrix_norm(skew))
        s = turned.diagonal()
        top = float(s.max())
        if float(s.min()) < -CROSSED * top:
            return False
        s = s.clamp_min(max(FLOOR * top, largest(skew)))
        change = skew / (s[:, None] + s)
        if tall.shape[0] > tall.shape[1]:
            moved = q + q @ (v @ (change - turned / s) @ v.mT) + tall @ ((v / s) @ v.mT)
        else:  # the columns of a square Q are all there are
            moved = q + q @ (v @ change @ v.mT)
        gram = moved.mT @ moved
        gram.diagonal().sub_(1)
        if not float(torch.linalg.matrix_norm(gram)) < ORTHOGONAL:
            return False
        moved = moved - moved @ gram / 2
        m = moved.mT @ tall
        if not float(torch.linalg.matrix_norm(m - m.mT)) < before:
            return False
        self.q, self.age = moved.mT if wide else moved, self.age + 1
        return True

    def move(self, w: Tensor) -> None:
        """Follows, or decomposes where that does not count or the basis is too old."""
        if self.age >= self.oldest:
            self.decompose(w)
        elif not self.follow(w):
            self.refused += 1
            self.decompose(w)


def upright(w: Tensor) -> Tensor:
    """Returns the matrix with its longer side down."""
    return w.mT if w.shape[0] < w.shape[1] else w


def largest(skew: Tensor) -> float:
    """Returns an estimate of ||A||_2 of a skew matrix by three steps of the power method."""
    x = torch.ones(len(skew), dtype=skew.dtype)
    for _ in range(3):
        x = skew @ (x / x.norm().clamp_min(1e-30))
    return float(x.norm())


class Case(NamedTuple):
    """A training whose weights are followed."""

    widths: tuple[int, ...]
    optimizer: str
    strength: float

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.strength:g}"

    def shapes(self) -> list[str]:
        """Returns what is followed: of the large network the square weight only."""
        return [f"{n} x {m}" for m, n in pairwise(self.widths) if self.widths == SMALL or m == n]


CASES = [Case(w, o, mu) for mu in (0.0, 1e-3, 1e-4) for o in ("SGD", "AdamW") for w in (SMALL, LARGE)]


def record(case: Case, seed: int = 0) -> dict[str, list[Tensor]]:
    """Trains, and returns the weights of each step by shape."""
    split = load("mnist")
    model = mlp(case.widths, seed)
    rates: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "AdamW": partial(torch.optim.AdamW, lr=1e-3),
    }
    optimizer = rates[case.optimizer](model.parameters())
    if case.strength:
        gap = None if case.widths == SMALL else 0.003
        gs.Regularizer(model, case.strength * Nuclear(), gap=gap).attach(optimizer)
    order = torch.cat([batch_order(len(split.train_x), seed, e) for e in range(2)]).split(BATCH)
    found: dict[str, list[Tensor]] = {}
    last = FIRST + (STEPS if case.widths == SMALL else FEWER)
    for step, index in enumerate(order[:last]):
        loss = functional.cross_entropy(model(split.train_x[index]), split.train_y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for p in model.parameters() if step >= FIRST else ():
            if (shape := " x ".join(map(str, p.shape))) in case.shapes():
                found.setdefault(shape, []).append(p.detach().clone())
    return found


# ---------------------------------------------------------------------- methods


def factors(weights: list[Tensor], every: int, held: Tracked) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the factor of each step, moved at every k-th, and the last eigenbasis."""
    for step, w in enumerate(weights):
        if step % every == 0:
            held.move(w)
        yield held.q, held.v


def judged(weights: list[Tensor], exact: dict[int, tuple[Tensor, float]], found: Any) -> dict[str, Any]:
    """Returns figures of the relative errors of a sequence of factors, and of the certified gaps."""
    errors, gaps = [], []
    for step, (q, v) in enumerate(found):
        if step in exact:
            right, _ = exact[step]
            w = weights[step].double()
            lower, upper = float((q.double() * w).sum()), float((upright(w) @ v.double()).norm(dim=0).sum())
            errors.append(float((q.double() - right).norm() / right.norm()))
            gaps.append((upper - lower) / max(lower, 1e-30))
    return {"error": spread(errors), "gap": spread(gaps)}


def spread(values: list[float]) -> dict[str, float]:
    """Returns mean, median, 90 % and maximum."""
    ordered = sorted(values)
    mean, median = statistics.fmean(ordered), statistics.median(ordered)
    return {"mean": mean, "median": median, "p90": ordered[int(0.9 * len(ordered))], "max": ordered[-1]}


METHODS = {"stale": (0, PERIODS), "tracked": (OLDEST, PERIODS[:7]), "tracked, one basis": (NEVER, (1, 2, 5))}


def prices(weights: list[Tensor]) -> dict[str, float]:
    """Returns the milliseconds of each operation: medians, in turns, of the processor time of one thread."""
    before, w = weights[len(weights) // 2 - 1 :][:2]
    at, held = anchor(w), Tracked()
    held.decompose(before)
    q = held.q

    def follow() -> None:
        held.q = q
        held.follow(w)

    functions: dict[str, Callable[[], object]] = {
        "product": lambda: upright(w) @ held.v,
        "polar": lambda: polar(w),
        "anchor": lambda: anchor(w),
        "bounds": lambda: bounds(w, at),
        "follow": follow,
        "decompose": lambda: Tracked().decompose(w),
        "svd": lambda: torch.linalg.svd(w, full_matrices=False),
    }
    repeats = range(4 if len(w) <= 128 else 1)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.thread_time()
            for _ in repeats:
                function()
            taken[name].append(1e3 * (time.thread_time() - start) / len(repeats))
    return {name: statistics.median(of) for name, of in taken.items()}


def followed(weights: list[Tensor]) -> dict[str, Any]:
    """Runs every method on one weight."""
    chosen = torch.randperm(len(weights), generator=torch.Generator().manual_seed(keyed(0, "judged")))
    exact = {int(i): reference(weights[int(i)]) for i in chosen[: JUDGED if weights[0].shape[0] < 500 else JUDGED // 4]}
    rows: list[dict[str, Any]] = []
    for name, (oldest, periods) in METHODS.items():
        for every in periods:
            held = Tracked(oldest)
            figures = judged(weights, exact, factors(weights, every, held))
            figures |= {"refreshes": held.decompositions, "follows": held.follows, "refused": held.refused}
            rows.append({"method": name, "every": every, **figures})
    return {"prices": prices(weights), "steps": len(weights), "rows": rows}


def reference(w: Tensor) -> tuple[Tensor, float]:
    """Returns the minimal-norm polar factor and the norm by a float64 SVD."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return (u * (s > tolerance(w) * s[0])) @ vh, float(s.sum())


# ---------------------------------------------------------------------- tables


def milliseconds(row: dict[str, Any], case: dict[str, Any]) -> float:
    """Returns the time per step: operations by the price of the fastest way that serves; refused follows are cheap."""
    p = case["prices"]
    renewed = min(p["polar"], p["svd"]) if row["method"] == "stale" else min(p["anchor"], p["decompose"])
    made = row["refreshes"] * renewed + row.get("follows", 0) * p["follow"]
    return made / case["steps"]


def at_cost(rows: list[dict[str, Any]], ms: float, what: str, which: str) -> float:
    """Returns the error of staleness at a cost, between periods by powers; 0 where every step can be exact."""
    *points, exact = sorted((r["ms"], r[what][which]) for r in rows if r["method"] == "stale")
    if ms >= exact[0]:
        return 0.0
    below = max((p for p in points if p[0] <= ms), default=points[0])
    above = min((p for p in points if p[0] >= ms), default=points[-1])
    if below[0] == above[0] or min(below[1], above[1]) <= 0:
        return min(below[1], above[1])
    share = math.log(ms / below[0]) / math.log(above[0] / below[0])
    return below[1] * (above[1] / below[1]) ** share


def rows_of(case: dict[str, Any]) -> list[list[str]]:
    """Returns every method at one weight of one training."""
    found = []
    for r in case["rows"]:
        name = f"{r['method']}, {'gap' if r['every'] < 1 else 'every'} {r['every']:g}"
        told = [(r["error"][k], at_cost(case["rows"], r["ms"], "error", k)) for k in JUDGING if "refused" in r]
        ratios = ", ".join(f"{a / b:.2f}" if b else "exact" for a, b in told if r["method"] != "stale")
        figures = [f"{r[w][k]:.1e}" for w in ("error", "gap") for k in SHOWN]
        counts = [str(r.get("refreshes", "")), str(r.get("follows", r.get("looks", "")))]
        found.append([name, f"{r['ms']:.3f}", *figures, *counts, ratios])
    return found


def verdicts(cases: list[dict[str, Any]]) -> str:
    """Returns, by weight and training, where tracking has the smaller error at equal cost."""
    lines = []
    for c in cases:
        cells, tracking = [], [r for r in c["rows"] if r["method"].startswith("tracked")]
        for what, which in (*(("error", k) for k in JUDGING), ("gap", "mean")):
            told = [(r[what][which], at_cost(c["rows"], r["ms"], what, which), r["every"]) for r in tracking]
            best = min(((a / b, k) for a, b, k in told if b), default=(math.inf, 0))
            won = sum(b > 0 and a < WON * b for a, b, _ in told)
            cells.append(f"{best[0]:.2f} ({best[1]}), {won} of {len(told)}" if best[1] else "exact is cheaper")
        p = c["prices"]
        failed = sum(r["refused"] for r in tracking) / max(1, sum(r["follows"] for r in tracking))
        units = [f"{p[k] / p['product']:.1f}" for k in ("follow", "anchor", "polar", "svd")]
        lines.append([c["name"], f"{p['product']:.2f}", *units, f"{100 * failed:.0f} %", *cells])
    header = ["product, ms", "follow", "anchor", "polar", "SVD", "refused"]
    return table(["", *header, *(f"error: {k}" for k in JUDGING), "gap: mean"], lines)


def report(result: dict[str, Any]) -> str:
    """Returns every table of the experiment in Markdown."""
    cases = sorted(result["cases"], key=lambda c: c["name"])
    for case in cases:
        case["rows"] = [{**r, "ms": milliseconds(r, case)} for r in case["rows"]]
    header = ["ms per step", *(f"{w}: {k}" for w in ("error", "gap") for k in SHOWN), "decompositions"]
    header += ["follows, looks", "error / stale at that cost"]
    parts = ["### Verdicts", verdicts(cases)]
    parts += [part for c in cases for part in (f"### {c['name']}", table(["", *header], rows_of(c)))]
    return "\n\n".join(parts)


def main() -> None:
    """Runs what is not there yet, saving after every weight, and prints the tables."""
    parser = arguments("is a tracked polar factor better than one renewed now and then", "tracked_polar")
    options = parser.parse_args()
    result = saved(options.out, {"machine": describe_machine(), "cases": []})
    torch.set_num_threads(1)
    for case in CASES if not options.report else ():
        done = {c["name"] for c in result["cases"]}
        waiting = {shape: name for shape in case.shapes() if (name := f"{shape}, {case}") not in done}
        recorded = record(case) if waiting else {}
        for shape, name in waiting.items():
            print(name, flush=True)
            result["cases"].append({"name": name, **followed(recorded[shape])})
            save_json(options.out, result)
    print(report(result))


if __name__ == "__main__":
    main()
