"""Blocks in parallel with one thread inside each, in an order that does not depend on the number of threads.

Idea: a round-robin tournament deals out the pairs of blocks. In one round no block plays twice, so its games write to
different rows and may run at once; rounds follow one another, so each row receives its contributions in a fixed order.

The many small kernels of a block are no work for several threads each: they would wait for one another most of the
time. Threads that torch itself would use inside a kernel are set per thread, so the workers of the pool have one, for
good, and the setting of the caller is not touched.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier, Lock

import torch

_lock = Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None


def rounds(players: int) -> list[list[tuple[int, int]]]:
    """Returns all pairs i <= j of players in rounds in which nobody plays twice (first everyone against himself).

    >>> rounds(3)
    [[(0, 0), (1, 1), (2, 2)], [(1, 2)], [(0, 2)], [(0, 1)]]
    """
    made = [[(i, i) for i in range(players)]]
    wheel = (
        players - 1 + players % 2
    )  # one player stays, the others turn; with an odd number the one who stays is nobody
    for turn in range(wheel if players > 1 else 0):
        games = [((turn + k) % wheel, (turn - k) % wheel) for k in range(1, (wheel + 1) // 2)]
        if players % 2 == 0:
            games.append((turn, players - 1))
        made.append([(min(g), max(g)) for g in games])
    return made


def run(task: Callable[..., object], arguments: Sequence[tuple], device: torch.device) -> None:
    """Calls the task with each of the arguments, on as many threads as torch may use here.

    Raises:
        Whatever a task raises; the tasks that had not begun by then are dropped.
    """
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        for each in arguments:
            task(*each)
        return
    todo = deque(arguments)
    inference = torch.is_inference_mode_enabled()  # of this thread; the workers must write to its tensors

    def work() -> None:
        try:
            with torch.inference_mode(inference):
                while (each := _next(todo)) is not None:
                    task(*each)
        finally:
            todo.clear()

    pool = _workers(threads)
    futures = [pool.submit(work) for _ in range(min(threads, len(todo)))]
    try:
        for future in futures:
            future.result()
    finally:
        todo.clear()
        wait(futures)


def _next(todo: deque[tuple]) -> tuple | None:
    try:
        return todo.popleft()
    except IndexError:  # another thread was faster
        return None


def _workers(threads: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool[0] < threads:
            pool = ThreadPoolExecutor(threads, "groundstate-sphere", torch.set_num_threads, (1,))
            together = Barrier(threads)
            for started in [pool.submit(together.wait) for _ in range(threads)]:
                started.result()
            # torch also notes the last setting for threads that start later: they should get the caller's.
            torch.set_num_threads(threads)
            _pool = threads, pool
        return _pool[1]


def _forget_pool() -> None:
    global _pool, _lock
    _pool, _lock = None, Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
