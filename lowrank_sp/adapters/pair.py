"""The two factors of a LoRA adapter, as everything here takes them that handles many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_sp._arrays import Array, as_compute, dtype_name, namespace
from lowrank_sp.factors import LowRank


@dataclass(frozen=True)
class Pair:
    """An adapter of one layer: its weight gains ``scale * up @ down``.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    scale : float
        ``alpha / r``.
    """

    up: Array
    down: Array
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Columns of ``up``."""
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the weight."""
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> LowRank:
        """The update of the weight, ``scale * up @ down``."""
        return self.scale * LowRank(self.up, self.down)


def pair_of(adapter: Any, name: str) -> Pair:
    """A :class:`Pair` of whatever has ``up``, ``down`` and ``scale``, or is a product of factors.

    ``name`` is that of the adapter in errors.
    """
    if isinstance(adapter, LowRank):
        up, down, scale = adapter.left, adapter.right, 1.0
    elif all(hasattr(adapter, part) for part in ("up", "down", "scale")):
        up, down, scale = adapter.up, adapter.down, float(adapter.scale)
    else:
        raise TypeError(
            f"{name} must have up, down and scale, or be a LowRank, got {type(adapter).__name__}"
        )
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"the factors of {name} must have shapes (m, r) and (r, n), "
            f"got {tuple(up.shape)} and {tuple(down.shape)}"
        )
    return Pair(up, down, scale)


def pairs_of(
    adapters: Sequence[Any], kind: str, names: Sequence[Any] | None = None, *, widen: bool = True
) -> list[Pair]:
    """Pairs of one dtype and array library, at least one of them.

    Parameters
    ----------
    adapters : sequence
    kind, names
        What an adapter is called in errors, such as ``client 2``; by default by its position.
    widen : bool
        Whether half precision becomes float32.
    """
    names = range(len(adapters)) if names is None else names
    pairs = [pair_of(a, f"{kind} {name}") for a, name in zip(adapters, names, strict=True)]
    if not pairs:
        raise ValueError(f"at least one {kind} is needed, got none")
    namespace(*[factor for pair in pairs for factor in (pair.up, pair.down)])
    if widen:
        pairs = [Pair(as_compute(pair.up), as_compute(pair.down), pair.scale) for pair in pairs]
    dtype = pairs[0].up.dtype
    for name, pair in zip(names, pairs, strict=True):
        for factor in (pair.up, pair.down):
            if factor.dtype != dtype:
                raise TypeError(
                    f"all factors must have one dtype, got {dtype_name(dtype)} and, of {kind} "
                    f"{name}, {dtype_name(factor.dtype)}; cast them first"
                )
    return pairs


def check_alike(
    pairs: Sequence[Pair], kind: str, properties: Sequence[str], names: Sequence[Any] | None = None
) -> None:
    """Raise where a pair differs from the first one in one of ``properties``."""
    names = range(len(pairs)) if names is None else names
    for what in properties:
        first = getattr(pairs[0], what)
        for name, pair in zip(names, pairs, strict=True):
            if getattr(pair, what) != first:
                raise ValueError(
                    f"all {kind}s must have one {what}, got {first} and, of {kind} {name}, "
                    f"{getattr(pair, what)}"
                )
