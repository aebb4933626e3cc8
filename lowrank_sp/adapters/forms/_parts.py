"""Dataclasses of named arrays: which of them are trained is said by their types.

A field is annotated with its role and its shape,

.. code-block:: python

    up: Trained[Array, "m r"]
    basis: Fixed[Array, "r n"]
    weight: Weight[Array, "m n"]
    cores: Trained[tuple[Array, ...], "..."]

where one letter stands for one size in all fields. Fields without a role are plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Self, get_type_hints

from lowrank_sp._arrays import Array, dtype_name, namespace


class _Role:
    """What becomes of an array when an adapter is trained and saved."""

    def __class_getitem__(cls, parameters: tuple[Any, str]) -> Any:
        kind, shape = parameters
        return Annotated[kind, cls, shape]


if TYPE_CHECKING:
    from typing import Annotated as Fixed
    from typing import Annotated as Trained
    from typing import Annotated as Weight
else:

    class Trained(_Role):
        """Trained, and saved."""

    class Fixed(_Role):
        """Not trained, but part of the adapter: saved with it."""

    class Weight(_Role):
        """The weight of the layer, where the update depends on it: neither trained nor saved."""


#: Called with every class of parts when it is defined: how bridges learn of all of them.
NEW_CLASSES: list[Callable[[type], None]] = []


def _roles(cls: type) -> dict[str, tuple[type, str]]:
    """``(role, shape)`` of the array fields of a class, in order."""
    # Kept on the class: torch.compile traces through functools.cache.
    found = cls.__dict__.get("_found_roles")
    if found is not None:
        return found
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in fields(cls):
        marks = getattr(hints[field.name], "__metadata__", ())
        if marks and isinstance(marks[0], type) and issubclass(marks[0], _Role):
            found[field.name] = marks[:2]
    type.__setattr__(cls, "_found_roles", found)
    return found


@dataclass(frozen=True)
class Parts:
    """A frozen dataclass of named arrays with roles. Fields that hold tuples count as several."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for tell in NEW_CLASSES:
            tell(cls)

    def __post_init__(self) -> None:
        """Check the shapes that the annotations promise, one array library and one dtype."""
        self.sizes()
        arrays = self.arrays()
        namespace(*arrays.values())
        dtypes = {name: dtype_name(a.dtype) for name, a in arrays.items() if _is_data(a)}
        if len(set(dtypes.values())) > 1:
            found = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
            raise TypeError(f"arrays of {type(self).__name__} must have one dtype, got {found}")

    def sizes(self) -> dict[str, int]:
        """The size that each letter of the annotations stands for."""
        known: dict[str, tuple[int, str]] = {}
        for name, (_, letters) in _roles(type(self)).items():
            value = getattr(self, name)
            if value is None or isinstance(value, tuple) or letters == "...":
                continue
            if not hasattr(value, "shape"):
                raise TypeError(
                    f"{name} of {type(self).__name__} must be an array, got {type(value).__name__}"
                )
            wanted, shape = letters.split(), tuple(value.shape)
            if len(shape) != len(wanted):
                raise ValueError(
                    f"{name} of {type(self).__name__} must have shape ({', '.join(wanted)}), "
                    f"got {shape}"
                )
            for letter, size in zip(wanted, shape, strict=True):
                if letter.isdigit():
                    expected, where = int(letter), "its definition"
                else:
                    expected, where = known.setdefault(letter, (size, name))
                if size != expected:
                    raise ValueError(
                        f"{name} of {type(self).__name__} must have shape ({', '.join(wanted)}) "
                        f"with {letter} = {expected} as in {where}, got {shape}"
                    )
        return {letter: size for letter, (size, _) in known.items()}

    def arrays(self, *roles: Any) -> dict[str, Array]:
        """Arrays by name, of the roles given or of all; ``cores.0``, ``cores.1`` for a tuple."""
        return {
            name: a
            for field, (role, _) in _roles(type(self)).items()
            if not roles or role in roles
            for name, a in _named(field, getattr(self, field))
        }

    def parameters(self) -> dict[str, Array]:
        """The trained arrays by name."""
        return self.arrays(Trained)

    def replace(self, arrays: Mapping[str, Array]) -> Self:
        """The same with other arrays in the places named, which are not checked.

        It is what a training step calls, with parameters of PyTorch or tracers of JAX.
        """
        values = dict(self.__dict__)
        unknown = set(arrays)
        for field in _roles(type(self)):
            old = values[field]
            if isinstance(old, tuple):
                names = [f"{field}.{i}" for i in range(len(old))]
                values[field] = tuple(
                    arrays.get(name, a) for name, a in zip(names, old, strict=True)
                )
                unknown.difference_update(names)
            elif field in arrays:
                values[field] = arrays[field]
                unknown.discard(field)
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has the arrays {', '.join(self.arrays())}, "
                f"got {', '.join(sorted(unknown))}"
            )
        return self.assembled(values)

    @classmethod
    def assembled(cls, values: Mapping[str, Any]) -> Self:
        """An instance with these values of its fields, which are not checked."""
        new = object.__new__(cls)
        new.__dict__.update(values)
        return new

    @classmethod
    def roles(cls) -> dict[str, type]:
        """The role of every field that holds arrays, in order."""
        return {field: role for field, (role, _) in _roles(cls).items()}

    @property
    def num_trainable(self) -> int:
        """Number of trained numbers."""
        return sum(math.prod(a.shape) for a in self.parameters().values())

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{name} {' x '.join(map(str, a.shape))}" for name, a in self.arrays().items()
        )
        return f"{type(self).__name__}({shapes})"


def _named(field: str, value: Any) -> Iterator[tuple[str, Array]]:
    if isinstance(value, tuple):
        yield from ((f"{field}.{i}", a) for i, a in enumerate(value))
    elif value is not None:
        yield field, value


def _is_data(a: Array) -> bool:
    """Whether an array holds values rather than places."""
    return not dtype_name(a.dtype).startswith(("int", "uint", "bool"))
