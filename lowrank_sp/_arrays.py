"""Array libraries: namespaces, compute dtypes, host transfers, random draws.

Every other module works through these few functions and the array-API standard.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import array_api_compat as compat
import numpy as np

from lowrank_sp._threads import gram

# Arrays of any library; the standard has no common base class to name.
Array = Any
RNG = int | np.random.Generator | None

_EPS = {
    "float64": 2.0**-52,
    "complex128": 2.0**-52,
    "float32": 2.0**-23,
    "complex64": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
# Entries of which the squares are added at a time.
_RUN = 2**13
# Entries from which a compiled Gram matrix pays.
_LARGE = 2**20
_WIDE = {"float32": "float64", "complex64": "complex128"}
_REAL = {"complex64": "float32", "complex128": "float64"}


def is_array(x: Any) -> bool:
    """Whether ``x`` is an array of a library that follows the standard; Dask does not."""
    return compat.is_array_api_obj(x) and not compat.is_dask_array(x)


def namespace(*arrays: Array) -> Any:
    """Array-API namespace shared by ``arrays``, all of one library and one device."""
    if all(type(a) is np.ndarray for a in arrays):
        return _numpy()
    for a in arrays:
        _check_plain(a)
    try:
        xp = compat.array_namespace(*arrays)
    except TypeError as error:
        kinds = ", ".join(dict.fromkeys(_kind(a) for a in arrays))
        raise TypeError(
            f"arrays must come from one array library, got {kinds}; "
            "convert first, for example with numpy.asarray or torch.as_tensor"
        ) from error
    # Tracers of JAX have no device, and follow those that have one.
    found = [device for device in map(compat.device, arrays) if device is not None]
    devices = list(dict.fromkeys(map(str, found)))
    if len(devices) > 1:
        raise ValueError(
            f"arrays must lie on one device, got {' and '.join(devices)}; move them to one first"
        )
    return xp


def _check_plain(a: Array) -> None:
    """Raise for arrays that hold other numbers than their entries: masked, and sparse ones."""
    if isinstance(a, np.ma.MaskedArray):
        raise TypeError(
            "masked arrays are not computed with, for what is under the mask would count; complete "
            "them as Entries.from_mask(a.data, ~a.mask), or fill them by a.filled()"
        )
    if getattr(a, "is_sparse", False) or getattr(a, "is_sparse_csr", False):
        raise TypeError(
            "sparse tensors are not computed with; make a SciPy matrix of them, or use to_dense()"
        )


@cache
def _numpy() -> Any:
    # Loaded on first use: the wrapper imports all of NumPy's submodules.
    return compat.array_namespace(np.empty(0))


def _kind(a: Any) -> str:
    return f"{type(a).__module__.partition('.')[0]}.{type(a).__name__}"


def device(a: Array) -> Any:
    """Device on which ``a`` lies."""
    return compat.device(a)


def dtype_name(dtype: Any) -> str:
    """Name of a dtype of any library, such as ``"float32"`` or ``"bfloat16"``."""
    if isinstance(dtype, np.dtype):
        return _numpy_name(dtype)
    name = getattr(dtype, "__name__", None)
    return name or str(dtype).rpartition(".")[2]


@cache
def _numpy_name(dtype: np.dtype) -> str:
    return dtype.name


def eps(dtype: Any) -> float:
    """Spacing of a floating dtype at one."""
    return _EPS[dtype_name(dtype)]


def is_inexact(dtype: Any) -> bool:
    """Whether a dtype is floating or complex."""
    return dtype_name(dtype) in _EPS


def is_complex(dtype: Any) -> bool:
    """Whether a dtype is complex."""
    return dtype_name(dtype) in _REAL


def real_dtype(xp: Any, dtype: Any) -> Any:
    """Real dtype of the precision of ``dtype``."""
    return getattr(xp, _REAL[dtype_name(dtype)]) if is_complex(dtype) else dtype


def compute_dtype(xp: Any, dtype: Any) -> Any:
    """Dtype in which to compute on data of ``dtype``: at least float32.

    Half precision becomes float32; integers and booleans become the default float.
    """
    name = dtype_name(dtype)
    if name in _WIDE or name in ("float64", "complex128"):
        return dtype
    if name in ("float16", "bfloat16"):
        return xp.float32
    if name == "bool" or name.startswith(("int", "uint")):
        return xp.asarray(1.0).dtype
    raise TypeError(
        f"dtype must be floating, complex, integer or bool, got {name}; "
        "convert the array to float32 first"
    )


def as_compute(a: Array) -> Array:
    """``a`` in its compute dtype; the same array when it is there already."""
    xp = namespace(a)
    dtype = compute_dtype(xp, a.dtype)
    return a if a.dtype == dtype else xp.astype(a, dtype)


def adjoint(a: Array) -> Array:
    """Conjugate transpose of the last two axes."""
    return namespace(a).conj(a.mT) if is_complex(a.dtype) else a.mT


def across(a: Array) -> bool:
    """Whether ``a`` is an array of NumPy whose columns, not its rows, lie together in memory."""
    return isinstance(a, np.ndarray) and a.ndim > 1 and a.strides[-1] > a.strides[-2]


def scalar(factor: Any, dtype: Any) -> float | complex:
    """A number that multiplies arrays of ``dtype`` without changing it."""
    if is_complex(dtype):
        return complex(factor)
    if isinstance(factor, complex | np.complexfloating):
        raise TypeError(
            f"a {dtype_name(dtype)} matrix cannot be multiplied by the complex number {factor}; "
            "convert its data to a complex dtype first"
        )
    return float(factor)


def detached(a: Array) -> Array:
    """``a`` as a constant, for libraries that differentiate: PyTorch and JAX."""
    if compat.is_torch_array(a):
        return a.detach()
    if compat.is_jax_array(a):
        from jax import lax

        return lax.stop_gradient(a)
    return a


def to_host(a: Array) -> np.ndarray:
    """``a`` as a NumPy array; a view where the library allows one."""
    if isinstance(a, np.ndarray):
        return a
    if compat.is_torch_array(a):
        return a.detach().cpu().resolve_conj().resolve_neg().numpy()
    if compat.is_jax_array(a):
        return np.asarray(a)
    if compat.is_cupy_array(a):
        return a.get()
    return np.from_dlpack(a)


def host_view(a: Array) -> np.ndarray | None:
    """``a`` as a NumPy array without a copy, or None where that cannot be."""
    if isinstance(a, np.ndarray):
        return a
    if compat.is_torch_array(a):
        plain = a.device.type == "cpu" and a.layout.__str__() == "torch.strided"
        plain = plain and not (a.is_conj() or a.is_neg()) and dtype_name(a.dtype) != "bfloat16"
        return a.detach().numpy() if plain else None
    if compat.is_jax_array(a) and device(a).platform == "cpu":
        return np.asarray(a)
    return None


def host_values(a: Array) -> np.ndarray | None:
    """:func:`host_view` of an array of NumPy or PyTorch that nobody traces or differentiates."""
    if isinstance(a, np.ndarray):
        return a
    if not compat.is_torch_array(a) or a.requires_grad:
        return None
    plain = type(a) is sys.modules["torch"].Tensor and not compiling()
    return host_view(a) if plain else None


def compiling() -> bool:
    """Whether ``torch.compile`` is at work, which traces tensors as if they had values."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


@cache
def has_numba() -> bool:
    """Whether numba, which takes a while to load and is not loaded here, is at hand."""
    return find_spec("numba") is not None


def from_host(x: np.ndarray, like: Array, dtype: Any = None) -> Array:
    """NumPy array ``x`` as an array of the library and device of ``like``.

    The dtype is that of ``like``, or its real counterpart when ``x`` is real, unless given.
    """
    xp = namespace(like)
    if dtype is None:
        dtype = like.dtype if np.iscomplexobj(x) else real_dtype(xp, like.dtype)
    if isinstance(like, np.ndarray):
        return x.astype(dtype, copy=False)
    # Cast before the transfer: some devices have no float64. NumPy has no bfloat16.
    name = dtype_name(dtype)
    x = np.ascontiguousarray(x.astype("float32" if name == "bfloat16" else name, copy=False))
    return xp.asarray(x, dtype=dtype, device=device(like), copy=True)


def placed(values: Array, places: Array, size: int) -> Array:
    """A vector of ``size`` entries that has ``values`` at sorted, distinct ``places``, else zeros.

    The standard has no scatter. Libraries that are not known to have one look every place up.
    """
    xp = namespace(values)
    if compat.is_torch_array(values):
        return values.new_zeros(size).index_put((places,), values)
    zeros = xp.zeros(size, dtype=values.dtype, device=device(values))
    if compat.is_jax_array(values):
        return zeros.at[places].set(values)
    if isinstance(values, np.ndarray) or compat.is_cupy_array(values):
        zeros[places] = values
        return zeros
    if places.shape[0] == 0:
        return zeros
    every = xp.arange(size, dtype=places.dtype, device=device(values))
    found = xp.searchsorted(places, every)
    found = xp.where(found < places.shape[0], found, xp.zeros_like(found))
    return xp.where(xp.take(places, found) == every, xp.take(values, found), zeros)


def with_rows_added(total: Array, start: int, rows: Array) -> Array:
    """``total`` with ``rows`` added to its own from ``start`` on; written to where that can be.

    The standard has assignment, but JAX does not.
    """
    where = slice(start, start + rows.shape[0])
    if compat.is_jax_array(total):
        return total.at[where, :].add(rows)
    total[where, :] += rows
    return total


def inner(x: Array, y: Array) -> Array:
    """``x^H y`` of two blocks of columns, accumulated in float64.

    Rows are widened slice by slice, so that no wide copy of a tall block exists. Where the
    library has no float64 (JAX by default, some devices) its own precision is used.
    """
    xp = namespace(x, y)
    wide = wide_dtype(xp, x.dtype)
    compiled = _compiled_gram(x) if y is x else None
    if compiled is not None:
        return from_host(compiled, x, wide)
    if x.dtype == wide:
        return gram(x) if y is x and isinstance(x, np.ndarray) else adjoint(x) @ y
    total = xp.zeros((x.shape[1], y.shape[1]), dtype=wide, device=device(x))
    height = max(256, 2**20 // max(1, x.shape[1]))
    for rows in slices(x.shape[0], height):
        a = xp.astype(x[rows, :], wide)
        b = a if y is x else xp.astype(y[rows, :], wide)
        total += adjoint(a) @ b
    return total


def _compiled_gram(x: Array) -> np.ndarray | None:
    """``x^T x`` compiled, where that pays and numba is at hand."""
    rows, columns = x.shape
    if rows * columns < _LARGE or not 8 <= columns <= 256 or rows < 16 * columns:
        return None
    host = host_values(x)
    if host is None or host.dtype not in (np.float32, np.float64) or not has_numba():
        return None
    if not (host.flags.c_contiguous or host.flags.f_contiguous):
        return None
    from lowrank_sp._compiled.gram import gram as compiled

    tall = host.flags.c_contiguous
    return compiled(host if tall else host.T, tall=tall)


def wide_dtype(xp: Any, dtype: Any) -> Any:
    """Double precision of the kind of ``dtype``, or ``dtype`` where the library has none."""
    name = _WIDE.get(dtype_name(dtype))
    jax_without_x64 = "jax" in xp.__name__ and xp.asarray(1.0).dtype == xp.float32
    return dtype if name is None or jax_without_x64 else getattr(xp, name)


def slices(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of ``step`` entries that cover ``range(length)``."""
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def frobenius(a: Array) -> float:
    """Frobenius norm of ``a``: sums in float64 over slices, safe from overflow."""
    with np.errstate(over="ignore"):
        squares = _sum_squares(a)
    if 1e-30 < squares < 1e30:
        return squares**0.5
    largest = max_abs(a)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    exponent = math.frexp(largest)[1]
    # Two powers, for their product may leave the range.
    powers = 2.0 ** -(exponent // 2), 2.0 ** (exponent // 2 - exponent)
    return _sum_squares(a, powers) ** 0.5 / powers[0] / powers[1]


def max_abs(a: Array) -> float:
    """Largest magnitude of an entry; NaN or infinite when an entry is."""
    if 0 in a.shape:
        return 0.0
    xp = namespace(a)
    size = abs(detached(a))
    # XLA's maximum passes over NaN on CPUs; a sum does not.
    return float(xp.max(size) if xp.all(xp.isfinite(size)) else xp.sum(size))


def power_of_two(a: Array) -> float:
    """A power of two of about the size of ``a``, by which it divides without rounding.

    Products of what remains with each other do not leave the range of the dtype. Of zeros, the
    least power there is.
    """
    least, largest = float(namespace(a).finfo(a.dtype).smallest_normal), max_abs(a)
    return max(2.0 ** (math.frexp(largest)[1] - 1), least) if largest else least


def _sum_squares(a: Array, factors: tuple[float, ...] = ()) -> float:
    if 0 in a.shape:
        return 0.0
    xp = namespace(a)
    a, flat = detached(a), math.prod(a.shape[1:])
    total = 0.0
    for rows in slices(a.shape[0], max(1, 2**20 // flat)):
        block = as_compute(a[rows, ...])
        for factor in factors:
            block = block * factor
        if isinstance(block, np.ndarray) and block.dtype.char in "dD":
            total += _sum_squares_of_doubles(block.reshape(-1))
        else:
            total += float(xp.sum(abs(block) ** 2))
    return total


def _sum_squares_of_doubles(x: np.ndarray) -> float:
    """By runs too short for BLAS to share among threads, and for errors to add up."""
    runs, run = x[: x.size // _RUN * _RUN].reshape(-1, _RUN), x[x.size // _RUN * _RUN :]
    return float(np.vecdot(runs, runs).real.sum() + np.vdot(run, run).real)


def standard_normal(shape: tuple[int, ...], *, like: Array, rng: RNG = None) -> Array:
    """Gaussian draws of unit variance in the compute dtype and on the device of ``like``.

    They are drawn on the host in float64, cast, then moved: one seed gives one sketch on every
    library.
    """
    generator = np.random.default_rng(rng)
    draw = generator.standard_normal(shape)
    dtype = compute_dtype(namespace(like), like.dtype)
    if is_complex(dtype):
        draw = (draw + 1j * generator.standard_normal(shape)) / np.sqrt(2.0)
    return from_host(draw, like, dtype)
