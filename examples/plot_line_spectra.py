"""
Line spectra by Cadzow's method
===============================

A sum of ``r`` exponentials has a Hankel matrix of rank ``r``. In noise, it is denoised by
projecting in turn on matrices of that rank and on Hankel matrices, and its frequencies are read off
the range of the result. Lines that a Fourier transform shows as one come apart.
"""

# %%
# Two close lines and a third
# ---------------------------

import matplotlib.pyplot as plt
import numpy as np

import lowrank_sp as lr
from lowrank_sp.inverse import Hankel, denoise, synthetic

length, rank = 100, 3
t = np.arange(length)
frequencies, damping = np.array([0.200, 0.206, 0.310]), np.array([0.0, 0.0, 0.01])
signal = np.exp(np.outer(t, 2j * np.pi * frequencies - damping)) @ np.array([1.0, 0.9, 0.6])
rng = np.random.default_rng(0)
noise = (rng.standard_normal(length) + 1j * rng.standard_normal(length)) / np.sqrt(2)
data = signal + 0.1 * noise

solution = denoise.cadzow(data, rank=rank, rng=0)
print(solution.reason)
print(f"error of the data: {np.linalg.norm(data - signal) / np.linalg.norm(signal):.3f}")
print(f"denoised:          {np.linalg.norm(solution.value - signal) / np.linalg.norm(signal):.3f}")

# %%
# Frequencies
# -----------
#
# The columns of the Hankel matrix span the same space as the exponentials. Shifted by a sample,
# each exponential is multiplied by its pole: the eigenvalues of the map from the basis without its
# last row to that without its first row are the poles.


def poles(x):
    """Poles of a signal whose Hankel matrix has rank ``rank``."""
    u = lr.truncated_svd(Hankel(x, len(x) // 2), rank, rng=0).u
    return np.linalg.eigvals(np.linalg.lstsq(u[:-1], u[1:], rcond=None)[0])


z = poles(solution.value)
z = z[np.argsort(np.angle(z))]
for true, found in zip(frequencies, np.angle(z) / (2 * np.pi), strict=True):
    print(f"frequency {true:.4f}   found {found:.4f}")

grid = np.linspace(0.15, 0.36, 2000)
periodogram = abs(np.exp(-2j * np.pi * np.outer(grid, t)) @ data) / length
fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
axes[0].plot(t, data.real, ".", color="0.6", label="data")
axes[0].plot(t, signal.real, color="C0", linewidth=1, label="truth")
axes[0].plot(t, solution.value.real, "--", color="C3", linewidth=1, label="Cadzow")
axes[0].set(xlabel="sample", ylabel="real part", xlim=(0, 60), ylim=(-3.4, 2.8))
axes[0].legend(frameon=False, ncols=3, loc="lower left", fontsize=8)
axes[1].plot(grid, periodogram, color="0.5", label="periodogram of the data")
for k, (f, pole) in enumerate(zip(frequencies, z, strict=True)):
    axes[1].axvline(f, color="C0", linewidth=1, label="truth" if k == 0 else None)
    found = np.angle(pole) / (2 * np.pi)
    axes[1].plot(found, 0.05, "^", color="C3", label="poles" if k == 0 else None)
axes[1].set(xlabel="frequency, cycles a sample", ylabel="amplitude", ylim=(0, None))
axes[1].legend(frameon=False, fontsize=8)

# %%
# Error against noise
# -------------------
#
# Of the noise in ``N`` samples, what lies along the ``2 r`` parameters of the model must stay. With
# random signals of 4 lines, Cadzow's method comes to that floor, as long as the lines stand out.

levels = np.geomspace(0.01, 1.0, 7)
errors = np.zeros((len(levels), 10))
for i, level in enumerate(levels):
    for trial in range(errors.shape[1]):
        p = synthetic.harmonics(length=80, rank=4, separation=3.0, noise=level, rng=trial)
        x = denoise.cadzow(p.data, rank=4, rng=0, stop=lr.Stop(tol=1e-4)).value
        errors[i, trial] = np.linalg.norm(x - p.signal) / np.linalg.norm(p.signal)

fig, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
ax.loglog(levels, errors, ".", color="C3", alpha=0.4)
ax.loglog(levels, np.median(errors, axis=1), color="C3", label="Cadzow, median")
ax.loglog(levels, levels * np.sqrt(2 * 4 / 80), "--", color="0.4", label="floor")
ax.loglog(levels, levels, ":", color="0.4", label="data")
ax.set(xlabel="noise relative to the signal", ylabel="relative error")
ax.legend(frameon=False, fontsize=8)
