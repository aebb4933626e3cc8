"""
Compressing a hyperspectral image
=================================

The Indian Pines scene has 145 x 145 pixels and 200 spectral bands: neighbouring bands show nearly
the same picture. How many numbers does it take to keep it to a given error, as a truncated SVD of
all pixels against all bands, in the Tucker format, as a tensor train, and in the CP format? The
scene ships with TensorLy.
"""

# %%
# The scene
# ---------
#
# Its values are integers far from zero, so that the mean alone is 86 % of the norm. Errors are
# relative to the norm of what is left without it: that is where the picture is.

import matplotlib.pyplot as plt
import numpy as np
from tensorly.datasets import load_indian_pines

import lowrank_sp as lr
from lowrank_sp import Stop, tensors

x = np.asarray(load_indian_pines().tensor, dtype=np.float64)
x = x - x.mean()
norm = np.linalg.norm(x)
print(x.shape, f"{x.size} numbers")

# %%
# Three formats by tolerance
# --------------------------
#
# The truncated SVD, the Tucker form and the tensor train are asked for an error and choose their
# ranks. Each of them returns its error; here it is what was asked for, or a little less.

tolerances = (0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)
bands = x.reshape(-1, x.shape[2])
curves = {"SVD, pixels by bands": [], "Tucker (ST-HOSVD)": [], "tensor train (TT-SVD)": []}
for tol in tolerances:
    f = lr.truncated_svd(bands, tol=tol)
    curves["SVD, pixels by bands"].append((f.rank * (sum(bands.shape) + 1), float(f.error)))
    for name, t in (
        ("Tucker (ST-HOSVD)", tensors.st_hosvd(x, tol=tol)),
        ("tensor train (TT-SVD)", tensors.tt_svd(x, tol=tol)),
    ):
        assert t.error <= tol * norm
        curves[name].append((t.parameters, t.error))
        if tol == 0.1:
            print(t)

# %%
# CP by rank
# ----------
#
# A CP decomposition has no tolerance: the number of terms is given, and its error is computed.
#
# At errors of ten percent and more the three tensor formats need between a third and a twentieth of
# the numbers that the SVD needs, whose pictures of all pixels are full size, and differ little
# among themselves. At five percent and less the fine detail has nothing that is common to rows or
# columns of pixels, and the SVD is as good.

curves["CP (20 sweeps of ALS)"] = []
for rank in (2, 5, 10, 20, 40, 80):
    cp = tensors.cp_als(x, rank=rank, rng=0, stop=Stop(max_iter=20)).value
    curves["CP (20 sweeps of ALS)"].append((cp.parameters, cp.error))

fig, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
for marker, (name, curve) in zip("o^sD", curves.items(), strict=True):
    numbers, errors = np.transpose(curve)
    ax.plot(x.size / numbers, errors / norm, marker + "-", markersize=4, label=name)
ax.set(xscale="log", yscale="log", xlabel="entries per number kept", ylabel="relative error")
ax.set_xticks([1, 3, 10, 30, 100, 300, 1000], ["1", "3", "10", "30", "100", "300", "1000"])
ax.set_yticks([0.02, 0.05, 0.1, 0.2, 0.4], ["2 %", "5 %", "10 %", "20 %", "40 %"])
ax.minorticks_off()
ax.axvline(1, color="0.6", linewidth=1)
ax.legend(frameon=False)

# %%
# What is kept
# ------------
#
# One band of the scene, of the Tucker form with an error of 5 %, and what that leaves out: noise
# of the sensor, and lines that are not aligned with the axes. Only this band is multiplied out.

t = tensors.st_hosvd(x, tol=0.05)
band = 120
kept = t[:, :, band : band + 1].to_dense()[:, :, 0]
fig, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
low, high = np.percentile(x[:, :, band], [1, 99])
pictures = {"scene": x[:, :, band], f"{x.size / t.parameters:.0f} times smaller": kept}
for ax, (name, picture) in zip(axes, pictures.items(), strict=False):
    ax.imshow(picture, vmin=low, vmax=high, cmap="gray")
    ax.set_title(name)
contrast = (high - low) / 2
axes[2].imshow(x[:, :, band] - kept, vmin=-contrast, vmax=contrast, cmap="gray")
axes[2].set_title("difference")
for ax in axes:
    ax.axis("off")
