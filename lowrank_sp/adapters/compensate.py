r"""What a quantizer loses of a weight, made up for by a low-rank correction.

A layer computes with :math:`Q + B A` instead of :math:`W`. The methods differ in the norm in which
they make :math:`W - Q - B A` small, and in what is quantized: the weight, or what a correction
leaves of it. With :math:`E = W - Q` the correction of a method with the norm
:math:`\lVert \cdot\, M \rVert_F` is :math:`U_r U_r^H E`, where :math:`E M = U \Sigma V^H`: nothing
is inverted, and any root :math:`M` of one second moment gives one answer.

``quantize`` is a function from a matrix to anything that multiplies. To correct a base that exists
already, pruned or quantized by any means, pass ``lambda _: base``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from lowrank_sp._arrays import RNG, Array, as_compute, eps, frobenius, namespace
from lowrank_sp.adapters.initializers._start import check_finite, checked
from lowrank_sp.adapters.quantize import nf4
from lowrank_sp.factors import LowRank
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.linalg.weighted import (
    check_not_negative,
    checked_scales,
    covariance_root,
    projected,
)
from lowrank_sp.operators import LinearOperator

#: From a matrix to what stands in its place, such as :func:`~lowrank_sp.adapters.quantize.nf4`.
Quantizer = Callable[[Array], LinearOperator]


@dataclass(frozen=True, repr=False)
class Compensated(LinearOperator):
    """A quantized base and its correction: ``base @ diag(1 / smoothing) + correction``.

    Attributes
    ----------
    base : LinearOperator, shape (m, n)
        What the quantizer returned.
    correction : LowRank, shape (m, n)
    error : float
        Norm of the weight minus this operator, in the norm that the method minimizes.
    smoothing : array, shape (n,), or None
        What inputs are divided by before the base multiplies them.
    """

    base: LinearOperator
    correction: LowRank
    error: float
    smoothing: Array = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(m, n)``."""
        return self.correction.shape

    @property
    def like(self) -> Array:
        return self.correction.like

    def matmul(self, x: Array) -> Array:
        smoothed = x if self.smoothing is None else x / self.smoothing[:, None]
        return self.base.matmul(smoothed) + self.correction.matmul(x)

    def rmatmul(self, x: Array) -> Array:
        y = self.base.rmatmul(x)
        y = y if self.smoothing is None else y / self.smoothing[:, None]
        return y + self.correction.rmatmul(x)

    def to_dense(self) -> Array:
        """The matrix itself, of shape ``(m, n)``."""
        base = self.base.to_dense()
        base = base if self.smoothing is None else base / self.smoothing
        return base + self.correction.to_dense()


def lorc(weight: Array, rank: int, *, quantize: Quantizer = nf4, rng: RNG = None) -> Compensated:
    r"""LoRC: the best approximation of the error itself.

    .. math:: B A = (W - Q)_r, \qquad \text{error } \lVert W - Q - B A \rVert_F

    It is one step of :func:`~lowrank_sp.adapters.initializers.loftq` :cite:p:`yao2024lorc`.

    Parameters
    ----------
    weight : array, shape (m, n)
        In the layout of ``torch.nn.Linear``: outputs by inputs. Real, as quantizers are.
    rank : int
        In ``1..min(m, n)``.
    quantize : callable
        More bits or other blocks by ``functools.partial(int_symmetric, bits=3)``.
    rng : int, Generator or None

    Returns
    -------
    Compensated

    Raises
    ------
    ValueError
        If the weight is not a finite matrix, or ``rank`` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> w = np.random.default_rng(0).standard_normal((64, 64))
    >>> found = lorc(w, rank=8, rng=0)
    >>> bool(np.isclose(found.error, np.linalg.norm(w - found.to_dense())))
    True
    """
    base, lost = _quantized(_checked(weight, rank), quantize)
    return Compensated(base, *projected(lost, lost, rank, rng))


def lqer(
    weight: Array, rank: int, *, magnitude: Array, quantize: Quantizer = nf4, rng: RNG = None
) -> Compensated:
    r"""LQER: columns count by the magnitude of their inputs.

    .. math:: B A = ((W - Q) S)_r S^{-1}, \qquad S = \operatorname{diag}(\mathbb{E} |x_j|),
              \qquad \text{error } \lVert (W - Q - B A) S \rVert_F

    A multiple of :math:`S` gives the same answer, so the published division by the geometric mean
    of its ends is left out :cite:p:`zhang2024lqer`.

    Parameters
    ----------
    weight, rank, quantize, rng
        As in :func:`lorc`.
    magnitude : array, shape (n,)
        Not negative: see :class:`~lowrank_sp.adapters.statistics.MeanMagnitude`.
    """
    wide = _checked(weight, rank)
    size = checked_scales(magnitude, wide, "magnitude")
    base, lost = _quantized(wide, quantize)
    return Compensated(base, *projected(lost, lost * size, rank, rng))


def qera_approx(
    weight: Array, rank: int, *, mean_square: Array, quantize: Quantizer = nf4, rng: RNG = None
) -> Compensated:
    r"""QERA for inputs that are taken for uncorrelated.

    .. math:: B A = ((W - Q) S)_r S^{-1}, \qquad S^2 = \operatorname{diag}(\mathbb{E} |x_j|^2),
              \qquad \text{error } \lVert (W - Q - B A) S \rVert_F

    The error is that of the outputs where the inputs are uncorrelated indeed
    :cite:p:`zhang2025qera`.

    Parameters
    ----------
    weight, rank, quantize, rng
        As in :func:`lorc`.
    mean_square : array, shape (n,)
        Not negative: see :class:`~lowrank_sp.adapters.statistics.MeanSquare`.
    """
    wide = _checked(weight, rank)
    size = checked_scales(mean_square, wide, "mean_square") ** 0.5
    base, lost = _quantized(wide, quantize)
    return Compensated(base, *projected(lost, lost * size, rank, rng))


def qera(
    weight: Array, rank: int, *, second_moment: Array, quantize: Quantizer = nf4, rng: RNG = None
) -> Compensated:
    r"""QERA, exact, and EoRA: the least mean square error of the outputs.

    .. math:: \min_{B, A} \; \mathbb{E}\, \lVert (W - Q - B A) x \rVert^2

    ``error`` is the square root of the minimum. QERA takes the symmetric root of the second moment,
    EoRA its scaled eigenvectors, SVD-LLM the Cholesky factor: different numbers on the way to one
    correction :cite:p:`zhang2025qera,liu2024eora`.

    Parameters
    ----------
    weight, rank, quantize, rng
        As in :func:`lorc`.
    second_moment : array, shape (n, n)
        ``E[x x^H]``, uncentred: see :class:`~lowrank_sp.adapters.statistics.SecondMoment`.

    Raises
    ------
    ValueError
        Also if the second moment is of less than this rank: it has seen too few samples.

    Notes
    -----
    ``n^3`` flops for a root and ``2 m n^2`` to multiply by it, beside the truncated SVD.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> w = rng.standard_normal((64, 64))
    >>> x = rng.standard_normal((500, 64)) * np.linspace(0.1, 3, 64)
    >>> found = qera(w, rank=8, second_moment=x.T @ x / 500, rng=0)
    >>> bool(np.isclose(found.error, np.linalg.norm((w - found.to_dense()) @ x.T) / 500**0.5))
    True
    """
    wide = _checked(weight, rank)
    root = covariance_root(second_moment, wide.shape[1], name="second_moment", least=rank)
    base, lost = _quantized(wide, quantize)
    image = lost @ namespace(lost, root).astype(root, lost.dtype)
    return Compensated(base, *projected(lost, image, rank, rng))


def lq_lora(
    weight: Array,
    rank: int,
    *,
    fisher: Array,
    quantize: Quantizer = nf4,
    steps: int = 5,
    rng: RNG = None,
) -> Compensated:
    r"""LQ-LoRA: rows and columns count by their share in the Fisher information.

    .. math:: B_t A_t = D_1^{-1} \bigl(D_1 (W - Q_{t-1}) D_2\bigr)_r D_2^{-1}, \qquad
              Q_t = q(W - B_t A_t), \qquad Q_0 = 0

    with :math:`D_1^2, D_2^2` the means of the rows and of the columns of ``fisher``, the latter
    over the mean of all, so that :math:`\lVert D_1 (\cdot) D_2 \rVert_F^2` weighs squares by
    ``fisher`` where that has rank one. ``error`` is this norm of ``W - Q - B A``; the steps end
    with the last that lowers it :cite:p:`guo2024lqlora`.

    Parameters
    ----------
    weight, rank, quantize, rng
        As in :func:`lorc`.
    fisher : array, shape (m, n)
        Mean squares of the gradients of the loss, of single samples. Not negative.
    steps : int
        At most; at least 1.
    """
    wide = _checked(weight, rank)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    rows, columns = _fisher_scales(fisher, wide)

    def step(lost: Array) -> tuple[Compensated, Array]:
        correction = _two_sided(rows, lost, columns, rank, rng)
        base, rest = _quantized(wide - correction.to_dense(), quantize)
        found = Compensated(base, correction, frobenius(rows * rest * columns))
        return found, rest + correction.to_dense()

    best, lost = step(wide)
    for _ in range(steps - 1):
        found, lost = step(lost)
        if found.error >= best.error:
            break
        best = found
    return best


def svdquant(
    weight: Array,
    rank: int,
    *,
    magnitude: Array | None = None,
    migration: float = 0.5,
    quantize: Quantizer = nf4,
    rng: RNG = None,
) -> Compensated:
    r"""SVDQuant: the leading part stays unquantized, and the rest is quantized.

    .. math:: W D = (W D)_r + R, \qquad W' = \bigl((W D)_r + q(R)\bigr) D^{-1}, \qquad
              d_j = \frac{a_j^{\mu}}{(\max_i |w_{ij}|)^{1 - \mu}}

    ``D`` moves outliers of the inputs, of magnitudes :math:`a`, into the weight, whose outliers the
    low-rank part takes. ``error`` is :math:`\lVert (W - W') D \rVert_F`. The quantizer comes last,
    so what it loses is lost, as in :func:`~lowrank_sp.adapters.initializers.qpissa`
    :cite:p:`li2025svdquant`.

    Parameters
    ----------
    weight, rank, quantize, rng
        As in :func:`lorc`.
    magnitude : array, shape (n,), optional
        Largest magnitudes of the inputs; means will do. By default ``D`` is the identity. Inputs
        or columns that are zero get ``d_j = 1``.
    migration : float
        :math:`\mu`, in 0..1: how much of the outliers to move.
    """
    wide = _checked(weight, rank)
    if not 0 <= migration <= 1:
        raise ValueError(f"migration must be in 0..1, got {migration}")
    smoothing = None
    if magnitude is not None:
        xp = namespace(wide, magnitude)
        size = checked_scales(magnitude, wide, "magnitude")
        largest = xp.max(abs(wide), axis=0)
        one, live = xp.ones_like(size), (size > 0) & (largest > 0)
        size, largest = xp.where(live, size, one), xp.where(live, largest, one)
        smoothing = size**migration / largest ** (1 - migration)
    smoothed = wide if smoothing is None else wide * smoothing
    leading, _ = projected(smoothed, smoothed, rank, rng)
    rest = smoothed - leading.to_dense()
    base, lost = _quantized(rest, quantize)
    right = leading.right if smoothing is None else leading.right / smoothing
    return Compensated(base, LowRank(leading.left, right), frobenius(lost), smoothing)


class Compensation(NamedTuple):
    """A function that compensates, and the keyword under which it takes its data, if it needs any.

    The keyword is also the key of the data in a calibration file, ``<layer>.<statistic>``.
    """

    function: Callable[..., Compensated]
    statistic: str | None


#: Methods by name, for programs that take a name from their user.
COMPENSATIONS: dict[str, Compensation] = {
    "lorc": Compensation(lorc, None),
    "lqer": Compensation(lqer, "magnitude"),
    "qera_approx": Compensation(qera_approx, "mean_square"),
    "qera": Compensation(qera, "second_moment"),
    "eora": Compensation(qera, "second_moment"),
    "lq_lora": Compensation(lq_lora, "fisher"),
    "svdquant": Compensation(svdquant, None),
}


def _quantized(target: Array, quantize: Quantizer) -> tuple[LinearOperator, Array]:
    """The base made of ``target``, and what is lost of it."""
    base = quantize(target)
    if tuple(base.shape) != tuple(target.shape):
        raise ValueError(f"the base must have shape {tuple(target.shape)}, got {tuple(base.shape)}")
    return base, target - base.to_dense()


def _checked(weight: Array, rank: int) -> Array:
    """The weight in its compute dtype, after the checks that all methods share."""
    checked(weight, rank, None, None)
    check_finite(weight)
    return as_compute(weight)


def _two_sided(rows: Array, lost: Array, columns: Array, rank: int, rng: RNG) -> LowRank:
    """``D_1^{-1} (D_1 E D_2)_r D_2^{-1}`` without either inverse, ``D_1 E D_2 = U S V^H``.

    It is ``(E D_2 V_r S_r^{-1}) (U_r^H D_1 E)``, which exists where weights are zero, too.
    """
    u, s, vh = truncated_svd(rows * lost * columns, rank, rng=rng)
    xp = namespace(u)
    floor = max(lost.shape) * eps(s.dtype) * float(xp.max(s))
    inverse = xp.where(s > floor, 1 / xp.where(s > floor, s, xp.ones_like(s)), xp.zeros_like(s))
    return LowRank((lost * columns) @ vh.mT * inverse, u.mT @ (rows * lost))


def _fisher_scales(fisher: Array, w: Array) -> tuple[Array, Array]:
    """``D_1`` as a column and ``D_2`` as a row, in the dtype of ``w``."""
    xp = namespace(fisher, w)
    if tuple(fisher.shape) != tuple(w.shape):
        raise ValueError(f"fisher must have shape {tuple(w.shape)}, got {tuple(fisher.shape)}")
    check_not_negative(fisher, "fisher")
    fisher = as_compute(fisher)
    rows, columns = (xp.mean(fisher, axis=axis, keepdims=True) for axis in (1, 0))
    mean = float(xp.mean(rows)) or 1.0
    return xp.astype(rows**0.5, w.dtype), xp.astype((columns / mean) ** 0.5, w.dtype)
