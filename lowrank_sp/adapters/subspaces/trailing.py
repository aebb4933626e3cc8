"""The trailing part of a weight, trained outside of the leading one."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_sp._arrays import Array, adjoint, namespace
from lowrank_sp.adapters.forms import Fixed, Form, Start, Trained
from lowrank_sp.adapters.forms._draws import template
from lowrank_sp.adapters.initializers._start import check_finite, remainder
from lowrank_sp.factors import LowRank
from lowrank_sp.linalg.svd import truncated_svd


@dataclass(frozen=True, repr=False)
class TrailingPart(Form):
    r"""The small singular values of a weight, trained where the large ones are not: OSF.

    .. math:: W = U_k \Sigma_k V_k^H + \Delta, \qquad
              \Delta = (I - U_k U_k^H)\, B \operatorname{diag}(s) A\, (I - V_k V_k^H)

    What the leading directions read and write stays as it is :cite:p:`nayak2026sculpting`. PEFT and
    the authors project the gradients of ``B`` and ``A`` instead; gradient descent then takes the
    same path, but Adam, whose steps are not in the span of gradients, leaves the subspace. Here the
    projectors belong to the formula, so that no optimizer can.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    values : array, shape (r,)
        ``s``.
    down : array, shape (r, n)
        ``A``.
    kept_up : array, shape (m, k)
        ``U_k``, orthonormal and fixed.
    kept_down : array, shape (k, n)
        ``V_k^H``, likewise.

    Notes
    -----
    ``r = min(m, n) - k``, so about as many numbers are trained as the weight has. Applying costs
    ``(m + n)(r + 2 k)`` products a row.

    Examples
    --------
    >>> import numpy as np
    >>> form, base = TrailingPart.of_weight(np.diag([3.0, 2.0, 1.0]), kept=1)
    >>> form
    TrailingPart(up 3 x 2, values 2, down 2 x 3, kept_up 3 x 1, kept_down 1 x 3)
    >>> np.round(np.diag(base), 12), form.values
    (array([3., 0., 0.]), array([2., 1.]))
    """

    up: Trained[Array, "m r"]
    values: Trained[Array, "r"]
    down: Trained[Array, "r n"]
    kept_up: Fixed[Array, "m k"]
    kept_down: Fixed[Array, "k n"]

    @classmethod
    def of_weight(cls, weight: Array, kept: int | None = None) -> Start:
        """The trailing triplets of a weight, and the leading ones as its base.

        Parameters
        ----------
        weight : array, shape (m, n)
        kept : int, optional
            ``k``, in ``1..min(m, n) - 1``; by default half of the singular values stay.

        Notes
        -----
        One full SVD.
        """
        (m, n), _ = template(weight)
        least = min(m, n)
        kept = least // 2 if kept is None else kept
        if not 1 <= kept < least:
            raise ValueError(f"kept must be in 1..{least - 1} for shape {m} x {n}, got {kept}")
        check_finite(weight)
        u, s, vh = truncated_svd(weight, least)
        s = namespace(u).astype(s, u.dtype)
        form = cls(u[:, kept:], s[kept:], vh[kept:, :], u[:, :kept], vh[:kept, :])
        return Start(form, remainder(weight, form.up * form.values, form.down, 1.0))

    @property
    def rank_bound(self) -> int:
        (m, r), k = self.up.shape, self.kept_up.shape[1]
        return min(r, m - k, self.down.shape[1] - k)

    def delta(self) -> LowRank:
        up = self.up - self.kept_up @ (adjoint(self.kept_up) @ self.up)
        down = self.down - (self.down @ adjoint(self.kept_down)) @ self.kept_down
        return LowRank(up * self.values, down)

    def apply(self, x: Array) -> Array:
        x = x - (x @ self.kept_down.mT) @ adjoint(self.kept_down).mT
        y = ((x @ self.down.mT) * self.values) @ self.up.mT
        return y - (y @ adjoint(self.kept_up).mT) @ self.kept_up.mT
