"""Blocks in parallel with one thread inside each, in an order that does not depend on the number of threads.

Idea: a game is a pair of blocks, whose rows it writes to. Each player plays his games in the order of the list, so each
row receives its contributions in a fixed order; a thread takes the next game of the list and waits until both players
have finished their earlier ones. The list is that of a round-robin tournament, where nobody plays twice in a round: so
next to no thread ever waits. A game waits only for games further up the list, so they cannot wait for one another.

The many small kernels of a block are no work for several threads each: these would wait for one another most of the
time. The number of threads that torch uses inside a kernel is set per thread, so the workers of the pool have one, for
good, and the setting of the caller is not touched.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier, Condition, Lock
from typing import Any

import torch

Progress = Callable[[int, int], object]
Game = tuple[Collection[Hashable], tuple[Any, ...]]  # the players, the arguments of the task

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


def serial(device: torch.device) -> bool:
    """Returns whether `run` calls one task after another in the calling thread."""
    return torch.get_num_threads() == 1 or device.type != "cpu"


def run(
    task: Callable[..., object], games: Sequence[Game], device: torch.device, progress: Progress | None = None
) -> None:
    """Calls the task with the arguments of each game, on as many threads as torch may use here.

    ``progress(done, all)`` is called in this thread.

    Raises:
        Whatever a task or the progress raises; games that had not begun by then are dropped.
    """
    threads = torch.get_num_threads()
    if serial(device):
        for k, (_, arguments) in enumerate(games, 1):
            task(*arguments)
            if progress is not None:
                progress(k, len(games))
        return
    play = _Play(task, games)
    pool = _workers(threads)
    futures = [pool.submit(play.work) for _ in range(min(threads, len(games)))]
    try:
        if progress is not None:
            play.watch(progress)
        for future in futures:
            future.result()
    finally:
        play.stop()
        wait(futures)


class _Play:
    """The state of one list of games that several threads play."""

    def __init__(self, task: Callable[..., object], games: Sequence[Game]) -> None:
        self._task, self._games = task, games
        self._inference = torch.is_inference_mode_enabled()  # of the caller; the workers write to its tensors
        self._changed = Condition()
        self._begun = self._done = 0
        self._stopped = False
        self._entered: Counter[Hashable] = Counter()  # games of a player that a thread has taken
        self._left: Counter[Hashable] = Counter()  # and those it has finished

    def work(self) -> None:
        """Plays until no game is left."""
        try:
            with torch.inference_mode(self._inference):
                while (game := self._next()) is not None:
                    self._task(*game[1])
                    with self._changed:
                        self._left.update(game[0])
                        self._done += 1
                        self._changed.notify_all()
        except BaseException:
            self.stop()
            raise

    def _next(self) -> Game | None:
        with self._changed:
            if self._stopped or self._begun == len(self._games):
                return None
            game = self._games[self._begun]
            self._begun += 1
            earlier = [(player, self._entered[player]) for player in game[0]]
            self._entered.update(game[0])
            self._changed.wait_for(lambda: self._stopped or all(self._left[p] == count for p, count in earlier))
            return None if self._stopped else game

    def watch(self, progress: Progress) -> None:
        """Calls progress, in this thread, whenever games were finished, until all are or one failed."""
        shown, total = 0, len(self._games)
        while shown < total:
            with self._changed:
                while not self._stopped and self._done == shown:
                    self._changed.wait()
                if self._stopped:
                    return
                shown = self._done
            progress(shown, total)

    def stop(self) -> None:
        """Lets no further game begin."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


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
