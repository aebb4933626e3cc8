"""Two real processes: sharded factors take the path that whole ones take in one process."""

import math
from functools import partial

import torch
from test_torch_optim import Adapter, Net, assert_same, optimizer_of, train
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from two_processes import gathered, resumed, run, sharded, train_sharded
from update_cases import RULES

from lowrank_sp.adapters import forms
from lowrank_sp.torch import FactorOptimizer, ParameterPair, attach, attach_shared
from lowrank_sp.updates import LoRARite, ScaledGD

#: By entries, by Grams, by frames and by polar factors.
NAMES = ["AltLoRA+", "ScaledGD", "Riemannian, momentum", "LoRA-RITE", "LoRA-Muon"]


def net_of(mesh, seed=0):
    """Seven rows and a rank of three, which FSDP2 cuts unevenly."""
    return sharded(Net(seed), mesh, Adapter)


def paths_agree(mesh):
    for name in NAMES:
        rule = RULES[name]
        net, expected = net_of(mesh), Net()
        train_sharded(net, optimizer_of(net, rule), 3)
        train(expected, optimizer_of(expected, rule), 3)
        assert_same(gathered(Net(), net), expected, what=name)


def resumed_run_agrees(mesh):
    rule = LoRARite(lr=0.05)
    expected = Net()
    train(expected, optimizer_of(expected, rule), 4)
    net = resumed(partial(net_of, mesh), partial(optimizer_of, rule=rule), 2, 2)
    assert_same(gathered(Net(), net), expected)


def ranks_skip_together(mesh):
    net = net_of(mesh)
    optimizer = optimizer_of(net, ScaledGD(lr=0.05))
    before = gathered(Net(), net)
    net.loss(net.rows).backward()
    if mesh.get_local_rank() == 1:
        net[0].up.grad.to_local()[0] = math.nan
    optimizer.step()
    assert optimizer.skipped == 1
    for p, q in zip(before.parameters(), gathered(Net(), net).parameters(), strict=True):
        assert torch.equal(p, q)


class Exchange(CommDebugMode):
    """Counts the numbers in all-reduces too."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("_c10d_functional.all_reduce"):
            self.numbers += args[0].numel()
        return super().__torch_dispatch__(function, types, args, kwargs)


def only_small_sums_are_exchanged(mesh):
    """Of ``up`` nothing but ``r x r`` sums; ``down``, cut along the rank, is cut lengthwise."""
    m, n, rank = 512, 384, 4
    torch.manual_seed(0)
    up, down, grad_up, grad_down = (
        distribute_tensor(torch.randn(shape), mesh, [Shard(0)])
        for shape in ((m, rank), (rank, n), (m, rank), (rank, n))
    )
    pair = ParameterPair("pair", torch.nn.Parameter(up), torch.nn.Parameter(down))
    pair.up.grad, pair.down.grad = grad_up, grad_down
    with Exchange() as exchange:
        FactorOptimizer([pair], ScaledGD()).step()
    counts = {str(call).rpartition(".")[2]: n for call, n in exchange.get_comm_counts().items()}
    # Down, its gradient, and down back again.
    assert counts.pop("all_gather_into_tensor") == 3
    assert counts.keys() == {"all_reduce"}
    assert 2 * rank**2 <= exchange.numbers <= 10 * rank**2


class Blocks(nn.Module):
    """Layers in units of their own, as FSDP2 is usually applied."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


ATTACHED = [
    partial(attach, create=partial(forms.RowMagnitude.create, rank=3)),
    partial(attach_shared, create=partial(forms.SharedUp.create, rank=3)),
    partial(attach_shared, create=partial(forms.Tied.create, rank=3)),
]


def attached_forms_agree(mesh):
    """Those that read the weight, and those whose layers share arrays across units."""
    x, target = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    for attached in ATTACHED:
        models = [attached(Blocks(), targets="all-linear", rng=0) for _ in range(2)]
        whole, net = models
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        for model in models:
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(trained, lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                (model(x) - target).square().mean().backward()
                optimizer.step()
        for mine, theirs in zip(whole.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(theirs.full_tensor(), mine)


def test_two_processes(tmp_path):
    run(
        [
            paths_agree,
            resumed_run_agrees,
            ranks_skip_together,
            only_small_sums_are_exchanged,
            attached_forms_agree,
        ],
        tmp_path,
    )
