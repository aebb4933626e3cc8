"""
Pre-training a small language model
===================================

A transformer that reads bytes learns to write Python from the sources of the standard library, from
random weights, five times: by AdamW, by three rules that keep Adam's moments in a subspace of each
gradient (GaLore, Fira, APOLLO), and by LORO, whose weights are products of two factors. We compare
losses, and the memory of optimizer and weights.

It needs PyTorch: ``python -m pip install ".[torch]"``.
"""

# %%
# Text that everybody has at hand
# -------------------------------
#
# The sources of some modules; the last tenth is withheld.

import importlib.util
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_sp import updates
from lowrank_sp.torch import FactorOptimizer, ProjectedOptimizer, lora_pairs

MODULES = ("argparse", "ast", "inspect", "pathlib", "statistics", "tarfile", "typing", "zipfile")
sources = [Path(importlib.util.find_spec(name).origin).read_bytes() for name in MODULES]
parts = {True: [], False: []}
for source in sources:
    cut = len(source) * 9 // 10
    parts[True].append(source[:cut])
    parts[False].append(source[cut:])
text, withheld = (torch.tensor(list(b"".join(parts[seen]))) for seen in (True, False))
print(f"{len(text)} bytes to learn from, {len(withheld)} withheld")

# %%
# The model
# ---------
#
# Two blocks of width 48. ``linear`` makes their matrices: dense ones, or pairs of factors with
# attributes ``up``, ``down`` and ``scale``, by which :func:`~lowrank_sp.torch.pairs.lora_pairs`
# recognizes them.

WIDTH, CONTEXT, RANK = 48, 32, 12


class Factored(nn.Module):
    """A linear map whose weight is ``up @ down``, of the variance of ``nn.Linear``."""

    def __init__(self, n, m):
        super().__init__()
        self.up = nn.Parameter(torch.randn(m, RANK) / RANK**0.5)
        self.down = nn.Parameter(torch.randn(RANK, n) / (3 * n) ** 0.5)
        self.scale = 1.0

    def forward(self, x):
        return x @ self.down.T @ self.up.T


def dense(n, m):
    """A linear map with a dense weight."""
    return nn.Linear(n, m, bias=False)


class Block(nn.Module):
    """Attention and a hidden layer, each beside what it gets."""

    def __init__(self, linear):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.query, self.key, self.value, self.out = (linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.norms[0](x)
        maps = self.query, self.key, self.value
        heads = [apply(h).unflatten(-1, (4, -1)).transpose(1, 2) for apply in maps]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norms[1](x))))


class Model(nn.Module):
    """From bytes to scores of the next byte."""

    def __init__(self, linear):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(linear), Block(linear))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, x):
        h = self.bytes(x) + self.places.weight
        return self.head(self.norm(self.blocks(h)))


def batch_of(data, generator, size=16):
    """Pieces of the text, and the same one byte later."""
    starts = torch.randint(len(data) - CONTEXT - 1, (size,), generator=generator)
    rows = torch.stack([data[i : i + CONTEXT + 1] for i in starts])
    return rows[:, :-1], rows[:, 1:]


def loss_of(model, x, y):
    """Nats per byte."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


# %%
# Five optimizers
# ---------------
#
# Only the matrices of the blocks differ; embeddings, norms and head get AdamW everywhere. The rank
# is a quarter of the width. Subspaces are renewed every 40 steps, spread over the twelve weights.
# All learning rates fall along a cosine.

STEPS = 150


def others_of(model):
    """What AdamW gets: all that the rule does not take."""
    return [{"params": model.parameters(), "lr": 3e-3}]


def projected(rule):
    """The weights of the blocks by a rule on full weights."""
    return lambda model: ProjectedOptimizer(
        model.blocks.named_parameters(), rule, others=others_of(model)
    )


def factored(rule):
    """The factors of the blocks by a rule on pairs."""
    return lambda model: FactorOptimizer(lora_pairs(model), rule, others=others_of(model))


when = updates.Every(40)
methods = {
    "AdamW": (dense, lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3)),
    "GaLore": (dense, projected(updates.GaLore(RANK, lr=1e-2, scale=1.0, when=when))),
    "Fira": (dense, projected(updates.Fira(RANK, lr=3e-3, when=when))),
    "APOLLO": (dense, projected(updates.APOLLO(RANK, lr=3e-3, scale=2.0, when=when))),
    "LORO": (Factored, factored(updates.LORO(lr=3e-3, period=50, lazy=1.0))),
}


def train(linear, make):
    """Losses of the batches, the loss on what was withheld, and kilobytes of state and weights."""
    torch.manual_seed(0)
    model = Model(linear)
    optimizer = make(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-4)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, *batch_of(text, generator))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        held_out = loss_of(model, *batch_of(withheld, generator, 256)).item()
    matrices = {p for p in model.blocks.parameters() if p.ndim == 2}
    states = [x for p in matrices for x in optimizer.state[p].values()]
    sizes = (sum(x.numel() * x.element_size() for x in xs) / 1e3 for xs in (states, matrices))
    return losses, held_out, *sizes


results = {name: train(*method) for name, method in methods.items()}
print("           loss  withheld  kB of state  kB of weights")
for name, (losses, held_out, state, weights) in results.items():
    print(f"{name:8s} {sum(losses[-20:]) / 20:6.2f} {held_out:9.2f} {state:12.0f} {weights:14.0f}")

# %%
# Losses, and what they cost
# --------------------------

fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for (name, (losses, _, state, weights)), color in zip(
    results.items(), ("0.5", "C0", "C2", "C1", "C3"), strict=True
):
    smooth = torch.tensor(losses).unfold(0, 10, 1).mean(1)
    axes[0].plot(range(10, STEPS + 1), smooth, color=color, label=name)
    axes[1].barh(name, weights, color=color, alpha=0.35)
    axes[1].barh(name, state, left=weights, color=color)
axes[0].set(xlabel="step", ylabel="loss per byte, mean of ten batches", ylim=(None, 4))
axes[0].legend(frameon=False)
axes[1].set(xlabel="kilobytes: matrices (light), and what is kept of their gradients")
axes[1].invert_yaxis()

# %%
# The rules in subspaces learn as fast as AdamW here, with a third of its state. LORO pays in loss
# for the rank of its weights, which are less than half as large; its state is that of Adam on
# factors.
