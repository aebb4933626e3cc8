"""
A matrix that is seen once
==========================

:class:`~lowrank_sp.linalg.sketch.StreamingSVD` keeps four small linear sketches of a matrix whose
rows arrive in blocks, and answers at any time, with an estimate of its own error. Here that
estimate is held against the truth.
"""

# %%
# Snapshots
# ---------
#
# 1000 rows arrive fifty at a time: eight smooth modes over 300 positions, whose amplitudes drift,
# and noise of standard deviation 0.02.

import matplotlib.pyplot as plt
import numpy as np

import lowrank_sp as lr

rng = np.random.default_rng(0)
m, n, rank, rows = 1000, 300, 10, 50
time, position = np.linspace(0, 1, m)[:, None], np.linspace(0, 1, n)
data = sum(
    2.0**-k * np.sin((k + 1) * 9 * time + k) * np.sin((k + 1) * np.pi * position) for k in range(8)
)
data += 0.02 * rng.standard_normal((m, n))

stream = lr.StreamingSVD((m, n), rank=rank, rng=1)
seen, estimates, truths, optima = [], [], [], []
for start in range(0, m, rows):
    stream.update(start, data[start : start + rows])
    so_far = np.where(np.arange(m)[:, None] < start + rows, data, 0.0)
    f = stream.svd()
    seen.append(start + rows)
    estimates.append(f.error)
    truths.append(np.linalg.norm(so_far - f.to_dense()))
    optima.append(np.linalg.norm(lr.singular_values(so_far)[rank:]))

fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
ax.plot(seen, truths, color="C0", label="true error")
ax.plot(seen, estimates, ".", color="C1", label="estimate from the test sketch")
ax.plot(seen, optima, color="0.5", linestyle="--", label="least possible error of rank 10")
ax.set(xlabel="rows seen", ylabel="Frobenius norm", ylim=(0, None))
ax.legend(frameon=False)

# %%
# The sketches see each row once, so their error stays above the least possible one, by a factor
# that depends on the rank but not on the number of rows. The estimate is unbiased in its square;
# its points move together from one update to the next, since they share one test sketch.

# %%
# How good the estimate is
# ------------------------
#
# Over 100 independent sketches of the finished matrix, estimate over truth. The test sketch has ten
# rows. If one singular value held all of the error, the squared ratio would have the relative
# standard deviation ``sqrt(2/10)``; noise spreads the error over many, which narrows it.

ratios = []
for seed in range(100):
    stream = lr.StreamingSVD((m, n), rank=rank, rng=seed)
    stream.update(0, data)
    f = stream.svd()
    ratios.append(f.error / np.linalg.norm(data - f.to_dense()))

fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
ax.hist(ratios, bins=16, color="C0", edgecolor="white")
ax.axvline(1.0, color="C3", linestyle="--", linewidth=1.2)
ax.set(xlabel="estimate / true error", ylabel="sketches")
print(f"mean of the squared ratio {np.mean(np.square(ratios)):.3f}")
print(f"standard deviation of the ratio {np.std(ratios):.3f}")
