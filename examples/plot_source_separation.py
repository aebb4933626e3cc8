"""
Separating sources by non-negative CP
=====================================

A mixture of fluorescent dyes is lit at many wavelengths, and the light it emits is measured at
many others. Each dye contributes an outer product: how well it absorbs, times what it emits, times
how much of it there is. None of these can be negative. From several mixtures, which nobody
calibrated, :func:`~lowrank_sp.tensors.cp_nonnegative.cp_hals` finds the spectra and the
concentrations.
"""

# %%
# Twelve mixtures of three dyes
# -----------------------------
#
# Their spectra overlap, and photons are counted, so the noise is that of counting.

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import linear_sum_assignment

import lowrank_sp as lr
from lowrank_sp.tensors import CP, cp_als, cp_hals

rng = np.random.default_rng(0)
excitation, emission = np.linspace(300, 500, 60), np.linspace(350, 650, 80)


def band(wavelengths, center, width, shoulder):
    """A peak with a shoulder to its right."""
    return np.exp(-(((wavelengths - center) / width) ** 2)) + shoulder * np.exp(
        -(((wavelengths - center - 1.6 * width) / width) ** 2)
    )


absorbed = np.stack([band(excitation, c, 28, s) for c, s in ((345, 0.3), (375, 0.6), (410, 0.2))])
emitted = np.stack([band(emission, c, 38, s) for c, s in ((430, 0.4), (460, 0.2), (505, 0.5))])
amounts = rng.dirichlet(np.ones(3), size=12)
truth = CP.of_factors([amounts, absorbed.T, emitted.T])
counts = rng.poisson(40 * truth.to_dense()).astype(float)
clean = 40 * truth.to_dense()
print(f"counting noise: {np.linalg.norm(counts - clean) / np.linalg.norm(clean):.3f} of the norm")

fig, axes = plt.subplots(1, 4, figsize=(10, 2.8), sharey=True, layout="constrained")
for k, ax in enumerate(axes):
    ax.pcolormesh(emission, excitation, counts[k], shading="nearest", cmap="viridis")
    ax.set(title=f"mixture {k + 1}", xlabel="emission (nm)")
axes[0].set_ylabel("excitation (nm)")

# %%
# One mixture is not enough
# -------------------------
#
# A single measurement is a matrix. Its singular vectors are orthogonal, which spectra are not: they
# go negative. A tensor has what a matrix lacks, uniqueness. Without any constraint the terms of a
# CP decomposition are the dyes, up to noise; non-negativity removes what is left below zero and
# costs nothing where nothing is.

single = lr.truncated_svd(counts[0], 3)
free = cp_als(counts, rank=3, rng=0)
nonnegative = cp_hals(counts, rank=3, rng=0)
print("cp_als: ", free.reason, f"- relative error {free.value.error / np.linalg.norm(counts):.4f}")
print("cp_hals:", nonnegative.reason, f"- {nonnegative.value.error / np.linalg.norm(counts):.4f}")


def matched(columns, reference):
    """Columns scaled to unit maximum, in the order of the reference curves they resemble."""
    order = linear_sum_assignment(-abs(reference @ columns))[1]
    columns = columns[:, order] * np.sign(np.sum(columns[:, order], axis=0))
    return columns / np.max(np.abs(columns), axis=0)


panels = {
    "SVD of mixture 1": (single.u, single.vh.T),
    "cp_als": free.value.factors[1:],
    "cp_hals": nonnegative.value.factors[1:],
}
fig, axes = plt.subplots(2, 3, figsize=(10, 5), sharex="row", sharey=True, layout="constrained")
for column, (name, factors) in zip(axes.T, panels.items(), strict=True):
    column[0].set_title(name)
    for ax, grid, found, true in zip(
        column, (excitation, emission), factors, (absorbed, emitted), strict=True
    ):
        ax.axhline(0, color="0.8", linewidth=0.8)
        ax.plot(grid, (true / true.max(axis=1, keepdims=True)).T, color="0.6", linewidth=4)
        ax.plot(grid, matched(np.asarray(found), true), linewidth=1.5)
axes[0, 0].set_ylabel("absorbed")
axes[1, 0].set_ylabel("emitted")
for ax, label in ((axes[0, 1], "excitation (nm)"), (axes[1, 1], "emission (nm)")):
    ax.set_xlabel(label)

# %%
# Concentrations
# --------------
#
# The remaining factor is how much of each dye a mixture holds, in units that the spectra leave
# open: one factor a dye is calibrated away by the first mixture.

weights, (found, *_) = nonnegative.value
cosines = np.abs(nonnegative.value.factors[2].T @ emitted.T)
found = (weights * found)[:, np.argmax(cosines / np.linalg.norm(emitted, axis=1), axis=0)]
scaled = found * (np.sum(amounts * found, axis=0) / np.sum(found**2, axis=0))

fig, ax = plt.subplots(figsize=(4.5, 4), layout="constrained")
ax.plot([0, 1], [0, 1], color="0.7", linewidth=1)
for r in range(3):
    ax.plot(amounts[:, r], scaled[:, r], "o", label=f"dye {r + 1}")
ax.set(xlabel="true share", ylabel="share found")
ax.legend(frameon=False)
print(f"largest error of a share: {np.max(abs(scaled - amounts)):.3f}")
