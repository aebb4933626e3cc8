"""JAX: forms and factorizations as pytrees, and what of them is trained.

Importing this module registers with JAX every form, those that are defined later too, the low-rank
and the quantized matrices, and banks of adapters. Their arrays are leaves, trained or not; numbers
and shapes are part of the structure, so that a function is compiled anew where they differ. Checks
are for values that people make: a tree of tracers, gradients or axes is put together without them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import jax

from lowrank_sp._arrays import Array
from lowrank_sp.adapters.forms import Parts
from lowrank_sp.adapters.forms._parts import NEW_CLASSES
from lowrank_sp.adapters.quantize import Quantized
from lowrank_sp.adapters.serving import AdapterBank
from lowrank_sp.factors import SVD, LowRank


def trained(tree: Any) -> Any:
    """The trained arrays of all forms in a tree: what to differentiate, and to optimize.

    Parameters
    ----------
    tree : pytree
        Of forms; a single form is one.

    Returns
    -------
    pytree
        The same tree with a dict of arrays by name in place of every form, and None in place of
        all else.

    Examples
    --------
    >>> import jax
    >>> from lowrank_sp.adapters import forms
    >>> layers = {"q": forms.FixedDown.create(jax.numpy.ones((4, 3)), rank=2, rng=0)}
    >>> parameters = trained(layers)
    >>> jax.tree.map(lambda a: a.shape, parameters)
    {'q': {'up': (4, 2)}}
    >>> def loss(parameters):
    ...     layer = with_trained(layers, parameters)["q"]
    ...     return ((layer.apply(jax.numpy.ones((5, 3))) - 1) ** 2).sum()
    >>> gradient = jax.jit(jax.grad(loss))(parameters)
    >>> moved = jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradient)
    >>> bool(loss(moved) < loss(parameters))
    True
    """
    return jax.tree.map(
        lambda leaf: leaf.parameters() if isinstance(leaf, Parts) else None, tree, is_leaf=_is_parts
    )


def with_trained(tree: Any, parameters: Any) -> Any:
    """A tree with other trained arrays in its forms.

    Parameters
    ----------
    tree : pytree
        Of forms.
    parameters : pytree
        As :func:`trained` gives for ``tree``.

    Returns
    -------
    pytree
        As ``tree``.
    """
    return jax.tree.map(
        lambda leaf, arrays: leaf.replace(arrays) if isinstance(leaf, Parts) else leaf,
        tree,
        parameters,
        is_leaf=_is_parts,
    )


def _is_parts(x: Any) -> bool:
    return isinstance(x, Parts)


def _register_parts(cls: type[Parts]) -> None:
    def flatten(form: Parts) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        roles = cls.roles()
        static = tuple((name, value) for name, value in vars(form).items() if name not in roles)
        return tuple(getattr(form, field) for field in roles), static

    def flatten_with_keys(form: Parts) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, static = flatten(form)
        keys = [jax.tree_util.GetAttrKey(field) for field in cls.roles()]
        return tuple(zip(keys, children, strict=True)), static

    def unflatten(static: tuple[Any, ...], children: Iterable[Any]) -> Parts:
        return cls.assembled(dict(zip(cls.roles(), children, strict=True)) | dict(static))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


def _register_value(cls: type, static: tuple[str, ...] = ()) -> None:
    """Register a frozen dataclass of arrays, and of fields that belong to the structure."""
    names = [field.name for field in fields(cls) if field.name not in static]

    def flatten(value: Any) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
        arrays = tuple(getattr(value, name) for name in names)
        return arrays, tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        arrays, rest = flatten(value)
        keys = [jax.tree_util.GetAttrKey(name) for name in names]
        return tuple(zip(keys, arrays, strict=True)), rest

    def unflatten(rest: tuple[Any, ...], arrays: Iterable[Array]) -> Any:
        value: Any = object.__new__(cls)
        value.__dict__.update(zip([*names, *static], [*arrays, *rest], strict=True))
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


def _below(cls: type[Parts]) -> dict[type[Parts], None]:
    """All classes derived from one, each once."""
    found: dict[type[Parts], None] = {}
    for derived in cls.__subclasses__():
        found |= {derived: None, **_below(derived)}
    return found


_register_value(LowRank)
_register_value(SVD)
_register_value(Quantized, ("columns", "block", "bits"))
_register_value(AdapterBank, ("ranks", "scales", "names"))
for _form in _below(Parts):
    _register_parts(_form)
NEW_CLASSES.append(_register_parts)
