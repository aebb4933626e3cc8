"""The report of an initialization, as it stands beside its files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lowrank_sp.checkpoint.tensors import CheckpointError, read_object

REPORT = "report.json"


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes
    ----------
    name : str
    shape : (int, int)
        Outputs by inputs.
    rank : int
    alpha : float
    singular_values : list of float
        Those the adapter was made of; empty where the method uses none.
    energy : float or None
        Their share of ``||W||_F^2``.
    bound : float or None
        Certified error of every one of them, relative to the largest.
    seconds : float
    """

    name: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    singular_values: list[float]
    energy: float | None
    bound: float | None
    seconds: float


@dataclass(frozen=True)
class Report:
    """What :func:`initialize` did, as it stands in ``report.json``."""

    method: str
    rank: int
    alpha: float
    seed: int
    tol: float | None
    version: str
    model: str
    fingerprint: str
    base: str
    layers: list[LayerReport]

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what :meth:`save` wrote."""
        fields = read_object(path, "report")
        try:
            layers = [LayerReport(**layer) for layer in fields.pop("layers")]
            report = cls(layers=layers, **fields)
            names = [report.base, report.fingerprint, *(row.name for row in layers)]
            if not layers or not all(isinstance(name, str) for name in names):
                raise TypeError("layers, names, base and fingerprint are needed")
            if any(len(row.shape) != 2 for row in layers):
                raise TypeError("a shape has two numbers")
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a readable report ({error})") from error
        return report
