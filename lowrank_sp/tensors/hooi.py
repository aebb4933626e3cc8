"""Best Tucker approximation of given rank: higher-order orthogonal iteration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

from lowrank_sp._arrays import RNG, Array, adjoint, eps, frobenius, namespace
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.tensors.factored import moved, on_host
from lowrank_sp.tensors.hosvd import inverse, projection_error, st_hosvd
from lowrank_sp.tensors.modes import memory_order, mode_dot, session
from lowrank_sp.tensors.ranks import Rank, as_tensor, scaled, tucker_rank
from lowrank_sp.tensors.subspace import leading_subspace
from lowrank_sp.tensors.tucker import Tucker, project

# A subspace that moves by less than so many rounding errors stays where it is.
_STILL = 256


class _State(NamedTuple):
    core: Array
    factors: Sequence[Array]
    fixed: bool = False  # no factor moved in the last sweep


class _Products:
    """Products of a tensor with the factor of one mode, each for as long as that factor stands.

    All modes but that one are served by it. One product of every free mode is kept where together
    they take no more memory than the tensor, else only the last.
    """

    def __init__(self, x: Array, free: Sequence[int], ranks: Sequence[int]) -> None:
        self.x, self.free = x, free
        self.all_fit = sum(ranks[k] / x.shape[k] for k in free) <= 1
        self.kept: dict[int, tuple[Array, Array]] = {}

    def serving(self, todo: Sequence[int], factors: Sequence[Array]) -> tuple[Array, list[int]]:
        """A product that serves the first modes of ``todo``, and the modes along which it is one.

        A new one is with the factor found last, for that will stand longest.
        """
        if len(self.free) == 1:
            return self.x, []
        self.kept = {k: kept for k, kept in self.kept.items() if kept[0] is factors[k]}
        served = {k: (*todo, k).index(k) for k in self.kept}
        mode = max(served, key=served.__getitem__, default=todo[0])
        if mode == todo[0]:
            mode = self.free[self.free.index(mode) - 1]
            if not self.all_fit:
                self.kept.clear()
            self.kept[mode] = factors[mode], _projected(self.x, factors, [mode])
        return self.kept[mode][1], [mode]


def hooi(
    x: Array,
    *,
    rank: Rank,
    init: Tucker | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, Any], Any] | None = None,
) -> Solution:
    r"""Tucker approximation of given rank by higher-order orthogonal iteration.

    .. math:: \min_{U_k^H U_k = I,\; G} \lVert X - G \times_1 U_1 \cdots \times_N U_N \rVert_F

    Each mode in turn gets the leading subspace of the tensor that is projected along all others, so
    the error never rises. What a sweep gains over :func:`~lowrank_sp.tensors.hosvd.st_hosvd`, where
    it starts, is usually little after the first one or two.

    Parameters
    ----------
    x : array, shape (n_1, ..., n_N)
    rank : int, sequence of int, or float
        As :func:`~lowrank_sp.tensors.ranks.tucker_rank` reads it. Modes of full rank are left as
        they are.
    init : Tucker, optional
        Where to start, of this rank; by default ``st_hosvd(x, rank)``.
    rng : int, Generator or None
        For modes so long that their subspace is found by a Krylov space.
    stop : Stop
        The change is that of ``||G||`` relative to ``||X||``.
    callback : callable, optional

    Returns
    -------
    Solution
        ``value`` is a :class:`Tucker` with orthonormal factors and its ``error``.

    Notes
    -----
    Products with one factor are shared by all other modes, across sweeps: ``N / (N - 1)`` reads of
    ``x`` a sweep, of ``2 r`` flops an entry each. A subspace that moves by less than 256 rounding
    errors stays as it is, and products with it are kept: sweeps at the fixed point read nothing.
    Memory is that of one product, ``r / n`` of ``x``, or of all ``N`` of them where that is at most
    ``x`` :cite:p:`delathauwer2000best`.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((8, 9, 10))
    >>> start = hooi(x, rank=3, stop=Stop(max_iter=0)).value
    >>> best = hooi(x, rank=3, init=start).value
    >>> best.error < start.error
    True
    """
    like, norm = as_tensor(x)
    ranks = tucker_rank(rank, like.shape)
    x, factor = scaled(on_host(like), norm)
    norm = norm / factor
    if init is not None and (init.shape != tuple(x.shape) or init.rank != ranks):
        raise ValueError(
            f"init must have shape {tuple(x.shape)} and rank {ranks}, got {init.shape} and "
            f"{init.rank}"
        )
    axes = memory_order(x)
    x, ranks = namespace(x).permute_dims(x, axes), tuple(ranks[k] for k in axes)
    free = [mode for mode, r in enumerate(ranks) if r < x.shape[mode]]
    products = _Products(x, free, ranks)

    def start() -> _State:
        if init is None:
            t = st_hosvd(x, ranks, rng=rng)
            return _State(t.core, t.factors)
        given = init.map(on_host).permuted(axes)
        factors = tuple(namespace(f).linalg.qr(f)[0] for f in given.factors)
        return _State(project(x, factors), factors)

    def step(state: _State) -> tuple[_State, float]:
        following = state if state.fixed else _sweep(products, state, rng)
        gained = abs(frobenius(following.core) - frobenius(state.core))
        return following, gained / norm if norm else 0.0

    def value(state: _State) -> Tucker:
        error = projection_error(x, state.core, state.factors, norm)
        t = Tucker(state.core * factor, state.factors, error * factor)
        return moved(t.permuted(inverse(axes)), like)

    with session(x):
        return iterate(step, start(), stop=stop, dtype=x.dtype, callback=callback, value=value)


def tucker2(
    stack: Array,
    *,
    rank: Rank,
    init: Tucker | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, Any], Any] | None = None,
) -> Solution:
    r"""One pair of factors for a stack of matrices, and a small core for each of them.

    .. math:: W_l \approx U\, C_l\, V^T, \qquad U^H U = I,\; V^H V = I

    This is :func:`hooi` along the last two modes: the form of adapters that share their factors
    across layers.

    Parameters
    ----------
    stack : array, shape (L, m, n)
    rank : int, (int, int), or float
        Columns of ``U`` and of ``V``. A fraction is that of the entries kept as parameters of
        ``U``, ``V`` and all ``C_l``.
    init, rng, stop, callback
        As in :func:`hooi`.

    Returns
    -------
    Solution
        ``value`` is a :class:`Tucker` with ``core[l] = C_l`` and factors ``(I, U, V)``.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> u, c, v = (rng.standard_normal(s) for s in ((20, 3), (5, 3, 2), (2, 15)))
    >>> cores, (_, left, right) = tucker2(u @ c @ v, rank=(3, 2)).value
    >>> bool(np.allclose(left @ cores @ right.T, u @ c @ v))
    True
    """
    if stack.ndim != 3:
        raise ValueError(f"a stack of matrices has shape (L, m, n), got {tuple(stack.shape)}")
    ranks = (stack.shape[0], *tucker_rank(rank, stack.shape[1:], copies=stack.shape[0]))
    return hooi(stack, rank=ranks, init=init, rng=rng, stop=stop, callback=callback)


def _sweep(products: _Products, state: _State, rng: RNG) -> _State:
    """The subspace of every free mode in turn."""
    core, factors, todo = state.core, list(state.factors), list(products.free)
    while todo:
        part, done = products.serving(todo, factors)
        now = todo[: (*todo, *done).index(done[0])] if done else todo
        others = [k for k in products.free if k not in (*done, *now)]
        del core  # lest it be there beside the next one
        core = _renewed(_projected(part, factors, others), now, factors, rng)
        del part
        todo = todo[len(now) :]
    fixed = all(new is old for new, old in zip(factors, state.factors, strict=True))
    return _State(core, tuple(factors), fixed)


def _renewed(part: Array, modes: Sequence[int], factors: list[Array], rng: RNG) -> Array:
    """The core, after ``factors`` of all ``modes``, along which ``part`` is not projected, are new.

    A subspace that stays where it is keeps its factor.
    """
    if len(modes) > 1:
        middle = (len(modes) + 1) // 2
        _renewed(_projected(part, factors, modes[middle:]), modes[:middle], factors, rng)
        return _renewed(_projected(part, factors, modes[:middle]), modes[middle:], factors, rng)
    (mode,) = modes
    before = factors[mode]
    u, _ = leading_subspace(part, mode, rank=before.shape[1], rng=rng)
    if frobenius(u - before @ (adjoint(before) @ u)) > _STILL * eps(part.dtype):
        factors[mode] = u
    return mode_dot(part, adjoint(factors[mode]), mode)


def _projected(x: Array, factors: Sequence[Array], modes: Sequence[int]) -> Array:
    shrinking = sorted(modes, key=lambda k: factors[k].shape[1] / factors[k].shape[0])
    return reduce(lambda y, k: mode_dot(y, adjoint(factors[k]), k), shrinking, x)
