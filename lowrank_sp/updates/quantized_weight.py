"""A quantized weight and a factor that makes up for its rounding: LoQT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lowrank_sp._arrays import Array, adjoint, as_compute, namespace
from lowrank_sp.updates.full_weight import Choice, GaLore, norm_of, short_first
from lowrank_sp.updates.projector import Every, Growing
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
        base, factor = split_quantized(w, state["basis"], self.quantize)
        made_up = state["basis"] @ factor
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
    base = quantize(weight)
    return base, adjoint(basis) @ short_first(weight - base)
