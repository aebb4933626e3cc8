"""Weights of many layers cut into blocks of one size, and the places of the blocks in a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lowrank_sp._arrays import Array, is_array, namespace
from lowrank_sp.adapters.forms._draws import Like, template

#: Position of one block along every axis of a core tensor.
Index = tuple[int, ...]


@dataclass(frozen=True)
class LayerGrid:
    r"""Where the weights of many layers stand in one tensor.

    A weight ``(m, n)`` is cut into ``a x b`` blocks of one size ``(u, v)``, of which the last ones
    may reach over its edge. A block is one matrix of a tensor ``(n_1, ..., n_K, u, v)``: its index
    along the axes, of which there may be any number, says which one.

    Parameters
    ----------
    block : (int, int)
        ``(u, v)``.
    shapes : sequence of (int, int)
        Shapes of the weights.
    indices : sequence of sequences of tuples of K int
        For every weight the indices of its blocks, row by row.

    Examples
    --------
    Two projections of two layers, on two axes; and a weight of four blocks on one axis:

    >>> LayerGrid.indexed([(8, 8)] * 4, [(0, 0), (0, 1), (1, 0), (1, 1)]).sizes
    (2, 2)
    >>> LayerGrid.numbered([(8, 8), (32, 8)], block=(8, 8)).indices
    (((0,),), ((1,), (2,), (3,), (4,)))
    """

    block: tuple[int, int]
    shapes: tuple[tuple[int, int], ...]
    indices: tuple[tuple[Index, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", tuple(self.block))
        object.__setattr__(self, "shapes", tuple(map(tuple, self.shapes)))
        blocks = tuple(tuple(map(tuple, part)) for part in self.indices)
        object.__setattr__(self, "indices", blocks)
        places = [place for part in blocks for place in part]
        if len(blocks) != len(shapes_of(self.shapes)):
            raise ValueError(
                f"every weight needs indices, got {len(self.shapes)} weights and "
                f"{len(blocks)} sets of indices"
            )
        if len({len(place) for place in places}) != 1 or len(set(places)) < len(places):
            raise ValueError("indices of blocks must be different tuples of one length")
        for k, part in enumerate(blocks):
            a, b = self.counts(k)
            if len(part) != a * b:
                raise ValueError(
                    f"weight {k} of shape {self.shapes[k]} has {a} x {b} blocks of shape "
                    f"{self.block}, got {len(part)} indices"
                )

    @classmethod
    def numbered(cls, weights: Sequence[Like], block: tuple[int, int] | None = None) -> LayerGrid:
        """All blocks of all weights in a row, along a single axis.

        Parameters
        ----------
        weights : sequence of arrays or shapes
        block : (int, int), optional
            By default the least that holds every weight, which is then one block.
        """
        shapes = shapes_of(weights)
        block = block or _largest(shapes)
        indices, count = [], 0
        for shape in shapes:
            a, b = _counts(shape, block)
            indices.append(tuple((count + k,) for k in range(a * b)))
            count += a * b
        return cls(block, tuple(shapes), tuple(indices))

    @classmethod
    def indexed(
        cls, weights: Sequence[Like], indices: Sequence[Index], block: tuple[int, int] | None = None
    ) -> LayerGrid:
        """One index for every weight, such as ``(layer, type)``.

        Where weights have more blocks than one, the number of the block in its weight, such as that
        of an attention head, is an axis after those.

        Parameters
        ----------
        weights : sequence of arrays or shapes
        indices : sequence of tuples of int
        block : (int, int), optional
            By default the least that holds every weight.
        """
        shapes = shapes_of(weights)
        if len(indices) != len(shapes):
            raise ValueError(f"{len(shapes)} weights need as many indices, got {len(indices)}")
        block = block or _largest(shapes)
        cut = any(_counts(shape, block) != (1, 1) for shape in shapes)
        parts = [
            tuple((*place, k) if cut else tuple(place) for k in range(a * b))
            for place, (a, b) in zip(indices, (_counts(s, block) for s in shapes), strict=True)
        ]
        return cls(block, tuple(shapes), tuple(parts))

    @classmethod
    def from_names(
        cls, weights: Mapping[str, Like], block: tuple[int, int] | None = None
    ) -> LayerGrid:
        """The weights of a model, on the axes ``(layer, type)`` that their names tell.

        The first number between the dots of a name is its layer, the rest of it its type. Both are
        numbered: layers as they are ordered, types as they come.

        Parameters
        ----------
        weights : mapping from str to array or shape
        block : (int, int), optional
            As in :meth:`indexed`.

        Examples
        --------
        >>> names = ["model.3.attn.q", "model.3.attn.v", "model.7.attn.q", "model.7.attn.v"]
        >>> LayerGrid.from_names(dict.fromkeys(names, (8, 8))).indices
        (((0, 0),), ((0, 1),), ((1, 0),), ((1, 1),))
        """
        found = []
        for name in weights:
            parts = name.split(".")
            numbers = [k for k, part in enumerate(parts) if part.isdecimal()]
            if not numbers:
                raise ValueError(
                    f"no part of the name {name!r} is the number of a layer; say where the weights "
                    "stand by LayerGrid.indexed"
                )
            at = numbers[0]
            found.append((int(parts[at]), (*parts[:at], *parts[at + 1 :])))
        layers = sorted({layer for layer, _ in found})
        types = list(dict.fromkeys(kind for _, kind in found))
        places = [(layers.index(layer), types.index(kind)) for layer, kind in found]
        return cls.indexed(list(weights.values()), places, block)

    def counts(self, layer: int) -> tuple[int, int]:
        """``(a, b)``: numbers of rows and columns of blocks of a weight."""
        return _counts(self.shapes[layer], self.block)

    @property
    def sizes(self) -> tuple[int, ...]:
        """``(n_1, ..., n_K)``: how many positions every axis has."""
        return tuple(max(axis) + 1 for axis in zip(*self._places(), strict=True))

    @property
    def full(self) -> bool:
        """Whether every position of the tensor is a block of a weight."""
        return len(set(self._places())) == len(list(product(*map(range, self.sizes))))

    def _places(self) -> list[Index]:
        return [place for part in self.indices for place in part]


def gathered(a: Array, positions: Sequence[int]) -> Array:
    """``a[positions, ...]``; one entry where all are the same, and a view where that can be."""
    first, count = positions[0], len(positions)
    if all(k == first for k in positions):
        return a[first : first + 1, ...]
    if list(positions) == list(range(first, first + count)):
        return a[first : first + count, ...]
    return namespace(a).stack([a[k, ...] for k in positions])


def shapes_of(weights: Sequence[Like]) -> list[tuple[int, int]]:
    """Shapes of weights, of which some may be given by their shapes."""
    every = [weights] if is_array(weights) else weights
    wrong = [w for w in every if not (isinstance(w, tuple) or hasattr(w, "shape"))]
    if every is not weights or wrong:
        kind = f"{type(wrong[0]).__name__} in it" if wrong else "one array"
        raise TypeError(
            f"weights must be a sequence of arrays or of shapes, one for each layer, got {kind}"
        )
    if not weights:
        raise ValueError("at least one weight is needed, got none")
    return [tuple(w if isinstance(w, tuple) else w.shape) for w in weights]


def like_of(weights: Sequence[Like]) -> Array:
    """:func:`~lowrank_sp.adapters.forms._draws.template` of the first weight that is an array."""
    arrays = [w for w in weights if not isinstance(w, tuple)]
    return template(arrays[0] if arrays else weights[0])[1]


def _largest(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return max(m for m, _ in shapes), max(n for _, n in shapes)


def _counts(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
