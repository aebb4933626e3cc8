"""Draw the figure of the README and of the landing page: python docs/make_figures.py."""

from pathlib import Path

import matplotlib.pyplot as plt  # noqa: TID253
import numpy as np
from sklearn.utils.extmath import randomized_svd as subspace_iteration  # noqa: TID253

import lowrank_sp as lr
from lowrank_sp.checkpoint.demo import transformer_like

RANK, OVERSAMPLING = 16, 8
BLUE, ORANGE, GREY = "#2a6fb0", "#d9822b", "#8a8f98"


def draw_spectrum(ax, weight, sigma):
    """The split that PiSSA makes of a spectrum."""
    index = np.arange(1, len(sigma) + 1)
    ax.fill_between(index[:RANK], 0.5, sigma[:RANK], color=ORANGE, alpha=0.18, linewidth=0)
    ax.fill_between(index[RANK - 1 :], 0.5, sigma[RANK - 1 :], color=GREY, alpha=0.15, linewidth=0)
    ax.plot(index, sigma, color=GREY, linewidth=1.6, label="all, by LAPACK")
    f = lr.truncated_svd(weight, rank=RANK, rng=0)
    ax.plot(index[:RANK], f.s, "o", color=ORANGE, markersize=5, label="truncated_svd, rank 16")
    ax.axvline(RANK, color="0.3", linestyle="--", linewidth=1)
    ax.text(1.35, 0.8, "adapter\n$s\\,B A$", color="#a85d12", linespacing=1.3)
    ax.text(24, 0.8, "frozen residual\n$W - s\\,B A$", color="0.35", linespacing=1.3)
    ax.set(xscale="log", yscale="log", xlim=(0.9, 1024), ylim=(0.5, 11))
    ax.set(xlabel="index", ylabel="singular value", title="PiSSA splits the spectrum of a weight")
    ax.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="upper right")


def draw_errors(ax, weight, sigma):
    """Error and bound of the leading singular values against reads of the matrix."""
    reads = range(2, 11)
    errors, bounds = [], []
    for q in reads:
        f = lr.randomized_svd(weight, RANK, reads=q, oversampling=OVERSAMPLING, rng=0)
        errors.append(np.max(np.abs(f.s - sigma[:RANK]) / sigma[:RANK]))
        bounds.append(np.max(f.bounds / sigma[:RANK]))
    powers = range(5)
    peers = [
        subspace_iteration(weight, RANK, n_oversamples=OVERSAMPLING, n_iter=p, random_state=0)[1]
        for p in powers
    ]
    peer_errors = [np.max(np.abs(s - sigma[:RANK]) / sigma[:RANK]) for s in peers]
    ax.plot(
        [2 * p + 2 for p in powers],
        peer_errors,
        "s--",
        color=GREY,
        label="error of subspace iteration",
    )
    ax.plot(reads, bounds, "-", color=BLUE, linewidth=1.6, label="bound of randomized_svd")
    ax.fill_between(reads, 1e-9, bounds, color=BLUE, alpha=0.08, linewidth=0)
    ax.plot(reads, errors, "o", color=BLUE, markersize=5, label="error of randomized_svd")
    ax.set(yscale="log", ylim=(1e-7, 3), xlabel="reads of the matrix", ylabel="relative error")
    ax.set_title("Largest error of its 16 leading values")
    ax.legend(frameon=False, loc="lower left")


def main():
    """Write docs/_static/overview.png."""
    weight = transformer_like(1024, 1024, np.random.default_rng(0))
    sigma = np.linalg.svd(weight.astype(np.float64), compute_uv=False)
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style | {"axes.titlesize": 12, "axes.titlelocation": "left"}):
        fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        draw_spectrum(axes[0], weight, sigma)
        draw_errors(axes[1], weight, sigma)
        folder = Path(__file__).parent / "_static"
        fig.savefig(folder / "overview.png", dpi=160, facecolor="white")


if __name__ == "__main__":
    main()
