r"""Sum over a fixed random basis with trained gains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import RNG, Array, from_host, namespace
from lowrank_sp.adapters.forms._draws import Like, factor_scale, full, zeros
from lowrank_sp.adapters.forms._entries import count_of
from lowrank_sp.adapters.forms._form import Form
from lowrank_sp.adapters.forms._parts import Fixed, Trained

#: ``(small, large)`` of a basis.
Basis = tuple[Array, Array]


@dataclass(frozen=True, repr=False)
class RandomSum(Form):
    r"""Products of fixed random factors, with gains in between: RandLoRA
    :cite:p:`albert2025randlora`.

    .. math:: K = s \sum_{j=1}^N B_j \Lambda_j A\, \Gamma_j, \qquad
              \Delta = K \text{ if } m \ge n, \text{ else } K^T

    with diagonal :math:`\Lambda_j` (r entries) and :math:`\Gamma_j` (as many as the smaller side
    has). With ``N r`` at least the smaller side the rank is full. All layers may share one basis.

    Attributes
    ----------
    small : array, shape (r, k)
        ``A``, for the smaller side ``k``.
    large : array, shape (l, N, r)
        ``B_j`` at ``[:, j, :]``, for the larger side.
    gains : array, shape (r, N)
        ``Lambda_j`` in the columns.
    columns : array, shape (N, k)
        ``Gamma_j`` in the rows.
    wide : bool
        Whether ``m < n``.
    scale : float

    Notes
    -----
    ``2 N r (m + n)`` flops per input, about twice those of a square weight; the basis is as large.
    For fewer inputs than ``r`` only they are multiplied by gains, not the basis.
    Adapters of PEFT pair the factors in another way: :class:`PositionalRandomSum`.

    Examples
    --------
    >>> form = RandomSum.create((60, 40), rank=8, rng=0)
    >>> form
    RandomSum(small 8 x 40, large 60 x 5 x 8, gains 8 x 5, columns 5 x 40)
    >>> form.num_trainable, form.rank_bound
    (240, 40)
    """  # noqa: D205

    small: Fixed[Array, "r k"]
    large: Fixed[Array, "l N r"]
    gains: Trained[Array, "r N"]
    columns: Trained[Array, "N k"]
    wide: bool
    scale: float = 1.0

    @classmethod
    def create(
        cls,
        weight: Like,
        rank: int,
        *,
        alpha: float | None = None,
        basis: Basis | None = None,
        rng: RNG = None,
    ) -> Self:
        """Gains zero, columns ``1 / max(N, k)``, ``alpha = 20 rank`` by default, as in PEFT.

        Parameters
        ----------
        weight : array or (int, int)
        rank : int
        alpha : float, optional
        basis : (array, array), optional
            As :func:`random_basis` gives it, for at least these sizes and exactly this rank. Of a
            larger one the leading part is used.
        rng : int, Generator or None
            Seed of the basis where none is given.
        """
        alpha = 20.0 * rank if alpha is None else alpha
        (m, n), like, scale = factor_scale(weight, rank, alpha)
        k, longer, count = min(m, n), max(m, n), -(-min(m, n) // rank)
        small, large = random_basis(weight, rank, rng=rng) if basis is None else basis
        if small.shape[0] != rank or small.shape[1] < k or large.shape[0] < longer:
            raise ValueError(
                f"basis must have shapes ({rank}, k) and (l, N, {rank}) with k >= {k} and "
                f"l >= {longer}, got {tuple(small.shape)} and {tuple(large.shape)}"
            )
        small, large = small[:, :k], large[:longer, :count, :]
        columns = full((count, k), 1 / max(count, k), like)
        return cls(small, large, zeros((rank, count), like), columns, m < n, scale)

    @property
    def shape(self) -> tuple[int, int]:
        sides = self.large.shape[0], self.small.shape[1]
        return sides[::-1] if self.wide else sides

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self.gains.shape[0] * self.gains.shape[1])

    def delta(self) -> Array:
        up, down = self._factors()
        return (up * self.scale) @ down

    def apply(self, x: Array) -> Array:
        if count_of(x) >= self.gains.shape[0]:
            up, down = self._factors()
            return ((x @ down.mT) * self.scale) @ up.mT
        gains, large = self.gains.mT * self.scale, self._flat_large()
        if self.wide:
            inside = (self._grid(x @ large) * gains) @ self.small
            return namespace(x).sum(inside * self.columns, axis=-2)
        inside = (x[..., None, :] * self.columns) @ self.small.mT
        return self._flat(inside * gains) @ large.mT

    def _factors(self) -> tuple[Array, Array]:
        """Products with ``large``, and with all the rest."""
        rest = self.columns.mT[:, :, None] * self.small.mT[:, None, :] * self.gains.mT
        left, right = self._flat_large(), self._flat(rest)
        return (right, left.mT) if self.wide else (left, right.mT)

    def _flat_large(self) -> Array:
        return namespace(self.large).reshape(self.large, (self.large.shape[0], -1))

    def _flat(self, z: Array) -> Array:
        """From ``(..., N, r)`` to ``(..., N r)``, in the order of the columns of the large side."""
        return namespace(z).reshape(z, (*z.shape[:-2], z.shape[-2] * z.shape[-1]))

    def _grid(self, z: Array) -> Array:
        """The inverse of :meth:`_flat`."""
        return namespace(z).reshape(z, (*z.shape[:-1], *self.gains.shape[::-1]))


@dataclass(frozen=True, repr=False)
class PositionalRandomSum(RandomSum):
    r"""RandLoRA as it is computed by PEFT and by its authors' code, for their checkpoints.

    There the rows of the right factor are numbered by ``(i, j)`` and the columns of the left one by
    ``(j, i)``, and the two are paired by position: column ``k`` of all ``B_j`` meets row ``k`` of
    another product. It is :class:`RandomSum` with the columns of the ``B_j`` permuted, which are
    random anyway; for a trained adapter it makes all the difference.

    Attributes
    ----------
    small, large, gains, columns, wide, scale
        ``randlora_A`` without its middle axis, ``randlora_B``, ``randlora_lambda`` and
        ``randlora_gamma``, and as in :class:`RandomSum`. The basis must be the saved one: PEFT
        draws it in half precision, of a kind that depends on the machine.
    """

    def _flat(self, z: Array) -> Array:
        return super()._flat(z.mT)

    def _grid(self, z: Array) -> Array:
        return namespace(z).reshape(z, (*z.shape[:-1], *self.gains.shape)).mT


def random_basis(weight: Like, rank: int, *, rng: RNG = None) -> Basis:
    """Uniform factors of unit variance for one weight, or for the largest of many.

    Parameters
    ----------
    weight : array or (int, int)
        Its shape, or the elementwise maximum of shapes.
    rank : int
    rng : int, Generator or None

    Returns
    -------
    small : array, shape (r, k)
    large : array, shape (l, N, r)
        With ``N r >= k``, where ``k`` is the smaller side and ``l`` the larger.
    """
    shape, like, _ = factor_scale(weight, rank, None)
    k, longer = min(shape), max(shape)
    generator = np.random.default_rng(rng)

    def drawn(*size: int) -> Array:
        x = generator.uniform(-1, 1, size)
        # A single number has no variance.
        return from_host(x / (np.std(x) or np.max(np.abs(x))), like, like.dtype)

    return drawn(rank, k), drawn(longer, -(-k // rank), rank)
