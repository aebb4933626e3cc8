"""Two real processes: sharded factors take the path that whole ones take in one process."""

import math
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_torch_optim import Adapter, Net, assert_same, optimizer_of, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from update_cases import RULES

from lowrank_sp.adapters import forms
from lowrank_sp.torch import FactorOptimizer, ParameterPair, attach, attach_shared
from lowrank_sp.updates import LoRARite, ScaledGD

RANKS = 2
#: By entries, by Grams, by frames and by polar factors.
NAMES = ["AltLoRA+", "ScaledGD", "Riemannian, momentum", "LoRA-RITE", "LoRA-Muon"]
WHOLE = StateDictOptions(full_state_dict=True)


def sharded(mesh, seed=0):
    """The model under FSDP2, which cuts seven rows and a rank of three unevenly."""
    net = Net(seed)
    for layer in net:
        if isinstance(layer, Adapter):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    # Every rank sees its part of the data; FSDP2 takes the mean of their gradients.
    net.rows = slice(mesh.get_local_rank(), None, RANKS)
    return net


def train_sharded(net, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss(net.rows).backward()
        optimizer.step()
    return net


def gathered(net):
    """A model of one process with the parameters of a sharded one."""
    whole = Net()
    with torch.no_grad():
        for mine, theirs in zip(whole.parameters(), net.parameters(), strict=True):
            assert isinstance(theirs, DTensor)
            mine.copy_(theirs.full_tensor())
    return whole


def paths_agree(mesh):
    for name in NAMES:
        rule = RULES[name]
        net, expected = sharded(mesh), Net()
        train_sharded(net, optimizer_of(net, rule), 3)
        train(expected, optimizer_of(expected, rule), 3)
        assert_same(gathered(net), expected, what=name)


def resumed_run_agrees(mesh):
    rule = LoRARite(lr=0.05)
    expected = Net()
    train(expected, optimizer_of(expected, rule), 4)
    first = sharded(mesh)
    optimizer = optimizer_of(first, rule)
    train_sharded(first, optimizer, 2)
    saved = get_optimizer_state_dict(first, optimizer, options=WHOLE)
    second = sharded(mesh, seed=1)
    with torch.no_grad():
        for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
            mine.copy_(theirs)
    optimizer = optimizer_of(second, rule)
    set_optimizer_state_dict(second, optimizer, saved, options=WHOLE)
    train_sharded(second, optimizer, 2)
    assert_same(gathered(second), expected)


def ranks_skip_together(mesh):
    net = sharded(mesh)
    optimizer = optimizer_of(net, ScaledGD(lr=0.05))
    before = gathered(net)
    net.loss(net.rows).backward()
    if mesh.get_local_rank() == 1:
        net[0].up.grad.to_local()[0] = math.nan
    optimizer.step()
    assert optimizer.skipped == 1
    for p, q in zip(before.parameters(), gathered(net).parameters(), strict=True):
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


def each_rank(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(minutes=1),
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    paths_agree(mesh)
    resumed_run_agrees(mesh)
    ranks_skip_together(mesh)
    only_small_sums_are_exchanged(mesh)
    attached_forms_agree(mesh)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.spawn(each_rank, args=(f"file://{tmp_path / 'rendezvous'}",), nprocs=RANKS)
