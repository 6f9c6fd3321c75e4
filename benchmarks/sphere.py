"""What the hyperspherical energy costs: against autograd on the whole Gram matrix, in time, memory and digits.

    python benchmarks/sphere.py [--rounds 7] [--huge] [--cases speed memory threads estimates]

Gaussian neurons in float32. "gram" is the form that published code uses: cosines of all pairs, a power, the strict
upper triangle, backward. Peak memory is that of a process of its own, above what it held before the call. ``--huge``
adds 100,000 neurons in 128 dimensions (about a minute a core) with its progress. Targets, value and gradient on one
thread:

    N = 4096, d = 64      at least 10 times faster than gram, 30 times less memory; half-space within 1.2 of full space
    N = 16384, d = 512    at least 2.2 times faster than gram, at most 150 MB
    N = 100000, d = 128   less than 1 GB
    N = 8192, d = 512     moments and a sample: 1e-5 of the value in 1/20 of the time of value and gradient
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runner import compare, save
from torch import Tensor

from groundstate.norms import sphere
from groundstate.norms.sphere.estimators import estimate, sampled

STATUS = Path("/proc/self/status")


def neurons(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n + d))


def gram(w: Tensor, s: float, half_space: bool = False) -> tuple[Tensor, Tensor]:
    """Returns value and gradient by autograd through all cosines; a half-space by doubling the neurons."""
    w = w.detach().requires_grad_()
    u = w / w.norm(dim=1, keepdim=True)
    if half_space:
        u = torch.cat([u, -u])
    n = len(u)
    r2 = 2 - 2 * (u @ u.T) + torch.eye(n, dtype=w.dtype)
    f = -0.5 * r2.log() if s == 0 else r2.rsqrt() if s == 1 else r2.reciprocal() if s == 2 else r2.pow(-s / 2)
    value = f.triu(1).sum() * (2 / (n * (n - 1)))
    (grad,) = torch.autograd.grad(value, w)
    return value.detach(), grad


def blocked(w: Tensor, s: float, half_space: bool = False) -> tuple[Tensor, Tensor]:
    return sphere.energy_and_grad(w, s, half_space=half_space)


def error(a: Tensor, b: Tensor) -> float:
    """Relative distance of a from b."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def ratio(result: dict[str, Any], slow: str, fast: str) -> float:
    times = result["milliseconds"]
    return times[slow]["median"] / times[fast]["median"]


def speed(rounds: int) -> dict[str, Any]:
    """Times value and gradient and says how many digits float32 keeps."""
    results: dict[str, Any] = {}
    for n, d, exponents in ((512, 64, (1,)), (4096, 64, (0, 1, 2)), (4096, 512, (1,)), (16384, 512, (2,))):
        w = neurons(n, d)
        few = max(2, rounds // 3) if n > 4096 else rounds
        for s in exponents:
            calls: dict[str, Callable[[], object]] = {
                "gram": lambda w=w, s=s: gram(w, s),
                "blocked": lambda w=w, s=s: blocked(w, s),
                "half_space": lambda w=w, s=s: blocked(w, s, True),
                "value": lambda w=w, s=s: sphere.energy(w, s),
            }
            result = compare(calls, rounds=few, warmup=1)
            value, grad = blocked(w, s)
            case = {
                "gram_per_blocked": ratio(result, "gram", "blocked"),
                "half_per_full_space": ratio(result, "half_space", "blocked"),
            }
            if n <= 4096:
                known, slope = blocked(w.double(), s)
                case |= {"value_error": error(value, known), "gradient_error": error(grad, slope)}
            results[f"N={n} d={d} s={s}"] = case | result
    return results


def memory() -> dict[str, Any]:
    """Measures the peak of value and gradient, each in a process of its own."""
    results: dict[str, Any] = {}
    for n, d in ((4096, 64), (4096, 512), (16384, 64), (16384, 512)):
        peaks = {form: _peak(form, n, d) for form in ("gram", "blocked")}
        results[f"N={n} d={d}"] = {
            **{f"{form}_mb": peak for form, peak in peaks.items()},
            "gram_per_blocked": peaks["gram"] / peaks["blocked"],
        }
    return results


def _peak(form: str, n: int, d: int) -> float:
    command = [sys.executable, __file__, "--measure", form, str(n), str(d)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_here(form: str, n: int, d: int) -> float:
    """Returns the peak of memory in MB of one call above what this process held before."""
    torch.set_num_threads(1)
    call = gram if form == "gram" else blocked
    call(neurons(300, d), 2)  # what the first call of each kernel allocates for good
    w = neurons(n, d)
    before = _status("VmRSS")
    if STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    call(w, 2)
    return (_status("VmHWM") - before) / 1e3


def _status(key: str) -> float:
    """Resident memory of this process in kB; its peak where the system tells no more."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(next(x for x in STATUS.read_text().splitlines() if x.startswith(key)).split()[1])


def threads(rounds: int) -> dict[str, Any]:
    """Times one and two threads in turns."""
    results: dict[str, Any] = {}
    for n, d in ((4096, 64), (4096, 512)):
        w = neurons(n, d)
        taken: dict[int, list[float]] = {1: [], 2: []}
        made = {}
        for _ in range(rounds):
            for count, times in taken.items():
                torch.set_num_threads(count)
                start = time.perf_counter()
                made[count] = blocked(w, 2)
                times.append(1e3 * (time.perf_counter() - start))
        torch.set_num_threads(1)
        one, two = (statistics.median(taken[k]) for k in (1, 2))
        same = all(torch.equal(a, b) for a, b in zip(made[1], made[2]))
        results[f"N={n} d={d}"] = {"one_ms": one, "two_ms": two, "one_per_two": one / two, "same_bits": same}
    return results


def estimates(rounds: int) -> dict[str, Any]:
    """Times estimates against the exact energy, and their errors over several seeds."""
    n, d = 8192, 512
    w, draw = neurons(n, d), torch.Generator().manual_seed(0)
    results: dict[str, Any] = {}
    for s in (1, 2):
        exact = sphere.energy(w.double(), s)

        def with_gradient(s: int = s) -> None:
            estimate(w.detach().requires_grad_(), s, rows=32, generator=draw).value.backward()

        calls: dict[str, Callable[[], object]] = {
            "exact": lambda s=s: blocked(w, s),
            "exact_value": lambda s=s: sphere.energy(w, s),
            "estimate_256": lambda s=s: estimate(w, s, rows=256, generator=draw),
            "estimate_32": lambda s=s: estimate(w, s, rows=32, generator=draw),
            "estimate_32_gradient": with_gradient,
            "sampled_256": lambda s=s: sampled(w, s, generator=draw),
        }
        result = compare(calls, rounds=rounds, warmup=1)
        errors = {
            f"largest_error_{name}": max(error(call().value, exact) for _ in range(10))
            for name, call in (
                ("estimate_256", lambda s=s: estimate(w, s, rows=256, generator=draw)),
                ("estimate_32", lambda s=s: estimate(w, s, rows=32, generator=draw)),
                ("sampled_256", lambda s=s: sampled(w, s, generator=draw)),
            )
        }
        pairs = [("exact", name) for name in calls if name.startswith("estimate")] + [("exact_value", "estimate_32")]
        results[f"N={n} d={d} s={s}"] = {f"{a}_per_{b}": ratio(result, a, b) for a, b in pairs} | errors | result
    return results


def huge() -> dict[str, Any]:
    """Runs 100,000 neurons in a process of its own and shows its progress."""
    n, d = 100_000, 128
    command = [sys.executable, __file__, "--measure", "huge", str(n), str(d)]
    start = time.perf_counter()
    peak = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    return {f"N={n} d={d}": {"peak_mb": peak, "seconds": time.perf_counter() - start}}


def measure_huge(n: int, d: int) -> float:
    """Returns the peak of memory in MB above what was held before; progress goes to stderr, in steps of 5 percent."""
    w, shown = neurons(n, d), -1

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if (now := 20 * done // total) > shown:
            shown = now
            print(f"{5 * now} %", end=" ", file=sys.stderr, flush=True)

    before = _status("VmRSS")
    value, _ = sphere.energy_and_grad(w, 2, progress=progress)
    print(f"energy {float(value):.9f}, expected {(d - 2) / (2 * (d - 3)):.9f}", file=sys.stderr)
    return (_status("VmHWM") - before) / 1e3


def main() -> None:
    """Measures and saves, or prints one peak of memory."""
    parser = argparse.ArgumentParser(description="cost of the hyperspherical energy")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--huge", action="store_true")
    parser.add_argument("--cases", nargs="+", default=["speed", "memory", "threads", "estimates"])
    parser.add_argument("--measure", nargs=3, metavar=("FORM", "N", "D"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        form, n, d = options.measure[0], int(options.measure[1]), int(options.measure[2])
        print(measure_huge(n, d) if form == "huge" else measure_here(form, n, d))
        return
    torch.set_num_threads(1)
    rounds = options.rounds
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "speed": lambda: speed(rounds),
        "memory": memory,
        "threads": lambda: threads(rounds),
        "estimates": lambda: estimates(rounds),
    }
    results = {name: cases[name]() for name in options.cases}
    if options.huge:
        results["huge"] = huge()
    save("sphere", results)


if __name__ == "__main__":
    main()
