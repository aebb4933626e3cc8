"""What an adapter parameterization can do, and the simplest one: a product of two factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from lowrank_sp._arrays import (
    RNG,
    Array,
    as_compute,
    dtype_name,
    is_inexact,
    namespace,
    slices,
)
from lowrank_sp.adapters.algebra.sums import resize
from lowrank_sp.adapters.forms._draws import (
    Like,
    check_array,
    factor_scale,
    kaiming_uniform,
    zeros,
)
from lowrank_sp.adapters.forms._parts import Fixed, Parts, Trained
from lowrank_sp.adapters.initializers._start import check_finite
from lowrank_sp.factors import Factored, LowRank
from lowrank_sp.linalg.svd import minor_svd, truncated_svd
from lowrank_sp.operators import LinearOperator

#: What the update of a weight may be: factored, known by its products, or dense.
Delta = LowRank | LinearOperator | Array


@dataclass(frozen=True, repr=False)
class Form(Parts, ABC):
    r"""A parameterization of the update :math:`\Delta` of one weight ``(m, n)``.

    A layer computes :math:`(W + \Delta) x` on inputs that are rows, as in PyTorch:
    ``apply(x)`` is ``x @ delta.T``.
    """

    #: Names of the arrays that are factors of products, for rules that move both together:
    #: ``(up, down)``, or ``(up, core, down)`` with a trained core between the two.
    products: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(m, n)`` of the weight."""
        sizes = self.sizes()
        return sizes["m"], sizes["n"]

    @property
    @abstractmethod
    def rank_bound(self) -> int:
        """Largest rank that the update can have."""

    @abstractmethod
    def delta(self) -> Delta:
        """The update of the weight: a :class:`~lowrank_sp.factors.LowRank` where it is one."""

    @abstractmethod
    def apply(self, x: Array) -> Array:
        """``x @ delta.T`` for ``x`` of shape ``(..., n)``, without forming ``delta``."""

    def adapt(self, x: Array, y: Array) -> Array:
        """What the adapted weight makes of ``x``, where the weight alone makes ``y`` of it."""
        return y + self.apply(x)

    def merge(self, weight: Array) -> Array:
        """``weight + delta``, by blocks of rows, rounded once to the dtype of ``weight``."""
        return _plus(weight, self.shape, self._widened()._rows(), 1.0)

    def unmerge(self, merged: Array) -> Array:
        """``merged - delta``: the weight again, to the rounding of its dtype."""
        return _plus(merged, self.shape, self._widened()._rows(), -1.0)

    def _widened(self) -> Self:
        """The form in its compute dtype: in half precision its update would be rounded first."""
        found = {name: a for name, a in self.arrays().items() if is_inexact(a.dtype)}
        wide = {name: as_compute(a) for name, a in found.items()}
        return self.replace(wide) if any(wide[name] is not a for name, a in found.items()) else self

    def _rows(self) -> Callable[[slice], Array]:
        """How to get some rows of the update, to merge it by blocks."""
        return _rows(self.delta())

    def to_lora(self, rank: int | None = None, *, tol: float | None = None) -> Conversion:
        """Plain LoRA with the same update, or with the best one of lower rank.

        Parameters
        ----------
        rank, tol
            As in :meth:`lowrank_sp.factors.SVD.truncate`. By default nothing is dropped, which is
            possible where ``delta()`` is a :class:`~lowrank_sp.factors.LowRank`.

        Returns
        -------
        Conversion
            The factors, in at least single precision and at scale 1, and the Frobenius norm of what
            they leave out.

        Raises
        ------
        ValueError
            If the update is not low-rank and neither ``rank`` nor ``tol`` is given.
        """
        delta = self._widened().delta()
        if not isinstance(delta, Factored):
            if rank is None and tol is None:
                raise ValueError(
                    f"{type(self).__name__} is no product of two factors; give rank or tol for the "
                    "best approximation by one"
                )
            f = truncated_svd(delta, rank, tol=tol)
            return Conversion(Product(*f.split().factors()), float(f.error or 0.0))
        if rank is None and tol is None:
            return Conversion(Product(*delta.factors()), 0.0)
        most = None if rank is None else min(rank, delta.rank, *self.shape)
        f = resize(delta, rank=most, tol=tol)
        return Conversion(Product(*f.split().factors()), float(f.error))


@dataclass(frozen=True, repr=False)
class Product(Form):
    r"""Two factors, :math:`\Delta = s B A`: plain LoRA :cite:p:`hu2022lora`.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    scale : float
        ``s``.

    Examples
    --------
    >>> import numpy as np
    >>> form = Product.create((6, 4), rank=2, rng=0)
    >>> form
    Product(up 6 x 2, down 2 x 4)
    >>> form.num_trainable, form.rank_bound, form.delta().norm()
    (20, 2, 0.0)
    """

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    scale: float = 1.0

    products = (("up", "down"),)

    @classmethod
    def create(
        cls, weight: Like, rank: int, *, alpha: float | None = None, rng: RNG = None
    ) -> Self:
        """``down`` uniform on ``+-1/sqrt(n)`` (Kaiming), ``up`` zero, ``scale = alpha / rank``."""
        (m, n), like, scale = factor_scale(weight, rank, alpha)
        return cls(zeros((m, rank), like), kaiming_uniform((rank, n), like, rng), scale)

    @property
    def rank(self) -> int:
        """Columns of ``up``."""
        return self.up.shape[1]

    @property
    def rank_bound(self) -> int:
        return min(*self.up.shape, *self.down.shape)

    def delta(self) -> LowRank:
        # The scale would be rounded with the factors in half precision.
        return self.scale * LowRank(as_compute(self.up), as_compute(self.down))

    def apply(self, x: Array) -> Array:
        return ((x @ self.down.mT) * self.scale) @ self.up.mT


@dataclass(frozen=True, repr=False)
class FixedUp(Product):
    """A product whose ``up`` is not trained: MiCA, InfLoRA turned over."""

    up: Fixed[Array, "m r"]

    @classmethod
    def create(
        cls, weight: Like, rank: int, *, alpha: float | None = None, rng: RNG = None
    ) -> Self:
        """MiCA :cite:p:`rudiger2026mica`: ``up`` the minor left singular vectors, ``down`` zero."""
        del rng
        (_, n), like, scale = factor_scale(check_weight(weight, cls.__name__), rank, alpha)
        return cls(minor_svd(weight, rank).u, zeros((rank, n), like), scale)


@dataclass(frozen=True, repr=False)
class FixedDown(Product):
    """A product whose ``down`` is not trained: LoRA-FA, FFA-LoRA, InfLoRA."""

    down: Fixed[Array, "r n"]


class Conversion(NamedTuple):
    """Plain LoRA made of another form, and the Frobenius norm of the difference."""

    form: Product
    error: float


class Fit(NamedTuple):
    """A form made of given updates, and the Frobenius norm of what it leaves out of all of them."""

    form: Any
    error: float


class Start(NamedTuple):
    """A form, and the base weight that belongs to it where the form changes the weight."""

    form: Form
    weight: Array


@dataclass(frozen=True, repr=False)
class LayeredForm(Parts, ABC):
    """One parameterization of the updates of many layers, which share arrays."""

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Number of weights."""

    @property
    @abstractmethod
    def rank_bound(self) -> int:
        """Largest rank that the update of one layer can have."""

    @abstractmethod
    def layer(self, index: int) -> Form:
        """The share of one layer. Its arrays are computed from the shared ones, differentiably."""

    def merge(self, weights: Sequence[Array]) -> list[Array]:
        """Every weight plus its update, as :meth:`Form.merge`."""
        self._check_count(weights)
        return [self.layer(i).merge(weight) for i, weight in enumerate(weights)]

    def unmerge(self, merged: Sequence[Array]) -> list[Array]:
        """Every weight again, as :meth:`Form.unmerge`."""
        self._check_count(merged)
        return [self.layer(i).unmerge(weight) for i, weight in enumerate(merged)]

    def to_lora(self, rank: int | None = None, *, tol: float | None = None) -> list[Conversion]:
        """Plain LoRA for every layer, as :meth:`Form.to_lora`."""
        return [self.layer(i).to_lora(rank, tol=tol) for i in range(self.num_layers)]

    def _check_count(self, weights: Sequence[Array]) -> None:
        if len(weights) != self.num_layers:
            raise ValueError(f"{self.num_layers} weights are needed, got {len(weights)}")


def _plus(
    weight: Array, shape: tuple[int, int], update: Callable[[slice], Array], sign: float
) -> Array:
    """``weight`` plus ``sign`` times an update, by blocks of its rows, rounded once."""
    if tuple(weight.shape) != shape:
        raise ValueError(
            f"weight must have the shape of the update, {shape}, got {tuple(weight.shape)}"
        )
    xp = namespace(weight)
    wide = as_compute(weight[:0, :]).dtype

    def part(rows: slice) -> Array:
        block = as_compute(weight[rows, :]) + xp.astype(update(rows), wide) * sign
        return xp.astype(block, weight.dtype)

    return xp.concat([part(rows) for rows in slices(weight.shape[0], 512)], axis=0)


def _rows(delta: Delta) -> Callable[[slice], Array]:
    """How to get some rows of an update."""
    if isinstance(delta, Factored):
        left, right = delta.factors()
        return lambda rows: left[rows, :] @ right
    dense = delta.to_dense() if isinstance(delta, LinearOperator) else delta
    return lambda rows: dense[rows, :]


def check_weight(weight: Any, form: str) -> Array:
    """``weight``, floating and finite, or an error for forms that cannot do without it."""
    if isinstance(weight, tuple):
        raise TypeError(f"{form} is made from the weight itself, got only the shape {weight}")
    check_array(weight)
    if dtype_name(weight.dtype).startswith(("int", "uint", "bool")):
        raise TypeError(f"weight must be floating, got {dtype_name(weight.dtype)}; dequantize it")
    if weight.ndim == 2:
        check_finite(weight)
    return weight
