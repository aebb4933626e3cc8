"""The weight is quantized first, and the correction is best in the norm of a method."""

from __future__ import annotations

from lowrank_sp._arrays import RNG, Array, namespace
from lowrank_sp.adapters.compensate._base import Compensated, Quantizer, checked_weight, quantized
from lowrank_sp.adapters.quantize import nf4
from lowrank_sp.linalg.weighted import checked_scales, covariance_root, projected


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
    base, lost = quantized(checked_weight(weight, rank), quantize)
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
    wide = checked_weight(weight, rank)
    size = checked_scales(magnitude, wide, "magnitude")
    base, lost = quantized(wide, quantize)
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
    wide = checked_weight(weight, rank)
    size = checked_scales(mean_square, wide, "mean_square") ** 0.5
    base, lost = quantized(wide, quantize)
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
    wide = checked_weight(weight, rank)
    root = covariance_root(second_moment, wide.shape[1], name="second_moment", least=rank)
    base, lost = quantized(wide, quantize)
    image = lost @ namespace(lost, root).astype(root, lost.dtype)
    return Compensated(base, *projected(lost, image, rank, rng))
