"""Starts made of the gradient of the loss in the weight.

A gradient is an array or an operator: the mean of the gradients of a linear layer over samples is
the product of two blocks of vectors, and a :class:`~lowrank_sp.factors.LowRank` of them will do.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    as_compute,
    device,
    from_host,
    is_array,
    max_abs,
    namespace,
)
from lowrank_sp.adapters.initializers._start import (
    Initialization,
    check_finite,
    checked,
    compensated,
)
from lowrank_sp.factors import SVD, LowRank
from lowrank_sp.linalg.svd import truncated_svd
from lowrank_sp.operators import as_operator


class CoreStart(NamedTuple):
    """Factors of an adapter ``up @ core @ down`` with a core that is trained, at scale 1."""

    up: Array
    core: Array
    down: Array
    svd: SVD

    def delta(self) -> LowRank:
        """The update of the weight, ``up @ core @ down``."""
        return LowRank(self.up @ self.core, self.down)


def lora_ga(
    weight: Array,
    rank: int,
    *,
    gradient: Any,
    directions: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r",
    scaling: Literal["stable", "unit", "gd", "weight"] = "stable",
    gamma: float = 16.0,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> Initialization:
    r"""Singular vectors of the gradient, one half of ``2 r`` of them in each factor.

    With :math:`G = U \Sigma V^H`, disjoint halves :math:`I, J` of the first ``2 r`` indices and a
    number ``c``,

    .. math:: B = c\, U_I, \qquad A = c\, V_J^H, \qquad B B^H G + G A^H A = c^2\, G_{2r}

    so that the first step of gradient descent changes the weight along the best approximation of
    the gradient of rank ``2 r``. This is the rule of the paper :cite:p:`wang2024loraga`; the one
    that PEFT runs multiplies ``up`` by singular values as well, and loses the identity.

    Parameters
    ----------
    weight, rank, alpha, rng, dtype
        As in :func:`lora`; ``2 rank`` must be at most ``min(m, n)``.
    gradient : array of shape (m, n), or anything :func:`~lowrank_sp.operators.as_operator` takes
        Mean of the gradient of the loss in the weight.
    directions : {"ArB2r", "A2rBr", "ArBr", "random"}
        Who gets what: ``down`` the first half and ``up`` the second, the other way round,
        alternating (``up`` first), or drawn at random.
    scaling : {"stable", "unit", "gd", "weight"}
        ``c`` is ``m^(1/4) / gamma^(1/2)``, 1, ``1 / s``, or the mean of
        ``(sigma_i(W) / s)^(1/2)`` over ``i <= r``.
    gamma : float
        For ``"stable"``.

    Examples
    --------
    >>> import numpy as np
    >>> g = np.diag([4.0, 3.0, 2.0, 1.0])
    >>> start = lora_ga(np.eye(4), rank=1, gradient=g, scaling="unit")
    >>> start.up @ start.up.T @ g + g @ start.down.T @ start.down
    array([[4., 0., 0., 0.],
           [0., 3., 0., 0.],
           [0., 0., 0., 0.],
           [0., 0., 0., 0.]])
    """
    m, n, scale, dtype = checked(weight, rank, alpha, dtype)
    _check_positive("gamma", gamma)
    if 2 * rank > min(m, n):
        raise ValueError(
            f"rank must be in 1..{min(m, n) // 2} for shape {m} x {n}, got {rank}; "
            "LoRA-GA needs 2 rank singular vectors"
        )
    generator = np.random.default_rng(rng)
    f = _gradient_svd(weight, gradient, 2 * rank, generator)
    left, right = _halves(directions, rank, generator)
    size = _size(weight, rank, scale, scaling, gamma, generator)
    xp = namespace(f.u)

    def chosen(vectors: Array, index: np.ndarray, axis: int) -> Array:
        picked = xp.take(vectors, from_host(index, vectors, xp.int32), axis=axis)
        return xp.astype(size * picked, dtype)

    return compensated(weight, chosen(f.u, left, 1), chosen(f.vh, right, 0), scale, f)


def lora_one(
    weight: Array,
    rank: int,
    *,
    gradient: Any,
    gamma: float = 128.0,
    alpha: float | None = None,
    rng: RNG = None,
    dtype: Any = None,
) -> Initialization:
    r"""One step along the best rank-``r`` approximation of the negative gradient.

    .. math:: s B A = -\frac{s}{\gamma\, \sigma_1(G)}\, G_r

    in balanced factors, of spectral norm ``s / gamma``. The residual is ``weight`` itself, on
    purpose: the layer starts at ``weight + s B A`` :cite:p:`zhang2025loraone`.

    Parameters
    ----------
    weight, rank, alpha, rng, dtype
        As in :func:`lora`.
    gradient : array of shape (m, n), or anything :func:`~lowrank_sp.operators.as_operator` takes
        Mean of the gradient of the loss in the weight.
    gamma : float
        Larger is a shorter step.
    """
    _, _, scale, dtype = checked(weight, rank, alpha, dtype)
    _check_positive("gamma", gamma)
    f = _gradient_svd(weight, gradient, rank, rng)
    xp = namespace(f.u)
    root = (gamma * float(f.s[0])) ** -0.5
    left, right = f.split().factors()
    up, down = xp.astype(-root * left, dtype), xp.astype(root * right, dtype)
    return Initialization(up, down, scale, weight, f)


def lora_sb(
    weight: Array, rank: int, *, gradient: Any, step: float, rng: RNG = None, dtype: Any = None
) -> CoreStart:
    r"""Best approximation of the first step of Adam, in orthonormal factors and a core.

    .. math:: U \Sigma V^H \approx -\mathrm{step} \cdot \operatorname{sign}(G), \qquad
              B = U_r, \quad R = \Sigma_r, \quad A = V_r^H

    Gradient descent on ``R`` alone then moves the weight by the projection of the gradient onto
    both fixed subspaces. The weight is not compensated for: the layer starts at ``weight + B R A``
    :cite:p:`ponkshe2024lorasb`.

    Parameters
    ----------
    weight, rank, rng, dtype
        As in :func:`lora`. There is no ``alpha``: the scale is 1.
    gradient : array, shape (m, n)
        Sum or mean of the gradients over the samples; only signs matter. Operators are made dense.
    step : float
        Learning rate of the first full step.
    """
    _, _, _, dtype = checked(weight, rank, None, dtype)
    _check_positive("step", step)
    _check_gradient(weight, gradient)  # a sign may hide NaN
    dense = as_compute(gradient) if is_array(gradient) else as_operator(gradient).to_dense()
    xp = namespace(weight, dense)
    f = _gradient_svd(weight, -step * xp.sign(dense), rank, rng)
    core = xp.astype(f.s, dtype)[:, None] * xp.eye(rank, dtype=dtype, device=device(dense))
    return CoreStart(xp.astype(f.u, dtype), core, xp.astype(f.vh, dtype), f)


def _check_positive(name: str, number: float) -> None:
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number}")


def _check_gradient(weight: Array, gradient: Any) -> None:
    check_finite(weight)
    if tuple(gradient.shape) != tuple(weight.shape):
        raise ValueError(
            f"gradient must have the shape of the weight, {tuple(weight.shape)}, "
            f"got {tuple(gradient.shape)}"
        )
    if is_array(gradient) and not math.isfinite(max_abs(gradient)):
        raise ValueError(
            "the gradient must be finite, got NaN or infinite entries; "
            "leave out the batches that overflowed"
        )


def _gradient_svd(weight: Array, gradient: Any, rank: int, rng: RNG) -> SVD:
    _check_gradient(weight, gradient)
    f = truncated_svd(gradient, rank, rng=rng)
    if float(f.s[0]) == 0.0:
        raise ValueError("the gradient must not be zero: it gives no direction to start in")
    return f


def _halves(directions: str, rank: int, generator: np.random.Generator) -> tuple[Any, Any]:
    """Indices of the singular vectors that ``up`` and ``down`` get."""
    first, second = np.split(np.arange(2 * rank), 2)
    drawn = np.split(generator.permutation(2 * rank), 2)
    halves = {
        "ArB2r": (second, first),
        "A2rBr": (first, second),
        "ArBr": (2 * first, 2 * first + 1),
        "random": (drawn[0], drawn[1]),
    }
    return halves[_known(directions, "directions", halves)]


def _size(
    weight: Array, rank: int, scale: float, scaling: str, gamma: float, rng: np.random.Generator
) -> float:
    def of_weight() -> float:
        s = truncated_svd(weight, rank, rng=rng).s
        return float(namespace(s).mean((s / scale) ** 0.5))

    sizes = {
        "stable": lambda: weight.shape[0] ** 0.25 / gamma**0.5,
        "unit": lambda: 1.0,
        "gd": lambda: 1.0 / scale,
        "weight": of_weight,
    }
    return sizes[_known(scaling, "scaling", sizes)]()


def _known(name: str, what: str, choices: dict[str, Any]) -> str:
    if name not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {name!r}")
    return name
