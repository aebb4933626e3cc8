r"""Updates of many layers in shared factors, :math:`\Delta_l = U C_l V^T`.

Weights are cut into blocks (:class:`~lowrank_sp.adapters.forms._grid.LayerGrid`), and every block
is a slice ``U C V^T`` of one tensor, whose core ``C`` is that of a tensor format.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_sp._arrays import Array, device, namespace
from lowrank_sp.adapters.forms._form import Form, LayeredForm
from lowrank_sp.adapters.forms._grid import Index, LayerGrid
from lowrank_sp.adapters.forms._parts import Trained
from lowrank_sp.factors import LowRank
from lowrank_sp.tensors.modes import kronecker


@dataclass(frozen=True, repr=False)
class CoreBlocks(Form):
    r"""Blocks ``(i, j)`` of an update, all in the same two factors: :math:`U C_{ij} V^T`.

    .. math:: \Delta = (I_a \otimes U)\, C\, (I_b \otimes V^T),
              \qquad C \in \mathbb{R}^{a r \times b s}

    It is what one layer has of a :class:`SharedCore`. What the blocks hold beyond the edge of the
    weight is left out.

    Attributes
    ----------
    up : array, shape (u, r)
        ``U``.
    core : array, shape (a, b, r, s)
        ``C_ij``.
    down : array, shape (s, v)
        ``V^T``.
    size : (int, int)
        Shape ``(m, n)`` of the weight, in ``(a - 1) u < m <= a u`` and likewise ``n``.

    Examples
    --------
    >>> import numpy as np
    >>> form = CoreBlocks(np.ones((3, 1)), np.ones((2, 1, 1, 1)), np.ones((1, 4)), (6, 4))
    >>> form.delta()
    LowRank(6 x 4, rank 1, float64)
    """

    up: Trained[Array, "u r"]
    core: Trained[Array, "a b r s"]
    down: Trained[Array, "s v"]
    size: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    @property
    def rank_bound(self) -> int:
        a, b, r, s = self.core.shape
        (u, _), (_, v) = self.up.shape, self.down.shape
        return min(*self.size, a * min(u, r), b * min(s, v))

    def delta(self) -> LowRank:
        xp = namespace(self.core)
        a, b, r, s = self.core.shape
        (m, n), u, v = self.size, self.up.shape[0], self.down.shape[1]
        if b * s <= a * r:
            rows = xp.permute_dims(self.up @ self.core, (0, 2, 1, 3))
            left = xp.reshape(rows, (a * u, b * s))
            return LowRank(left[:m, :], _repeated(self.down, b)[:, :n])
        columns = xp.permute_dims(self.core @ self.down, (0, 2, 1, 3))
        right = xp.reshape(columns, (a * r, b * v))
        return LowRank(_repeated(self.up, a)[:m, :], right[:, :n])

    def apply(self, x: Array) -> Array:
        a, b, r, s = self.core.shape
        m, n = self.size
        if a == b == 1:
            z = (x @ self.down[:, :n].mT) @ self.core[0, 0, :, :].mT
            return z @ self.up[:m, :].mT
        xp = namespace(x)
        lead, missing = tuple(x.shape[:-1]), b * self.down.shape[1] - n
        if missing:
            pad = xp.zeros((*lead, missing), dtype=x.dtype, device=device(x))
            x = xp.concat([x, pad], axis=-1)
        z = xp.reshape(xp.reshape(x, (*lead, b, self.down.shape[1])) @ self.down.mT, (*lead, b * s))
        mixed = z @ xp.reshape(xp.permute_dims(self.core, (1, 3, 0, 2)), (b * s, a * r))
        y = xp.reshape(mixed, (*lead, a, r)) @ self.up.mT
        return xp.reshape(y, (*lead, a * y.shape[-1]))[..., :m]


def _repeated(block: Array, count: int) -> Array:
    """``I (x) block``."""
    if count == 1:
        return block
    xp = namespace(block)
    return kronecker([xp.eye(count, dtype=block.dtype, device=device(block)), block])


@dataclass(frozen=True, repr=False)
class SharedCore(LayeredForm):
    r"""Updates in shared factors, each block with a core of its own, :math:`s\, U C_i V^T`.

    The core of a block is an entry of a tensor in one of three formats: :class:`SharedTT`,
    :class:`SharedCP` or :class:`SharedTucker`. Along a single axis these are free cores, diagonal
    cores, and mixtures of a few cores.

    Attributes
    ----------
    up : array, shape (u, r)
        ``U``.
    down : array, shape (s, v)
        ``V^T``.
    grid : LayerGrid
        Shapes of the weights and indices ``i`` of their blocks.
    scale : float
        What multiplies all updates.
    """

    up: Trained[Array, "u r"]
    down: Trained[Array, "s v"]
    grid: LayerGrid
    scale: float

    @abstractmethod
    def core_of(self, indices: Sequence[Index]) -> Array:
        """Cores of some blocks, of shape ``(len(indices), r, s)`` and without the scale."""

    @property
    def core_rank(self) -> int:
        """Largest rank of the core of one block."""
        return min(self.up.shape[1], self.down.shape[0])

    @property
    def num_layers(self) -> int:
        return len(self.grid.shapes)

    @property
    def rank_bound(self) -> int:
        return max(self._bound(k) for k in range(self.num_layers))

    def _bound(self, index: int) -> int:
        (a, b), (u, r), (s, v) = self.grid.counts(index), self.up.shape, self.down.shape
        sides = a * min(u, r), b * min(s, v), a * b * self.core_rank
        return min(*self.grid.shapes[index], *sides)

    def layer(self, index: int) -> CoreBlocks:
        (a, b), indices = self.grid.counts(index), self.grid.indices[index]
        core = self.core_of(indices) * self.scale
        core = namespace(core).reshape(core, (a, b, *core.shape[-2:]))
        size = self.grid.shapes[index]
        return CoreBlocks.assembled({"up": self.up, "core": core, "down": self.down, "size": size})

    def _check_sizes(self, name: str, arrays: Sequence[Array], wanted: Sequence[Index]) -> None:
        found = [tuple(a.shape) for a in arrays]
        if (*self.up.shape[:1], *self.down.shape[1:]) != self.grid.block or found != list(wanted):
            raise ValueError(
                f"{name} of {type(self).__name__} must have shape {', '.join(map(str, wanted))} "
                f"between factors for blocks of shape {self.grid.block}, got "
                f"{', '.join(map(str, found))} between {tuple(self.up.shape)} and "
                f"{tuple(self.down.shape)}"
            )
