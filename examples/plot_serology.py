"""
Serology with missing measurements
==================================

Blood samples of 438 people were tested for antibodies against six antigens of SARS-CoV-2, with
eleven detection reagents each. A CP decomposition explains such a table by a few patterns, each one
an outer product of a profile over samples, one over antigens and one over reagents. Real tables
have gaps: here we hide some measurements, complete the table from the others, and let the hidden
ones choose the rank. The data ship with TensorLy.
"""

# %%
# The data
# --------
#
# A tenth of the measurements is withheld, to choose the rank by.

from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
from tensorly.datasets import load_covid19_serology

from lowrank_sp import Stop
from lowrank_sp.tensors import TensorEntries, cp_completion

data = load_covid19_serology()
x = np.asarray(data.tensor)
groups, antigens, reagents = data.ticks
known, withheld = TensorEntries.from_mask(x, np.ones(x.shape, bool)).split(0.1, rng=0)
print(known)
print(dict(Counter(groups)))

# %%
# How many patterns
# -----------------
#
# The residual of the entries that were fitted falls with every term. That of the withheld ones
# falls as long as terms explain what is shared; once terms explain noise they may grow without
# bound where nothing was measured. A little regularization keeps them bounded.


def residuals(entries, rank, regularization=0.0):
    """Relative residual of fitted and of withheld entries."""
    cp = cp_completion(
        entries, rank=rank, rng=0, regularization=regularization, stop=Stop(20, tol=1e-3)
    ).value
    return entries.relative_residual(cp), withheld.relative_residual(cp)


ranks = (1, 2, 3, 4, 6, 8)
curves = {
    "plain": [residuals(known, rank) for rank in ranks],
    "regularized": [residuals(known, rank, 1e-3) for rank in ranks],
}

fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for color, (name, curve) in zip(("C0", "C1"), curves.items(), strict=True):
    fitted, held = np.transpose(curve)
    ax.plot(ranks, held, "o-", color=color, label=f"{name}: withheld")
    ax.plot(ranks, fitted, ":", color=color, label=f"{name}: fitted")
ax.set(xlabel="rank", ylabel="relative residual", ylim=(0, 0.8))
ax.legend(frameon=False, fontsize="small", ncols=2)

# %%
# What the patterns are
# ---------------------
#
# Four terms, regularized, from nine tenths of the measurements. Every row of the figure is one:
# what it binds to, what it is detected by, and how strongly it is present in each group of
# patients. Terms of a CP decomposition need no rotation to be read, as those of an SVD do: they are
# unique.

solution = cp_completion(known, rank=4, rng=0, regularization=1e-3, stop=Stop(60, tol=1e-4))
print(solution.reason)
weights, (samples, binding, detection) = solution.value
# Of the two signs of a term the one with which it is detected.
sign = np.sign(detection.sum(axis=0))
samples, detection = samples * sign, detection * sign
order = ["Negative", "Mild", "Moderate", "Severe", "Deceased"]

fig, axes = plt.subplots(
    4, 3, figsize=(10, 8), sharex="col", layout="constrained", width_ratios=[1, 1.6, 1.4]
)
for r, row in enumerate(axes):
    row[0].bar(antigens, binding[:, r], color="C0")
    row[1].bar(reagents, detection[:, r], color="C1")
    scores = weights[r] * samples[:, r]
    row[2].boxplot([scores[np.array(groups) == g] for g in order], tick_labels=order, sym=".")
    row[0].set_ylabel(f"term {r + 1}")
    for ax in row:
        ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        ax.tick_params(axis="x", rotation=60)
for ax, title in zip(axes[0], ("antigens", "reagents", "weighted scores of patients"), strict=True):
    ax.set_title(title)
