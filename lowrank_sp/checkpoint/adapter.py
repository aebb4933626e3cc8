"""Adapters of a model: a form for every adapted layer, and the base that they were made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lowrank_sp.adapters.forms import Form, Product
from lowrank_sp.checkpoint.model import Checkpoint
from lowrank_sp.checkpoint.tensors import CheckpointError


@dataclass(frozen=True)
class Adapter:
    """Adapters of the layers of one model.

    Attributes
    ----------
    layers : mapping from module name to Form
        Outputs by inputs, however the base stores its weights: of an embedding, its width by its
        entries; of a convolution, its outputs by the inputs of one output.
    base : str, optional
        Name or path of the base model.
    fingerprint : str, optional
        Of the base: :meth:`~lowrank_sp.checkpoint.model.Checkpoint.fingerprint`.
    fan_in_fan_out : bool
        Whether the base stores its weights inputs by outputs.
    embeddings : frozenset of str
        Which layers are embeddings.
    kernels : mapping from str to tuple of int
        Which layers are convolutions, and the sizes of their kernels.
    method : str, optional
        The method, for forms that are those of two: "KaSA", beside whose ``DiagonalCore`` PEFT cuts
        the base weight, where "AdaLoRA" leaves it.
    """

    layers: Mapping[str, Form]
    base: str | None = None
    fingerprint: str | None = None
    fan_in_fan_out: bool = False
    embeddings: frozenset[str] = frozenset()
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    method: str | None = None

    def products(self) -> dict[str, Product]:
        """The layers of plain LoRA.

        Raises
        ------
        CheckpointError
            If a layer is of another form.
        """
        products = {}
        for name, form in self.layers.items():
            if not isinstance(form, Product):
                raise CheckpointError(
                    f"{name}: plain LoRA is needed, got {type(form).__name__}; convert it first"
                )
            products[name] = form
        return products


def base_mismatch(model: Checkpoint, *, base: str | None, fingerprint: str | None) -> str | None:
    """Why a model is not the base that an adapter was made for; None where it may be.

    Fingerprints decide, for which all of the model is read: that of the adapter; or, where it has
    none, as after training in PEFT, that of its base, if it is found here under its name. A name
    alone, such as one on a hub, decides nothing.

    Parameters
    ----------
    model : Checkpoint
    base, fingerprint : str, optional
        As in :class:`Adapter`.
    """
    if fingerprint is None and isinstance(base, str) and _is_one_place(base, str(model.path)):
        return None
    wanted = base_fingerprint(base=base, fingerprint=fingerprint)
    if wanted is None or wanted == model.fingerprint():
        return None
    return f"made for {base or 'another base'}, whose tensors are not those of {model.path}"


def base_fingerprint(*, base: str | None, fingerprint: str | None) -> str | None:
    """That of an adapter, or else of its base, if that is found on this machine under its name.

    Parameters
    ----------
    base, fingerprint : str, optional
        As in :class:`Adapter`.
    """
    if fingerprint is not None or not isinstance(base, str) or not Path(base).exists():
        return fingerprint
    try:
        return Checkpoint(base).fingerprint()
    except CheckpointError:
        return None


def check_base(model: Checkpoint, adapters: Mapping[str, Adapter]) -> None:
    """Raise unless a model may be the base of all adapters: see :func:`base_mismatch`.

    Parameters
    ----------
    model : Checkpoint
    adapters : mapping from str to Adapter
        By the name that errors give them.

    Raises
    ------
    CheckpointError
        Which names the adapter.
    """
    for name, adapter in adapters.items():
        reason = base_mismatch(model, base=adapter.base, fingerprint=adapter.fingerprint)
        if reason is not None:
            raise CheckpointError(f"{name}: {reason}")


def _is_one_place(one: str | None, two: str | None) -> bool:
    """Whether two names are paths of one directory or file."""
    if one is None or two is None:
        return False
    return Path(one).exists() and Path(two).exists() and Path(one).samefile(two)


def check_same_base(adapters: Mapping[str, Adapter]) -> None:
    """Raise unless all adapters were made for one base model.

    Fingerprints decide where both adapters have one, names elsewhere: a path is what it leads to.

    Parameters
    ----------
    adapters : mapping from str to Adapter
        By the name that errors give them.

    Raises
    ------
    CheckpointError
        Which names the two that differ.
    """
    seen: list[tuple[str, Adapter]] = []
    for name, adapter in adapters.items():
        for other, known in seen:
            prints = known.fingerprint, adapter.fingerprint
            one, two = prints if None not in prints else (known.base, adapter.base)
            if one != two and not _is_one_place(one, two):
                differ = ", whose tensors differ" if None not in prints else ""
                raise CheckpointError(
                    f"adapters must have one base, got {known.base!r} of {other} and "
                    f"{adapter.base!r} of {name}{differ}"
                )
        seen.append((name, adapter))
