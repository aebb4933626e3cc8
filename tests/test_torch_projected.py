"""Weights by rules in a subspace: the path is the rule's own, whatever happens around it."""

import io
import math
from functools import partial

import pytest
import torch
from test_projected import RULES
from torch import nn
from two_processes import RANKS, gathered, resumed, run, sharded, train_sharded

from lowrank_sp.torch import FactorOptimizer, ProjectedOptimizer, batches, lora_pairs
from lowrank_sp.updates import LORO, Every, GaLore

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


class Net(nn.Sequential):
    """Wide, tall and square weights, two of them alike; biases and a norm are no matrices."""

    def __init__(self, seed=0, dtype=torch.float64, hidden=8):
        torch.manual_seed(seed)
        super().__init__(
            nn.Linear(6, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, 5),
        )
        self.to(dtype)

    def loss(self, rows=slice(None)):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(16, 5, generator=generator, dtype=torch.float64)
        dtype = self[-1].bias.dtype
        return ((self(x[rows].to(dtype)) - y[rows].to(dtype)) ** 2).mean()


def optimizer_of(net, rule, **options):
    return ProjectedOptimizer(net.named_parameters(), rule, **options)


def train(net, optimizer, steps=8, each=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss().backward()
        optimizer.step()
        each()
    return net


def assert_same(net, other, tol=1e-9):
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.linalg.norm(a - b) <= tol * torch.linalg.norm(a)


def assert_equal(net, other):
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def by_hand(net, rule, steps=8, lrs=None):
    """The rule weight by weight, and AdamW of PyTorch for the rest."""
    weights = [p for p in net.parameters() if p.ndim == 2]
    others = torch.optim.AdamW([p for p in net.parameters() if p.ndim != 2])
    states = [rule.init(w, index=i, count=len(weights)) for i, w in enumerate(weights)]
    for step in range(steps):
        net.zero_grad()
        net.loss().backward()
        others.step()
        with torch.no_grad():
            for i, w in enumerate(weights):
                lr = rule.lr if lrs is None else lrs[step]
                new, states[i] = rule.step(w, w.grad, states[i], lr=lr)
                w.copy_(new)
    return net


@every_rule
def test_path_is_that_of_the_rule_weight_by_weight(rule, monkeypatch):
    expected = by_hand(Net(), rule)
    net = Net()
    assert_same(train(net, optimizer_of(net, rule)), expected)
    assert net.loss() < Net().loss() or rule is RULES["LoQT, quantized"]
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1)
    net = Net()
    assert_same(train(net, optimizer_of(net, rule)), expected)


@every_rule
def test_resumed_run_follows_the_same_path(rule):
    whole = Net()
    train(whole, optimizer_of(whole, rule), 12)
    first = Net()
    optimizer = optimizer_of(first, rule)
    train(first, optimizer, 5)
    file = io.BytesIO()
    torch.save({"net": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Net(seed=1)
    optimizer = optimizer_of(second, rule)
    second.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    assert_equal(train(second, optimizer, 7), whole)


def test_learning_rate_schedules():
    rule, net = RULES["GaLore"], Net()
    optimizer = optimizer_of(net, rule)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda k: 0.5**k, lambda _: 1.0])
    train(net, optimizer, each=schedule.step)
    assert_same(net, by_hand(Net(), rule, lrs=[rule.lr * 0.5**k for k in range(8)]))


def test_groups_and_others():
    net = Net()
    rule = GaLore(rank=3, lr=0.05)
    optimizer = ProjectedOptimizer(
        [{"params": [net[0].weight], "lr": 0.0}, {"params": [net[2].weight, net[2].bias]}],
        rule,
        others=[{"params": net.parameters(), "lr": 0.3, "weight_decay": 0.0}],
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.05, 0.3]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train(net, optimizer, 1)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys() - {"0.weight"}
    # AdamW's first step is its learning rate, entry by entry; also of a matrix that is no weight.
    for name in ("6.weight", "6.bias"):
        p = dict(net.named_parameters())[name]
        size = abs(p.grad) / (abs(p.grad) + 1e-8)
        torch.testing.assert_close(p.detach(), before[name] - 0.3 * size * p.grad.sign())
    assert "basis" in optimizer.state[net[2].weight]
    assert "basis" not in optimizer.state[net[6].weight]


def test_without_names_and_without_others():
    net, named = Net(), Net()
    weights = [p for p in net.parameters() if p.ndim == 2]
    optimizer = ProjectedOptimizer(weights, RULES["GaLore"])
    assert len(optimizer.param_groups) == 1
    named_optimizer = optimizer_of(named, RULES["GaLore"])
    net.loss().backward()
    optimizer.step()
    train(named, named_optimizer, 1)
    for p, q in zip(weights, [q for q in named.parameters() if q.ndim == 2], strict=True):
        assert torch.equal(p, q)


def test_renewals_are_spread_over_the_layers():
    net = Net()
    optimizer = optimizer_of(net, GaLore(rank=2, when=Every(8)))
    weights = [p for p in net.parameters() if p.ndim == 2]
    renewed = []
    for _ in range(9):
        train(net, optimizer, 1)
        renewed.append([int(optimizer.state[w]["renewals"]) for w in weights])
    steps = [[row[i] for row in renewed].index(2) for i in range(1, 4)]
    assert renewed[0] == [1, 1, 1, 1]
    assert steps == [6, 4, 2]
    assert renewed[-1][0] == 2
    assert renewed[-2][0] == 1


def test_memory_of_the_state():
    """GaLore keeps ``s r + 2 l r`` numbers where Adam keeps ``2 m n``."""
    net = Net(hidden=64)
    optimizer = optimizer_of(net, GaLore(rank=4))
    train(net, optimizer, 1)
    state = optimizer.state[net[2].weight]
    assert sum(x.numel() for x in state.values() if x.ndim) == 3 * 64 * 4
    assert all(x.untyped_storage().nbytes() <= 3 * 64 * 64 * 8 for x in state.values())


@pytest.mark.parametrize("name", ["Fira", "Q-GaLore"])
def test_compiled_step(name, monkeypatch):
    # Traced as a whole, but not translated to machine code, which takes a minute.
    graphs = []

    def as_it_is(graph, inputs):  # noqa: ARG001
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=as_it_is, fullgraph=True))
    rule, net, expected = RULES[name], Net(), Net()
    train(expected, optimizer_of(expected, rule))
    train(net, optimizer_of(net, rule, compile=True))
    assert_same(net, expected)
    # One for each shape of the batches, whatever the step.
    assert len(graphs) == 3


def test_zero_gradient_at_a_renewal_is_reported():
    net = Net()
    optimizer = optimizer_of(net, GaLore(rank=2, lr=0.05, when=Every(2)))
    train(net, optimizer, 8)
    assert optimizer.kept == {}
    old = optimizer.state[net[2].weight]["basis"].clone()
    for _ in range(3):
        optimizer.zero_grad()
        net.loss().backward()
        net[2].weight.grad.zero_()
        optimizer.step()
    assert optimizer.kept.keys() == {"2.weight"}
    assert optimizer.kept["2.weight"] >= 2
    assert torch.equal(optimizer.state[net[2].weight]["basis"], old)
    train(net, optimizer, 1)
    assert not torch.equal(optimizer.state[net[2].weight]["basis"], old)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_step_with_a_bad_gradient_is_skipped_and_counted(bad):
    rule = RULES["Fira"]
    net, expected = Net(), Net()
    train(expected, optimizer_of(expected, rule), 2)
    optimizer = optimizer_of(net, rule)
    for step in range(4):
        optimizer.zero_grad()
        net.loss().backward()
        if step in (0, 2):
            net[2].weight.grad[1, 1] = bad
        optimizer.step()
    assert_equal(net, expected)
    assert optimizer.skipped == 2


def test_half_precision_keeps_a_copy():
    half = Net(dtype=torch.float32).bfloat16()
    single = Net(dtype=torch.float32).bfloat16().float()
    optimizers = [optimizer_of(net, RULES["GaLore"]) for net in (half, single)]
    for step in range(6):
        for net, optimizer in zip((half, single), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
            optimizer.step()
    for p, q in zip(half.parameters(), single.parameters(), strict=True):
        if p.ndim == 2:
            assert p.dtype == torch.bfloat16
            assert torch.equal(p, q.bfloat16())
            assert torch.equal(optimizers[0].state[p]["weight_float32"], q)


def test_state_of_another_model():
    net = Net()
    optimizer = optimizer_of(net, RULES["GaLore"])
    train(net, optimizer, 2)
    saved = optimizer.state_dict()
    other = Net(hidden=9)
    with pytest.raises(
        ValueError, match=r"moment_mean of shape \(3, 9\) for 0.weight, got \(3, 8\)"
    ):
        optimizer_of(other, RULES["GaLore"]).load_state_dict(saved)
    rank = GaLore(rank=2, lr=0.05, scale=1.0, when=Every(3))
    with pytest.raises(ValueError, match=r"basis of shape \(6, 2\) for 0.weight, got \(6, 3\)"):
        optimizer_of(Net(), rank).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"must be of Fira, got one of GaLore"):
        optimizer_of(Net(), RULES["Fira"]).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"must have path of shape"):
        optimizer_of(Net(), RULES["Lotus"]).load_state_dict(saved)
    # A refused state leaves the optimizer as it was.
    expected = Net()
    cut = {**saved["state"], 0: {**saved["state"][0], "basis": torch.ones(1, 3)}}
    with pytest.raises(ValueError, match=r"load the state"):
        optimizer.load_state_dict({**saved, "state": cut})
    train(net, optimizer, 2)
    train(expected, optimizer_of(expected, RULES["GaLore"]), 4)
    assert_equal(net, expected)


def test_state_of_another_model_of_adapters():
    class Adapter(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.ones(m, 2)), nn.Parameter(torch.ones(2, 5))
            self.scale = 1.0

    def optimizer(m, rule):
        net = Adapter(m)
        other = nn.Parameter(torch.ones(3))
        for p in (net.up, net.down, other):
            p.grad = torch.ones_like(p)
        made = FactorOptimizer(lora_pairs(net), rule, others=[other])
        made.step()
        return made

    good, bad = optimizer(4, LORO()), optimizer(6, LORO())
    good.load_state_dict(good.state_dict())
    with pytest.raises(ValueError, match=r"up_mean of shape \(4, 2\) for , got \(6, 2\)"):
        good.load_state_dict(bad.state_dict())
    others = bad.state_dict()
    others = {**others, "state": {2: {**others["state"][2], "exp_avg": torch.ones(2)}}}
    with pytest.raises(ValueError, match=r"exp_avg of shape \(3,\), got \(2,\)"):
        good.load_state_dict(others)


def test_bad_parameters():
    with pytest.raises(ValueError, match=r"at least one matrix that requires a gradient"):
        ProjectedOptimizer([nn.Parameter(torch.ones(3))], GaLore(rank=1))
    with pytest.raises(
        ValueError, match=r"rank must be in 1\.\.5 for 6.weight of shape 5 x 8, got 6"
    ):
        optimizer_of(Net(), GaLore(rank=6))
    weight = nn.Parameter(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"may be given once, got one as a and as b"):
        ProjectedOptimizer([("a", weight), ("b", weight)], GaLore(rank=1))


@pytest.mark.parametrize(
    ("optimizer", "rule", "message"),
    [
        (ProjectedOptimizer, GaLore, r"got the class GaLore; pass GaLore\(\)"),
        (FactorOptimizer, LORO, r"got the class LORO; pass LORO\(\)"),
        (ProjectedOptimizer, LORO(lr=0.01), "takes a ProjectedRule, got LORO; use FactorOptimizer"),
        (FactorOptimizer, GaLore(rank=1), "takes a Rule, got GaLore; use ProjectedOptimizer"),
        (FactorOptimizer, 0.1, "got float; see lowrank_sp.updates"),
    ],
)
def test_rules_of_the_other_kind_and_classes_are_refused(optimizer, rule, message):
    with pytest.raises(TypeError, match=message):
        optimizer([nn.Parameter(torch.ones(2, 3))], rule)


def test_loro_trains_pairs_of_factors():
    """It is a rule on pairs: the optimizer of adapters runs it."""

    class Factored(nn.Module):
        def __init__(self, n, m, rank):
            super().__init__()
            self.up = nn.Parameter(torch.randn(m, rank, dtype=torch.float64) / rank**0.5)
            self.down = nn.Parameter(torch.randn(rank, n, dtype=torch.float64) / n**0.5)
            self.scale = 1.0

        def forward(self, x):
            return x @ self.down.mT @ self.up.mT

    torch.manual_seed(0)
    net = nn.Sequential(Factored(6, 8, 3), nn.Tanh(), Factored(8, 5, 3))
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randn(20, 5, dtype=torch.float64)
    optimizer = FactorOptimizer(lora_pairs(net), LORO(lr=0.02, period=5, lazy=1.0))
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(((net(x) - y) ** 2).mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    up, down = net[0].up.detach(), net[0].down.detach()
    assert torch.linalg.norm(up.mT @ up - down @ down.mT) <= 1e-10 * torch.linalg.norm(up) ** 2


# Two processes


def net_of(mesh, seed=0):
    return sharded(Net(seed), mesh, nn.Linear)


def paths_agree(mesh):
    for name in ("GaLore", "Lotus", "Fira", "APOLLO", "APOLLO-Mini", "LoQT", "Q-GaLore"):
        rule = RULES[name]
        net, expected = net_of(mesh), Net()
        optimizer = optimizer_of(net, rule)
        train_sharded(net, optimizer, 5)
        train(expected, optimizer_of(expected, rule), 5)
        assert_same(gathered(Net(), net), expected)
        mean = optimizer.state[net[2].weight]["moment_mean"]
        # The ranks share the moments of each weight.
        assert mean.to_local().numel() == mean.numel() // RANKS


def resumed_run_agrees(mesh):
    rule = RULES["GaLore"]
    expected = Net()
    train(expected, optimizer_of(expected, rule), 6)
    net = resumed(partial(net_of, mesh), partial(optimizer_of, rule=rule), 4, 2)
    assert_same(gathered(Net(), net), expected)


def test_two_processes(tmp_path):
    run([paths_agree, resumed_run_agrees], tmp_path)
