r"""A live product on top of earlier ones: :math:`\Delta = s B A + \sum_i s_i B_i A_i`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from lowrank_sp._arrays import RNG, Array, as_compute, namespace
from lowrank_sp.adapters.forms._draws import Like, kaiming_uniform, zeros
from lowrank_sp.adapters.forms._form import Form, Product
from lowrank_sp.adapters.forms._parts import Fixed, Trained
from lowrank_sp.factors import LowRank, check_rank


@dataclass(frozen=True, repr=False)
class Chain(Form):
    r"""A trained product, and fixed ones that were trained before it.

    .. math:: \Delta = s B A + U V

    ReLoRA :cite:p:`lialin2023relora`, COLA :cite:p:`xia2024chain` and PeriodicLoRA
    :cite:p:`meng2024periodiclora` merge an adapter into the weight from time to time, and start a
    new one. Merging in half precision loses what is smaller than the rounding of the weight. Here
    the merged products are kept side by side, so that nothing is lost, the weight stays as it was,
    and the update is plain LoRA of the sum of all ranks.

    Attributes
    ----------
    up : array, shape (m, r)
        ``B``.
    down : array, shape (r, n)
        ``A``.
    earlier_up : array, shape (m, k)
        ``U``, with all scales in it; ``k`` is zero at first.
    earlier_down : array, shape (k, n)
        ``V``.
    scale : float
        ``s``.

    Examples
    --------
    >>> import numpy as np
    >>> form = Chain.create((6, 4), rank=1, rng=0)
    >>> for seed in (1, 2):
    ...     trained = form.replace({"up": np.ones((6, 1))})
    ...     form = merge_and_restart(trained, rng=seed)
    >>> form
    Chain(up 6 x 1, down 1 x 4, earlier_up 6 x 2, earlier_down 2 x 4)
    >>> form.delta()
    LowRank(6 x 4, rank 3, float64)
    """

    up: Trained[Array, "m r"]
    down: Trained[Array, "r n"]
    earlier_up: Fixed[Array, "m k"]
    earlier_down: Fixed[Array, "k n"]
    scale: float = 1.0

    products = (("up", "down"),)

    @classmethod
    def create(
        cls, weight: Like, rank: int, *, alpha: float | None = None, rng: RNG = None
    ) -> Self:
        """As :meth:`Product.create`, with nothing before it."""
        form = Product.create(weight, rank, alpha=alpha, rng=rng)
        (m, n), like = form.shape, form.up
        return cls(form.up, form.down, zeros((m, 0), like), zeros((0, n), like), form.scale)

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self.up.shape[1] + self.earlier_up.shape[1])

    def delta(self) -> LowRank:
        xp = namespace(self.up, self.earlier_up)
        left = xp.concat([self.up * self.scale, self.earlier_up], axis=1)
        return LowRank(left, xp.concat([self.down, self.earlier_down], axis=0))

    def apply(self, x: Array) -> Array:
        live = ((x @ self.down.mT) * self.scale) @ self.up.mT
        return live + (x @ self.earlier_down.mT) @ self.earlier_up.mT


def merge_and_restart(
    form: Product | Chain,
    *,
    rank: int | None = None,
    scale: float | None = None,
    rng: RNG = None,
) -> Chain:
    """Fix what was trained, and go on with a new product that starts at zero.

    Parameters
    ----------
    form : Product or Chain
        With arrays that are not being differentiated.
    rank : int, optional
        Of the new product, by default that of the old one; COLA lowers it from link to link.
    scale : float, optional
        Of the new product, by default that of the old one.
    rng : int, Generator or None
        Seed of its ``down``.

    Returns
    -------
    Chain
        With the update of ``form``, in at least single precision.

    Notes
    -----
    The state of the optimizer belongs to the old product and goes with it: moments that are kept
    push the new one along old directions. ReLoRA warms the learning rate up again as well.
    """
    form = form.replace({name: as_compute(a) for name, a in form.arrays().items()})
    m, n = form.shape
    r = check_rank(form.up.shape[1] if rank is None else rank, min(m, n), (m, n))
    up, down = zeros((m, r), form.up), kaiming_uniform((r, n), form.up, rng)
    return Chain(up, down, *form.delta().factors(), form.scale if scale is None else scale)


def delta_updates(form: Product, gain: float) -> Chain:
    r"""Delta-LoRA :cite:p:`zi2023delta` from the current factors on.

    Delta-LoRA adds ``gain`` times every change of the product to the weight, after the step that
    made it. The changes telescope: with factors :math:`(B_0, A_0)` when it sets in,

    .. math:: \Delta = s B A + \lambda s (B A - B_0 A_0) = (1 + \lambda)\, s B A
              - \lambda s B_0 A_0,

    of rank ``2 r`` at most, and ``r`` if it sets in at zero.

    Parameters
    ----------
    form : Product
    gain : float
        ``lambda``, positive.

    Returns
    -------
    Chain
        With the update of ``form``. Its gradients are ``1 + gain`` times those that Delta-LoRA
        takes; an optimizer that sees their scale needs a step ``1 + gain`` times shorter.

    Examples
    --------
    >>> import numpy as np
    >>> form = delta_updates(Product(np.ones((3, 1)), np.ones((1, 2))), gain=0.5)
    >>> form.delta().to_dense()[0]
    array([1., 1.])
    >>> form.replace({"up": 2 * form.up}).delta().to_dense()[0]
    array([2.5, 2.5])
    """
    if not gain > 0:
        raise ValueError(f"gain must be positive, got {gain}")
    earlier = form.up * (-gain * form.scale)
    return Chain(form.up, form.down, earlier, form.down, (1 + gain) * form.scale)
