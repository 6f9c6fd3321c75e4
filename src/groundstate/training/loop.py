"""The training loop: the only one. Everything random is a pure function of the seed, so any step resumes exactly.

One step: loss (with the loss terms of the energy) over the micro-batches, backward, energy gradients, clipping, the
optimizer's step; prox and observation follow in the optimizer's hooks.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from groundstate.training.recorder import Recorder, lock, read_metrics
from torch import Tensor, nn
from torch.nn import functional

from groundstate.energies.registry import parse
from groundstate.errors import DataError, Interrupted, NonFiniteError, UsageError
from groundstate.regularizer import Regularizer
from groundstate.training import checkpoint, data, evaluation, models
from groundstate.training.config import TrainConfig
from groundstate.training.signals import StopRequest

Progress = Callable[[dict[str, Any]], None]
MAX_BAD_STEPS = 10
_PROGRESS_STEPS = 20


def train(config: TrainConfig, out: Path, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Trains one model and fills the run folder ``out``; returns its summary.

    Args:
        config: What to train.
        out: The run folder: ``run.json``, ``metrics.jsonl``, ``checkpoints/``, ``summary.json``.
        resume: Continue the run of ``out`` from its newest valid checkpoint (or from the start, if it has none).
        progress: Called with ``{"kind": "step" | "epoch" | "note", ...}``.

    Raises:
        UsageError: ``out`` holds a run already and ``resume`` is False, or it is a run of another configuration.
        DataError: the data or every checkpoint is damaged.
        NonFiniteError: the loss or an energy is not finite and the policy is to stop, or it did not recover.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
        ResourceError: no space for a checkpoint.
    """
    out = Path(out)
    _check_folder(config, out, resume)
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out), StopRequest() as stop:
        if resume and (out / "summary.json").exists():
            summary = json.loads((out / "summary.json").read_text())
            if summary.get("status") == "done":
                return summary
        run = _Run(config, out, progress or (lambda event: None), stop)
        run.restore() if resume else run.begin()
        run.to_the_end()
        return run.finish()


def _check_folder(config: TrainConfig, out: Path, resume: bool) -> None:
    described = out / "run.json"
    if not resume:
        if described.exists():
            raise UsageError(f"{out} holds a run already: resume it with --resume {out}, or choose another folder")
        return
    if not described.exists():
        raise UsageError(f"{out} is not a run folder (no run.json): start it without --resume")
    try:
        before = json.loads(described.read_text())
        changed = TrainConfig.from_dict(before["config"]).differences(config)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{described} cannot be read ({error}): restore it, or start a new run") from None
    if changed:
        raise UsageError(f"{out} is a run of another configuration ({'; '.join(changed)}): start a new run for it")
    if before.get("threads") != config.threads:
        warnings.warn(
            f"the run used {before.get('threads')} threads, now {config.threads}: results may differ in the last bits",
            stacklevel=3,
        )


def keyed(*parts: object) -> int:
    """Returns a seed that is a pure function of ``parts``, e.g. ``keyed(seed, "order", epoch)``."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def batch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Returns the order of the samples in an epoch: a permutation that needs no state to be resumed."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(keyed(seed, "order", epoch)))


class _Run:
    """The moving parts of one run."""

    def __init__(self, config: TrainConfig, out: Path, progress: Progress, stop: StopRequest) -> None:
        self.config, self.out, self.progress, self.stop = config, out, progress, stop
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
        self.regularizer = self._regularizer(config.energy, config.coupling)
        self.monitor = self._regularizer(config.monitor, "monitor")
        self.steps_per_epoch = math.ceil(len(self.data.train_x) / config.batch_size)
        self.total = config.epochs * self.steps_per_epoch
        self.step = 0
        self.lr_scale = 1.0
        self.bad_in_a_row = 0
        self.backoffs = 0
        self.sums = {"loss": 0.0, "correct": 0.0, "seen": 0.0, "sum_squared_before": 0.0}
        self.seconds = 0.0
        self.durations: list[float] = []

    def _regularizer(self, spec: str, coupling: Any) -> Regularizer | None:
        energy = parse(spec)
        if not energy.terms:
            return None
        c = self.config
        every, select = (1, None) if coupling == "monitor" else (c.every, c.select)
        made = Regularizer(self.model, energy, coupling=coupling, every=every, select=select, seed=c.seed)
        return made.attach(self.optimizer)

    # ------------------------------------------------------------------ start and end

    def begin(self) -> None:
        """Starts a fresh run: describes it and records the point before training."""
        torch.manual_seed(keyed(self.config.seed, "global"))
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
        self._record_start()

    def _record_start(self) -> None:
        self.recorder.append({"kind": "spectra", "step": 0, "spectra": evaluation.spectra(self.model)})
        self._record_epoch(0, None, None)

    def to_the_end(self) -> None:
        """Runs every epoch that is left."""
        began = time.perf_counter()
        self.model.train()
        while self.step < self.total:
            self._epoch(self.step // self.steps_per_epoch)
            epoch = self.step // self.steps_per_epoch
            last = self.step == self.total
            if last and self.config.final_prox is not None and self.regularizer is not None:
                self.regularizer.apply_prox(self.config.final_prox)
            now = time.perf_counter()
            self.seconds, began = self.seconds + now - began, now
            seen = max(self.sums["seen"], 1.0)
            self._record_epoch(epoch, self.sums["loss"] / seen, self.sums["correct"] / seen)
            self._reset_sums()
            if last or epoch % self.config.checkpoint_every == 0 or self.stop.at_epoch_end:
                self.save()

    def finish(self) -> dict[str, Any]:
        """Touches the test split, once, and writes the summary."""
        x, y = self.data.test_x, self.data.test_y
        test_accuracy, test_loss = evaluation.accuracy_and_loss(self.model, x, y)
        values = evaluation.spectra(self.model)
        records = read_metrics(self.out / "metrics.jsonl")
        epoch = [r for r in records if r["kind"] == "epoch"][-1]
        summary = {
            "schema": 1,
            "status": "done",
            "epochs": self.config.epochs,
            "steps": self.step,
            "test_accuracy": test_accuracy,
            "test_loss": test_loss,
            **{k: epoch[k] for k in ("val_accuracy", "val_loss", "train_loss", "train_accuracy", "energies", "path")},
            "spectra_initial": next((r["spectra"] for r in records if r["kind"] == "spectra"), {}),
            "spectra": values,
            "ranks": evaluation.ranks(values),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "compression": evaluation.compression(self.model, x, y),
            "step_ms": {"median": 1e3 * statistics.median(self.durations) if self.durations else None},
            "seconds": self.seconds,
        }
        self.recorder.finish(summary)
        return summary

    # ------------------------------------------------------------------ one epoch, one step

    def _epoch(self, epoch: int) -> None:
        order = batch_order(len(self.data.train_x), self.config.seed, epoch)
        size = self.config.batch_size
        end = (epoch + 1) * self.steps_per_epoch
        while self.step < end:
            at = (self.step % self.steps_per_epoch) * size
            began = time.perf_counter()
            finished = self._step(order[at : at + size])
            self.durations.append(time.perf_counter() - began)
            if not finished:  # gone back to a checkpoint, perhaps in an earlier epoch
                return
            every = self.config.checkpoint_steps
            if every is not None and self.step % every == 0 and self.step < end:
                self.save()
            if self.step % _PROGRESS_STEPS == 0:
                self.progress({"kind": "step", "step": self.step, "total": self.total})
            if self.stop.requested:
                self._interrupt(end)

    def _step(self, index: Tensor) -> bool:
        """Makes one optimizer step; returns False where the policy went back to a checkpoint."""
        config, optimizer, sums = self.config, self.optimizer, self.sums
        for group in optimizer.param_groups:
            group["lr"] = self._lr()
        optimizer.zero_grad()
        parts = [index] if config.accumulate == 1 else index.chunk(config.accumulate)
        loss_sum, correct = 0.0, 0.0
        try:
            for part in parts:
                x, y = self.data.train_x.index_select(0, part), self.data.train_y.index_select(0, part)
                logits = self.model(x)
                loss = functional.cross_entropy(logits, y)
                loss_sum += loss.item() * len(part)
                correct += int((logits.detach().argmax(1) == y).sum())
                if not math.isfinite(loss_sum):
                    raise NonFiniteError(f"the data loss is {loss_sum} at step {self.step}: lower the learning rate")
                if self.regularizer is not None:
                    loss = loss + self.regularizer.loss(x, y)
                (loss if len(parts) == 1 else loss * (len(part) / len(index))).backward()
            if self.regularizer is not None:
                self.regularizer.add_gradients()
            if config.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
            optimizer.step()
        except NonFiniteError as error:
            return self._not_finite(error, index)
        sums["loss"] += loss_sum
        sums["correct"] += correct
        sums["seen"] += len(index)
        self.bad_in_a_row = 0
        self.step += 1
        return True

    def _lr(self) -> float:
        c, u = self.config, self.step / self.total
        shape = {"constant": 1.0, "linear": 1.0 - u, "cosine": 0.5 * (1.0 + math.cos(math.pi * u))}[c.schedule]
        return c.lr * self.lr_scale * shape

    def _not_finite(self, error: NonFiniteError, index: Tensor) -> bool:
        self.optimizer.zero_grad()
        policy = self.config.nonfinite
        self.recorder.append({"kind": "nonfinite", "step": self.step, "error": str(error), "policy": policy})
        self.progress({"kind": "note", "text": f"step {self.step}: {error} ({policy})"})
        if policy == "skip" and self.bad_in_a_row < MAX_BAD_STEPS:
            self.bad_in_a_row += 1
            self.step += 1
            return True
        if policy == "backoff" and self.backoffs < MAX_BAD_STEPS:
            scale, backoffs = self.lr_scale / 2, self.backoffs + 1
            self.restore()
            self.lr_scale, self.backoffs = scale, backoffs
            return False
        state = self._state() | {"error": str(error), "batch": index.tolist()}
        checkpoint.save(self.out / "nonfinite", self.step, self._tensors(), state, keep=2)
        self.recorder.finish({"schema": 1, "status": "failed", "error": str(error), "steps": self.step})
        raise NonFiniteError(f"{error}; the weights before the step and its batch are in {self.out / 'nonfinite'}")

    def _interrupt(self, end: int) -> None:
        if self.step < end:  # at the end of an epoch the loop above records it first
            self.save()
            raise Interrupted(
                f"interrupted at step {self.step} of {self.total}, saved: continue with --resume {self.out}"
            )
        if self.step < self.total:
            self.stop.at_epoch_end = True

    # ------------------------------------------------------------------ records

    def _record_epoch(self, epoch: int, train_loss: float | None, train_accuracy: float | None) -> None:
        val_accuracy, val_loss = evaluation.accuracy_and_loss(self.model, self.data.val_x, self.data.val_y)
        values = self.monitor.values() if self.monitor is not None else {}
        path_keys = _path_keys()
        path = {k: v for k, v in values.items() if k in path_keys}
        record = {
            "kind": "epoch",
            "epoch": epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "energies": {k: v for k, v in values.items() if k not in path_keys},
            "path": path,
            "path_epoch_sum_squared": path.get("sum_squared", 0.0) - self.sums["sum_squared_before"],
            "seconds": self.seconds,
        }
        self.sums["sum_squared_before"] = path.get("sum_squared", 0.0)
        self.recorder.append(record)
        self.progress(record | {"total": self.total})

    def _reset_sums(self) -> None:
        self.sums |= {"loss": 0.0, "correct": 0.0, "seen": 0.0}

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Saves everything that the next step depends on."""
        checkpoint.save(self.out / "checkpoints", self.step, self._tensors(), self._state(), keep=self.config.keep)
        if self.stop.at_epoch_end:
            raise Interrupted(
                f"interrupted at step {self.step} of {self.total}, saved: continue with --resume {self.out}"
            )

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        found = {"weights": dict(self.model.state_dict()), "random": {"torch": torch.get_rng_state()}}
        found["optimizer"] = {
            f"{i}/{k}": v
            for i, entry in self.optimizer.state_dict()["state"].items()
            for k, v in entry.items()
            if isinstance(v, Tensor)
        }
        for name, reg in (("regularizer", self.regularizer), ("monitor", self.monitor)):
            if reg is not None:
                found[name] = {k: v for k, v in reg.state_dict().items() if isinstance(v, Tensor)}
        return {k: v for k, v in found.items() if v}

    def _state(self) -> dict[str, Any]:
        plain = {
            name: {k: v for k, v in reg.state_dict().items() if not isinstance(v, Tensor)}
            for name, reg in (("regularizer", self.regularizer), ("monitor", self.monitor))
            if reg is not None
        }
        return plain | {
            "config": self.config.to_dict(),
            "threads": self.config.threads,
            "step": self.step,
            "lr_scale": self.lr_scale,
            "bad_in_a_row": self.bad_in_a_row,
            "backoffs": self.backoffs,
            "sums": dict(self.sums),
            "seconds": self.seconds,
        }

    def restore(self) -> None:
        """Goes back to the newest valid checkpoint, or to the start where none was ever written."""
        found = checkpoint.load_latest(self.out / "checkpoints")
        if found is None:
            self.recorder.truncate_after(-1)
            self._restart()
            return
        for note in found.notes:
            warnings.warn(note, stacklevel=4)
            self.progress({"kind": "note", "text": note})
        if changed := TrainConfig.from_dict(found.state["config"]).differences(self.config):
            raise UsageError(f"{found.path} is of another configuration ({'; '.join(changed)})")
        self.recorder.truncate_after(found.step)
        self.model.load_state_dict(found.tensors["weights"])
        self._restore_optimizer(found.tensors.get("optimizer", {}))
        for name, reg in (("regularizer", self.regularizer), ("monitor", self.monitor)):
            if reg is not None:
                reg.load_state_dict({**found.state[name], **found.tensors.get(name, {})})
        torch.set_rng_state(found.tensors["random"]["torch"])
        self.step = int(found.state["step"])
        for name in ("lr_scale", "bad_in_a_row", "backoffs", "seconds"):
            setattr(self, name, found.state[name])
        self.sums = dict(found.state["sums"])

    def _restart(self) -> None:
        fresh = _Run(self.config, self.out, self.progress, self.stop)
        self.__dict__.update(fresh.__dict__)
        torch.manual_seed(keyed(self.config.seed, "global"))
        self._record_start()

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


def _path_keys() -> set[str]:
    from groundstate.energies.path_energy import PathEnergy

    energy = PathEnergy()
    return set(energy.summary(energy.init({"w": torch.zeros(1, 1)})))
