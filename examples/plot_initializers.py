"""
What an initializer knows
=========================

Plain LoRA knows nothing, PiSSA knows the weight, EVA and CorDA know the inputs, LoRA-GA and
LoRA-One know the gradient. On one synthetic layer with known statistics we look at what that buys:
how much of the outputs an adapter holds at the start, and how far the loss falls in the first
steps.
"""

# %%
# A layer, its inputs and a task
# ------------------------------
#
# Inputs have a few directions of large variance. The weight has a decaying spectrum of its own, and
# the task asks for another weight; the spectrum of their difference decays, too.

import matplotlib.pyplot as plt
import numpy as np

import lowrank_sp as lr
from lowrank_sp.adapters import InputPCA, MeanGradient, SecondMoment, initializers

rng = np.random.default_rng(0)
m, n, rank, samples = 160, 128, 16, 512


def orthonormal(k, columns):
    """Random orthonormal columns."""
    return np.linalg.qr(rng.standard_normal((k, columns)))[0]


spectrum = 8 * np.arange(1, n + 1) ** -0.7
weight = (orthonormal(m, n) * spectrum) @ orthonormal(n, n).T
deviations = np.where(np.arange(n) < 24, 4 * 0.9 ** np.arange(n), 0.3)
mixing = orthonormal(n, n) * deviations


def batch():
    """Inputs, one a row."""
    return rng.standard_normal((samples, n)) @ mixing.T


change = (orthonormal(m, 64) * 4 * 0.8 ** np.arange(64)) @ orthonormal(n, 64).T

# %%
# Statistics, batch by batch
# --------------------------
#
# Three small accumulators see ten batches. The gradient is that of the loss
# ``mean ||(W - W*) x||^2 / 2`` at the pretrained weight.

calibration = [batch() for _ in range(10)]
moment, directions, gradient = None, None, None
for x in calibration:
    g = -change @ x.T @ x / samples
    moment = moment.update(x) if moment else SecondMoment.of(x)
    directions = directions.update(x, rng=0) if directions else InputPCA.of(x, 2 * rank, rng=0)
    gradient = gradient.update(g) if gradient else MeanGradient.of(g)

print(f"{moment.count} samples; the first {rank} directions hold", end=" ")
print(f"{np.sum(directions.explained[:rank]):.0%} of the variance of the inputs")

# %%
# What the adapter holds
# ----------------------
#
# The share of the mean square output that is left to the residual,
# ``E ||(W - s B A) x||^2 / E ||W x||^2``, on the true statistics. ``weighted`` minimizes it. CorDA
# weighs by the second moment instead of its root, so that it counts large directions twice; PiSSA
# does not look at the inputs.

truth = mixing @ mixing.T


def mean_square(a):
    """``E ||a x||^2``."""
    return np.trace(a @ truth @ a.T)


starts = {
    "pissa": initializers.pissa(weight, rank, rng=0),
    "corda_ipm": initializers.corda_ipm(weight, rank, second_moment=moment.mean, rng=0),
    "weighted": initializers.weighted(weight, rank, second_moment=moment.mean, rng=0),
}
ranks = [4, 8, 16, 32, 64]
curves = {name: [] for name in starts}
for r in ranks:
    data = {"second_moment": moment.mean}
    for name in starts:
        given = {} if name == "pissa" else data
        residual = getattr(initializers, name)(weight, r, rng=0, **given).residual
        curves[name].append(mean_square(residual) / mean_square(weight))

fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for name, color in (("pissa", "C0"), ("corda_ipm", "C1"), ("weighted", "C2")):
    ax.plot(ranks, curves[name], "o-", color=color, label=name)
ax.set(xscale="log", yscale="log", xlabel="rank", ylabel="share of the outputs in the residual")
ax.set_xticks(ranks, [str(r) for r in ranks])
ax.minorticks_off()
ax.legend(frameon=False)
for name in starts:
    print(f"{name:10s} rank {rank}: {curves[name][ranks.index(rank)]:.1%} in the residual")

# %%
# The first steps
# ---------------
#
# Gradient descent on both factors, each start at the rate of least mean loss. LoRA-GA,
# LoRA-One and EVA move at once, since their factors lie in the directions that the gradient or the
# inputs ask for. Plain LoRA has to turn its random factor first, and catches up. The others hold
# large singular values of the weight from the start: those bound the learning rate, and the many
# directions in which this task differs from the pretrained weight have to wait.

starts |= {
    "lora": initializers.lora(weight, rank, rng=0),
    "eva": initializers.eva(weight, rank, components=directions.components),
    "lora_ga": initializers.lora_ga(weight, rank, gradient=gradient.mean, scaling="unit", rng=0),
    "lora_one": initializers.lora_one(weight, rank, gradient=gradient.mean, gamma=8.0, rng=0),
}


def losses(start, rate, steps=25):
    """Loss before every step, or infinity if the steps diverge."""
    up, down = start.up.copy(), start.down.copy()
    history = []
    for _ in range(steps + 1):
        error = start.residual + start.scale * up @ down - (weight + change)
        history.append(mean_square(error) / mean_square(change))
        slope = error @ truth
        up, down = (
            up - rate * start.scale * slope @ down.T,
            down - rate * start.scale * up.T @ slope,
        )
        if not np.isfinite(history[-1]) or history[-1] > 1e3:
            return [np.inf] * (steps + 1)
    return history


rates = 2.0 ** np.arange(-9.0, -2.0)
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for k, (name, start) in enumerate(starts.items()):
    best = min((losses(start, rate) for rate in rates), key=np.mean)
    ax.plot(best, color=f"C{k}", label=name)
    print(f"{name:10s} loss after 5 steps {best[5]:.3f}, after 25 steps {best[25]:.3f}")
ax.set(yscale="log", xlabel="step", ylabel="loss, relative to the start of LoRA")
ax.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))

# %%
# The first step of LoRA-GA
# -------------------------
#
# It is made to point along the best approximation of the gradient of rank 32, twice that of the
# adapter, here to the accuracy of the singular vectors.

start = starts["lora_ga"]
g = gradient.mean
first = start.up @ (start.up.T @ g) + (g @ start.down.T) @ start.down
best = lr.truncated_svd(g, 2 * rank, rng=0).to_dense()
print(f"misfit of the first step: {lr.relative_error(first, best):.1e}")
