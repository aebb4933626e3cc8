"""
An update rule under ``jax.jit``
================================

Rules are pure functions of arrays, so one training step, loss, gradient and rule together, is one
compiled function. Here two layers of a small network are adapted by LoRA pairs.

It needs JAX: ``python -m pip install ".[jax]"``.
"""

# %%
# A frozen network with two adapters
# ----------------------------------
#
# A teacher is the same network with weights moved by matrices of rank 2. Both pairs start, as
# usual, with ``up = 0``.

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from lowrank_sp import updates

width, rank, scale = 32, 4, 0.5
keys = jax.random.split(jax.random.key(0), 8)
weights = jax.random.normal(keys[0], (2, width, width)) / width**0.5
shift = jax.random.normal(keys[1], (2, width, 2)) @ jax.random.normal(keys[2], (2, 2, width))
teacher = weights + 0.3 * shift / width**0.5
inputs = jax.random.normal(keys[3], (256, width))


def network(weights, x):
    """Two layers."""
    return jnp.tanh(x @ weights[0].T) @ weights[1].T


targets = network(teacher, inputs)


def loss(up, down):
    """Mean square error; the pairs of both layers are one batch."""
    return jnp.mean((network(weights + scale * up @ down, inputs) - targets) ** 2)


# %%
# One step, compiled
# ------------------
#
# The learning rate is an argument, so that a schedule does not compile anew. The state is a dict of
# arrays, which JAX takes as it is.


def trainer(rule):
    """The compiled step of a rule."""

    @jax.jit
    def step(up, down, state, lr):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(up, down)
        up, down, state = rule.step(up, down, *grads, state, scale=scale, lr=lr)
        return up, down, state, value

    return step


rules = {
    "AdamW": updates.AdamW(lr=0.02),
    "LoRAPlus": updates.LoRAPlus(lr=0.01, ratio=4),
    "ScaledGD": updates.ScaledGD(lr=8.0),
    "LoRARite": updates.SkipNonFinite(updates.LoRARite(lr=0.03)),
    "LoRAMuon": updates.LoRAMuon(lr=0.3, polar=updates.newton_schulz),
}

steps = 200
fig, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
for name, rule in rules.items():
    up = jnp.zeros((2, width, rank))
    down = jax.random.normal(keys[4], (2, rank, width)) / width**0.5
    state, step, path = rule.init(up, down), trainer(rule), []
    for k in range(steps):
        rate = rule.lr * (0.5 + 0.5 * jnp.cos(jnp.pi * k / steps))
        up, down, state, value = step(up, down, state, rate)
        path.append(float(value))
    ax.plot(path, label=name)
    print(f"{name:10s} {path[0]:.3f} -> {float(loss(up, down)):.1e}")
ax.set(xlabel="step", ylabel="loss", yscale="log")
ax.legend(frameon=False)
