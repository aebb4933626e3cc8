"""Figures: arrays and axes in, axes out. Nothing is shown or saved here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lowrank_sp._arrays import Array, to_host
from lowrank_sp.inverse.study import success_rate


def spectrum(spectra: Mapping[str, Array], *, rank: int | None = None, ax: Any = None) -> Any:
    """Singular values against their index, one line a matrix.

    Parameters
    ----------
    spectra : mapping from label to array
        Singular values from large to small; zeros are not drawn. Of more than eight lines, those
        whose labels end alike (``q_proj`` of ``layers.0.q_proj``) share a colour and an entry of
        the legend; of more than ten such kinds, all do.
    rank : int, optional
        Marked by a vertical line.
    ax : matplotlib Axes, optional
        A new figure's by default.

    Returns
    -------
    matplotlib Axes
    """
    ax = _axes((7, 4.2)) if ax is None else ax
    many = len(spectra) > 8
    kinds = [label.rsplit(".", 1)[-1] if many else label for label in spectra]
    if len(set(kinds)) > 10:
        kinds = ["all"] * len(kinds)
    groups: dict[str, list[np.ndarray]] = {}
    for kind, values in zip(kinds, spectra.values(), strict=True):
        s = to_host(values) if not isinstance(values, list) else np.asarray(values)
        groups.setdefault(kind, []).append(s[s > 0])
    for k, (kind, members) in enumerate(groups.items()):
        label = kind if len(members) == 1 else f"{kind} ({len(members)})"
        for s in members:
            ax.plot(np.arange(1, len(s) + 1), s, color=f"C{k}", linewidth=1.2, label=label)
            label = None
    if rank is not None:
        ax.axvline(rank, color="0.3", linestyle=":", linewidth=1.2, label=f"rank {rank}")
    ax.set(xlabel="index", ylabel="singular value")
    if any(len(s) for members in groups.values() for s in members):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(True, which="major", alpha=0.25)
    if many:
        ax.set_title(f"{len(spectra)} layers", loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
    return ax


def phase_diagram(
    records: Iterable[Mapping[str, Any]],
    x: str,
    y: str,
    *,
    tol: float = 1e-6,
    ax: Any = None,
) -> Any:
    """Share of problems recovered, in shades from black (none) to white (all).

    Parameters
    ----------
    records : iterable of dict
        As :func:`lowrank_sp.inverse.study.phase_transition` returns them, of one solver.
    x, y : str
        Parameters along the axes.
    tol : float
        Errors of at most this are successes.
    ax : matplotlib Axes, optional
        A new figure's by default.

    Returns
    -------
    matplotlib Axes
        Its image ``ax.images[0]`` holds the shares, for a colour bar.
    """
    ax = _axes((4.6, 4.0)) if ax is None else ax
    cells = success_rate(records, (x, y), tol)
    columns, rows = (sorted({cell[name] for cell in cells}) for name in (x, y))
    share = np.full((len(rows), len(columns)), np.nan)
    for cell in cells:
        share[rows.index(cell[y]), columns.index(cell[x])] = cell["success"]
    ax.set_facecolor("C0")
    ax.imshow(share, cmap="gray", vmin=0.0, vmax=1.0, origin="lower", aspect="auto")
    ax.set_xticks(range(len(columns)), [f"{v:g}" if _is_number(v) else v for v in columns])
    ax.set_yticks(range(len(rows)), [f"{v:g}" if _is_number(v) else v for v in rows])
    ax.set(xlabel=x, ylabel=y)
    return ax


def convergence(
    records: Iterable[Mapping[str, Any]], *, against: str = "step", ax: Any = None
) -> Any:
    """Error of the iterates, one line a solver.

    Parameters
    ----------
    records : iterable of dict
        As :func:`lowrank_sp.inverse.study.compare` returns them.
    against : str
        Column along the horizontal axis: ``step`` or ``seconds``.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    ax = _axes((5.6, 4.0)) if ax is None else ax
    lines: dict[str, list[tuple[float, float]]] = {}
    for r in records:
        lines.setdefault(r["solver"], []).append((r[against], r["error"]))
    for label, points in lines.items():
        ax.plot(*zip(*points, strict=True), label=label, linewidth=1.5)
    ax.set(xlabel=against, ylabel="relative error", yscale="log")
    ax.grid(True, which="major", alpha=0.25)
    ax.legend(frameon=False, fontsize=8)
    return ax


def recovered_spectrum(recovered: Mapping[str, Array], truth: Array, *, ax: Any = None) -> Any:
    """Recovered singular values over the true ones, which are the diagonal.

    Parameters
    ----------
    recovered : mapping from label to array
        Singular values from large to small. Those beyond the rank of the truth are drawn at the
        left end.
    truth : array
        True singular values from large to small.
    ax : matplotlib Axes, optional

    Returns
    -------
    matplotlib Axes
    """
    ax = _axes((4.6, 4.2)) if ax is None else ax
    true = to_host(truth)
    true = true[true > 0]
    ends = [float(true[-1]), float(true[0])]
    ax.plot(ends, ends, color="0.6", linewidth=1.0, zorder=0)
    edge = ends[0] * (ends[0] / ends[1]) ** 0.15 if ends[0] < ends[1] else ends[0] / 2
    for label, values in recovered.items():
        s = to_host(values)
        spurious = np.full(max(0, len(s) - len(true)), edge)
        at = np.concatenate([true[: len(s)], spurious])
        ax.plot(at, s, "o", markersize=4, label=label, alpha=0.8)
    ax.set(xlabel="true singular value", ylabel="recovered", xscale="log", yscale="log")
    ax.grid(True, which="major", alpha=0.25)
    ax.legend(frameon=False, fontsize=8)
    return ax


def _axes(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained").subplots()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
