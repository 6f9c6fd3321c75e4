"""The training loop: the only one. Everything random is a pure function of the seed, so any step resumes exactly.

One step: data loss, and the loss terms of the energy, over the micro-batches; backward; energy gradients; clipping; the
optimizer's step. Prox and observation of the path follow in the optimizer's hooks.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from groundstate.energies.registry import parse
from groundstate.errors import DataError, Interrupted, NonFiniteError, UsageError
from groundstate.regularizer import Regularizer
from groundstate.training import checkpoint, data, evaluation, models
from groundstate.training.config import TrainConfig
from groundstate.training.order import batch_order, keyed
from groundstate.training.recorder import METRICS, RUN, SUMMARY, Recorder, lock, read_epochs
from groundstate.training.signals import StopRequest
from groundstate.training.snapshot import Counters, pack, unpack

Progress = Callable[[dict[str, Any]], None]
CHECKPOINTS, FAILED = "checkpoints", "nonfinite"
MAX_BAD_STEPS = 10
_PROGRESS_STEPS = 20


def train(config: TrainConfig, out: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Trains one model and fills the run folder ``out``; returns its summary.

    The global generator of torch and its number of threads are as before when it returns.

    Args:
        config: What to train.
        out: The run folder: ``run.json``, ``metrics.jsonl``, ``checkpoints/``, ``summary.json``.
        resume: Continue the run of ``out`` from its newest valid checkpoint (or from the start, if it has none).
        progress: Called with ``{"kind": "step" | "epoch" | "note", ...}``. Without it notes become warnings.

    Raises:
        UsageError: ``out`` holds a run already and ``resume`` is False, it is a run of another configuration, or it is
            in use.
        DataError: the data or every checkpoint is damaged.
        NonFiniteError: the loss or an energy is not finite and the policy is to stop, or it did not recover.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        ResourceError: no space for a checkpoint.
    """
    out = Path(out)
    notes = _check_folder(config, out, resume)
    threads = torch.get_num_threads()
    out.mkdir(parents=True, exist_ok=True)
    try:
        torch.set_num_threads(config.threads)
        with lock(out), StopRequest() as stop, torch.random.fork_rng(devices=[]):
            if resume and (done := _summary_of_done(out)) is not None:
                return done
            run = Run(config, out, stop, progress)
            for note in notes:
                run.note(note)
            found = checkpoint.load_latest(out / CHECKPOINTS) if resume else None
            if found is None:
                run.begin(again=resume)
            else:
                run.go_back(found)
            run.to_the_end()
            return run.finish()
    finally:
        torch.set_num_threads(threads)


def _check_folder(config: TrainConfig, out: Path, resume: bool) -> list[str]:
    """Refuses a folder that is not what it should be; returns what else there is to say."""
    described = out / RUN
    if not resume:
        if described.exists():
            raise UsageError(f"{out} holds a run already: resume it with --resume {out}, or choose another folder")
        return []
    if not described.exists():
        raise UsageError(f"{out} is not a run folder (no {RUN}): start it without --resume")
    try:
        before = json.loads(described.read_bytes())
        changed = TrainConfig.from_dict(before["config"]).differences(config)
        threads = before["threads"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{described} cannot be used ({error}): restore it, or start a new run") from None
    if changed:
        raise UsageError(f"{out} is a run of another configuration ({'; '.join(changed)}): start a new run for it")
    if threads != config.threads:
        return [f"the run used {threads} threads, now {config.threads}: results may differ in the last bits"]
    return []


def _summary_of_done(out: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads((out / SUMMARY).read_bytes())
        return summary if summary["status"] == "done" else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out / SUMMARY} cannot be used ({error}): remove it, and resume") from None


class Run:
    """The moving parts of one run; `train` is its front door.

    Args:
        config: What to train.
        out: The run folder; it exists and is locked.
        stop: Where a signal asks for an end.
        progress: See `train`.
    """

    def __init__(self, config: TrainConfig, out: Path, stop: StopRequest, progress: Progress | None = None) -> None:
        self.config, self.out, self.stop, self.progress = config, out, stop, progress
        self.recorder = Recorder(out)
        self.data = data.load(
            config.data,
            config.data_dir,
            val_size=config.val_size,
            train_size=config.train_size,
            label_noise=config.label_noise,
            seed=config.seed,
        )
        self.model = models.build(config.model, self.data.inputs, self.data.classes, config.seed)
        self.optimizer = _optimizer(config, self.model)
        self.regularizer = self._regularizer(config.energy, config.coupling, acting=True)
        self.monitor = self._regularizer(config.monitor, "monitor")
        in_loss = self.regularizer is not None and any(p.coupling == "loss" for p in self.regularizer.placed)
        self.in_loss = self.regularizer if in_loss else None
        both = {"regularizer": self.regularizer, "monitor": self.monitor}
        self.regularizers = {k: v for k, v in both.items() if v is not None}
        self.steps_per_epoch = math.ceil(len(self.data.train_x) / config.batch_size)
        self.total = config.epochs * self.steps_per_epoch
        self.at = Counters()
        self.durations: list[float] = []
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._outputs: list[tuple[Tensor, Tensor]] = []
        self._clock = time.perf_counter()

    def _regularizer(self, spec: str, coupling: Any, acting: bool = False) -> Regularizer | None:
        energy, config = parse(spec), self.config
        if not energy.terms:
            return None
        how: dict[str, Any] = {"every": config.every, "gap": config.gap, "select": config.select} if acting else {}
        made = Regularizer(self.model, energy, coupling=coupling, seed=config.seed, **how)
        return made.attach(self.optimizer)

    # ------------------------------------------------------------------ from start to end

    def begin(self, *, again: bool = False) -> None:
        """Describes the run, records the point before training, and saves it.

        Args:
            again: The run was described before, and was killed before its first checkpoint.
        """
        if again:
            self.recorder.truncate_after(-1)
        else:
            self.recorder.start(
                {
                    "schema": 1,
                    "config": self.config.to_dict(),
                    "threads": self.config.threads,
                    "model": models.resolve(self.config.model, self.data.inputs, self.data.classes),
                    "data_sha256": self.data.sha256,
                    "sizes": {k: len(getattr(self.data, f"{k}_x")) for k in ("train", "val", "test")},
                }
            )
        torch.manual_seed(keyed(self.config.seed, "global"))
        start = {"spectra": evaluation.spectra(self.model), "angles": evaluation.angles(self.model)}
        self.recorder.append({"kind": "spectra", "step": 0, **start})
        self._record_epoch(0)
        self.save()

    def to_the_end(self) -> None:
        """Makes every step that is left.

        Raises:
            Interrupted, NonFiniteError, ResourceError: see `train`.
        """
        self.model.train()
        while self.at.step < self.total:
            self.advance()

    def advance(self) -> None:
        """Makes one step, and what is due after it."""
        index = self._batch()
        began = time.perf_counter()
        try:
            self._step(index)
        except NonFiniteError as error:
            self._not_finite(error, index)
            return
        self.durations.append(time.perf_counter() - began)
        self._between_steps()

    def _between_steps(self) -> None:
        """Ends an epoch where it is due, saves where that is due, and ends the run where a signal asked for it."""
        config, at = self.config, self.at
        if at.step % _PROGRESS_STEPS == 0:
            self._tell({"kind": "step", "step": at.step, "total": self.total})
        ended = at.step % self.steps_per_epoch == 0
        if ended:
            self._end_epoch(at.step // self.steps_per_epoch)
        stopping = self.stop.requested and at.step < self.total
        due = ended and (at.step // self.steps_per_epoch % config.checkpoint_every == 0 or at.step == self.total)
        if due or stopping or (config.checkpoint_steps is not None and at.step % config.checkpoint_steps == 0):
            self.save()
        if stopping:
            raise Interrupted(
                f"interrupted at step {at.step} of {self.total}, saved: continue with --resume {self.out}"
            )

    def _end_epoch(self, epoch: int) -> None:
        if self.at.step == self.total and self.config.final_prox is not None and self.regularizer is not None:
            self.regularizer.apply_prox(self.config.final_prox)
        self._count()
        self._record_epoch(epoch)
        self.at.new_epoch()

    def finish(self) -> dict[str, Any]:
        """Touches the test split, once, and writes the summary."""
        records = read_epochs(self.out / METRICS, self.config.epochs)
        summary = {
            "schema": 1,
            "status": "done",
            "epochs": self.config.epochs,
            "steps": self.at.step,
            **evaluation.summary(self.model, self.data.test_x, self.data.test_y, records, self.durations),
            "kept": evaluation.kept(self.regularizer, self.at.step),
            "seconds": self.at.seconds,
        }
        self.recorder.finish(summary)
        return summary

    # ------------------------------------------------------------------ one step

    def _batch(self) -> Tensor:
        """Returns the indices of the samples of this step."""
        epoch, within = divmod(self.at.step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, batch_order(len(self.data.train_x), self.config.seed, epoch)
        size = self.config.batch_size
        return self._order[1][within * size : (within + 1) * size]

    def _step(self, index: Tensor) -> None:
        """Makes one optimizer step on the samples ``index``.

        Raises:
            NonFiniteError: names the data loss, or the energy and the weight; the weights are those before the step,
                unless it is the step itself that spoiled them.
        """
        config, optimizer, at, split = self.config, self.optimizer, self.at, self.data
        for group in optimizer.param_groups:
            group["lr"] = self._lr()
        optimizer.zero_grad()
        parts = [index] if config.accumulate == 1 else index.chunk(config.accumulate)
        loss_sum, outputs = 0.0, []
        for part in parts:
            x, y = split.train_x.index_select(0, part), split.train_y.index_select(0, part)
            logits = self.model(x)
            loss = functional.cross_entropy(logits, y)
            loss_sum += loss.item() * len(part)
            if not math.isfinite(loss_sum):
                raise NonFiniteError(f"the data loss is {loss_sum} at step {at.step}: lower the learning rate")
            if self.in_loss is not None:
                loss = loss + self.in_loss.loss(x, y)
            (loss if len(parts) == 1 else loss * (len(part) / len(index))).backward()
            outputs.append((logits.detach(), y))
        if self.regularizer is not None:
            self.regularizer.add_gradients()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        optimizer.step()
        if (at.step + 1) % self.steps_per_epoch == 0 and not self._finite_weights():
            raise NonFiniteError(f"the weights are not finite after step {at.step}: lower the learning rate")
        self._outputs += outputs
        at.loss += loss_sum
        at.seen += len(index)
        at.bad_in_a_row = 0
        at.step += 1

    def _lr(self) -> float:
        c, u = self.config, self.at.step / self.total
        shape = {"constant": 1.0, "linear": 1.0 - u, "cosine": 0.5 * (1.0 + math.cos(math.pi * u))}[c.schedule]
        return c.lr * self.at.lr_scale * shape

    # ------------------------------------------------------------------ what is not finite

    def _finite_weights(self) -> bool:
        return all(bool(torch.isfinite(p).all()) for p in self.model.parameters())

    def _not_finite(self, error: NonFiniteError, index: Tensor) -> None:
        """Skips the step, or goes back to the last checkpoint, or saves the state and the batch and ends the run."""
        policy, at = self.config.nonfinite, self.at
        self.optimizer.zero_grad()
        bad = {"kind": "nonfinite", "error": str(error), "policy": policy, "bad_step": at.step}
        self.note(f"step {at.step}: {error} ({policy})")
        if policy == "skip" and at.bad_in_a_row < MAX_BAD_STEPS and self._finite_weights():
            at.bad_in_a_row += 1
            at.step += 1
            self.recorder.append(bad | {"step": at.step})
            self._between_steps()
            return
        found = checkpoint.load_latest(self.out / CHECKPOINTS) if policy == "backoff" else None
        if found is not None and at.backoffs < MAX_BAD_STEPS:
            scale, backoffs = at.lr_scale / 2, at.backoffs + 1
            self.go_back(found)
            self.at.lr_scale, self.at.backoffs = scale, backoffs
            self.save()  # or a resumed run would take the same road again
            self.recorder.append(bad | {"step": self.at.step, "lr_scale": scale})
            return
        tensors, state = self._snapshot()
        state |= {"error": str(error), "batch": index.tolist()}
        checkpoint.save(self.out / FAILED, at.step, tensors, state)
        self.recorder.append(bad | {"step": at.step})
        self.recorder.finish({"schema": 1, "status": "failed", "error": str(error), "steps": at.step})
        raise NonFiniteError(f"{error} (weights and batch of that step: {self.out / FAILED})")

    # ------------------------------------------------------------------ records

    def note(self, text: str) -> None:
        """Says something to whoever watches."""
        if self.progress is None:
            warnings.warn(text, stacklevel=3)
        self._tell({"kind": "note", "text": text})

    def _tell(self, event: dict[str, Any]) -> None:
        if self.progress is not None:
            self.progress(event)

    def _count(self) -> None:
        """Counts what was classified right since the last count, and the time."""
        if self._outputs:
            logits, target = (torch.cat(parts) for parts in zip(*self._outputs, strict=True))
            self.at.correct += int((logits.argmax(1) == target).sum())
            self._outputs.clear()
        now = time.perf_counter()
        self.at.seconds, self._clock = self.at.seconds + now - self._clock, now

    def _record_epoch(self, epoch: int) -> None:
        at = self.at
        energies, path = evaluation.measured(self.regularizers.values(), self.data.val_x, self.data.val_y)
        val_accuracy, val_loss = evaluation.accuracy_and_loss(self.model, self.data.val_x, self.data.val_y)
        squared = path.get("sum_squared")
        record = {
            "kind": "epoch",
            "epoch": epoch,
            "step": at.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": at.loss / at.seen if at.seen else None,
            "train_accuracy": at.correct / at.seen if at.seen else None,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "energies": energies,
            "path": path,
            "path_epoch_sum_squared": None if squared is None else squared - at.sum_squared_before,
            "seconds": at.seconds,
        }
        at.sum_squared_before = squared or 0.0
        self.recorder.append(record)
        self._tell(record | {"total": self.total})

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Saves everything that the next step depends on."""
        tensors, state = self._snapshot()
        checkpoint.save(self.out / CHECKPOINTS, self.at.step, tensors, state, keep=self.config.keep)

    def _snapshot(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        self._count()
        tensors, state = pack(self.model, self.optimizer, self.regularizers, self.at)
        return tensors, state | {"config": self.config.to_dict(), "data_sha256": self.data.sha256}

    def go_back(self, found: checkpoint.Checkpoint) -> None:
        """Goes to the state of a checkpoint of this run; records beyond it are dropped."""
        for text in found.notes:
            self.note(text)
        try:
            changed = TrainConfig.from_dict(found.state["config"]).differences(self.config)
            same_data = found.state["data_sha256"] == self.data.sha256
        except (KeyError, TypeError) as error:
            raise DataError(f"{found.path} does not say what it is of ({error}): start a new run") from None
        if changed:
            raise UsageError(f"{found.path} is of another configuration ({'; '.join(changed)}): start a new run")
        if not same_data:
            raise DataError(f"{found.path} was trained on other data than these: restore them, or start a new run")
        self.recorder.truncate_after(found.step)
        read_epochs(self.out / METRICS, found.step // self.steps_per_epoch)
        # after the last step nothing is left to observe, and a final prox is no step of the path
        ended = found.step == self.total
        self.at = unpack(found, self.model, self.optimizer, {} if ended else self.regularizers)
        self._outputs.clear()
        self._clock = time.perf_counter()


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
