r"""Magnitude and direction: rows, or rows and columns, of :math:`W + s B A` of trained lengths.

The lengths are computed from the factors, as in

.. math:: \lVert w_i + s\, b_i A \rVert^2 =
          \lVert w_i \rVert^2 + \langle s\, b_i,\; 2\, w_i A^T + s\, b_i\, A A^T \rangle

so that no matrix of the size of the weight is formed for them. Where the product takes away nearly
all of a row, the square has an error of the rounding of :math:`\lVert w_i \rVert^2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lowrank_sp._arrays import RNG, Array, as_compute, detached, dtype_name, is_complex, namespace
from lowrank_sp.adapters.forms._form import Form, Product, Start, check_weight
from lowrank_sp.adapters.forms._parts import Trained, Weight
from lowrank_sp.adapters.initializers._start import Initialization


@dataclass(frozen=True, repr=False)
class RowMagnitude(Form):
    r"""Rows of trained lengths, along :math:`W + s B A`: DoRA :cite:p:`liu2024dora`.

    .. math:: W + \Delta = \operatorname{diag}(\mu / c)\,(W + s B A), \qquad
              c_i = \lVert (W + s B A)_{i,:} \rVert_2

    One length for every output, as PEFT has it. The update has full rank.

    Attributes
    ----------
    weight : array, shape (m, n)
        ``W``, real. The update depends on it: on a merged weight it is another one.
    up : array, shape (m, r)
    down : array, shape (r, n)
    magnitude : array, shape (m,)
        ``mu``. A row that is zero has no direction: it stays as it is, whatever ``mu`` is.
    scale : float
    through_norm : bool
        Whether gradients pass through ``c``. The published rule, and the default, takes it as a
        constant. Values are the same.

    Notes
    -----
    ``apply`` reads the weight twice, for its product with ``x`` and with ``down``; ``adapt``, which
    is given the former, once: ``2 m n r`` flops and, per input, those of a product.

    Examples
    --------
    >>> import numpy as np
    >>> form = RowMagnitude.create(np.array([[3.0, 4.0], [0.0, 2.0]]), rank=1, rng=0)
    >>> form.magnitude
    array([5., 2.])
    >>> form.replace({"magnitude": np.array([10.0, 2.0])}).delta()
    array([[3., 4.],
           [0., 0.]])
    """

    weight: Weight[Array, "m n"]
    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    magnitude: Trained[Array, "m"]
    scale: float = 1.0
    through_norm: bool = False

    products = (("up", "down"),)

    @classmethod
    def create(
        cls,
        weight: Array,
        rank: int,
        *,
        alpha: float | None = None,
        through_norm: bool = False,
        rng: RNG = None,
    ) -> Self:
        """Factors of plain LoRA, and the lengths that the rows have."""
        inner = Product.create(_real(weight, cls.__name__), rank, alpha=alpha, rng=rng)
        return cls._of(weight, inner.up, inner.down, inner.scale, through_norm)

    @classmethod
    def from_start(cls, start: Initialization, *, through_norm: bool = False) -> Start:
        """Any initializer's factors and residual, and the lengths of the rows of both together.

        At :func:`~lowrank_sp.adapters.initializers.pissa` this is DuDe :cite:p:`han2025dude`, and
        the layer starts at its weight.
        """
        form = cls._of(
            _real(start.residual, cls.__name__), start.up, start.down, start.scale, through_norm
        )
        return Start(form, start.residual)

    @classmethod
    def _of(cls, weight: Array, up: Array, down: Array, scale: float, through_norm: bool) -> Self:
        weight = as_compute(weight)
        lengths = detached(_row_squares(weight, up, down, scale) ** 0.5)
        return cls(weight, up, down, lengths, scale, through_norm)

    @property
    def rank_bound(self) -> int:
        return min(self.weight.shape)

    def delta(self) -> Array:
        gain = self._gain()[:, None]
        return (gain - 1.0) * self.weight + (gain * self.up * self.scale) @ self.down

    def apply(self, x: Array) -> Array:
        return self._change(x, x @ self.weight.mT)

    def adapt(self, x: Array, y: Array) -> Array:
        return y + self._change(x, y)

    def _change(self, x: Array, y: Array) -> Array:
        gain = self._gain()
        return y * (gain - 1.0) + (((x @ self.down.mT) * self.scale) @ self.up.mT) * gain

    def _gain(self) -> Array:
        up, down = _for_norm(self.up, self.down, self.through_norm)
        return _over_length(self.magnitude, _row_squares(self.weight, up, down, self.scale))


@dataclass(frozen=True, repr=False)
class BothMagnitudes(Form):
    r"""Rows, then columns, of trained lengths: bi-dimensional BoRA :cite:p:`wang2024bora`.

    .. math:: W + \Delta = \operatorname{diag}(p / c)\,(W + s B A) \operatorname{diag}(q / e)

    with the lengths ``c`` of the rows of :math:`W + s B A`, and ``e`` of the columns of
    :math:`\operatorname{diag}(p / c)(W + s B A)`. Columns have the lengths ``q``; rows have the
    lengths ``p`` only before the columns are set.

    Attributes
    ----------
    weight : array, shape (m, n)
        ``W``, real.
    up : array, shape (m, r)
    down : array, shape (r, n)
    rows : array, shape (m,)
        ``p``.
    columns : array, shape (n,)
        ``q``.
    scale : float
    through_norm : bool
        As in :class:`RowMagnitude`.

    Notes
    -----
    The inputs are scaled before the weight sees them, so ``adapt`` cannot use what the weight alone
    makes of them and multiplies by it once more. One temporary array has the size of the weight.
    """

    weight: Weight[Array, "m n"]
    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    rows: Trained[Array, "m"]
    columns: Trained[Array, "n"]
    scale: float = 1.0
    through_norm: bool = False

    products = (("up", "down"),)

    @classmethod
    def create(
        cls,
        weight: Array,
        rank: int,
        *,
        alpha: float | None = None,
        through_norm: bool = False,
        rng: RNG = None,
    ) -> Self:
        """Factors of plain LoRA, and the lengths that the rows and columns have."""
        inner = Product.create(_real(weight, cls.__name__), rank, alpha=alpha, rng=rng)
        weight = as_compute(weight)
        rows = detached(_row_squares(weight, inner.up, inner.down, inner.scale) ** 0.5)
        columns = _row_squares(weight.mT, inner.down.mT, inner.up.mT, inner.scale) ** 0.5
        columns = detached(columns)
        return cls(weight, inner.up, inner.down, rows, columns, inner.scale, through_norm)

    @property
    def rank_bound(self) -> int:
        return min(self.weight.shape)

    def delta(self) -> Array:
        left, right = self._gains()
        moved = self.weight + (self.up * self.scale) @ self.down
        return left[:, None] * moved * right[None, :] - self.weight

    def apply(self, x: Array) -> Array:
        return self._adapted(x) - x @ self.weight.mT

    def adapt(self, x: Array, y: Array) -> Array:  # noqa: ARG002
        return self._adapted(x)

    def _adapted(self, x: Array) -> Array:
        left, right = self._gains()
        x = x * right
        return (x @ self.weight.mT + ((x @ self.down.mT) * self.scale) @ self.up.mT) * left

    def _gains(self) -> tuple[Array, Array]:
        up, down = _for_norm(self.up, self.down, self.through_norm)
        left = _over_length(self.rows, _row_squares(self.weight, up, down, self.scale))
        outer = (left if self.through_norm else detached(left))[:, None]
        weight = outer * self.weight
        # Not the square of a norm, which JAX cannot differentiate where a column is zero.
        base = namespace(weight).sum(weight * weight, axis=0)
        squares = base + _change_of_squares(weight.mT, down.mT, (outer * up).mT, self.scale)
        return left, _over_length(self.columns, squares)


def _real(weight: Array, form: str) -> Array:
    if is_complex(check_weight(weight, form).dtype):
        raise TypeError(
            f"weight must be real for {form}, got {dtype_name(weight.dtype)}; take a form without "
            "magnitudes"
        )
    return weight


def _row_squares(weight: Array, up: Array, down: Array, scale: float) -> Array:
    """Squared lengths of the rows of ``weight + scale * up @ down``, which is not formed."""
    base = namespace(weight).linalg.vector_norm(weight, axis=1) ** 2
    return base + _change_of_squares(weight, up, down, scale)


def _change_of_squares(weight: Array, up: Array, down: Array, scale: float) -> Array:
    """What the product adds to the squared lengths of the rows of the weight."""
    scaled = up * scale
    inner = scaled * (2.0 * (weight @ down.mT) + scaled @ (down @ down.mT))
    return namespace(weight).sum(inner, axis=1)


def _over_length(magnitude: Array, squares: Array) -> Array:
    """``magnitude / sqrt(squares)``, and one where there is no length."""
    xp = namespace(squares)
    one = xp.ones_like(squares)
    positive = squares > 0
    return xp.where(positive, magnitude / xp.where(positive, squares, one) ** 0.5, one)


def _for_norm(up: Array, down: Array, through: bool) -> tuple[Array, Array]:
    return (up, down) if through else (detached(up), detached(down))
