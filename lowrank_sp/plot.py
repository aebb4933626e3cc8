"""Figures: arrays and axes in, axes out. Nothing is shown or saved here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowrank_sp._arrays import Array, to_host


def spectrum(spectra: Mapping[str, Array], *, rank: int | None = None, ax: Any = None) -> Any:
    """Singular values against their index, one line a matrix.

    Parameters
    ----------
    spectra : mapping from label to array
        Singular values from large to small. More than eight lines share two colours and get no
        legend.
    rank : int, optional
        Marked by a vertical line.
    ax : matplotlib Axes, optional
        A new figure's by default.

    Returns
    -------
    matplotlib Axes
    """
    from matplotlib.figure import Figure

    ax = Figure(figsize=(7, 4.2), layout="constrained").subplots() if ax is None else ax
    many = len(spectra) > 8
    for label, values in spectra.items():
        s = to_host(values) if not isinstance(values, list) else np.asarray(values)
        style = {"color": "C0", "alpha": 0.35, "linewidth": 1.0} if many else {"label": label}
        ax.plot(np.arange(1, len(s) + 1), s, **style)
    if rank is not None:
        ax.axvline(rank, color="C3", linestyle="--", linewidth=1.2, label=f"rank {rank}")
    ax.set(xlabel="index", ylabel="singular value", yscale="log", xscale="log")
    ax.grid(True, which="major", alpha=0.25)
    if many:
        ax.set_title(f"{len(spectra)} layers", loc="left", fontsize=10)
    if not many or rank is not None:
        ax.legend(frameon=False, fontsize=8)
    return ax
