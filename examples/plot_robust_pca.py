"""
Background and foreground of a video
====================================

Frames of a still scene, as the columns of a matrix, have low rank: here 2, since the light changes.
What moves through it covers few pixels at a time. :mod:`lowrank_sp.inverse.robust` takes the two
apart.
"""

# %%
# A scene with something moving
# -----------------------------
#
# The scene is a photograph that scikit-learn brings along, seen in 60 frames by day and evening
# light. A bright disk and a dark one cross it, and one pixel in fifty is broken in every frame.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import lowrank_sp as lr
from lowrank_sp import plot
from lowrank_sp.inverse import robust, study

photo = load_sample_image("china.jpg")[::4, ::4].astype(float) / 255
height, width, _ = photo.shape
day, evening = photo.mean(axis=2).ravel(), photo[:, :, 0].ravel() ** 2
frames = 60
time = np.linspace(0, 1, frames)
background = np.outer(day, 0.8 + 0.2 * np.cos(7 * time)) + np.outer(evening, 0.3 * time)

rng = np.random.default_rng(0)
y, x = np.mgrid[:height, :width]
video = background.copy()
for k, t in enumerate(time):
    bright = (x - width * t) ** 2 + (y - 0.3 * height) ** 2 < 12**2
    dark = (x - width * (1 - t)) ** 2 + (y - 0.75 * height) ** 2 < 9**2
    frame = np.where(bright.ravel(), 1.5, np.where(dark.ravel(), 0.0, video[:, k]))
    video[:, k] = np.where(rng.random(len(frame)) < 0.02, rng.random(len(frame)), frame)

# %%
# Taken apart
# -----------
#
# Alternating projections are told the rank, and a threshold somewhat above the default one: the
# second component, the change of the light, is much smaller than the first and has bright spots,
# which are not outliers. Plain principal components, in the fourth column, smear what moves over
# all frames.

solution = robust.alternating_projections(video, rank=2, threshold=0.004, rng=0)
parts = solution.value
plain = lr.truncated_svd(video, rank=2).to_dense()
print(solution.reason)
print(f"{parts.density:.1%} of the entries are outliers")
print(f"error of the background: {lr.relative_error(parts.low_rank, background):.1e}")
print(f"of plain components:     {lr.relative_error(plain, background):.1e}")

columns = {
    "frame": video,
    "low rank": parts.low_rank.to_dense(),
    "sparse": abs(parts.sparse),
    "truncated SVD": plain,
}
fig, axes = plt.subplots(2, 4, figsize=(10, 3.6), layout="constrained")
for row, k in zip(axes, (12, 45), strict=True):
    for ax, (name, matrix) in zip(row, columns.items(), strict=True):
        ax.imshow(matrix[:, k].reshape(height, width), cmap="gray", vmin=0, vmax=1.2)
        ax.set_axis_off()
        ax.set_title(name if k == 12 else "", fontsize=10)

# %%
# Against steps and seconds
# -------------------------
#
# Principal component pursuit is not told the rank, and finds it. The error that stays is in pixels
# that a disk covers for too many frames.


def projections(p, callback=None):
    """Alternating projections, as above."""
    return robust.alternating_projections(p.data, rank=2, threshold=0.004, rng=0, callback=callback)


def pursuit(p, callback=None):
    """The convex program."""
    return robust.principal_component_pursuit(p.data, rng=0, callback=callback)


class Video:
    """What a study needs to know."""

    data, truth = video, background


records = study.compare(Video, {"alternating projections": projections, "pursuit": pursuit})
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for ax, against in zip(axes, ("step", "seconds"), strict=True):
    plot.convergence(records, against=against, ax=ax)
