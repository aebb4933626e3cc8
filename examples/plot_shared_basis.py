"""
Ten adapters in one basis
=========================

A server that keeps many adapters of one model may keep one pair of bases for all of them, and a
small core for each. How large must the shared rank be, and are diagonal cores enough? It depends on
what the adapters have in common, so here are two collections of ten: adapters of one family of
tasks, and adapters of two families.
"""

# %%
# Two collections
# ---------------
#
# Each adapter has rank 8. Most of its energy lies in spaces of dimension 12 that its family shares,
# the rest is its own. They are never multiplied out.

import matplotlib.pyplot as plt
import numpy as np

from lowrank_sp import Stop
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.serving import jd_clustered, jd_diag, jd_full

m, n, r, common = 512, 384, 8, 12
rng = np.random.default_rng(0)


def family(count):
    """Adapters with a common space on either side."""
    left = np.linalg.qr(rng.standard_normal((m, common)))[0]
    right = np.linalg.qr(rng.standard_normal((n, common)))[0].T
    found = []
    for _ in range(count):
        up = left @ rng.standard_normal((common, r)) / common**0.5
        down = rng.standard_normal((r, common)) @ right / common**0.5
        up = up + 0.35 * rng.standard_normal((m, r)) / m**0.5
        down = down + 0.35 * rng.standard_normal((r, n)) / n**0.5
        found.append(Product(up, down, 2.0))
    return found


collections = {"one family": family(10), "two families": family(5) + family(5)}

# %%
# Error against shared rank
# -------------------------
#
# JD-Full has a dense core for each adapter, JD-Diag a diagonal one, and the clustered variant two
# pairs of bases. The error is the root of the mean square of the relative errors.

ranks = [2, 4, 8, 12, 16, 24, 32, 48]
stop = Stop(60)
methods = {
    "JD-Full": lambda a, k: jd_full(a, rank=k, rng=0, stop=stop),
    "JD-Diag": lambda a, k: jd_diag(a, rank=k, rng=0, stop=stop),
    "clustered, 2 bases": lambda a, k: jd_clustered(a, rank=k, clusters=2, rng=0, stop=stop),
}

fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
answers = {}
for ax, (title, adapters) in zip(axes, collections.items(), strict=True):
    for (name, method), mark in zip(methods.items(), "os^", strict=True):
        found = [method(adapters, k).value for k in ranks]
        answers[title, name] = dict(zip(ranks, found, strict=True))
        ax.plot(ranks, [shared.error for shared in found], f"{mark}-", label=name)
    ax.axvline(common, color="0.8", zorder=0)
    ax.set(title=title, xlabel="shared rank", ylim=(0, 1.02))
axes[0].set_ylabel("relative error")
axes[0].annotate("common\ndimension", (common + 0.6, 0.9), color="0.5")
axes[1].legend(frameon=False)

# %%
# With one family the error falls steeply up to the common dimension, where a core of 144 numbers
# stands for the shared part of an adapter of 7168; what remains are the private parts, which no
# small basis holds. Two families need twice the rank in one basis, or two bases of the same rank.
# Diagonal cores are far too little here: every task mixes the common directions in its own way.
#
# The clusters are the families:

shared = answers["two families", "clustered, 2 bases"][16]
print(shared)
print(shared.clusters)
assert len(set(shared.clusters[:5])) == len(set(shared.clusters[5:])) == 1

# %%
# Size against error
# ------------------
#
# What counts in the end is the error at a size. The alternative is to truncate each adapter by
# itself.

fig, ax = plt.subplots(figsize=(5.5, 4), layout="constrained")
adapters = collections["two families"]
whole = sum(p.rank * (m + n) for p in adapters)
for (name, _), mark in zip(methods.items(), "os^", strict=True):
    found = answers["two families", name].values()
    sizes = [100 * s.parameters / whole for s in found]
    ax.plot(sizes, [s.error for s in found], f"{mark}-", label=name)
tails = []
for k in range(1, r):
    parts = [p.delta().svd() for p in adapters]
    lost = [float(np.linalg.norm(f.s[k:]) / np.linalg.norm(f.s)) for f in parts]
    tails.append(np.sqrt(np.mean(np.square(lost))))
ax.plot([100 * k / r for k in range(1, r)], tails, color="0.4", label="SVD of each")
ax.set(
    xscale="log", xlabel="% of the numbers of the adapters", ylabel="relative error", ylim=(0, 1.02)
)
ax.legend(frameon=False)

# %%
# Two bases pay where mainly the common part is kept: at a third of the numbers they have half the
# error of truncation. Who wants the private parts too keeps the adapters themselves, and may
# quantize them instead. With ten adapters the bases are most of what is stored; with hundreds they
# are next to nothing.
#
# Each adapter comes back as a product of two factors, with its own error:

one = shared.adapter(3)
print(one, f"differs by {shared.relative_errors[3]:.3f}")
assert np.isclose((one - adapters[3].delta()).norm(), shared.errors[3])
