"""What a job did, layer by layer, as it stands beside the files that it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    error : float or None
        Root mean square norm of what the residual makes of the inputs, where it is known.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    alpha: float
    singular_values: list[float]
    energy: float | None
    bound: float | None
    seconds: float
    error: float | None = None


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
    calibration: str | None = None

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what :meth:`save` wrote."""
        fields = read_object(path, "report")
        if "job" in fields:
            raise CheckpointError(
                f"{path}: the report of {fields['job']!r}; only what init wrote can be verified"
            )
        try:
            layers = [LayerReport(**layer) for layer in fields.pop("layers")]
            report = cls(layers=layers, **fields)
            names = [report.base, report.fingerprint, *(row.name for row in layers)]
            if not layers or not all(isinstance(name, str) for name in names):
                raise TypeError("layers, names, base and fingerprint are needed")
            if any(len(row.shape) != 2 for row in layers):
                raise TypeError("a shape has two numbers")
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a readable report of init ({error})") from error
        return report


@dataclass(frozen=True)
class LayerOutcome:
    """What a job made of one layer.

    Attributes
    ----------
    name : str
    shape : (int, int)
        Outputs by inputs.
    rank : int
        Of what was written.
    norm : float
        Frobenius norm of what was asked for.
    error : float
        Frobenius norm of what is missing of it in what was written.
    seconds : float
        Of a layer that several adapters have, on all of them.
    adapter : str or None
        Which of them, where a job writes several.
    note : str
        What is unusual about the layer.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    norm: float
    error: float
    seconds: float
    adapter: str | None = None
    note: str = ""

    @property
    def relative_error(self) -> float:
        """``error`` over ``norm``; infinite where only the norm is zero."""
        if self.norm == 0.0:
            return 0.0 if self.error == 0.0 else float("inf")
        return self.error / self.norm


@dataclass(frozen=True)
class JobReport:
    """What a job on adapters or models did, as it stands in ``report.json``.

    Attributes
    ----------
    job, version : str
        Its name, and the version of the library.
    inputs : mapping from str to str
        What was read, by the name that the job gives it.
    options : mapping from str to any
        Those that were given.
    layers : list of LayerOutcome
    notes : mapping from str to list of str
        Names of tensors or layers that one should know something about, by what that is.
    totals : mapping from str to float
        Numbers over all layers, where a job has such.
    """

    job: str
    version: str
    inputs: Mapping[str, str]
    options: Mapping[str, Any]
    layers: list[LayerOutcome]
    notes: Mapping[str, list[str]] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> JobReport:
        """Read what :meth:`save` wrote."""
        fields = read_object(path, "report")
        try:
            layers = [LayerOutcome(**layer) for layer in fields.pop("layers")]
            return cls(layers=layers, **fields)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a readable report ({error})") from error
