"""Penalties on the arrays of forms, to be added to a loss."""

from __future__ import annotations

from typing import Any

from lowrank_sp._arrays import Array, adjoint, device, namespace


def orthogonality(*forms: Any, power: int = 1) -> Array:
    r"""How far factors are from orthonormal columns and rows, on average.

    .. math:: \operatorname{mean}_{X}\, \lVert X^H X - I \rVert_F^p, \qquad
              X \in \{B_1, A_1^H, B_2, A_2^H, \dots\}

    With ``power=1`` it is what the code of AdaLoRA :cite:p:`zhang2023adalora`, PEFT and SORSA
    :cite:p:`cao2024sorsa` adds to the loss, and half of that of KaSA :cite:p:`wang2025kasa`, which
    takes the sum of two. With ``power=2`` it is that of the paper of AdaLoRA, divided by the number
    of factors.

    Parameters
    ----------
    *forms
        Anything with ``up``, shape (m, r), and ``down``, shape (r, n).
    power : {1, 2}
        The first power pulls with a force that does not fade near the manifold; its gradient there
        is zero, and not NaN.

    Returns
    -------
    array, shape ()

    Notes
    -----
    ``2 (m + n) r^2`` flops for each form.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_sp.adapters import forms
    >>> form = forms.Product(2.0 * np.eye(3), np.eye(3))
    >>> bool(orthogonality(form) == 27**0.5 / 2), bool(orthogonality(form, power=2) == 13.5)
    (True, True)
    """
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if not forms:
        raise ValueError("at least one form is needed, got none")
    defects = [_defect(x) for form in forms for x in (form.up, adjoint(form.down))]
    xp = namespace(*defects)
    squares = xp.stack(defects)
    if power == 2:
        return xp.mean(squares)
    # The root has no gradient at zero: the inner choice keeps its infinity out of the outer one.
    positive = squares > 0
    root = xp.where(positive, squares, xp.ones_like(squares)) ** 0.5
    return xp.mean(xp.where(positive, root, xp.zeros_like(squares)))


def _defect(x: Array) -> Array:
    """``||x^H x - I||_F^2``."""
    xp = namespace(x)
    gram = adjoint(x) @ x
    gap = gram - xp.eye(gram.shape[0], dtype=gram.dtype, device=device(gram))
    return xp.sum(abs(gap) ** 2)
