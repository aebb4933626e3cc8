"""Many adapters at once: products of factors, which fit each other or are named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lowrank_sp._arrays import as_compute, dtype_name, namespace
from lowrank_sp.adapters.forms import Form, Product
from lowrank_sp.factors import LowRank


def product_of(adapter: Any, name: str) -> Product:
    """Whatever has ``up``, ``down`` and ``scale``, or is a ``LowRank``, as a product.

    Of other forms, whose factors are not the whole update, the update is asked for. ``name`` is
    that of the adapter in errors.
    """
    kind, hint = type(adapter).__name__, ""
    if isinstance(adapter, Form) and not isinstance(adapter, Product):
        adapter, hint = adapter.delta(), "; convert it by .to_lora(rank).form"
    if isinstance(adapter, LowRank):
        up, down, scale = adapter.left, adapter.right, 1.0
    elif all(hasattr(adapter, part) for part in ("up", "down", "scale")):
        up, down, scale = adapter.up, adapter.down, float(adapter.scale)
    else:
        raise TypeError(f"{name} must have up, down and scale, or be a LowRank, got {kind}{hint}")
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"the factors of {name} must have shapes (m, r) and (r, n), "
            f"got {tuple(up.shape)} and {tuple(down.shape)}"
        )
    if up.dtype != down.dtype:
        raise TypeError(
            f"the factors of {name} must have one dtype, got {dtype_name(up.dtype)} and "
            f"{dtype_name(down.dtype)}; cast one of them first"
        )
    return Product(up, down, scale)


def products_of(
    adapters: Sequence[Any], kind: str, names: Sequence[Any] | None = None, *, widen: bool = True
) -> list[Product]:
    """Products of one dtype and array library, at least one of them.

    Parameters
    ----------
    adapters : sequence
    kind, names
        What an adapter is called in errors, such as ``client 2``; by default by its position.
    widen : bool
        Whether half precision becomes float32.
    """
    names = range(len(adapters)) if names is None else names
    products = [product_of(a, f"{kind} {name}") for a, name in zip(adapters, names, strict=True)]
    if not products:
        raise ValueError(f"at least one {kind} is needed, got none")
    namespace(*[factor for product in products for factor in (product.up, product.down)])
    if widen:
        products = [
            Product(as_compute(product.up), as_compute(product.down), product.scale)
            for product in products
        ]
    dtype = products[0].up.dtype
    for name, product in zip(names, products, strict=True):
        if product.up.dtype != dtype:
            raise TypeError(
                f"all factors must have one dtype, got {dtype_name(dtype)} and, of {kind} "
                f"{name}, {dtype_name(product.up.dtype)}; cast them first"
            )
    return products


def check_alike(
    products: Sequence[Product],
    kind: str,
    properties: Sequence[str],
    names: Sequence[Any] | None = None,
) -> None:
    """Raise where a product differs from the first one in one of ``properties``."""
    names = range(len(products)) if names is None else names
    for what in properties:
        first = getattr(products[0], what)
        for name, product in zip(names, products, strict=True):
            if getattr(product, what) != first:
                raise ValueError(
                    f"all {kind}s must have one {what}, got {first} and, of {kind} {name}, "
                    f"{getattr(product, what)}"
                )
