"""
Merging adapters, with an error bar
===================================

Three adapters of one layer are merged into one. The exact answer is their weighted sum, of rank
``sum r_i``; every merge of lower rank, or by another rule, is away from it by a distance that is
known as soon as the merge is. Here we look at that distance for all ways of merging, and at what it
means for the outputs of the layer.
"""

# %%
# Three adapters that share some directions
# -----------------------------------------
#
# As trained ones do: each has 16 directions with decaying strengths. Four of them are common to all
# three, up to a perturbation.

import matplotlib.pyplot as plt
import numpy as np

import lowrank_sp as lr
from lowrank_sp.adapters.algebra import adapter_overlap, merge

rng = np.random.default_rng(0)
m, n, rank = 768, 512, 16
common = rng.standard_normal((m, 4)), rng.standard_normal((4, n))
strengths = 1.0 / np.arange(1, rank + 1) ** 0.7


def adapter():
    """Factors whose leading four directions are near the common ones."""
    up, down = rng.standard_normal((m, rank)), rng.standard_normal((rank, n))
    up[:, :4] = 0.8 * common[0] + 0.6 * up[:, :4]
    down[:4] = 0.8 * common[1] + 0.6 * down[:4]
    return lr.LowRank(up * strengths, down / n**0.5)


deltas = [adapter() for _ in range(3)]
weights = [1 / 3] * 3
print("directions shared by the first two:", adapter_overlap(deltas[0], deltas[1], rank=4))

# %%
# The same adapters in another gauge
# ----------------------------------
#
# ``up @ g`` and ``inv(g) @ down`` are the same update. What a merge makes of them should not
# change.

gauges = [
    np.diag(rng.uniform(0.3, 3.0, rank)) + 0.2 * rng.standard_normal((rank, rank)) for _ in deltas
]
same = [
    lr.LowRank(delta.left @ g, np.linalg.solve(g, delta.right))
    for delta, g in zip(deltas, gauges, strict=True)
]

# %%
# The error against the rank
# --------------------------
#
# ``svd`` is the best that a rank allows, and at rank 48 it is ``cat``, the sum itself. ``linear``
# adds the factors instead of the products: its cross terms are larger than the sum, and another
# gauge makes another error. The other methods are no approximations of the sum, but change it on
# purpose, TSV by making the parts orthogonal, TIES by averaging only what agrees in sign. Their
# error stays where it is when the rank grows, since it comes from the rule and not from the rank.

ranks = [2, 4, 8, 16, 24, 32, 40, 47]
best = [merge.svd(deltas, weights, rank=r) for r in ranks]
tsv = [merge.tsv(deltas, weights, rank=r) for r in ranks[1:]]
ties = merge.ties(density=0.5)
knots = [merge.knots(deltas, rule=ties, rank=r) for r in ranks]
entries = [merge.entrywise(deltas, rule=ties, rank=r, rng=0) for r in ranks[1::2]]

fig, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
for label, results, at, style in (
    ("svd: the least possible", best, ranks, "C0o-"),
    ("tsv", tsv, ranks[1:], "C2s-"),
    ("TIES, of entries", entries, ranks[1::2], "C1^-"),
    ("TIES, KnOTS", knots, ranks, "C3v-"),
):
    ax.plot(at, [r.relative_error for r in results], style, label=label, markersize=5)
for updates, marker, label in ((deltas, "X", "linear"), (same, "P", "linear, another gauge")):
    error = merge.linear(updates, weights).relative_error
    ax.plot(rank, error, "k" + marker, label=label, markersize=8)
ax.axvline(48, color="C4", linestyle=":", label="cat: exact")
ax.set(xlabel="rank of the merged adapter", ylabel="relative error", yscale="log", xlim=(0, 50))
ax.legend(frameon=False, fontsize=9, loc="lower left")

# %%
# The gauge changes nothing but the merges of the factors
# --------------------------------------------------------

methods = {
    "svd": lambda d: merge.svd(d, weights, rank=16),
    "tsv": lambda d: merge.tsv(d, weights, rank=16),
    "knots": lambda d: merge.knots(d, rule=ties, rank=16),
    "entrywise": lambda d: merge.entrywise(d, rule=ties, rank=16, rng=0),
    "linear": lambda d: merge.linear(d, weights),
}
for name, method in methods.items():
    one, two = method(deltas).value, method(same).value
    print(f"{name:10s} changes by {lr.relative_error(two, one):.1e}")

# %%
# An error bar for outputs
# ------------------------
#
# For inputs of unit covariance the root mean square of the error of the outputs is exactly
# ``error``. It is known before the merged adapter has seen any input.

inputs = rng.standard_normal((n, 2000))
for name in ("svd", "tsv", "knots"):
    merged = methods[name](deltas)
    outputs = (merged.value - merged.exact) @ inputs
    seen = np.sqrt(np.mean(np.sum(outputs**2, axis=0)))
    print(f"{name:6s} error bar {merged.error:.3f}, seen on 2000 inputs {seen:.3f}")
