"""Where and when an energy acts: the couplings against hand-written loops, in float64 unless said."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import groundstate as gs
from groundstate.blocks import select
from groundstate.energies import L1, GraphEnergy, Nuclear, PathEnergy, SquaredFrobenius, registered
from groundstate.energies.base import Coupling, MatrixEnergy, NetworkEnergy
from groundstate.energies.capabilities import Anchored
from groundstate.energies.registry import parse
from groundstate.errors import NonFiniteError, UsageError
from groundstate.idle import taken

STEPS = 50


def mlp(seed: int, sizes=(7, 6, 5, 3), dtype=torch.float64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = []
        for a, b in itertools.pairwise(sizes):
            parts += [nn.Linear(a, b, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def batches(seed: int, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(STEPS, 16, 7, generator=g, dtype=dtype)
    return x, torch.randint(0, 3, (STEPS, 16), generator=g)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def in_the_loss(model: nn.Module, energy) -> torch.Tensor:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    if isinstance(energy, GraphEnergy):
        return energy.value(matrices)
    return torch.stack([energy.value(w) for w in matrices]).sum()


def run(model, optimizer, x, y, reg=None, term=None, accumulate=1, clip=None, by_hand=False, use_loss=False):
    for xb, yb in zip(x, y, strict=True):
        optimizer.zero_grad()
        for xm, ym in zip(xb.chunk(accumulate), yb.chunk(accumulate), strict=True):
            loss = nn.functional.cross_entropy(model(xm), ym)
            if term is not None:
                loss = loss + term(model)
            if use_loss:
                loss = loss + reg.loss(xm, ym)
            (loss / accumulate).backward()
        if by_hand:
            reg.add_gradients()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


@pytest.mark.parametrize("energy", [Nuclear(), SquaredFrobenius(), GraphEnergy(), L1()], ids=repr)
@pytest.mark.parametrize("how", ["hook", "by hand", "loss"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_every_way_equals_the_term_in_the_loss(energy, how, accumulate):
    x, y = batches(1)
    a, b = mlp(0), mlp(0)
    strength = 1e-2
    opt_a = torch.optim.SGD(a.parameters(), lr=0.05, momentum=0.9)
    opt_b = torch.optim.SGD(b.parameters(), lr=0.05, momentum=0.9)
    reg = gs.Regularizer(b, strength * energy, coupling="loss" if how == "loss" else "grad").attach(opt_b)
    run(a, opt_a, x, y, term=lambda m: strength * in_the_loss(m, energy), accumulate=accumulate)
    run(b, opt_b, x, y, reg, accumulate=accumulate, by_hand=how == "by hand", use_loss=how == "loss")
    # float64 rounding grown over 50 steps; the issue asks for 1e-6
    assert (weights(a) - weights(b)).abs().max() < 1e-10


def test_before_clipping_equals_the_loss_and_after_clipping_does_not():
    # p = (3, 4), E = ||p||^2, strength 0.5, data gradient (5, 12), clip 1, lr 0.1: worked by hand
    for by_hand, expected in ((True, (2.9552786, 3.9105573)), (False, (2.6615385, 3.5076923))):
        model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        model.weight.data = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        reg = gs.Regularizer(model, 0.5 * SquaredFrobenius()).attach(optimizer)
        model.weight.grad = torch.tensor([[5.0, 12.0]], dtype=torch.float64)
        if by_hand:
            reg.add_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        # seven printed digits; clip_grad_norm_ itself adds 1e-6 to the norm it divides by
        assert model.weight.tolist()[0] == pytest.approx(expected, abs=2e-6)


def test_lbfgs_closure_gets_gradient_and_value():
    # 1/2 ||p - a||^2 + 1/4 ||p||^2 from 0: p = a / 1.5, objective 7/3, first loss 7
    a = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    gs.Regularizer(model, 0.25 * SquaredFrobenius()).attach(optimizer)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (model.weight - a).square().sum()
        loss.backward()
        seen.append(loss.item())
        return loss

    first = optimizer.step(closure)
    assert first.item() == pytest.approx(7.0)
    assert torch.allclose(model.weight, a / 1.5, atol=1e-8)


@pytest.mark.parametrize("form", ["positional", "keyword"])
def test_lbfgs_equals_the_term_in_the_loss(form):
    x, y = batches(2)
    xb, yb = (
        x.flatten(0, 1),
        y.flatten(),
    )  # one batch: with a new one every step the run diverges and amplifies rounding
    models = [mlp(3), mlp(3)]
    for k, model in enumerate(models):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2)
        if k == 1:
            gs.Regularizer(model, 1e-2 * Nuclear()).attach(optimizer)
        for _ in range(STEPS):

            def closure(model=model, optimizer=optimizer, k=k):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(xb), yb)
                if k == 0:
                    loss = loss + 1e-2 * in_the_loss(model, Nuclear())
                loss.backward()
                return loss

            optimizer.step(closure) if form == "positional" else optimizer.step(closure=closure)
    # rounding amplified by 100 quasi-Newton iterations, some 1e-12 here; the issue asks for 1e-6
    assert (weights(models[0]) - weights(models[1])).abs().max() < 1e-6


def test_prox_of_l1_is_ista():
    g = torch.Generator().manual_seed(5)
    a = torch.randn(20, 8, generator=g, dtype=torch.float64)
    b = torch.randn(20, 4, generator=g, dtype=torch.float64)
    model = nn.Linear(8, 4, bias=False, dtype=torch.float64)
    w = model.weight.detach().clone()
    lr, strength = 0.01, 3.0
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    gs.Regularizer(model, strength * L1(), coupling="prox").attach(optimizer)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 * (model(a) - b).square().sum()).backward()
        optimizer.step()
        z = w - lr * (a @ w.T - b).T @ a
        w = z.sign() * (z.abs() - lr * strength).clamp_min(0)
    # the same arithmetic in another order, float64
    assert torch.allclose(model.weight, w, atol=1e-12)
    assert (model.weight == 0).any()


def test_nuclear_prox_of_a_diagonal():
    model = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    model.weight.data = torch.diag(torch.tensor([3.0, 0.5], dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gs.Regularizer(model, 2.0 * Nuclear(), coupling="prox").attach(optimizer)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.allclose(model.weight, torch.diag(torch.tensor([2.8, 0.3], dtype=torch.float64)), atol=1e-14)


def test_monitor_leaves_training_bit_identical():
    x, y = batches(6, torch.float32)
    models = [mlp(7, dtype=torch.float32) for _ in range(2)]
    for k, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        before = torch.get_rng_state()
        if k == 1:
            spec = "nuclear + schatten(p=0.5) + stable_rank + graph + path_energy"
            reg = gs.Regularizer(model, spec, coupling="monitor").attach(optimizer)
        run(model, optimizer, x, y)
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert reg.values()["steps"] == STEPS


@pytest.mark.parametrize("mu", [1e-4, 1.0, 5.0])
@pytest.mark.parametrize("cosine", [False, True])
def test_path_energy_is_a_shift_of_momentum(mu, cosine):
    x, y = batches(8)
    lr, beta = 0.1, 0.9
    model, twin = mlp(9), mlp(9)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=beta)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS) if cosine else None
    gs.Regularizer(model, mu * PathEnergy()).attach(optimizer)
    buffers = [torch.zeros_like(p) for p in twin.parameters()]
    previous = 0.0
    for xb, yb in zip(x, y, strict=True):
        now = optimizer.param_groups[0]["lr"]
        run(model, optimizer, xb[None], yb[None])
        twin.zero_grad()
        nn.functional.cross_entropy(twin(xb), yb).backward()
        for p, v in zip(twin.parameters(), buffers, strict=True):
            shifted = beta - (mu * previous if p.ndim == 2 else 0.0)
            v.mul_(shifted).add_(p.grad)
            p.data.sub_(now * v)
        previous = now
        if scheduler is not None:
            scheduler.step()
    # the bound; float64 rounding over 50 steps
    assert (weights(model) - weights(twin)).abs().max() < 1e-12


def test_path_energy_says_what_it_does_and_refuses_what_is_unstable():
    model = mlp(0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert "momentum 0.9 - 1*lr = 0.8" in gs.Regularizer(model, 1.0 * PathEnergy()).attach(sgd).describe()
    with pytest.warns(UserWarning, match="negative"):
        gs.Regularizer(model, 10.0 * PathEnergy()).attach(sgd)
    with pytest.raises(UsageError, match="unstable"):
        gs.Regularizer(model, 19.0 * PathEnergy()).attach(sgd)
    adam = torch.optim.Adam(model.parameters())
    assert "real extra gradient under Adam" in gs.Regularizer(model, 1.0 * PathEnergy()).attach(adam).describe()


def test_path_energy_of_gradient_descent_on_a_quadratic():
    # the closed form: a_i = 1 - lr h_i, w_i(t) = w_i a_i^t
    h = torch.tensor([[1.0, 0.3, 0.05]], dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[1.0, -2.0, 4.0]], dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    reg = gs.Regularizer(model, PathEnergy(), coupling="monitor").attach(optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        (0.5 * (h * model.weight.square()).sum()).backward()
        optimizer.step()
    got = reg.values()
    expected = {
        "path_energy": 7.861360066144,
        "length": 3.050792175519,
        "straightness": 0.459312654516,
        "speed_uniformity": 0.591967090929,
        "path_energy_lr": 7.861360066144,  # equal steps: the clocks agree
    }
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-11), key  # twelve printed digits
    assert math.sqrt(got["tortuosity_squared"]) == pytest.approx(0.880857027548, abs=1e-11)
    assert got["displacement"] ** 2 == pytest.approx(7.221644320170, abs=1e-11)


def test_learning_rates_of_groups_frozen_and_tied_weights():
    model = mlp(11, (5, 5, 5, 3))
    model[2].weight = model[0].weight
    model[4].weight.requires_grad_(False)
    frozen = model[4].weight.clone()
    groups = [
        {"params": [model[0].weight], "lr": 0.5},
        {"params": [model[0].bias, model[2].bias, model[4].bias], "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    reg = gs.Regularizer(model, 1.0 * SquaredFrobenius(), coupling="prox").attach(optimizer)
    assert [b.name for b in reg.blocks] == ["0.weight", "4.weight"]
    before = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert torch.allclose(model[0].weight, before / (1 + 2 * 0.5))
    assert torch.equal(model[4].weight, frozen)


@pytest.mark.parametrize("fused", [False, True])
def test_gradient_scaler(fused):
    x, y = batches(12, torch.float32)
    ends = []
    for scaled in (False, True):
        model = mlp(13, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        reg = gs.Regularizer(model, "1e-2*nuclear + 1e-2*path_energy + 1e-3*l1@prox").attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for k, (xb, yb) in enumerate(zip(x[:10], y[:10], strict=True)):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(xb), yb)).backward()
            if k == 5 and scaled:
                kept, steps = weights(model).clone(), reg.step_count
                model[0].weight.grad[0, 0] = math.inf
                scaler.step(optimizer)
                assert torch.equal(kept, weights(model))
                assert reg.step_count == steps
                scaler.update()
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(model(xb), yb)).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(weights(model))
    # float32 rounding of the scaled gradients over ten steps
    assert (ends[0] - ends[1]).abs().max() < 1e-6


@pytest.mark.parametrize("coupling", ["grad", "prox", "loss", "monitor"])
def test_state_dict_resumes_bit_for_bit(coupling):
    x, y = batches(14, torch.float32)
    spec = f"1e-2*nuclear@{coupling} + 0.5*path_energy"

    def made():
        model = mlp(15, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, gs.Regularizer(model, spec, every=1 if coupling == "monitor" else 3).attach(optimizer)

    whole, optimizer, reg = made()
    run(whole, optimizer, x, y, reg, use_loss=True)
    first, optimizer1, reg1 = made()
    run(first, optimizer1, x[:20], y[:20], reg1, use_loss=True)
    second, optimizer2, reg2 = made()
    second.load_state_dict(first.state_dict())
    optimizer2.load_state_dict(copy.deepcopy(optimizer1.state_dict()))
    reg2.load_state_dict(reg1.state_dict())
    run(second, optimizer2, x[20:], y[20:], reg2, use_loss=True)
    assert torch.equal(weights(whole), weights(second))
    assert reg.values() == reg2.values()


def test_weights_moved_between_save_and_load_are_not_counted():
    model = mlp(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = gs.Regularizer(model, PathEnergy(), coupling="monitor").attach(optimizer)
    x, y = batches(17)
    run(model, optimizer, x[:5], y[:5])
    state, length = reg.state_dict(), reg.values()["length"]
    with torch.no_grad():
        model[0].weight += 100
    with pytest.warns(UserWarning, match="not counted"):
        reg.load_state_dict(state)
    run(model, optimizer, x[5:6], y[5:6])
    assert reg.values()["length"] < length + 50


def test_lazy_action_is_k_times_as_strong():
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gs.Regularizer(model, 0.5 * SquaredFrobenius(), every=4).attach(optimizer)
    for _ in range(8):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    assert torch.allclose(model.weight, before * (1 - 0.1 * 4) ** 2)


def test_schedule_scales_the_strength():
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gs.Regularizer(model, 0.5 * SquaredFrobenius(), schedule="linear:2").attach(optimizer)
    for _ in range(3):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    assert torch.allclose(model.weight, before * 0.9 * 0.95)


def test_non_finite_is_named_and_nothing_is_written():
    model = mlp(18)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = gs.Regularizer(model, 1.0 * Nuclear()).attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[2].weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"nuclear at 2\.weight"):
        reg.add_gradients()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_missing_gradients_are_skipped_and_named_once():
    model = mlp(19)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gs.Regularizer(model, 1.0 * Nuclear()).attach(optimizer)
    for name, p in model.named_parameters():
        p.grad = None if name == "2.weight" else torch.zeros_like(p)
    with pytest.warns(UserWarning, match=r"2\.weight"):
        optimizer.step()
    optimizer.step()
    assert model[2].weight.grad is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: gs.Regularizer(m, "1e-3*nucler"), "nuclear"),
        (lambda m: gs.Regularizer(m, "-1*nuclear"), "not negative"),
        (lambda m: gs.Regularizer(m, "nuclear", select="nothing*"), r"0\.weight"),
        (lambda m: gs.Regularizer(m, "path_energy", coupling="prox"), "no proximal map"),
        (lambda m: gs.Regularizer(m, "nuclear", every=0), "every"),
        (lambda m: gs.Regularizer(m, "nuclear", schedule="linaer:3"), "linear"),
        (lambda m: gs.Regularizer(m, "nuclear").attach(object()), "Optimizer"),
        (lambda m: gs.Regularizer(m, "nuclear").attach(torch.optim.SGD([nn.Parameter(torch.ones(1))])), "none of"),
        (lambda m: gs.Regularizer(m, "nuclear@grad + l1@grad", coupling="prox"), "coupling='prox' plays no part"),
        (lambda m: gs.Regularizer(m, "dirichlet", coupling="prox"), "dirichlet@loss"),
        (lambda m: gs.Regularizer(m, "path_energy", every=2), "every=2 plays no part"),
        (lambda m: gs.Regularizer(m, "nuclear@monitor", every=2), "every=2 plays no part"),
        (lambda m: gs.Regularizer(m, "nuclear@monitor", schedule="linear:3"), "schedule='linear:3' plays no part"),
        (lambda m: gs.Regularizer(m, "graph + dirichlet", select="0.*"), "select='0\\.\\*' plays no part"),
        (lambda m: gs.Regularizer(m, "nuclear", every=2, gap=0.1), "leave every=2 out, or the gap"),
        (lambda m: gs.Regularizer(m, "schatten(p=0.5)", gap=0.1), "gap=0.1 plays no part in .* certified bounds"),
        (lambda m: gs.Regularizer(m, "none", every=2, gap=0.1), "leave every=2 out, or the gap"),
        (lambda m: gs.Regularizer(m, "none", gap=2.0), "between 0 and 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(UsageError, match=message) as caught:
        make(mlp(0))
    assert "\n" not in str(caught.value)


def test_double_use_is_refused():
    model = mlp(20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = gs.Regularizer(model, "nuclear").attach(optimizer)
    with pytest.raises(UsageError, match="attached already"):
        reg.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    reg.add_gradients()
    with pytest.raises(UsageError, match="once per step"):
        reg.add_gradients()


def test_maximizing_optimizer_still_minimizes_the_energy():
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    gs.Regularizer(model, 0.5 * SquaredFrobenius()).attach(optimizer)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert torch.allclose(model.weight, before * 0.9)


OF_WEIGHTS = [e for c in registered().values() if issubclass(c, MatrixEnergy | NetworkEnergy) for e in c.examples()]
KEPT = [e for e in OF_WEIGHTS if isinstance(e, Anchored) and e.bounded()]


@pytest.mark.parametrize(("energy", "gap"), [*((e, None) for e in OF_WEIGHTS), *((e, 0.01) for e in KEPT)], ids=repr)
def test_inference_mode_has_the_same_loss_and_training_goes_on(energy, gap) -> None:
    def made() -> gs.Regularizer:
        return gs.Regularizer(mlp(0), energy.via("loss"), gap=gap)

    reg = made()
    with torch.inference_mode():
        found = reg.loss()
    if "angle-preserving" not in repr(energy):  # learned in training before it is used
        assert found == made().loss()
    reg.loss().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in reg.model.parameters() if p.ndim == 2)


@pytest.mark.parametrize("energy", ["conv_nuclear", "conv_operator_norm"])
def test_a_regularizer_made_in_inference_mode_acts_on_convolutions(energy) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3))
    values = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            reg = gs.Regularizer(model, f"{energy}@loss")
        values.append(reg.loss().detach())
        reg.loss().backward()
    assert values[0] == values[1]


def test_network_energies_without_a_closed_form_have_gradients_in_inference_mode() -> None:
    layers = [p for p in mlp(1).parameters() if p.ndim == 2]
    closed = GraphEnergy().value_and_grad(layers)[1]
    with torch.inference_mode():
        found = NetworkEnergy.value_and_grad(GraphEnergy(), layers)[1]
    for a, b in zip(found, closed, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)  # float64, singular values well apart


def test_terms_of_the_loss_that_nobody_asks_for_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = gs.Regularizer(model, "1e-3*dirichlet").attach(optimizer)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    (model(x).square().mean() + reg.loss(x)).backward()
    optimizer.step()  # asked for
    model(x).square().mean().backward()
    with pytest.warns(UserWarning, match="dirichlet did not act"):
        optimizer.step()
    optimizer.step()  # said once


def test_options_that_play_a_part_somewhere_pass() -> None:
    model = mlp(21)
    gs.Regularizer(model, "nuclear@grad + l1", coupling="prox")
    gs.Regularizer(model, "nuclear@monitor", coupling="monitor")
    gs.Regularizer(model, "graph + nuclear", select="0.*", every=2, schedule="linear:3")
    gs.Regularizer(model, "path_energy", schedule="linear:3", select="0.*")
    gs.Regularizer(model, "none", every=3, coupling="prox")  # the baseline of a sweep
    assert gs.Regularizer(model, "none", gap=0.1).wear() == {}
    kept = gs.Regularizer(model, "nuclear + schatten(p=0.5)", gap=0.1).describe()
    assert "gradients of nuclear kept" in kept
    assert "gradients of schatten" not in kept


def test_a_final_prox_of_nothing_is_said() -> None:
    model = mlp(22)
    before = weights(model)
    reg = gs.Regularizer(model, "graph + nuclear@monitor")
    with pytest.warns(UserWarning, match="no term of graph .* has a prox"):
        reg.apply_prox(1.0)
    assert torch.equal(before, weights(model))


@pytest.mark.parametrize("name", [n for n, c in registered().items() if issubclass(c, MatrixEnergy | NetworkEnergy)])
def test_values_beyond_the_range_of_float32(name: str) -> None:
    """Squares, fourth powers and sums of weights near the end of the range: the numbers of float64."""
    for energy in registered()[name].examples():
        model = mlp(23, (6, 5, 4), torch.float32)
        with torch.no_grad():
            for b in select(model):
                b.parameter.mul_(3e37 / b.parameter.abs().max())
        found = gs.Regularizer(model, energy, coupling="monitor").values()
        exact = gs.Regularizer(copy.deepcopy(model).double(), energy, coupling="monitor").values()
        assert found == pytest.approx(exact, rel=1e-5)  # rounding of float32, to the fourth power
        assert found == pytest.approx(gs.measure(model, [energy]).totals, rel=1e-5)


def test_energies_of_the_function_are_among_the_values_of_samples() -> None:
    model = mlp(24)
    x, y = (t[0] for t in batches(25))
    reg = gs.Regularizer(model, "nuclear + dirichlet + jacobian_nuclear@monitor")
    with pytest.warns(UserWarning, match=r"dirichlet, jacobian_nuclear: .* use values\(x, y\)"):
        assert list(reg.values()) == ["nuclear"]
    assert list(reg.values()) == ["nuclear"]  # said once
    assert list(reg.values(x[:0], y[:0])) == ["nuclear"]
    found = reg.values(x, y)
    assert list(found) == ["nuclear", "dirichlet", "jacobian_nuclear"]
    assert found == reg.values(x, y)
    jacobians = torch.func.vmap(torch.func.jacrev(model))(x).detach()
    # float64 rounding
    assert found["dirichlet"] == pytest.approx(float(jacobians.square().sum((1, 2)).mean()), rel=1e-10)
    assert found["jacobian_nuclear"] == pytest.approx(float(torch.linalg.svdvals(jacobians).sum(-1).mean()), rel=1e-10)


# ------------------------------------------------------------------ energies that learn in training

LEARNING = ["comhe(projection='adversarial', dimensions=3)", "comhe(projection='angle-preserving', dimensions=3)"]


def learning(spec: str, **options) -> tuple[nn.Sequential, torch.optim.Optimizer, gs.Regularizer]:
    model = mlp(26)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, optimizer, gs.Regularizer(model, f"1e-1*{spec}@loss", **options).attach(optimizer)


def memory(reg: gs.Regularizer) -> torch.Tensor:
    return torch.cat([v.flatten() for k, v in reg.state_dict().items() if k.startswith("memory/")])


@pytest.mark.parametrize("spec", [*LEARNING, "comhe(dimensions=3)"])
def test_energies_learn_once_a_step_whatever_the_accumulation(spec: str) -> None:
    x, y = batches(27)
    ends = []
    for accumulate in (1, 4):
        model, optimizer, reg = learning(spec)
        run(model, optimizer, x[:6], y[:6], reg, accumulate=accumulate, use_loss=True)
        ends.append((weights(model), memory(reg) if spec in LEARNING else torch.zeros(1)))
    for one, four in zip(*ends, strict=True):
        # the order of sums in float64, over 6 steps
        torch.testing.assert_close(one, four, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", LEARNING)
def test_learning_in_the_loss_is_learning_by_gradients(spec: str) -> None:
    x, y = batches(28)
    ends = []
    for coupling in ("loss", "grad"):
        model = mlp(26)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        reg = gs.Regularizer(model, f"1e-1*{spec}@{coupling}").attach(optimizer)
        run(model, optimizer, x[:5], y[:5], reg, use_loss=coupling == "loss")
        ends.append((weights(model), memory(reg)))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)  # the order of sums in float64


@pytest.mark.parametrize("options", [{"spec": LEARNING[0]}, {"spec": "nuclear", "gap": 0.05}], ids=repr)
def test_evaluation_under_no_grad_changes_nothing(options: dict) -> None:
    x, y = batches(29)
    ends = []
    for evaluated in (False, True):
        model, optimizer, reg = learning(**options)
        for xb, yb in zip(x[:6], y[:6], strict=True):
            for _ in range(3 if evaluated else 0):
                with torch.no_grad():
                    reg.loss(xb, yb)
            optimizer.zero_grad()
            inside = reg.loss(xb, yb)
            with torch.no_grad():
                assert torch.equal(inside, reg.loss(xb, yb))  # what training sees
            (nn.functional.cross_entropy(model(xb), yb) + inside).backward()
            optimizer.step()
        ends.append((weights(model), reg.state_dict()))
    assert torch.equal(ends[0][0], ends[1][0])
    for key, value in ends[0][1].items():
        assert torch.equal(value, ends[1][1][key]) if isinstance(value, torch.Tensor) else value == ends[1][1][key]


def test_an_evaluation_alone_is_no_term_in_the_loss() -> None:
    model, optimizer, reg = learning(LEARNING[0])
    start = memory(reg)
    x, y = (t[0] for t in batches(30))
    with torch.no_grad():
        reg.loss(x, y)
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match="did not act"):
        optimizer.step()
    assert torch.equal(start, memory(reg))


def test_a_state_saved_between_loss_and_step_is_of_before_the_step() -> None:
    x, y = batches(31)
    model, optimizer, reg = learning(LEARNING[1])
    run(model, optimizer, x[:2], y[:2], reg, use_loss=True)
    at = memory(reg)
    reg.loss(x[2], y[2])
    assert torch.equal(at, memory(reg))
    twin = learning(LEARNING[1])[2]
    twin.model.load_state_dict(model.state_dict())
    twin.load_state_dict(reg.state_dict())
    assert torch.equal(reg.loss(x[2], y[2]), twin.loss(x[2], y[2]))


def test_a_closure_learns_once_a_step() -> None:
    x, y = (t[0] for t in batches(32))
    model = mlp(26)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-12, max_iter=4, tolerance_change=0, tolerance_grad=0)
    reg = gs.Regularizer(model, f"1e-1*{LEARNING[0]}").attach(optimizer)
    plain = learning(LEARNING[0])[2]
    plain.loss(x, y)
    plain.step_count = 1  # so that the state is of after the step

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    # the weights move by 1e-12 and less
    torch.testing.assert_close(memory(reg), memory(plain), rtol=1e-6, atol=1e-9)


def refusal(model: nn.Module, spec: str, **options) -> str:
    try:
        gs.Regularizer(model, spec, **options)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("coupling", ["grad", "prox", "loss", "monitor"])
@pytest.mark.parametrize("name", registered())
def test_a_spec_tells_what_a_regularizer_takes(name: str, coupling: Coupling) -> None:
    """Each option alone, on a network that the energy can read: refused where it is not among those of the spec."""
    kinds = {"attention": nn.TransformerEncoderLayer(4, 2, 4), "conv": nn.Sequential(nn.Conv2d(2, 3, 3))}
    model = next((m for kind, m in kinds.items() if name.startswith(kind)), mlp(33, (6, 5, 4)))
    values = {"every": 2, "gap": 0.1, "select": "*", "schedule": "linear:3"}
    for energy in registered()[name].examples():
        spec = f"{energy!r}@{coupling}"
        acts = not refusal(model, spec)
        assert acts == ("coupling" in taken(parse(repr(energy)), coupling))
        for option, value in values.items() if acts else ():
            found = refusal(model, spec, **{option: value})
            assert found.startswith(f"{option}={value!r} plays no part" if found else "")
            assert (not found) == (option in taken(parse(spec)))
