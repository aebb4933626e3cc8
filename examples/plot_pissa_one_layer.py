"""
Four ways to start an adapter
=============================

A LoRA layer computes ``(residual + scale * up @ down) x``. An initializer decides what the adapter
holds at step zero, and moves the rest into the frozen residual. Here plain LoRA, PiSSA, MiLoRA and
OLoRA start on one weight with the spectrum of a trained layer, and we look at what each of them
leaves frozen and which gradient each adapter sees first.
"""

# %%
# One weight
# ----------
#
# Sixty-four spikes that decay as ``8 j^-0.6``, over a Gaussian bulk of norm 2.

import matplotlib.pyplot as plt
import numpy as np

import lowrank_sp as lr
from lowrank_sp.adapters import initializers

rng = np.random.default_rng(0)
m, n, rank = 768, 512, 32
u, _ = np.linalg.qr(rng.standard_normal((m, 64)))
v, _ = np.linalg.qr(rng.standard_normal((n, 64)))
bulk = rng.standard_normal((m, n)) * 2 / (m**0.5 + n**0.5)
weight = (bulk + (u * 8 * np.arange(1, 65) ** -0.6) @ v.T).astype(np.float32)

methods = ("lora", "pissa", "milora", "olora")
starts = {name: initializers.INITIALIZERS[name](weight, rank, rng=0) for name in methods}

# %%
# The law that every initializer keeps
# ------------------------------------
#
# Whatever the method, nothing is lost: ``weight == residual + scale * up @ down`` to rounding.

for name, start in starts.items():
    total = start.residual + start.delta().to_dense()
    print(f"{name:7s} relative error {lr.relative_error(total, weight):.1e}")

# %%
# What stays frozen
# -----------------
#
# PiSSA takes the head of the spectrum: its residual starts at ``sigma_33``. MiLoRA takes the last
# 32 values and leaves the others as they are. OLoRA projects the weight onto its own first 32
# columns, which is no cut through the spectrum: the ``i``-th value of the residual lies between
# ``sigma_(i+32)`` and ``sigma_i``. All three residuals have rank 480; the zeros are off the figure.

original = lr.singular_values(weight)
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
ax.plot(np.arange(1, n + 1), original, color="0.75", linewidth=5, label="weight, and LoRA residual")
for name, color in (("pissa", "C0"), ("milora", "C2"), ("olora", "C1")):
    s = lr.singular_values(starts[name].residual)
    ax.plot(np.arange(1, n + 1), s, color=color, linewidth=1.6, label=f"{name} residual")
ax.set(yscale="log", ylim=(0.05, 12), xlabel="index", ylabel="singular value of the residual")
ax.legend(frameon=False)

# %%
# How much each adapter holds
# ---------------------------

for name, start in starts.items():
    share = (start.delta().norm() / np.linalg.norm(weight)) ** 2
    print(f"{name:7s} holds {share:7.2%} of ||W||_F^2")

# %%
# The first gradient
# ------------------
#
# With a loss of gradient ``G`` in the weight, the factors receive ``G down^T`` and ``up^T G``,
# times the scale. One step of plain gradient descent at rate ``lr`` then changes the weight by
#
# .. math:: -\mathrm{lr}\, s^2 \left( G A^T A + B B^T G \right) + O(\mathrm{lr}^2)
#
# For a random target ``W + 0.1 E`` and the loss ``||W x - y||^2 / 2`` the figure shows the singular
# values of that first change, per unit of ``lr``. Plain LoRA moves through ``down`` alone, since
# ``up`` is zero, so its change has rank 32 instead of 64. PiSSA multiplies the gradient by leading
# singular values and MiLoRA by trailing ones; OLoRA puts all of the weight's size into ``down``, so
# the gradient is multiplied by squares. At one learning rate these are very different steps, and a
# comparison of the methods has to tune it for each of them.

inputs = rng.standard_normal((n, 2048)).astype(np.float32)
error = 0.1 * rng.standard_normal((m, n)).astype(np.float32) / np.float32(n**0.5)
gradient = -error @ (inputs @ inputs.T) / 2048

fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for (name, start), color in zip(starts.items(), ("0.4", "C0", "C2", "C1"), strict=True):
    through_down = lr.LowRank(gradient @ start.down.T, start.down)
    through_up = lr.LowRank(start.up, start.up.T @ gradient)
    change = start.scale**2 * (through_down + through_up)
    s = change.svd().s
    s = s[s > 1e-5 * s[0]]
    ax.plot(np.arange(1, len(s) + 1), s, "-", marker=".", color=color, label=name)
ax.set(yscale="log", xlabel="index", ylabel="singular value of the first change / lr")
ax.legend(frameon=False)
