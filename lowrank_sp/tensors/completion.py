"""Completion of tensors from observed entries, in the Tucker and in the tensor-train format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    RNG,
    Array,
    adjoint,
    device,
    frobenius,
    from_host,
    is_complex,
    namespace,
    slices,
    to_host,
)
from lowrank_sp.iterate import Solution, Stop, iterate
from lowrank_sp.linalg.svd import randomized_svd
from lowrank_sp.tensors.entries import TensorEntries, check_enough, of_unit_size, with_gaps
from lowrank_sp.tensors.factored import moved, on_host
from lowrank_sp.tensors.hosvd import st_hosvd
from lowrank_sp.tensors.modes import multi_mode_dot
from lowrank_sp.tensors.ranks import Rank, tt_rank, tucker_rank
from lowrank_sp.tensors.tt import TT, mirrored, right_orthogonal, tall, times
from lowrank_sp.tensors.tt_round import tt_round
from lowrank_sp.tensors.tucker import Tucker

# Numbers gathered at a time.
_CHUNK = 2**20
# Steps of conjugate gradients for the core in a sweep, and sweeps for each rank of the start.
_CORE_STEPS = 4
_START_SWEEPS = 3


class _State(NamedTuple):
    value: Any
    misfit: float  # norm of the residual over the entries


def tucker_completion(
    entries: TensorEntries,
    *,
    rank: Rank,
    init: Tucker | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, Any], Any] | None = None,
) -> Solution:
    r"""Tucker tensor of given rank that fits observed entries, by alternating least squares.

    .. math:: \min_{G, U_1, \dots, U_N} \; \sum_{i \in \Omega}
              |X_i - (G \times_1 U_1 \cdots \times_N U_N)_i|^2

    A sweep solves for every factor, row by row, and then takes a few steps of conjugate gradients
    for the core. The misfit never rises.

    Parameters
    ----------
    entries : TensorEntries
    rank : int, sequence of int, or float
        As :func:`~lowrank_sp.tensors.ranks.tucker_rank` reads it.
    init : Tucker, optional
        Where to start. By default ranks are raised one by one, each time by what fits the residual
        best, with zeros for what is not known.
    rng : int, Generator or None
    stop : Stop
        The change is that of the misfit, relative to the norm of the entries.
    callback : callable, optional

    Returns
    -------
    Solution
        ``value`` is a :class:`Tucker` with orthonormal factors. What it is worth is seen on entries
        withheld by :meth:`TensorEntries.split`. ``converged`` is False where an index has no entry;
        the ``reason`` names it.

    Raises
    ------
    ValueError
        If the ranks have more degrees of freedom than there are entries.

    Notes
    -----
    ``O(M N prod(r))`` flops a sweep for ``M`` entries.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> x = np.einsum("ia,ja,ka->ijk", *(rng.standard_normal((20, 2)) for _ in range(3)))
    >>> entries = TensorEntries.from_mask(x, rng.random(x.shape) < 0.2)
    >>> t = tucker_completion(entries, rank=2, rng=0).value
    >>> bool(np.linalg.norm(t.to_dense() - x) < 1e-5 * np.linalg.norm(x))
    True
    """
    like, rng = entries, np.random.default_rng(rng)
    entries, unit = of_unit_size(entries)
    size = entries.norm()
    ranks = tucker_rank(rank, entries.shape)
    sides = zip(entries.shape, ranks, strict=True)
    check_enough(entries, math.prod(ranks) + sum(r * (n - r) for n, r in sides))

    def sweep(t: Tucker) -> tuple[Tucker, float]:
        for mode in range(t.ndim):
            fitted, _ = entries.least_squares(
                mode,
                lambda chosen, t=t, mode=mode: t.contracted(entries.indices[chosen], mode),
                t.factors[mode],
            )
            t = Tucker(t.core, (*t.factors[:mode], fitted, *t.factors[mode + 1 :]))
        return _fit_core(entries, _orthonormal(t))

    def grown(t: Tucker | None, residual: TensorEntries, ranks: Sequence[int]) -> Tucker:
        more = _spectral_tucker(residual, rng)
        if t is None:
            return more
        t = _orthonormal(t + more)
        inner = st_hosvd(t.core, [min(r, n) for r, n in zip(ranks, t.rank, strict=True)])
        factors = [u @ v for u, v in zip(t.factors, inner.factors, strict=True)]
        return Tucker(inner.core, factors)

    if init is None:
        start = _pursued(entries, ranks, grown, sweep)
    else:
        start = init.map(on_host) * (1 / unit)
    _check_start(start, entries.shape, ranks)
    solution = iterate(
        lambda state: _stepped(state, sweep, size),
        _State(_orthonormal(start), _misfit(entries, start)),
        stop=stop,
        dtype=entries.values.dtype,
        callback=callback,
        value=lambda state: moved(state.value * unit, like.values),
    )
    return with_gaps(solution, entries)


def tt_completion(
    entries: TensorEntries,
    *,
    rank: Rank,
    init: TT | None = None,
    rng: RNG = None,
    stop: Stop = Stop(),
    callback: Callable[[int, float, Any], Any] | None = None,
    ridge: float = 0.0,
) -> Solution:
    r"""Tensor train of given ranks that fits observed entries, by alternating least squares.

    .. math:: \min_{G_1, \dots, G_N} \; \sum_{i \in \Omega} |X_i - G_1[i_1] \cdots G_N[i_N]|^2
              + \rho \lVert G_1 \cdots G_N \rVert_F^2

    One core after the other is solved for, slice by slice, from the left to the right and back; all
    others are orthogonal at that time. The misfit never rises.

    Parameters
    ----------
    entries : TensorEntries
    rank : int, sequence of int, or float
        As :func:`~lowrank_sp.tensors.ranks.tt_rank` reads it.
    init : TT, optional
        Where to start. By default ranks are raised one by one, each time by what fits the residual
        best, with zeros for what is not known.
    rng : int, Generator or None
    stop : Stop
        The change is that of the misfit, relative to the norm of the entries.
    callback : callable, optional
    ridge : float
        The weight ``rho``, without a unit.

    Returns
    -------
    Solution
        ``value`` is a :class:`TT`, right-orthogonal up to its first core. ``converged`` is False
        where an index has no entry; the ``reason`` names it.

    Raises
    ------
    ValueError
        If the ranks have more degrees of freedom than there are entries, unless a ridge settles
        them.

    Notes
    -----
    ``O(M N r^4)`` flops a sweep for ``M`` entries :cite:p:`grasedyck2015variants`.

    Examples
    --------
    >>> import numpy as np
    >>> i = np.arange(12.0)
    >>> x = np.sin(i[:, None, None] + 0.3 * i[:, None] + 0.1 * i)
    >>> entries = TensorEntries.from_mask(x, np.random.default_rng(0).random(x.shape) < 0.3)
    >>> t = tt_completion(entries, rank=2, rng=0).value
    >>> bool(np.linalg.norm(t.to_dense() - x) < 1e-5 * np.linalg.norm(x))
    True
    """
    like, rng = entries, np.random.default_rng(rng)
    entries, unit = of_unit_size(entries)
    size = entries.norm()
    ranks = tt_rank(rank, entries.shape)
    if ridge == 0:
        cores = zip(ranks[:-1], entries.shape, ranks[1:], strict=True)
        gauges = sum(r**2 for r in ranks[1:-1])
        check_enough(entries, sum(r * n * s for r, n, s in cores) - gauges)
    mirror = TensorEntries(entries.indices[:, ::-1], entries.values, entries.shape[::-1])

    def sweep(train: TT) -> tuple[TT, float]:
        cores, _ = _half_sweep(entries, train.cores, ridge)
        cores, misfit = _half_sweep(mirror, mirrored(cores), ridge)
        return TT(mirrored(cores)), misfit

    def grown(train: TT | None, residual: TensorEntries, ranks: Sequence[int]) -> TT:
        more = _spectral_train(residual, rng)
        train = more if train is None else tt_round(train + more, ranks)
        return TT(right_orthogonal(train.cores))

    if init is None:
        start = _pursued(entries, ranks, grown, sweep)
    else:
        start = init.map(on_host) * (1 / unit)
    _check_start(start, entries.shape, ranks)
    solution = iterate(
        lambda state: _stepped(state, sweep, size),
        _State(TT(right_orthogonal(start.cores)), _misfit(entries, start)),
        stop=stop,
        dtype=entries.values.dtype,
        callback=callback,
        value=lambda state: moved(state.value * unit, like.values),
    )
    return with_gaps(solution, entries)


def _check_start(start: Any, shape: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    if start.shape != shape or start.rank != ranks:
        raise ValueError(
            f"init must have shape {shape} and rank {ranks}, got {start.shape} and {start.rank}"
        )


def _misfit(entries: TensorEntries, tensor: Any) -> float:
    return frobenius(entries.values - tensor.sample(entries.indices))


def _stepped(
    state: _State, sweep: Callable[[Any], tuple[Any, float]], size: float
) -> tuple[_State, float]:
    value, misfit = sweep(state.value)
    return _State(value, misfit), abs(state.misfit - misfit) / size if size else 0.0


def _pursued(
    entries: TensorEntries,
    ranks: Sequence[int],
    grown: Callable[[Any, TensorEntries, Sequence[int]], Any],
    sweep: Callable[[Any], tuple[Any, float]],
) -> Any:
    """A start of the given ranks, raised one by one by what fits the residual best.

    At full rank from the first, weak components are soon fitted to what strong ones leave, and grow
    without bound where nothing was observed.
    """
    value, residual = None, entries.values
    for r in range(1, max(ranks) + 1):
        now = [min(r, most) for most in ranks]
        value = grown(value, TensorEntries(entries.indices, residual, entries.shape), now)
        for _ in range(_START_SWEEPS):
            value, _ = sweep(value)
        residual = entries.values - value.sample(entries.indices)
    return value


def _orthonormal(t: Tucker) -> Tucker:
    """The same tensor with orthonormal factors, of the same rank."""
    xp = namespace(*t.arrays())
    pairs = [xp.linalg.qr(f) for f in t.factors]
    return Tucker(multi_mode_dot(t.core, [r for _, r in pairs]), [q for q, _ in pairs])


def _fit_core(entries: TensorEntries, t: Tucker) -> tuple[Tucker, float]:
    """Conjugate gradients on the least-squares problem of the core, and the misfit they leave."""
    xp = namespace(*t.arrays())
    parts = list(slices(entries.size, max(1, _CHUNK * t.rank[-1] // math.prod(t.rank))))
    places = [
        [xp.asarray(entries.indices[part, k], device=t.device) for k in range(t.ndim)]
        for part in parts
    ]
    flat = (math.prod(t.rank[:-1]), t.rank[-1])

    def rows(place: list[Array]) -> tuple[Array, Array]:
        """Products of the rows of all factors but the last, and the rows of the last."""
        *others, last = [xp.take(u, i, axis=0) for u, i in zip(t.factors, place, strict=True)]
        product = xp.ones((last.shape[0], 1), dtype=last.dtype, device=t.device)
        for other in others:
            pairs = product[:, :, None] * other[:, None, :]
            product = xp.reshape(pairs, (last.shape[0], -1))
        return product, last

    def forward(core: Array) -> Array:
        images = []
        for place in places:
            product, last = rows(place)
            images.append(xp.sum((product @ core) * last, axis=1))
        return xp.concat(images)

    def backward(residual: Array) -> Array:
        total = xp.zeros(flat, dtype=residual.dtype, device=t.device)
        for part, place in zip(parts, places, strict=True):
            product, last = rows(place)
            conjugate = xp.conj(last) if is_complex(last.dtype) else last
            total = total + adjoint(product) @ (conjugate * residual[part, None])
        return total

    core = xp.reshape(t.core, flat)
    residual = entries.values - forward(core)
    gradient = direction = backward(residual)
    energy = frobenius(gradient) ** 2
    for _ in range(_CORE_STEPS):
        image = forward(direction)
        curvature = frobenius(image) ** 2
        if curvature == 0.0:
            break
        length = energy / curvature
        core, residual = core + length * direction, residual - length * image
        gradient, before = backward(residual), energy
        energy = frobenius(gradient) ** 2
        direction = gradient + (energy / before) * direction
    return Tucker(xp.reshape(core, t.rank), t.factors), frobenius(residual)


def _half_sweep(
    entries: TensorEntries, cores: Sequence[Array], ridge: float
) -> tuple[tuple[Array, ...], float]:
    """Solve for every core of a right-orthogonal train, from the left; and the misfit it leaves."""
    xp = namespace(*cores)
    cores = list(cores)
    ones = xp.ones((entries.size, 1), dtype=cores[0].dtype, device=device(cores[0]))
    # Products of the cores to the right of each bond, and to the left of the present one.
    rights = [ones]
    for k in range(len(cores) - 1, 0, -1):
        slabs = xp.permute_dims(cores[k], (1, 2, 0))
        rights.insert(0, entries.transform(k, rights[0], slabs))
    left = ones
    for k, right in enumerate(rights):
        a, n, b = cores[k].shape

        def design(chosen: np.ndarray, left: Array = left, right: Array = right) -> Array:
            at = xp.asarray(chosen, device=device(left))
            x, y = xp.take(left, at, axis=0), xp.take(right, at, axis=0)
            return xp.reshape(x[:, :, None] * y[:, None, :], (len(chosen), -1))

        current = xp.reshape(xp.permute_dims(cores[k], (1, 0, 2)), (n, a * b))
        fitted, _ = entries.least_squares(k, design, current, ridge)
        core = xp.permute_dims(xp.reshape(fitted, (n, a, b)), (1, 0, 2))
        if k < len(cores) - 1:
            q, r = xp.linalg.qr(tall(core))
            core, cores[k + 1] = xp.reshape(q, (a, n, -1)), times(r, cores[k + 1])
        cores[k] = core
        left = entries.transform(k, left, xp.permute_dims(core, (1, 0, 2)))
    return tuple(cores), frobenius(entries.values - left[:, 0])


def _spectral_tucker(entries: TensorEntries, rng: np.random.Generator) -> Tucker:
    """Leading vectors of all unfoldings, zero where unknown, and the core that fits them."""
    xp, like = namespace(entries.values), entries.values
    values = to_host(like)
    factors = []
    for mode in range(entries.ndim):
        rest = np.delete(np.arange(entries.ndim), mode)
        tails, columns = np.unique(entries.indices[:, rest], axis=0, return_inverse=True)
        rows = entries.indices[:, mode]
        u = _leading(rows, columns, values, (entries.shape[mode], len(tails)), rng)
        factors.append(from_host(u, like, like.dtype))
    core = xp.zeros((1,) * entries.ndim, dtype=like.dtype, device=device(like))
    return _fit_core(entries, Tucker(core, factors))[0]


def _spectral_train(entries: TensorEntries, rng: np.random.Generator) -> TT:
    """TT-SVD of rank one of the entries, zero where unknown, sparse throughout."""
    like, indices = entries.values, entries.indices
    values, cores = to_host(like), []
    for n in entries.shape[:-1]:
        tails, columns = np.unique(indices[:, 1:], axis=0, return_inverse=True)
        columns = columns.ravel()
        u = _leading(indices[:, 0], columns, values, (n, len(tails)), rng)
        cores.append(u[None, :, :])
        # Projected onto u, one value is left for every combination of the indices to come.
        terms = values * u[indices[:, 0], 0].conj()
        order = np.argsort(columns, kind="stable")
        starts = np.searchsorted(columns[order], np.arange(len(tails)))
        indices, values = tails, np.add.reduceat(terms[order], starts)
    last = np.zeros((1, entries.shape[-1], 1), dtype=values.dtype)
    last[0, indices[:, 0], 0] = values
    return TT([from_host(c, like, like.dtype) for c in (*cores, last)])


def _leading(
    rows: np.ndarray,
    columns: np.ndarray,
    values: np.ndarray,
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> np.ndarray:
    """Leading left singular vector of a sparse matrix."""
    from scipy.sparse import csr_array

    sparse = csr_array((values, (rows, columns.ravel())), shape=shape)
    return randomized_svd(sparse, 1, rng=rng).u
