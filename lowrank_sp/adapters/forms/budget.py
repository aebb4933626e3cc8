"""The rank budget of AdaLoRA: what each triplet is worth, how many stay, and which.

Pure functions of arrays, for a loop of whatever framework. After ``loss.backward()`` and the step:

.. code-block:: python

    importance = [i.updated(f, g) for i, f, g in zip(importance, forms, gradients)]
    budget = cubic_budget(step, initial, final, total=total, warmup=warmup, cooldown=cooldown)
    if step % every == 0 and step >= warmup:
        keep = keep_largest([i.scores() for i in importance], budget)
        forms = [f.masked(k) for f, k in zip(forms, keep)]

Until the cooldown a masked triplet still gets gradients and may come back. Then the last ``keep``
is what :meth:`DiagonalCore.kept` cuts by, at the scale of the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from lowrank_sp._arrays import Array, from_host, namespace, to_host
from lowrank_sp.adapters.forms.core import DiagonalCore


@dataclass(frozen=True)
class Importance:
    r"""Smoothed sensitivities of the entries of a form, and their smoothed spread.

    .. math:: I = |\theta \circ \nabla_\theta|, \qquad
              \bar I \leftarrow \beta_1 \bar I + (1 - \beta_1) I, \qquad
              U \leftarrow \beta_2 U + (1 - \beta_2) |I - \bar I|

    with the new :math:`\bar I` in the last rule :cite:p:`zhang2023adalora`.

    Attributes
    ----------
    smoothed, spread : mapping from name to array
        Of every trained array of the form, in its shape.
    """

    smoothed: Mapping[str, Array]
    spread: Mapping[str, Array]

    @classmethod
    def of(cls, form: DiagonalCore) -> Self:
        """Zeros, before the first step."""
        zeros = {name: namespace(a).zeros_like(a) for name, a in form.parameters().items()}
        return cls(zeros, zeros)

    def updated(
        self,
        form: DiagonalCore,
        gradients: Mapping[str, Array],
        *,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> Importance:
        """After one more step, with the gradients of the loss in the arrays of the form."""
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"{name} must be in (0, 1), got {beta}")
        smoothed, spread = {}, {}
        for name, a in form.parameters().items():
            now = abs(a * gradients[name])
            smoothed[name] = beta1 * self.smoothed[name] + (1 - beta1) * now
            spread[name] = beta2 * self.spread[name] + (1 - beta2) * abs(now - smoothed[name])
        return Importance(smoothed, spread)

    def scores(self) -> Array:
        """Score of every triplet, shape ``(r,)``: of its value, plus means over its vectors."""
        entry = {name: a * self.spread[name] for name, a in self.smoothed.items()}
        xp = namespace(entry["core"])
        return entry["core"] + xp.mean(entry["up"], axis=0) + xp.mean(entry["down"], axis=1)


def cubic_budget(
    step: int, initial: int, final: int, *, total: int, warmup: int, cooldown: int
) -> int:
    r"""Number of triplets of all layers that may stay after a step.

    .. math:: b = b_T + (b_0 - b_T) \left(1 - \frac{t - t_i}{T - t_f - t_i}\right)^3

    rounded down, between ``warmup`` steps of ``initial`` and ``cooldown`` steps of ``final``.

    Examples
    --------
    >>> [cubic_budget(t, 96, 64, total=100, warmup=10, cooldown=30) for t in (0, 10, 40, 70, 99)]
    [96, 96, 68, 64, 64]
    """
    if not 0 <= warmup < total - cooldown <= total:
        raise ValueError(
            "warmup must end before cooldown begins, got "
            f"warmup {warmup}, cooldown {cooldown} and total {total}"
        )
    if not 0 <= final <= initial:
        raise ValueError(f"final must be in 0..initial, got {final} and {initial}")
    if step <= warmup:
        return initial
    if step > total - cooldown:
        return final
    left = 1 - (step - warmup) / (total - cooldown - warmup)
    return int((initial - final) * left**3 + final)


def keep_largest(scores: Sequence[Array], budget: int) -> list[Array]:
    """Masks of the ``budget`` largest scores of all layers; of equal ones the earlier stay.

    Exactly ``budget`` stay, or all where there are fewer. A threshold at the order statistic of
    what must go, as in PEFT, does not exist where nothing must, and cuts too much among ties.

    Examples
    --------
    >>> import numpy as np
    >>> keep_largest([np.array([3.0, 1.0]), np.array([2.0, 1.0])], budget=3)
    [array([ True,  True]), array([ True, False])]
    """
    if budget < 0:
        raise ValueError(f"budget must not be negative, got {budget}")
    host = [to_host(s).astype(np.float64) for s in scores]
    pooled = np.concatenate(host)
    if not np.isfinite(pooled).all():
        raise ValueError("scores must be finite, got NaN or infinite ones")
    keep = np.zeros(pooled.shape, bool)
    keep[np.argsort(-pooled, kind="stable")[:budget]] = True
    parts = np.split(keep, np.cumsum([s.shape[0] for s in host])[:-1])
    return [from_host(part, s, namespace(s).bool) for part, s in zip(parts, scores, strict=True)]
