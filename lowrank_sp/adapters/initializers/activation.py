"""Starts made of the inputs of the layer: their principal directions or their second moment."""

from __future__ import annotations

import math
from typing import Any

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    as_compute,
    detached,
    eps,
    max_abs,
    namespace,
    power_of_two,
)
from lowrank_sp.adapters.initializers._start import (
    Initialization,
    check_finite,
    checked,
    compensated,
    divided,
    zeros,
)
from lowrank_sp.factors import SVD
from lowrank_sp.gauge import balance
from lowrank_sp.linalg.svd import minor_svd, truncated_svd
from lowrank_sp.linalg.weighted import check_covariance, covariance_root, projected


def eva(
    weight: Array,
    rank: int,
    *,
    components: Array,
    component_values: Array | None = None,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> Initialization:
    """Principal directions of the inputs in ``down``, ``up`` zero.

    Of all ``down`` with orthonormal rows this one keeps most of the variance of the inputs
    :cite:p:`paischer2024eva`. ``rng`` is not used.

    Parameters
    ----------
    weight, rank, alpha, rng, dtype
        As in :func:`lora`.
    components : array, shape (k, n)
        Orthonormal rows, in order, ``k >= rank``: see
        :class:`~lowrank_sp.adapters.statistics.InputPCA`.
    component_values : array, shape (k,), optional
        Their singular values. If given, row ``i`` is divided by the square root of value ``i``.
    """
    del rng
    m, n, scale, dtype = checked(weight, rank, alpha, dtype)
    check_finite(weight)
    xp = namespace(weight, components)
    if components.ndim != 2 or components.shape[1] != n:
        raise ValueError(
            f"components must have shape (k, {n}), got {tuple(components.shape)}; "
            "they live in the space of the layer's inputs"
        )
    if components.shape[0] < rank:
        raise ValueError(
            f"too few samples: there are {components.shape[0]} components for rank {rank}; "
            "feed more inputs, or keep more components"
        )
    down = as_compute(detached(components)[:rank, :])
    if not math.isfinite(max_abs(down)):
        raise ValueError("components must be finite, got NaN or infinite entries")
    if component_values is not None:
        if tuple(component_values.shape) != (components.shape[0],):
            raise ValueError(
                f"component_values must have shape ({components.shape[0]},), one for each of the "
                f"components, got {tuple(component_values.shape)}"
            )
        values = as_compute(detached(component_values)[:rank])
        if not 0 < float(xp.min(values)) < math.inf:
            raise ValueError(
                "component_values must be positive to divide by; ask for a smaller rank"
            )
        down = down / xp.astype(values, down.dtype)[:, None] ** 0.5
    down = xp.astype(down, dtype)
    return Initialization(zeros((m, rank), down), down, scale, weight)


def weighted(
    weight: Array,
    rank: int,
    *,
    second_moment: Array,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> Initialization:
    r"""The part of the weight that matters most for its outputs, in balanced factors.

    .. math:: \min_{B, A} \; \mathbb{E}\, \lVert (W - s B A) x \rVert^2

    by :func:`~lowrank_sp.linalg.weighted.weighted_low_rank`; ``error`` of the result is the square
    root of the minimum. For white inputs it is :func:`pissa`.

    Parameters
    ----------
    weight, rank, alpha, rng, dtype
        As in :func:`lora`.
    second_moment : array, shape (n, n)
        ``E[x x^H]``, uncentred: see :class:`~lowrank_sp.adapters.statistics.SecondMoment`.

    Examples
    --------
    >>> import numpy as np
    >>> start = weighted(np.diag([3.0, 2.0]), rank=1, second_moment=np.diag([1.0, 9.0]))
    >>> np.round(start.residual), start.error
    (array([[ 3.,  0.],
           [ 0., -0.]]), 3.0)
    """
    _, _, scale, dtype = checked(weight, rank, alpha, dtype)
    n = weight.shape[1]
    root = covariance_root(detached(second_moment), n, name="second_moment", least=rank)
    wide = as_compute(detached(weight))
    xp = namespace(wide, root)
    check_finite(wide)
    size = power_of_two(root)
    approximation, error = projected(wide, wide @ xp.astype(root / size, wide.dtype), rank, rng)
    up, down = divided(balance(*approximation.factors()), scale, dtype)
    return compensated(weight, up, down, scale, error=error * size)


def corda_ipm(
    weight: Array,
    rank: int,
    *,
    second_moment: Array,
    damping: float = 0.01,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> Initialization:
    r"""CorDA, instruction-previewed: the leading triplets of the weight times the second moment.

    With :math:`C_d = C + \text{damping} \cdot \operatorname{mean}(\operatorname{diag} C)\, I` and
    :math:`W C_d = U \Sigma V^H`,

    .. math:: B = U_r (\Sigma_r / s)^{1/2}, \qquad
              A = (\Sigma_r / s)^{1/2} V_r^H C_d^{-1} = (s \Sigma_r)^{-1/2} U_r^H W

    which minimizes :math:`\lVert (W - s B A)\, C_d \rVert_F`: not the mean error of the outputs,
    which weighs by a root of ``C`` and is what :func:`weighted` minimizes
    :cite:p:`yang2024corda`.

    Parameters
    ----------
    weight, rank, alpha, rng, dtype
        As in :func:`lora`.
    second_moment : array, shape (n, n)
        ``E[x x^H]``, uncentred; any multiple of it changes the gauge of the factors only.
    damping : float
        Positive.

    Notes
    -----
    The second form of ``A`` needs no inverse. ``O(m n^2)`` flops and one truncated SVD.
    """
    _, _, scale, dtype = checked(weight, rank, alpha, dtype)
    image, size = _damped_image(weight, rank, second_moment, damping)
    return _oriented(weight, truncated_svd(image, rank, rng=rng), size, scale, dtype)


def corda_kpm(
    weight: Array,
    rank: int,
    *,
    second_moment: Array,
    damping: float = 0.01,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> Initialization:
    """CorDA, knowledge-preserved: as :func:`corda_ipm`, with the trailing triplets.

    ``||s B A C_d||_F`` is least; the residual keeps what the inputs of the second moment excite.
    ``rng`` is not used :cite:p:`yang2024corda`. Parameters are those of :func:`corda_ipm`.
    """
    del rng
    _, _, scale, dtype = checked(weight, rank, alpha, dtype)
    image, size = _damped_image(weight, rank, second_moment, damping)
    return _oriented(weight, minor_svd(image, rank), size, scale, dtype)


def _damped_image(weight: Array, rank: int, c: Array, damping: float) -> tuple[Array, float]:
    """``W C_d`` over a number by which ``C`` is about one, and that."""
    c = detached(c)
    check_covariance(c, weight.shape[1], name="second_moment", least=rank)
    c = as_compute(c)
    size = power_of_two(c)
    c = c / size
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be positive and finite, got {damping}")
    wide = as_compute(detached(weight))
    xp = namespace(wide, c)
    shift = damping * complex(xp.linalg.trace(c)).real / c.shape[0]
    return wide @ xp.astype(c, wide.dtype) + shift * wide, size


def _oriented(weight: Array, f: SVD, size: float, scale: float, dtype: Any) -> Initialization:
    """Factors of ``u u^H W``, whose sizes the singular values, times ``size``, share out."""
    xp = namespace(weight)
    largest = float(xp.max(f.s))
    # Any gauge will do where a singular value is rounding.
    floor = max(f.shape) * eps(f.s.dtype) * largest or 1.0
    root = xp.where(f.s > floor, f.s, xp.full_like(f.s, floor)) ** 0.5 * size**0.5
    root = xp.astype(root, f.u.dtype)
    up = f.u * root * scale**-0.5
    down = (adjoint(f.u) @ as_compute(detached(weight))) / root[:, None] * scale**-0.5
    f = SVD(f.u, f.s * size, f.vh, f.bounds * size)
    return compensated(weight, xp.astype(up, dtype), xp.astype(down, dtype), scale, f)
