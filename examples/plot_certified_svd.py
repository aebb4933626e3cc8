"""
Singular values with certified errors
=====================================

:func:`~lowrank_sp.linalg.svd.truncated_svd` returns with every singular value a bound on its error.
Here the truth is known, so the bound can be held against the error that was really made: on five
spectra, in double precision, for the leading 20 of 600 singular values.
"""

# %%
# Five spectra
# ------------
#
# Every test matrix is ``U diag(sigma) V^T`` with random orthogonal ``U`` and ``V``. "clusters" has
# every value five times; "spikes" looks like a trained weight: a decaying head on a slowly falling
# bulk.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.utils.extmath import randomized_svd as subspace_iteration

import lowrank_sp as lr

m, n, k = 900, 600, 20
j = np.arange(1, n + 1)
spectra = {
    "1/j": 1 / j,
    "1/sqrt(j)": j**-0.5,
    "10^(-j/12)": 10.0 ** (-j / 12),
    "clusters": 0.8 ** ((j - 1) // 5),
    "spikes": np.sqrt((j**-0.6) ** 2 * (j <= 64) + (0.25 * (1 - j / n)) ** 2),
}

rng = np.random.default_rng(0)
u, _ = np.linalg.qr(rng.standard_normal((m, n)))
v, _ = np.linalg.qr(rng.standard_normal((n, n)))
matrices = {name: (u * sigma) @ v.T for name, sigma in spectra.items()}

fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
for name, sigma in spectra.items():
    ax.plot(j, sigma, label=name)
ax.axvline(k, color="0.5", linestyle="--", linewidth=1)
ax.set(xscale="log", yscale="log", ylim=(1e-6, 2), xlabel="index", ylabel="singular value")
ax.legend(frameon=False)

# %%
# Error and bound
# ---------------
#
# With ``rank`` the accuracy asked for is ``tol sigma_k``, and the default ``tol`` is
# ``4 sqrt(eps)``, here 6e-8. Bounds lie below it, since the residuals behind them are looked at
# only every few steps. Errors lie below the bounds: the error of a singular value is of second
# order in the residual that bounds it, until rounding takes over.
# Errors of zero are drawn at 1e-18.

fig, axes = plt.subplots(1, 5, figsize=(11, 3.6), sharey=True, layout="constrained")
for ax, (name, a) in zip(axes, matrices.items(), strict=True):
    f = lr.truncated_svd(a, rank=k, rng=0)
    sigma = spectra[name][:k]
    error = np.abs(f.s - sigma)
    assert np.all(error <= f.bounds)
    asked = 4 * np.finfo(a.dtype).eps ** 0.5 * sigma[-1]
    ax.axhline(asked, color="0.5", linestyle="--", linewidth=1, label="asked for")
    ax.plot(j[:k], f.bounds, "-", color="C0", label="bound")
    ax.plot(j[:k], np.maximum(error, 1e-18), ".", color="C1", label="error")
    ax.set(yscale="log", title=name, xlabel="index", xticks=[1, 10, 20])
axes[0].set_ylabel("absolute")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)

# %%
# How many reads of the matrix
# ----------------------------
#
# Where reading the matrix is the cost, :func:`~lowrank_sp.linalg.svd.randomized_svd` takes the
# number of reads as an argument. It is compared with subspace iteration of the same number of
# columns, as scikit-learn has it, which needs ``2 p + 2`` reads for ``p`` power iterations. The
# excess is ``||A - A_k||_F`` over its least value, minus one; a point is the median of three seeds,
# and nothing is drawn below 1e-15. At two reads both are a plain sketch. After that the Krylov
# space gains more, because it needs one read a step and keeps the earlier blocks, at the price of
# their memory.


def excess(a, sigma, triplets):
    """How much larger than necessary the error of an approximation is."""
    u, s, vh = triplets
    return max(np.linalg.norm(a - (u * s) @ vh) / np.linalg.norm(sigma[k:]) - 1, 1e-15)


def median_excess(name, function):
    """Median over three seeds."""
    return np.median([excess(matrices[name], spectra[name], function(seed)) for seed in range(3)])


reads, powers = (2, 3, 4, 5, 6, 8), (0, 1, 2, 3)
fig, axes = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, layout="constrained")
for ax, name in zip(axes, ("1/j", "1/sqrt(j)", "spikes"), strict=True):
    a = matrices[name]
    krylov = [
        median_excess(name, lambda seed, a=a, q=q: lr.randomized_svd(a, k, reads=q, rng=seed))
        for q in reads
    ]
    subspace = [
        median_excess(
            name,
            lambda seed, a=a, p=p: subspace_iteration(
                a, k, n_oversamples=8, n_iter=p, random_state=seed
            ),
        )
        for p in powers
    ]
    ax.plot(reads, krylov, "o-", label="randomized_svd")
    ax.plot([2 * p + 2 for p in powers], subspace, "s--", color="C7", label="subspace iteration")
    ax.set(yscale="log", title=name, xlabel="reads of the matrix")
axes[0].set_ylabel("excess error")
axes[0].legend(frameon=False, loc="lower left")

# %%
# A rank from a tolerance
# -----------------------
#
# With ``tol`` alone the rank is found: the smallest whose error is within ``tol`` of the norm.

for name, a in matrices.items():
    f = lr.truncated_svd(a, tol=0.3, rng=0)
    print(f"{name:12s} rank {f.rank:3d}   error {f.error / np.linalg.norm(a):.4f} of the norm")
