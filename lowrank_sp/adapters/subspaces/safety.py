r"""Keeping a model aligned: what an adapter may write to, or must not touch.

Safe LoRA projects trained updates *onto* the directions in which alignment moved the weight; SaLoRA
trains with the directions *removed* in which the layer answers harmful inputs. Both are projectors
on the outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lowrank_sp._arrays import RNG, Array, as_compute, is_complex, namespace
from lowrank_sp.adapters._products import product_of
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.subspaces.projectors import Projector, restricted, span
from lowrank_sp.factors import LowRank
from lowrank_sp.linalg.weighted import data_root
from lowrank_sp.operators import LinearOperator, as_operator


def alignment(
    aligned: Array,
    unaligned: Array,
    *,
    rank: int | None = None,
    energy: float | None = None,
    rng: RNG = None,
) -> Projector:
    r"""The directions in which alignment moved the outputs of a weight.

    .. math:: C = U_k U_k^H, \qquad W_{\text{aligned}} - W_{\text{unaligned}} = U \Sigma V^H

    With all directions it is the projector :math:`V (V^H V)^{-1} V^H` of the paper
    :cite:p:`hsu2024safelora`, without the inverse: a square ``V`` has none to speak of, and full
    rank would make the projector the identity. Choose ``rank`` or ``energy``.

    Parameters
    ----------
    aligned, unaligned : array, shape (m, n)
    rank, energy, rng
        As in :meth:`Projector.grown`.

    Raises
    ------
    ValueError
        If the weights have different shapes, or are equal.

    Examples
    --------
    >>> import numpy as np
    >>> alignment(np.diag([3.0, 2.0, 0.0]), np.diag([0.0, 1.0, 0.0]), rank=1)
    Projector(3 x 3, rank 1, float64)
    """
    p = span(_moved(aligned, unaligned), rank=rank, energy=energy, rng=rng)
    if p.rank == 0:
        raise ValueError("aligned and unaligned are equal; there is no direction of alignment")
    return p


def published_alignment(aligned: Array, unaligned: Array) -> LinearOperator:
    r"""What the published code of Safe LoRA multiplies by instead of a projector.

    .. math:: \tilde C = V V^H / \lVert V \rVert_F, \qquad
              V = W_{\text{aligned}} - W_{\text{unaligned}}

    Not a projector: :math:`\tilde C^2 \ne \tilde C`, its norm is in units of ``V``, and it
    stretches directions by their singular values. To reproduce results; else call
    :func:`alignment`.

    Returns
    -------
    LinearOperator, shape (m, m)
        Factored: the ``m x m`` matrix is not formed.
    """
    v = as_operator(_moved(aligned, unaligned))
    norm = v.norm()
    if norm == 0.0:
        raise ValueError("aligned and unaligned are equal; there is no direction of alignment")
    return (v @ v.mH) * (1 / norm)


class Gated(NamedTuple):
    """An adapter that went through a gate, what the gate saw, and whether it changed it."""

    adapter: Product
    cosine: float
    projected: bool


def safe_lora(adapter: Any, outputs: LinearOperator, *, threshold: float = 0.5) -> Gated:
    r"""Project the update of a layer onto the aligned directions, if it has left them.

    .. math:: \text{if} \quad \frac{\operatorname{Re} \langle C \Delta, \Delta \rangle}
              {\lVert C \Delta \rVert_F \lVert \Delta \rVert_F} \le \tau: \qquad B \leftarrow C B

    With a true projector the cosine is :math:`\lVert C \Delta \rVert_F / \lVert \Delta \rVert_F`,
    the root of the share of the update's energy in the aligned directions
    :cite:p:`hsu2024safelora`.

    Parameters
    ----------
    adapter : Product, anything with ``up``, ``down`` and ``scale``, or a LowRank
        Of one layer.
    outputs : operator, shape (m, m)
        :func:`alignment` of the layer, or :func:`published_alignment`.
    threshold : float
        ``tau``. Layers whose cosine is above it are left alone.

    Returns
    -------
    Gated
        ``cosine`` is 1 for a zero update, which loses nothing.

    Notes
    -----
    From factors: ``O(m k r + (m + n) r^2)`` flops.

    Examples
    --------
    >>> import numpy as np
    >>> c = span(np.eye(3)[:, :1])
    >>> adapter = Product(np.array([[3.0], [4.0], [0.0]]), np.ones((1, 2)))
    >>> gated = safe_lora(adapter, c, threshold=0.7)
    >>> gated.adapter.up[:, 0], round(gated.cosine, 12), gated.projected
    (array([3., 0., 0.]), 0.6, True)
    """
    pair = product_of(adapter, "the adapter")
    inside = restricted(pair, outputs=outputs)
    before, after = (LowRank(as_compute(x.up), as_compute(x.down)) for x in (pair, inside))
    sizes = float(before.norm()), float(after.norm())
    if sizes[0] == 0.0:
        cosine = 1.0
    elif sizes[1] == 0.0:
        cosine = 0.0
    else:
        cosine = complex(after.inner(before) / sizes[0] / sizes[1]).real
    projected = bool(cosine <= threshold)
    return Gated(inside if projected else pair, cosine, projected)


def harmful_outputs(
    weight: Array,
    *,
    inputs: Array | None = None,
    covariance: Array | None = None,
    rank: int | None = None,
    energy: float | None = None,
    rng: RNG = None,
) -> Projector:
    r"""The directions in which a layer answers harmful inputs.

    .. math:: U_s U_s^H, \qquad W X_h = U \Sigma V^H

    Its complement is the safety module :math:`C_s` of SaLoRA :cite:p:`li2025salora`: see
    :class:`SafeProduct`.

    Parameters
    ----------
    weight : array, shape (m, n)
    inputs, covariance
        Of the layer on harmful prompts, as in :func:`input_span`.
    rank, energy, rng
        As in :meth:`Projector.grown`; energy is that of the outputs.

    Examples
    --------
    >>> import numpy as np
    >>> harmful_outputs(np.diag([1.0, 2.0, 3.0]), inputs=np.array([[1.0, 0.0, 0.0]]))
    Projector(3 x 3, rank 1, float64)
    """
    weight = as_compute(weight)
    root = data_root(weight.shape[1], inputs, covariance)
    xp = namespace(weight, root)
    if is_complex(root.dtype) and not is_complex(weight.dtype):
        raise TypeError("weight must be complex where its inputs are; convert it first")
    image = weight @ xp.astype(root, weight.dtype)
    return span(image, rank=rank, energy=energy, rng=rng)


def _moved(aligned: Array, unaligned: Array) -> Array:
    if tuple(aligned.shape) != tuple(unaligned.shape):
        raise ValueError(
            f"aligned and unaligned must have one shape, got {tuple(aligned.shape)} and "
            f"{tuple(unaligned.shape)}"
        )
    return as_compute(aligned) - as_compute(unaligned)
