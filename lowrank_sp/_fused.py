"""Compiled products ``y = W p, z = W^T y`` with one read of ``W`` from memory (needs numba).

Rows of ``W`` are taken in groups that fit in the L2 cache. A group is first multiplied by ``p``
and, once its rows of ``y`` are complete, added into ``z`` while it is still in the cache. Columns
are walked in panels, so that the panels of ``p`` and ``z`` stay in L1. Both passes run the same
register tile of 3 rows by 4 columns of 32-byte vectors, which :func:`_tile` writes in LLVM vector
code: a compiler left alone reaches half of its speed. docs/benchmarks.md has the measurements.
"""
# pyright: basic, reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from threading import Lock

import numba as nb
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from threadpoolctl import ThreadpoolController

ROWS, COLS = 3, 4  # register tile: 12 accumulators + 3 rows + 1 column = 16 ymm
VEC = 32  # bytes in a vector
LINE = 64  # bytes a row advances per loop step (one cache line, two vectors)
GROUP_BYTES = 300_000  # rows of W kept in L2 between the two passes
MAX_BLOCK = 16  # wider blocks go to BLAS
# The product uses all threads, so calls take turns; some threading layers demand it.
_LOCK = Lock()
FORWARD, ADJOINT = 0, 1  # which product a tile does
NONE, L2, L1 = 0, 2, 3  # where a tile prefetches `ahead` to


@intrinsic(prefer_literal=True)
def _tile(typingctx, adjoint, prefetch, like, w, ld, pz, y, lines, ahead):
    """One tile over `lines` cache lines of ROWS rows of W; w, pz, y, ahead are addresses, ld bytes.

    forward: y[r][c][:] += W[r] * pz[c]     (vector partial sums)
    adjoint: pz[c] += sum_r W[r] * y[r][c]  (scalars)
    `prefetch` is the cache that gets the same lines of the ROWS rows at `ahead`, if any.
    """
    if not all(isinstance(x, types.IntegerLiteral) for x in (adjoint, prefetch)):
        return None
    sig = types.void(adjoint, prefetch, like, *[types.intp] * 6)

    def codegen(context, b, signature, args):
        w, ld, pz, y, lines, ahead = args[3:]
        size = like.dtype.bitwidth // 8
        elem = ir.FloatType() if size == 4 else ir.DoubleType()
        vec = ir.VectorType(elem, VEC // size)
        i8p, i32, i64 = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(64)
        back = adjoint.literal_value

        def at(base, offset, typ=vec):
            return b.inttoptr(b.add(base, ir.Constant(i64, offset)), typ.as_pointer())

        def load(ptr):
            x = b.load(ptr)
            x.align = size
            return x

        def store(x, ptr):
            b.store(x, ptr).align = size

        def splat(ptr):
            x = b.insert_element(ir.Constant(vec, ir.Undefined), load(ptr), i32(0))
            zeros = ir.Constant(ir.VectorType(i32, vec.count), None)
            return b.shuffle_vector(x, ir.Constant(vec, ir.Undefined), zeros)

        def fma(x, q, acc):
            return b.fadd(acc, b.fmul(x, q, flags=("contract",)), flags=("contract",))

        def fetch(ptr, locality):
            fn = ir.FunctionType(ir.VoidType(), [i8p, i32, i32, i32])
            fn = cgutils.get_or_insert_function(b.module, fn, "llvm.prefetch.p0")
            b.call(fn, [ptr, i32(0), i32(locality), i32(1)])

        tile = [(r, c) for r in range(ROWS) for c in range(COLS)]
        if back:
            coef = {rc: splat(at(y, k * size, elem)) for k, rc in enumerate(tile)}
        else:
            acc = {rc: cgutils.alloca_once(b, vec) for rc in tile}
            for k, rc in enumerate(tile):
                b.store(load(at(y, k * VEC)), acc[rc])
        step = [b.mul(ld, ir.Constant(i64, r)) for r in range(ROWS)]
        with cgutils.for_range(b, lines) as loop:
            along = b.mul(loop.index, ir.Constant(i64, LINE))
            pzi = b.add(pz, b.mul(along, ir.Constant(i64, COLS)))
            rows = [b.add(b.add(w, s), along) for s in step]
            if prefetch.literal_value:
                for s in step:
                    fetch(
                        at(b.add(b.add(ahead, s), along), 0, ir.IntType(8)), prefetch.literal_value
                    )
            for half in range(LINE // VEC):
                x = [load(at(row, half * VEC)) for row in rows]
                for c in range(COLS):
                    ptr = at(pzi, (half * COLS + c) * VEC)
                    q = load(ptr)
                    for r in range(ROWS):
                        if back:
                            q = fma(x[r], coef[r, c], q)
                        else:
                            b.store(fma(x[r], q, b.load(acc[r, c])), acc[r, c])
                    if back:
                        store(q, ptr)
        if not back:
            for k, rc in enumerate(tile):
                store(b.load(acc[rc]), at(y, k * VEC))
        return context.get_dummy_value()

    return sig, codegen


@nb.njit(error_model="numpy")
def _part(w, ld, width, edge, packed, y, sums, first, last, forward):
    """Row tiles [first, last): their rows of y = W P, and sums = their share of W.T y, packed.

    `w` is an address, `ld` a row stride in bytes, `width` the bytes of a row in whole cache lines;
    `edge` holds the columns after those, zero padded to one line (no rows when there are none).
    Without `forward`, y is given and P not used.
    """
    blocks, vecs, _, lanes = packed.shape
    m, b = y.shape
    slab = vecs * COLS * VEC  # bytes of one column block of P or Z
    panel = 2048 if blocks == 1 else 1024  # bytes of a row of W per panel
    panels = (width + panel - 1) // panel
    group = min(16, max(1, GROUP_BYTES // (ROWS * (width + LINE))))
    part = np.empty((group, blocks, ROWS, COLS, lanes), packed.dtype)
    coef = np.empty((group, blocks, ROWS, COLS), packed.dtype)
    tpart, tcoef = ROWS * COLS * VEC, ROWS * COLS * packed.itemsize
    pack, out, pp, pc = packed.ctypes.data, sums.ctypes.data, part.ctypes.data, coef.ctypes.data
    sums[:] = 0
    for k0 in range(first, last, group):
        k1 = min(last, k0 + group)
        part[:] = 0
        for q in range((panels + (len(edge) > 0)) * forward):
            j = min(q * panel, width)
            base, step, lines = w + j, ld, (min(width, j + panel) - j) // LINE
            if j == width:
                base, step, lines = edge.ctypes.data, LINE, 1
            for k in range(k0, k1):
                row = base + min(k * ROWS, m - ROWS) * step
                ahead = row + ROWS * step if k + 1 < k1 else base + k0 * ROWS * step + panel
                acc = pp + (k - k0) * blocks * tpart
                _tile(FORWARD, L1, packed, row, step, pack + j * COLS, acc, lines, ahead)
                for g in range(1, blocks):
                    shift = g * slab + j * COLS
                    acc += tpart
                    _tile(FORWARD, NONE, packed, row, step, pack + shift, acc, lines, 0)
        for k in range(k0, k1):
            for r in range(ROWS):
                i = min(k * ROWS, m - ROWS) + r
                for c in range(blocks * COLS):
                    v = packed.dtype.type(0)
                    if i >= k * ROWS and c < b:  # the last tile may repeat rows: count them once
                        if forward:
                            for e in range(lanes):
                                v += part[k - k0, c // COLS, r, c % COLS, e]
                            y[i, c] = v
                        v = y[i, c]
                    coef[k - k0, c // COLS, r, c % COLS] = v
        for q in range(panels + (len(edge) > 0)):
            j = min(q * panel, width)
            base, step, lines = w + j, ld, (min(width, j + panel) - j) // LINE
            if j == width:
                base, step, lines = edge.ctypes.data, LINE, 1
            for k in range(k0, k1):
                row = base + min(k * ROWS, m - ROWS) * step
                ahead = row + group * ROWS * step  # the next group: memory to L2
                yk = pc + (k - k0) * blocks * tcoef
                _tile(ADJOINT, L2, packed, row, step, out + j * COLS, yk, lines, ahead)
                for g in range(1, blocks):
                    shift = g * slab + j * COLS
                    yk += tcoef
                    _tile(ADJOINT, NONE, packed, row, step, out + shift, yk, lines, 0)


@nb.njit(error_model="numpy")
def _pack(p, packed):
    lanes = packed.shape[3]
    for j in range(p.shape[0]):
        for c in range(p.shape[1]):
            packed[c // COLS, j // lanes, c % COLS, j % lanes] = p[j, c]


@nb.njit(error_model="numpy")
def _unpack(sums, z):
    lanes = sums.shape[4]
    for j in range(z.shape[0]):
        for c in range(z.shape[1]):
            v = sums[0, c // COLS, j // lanes, c % COLS, j % lanes]
            for t in range(1, sums.shape[0]):  # fixed order: same bits every run
                v += sums[t, c // COLS, j // lanes, c % COLS, j % lanes]
            z[j, c] = v


@nb.njit(parallel=True, nogil=True, cache=True, error_model="numpy")
def _fused(w, ld, width, edge, p, packed, y, sums, z, forward):
    _pack(p, packed)
    parts, tiles = len(sums), (len(y) + ROWS - 1) // ROWS
    for t in nb.prange(parts):
        first, last = tiles * t // parts, tiles * (t + 1) // parts
        _part(w, ld, width, edge, packed, y, sums[t], first, last, forward)
    _unpack(sums, z)


def normal(w: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(w @ p, w.T @ w @ p)``.

    Parameters
    ----------
    w : array, shape (m, n)
        Real, contiguous along its rows, with at least 3 rows of at least 64 bytes.
    p : array, shape (n, b), of the dtype of ``w``
        With ``1 <= b <= 16``; the cost is that of the next multiple of 4.

    Notes
    -----
    Partial sums are added in a fixed order: the same threads give the same bits.
    """
    y = np.empty((w.shape[0], p.shape[1]), w.dtype)
    return y, _run(w, p, y, forward=True)


def rmatmul(w: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``w.T @ y`` for ``y`` of shape ``(m, b)``, under the same conditions as :func:`normal`."""
    return _run(w, y[:0], y, forward=False)


def _run(w: np.ndarray, p: np.ndarray, y: np.ndarray, *, forward: bool) -> np.ndarray:
    (m, n), b = w.shape, y.shape[1]
    p, y = np.ascontiguousarray(p), np.ascontiguousarray(y)
    lanes, per_line = VEC // w.itemsize, LINE // w.itemsize
    whole = n // per_line * per_line
    edge = np.zeros((m if whole < n else 0, per_line), w.dtype)
    edge[:, : n - whole] = w[: len(edge), whole:]
    shape = (-(-b // COLS), -(-n // per_line) * per_line // lanes, COLS, lanes)
    packed = np.zeros(shape, w.dtype)
    sums = np.empty((nb.get_num_threads(), *shape), w.dtype)
    z = np.empty((n, b), w.dtype)
    address, width = w.ctypes.data, whole * w.itemsize
    with _LOCK:
        _fused(address, w.strides[0], width, edge, p, packed, y, sums, z, forward)
    return z


def _start_threads() -> None:
    """Start the threads of numba, and leave the number of OpenMP's threads as it was.

    The OpenMP layer of numba sets it to all cores as it starts, whatever ``OMP_NUM_THREADS`` says,
    and PyTorch, imported after that, would take it from there.
    """
    with suppress(ImportError):  # there is no such layer everywhere
        import_module("numba.np.ufunc.omppool")
    before = ThreadpoolController().limit()
    nb.get_num_threads()
    before.restore_original_limits()


_start_threads()
