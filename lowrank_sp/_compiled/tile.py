"""The register tile of all compiled products, in LLVM vector code (needs numba).

Three rows by four columns of 32-byte vectors: a compiler left alone reaches half of its speed.
docs/benchmarks.md has the measurements.
"""
# pyright: basic, reportPossiblyUnboundVariable=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from threading import Lock
from typing import Any

import numba as nb
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from threadpoolctl import ThreadpoolController

ROWS, COLS = 3, 4  # register tile: 12 accumulators + 3 rows + 1 column = 16 ymm
VEC = 32  # bytes in a vector
LINE = 64  # bytes a row advances per loop step (one cache line, two vectors)
FORWARD, ADJOINT = 0, 1  # which product a tile does
NONE, L2, L1 = 0, 2, 3  # where a tile prefetches `ahead` to
#: Calls that use the threads of numba take turns; some threading layers demand it.
TURN = Lock()


def jit(kernel: Callable) -> Any:
    """Compile a kernel that runs without the interpreter's lock, and adds up in the order given."""
    return nb.njit(nogil=True, cache=True, error_model="numpy")(kernel)


@intrinsic(prefer_literal=True)
def tile(typingctx, adjoint, prefetch, like, w, ld, pz, next_vector, next_column, y, lines, ahead):
    """One tile over `lines` cache lines of ROWS rows of W and COLS columns.

    forward: y[r][c][:] += W[r] * pz[c]     (vector partial sums)
    adjoint: pz[c] += sum_r W[r] * y[r][c]  (scalars)
    `w`, `pz`, `y` and `ahead` are addresses; `ld`, `next_vector` and `next_column` count bytes
    between rows of W, and between vectors and columns of pz. `prefetch` is the cache that gets the
    same lines of the ROWS rows at `ahead`, if any.
    """
    if not all(isinstance(x, types.IntegerLiteral) for x in (adjoint, prefetch)):
        return None
    sig = types.void(adjoint, prefetch, like, *[types.intp] * 8)

    def codegen(context, b, signature, args):
        w, ld, pz, next_vector, next_column, y, lines, ahead = args[3:]
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
            vectors = b.mul(loop.index, ir.Constant(i64, LINE // VEC))
            rows = [b.add(b.add(w, s), along) for s in step]
            if prefetch.literal_value:
                for s in step:
                    fetch(
                        at(b.add(b.add(ahead, s), along), 0, ir.IntType(8)), prefetch.literal_value
                    )
            for half in range(LINE // VEC):
                x = [load(at(row, half * VEC)) for row in rows]
                vector = b.add(pz, b.mul(b.add(vectors, ir.Constant(i64, half)), next_vector))
                for c in range(COLS):
                    ptr = at(b.add(vector, b.mul(next_column, ir.Constant(i64, c))), 0)
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
