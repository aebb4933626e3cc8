"""One optimizer for all rules: the path is the rule's own, whatever happens around it."""

import io
import math
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import nn
from update_cases import RULES

from lowrank_sp import updates
from lowrank_sp.torch import FactorOptimizer, ParameterPair, batches, lora_pairs
from lowrank_sp.torch.host import with_numpy
from lowrank_sp.updates.wrappers import Wrapper

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
some_rules = pytest.mark.parametrize(
    "rule",
    [updates.ScaledGD(lr=0.05), updates.AdamW(lr=0.05), updates.LoRARite(lr=0.05)],
    ids=lambda rule: type(rule).__name__,
)


class Adapter(nn.Module):
    def __init__(self, n, m, rank, scale, dtype):
        super().__init__()
        up, _ = torch.linalg.qr(torch.randn(m, rank, dtype=dtype))
        down, _ = torch.linalg.qr(torch.randn(n, rank, dtype=dtype))
        self.up, self.down = nn.Parameter(up.contiguous()), nn.Parameter(down.mT.contiguous())
        self.scale = scale

    def forward(self, x):
        return x + self.scale * (x @ self.down.mT @ self.up.mT)


class Net(nn.Sequential):
    """Three adapters, two of them alike, and a layer that is not one."""

    def __init__(self, seed=0, dtype=torch.float64):
        torch.manual_seed(seed)
        super().__init__(
            Adapter(7, 7, 2, 0.5, dtype),
            nn.Tanh(),
            Adapter(7, 7, 3, 1.5, dtype),
            nn.Tanh(),
            Adapter(7, 7, 2, 0.5, dtype),
            nn.Linear(7, 4, dtype=dtype),
        )

    def loss(self, rows=slice(None)):
        dtype = self[0].up.dtype
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(16, 7, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randn(16, 4, generator=generator, dtype=torch.float64).to(dtype)
        return ((self(x[rows]) - y[rows]) ** 2).mean()


def optimizer_of(net, rule, **options):
    return FactorOptimizer(lora_pairs(net), rule, others=net.parameters(), **options)


def train(net, optimizer, steps=4, each=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss().backward()
        optimizer.step()
        each()
    return net


def products(net):
    """What the model computes with, and no gauge: the products of the pairs, and the others."""
    pairs = lora_pairs(net)
    factors = {factor for pair in pairs for factor in pair.factors}
    others = [p.detach() for p in net.parameters() if p not in factors]
    return [pair.delta().detach() for pair in pairs] + others


def assert_same(net, other, tol=1e-10, what=""):
    for a, b in zip(products(net), products(other), strict=True):
        assert torch.linalg.norm(a - b) <= tol * torch.linalg.norm(a), what


def assert_equal(net, other):
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def by_hand(net, rule, steps=4, lrs=None):
    """The rule pair by pair, and AdamW of PyTorch for the rest."""
    pairs = lora_pairs(net)
    factors = {factor for pair in pairs for factor in pair.factors}
    others = torch.optim.AdamW([p for p in net.parameters() if p not in factors])
    states = {}
    # By the same library: where a rule decides by what is larger, rounding may settle a tie.
    move = with_numpy(rule.step)
    for step in range(steps):
        net.zero_grad()
        net.loss().backward()
        others.step()
        with torch.no_grad():
            for pair in pairs:
                if pair.name not in states:
                    states[pair.name] = rule.init(pair.up, pair.down)
                up, down, states[pair.name] = move(
                    pair.up.detach(),
                    pair.down.detach(),
                    pair.up.grad,
                    pair.down.grad,
                    states[pair.name],
                    scale=pair.scale,
                    lr=rule.lr if lrs is None else lrs[step],
                )
                pair.up.copy_(up)
                pair.down.copy_(down)
    return net


@every_rule
def test_path_is_that_of_the_rule_pair_by_pair(rule, monkeypatch):
    expected = by_hand(Net(), rule)
    net = Net()
    assert_same(train(net, optimizer_of(net, rule)), expected)
    assert net.loss() < Net().loss()
    # Batches of one, as for factors that fill the cache.
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1)
    net = Net()
    assert_same(train(net, optimizer_of(net, rule)), expected)


@dataclass(frozen=True)
class Failing(updates.ScaledGD):
    """Fails at rank three, and keeps what it saw of threads."""

    seen: list[int] = field(default_factory=list)

    def step(self, up, *others, **numbers):
        self.seen.append(torch.get_num_threads())
        if up.shape[-1] == 3:
            raise ZeroDivisionError
        return super().step(up, *others, **numbers)


def test_batches_have_one_thread_each_and_the_caller_keeps_its_own(monkeypatch):
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1)
    net, before = Net(), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rule = Failing()
        optimizer = optimizer_of(net, rule)
        net.loss().backward()
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert set(rule.seen) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@every_rule
def test_resumed_run_follows_the_same_path(rule):
    whole = Net()
    train(whole, optimizer_of(whole, rule), 6)
    first = Net()
    optimizer = optimizer_of(first, rule)
    train(first, optimizer, 3)
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Net(seed=1)
    optimizer = optimizer_of(second, rule)
    second.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    assert_equal(train(second, optimizer, 3), whole)


@some_rules
def test_learning_rate_schedules(rule):
    net = Net()
    optimizer = optimizer_of(net, rule)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 0.5**k, lambda _: 1.0])
    train(net, optimizer, each=schedule.step)
    assert_same(net, by_hand(Net(), rule, lrs=[rule.lr * 0.5**k for k in range(4)]))


def test_groups_with_options_of_their_own():
    net = Net()
    first, *rest = lora_pairs(net)
    rule = updates.ScaledGD(lr=0.05)
    bias = {"params": [net[-1].bias], "lr": 0.3, "weight_decay": 0.0}
    optimizer = FactorOptimizer(
        [{"pairs": [first], "lr": 0.0}, {"pairs": rest}], rule, others=[bias]
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.05, 0.3]
    before = [p.detach().clone() for p in (*first.factors, net[-1].weight, net[-1].bias)]
    train(net, optimizer, 1)
    now = (*first.factors, *net[-1].parameters())
    moved = [not torch.equal(p, q) for p, q in zip(now, before, strict=True)]
    assert moved == [False, False, False, True]
    assert_first_step_of_adam(net[-1].bias, before[-1], 0.3)
    optimizer.add_param_group({"params": [net[-1].weight], "lr": 0.1, "weight_decay": 0.0})
    train(net, optimizer, 1)
    assert_first_step_of_adam(net[-1].weight, before[-2], 0.1)


def assert_first_step_of_adam(p, before, lr):
    """Every entry moves by the learning rate, against its gradient ``g``, times ``1 - eps / g``."""
    size = abs(p.grad) / (abs(p.grad) + 1e-8)
    torch.testing.assert_close(p.detach(), before - lr * size * p.grad.sign())


def test_others_are_moved_by_adamw_of_pytorch():
    net, reference = Net(), nn.Linear(7, 4, dtype=torch.float64)
    reference.load_state_dict(net[-1].state_dict())
    options = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2}
    optimizer = FactorOptimizer(
        lora_pairs(net), updates.ScaledGD(), others=[{"params": net.parameters(), **options}]
    )
    expected = torch.optim.AdamW(reference.parameters(), **options)
    for _ in range(3):
        optimizer.zero_grad()
        net.loss().backward()
        for p, q in zip(reference.parameters(), net[-1].parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        expected.step()
    assert_equal(net[-1], reference)


def test_closure_is_called_with_gradients_and_its_loss_returned():
    rule = updates.AdamW(lr=0.05)
    net, expected = Net(), Net()
    train(expected, optimizer_of(expected, rule))
    optimizer = optimizer_of(net, rule)
    losses = []

    def closure():
        optimizer.zero_grad()
        losses.append(net.loss())
        losses[-1].backward()
        return losses[-1]

    with torch.no_grad():
        assert [optimizer.step(closure) for _ in range(4)] == losses
    assert_equal(net, expected)


def test_accumulated_gradients():
    rule = updates.ScaledGD(lr=0.05)
    net, expected = Net(), Net()
    train(expected, optimizer_of(expected, rule))
    optimizer = optimizer_of(net, rule)
    for _ in range(4):
        optimizer.zero_grad()
        for half in (slice(0, 8), slice(8, 16)):
            (net.loss(half) / 2).backward()
        optimizer.step()
    assert_same(net, expected)


def given_gradients(net, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)


@every_rule
def test_half_precision_follows_the_path_of_single_precision(rule):
    half = Net(dtype=torch.float32).bfloat16()
    single = Net(dtype=torch.float32).bfloat16().float()
    optimizers = [optimizer_of(net, rule) for net in (half, single)]
    for step in range(4):
        for net, optimizer in zip((half, single), optimizers, strict=True):
            given_gradients(net, step)
            optimizer.step()
    pairs = zip(lora_pairs(half), lora_pairs(single), strict=True)
    for p, q in pairs:
        for mine, theirs in zip(p.factors, q.factors, strict=True):
            assert mine.dtype == torch.bfloat16
            assert torch.equal(mine, theirs.bfloat16())
    # Saved and loaded, the state is in single precision still.
    again = optimizer_of(half, rule)
    again.load_state_dict(optimizers[0].state_dict())
    for pair in lora_pairs(half):
        saved, loaded = optimizers[0].state[pair.up], again.state[pair.up]
        assert saved.keys() == loaded.keys()
        for name, x in saved.items():
            assert x.dtype in (torch.float32, torch.int32)
            assert torch.equal(x, loaded[name])
            assert x.dtype == loaded[name].dtype


def test_half_precision_sees_what_others_write():
    net = Net(dtype=torch.float32).bfloat16()
    optimizer = optimizer_of(net, updates.GradientDescent(lr=1e-4))
    [pair, *_] = lora_pairs(net)
    given_gradients(net, 0)
    optimizer.step()
    with torch.no_grad():
        pair.up[0] = 7.0
    given_gradients(net, 1)
    optimizer.step()
    exact = optimizer.state[pair.up]["up_float32"]
    torch.testing.assert_close(exact[0], 7.0 - 1e-4 * pair.up.grad[0].float())


def test_gradient_scaler():
    rule = updates.AdamW(lr=0.05)
    net, expected = Net(dtype=torch.float32), Net(dtype=torch.float32)
    train(expected, optimizer_of(expected, rule), 3)
    optimizer = optimizer_of(net, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(net.loss()).backward()
        if step in (0, 3):
            net[2].down.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**18
    assert_equal(net, expected)
    assert optimizer.skipped == 0


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_step_with_a_bad_gradient_is_skipped_and_counted(rule, bad):
    net, expected = Net(), Net()
    train(expected, optimizer_of(expected, rule), 2)
    optimizer = optimizer_of(net, rule)
    for step in range(4):
        optimizer.zero_grad()
        net.loss().backward()
        if step in (0, 2):
            where = net[-1].weight if step else net[2].down
            where.grad[1, 1] = bad
        optimizer.step()
    assert_equal(net, expected)
    assert optimizer.skipped == 2
    other = optimizer_of(net, rule)
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped == 2


def test_large_gradients_in_half_precision_are_good():
    big = torch.full((300, 300), 6e4, dtype=torch.float16)
    assert batches.all_finite([big, -big])
    assert not batches.all_finite([big, big * 2])


@every_rule
def test_frozen_factor(rule):
    net = Net()
    net[2].down.requires_grad_(False)
    if rule.joint:
        with pytest.raises(ValueError, match=r"moves both factors together.* in 2; freeze"):
            optimizer_of(net, rule)
        net[2].down.requires_grad_(True)
        optimizer = optimizer_of(net, rule)
        net.loss().backward()
        net[2].down.grad = None
        with pytest.raises(ValueError, match=r"moves both factors together.* in 2; freeze"):
            optimizer.step()
        return
    before = net[2].down.clone()
    train(net, optimizer_of(net, rule))
    assert torch.equal(net[2].down, before)
    assert not torch.equal(net[2].up, Net()[2].up)


def test_pair_without_gradients_stays():
    net = Net()
    optimizer = optimizer_of(net, updates.AdamW(weight_decay=0.5))
    net.loss().backward()
    net[2].up.grad = net[2].down.grad = None
    optimizer.step()
    assert torch.equal(net[2].up, Net()[2].up)
    assert not torch.equal(net[0].up, Net()[0].up)


@some_rules
def test_batches_that_change(rule, monkeypatch):
    def path():
        net = Net()
        optimizer = optimizer_of(net, rule)
        for step in range(6):
            optimizer.zero_grad()
            net.loss().backward()
            if step == 2:
                net[0].up.grad = net[0].down.grad = None
            if step == 4:
                # The pairs that are alike, in the other order.
                optimizer._items[0].reverse()
            optimizer.step()
        return net

    together = path()
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1)
    assert_same(together, path())


@every_rule
def test_zero_gradients_and_rank_deficient_factors(rule):
    net = Net()
    with torch.no_grad():
        net[0].up.zero_()
        net[2].down[1] = net[2].down[0]
    optimizer = optimizer_of(net, rule)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    train(net, optimizer, 2)
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("name", [name for name in RULES if isinstance(RULES[name], Wrapper)])
def test_settled_factors_are_those_of_the_rule(name):
    rule, net = RULES[name], Net()
    optimizer = optimizer_of(net, rule)
    train(net, optimizer, 3)
    expected = [rule.settle(*pair.factors, optimizer.state[pair.up]) for pair in lora_pairs(net)]
    optimizer.settle()
    for pair, factors in zip(lora_pairs(net), expected, strict=True):
        assert all(map(torch.equal, pair.factors, factors))


def test_settling_undoes_the_perturbation():
    rule = updates.SAM(updates.ScaledGD(lr=0.05), rho=0.5)
    net = Net()
    optimizer = optimizer_of(net, rule)
    train(net, optimizer, 1)
    assert not torch.equal(net[2].up, Net()[2].up)
    optimizer.settle()
    assert torch.equal(net[2].up, Net()[2].up)


def test_kernels_are_read_as_matrices():
    torch.manual_seed(0)
    up, down = torch.randn(4, 2), torch.randn(2, 3 * 5 * 5)
    flat = ParameterPair("flat", nn.Parameter(up), nn.Parameter(down), 0.5)
    kernel = ParameterPair(
        "kernel",
        nn.Parameter(up.reshape(4, 2, 1, 1)),
        nn.Parameter(down.reshape(2, 3, 5, 5)),
        0.5,
    )
    for pair in (flat, kernel):
        pair.up.grad = torch.linspace(-1, 1, 8).reshape(pair.up.shape)
        pair.down.grad = torch.linspace(-1, 1, 150).reshape(pair.down.shape)
        FactorOptimizer([pair], updates.LoRAMuon()).step()
    assert torch.equal(kernel.up.flatten(1), flat.up)
    assert torch.equal(kernel.down.flatten(1), flat.down)


@pytest.mark.parametrize(
    ("rule", "times"), [(updates.ScaledGD(lr=0.05), 1), (updates.AltLoRA(lr=0.05), 2)]
)
def test_compiled_step(rule, times, monkeypatch):
    # Traced as a whole and once, or twice where the first step changes the layout of the state; but
    # not translated to machine code, which takes a minute.
    graphs = []

    def as_it_is(graph, inputs):  # noqa: ARG001
        graphs.append(graph)
        return graph.forward

    whole = partial(torch.compile, backend=as_it_is, fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    net, expected = Net(), Net()
    net[4].scale = expected[4].scale = 0.7
    for model, options in ((net, {"compile": True}), (expected, {})):
        pairs = [pair for pair in lora_pairs(model) if pair.rank == 2]
        optimizer = FactorOptimizer(pairs, rule, **options)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        train(model, optimizer, 3, each=schedule.step)
    assert_same(net, expected)
    assert len(graphs) == times


def test_one_factor_in_two_pairs():
    first, _, second = lora_pairs(Net())
    tied = ParameterPair("tied", first.up, second.down)
    with pytest.raises(ValueError, match=r"may belong to one pair, got one in 0 and in tied"):
        FactorOptimizer([first, tied], updates.ScaledGD())
    with pytest.raises(ValueError, match=r"may belong to one pair, got one in tied and in 0"):
        FactorOptimizer([{"pairs": [tied]}, {"pairs": [first]}], updates.ScaledGD())


def test_no_pairs():
    for pairs in ([], [{"pairs": []}]):
        with pytest.raises(ValueError, match=r"at least one pair; see lora_pairs\(model\)"):
            FactorOptimizer(pairs, updates.ScaledGD(), others=Net().parameters())


def test_state_of_another_rule():
    net = Net()
    saved = optimizer_of(net, updates.SAM(updates.ScaledGD())).state_dict()
    with pytest.raises(ValueError, match=r"must be of ScaledGD, got one of SAM\(ScaledGD\)"):
        optimizer_of(net, updates.ScaledGD()).load_state_dict(saved)
