"""Weights and subspaces in a few bits: LoQT, whose factor makes up for rounding, and Q-GaLore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank_sp._arrays import Array, adjoint, as_compute, namespace
from lowrank_sp.updates.full_weight import Choice, GaLore, norm_of, short_first
from lowrank_sp.updates.integers import Integers, rows_short, turned_like, uniform_at
from lowrank_sp.updates.moments import named, part
from lowrank_sp.updates.projector import Every, Growing, Lazy, Subspace
from lowrank_sp.updates.rule import State, rounded, where


@dataclass(frozen=True)
class LoQT(GaLore):
    r"""LoQT :cite:p:`loeschcke2024loqt`: a quantized weight, and a factor that makes up for it.

    ``W = Q + P B``, where only ``B`` moves, by Adam on ``P^H G``. At growing intervals the weight
    is quantized anew and the factor takes up what of the rounding lies in its subspace,

    .. math:: Q \leftarrow \mathrm{quantize}(W), \quad B \leftarrow P^H (W - Q),

    which changes ``W`` by ``-(I - P P^H)(W - Q)`` only; likewise from the right for ``m >= n``.

    Parameters
    ----------
    rank, lr, scale, moments, weight_decay, seed, tol, transport
        As in :class:`GaLore`. Weight decay would move the quantized part, so it is zero by default.
    when : Every
        The intervals.
    quantize : callable, optional
        From a weight ``(..., m, n)`` to its quantized values, as floats. Without one there is no
        rounding, and the rule is GaLore at growing intervals.

    Notes
    -----
    The weight is kept as the sum, so ``Q`` and ``B`` are not in the state;
    :func:`split_quantized` takes them apart for storage. ``"error"`` in the state is the relative
    change of ``W`` at the last renewal.
    """

    when: Every = field(default_factory=Growing)
    quantize: Callable[[Array], Array] | None = None

    def init(self, weight: Array, *, index: Any = 0, count: int = 1) -> State:
        state = super().init(weight, index=index, count=count)
        return {**state, "error": 0 * state["angle"]}

    def renew(self, weight: Array, choice: Choice, state: State) -> tuple[Array, State]:
        weight, state = super().renew(weight, choice, state)
        if self.quantize is None:
            return weight, state
        w = as_compute(weight)
        basis = self._basis(state)
        base, factor = split_quantized(w, basis, self.quantize)
        made_up = basis @ factor
        merged = base + (made_up if w.shape[-2] < w.shape[-1] else adjoint(made_up))
        size = norm_of(w)
        xp = namespace(w)
        error = norm_of(merged - w) / xp.where(size > 0, size, xp.ones_like(size))
        new = choice.due & ~choice.kept
        weight = where(new, rounded(merged, weight), weight)
        return weight, {**state, "error": where(new, error, state["error"])}


def split_quantized(
    weight: Array, basis: Array, quantize: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """LoQT's two parts of a weight: ``Q = quantize(W)`` and ``B = P^H (W - Q)``.

    Parameters
    ----------
    weight : array, shape (..., m, n)
    basis : array, shape (..., s, r)
        Orthonormal columns, on the shorter side of the weight.
    quantize : callable

    Returns
    -------
    (array, array)
        ``Q (..., m, n)`` and ``B (..., r, l)``. ``Q + P B``, or ``Q + (P B)^H`` for ``m >= n``, is
        the best approximation of ``W`` that this basis can reach from ``Q``.
    """
    short = min(weight.shape[-2:])
    if basis.shape[-2] != short:
        raise ValueError(
            f"basis must have {short} rows, as the shorter side of the weight, "
            f"got {basis.shape[-2]}"
        )
    base = quantize(weight)
    return base, adjoint(basis) @ short_first(weight - base)


@dataclass(frozen=True)
class QGaLore(GaLore):
    r"""Q-GaLore :cite:p:`zhang2024qgalore`: GaLore with a basis of 4 and a weight of 8 bits.

    .. math:: W \leftarrow \mathrm{round}_8\bigl(W - \eta \alpha\, \hat P\,
              \mathrm{Adam}(\hat P^H G)\bigr), \qquad \hat P = \mathrm{round}_4(P) \qquad (m < n)

    The basis is rounded to the nearest, and the weight to either neighbour, such that its mean is
    exact: steps much smaller than the distance of two levels still add up. Subspaces that stay are
    renewed ever more rarely.

    Parameters
    ----------
    rank, lr, scale, moments, weight_decay, seed, tol, transport
        As in :class:`GaLore`.
    when : Every
    weights, bases : Integers, or None
        How weights and bases are kept; None as they are. Weights have their blocks along the
        shorter side.

    Notes
    -----
    The basis is in the state as ``"basis_codes"`` and ``"basis_scales"``: half a byte a number. The
    weight comes and goes in floating point, with values that :meth:`packed` keeps in a byte each,
    exactly; :func:`~lowrank_sp.torch.integers.integer_weights_` makes a module keep them so. Half
    precision would round them once more: let such weights be float32. All draws follow from the
    seed, the index of the weight, and the step.

    The published code has levels between the least and the largest entry of a block, with a zero
    that is one of them, so it clips blocks of one sign; here they lie evenly about zero. Rounded,
    the columns of the basis are orthonormal up to a tenth; ``"angle"`` is that of the exact one.

    Examples
    --------
    >>> import numpy as np
    >>> rule = QGaLore(rank=2, lr=1e-4, scale=1.0)
    >>> weight = rule.weights.round(np.random.default_rng(0).standard_normal((20, 8)))
    >>> new, state = rule.step(weight, weight, rule.init(weight))
    >>> moved = abs(new - weight) / (np.max(abs(weight), axis=1, keepdims=True) / 127)
    >>> bool(np.mean(moved > 0.5) < 0.1), bool(np.max(moved) < 1.01)
    (True, True)
    """

    when: Every = field(default_factory=Lazy)
    weights: Integers | None = field(default_factory=Integers)
    bases: Integers | None = field(default_factory=lambda: Integers(bits=4))

    def packed(self, weight: Array) -> State:
        """Integers and scales of a weight: its columns for ``m < n``, else its rows.

        Raises
        ------
        ValueError
            If the rule keeps weights as they are.
        """
        if self.weights is None:
            raise ValueError("the rule keeps weights as they are; pass weights=Integers()")
        return self.weights.encode(rows_short(as_compute(weight)))

    def _stored(self, basis: Array) -> State:
        if self.bases is None:
            return super()._stored(basis)
        return named("basis", self.bases.encode(basis))

    def _basis(self, state: State) -> Array:
        if self.bases is None:
            return super()._basis(state)
        return self.bases.decode(part("basis", state), self.rank)

    def _look(self, g: Array, old: Array | None, rng: np.random.Generator) -> Subspace:
        if old is not None and self.bases is not None:
            # Rounded, it is not orthonormal, as a start has to be.
            old, _ = namespace(old).linalg.qr(old)
        return super()._look(g, old, rng)

    def _kept(self, new: Array, weight: Array, state: State) -> Array:
        if self.weights is None:
            return super()._kept(new, weight, state)
        rows = rows_short(new)
        keys = self.seed, state["index"], state["step"]
        noise = uniform_at(tuple(rows.shape[-2:]), *keys, like=rows)
        return rounded(turned_like(self.weights.round(rows, noise=noise), new.shape), weight)
