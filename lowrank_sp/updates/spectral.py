"""Rules that move by polar factors: LoRA-Muon and Spectron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from lowrank_sp._arrays import Array, adjoint, device, namespace
from lowrank_sp.updates.frames import combined, frame, gram, left_times, times
from lowrank_sp.updates.moments import Moments, Momentum
from lowrank_sp.updates.rule import Gauge, Pair, Scalar
from lowrank_sp.updates.slots import SlotRule


def polar(x: Array) -> Array:
    """Polar factor ``U V^H`` of tall or wide ``x = U diag(s) V^H``, by a small Gram matrix.

    A partial isometry where ``x`` is rank deficient. ``O(m r^2)``.

    Examples
    --------
    >>> import numpy as np
    >>> polar(np.array([[3.0], [4.0]])).round(3)
    array([[0.6],
           [0.8]])
    """
    if x.shape[-1] > x.shape[-2]:
        return adjoint(polar(adjoint(x)))
    of_x = frame(x)
    u, _, vh = namespace(x).linalg.svd(of_x.root, full_matrices=False)
    return times(x, of_x.inverse @ u @ vh)


def newton_schulz(x: Array, *, steps: int = 5) -> Array:
    """Polar factor to within about 30 percent, by matrix products only.

    The quintic iteration of Muon :cite:p:`jordan2024muon`, for accelerators: all singular values
    larger than about ``1e-3`` of the Frobenius norm end in 0.7 to 1.2.

    Parameters
    ----------
    x : array, shape (..., m, n)
    steps : int
    """
    if x.shape[-1] > x.shape[-2]:
        return adjoint(newton_schulz(adjoint(x), steps=steps))
    xp = namespace(x)
    size = xp.linalg.matrix_norm(x)[..., None, None]
    x = x / xp.where(size > 0, size, xp.ones_like(size))
    for _ in range(steps):
        n = adjoint(x) @ x
        x = x @ (
            3.4445 * xp.eye(n.shape[-1], dtype=n.dtype, device=device(n))
            - 4.7750 * n
            + 2.0315 * (n @ n)
        )
    return x


def inverse_root(x: Array) -> Array:
    """``C`` with ``C C^H = (x^H x)^{-1}`` for a tall block, by eigenvectors.

    The pseudo-inverse where ``x`` is rank deficient. ``O(m r^2)``.
    """
    return frame(x).inverse


def newton_schulz_root(x: Array, *, steps: int = 20) -> Array:
    """:func:`inverse_root` by matrix products only, for accelerators and blocks of full rank.

    The coupled iteration for ``N^{1/2}`` and ``N^{-1/2}`` :cite:p:`higham2008functions` on the Gram
    matrix ``N``, in the dtype of ``x``. A singular value that is ``1 / c`` of the Frobenius norm of
    ``x`` takes ``2.5 log(c)`` steps and a few more: conditions up to 500 by default.

    Parameters
    ----------
    x : array, shape (..., m, r)
    steps : int
    """
    xp = namespace(x)
    n = adjoint(x) @ x
    size = xp.linalg.matrix_norm(n)[..., None, None]
    size = xp.where(size > 0, size, xp.ones_like(size))
    unit = xp.eye(n.shape[-1], dtype=n.dtype, device=device(n))
    root, inverse = n / size, unit
    for _ in range(steps):
        turn = (3 * unit - inverse @ root) / 2
        root, inverse = root @ turn, turn @ inverse
    return inverse / size**0.5


@dataclass(frozen=True)
class LoRAMuon(SlotRule):
    r"""LoRA-Muon :cite:p:`cesista2026loramuon`: steps of one spectral norm, whatever the gauge.

    .. math::
        B \leftarrow \gamma B
        - \tfrac{\eta}{2 s \gamma}\, \mathrm{polar}(M_B N_A^{-1/2}) N_A^{-1/2},
        \quad \gamma = \sqrt{1 - \eta \lambda}

    and ``down`` likewise, with momenta ``M`` of the raw gradients. Both changes of the adapter,
    ``scale dB A`` and ``scale B dA``, have spectral norm ``lr / 2``. The decay ``lambda`` is split
    so that the product shrinks by ``1 - lr lambda`` while the first-order step is unchanged.

    Parameters
    ----------
    lr : float
        Spectral norm of a step of ``W``.
    moments : Moments
    weight_decay : float
        Of the product.
    polar : callable
        :func:`polar`, or :func:`newton_schulz` where products are cheaper than eigenvectors.
    root : callable
        :func:`inverse_root`, or :func:`newton_schulz_root` for the same reason, which gives up the
        invariance under gauges whose condition it does not reach.

    Notes
    -----
    ``O((m + n) r^2)``; state ``(m + n) r``. Any ``C`` with ``C C^H = N^{-1}`` serves as inverse
    square root, since ``polar(M C) C^H`` is the same for all of them.
    """

    lr: float = 1e-2
    moments: Moments = field(default_factory=lambda: Momentum(0.95))
    polar: Callable[[Array], Array] = polar
    root: Callable[[Array], Array] = inverse_root

    covariance: ClassVar[Gauge] = Gauge.GENERAL

    def _move(self, factors: Pair, directions: Pair, *, scale: Scalar, lr: Scalar) -> Pair:
        left, right = self.root(factors.up), self.root(adjoint(factors.down))
        up = times(self.polar(times(directions.up, right)), adjoint(right))
        down = left_times(left, self.polar(left_times(adjoint(left), directions.down)))
        keep = (1 - lr * self.weight_decay) ** 0.5
        half = lr / (2 * scale * keep)
        return Pair(
            combined(keep, factors.up, -half, up), combined(keep, factors.down, -half, down)
        )


@dataclass(frozen=True)
class Spectron(SlotRule):
    """Spectron :cite:p:`janson2026stabilizing`: polar factors, with a step that fits both sides.

    The step is ``lr / (sigma(up) + sigma(down) + 1)`` with the largest singular values, so that the
    product moves by at most ``lr`` in spectral norm, the term of second order included, for
    ``lr <= sigma(up) + sigma(down) + 1``. Invariant under unitary gauges.

    Parameters
    ----------
    lr : float
        Most change of ``up @ down`` in spectral norm.
    moments : Moments
    weight_decay : float
    polar : callable
        :func:`polar` or :func:`newton_schulz`.

    Notes
    -----
    ``O((m + n) r^2)``; state ``(m + n) r``. Largest singular values come from Gram matrices, where
    the published code runs a power iteration.
    """

    lr: float = 1e-2
    moments: Moments = field(default_factory=lambda: Momentum(0.9))
    weight_decay: float = 1e-2
    polar: Callable[[Array], Array] = polar

    def _move(self, factors: Pair, directions: Pair, *, scale: Scalar, lr: Scalar) -> Pair:  # noqa: ARG002
        size = 1 + _largest(factors.up) + _largest(adjoint(factors.down))
        keep = 1 - lr * self.weight_decay
        return Pair(
            combined(keep, factors.up, -lr / size, self.polar(directions.up)),
            combined(keep, factors.down, -lr / size, self.polar(directions.down)),
        )


def _largest(x: Array) -> Array:
    """Largest singular value of a tall block, of shape ``(..., 1, 1)``."""
    xp = namespace(x)
    values = xp.linalg.eigvalsh(gram(x))[..., -1:]
    values = xp.where(values > 0, values, xp.zeros_like(values)) ** 0.5
    return xp.astype(values, abs(x[..., :1, :1]).dtype)[..., None]
