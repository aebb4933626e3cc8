"""Tucker decomposition of a tensor that passes by once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lowrank_sp._arrays import RNG, Array, as_compute, frobenius, from_host, max_abs, namespace
from lowrank_sp.tensors.factored import moved, on_host
from lowrank_sp.tensors.hosvd import st_hosvd
from lowrank_sp.tensors.modes import multi_mode_dot
from lowrank_sp.tensors.mttkrp import mttkrp
from lowrank_sp.tensors.ranks import Rank, tucker_rank
from lowrank_sp.tensors.tucker import Tucker

# Rows of the test sketch of every mode.
_TESTS = 12


class StreamingTucker:
    r"""Tucker approximation of a tensor whose slices are seen once, in any order.

    Linear sketches are kept: of the range of every mode,
    :math:`X_{(k)} (A_1 \odot \dots \odot A_{k-1} \odot A_{k+1} \dots \odot A_N)` with Gaussian
    :math:`A_j`, of the core, :math:`X \times_1 \Phi_1 \cdots \times_N \Phi_N`, and a small one for
    tests. As they are linear, updates of the same slices add up, and sketches of parts of the data
    can be merged.

    Parameters
    ----------
    shape : sequence of int
        Of the whole tensor, ``(n_1, ..., n_N)``.
    rank : int, sequence of int, or float
        As :func:`~lowrank_sp.tensors.ranks.tucker_rank` reads it.
    rng : int, Generator or None
        Objects to be merged need the same integer here.

    Notes
    -----
    With ``k = 2 r + 1`` and ``s = 2 k + 1`` it keeps ``k sum(n) + s^N`` numbers and spends about
    ``2 (N k + s)`` flops an entry :cite:p:`sun2020low`. Blocks may come from any array library; all
    from one. Where the tensor can be read twice, :func:`~lowrank_sp.tensors.hosvd.st_hosvd` is more
    accurate.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(10.0)[:, None, None] * np.ones((8, 9))
    >>> stream = StreamingTucker(x.shape, rank=1, rng=0)
    >>> for start in (0, 5):
    ...     stream.update(start, x[start : start + 5])
    >>> bool(np.allclose(stream.tucker().to_dense(), x))
    True
    """

    def __init__(self, shape: Sequence[int], rank: Rank, *, rng: RNG = None):
        self.shape = tuple(shape)
        self.rank = tucker_rank(rank, self.shape)
        generator = np.random.default_rng(rng)
        width = 2 * max(self.rank) + 1
        self._ranges = [generator.standard_normal((n, width)) for n in self.shape]
        sizes = [4 * r + 3 for r in self.rank]
        self._cores = [_mixing(s, n, generator) for s, n in zip(sizes, self.shape, strict=True)]
        self._tests = [_mixing(_TESTS, n, generator) for n in self.shape]
        self._sketches: tuple[list[Array], Array, Array] | None = None
        self._like: Array = None

    def update(self, start: int, block: Array) -> None:
        """Add ``block``, of shape ``(slices, n_2, ..., n_N)``, to the slices from ``start`` on."""
        if tuple(block.shape[1:]) != self.shape[1:] or block.ndim != len(self.shape):
            raise ValueError(
                f"a block must have shape (slices, {', '.join(map(str, self.shape[1:]))}), got "
                f"{tuple(block.shape)}"
            )
        stop = start + block.shape[0]
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"slices must lie in 0..{self.shape[0]}, got {start}..{stop}")
        block = as_compute(block)
        if not math.isfinite(max_abs(block)):
            raise ValueError(f"a block must be finite, got NaN or inf in slices {start}..{stop}")
        if self._like is None:
            self._like = block[:0, ...]
        block = on_host(block)
        rows = slice(start, stop)
        ranges, core, test = self._sketches or self._empty(block)
        xp = namespace(block, core)

        def here(matrices: list[np.ndarray]) -> list[Array]:
            return [from_host(m, block, block.dtype) for m in matrices]

        factors = here([self._ranges[0][rows], *self._ranges[1:]])
        images = [mttkrp(block, factors, mode) for mode in range(block.ndim)]
        first = xp.concat(
            [ranges[0][:start, :], ranges[0][rows, :] + images[0], ranges[0][stop:, :]], axis=0
        )
        others = [kept + image for kept, image in zip(ranges[1:], images[1:], strict=True)]
        self._sketches = (
            [first, *others],
            core + multi_mode_dot(block, here([self._cores[0][:, rows], *self._cores[1:]])),
            test + multi_mode_dot(block, here([self._tests[0][:, rows], *self._tests[1:]])),
        )

    def merge(self, other: StreamingTucker) -> None:
        """Add what ``other`` has seen, which must have been made with the same arguments."""
        same = self.shape == other.shape and self.rank == other.rank
        if not same or not np.array_equal(self._ranges[0], other._ranges[0]):
            raise ValueError("sketches to merge need the same shape, rank and integer rng")
        if other._sketches is None:
            return
        if self._sketches is None:
            self._sketches, self._like = other._sketches, other._like
            return
        (ours, core, test), (theirs, core2, test2) = self._sketches, other._sketches
        ranges = [a + b for a, b in zip(ours, theirs, strict=True)]
        self._sketches = (ranges, core + core2, test + test2)

    def tucker(self) -> Tucker:
        """The approximation from what was seen so far.

        ``error`` estimates the Frobenius norm of the difference, from the test sketch.
        """
        if self._sketches is None:
            raise ValueError("nothing was seen yet; call update first")
        ranges, core, test = self._sketches
        xp = namespace(core)
        bases, inverses = [], []
        for image, mix in zip(ranges, self._cores, strict=True):
            q, _ = xp.linalg.qr(image)
            bases.append(q)
            inverses.append(xp.linalg.pinv(from_host(mix, core, core.dtype) @ q))
        inner = st_hosvd(multi_mode_dot(core, inverses), self.rank)
        factors = [q @ u for q, u in zip(bases, inner.factors, strict=True)]
        seen = [
            from_host(t, core, core.dtype) @ u for t, u in zip(self._tests, factors, strict=True)
        ]
        # A mode without mixing is not averaged.
        scale = math.prod(_TESTS if t.shape[0] < t.shape[1] else 1 for t in self._tests) ** 0.5
        error = frobenius(test - multi_mode_dot(inner.core, seen)) / scale
        return moved(Tucker(inner.core, tuple(factors), error), self._like)

    def _empty(self, like: Array) -> tuple[list[Array], Array, Array]:
        shapes = [m.shape for m in self._ranges]
        core, test = (tuple(m.shape[0] for m in ms) for ms in (self._cores, self._tests))
        ranges = [from_host(np.zeros(s), like, like.dtype) for s in shapes]
        zeros = (from_host(np.zeros(s), like, like.dtype) for s in (core, test))
        return ranges, *zeros  # pyright: ignore[reportReturnType]


def _mixing(rows: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian matrix of ``rows`` rows, or the identity where it would not be smaller."""
    return rng.standard_normal((rows, n)) if rows < n else np.eye(n)
