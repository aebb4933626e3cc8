"""Two real processes that share a model under FSDP2: what tests of optimizers do there."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh

RANKS = 2
WHOLE = StateDictOptions(full_state_dict=True)


def run(checks, folder):
    """Call every check, a function of a mesh at the top of its module, in both processes."""
    mp.spawn(_each_rank, args=(f"file://{folder / 'rendezvous'}", checks), nprocs=RANKS)


def _each_rank(rank, rendezvous, checks):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(minutes=1),
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    for check in checks:
        check(mesh)
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo may still let go of tensors, and abort if the interpreter is ending by then.
    os._exit(0)


def sharded(net, mesh, kind):
    """A model under FSDP2, with its layers of one kind in units of their own."""
    for layer in net:
        if isinstance(layer, kind):
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


def resumed(make, optimizer_of, before, after):
    """A model of the first seed, saved and put into one of the second, that went on from there."""
    first = make(0)
    optimizer = optimizer_of(first)
    train_sharded(first, optimizer, before)
    saved = get_optimizer_state_dict(first, optimizer, options=WHOLE)
    second = make(1)
    with torch.no_grad():
        for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
            mine.copy_(theirs)
    optimizer = optimizer_of(second)
    set_optimizer_state_dict(second, optimizer, saved, options=WHOLE)
    return train_sharded(second, optimizer, after)


def gathered(whole, net):
    """A model of one process, given the parameters of a sharded one."""
    with torch.no_grad():
        for mine, theirs in zip(whole.parameters(), net.parameters(), strict=True):
            assert isinstance(theirs, DTensor)
            mine.copy_(theirs.full_tensor())
    return whole
