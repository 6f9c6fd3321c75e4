"""The loop against hand-written loops, its record, and what it does when something goes wrong."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groundstate.energies.base import Coupling, MatrixEnergy, Traits
from groundstate.energies.registry import parse, register, unregister
from groundstate.errors import DataError, NonFiniteError, ResourceError, UsageError
from groundstate.norms.spectral import singular_values
from groundstate.regularizer import Regularizer
from groundstate.training import checkpoint, data, loop, models
from groundstate.training.config import TrainConfig
from groundstate.training.loop import train
from groundstate.training.order import batch_order
from groundstate.training.recorder import lock, read_metrics

# 200 training samples in batches of 48: four full steps and a short one of 8 in every epoch
SMALL: dict[str, Any] = {"train_size": 200, "batch_size": 48, "epochs": 2, "seed": 7, "monitor": "none"}


def small(**more: Any) -> TrainConfig:
    return TrainConfig(**SMALL | more)


def weights(out: Path, step: int | None = None) -> dict[str, Tensor]:
    found = checkpoint.load_latest(out / "checkpoints")
    assert found is not None
    assert step is None or found.step == step
    return found.tensors["weights"]


def epochs(out: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "epoch"]


def by_hand(
    config: TrainConfig, reg: str = "none", in_loss: bool = False, steps: int | None = None
) -> tuple[nn.Module, list[list[float]]]:
    """A plain loop with SGD, ended after ``steps``; returns the model, and the loss and accuracy of every epoch."""
    d = data.load("digits", train_size=config.train_size, seed=config.seed)
    model = models.build(config.model, d.inputs, d.classes, config.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    energy = None
    if reg != "none":
        energy = Regularizer(model, parse(reg), coupling=cast(Coupling, "loss" if in_loss else config.coupling))
        energy.attach(optimizer)
    log, made = [], 0
    for epoch in range(config.epochs):
        loss_sum = hits = 0.0
        for index in batch_order(len(d.train_x), config.seed, epoch).split(config.batch_size):
            if made == steps:
                return model, log
            made += 1
            x, y = d.train_x[index], d.train_y[index]
            optimizer.zero_grad()
            logits = model(x)
            loss = functional.cross_entropy(logits, y)
            loss_sum, hits = loss_sum + loss.item() * len(y), hits + int((logits.argmax(1) == y).sum())
            if energy is not None and in_loss:
                loss = loss + energy.loss(x, y)
            loss.backward()
            if config.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
        log.append([loss_sum / len(d.train_x), hits / len(d.train_x)])
    return model, log


def farthest(model: nn.Module, found: dict[str, Tensor]) -> float:
    return max(float((p.detach() - found[n]).abs().max()) for n, p in model.named_parameters())


def test_without_an_energy_it_is_the_plain_loop_bit_by_bit(tmp_path: Path) -> None:
    config = small()
    train(config, tmp_path / "run")
    model, log = by_hand(config)
    assert farthest(model, weights(tmp_path / "run", 10)) == 0.0
    assert [[e["train_loss"], e["train_accuracy"]] for e in epochs(tmp_path / "run")[1:]] == log


@pytest.mark.parametrize("energy", ["1e-2*nuclear", "1e-3*graph + 1e-2*squared_frobenius"])
def test_grad_is_the_term_in_the_loss_also_when_clipped_and_accumulated(tmp_path: Path, energy: str) -> None:
    # a clip of 0.5 is active in most of these steps; 7 micro-batches of 7 samples, and of 2 in the short step
    config = small(clip=0.5, accumulate=7, energy=energy)
    train(config, tmp_path / "run")
    model, _ = by_hand(config, energy, in_loss=True)
    # float32: the sum over micro-batches rounds differently from the mean over the batch, about 1e-7 per step
    assert farthest(model, weights(tmp_path / "run", 10)) < 5e-6
    plain, _ = by_hand(small(clip=0.5))
    assert farthest(plain, weights(tmp_path / "run")) > 1e-3


def test_the_coupling_of_the_configuration_and_every_are_used(tmp_path: Path) -> None:
    config = small(energy="1e-2*nuclear", coupling="prox")
    train(config, tmp_path / "prox")
    model, _ = by_hand(config, "1e-2*nuclear")
    assert farthest(model, weights(tmp_path / "prox")) == 0.0
    train(small(energy="1e-2*nuclear", coupling="prox", every=3), tmp_path / "lazy")
    assert farthest(model, weights(tmp_path / "lazy")) > 1e-4


@pytest.mark.parametrize("energy", ["none", "1e-2*nuclear", "1e-3*path_energy"])
def test_monitoring_changes_no_bit(tmp_path: Path, energy: str) -> None:
    train(small(energy=energy), tmp_path / "off")
    train(small(energy=energy, monitor="nuclear + graph + path_energy"), tmp_path / "on")
    off, on = weights(tmp_path / "off"), weights(tmp_path / "on")
    assert all(torch.equal(off[n], on[n]) for n in off)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_learns(tmp_path: Path, optimizer: str) -> None:
    summary = train(TrainConfig(optimizer=optimizer, lr=0.01, epochs=3, monitor="none"), tmp_path / "run")
    assert summary["test_accuracy"] > 0.8  # chance is 0.1; a plain loop reaches about 0.88 in 27 steps


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.1, 0.1]), ("linear", [0.1 * 0.6, 0.1 * 0.1]), ("cosine", [0.05 * (1 + math.cos(0.4 * math.pi))])],
)
def test_schedules(tmp_path: Path, schedule: str, expected: list[float]) -> None:
    train(small(schedule=schedule), tmp_path / "run")
    # what is recorded is the rate of the last step of the epoch: step 4 of 10, step 9 of 10
    assert [e["lr"] for e in epochs(tmp_path / "run")[1:]][: len(expected)] == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------- the record


def test_the_record_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    events: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"monitor": "nuclear + graph + path_energy", "energy": "1e-3*schatten(p=0.5)"}
    summary = train(small(**settings), out, progress=events.append)
    assert summary == json.loads((out / "summary.json").read_text())
    run = json.loads((out / "run.json").read_text())
    assert (run["schema"], run["threads"], run["model"]) == (1, 1, "mlp:64-32-10")
    assert run["sizes"] == {"train": 200, "val": 360, "test": 360}
    assert TrainConfig.from_dict(run["config"]) == small(**settings)
    assert [e["kind"] for e in events] == ["epoch"] * 3
    recorded = epochs(out)
    assert [(e["epoch"], e["step"]) for e in recorded] == [(0, 0), (1, 5), (2, 10)]
    assert recorded[0]["train_loss"] is None
    assert recorded[0]["train_accuracy"] is None
    assert recorded[0]["path"]["straightness"] == "nan"
    last = recorded[-1]
    w = weights(out, 10)
    nuclear = sum(float(singular_values(w[n]).sum()) for n in ("0.weight", "2.weight"))
    assert last["energies"]["nuclear"] == pytest.approx(nuclear, rel=1e-5)  # float32 sums
    assert set(last["energies"]) == {"nuclear", "graph", "schatten(p=0.5)"}
    assert last["path"]["steps"] == 10
    assert last["path"]["sum_squared"] == pytest.approx(sum(e["path_epoch_sum_squared"] for e in recorded), rel=1e-12)
    assert last["path"]["path_energy"] == pytest.approx(0.5 * 10 * last["path"]["sum_squared"], rel=1e-12)
    assert summary["path"] == last["path"]
    assert summary["energies"] == last["energies"]


def test_the_summary_is_about_the_last_weights_on_the_test_split(tmp_path: Path) -> None:
    summary = train(small(), tmp_path / "run")
    d = data.load("digits", train_size=200, seed=7)
    model = models.build("auto", 64, 10, seed=1)
    model.load_state_dict(weights(tmp_path / "run", 10))
    hits = (model(d.test_x).argmax(1) == d.test_y).sum()
    assert summary["test_accuracy"] == int(hits) / 360
    assert summary["status"] == "done"
    assert summary["parameters"] == 65 * 32 + 33 * 10
    for name, values in summary["spectra"].items():
        s = singular_values(model.get_parameter(name).detach())
        assert values == s.tolist()
        assert summary["ranks"][name] == int((s > summary["rank_tolerance"] * s[0]).sum())
    first = models.build("auto", 64, 10, seed=7)
    assert summary["spectra_initial"]["0.weight"] == singular_values(first.get_parameter("0.weight").detach()).tolist()
    whole = summary["compression"][0]
    assert (whole["tolerance"], whole["ratio"], whole["test_accuracy"]) == (0.0, 1.0, summary["test_accuracy"])
    sizes = [row["parameters"] for row in summary["compression"]]
    assert sizes == sorted(sizes, reverse=True)


def test_a_final_prox_makes_ranks_exact(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"energy": "1e-2*nuclear", "monitor": "nuclear + path_energy"}
    train(small(**settings), tmp_path / "before")
    summary = train(small(**settings, final_prox=50.0), tmp_path / "after")
    before = weights(tmp_path / "before")["0.weight"]
    s = singular_values(weights(tmp_path / "after")["0.weight"])
    expected = (singular_values(before) - 50.0 * 1e-2).clamp(min=0)
    # a shrunk spectrum, rebuilt in float32: errors of a few units in the last place of sigma_1
    assert torch.allclose(s, expected, atol=1e-5 * float(expected[0]))
    assert summary["ranks"]["0.weight"] == int((expected > 0).sum()) < 32
    # the prox is no step of the path
    assert epochs(tmp_path / "after")[-1]["path"] == epochs(tmp_path / "before")[-1]["path"]
    (tmp_path / "after" / "summary.json").unlink()
    again = train(small(**settings, final_prox=50.0), tmp_path / "after", resume=True)
    same = ("ranks", "spectra", "path", "energies", "test_accuracy")
    assert all(again[k] == summary[k] for k in same)


def test_the_summary_counts_decompositions(tmp_path: Path) -> None:
    summary = train(small(energy="1e-2*nuclear + 1e-3*squared_frobenius", gap=0.05), tmp_path / "run")
    (kept,) = summary["kept"].values()
    assert list(summary["kept"]) == ["nuclear"]
    assert kept["exact"] == 2 * summary["steps"]
    assert kept["decompositions"] == sum(w["refreshes"] for w in kept["weights"].values()) < kept["exact"]
    assert list(kept["weights"]) == ["0.weight", "2.weight"]
    assert all(0 < w["lower"] <= w["upper"] for w in kept["weights"].values())
    assert train(small(), tmp_path / "plain")["kept"] == {}


def test_without_validation_its_figures_are_null(tmp_path: Path) -> None:
    summary = train(small(val_size=0), tmp_path / "run")
    assert summary["val_accuracy"] is None
    assert summary["val_loss"] is None


def test_the_callers_generator_and_threads_are_left_alone(tmp_path: Path) -> None:
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    train(small(threads=2), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert json.loads((tmp_path / "run" / "run.json").read_text())["threads"] == 2


def test_the_same_run_twice_is_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(small(monitor="graph + path_energy", label_noise=0.3), tmp_path / name)
    a, b = epochs(tmp_path / "a"), epochs(tmp_path / "b")
    assert [e | {"seconds": 0} for e in a] == [e | {"seconds": 0} for e in b]
    other, one = tmp_path / "b", weights(tmp_path / "a")
    assert all(torch.equal(v, one[k]) for k, v in weights(other).items())


# ---------------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"energy": "1e-3*nuclaer"}, "Did you mean 'nuclear'"),
        ({"energy": "-1e-3*nuclear"}, "negative"),
        ({"monitor": "nuclear@grad"}, "monitor only measures"),
        ({"optimizer": "adm"}, "Did you mean 'adam'"),
        ({"data": "mnits"}, "Did you mean 'mnist'"),
        ({"epochs": 0}, "epochs must be a whole number from 1, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number from 1, got 1.5"),
        ({"batch_size": True}, "batch_size must be a whole number from 1, got True"),
        ({"checkpoint_steps": 0.5}, "checkpoint_steps must be a whole number"),
        ({"lr": math.nan}, "lr must be finite and not negative, got nan"),
        ({"lr": "fast"}, "lr must be finite and not negative, got 'fast'"),
        ({"clip": 0}, "clip must be finite and positive, got 0"),
        ({"keep": 1}, "keep must be at least 2"),
        ({"seed": -1}, "seed must be a whole number from 0, got -1"),
        ({"val_size": -1}, "val_size must be a whole number from 0"),
        ({"label_noise": 1.5}, "label_noise is a share"),
        ({"model": None}, "model must be text, got None"),
        ({"accumulate": 9, "batch_size": 8}, "must not exceed"),
    ],
)
def test_a_bad_configuration_is_refused_in_one_line(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as error:
        TrainConfig(**bad)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_survives_json_and_names_its_differences() -> None:
    config = TrainConfig(energy="1e-3*nuclear", clip=1.0, select="*.weight")
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.digest == config.digest != TrainConfig().digest
    other = TrainConfig(energy="1e-4*nuclear", clip=1.0, select="*.weight", threads=2, keep=5, data_dir="elsewhere")
    assert config.differences(other) == ["energy: '1e-3*nuclear' -> '1e-4*nuclear'"]
    with pytest.raises(UsageError, match=r"unknown option 'momentun'\. Did you mean 'momentum'"):
        TrainConfig.from_dict({"momentun": 0.9})


# ---------------------------------------------------------------------- folders


def test_folders_are_not_mixed_up(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="is not a run folder"):
        train(small(), out, resume=True)
    assert not out.exists()
    summary = train(small(), out)
    with pytest.raises(UsageError, match="holds a run already"):
        train(small(), out)
    with pytest.raises(UsageError, match=r"another configuration \(energy: 'none' -> '1e-3\*nuclear'; lr: 0.1 -> 0.2"):
        train(small(lr=0.2, energy="1e-3*nuclear"), out, resume=True)
    assert train(small(), out, resume=True) == summary
    with lock(out), pytest.raises(UsageError, match="in use by process"):
        train(small(), out, resume=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"config": 3}', '{"config": {"lr": "x"}, "threads": 1}'])
def test_a_damaged_run_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"run\.json cannot be used"):
        train(small(), tmp_path, resume=True)


def test_a_full_disk_ends_the_run_with_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="has 1000 bytes free") as error:
        train(small(), tmp_path / "run")
    assert error.value.exit_code == 5
    monkeypatch.undo()
    assert train(small(), tmp_path / "run", resume=True)["status"] == "done"


# ---------------------------------------------------------------------- what is not finite


@dataclass(frozen=True, repr=False)
class Broken(MatrixEnergy):
    """Finite, with a gradient that is not."""

    name: ClassVar[str] = "broken"
    traits: ClassVar[Traits] = Traits("0", "none", "none", convex=True, degree=None)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def value(self, w: Tensor) -> Tensor:
        return w.sum((-2, -1)) * 0

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.value(w), torch.full_like(w, math.nan)


def spoil(patch: pytest.MonkeyPatch, calls: range) -> None:
    """Makes the data loss NaN in these calls."""
    real, made = functional.cross_entropy, [0]

    def loss(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
        if options:  # an evaluation
            return real(logits, y, **options)
        made[0] += 1
        return real(logits, y) * (math.nan if made[0] - 1 in calls else 1.0)

    patch.setattr(loop.functional, "cross_entropy", loss)


def test_stop_saves_the_weights_before_the_step_and_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    spoil(monkeypatch, range(7, 8))
    events: list[dict[str, Any]] = []
    with pytest.raises(NonFiniteError, match="the data loss is nan at step 7") as error:
        train(small(), out, progress=events.append)
    assert error.value.exit_code == 4
    saved = checkpoint.load_latest(out / "nonfinite")
    assert saved is not None
    assert saved.step == 7
    assert saved.state["batch"] == batch_order(200, 7, 1)[96:144].tolist()
    monkeypatch.undo()
    assert farthest(by_hand(small(), steps=7)[0], saved.tensors["weights"]) == 0.0
    assert json.loads((out / "summary.json").read_text())["status"] == "failed"
    assert next(e["text"] for e in events if e["kind"] == "note").startswith("step 7: the data loss is nan")
    assert train(small(), out, resume=True)["status"] == "done"


def test_the_energy_and_the_weight_are_named(tmp_path: Path) -> None:
    register(Broken)
    try:
        with pytest.warns(UserWarning, match="broken at"), pytest.raises(NonFiniteError, match=r"broken at 0\.weight"):
            train(small(energy="1e-3*broken"), tmp_path / "run")
    finally:
        unregister(Broken)


def test_weights_that_the_last_step_spoiled_are_seen(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 200, "lr": 1e38, "momentum": 0.0, "weight_decay": 1e38}
    for policy in ("stop", "skip", "backoff"):
        # going back ten times leaves a rate that is still far too large
        with pytest.raises(NonFiniteError, match="not finite after step 0"):
            train(small(**settings, nonfinite=policy), tmp_path / policy, progress=lambda event: None)


def test_skip_leaves_steps_out_and_gives_up_after_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(nonfinite="skip", monitor="path_energy", epochs=4)
    with monkeypatch.context() as patch:
        spoil(patch, range(3, 6))
        with pytest.warns(UserWarning, match="the data loss is nan"):
            assert train(config, tmp_path / "some")["steps"] == 20
    bad = [r for r in read_metrics(tmp_path / "some" / "metrics.jsonl") if r["kind"] == "nonfinite"]
    assert [r["bad_step"] for r in bad] == [3, 4, 5]
    recorded = epochs(tmp_path / "some")
    assert [e["step"] for e in recorded] == [0, 5, 10, 15, 20]
    assert recorded[-1]["path"]["steps"] == 17
    with monkeypatch.context() as patch:
        spoil(patch, range(3, 30))
        with pytest.raises(NonFiniteError, match="at step 13"):
            train(config, tmp_path / "all", progress=lambda event: None)


def test_backoff_goes_back_and_halves_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    config = small(nonfinite="backoff", epochs=3, monitor="path_energy")
    spoil(monkeypatch, range(8, 9))
    train(config, out, progress=lambda event: None)
    recorded = epochs(out)
    assert [e["epoch"] for e in recorded] == [0, 1, 2, 3]
    assert [e["lr"] for e in recorded[1:]] == [0.1, 0.05, 0.05]
    assert recorded[-1]["path"]["steps"] == 15  # the steps that were given up are not on the path
    bad = [r for r in read_metrics(out / "metrics.jsonl") if r["kind"] == "nonfinite"]
    assert [(r["bad_step"], r["step"], r["lr_scale"]) for r in bad] == [(8, 5, 0.5)]


def test_a_rate_that_is_far_too_large_is_backed_off_from_the_start(tmp_path: Path) -> None:
    config = small(nonfinite="backoff", lr=1e25, momentum=0.0)
    with pytest.raises(NonFiniteError):
        train(config, tmp_path / "run", progress=lambda event: None)
    recorded = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(r["kind"] == "nonfinite" for r in recorded) == loop.MAX_BAD_STEPS + 1
