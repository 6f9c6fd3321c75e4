"""Energies of the function in the settings that real training brings: modes, precision, wrappers, misuse."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from groundstate import Regularizer
from groundstate.energies.dirichlet import Dirichlet
from groundstate.energies.jacobian import JacobianEnergy, JacobianFrobenius
from groundstate.energies.jacobian_nuclear import JacobianNuclear
from groundstate.errors import NonFiniteError, UsageError
from groundstate.jacobian.function import function
from groundstate.jacobian.plan import plan_for
from jacobian_helpers import ALL, EXACT, PROBED, Skip, filled, gen, mixed, randn, same, value_and_gradient

# ---------------------------------------------------------------------- modes and randomness


def with_state() -> nn.Sequential:
    first = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    model = filled(first, 2)
    model[1].running_mean.copy_(randn(8, seed=3))
    return model.train()


@pytest.mark.parametrize("energy", ALL, ids=repr)
def test_training_mode_counts_as_evaluation_and_comes_back(energy: JacobianEnergy) -> None:
    model, x = with_state(), randn(7, 5, seed=4)
    model[3].eval()  # a mixture of modes
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    before = torch.get_rng_state()
    same(energy, model, copy.deepcopy(model).eval(), x, rel=1e-12)
    energy.estimate(model, x, probe=gen())
    assert torch.equal(before, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Broken(nn.Module):
    """Draws, writes into a buffer, and raises."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        self.count = self.count + 1
        self.get_buffer("count").add_(1)
        raise RuntimeError("no luck")


def test_an_exception_in_the_forward_pass_restores_everything() -> None:
    model, x = Broken().train(), randn(4, 5)
    buffer, before = model.count, torch.get_rng_state()
    for energy in ALL:
        with pytest.raises(RuntimeError, match="no luck"):
            energy.value(model, x, probe=gen())
    assert model.training
    assert model.body.training
    assert model.count is buffer
    assert float(buffer) == 0
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x.mean(0).sum()


def random_forward(x: Tensor) -> Tensor:
    return x * torch.rand_like(x)


@pytest.mark.parametrize("energy", ALL, ids=repr)
def test_samples_that_influence_one_another_are_refused(energy: JacobianEnergy) -> None:
    without = filled(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)))
    coupled, x = filled(Coupled()), randn(6, 5)
    assert float(energy.value(coupled, x[:1], probe=gen()).detach()) > 0  # one sample alone is no matter
    for f in (without, coupled, random_forward):
        with pytest.raises(UsageError, match="depends on the other samples"):
            energy.value(f, x, probe=gen())


class SoftmaxOverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(0)


class SlightlyCoupled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * x.mean(0)  # about one unit of rounding of bfloat16


class Casting(nn.Module):
    """Runs in one precision only, whatever its weights are cast to."""

    def __init__(self, dtype: torch.dtype, coupled: bool) -> None:
        super().__init__()
        self.body, self.dtype, self.coupled = nn.Linear(5, 3), dtype, coupled

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.to(self.dtype))
        return x.softmax(0) if self.coupled else x


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("coupling", [SoftmaxOverBatch, SlightlyCoupled, nn.BatchNorm1d], ids=lambda c: c.__name__)
def test_coupled_samples_in_half_precision_are_refused(dtype: torch.dtype, coupling: Any) -> None:
    layer = coupling(4, track_running_stats=False) if coupling is nn.BatchNorm1d else coupling()
    net, x = filled(nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 3)), 0, dtype), randn(6, 5)
    before = copy.deepcopy(net.state_dict())
    for energy in (PROBED, JacobianFrobenius(samples=None)):
        with pytest.raises(UsageError, match="depends on the other samples"):
            energy.value(net, x, probe=gen())
    after = net.state_dict()
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())
    assert all(isinstance(p, nn.Parameter) for m in net.modules() for p in m._parameters.values())


@pytest.mark.parametrize("dtype", HALF)
def test_what_runs_in_half_precision_only_is_examined_in_it(dtype: torch.dtype) -> None:
    x = randn(6, 5)
    with pytest.raises(UsageError, match="depends on the other samples"):
        PROBED.value(filled(Casting(dtype, True), 0, dtype), x, probe=gen())
    with pytest.raises(UsageError, match="depends on the other samples"):
        PROBED.value(lambda points: points.softmax(0), x.to(dtype), probe=gen())
    free = filled(Casting(dtype, False), 0, dtype)
    squared = float(free.body.weight.detach().double().square().sum())
    assert float(EXACT.value(free, x, probe=gen()).detach()) == pytest.approx(squared, rel=1e-6)  # float32 sum


@pytest.mark.parametrize("dtype", HALF)
def test_free_samples_in_half_precision_are_no_matter(dtype: torch.dtype) -> None:
    deep = nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(9, 9), nn.LayerNorm(9), nn.GELU())))
    conv = nn.Sequential(nn.Unflatten(1, (1, 9)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten())
    chain = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
    for net in (deep, conv, chain):
        net, x = filled(net, 0, dtype), randn(6, 9, dtype=dtype)
        with function(net, x) as (run, points):
            plan = plan_for(run, points)
        assert (plan.chain is not None) == (net is chain)
        wide = copy.deepcopy(net).double()
        with function(wide, x.double()) as (run, points):
            assert plan_for(run, points).why_no_chain == plan.why_no_chain


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize("energy", ALL, ids=repr)
def test_autocast_outside_changes_nothing(energy: JacobianEnergy) -> None:
    conv = filled(nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, 3)))
    for model in (mixed(torch.float32), conv.float()):
        x = randn(6, 5, dtype=torch.float32)
        expected = value_and_gradient(energy, model, x)
        with torch.autocast("cpu", torch.bfloat16):
            found = value_and_gradient(energy, model, x)
            by_function = energy.value(lambda x, model=model: model(x), x, probe=gen(5))
        assert found[0] == pytest.approx(expected[0], rel=1e-5)  # float32; bfloat16 would be off by 1e-2
        assert float(by_function.detach()) == pytest.approx(expected[0], rel=1e-5)
        assert float((found[1] - expected[1]).norm()) <= 1e-4 * float(expected[1].norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("energy", ALL, ids=repr)
def test_half_precision_networks_are_summed_in_single(energy: JacobianEnergy, dtype: torch.dtype) -> None:
    energy = Dirichlet(samples=None, probes=3) if energy is PROBED else energy  # all directions: nothing random
    x = randn(6, 5)
    for tail in ((), (nn.Unflatten(1, (3, 1)),)):  # in closed form, and not
        half = nn.Sequential(mixed(dtype), *tail)
        single = nn.Sequential(mixed(dtype).double(), *tail)  # the same, rounded weights
        value, slope = value_and_gradient(energy, half, x)
        expected, slopes = value_and_gradient(energy, single, x.to(dtype))
        assert energy.value(half, x, probe=gen()).dtype == torch.float32
        # activations are rounded to 8 and 11 bits, a few times one after the other
        assert value == pytest.approx(expected, rel=20 * torch.finfo(dtype).eps)
        assert float((slope - slopes).norm()) <= 40 * torch.finfo(dtype).eps * float(slopes.norm())
    large = filled(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), 3, dtype)
    with torch.no_grad():
        for p in large.parameters():
            p.mul_(100)
    for f in (large, nn.Sequential(large, nn.Unflatten(1, (3, 1)))):
        found = float(energy.value(f, x / 100, probe=gen()).detach())
        assert found > 1e3  # the squares that it is made of exceed the largest float16


def test_grad_scaler_and_accumulation() -> None:
    model, x = mixed(torch.float32), randn(8, 5, dtype=torch.float32)
    y = torch.arange(8) % 3
    energy = 0.1 * EXACT

    def gradient(scale: bool, parts: int) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        reg = Regularizer(model, energy).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", enabled=scale, init_scale=2.0**10)
        optimizer.zero_grad()
        for some, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                loss = functional.cross_entropy(model(some), labels)
            scaler.scale((loss + reg.loss(some, labels)) / parts).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        reg.detach()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradient(False, 1)
    for scale, parts in ((True, 1), (False, 4), (True, 4)):
        found = gradient(scale, parts)
        assert float((found - plain).norm()) <= 1e-5 * float(plain.norm())  # sums of float32 in another order


def test_every_fourth_step_is_four_times_as_strong() -> None:
    model, x = mixed(), randn(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    reg = Regularizer(model, 0.5 * EXACT, every=4).attach(optimizer)
    found = []
    for _ in range(8):
        loss = reg.loss(x)
        found.append(float(loss.detach()))
        (loss + 0 * model(x).sum()).backward()
        optimizer.step()
    once = 0.5 * float(EXACT.value(model, x, probe=gen()).detach())
    assert found == pytest.approx([4 * once, 0, 0, 0, 4 * once, 0, 0, 0], rel=1e-12)


# ---------------------------------------------------------------------- what is settled at the first batch


CUTTING = "0.1*jacobian_nuclear(method='factorized')"


def cutting_net() -> nn.Sequential:
    """Its tightest cut is after layer 1 at small inputs, after layer 2 at large ones."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=gen(k)) * (1.2 if p.ndim > 1 else 0.5))
    return net


def cut_in_training(reg: Regularizer) -> int:
    return cut_in_training_of(reg.state_dict())


def cut_in_training_of(state: dict[str, Any]) -> int:
    (place,) = (int(v) for k, v in state.items() if k.endswith("/cut"))
    return place


class Run:
    def __init__(self, net: nn.Module, spec: str = CUTTING) -> None:
        self.net, self.optimizer = net, torch.optim.SGD(net.parameters(), lr=0.05)
        self.reg = Regularizer(net, spec, seed=3).attach(self.optimizer)

    def step(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        (functional.mse_loss(self.net(x), x) + self.reg.loss(x)).backward()
        self.optimizer.step()


def test_the_cut_of_the_first_batch_is_kept_and_saved() -> None:
    small, large = 0.1 * randn(40, 4, dtype=torch.float32), 10 * randn(40, 4, seed=1, dtype=torch.float32)
    one, other = Run(cutting_net()), Run(cutting_net())
    assert cut_in_training(one.reg) == -1  # nothing is chosen yet
    energy = JacobianNuclear(method="factorized")
    energy.estimate(one.net, large, probe=gen())  # what was measured before has no say
    one.step(small)
    other.step(large)
    chosen = cut_in_training(one.reg)
    assert chosen > 0
    assert chosen != cut_in_training(other.reg)  # or this test would say nothing
    weights, state, momenta = (copy.deepcopy(o.state_dict()) for o in (one.net, one.reg, one.optimizer))
    resumed = Run(cutting_net())  # modules of which nothing is known yet
    resumed.net.load_state_dict(weights)
    resumed.reg.load_state_dict(state)
    resumed.optimizer.load_state_dict(momenta)
    for r in (one, resumed):
        for _ in range(3):
            r.step(large)
    assert all(torch.equal(p, q) for p, q in zip(one.net.parameters(), resumed.net.parameters()))
    assert cut_in_training(resumed.reg) == chosen
    forgetful = Run(cutting_net())
    forgetful.net.load_state_dict(weights)
    forgetful.reg.step_count = 1
    for _ in range(3):
        forgetful.step(large)
    assert not torch.equal(next(one.net.parameters()), next(forgetful.net.parameters()))


def test_the_first_of_several_batches_of_a_step_decides() -> None:
    small, large = 0.1 * randn(40, 4, dtype=torch.float32), 10 * randn(40, 4, seed=1, dtype=torch.float32)
    for first, second in ((small, large), (large, small)):
        alone, both = Run(cutting_net()), Run(cutting_net())
        alone.step(first)
        with torch.no_grad():
            both.reg.loss(second)  # has no say
        for x in (first, second):
            both.reg.loss(x).backward()
        assert cut_in_training(both.reg) == cut_in_training(alone.reg)


def test_options_of_the_other_method_do_not_stand_in_the_way() -> None:
    x = randn(40, 4, dtype=torch.float32)
    run = Run(cutting_net(), "0.1*jacobian_nuclear(estimator='fd', sigma=0.02)")
    run.step(x)
    assert cut_in_training(run.reg) == 0  # exact, where there is no estimator
    wide = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40))
    many = Run(filled(wide, dtype=torch.float32), "0.1*jacobian_nuclear(route='loop')")
    many.step(randn(8, 40, dtype=torch.float32))
    assert cut_in_training(many.reg) > 0  # factorized, where there is no route


def test_measuring_chooses_the_cut_of_its_own_samples_whatever_came_before() -> None:
    net, energy = cutting_net(), JacobianNuclear(method="factorized")
    small, large = 0.1 * randn(40, 4, dtype=torch.float32), 10 * randn(40, 4, seed=1, dtype=torch.float32)
    first = energy.estimate(net, small, probe=gen())
    other = energy.estimate(net, large, probe=gen())
    assert first.how != other.how
    again = energy.estimate(net, small, probe=gen())
    assert (again.how, again.value) == (first.how, first.value)


def test_what_is_settled_is_the_method_too_and_fits_its_network_only() -> None:
    x = randn(40, 4, dtype=torch.float32)
    exact = Run(cutting_net(), "0.1*jacobian_nuclear")
    with torch.no_grad():
        exact.reg.loss(x)
    assert cut_in_training(exact.reg) == -1  # without gradients another method may do
    exact.step(x)
    assert cut_in_training(exact.reg) == 0  # four outputs: no cut
    named = Run(cutting_net(), "0.1*jacobian_nuclear(method='factorized', cut='1')")
    named.step(x)
    assert not any(k.startswith("settled/") for k in named.reg.state_dict())  # nothing was open
    auto = Run(cutting_net())
    auto.step(x)
    state = auto.reg.state_dict()
    key = next(k for k in state if k.endswith("/cut"))
    for place in (6, 77, -2):
        auto.reg.load_state_dict(state | {key: torch.tensor(place)})
        with pytest.raises(UsageError, match=f"module {place} of a network with 6 modules"):
            auto.step(x)
    auto.reg.load_state_dict(state | {key: torch.tensor(5)})  # the output: another network's cut is verified too
    with pytest.raises(UsageError, match="cannot be split at '4'"):
        auto.step(x)
    with pytest.raises(UsageError, match="another version"):
        auto.reg.load_state_dict(state | {key: torch.zeros(2)})


def test_a_state_without_the_cut_is_completed_at_the_next_batch() -> None:
    x = randn(40, 4, dtype=torch.float32)
    run = Run(cutting_net())
    fresh = run.reg.state_dict()
    run.step(x)
    state = run.reg.state_dict()
    old = {k: v for k, v in state.items() if not k.startswith("settled/")}
    with pytest.warns(UserWarning, match=r"does not hold the cut that jacobian_nuclear\(method='factorized'\) had"):
        run.reg.load_state_dict(old)
    assert cut_in_training(run.reg) == -1
    run.step(x)
    assert cut_in_training(run.reg) == cut_in_training_of(state)
    run.reg.load_state_dict({k: v for k, v in fresh.items() if not k.startswith("settled/")})  # nothing was chosen yet
    for spec in ("0.1*jacobian_nuclear(method='factorized', cut='1')", "jacobian_nuclear@monitor"):
        other = Run(cutting_net(), spec)
        kept = {k: v for k, v in other.reg.state_dict().items() if not k.startswith("settled/")}
        other.reg.load_state_dict(kept | {"step": 5})  # it plays no part: no warning


# ---------------------------------------------------------------------- compilation and wrappers


@pytest.mark.parametrize("energy", ALL, ids=repr)
def test_compiled_networks_are_run_eagerly(energy: JacobianEnergy) -> None:
    skip, x = filled(Skip(), 6), randn(4, 5, seed=7)
    compiled = torch.compile(skip, backend="aot_eager")
    compiled(x)
    same(energy, compiled, skip, x)
    inside = nn.Sequential(torch.compile(copy.deepcopy(skip), backend="aot_eager"), nn.Tanh())
    inside(x)
    same(energy, inside, nn.Sequential(skip, nn.Tanh()), x, parameters=None)
    by_method = copy.deepcopy(skip)
    by_method.compile(backend="aot_eager")
    by_method(x)
    same(energy, by_method, skip, x)
    function = torch.compile(lambda x: skip(x), backend="aot_eager")
    function(x)
    value = energy.value(function, x, probe=gen(5))
    assert float(value.detach()) == pytest.approx(value_and_gradient(energy, skip, x)[0], rel=1e-10)
    assert compiled(x).shape == (4, 3)  # and compiled again afterwards


def test_scripted_networks_leave_dropout_out() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(model).train()
    same(EXACT, scripted, model, randn(4, 5))
    assert scripted.training
    assert all(m.training for m in scripted.modules())


DISTRIBUTED = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from groundstate import Regularizer
from groundstate.energies.dirichlet import Dirichlet
from groundstate.energies.jacobian_nuclear import JacobianNuclear

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

def g(seed):
    return torch.Generator().manual_seed(seed)

class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)
    def forward(self, x):
        return self.b(x + torch.tanh(self.a(x)))

chain = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
for make in (Skip, lambda: chain):
    model = make().double()
    for i, p in enumerate(model.parameters()):
        p.data = torch.randn(p.shape, generator=g(i), dtype=torch.float64)
    parallel = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(8, 5, generator=g(9), dtype=torch.float64)
    energy = 0.3 * Dirichlet(estimator="exact", samples=None) + 0.2 * JacobianNuclear(samples=None)
    reg = Regularizer(parallel, energy)

    def loss(f, x):
        return f(x).square().mean() + reg.loss(x)

    serial = torch.autograd.grad(sum(loss(model, part) for part in x.chunk(2)) / 2, list(model.parameters()))
    loss(parallel, x.chunk(2)[rank]).backward()
    for p, expected in zip(model.parameters(), serial):
        assert torch.allclose(p.grad, expected, rtol=1e-12, atol=1e-14), (p.grad, expected)
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.slow
def test_distributed_data_parallel_gives_the_average_of_the_ranks(tmp_path: Any) -> None:
    def start(rank: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DISTRIBUTED, str(rank), str(tmp_path / "store")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for rank in [start(0), start(1)]:
        out, error = rank.communicate(timeout=300)
        assert "equal" in out, error


# ---------------------------------------------------------------------- misuse


def misuses() -> Iterator[tuple[str, Callable[[], object]]]:
    x, y, model = randn(4, 5), torch.tensor([0, 1, 2, 0]), mixed()
    loss = Dirichlet(on="loss")

    def call(energy: JacobianEnergy = PROBED, f: Any = model, x: Any = x, y: Any = None) -> Callable[[], object]:
        return lambda: energy.value(f, x, y, probe=gen())

    yield "give y", call(loss)
    yield "must be a tensor", call(loss, y=[0, 1, 2, 0])
    yield "from 0 to 5", call(loss, y=torch.tensor([0, 1, 5, 0]))
    yield "from -100 to 2", call(loss, y=torch.tensor([0, -100, 2, 0]))
    yield "whole numbers", call(loss, y=y.double())
    yield "expected as many", call(Dirichlet(on="loss", samples=None), y=y[:3])
    yield "the batch is empty", call(x=x[:0])
    yield "has no derivative", call(x=x.long())
    yield "must be a tensor", call(x=x.tolist())
    yield "no layer 'heed'.*", call(Dirichlet(on="heed"))
    yield "no layer", call(Dirichlet(wrt="7"))
    yield "not a module", call(Dirichlet(wrt="0"), f=torch.sin)
    yield "one row per sample", call(f=lambda x: x.sum())
    yield "one row per sample", call(f=lambda x: x.T)
    yield "is a list", call(f=lambda x: [x])
    yield "expected floating point", call(f=lambda x: x.long())
    yield "not all zero", call(Dirichlet(estimator="fd"), x=0 * x)
    yield "no closed form", call(JacobianNuclear(route="closed_form"), f=filled(Skip()))
    yield "sigma", lambda: Dirichlet(sigma=0.0)
    yield "probes", lambda: Dirichlet(probes=0)
    yield "samples", lambda: Dirichlet(samples=True)
    yield "estimator", lambda: Dirichlet(estimator="best")
    yield "not negative", lambda: -1.0 * PROBED


@pytest.mark.parametrize(("message", "call"), list(misuses()), ids=lambda v: v if isinstance(v, str) else "")
def test_misuse_is_named(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize("energy", ALL, ids=repr)
def test_numbers_that_are_not_finite_are_named(energy: JacobianEnergy) -> None:
    for bad in (float("nan"), float("inf")):
        for make in (mixed, lambda: filled(Skip())):
            model, x = make(), randn(4, 5)
            name, weight = list(model.named_parameters())[2]
            with torch.no_grad():
                weight[0] = bad
            for call in (energy.value, energy.estimate):
                with pytest.raises(NonFiniteError, match=name):
                    call(model, x, probe=gen())
                with pytest.raises(NonFiniteError, match="input x"):
                    call(make(), x.index_fill(0, torch.tensor([1]), bad), probe=gen())
    huge = mixed(torch.float32)
    with torch.no_grad():
        huge[4].weight.fill_(1e30)
    with pytest.raises(NonFiniteError, match="overflows"):
        energy.value(huge, randn(4, 5), probe=gen())


def test_finite_differences_warn_of_rounding() -> None:
    model = filled(nn.Sequential(nn.Linear(5, 3)), dtype=torch.float32)
    with torch.no_grad():
        model[0].bias.fill_(1e4)
    with pytest.warns(UserWarning, match="close to rounding"):
        Dirichlet(estimator="fd").value(model, randn(4, 5), probe=gen())
