"""The spectrum of every linear layer of a checkpoint, and the ranks that it suggests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowrank_sp.checkpoint.model import Checkpoint, Layer
from lowrank_sp.checkpoint.tensors import CheckpointError, OptionError
from lowrank_sp.linalg.spectrum import effective_rank, energy_rank, gavish_donoho_rank, stable_rank
from lowrank_sp.linalg.svd import singular_values
from lowrank_sp.tasks import Executor, run


@dataclass(frozen=True)
class LayerSpectrum:
    """Spectrum of one layer.

    Attributes
    ----------
    name : str
    shape : (int, int)
        Outputs by inputs.
    singular_values : list of float
        All of them.
    effective_rank, stable_rank : float
    rank_50, rank_90, rank_99 : int
        Ranks that hold 50, 90 and 99 % of ``||W||_F^2``.
    signal_rank : int
        Singular values above the Gavish-Donoho threshold for noise of unknown size.
    """

    name: str
    shape: tuple[int, int]
    singular_values: list[float]
    effective_rank: float
    stable_rank: float
    rank_50: int
    rank_90: int
    rank_99: int
    signal_rank: int


def spectra(
    model: str | Path,
    *,
    targets: str | None = None,
    executor: Executor | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[LayerSpectrum]:
    """Spectra of the linear layers of a checkpoint; parameters are those of ``initialize``."""
    layers = Checkpoint(model).layers(targets)
    out = []
    for spectrum in run(_layer_spectrum, layers, executor):
        out.append(spectrum)
        if progress is not None:
            progress(len(out), len(layers), spectrum.name)
    return out


def _layer_spectrum(layer: Layer) -> LayerSpectrum:
    try:
        s = singular_values(layer.tensor.read())
    except ValueError as error:
        raise CheckpointError(f"{layer.name}: {error}") from error
    return LayerSpectrum(
        name=layer.name,
        shape=layer.shape,
        singular_values=[float(x) for x in s],
        effective_rank=effective_rank(s),
        stable_rank=stable_rank(s),
        rank_50=energy_rank(s, 0.5),
        rank_90=energy_rank(s, 0.9),
        rank_99=energy_rank(s, 0.99),
        signal_rank=gavish_donoho_rank(s, layer.shape),
    )


def suggest_ranks(spectra: list[LayerSpectrum], rank: int) -> dict[str, int]:
    """A ``rank_pattern`` that costs no more parameters than ``rank`` everywhere.

    Ranks are spent one by one where the next singular value takes up the largest share of its
    layer's energy per parameter, from 1 for every layer.

    Parameters
    ----------
    spectra : list of LayerSpectrum
    rank : int
        The uniform rank whose parameter count is the budget.
    """
    prices = {s.name: sum(s.shape) for s in spectra}
    budget = sum(min(rank, min(s.shape)) * prices[s.name] for s in spectra)
    ranks = {s.name: 1 for s in spectra}
    budget -= sum(prices.values())
    gains = []
    for s in spectra:
        largest = s.singular_values[0] or 1.0
        energies = [(x / largest) ** 2 for x in s.singular_values]
        total = sum(energies) or 1.0
        for k, x in enumerate(energies[1:], start=2):
            gains.append((-x / total / prices[s.name], s.name, k))
    for _, name, k in sorted(gains):
        if prices[name] <= budget and ranks[name] == k - 1:
            ranks[name] = k
            budget -= prices[name]
    return ranks


def check_figure(path: Path) -> None:
    """Raise CheckpointError unless a figure can be saved under that name."""
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise OptionError(f"{path}: a figure must end in .{', .'.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: no such directory to save the figure in")


def save_spectra(spectra: list[LayerSpectrum], rank: int, path: Path) -> None:
    """Draw the spectra of a checkpoint into a file of a kind that matplotlib writes."""
    from lowrank_sp.plot import spectrum

    check_figure(path)
    axes = spectrum({s.name: s.singular_values for s in spectra}, rank=rank)
    axes.figure.savefig(path, dpi=150)
