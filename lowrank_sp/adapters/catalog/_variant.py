"""What a published variant consists of: a form, where it starts, how it is scaled and trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from lowrank_sp._arrays import RNG, Array
from lowrank_sp.adapters.forms import Form, LayeredForm, LayerGrid, Product, Start
from lowrank_sp.adapters.initializers import Initialization, QuantizedInitialization
from lowrank_sp.updates import Rule
from lowrank_sp.updates.rule import rounded


class Axis(StrEnum):
    """The chapters of the catalog: where a variant departs from plain LoRA."""

    FACTORS = "factors"
    START = "start"
    RANK = "rank"
    LAYERS = "layers"
    RULE = "rule"


class Scale(StrEnum):
    """How ``alpha`` and the rank make the scale of an update."""

    OVER_RANK = "alpha / r"
    OVER_ROOT = "alpha / sqrt(r)"
    DIRECT = "alpha"
    NONE = "1"

    def of(self, alpha: float, rank: int) -> float:
        """The scale."""
        return alpha / {"alpha / r": rank, "alpha / sqrt(r)": rank**0.5}.get(self, 1)


class LayeredStart(NamedTuple):
    """A form of many layers, and the base weights that belong to it."""

    form: LayeredForm
    weights: Sequence[Array]


@dataclass(frozen=True)
class Variant:
    """One row of the catalog.

    Attributes
    ----------
    name : str
    axis : Axis
        Where it differs from plain LoRA.
    reference : str
        Key in the bibliography.
    formula : str
        The update of a weight, in LaTeX.
    create : callable
        ``create(weight, rank, ...)``, or ``create(weights, rank, ...)`` where layers share arrays.
        It gives a form, or what has one: a start, an initialization.
    trainable, rank_bound : str
        Number of trained numbers and largest rank of an update of one weight ``(m, n)``: Python
        expressions in ``m, n, r``, the options, and ``L`` layers where they share arrays.
    scale : Scale
    options : dict
        Further arguments of ``create``.
    needs : str or None
        The data that ``create`` needs beside the weight: the argument of that name of
        :meth:`start`.
    rule : Rule or None
        The update rule that is part of the method; None for any optimizer.
    peft : str or None
        The configuration in PEFT that makes the same update; None where there is none.
    axes : tuple of str
        What the axes of the ``grid`` mean that the method places its weights on; empty for methods
        that number their weights.
    """

    name: str
    axis: Axis
    reference: str
    formula: str
    create: Callable[..., Any]
    trainable: str
    rank_bound: str
    scale: Scale = Scale.OVER_RANK
    options: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    rule: Rule | None = None
    peft: str | None = None
    axes: tuple[str, ...] = ()

    @property
    def layered(self) -> bool:
        """Whether it describes many layers at once."""
        return self.takes("weights")

    def takes(self, name: str) -> bool:
        """Whether ``create`` has an argument of that name."""
        return name in inspect.signature(self.create).parameters

    def start(
        self,
        weight: Any,
        rank: int | None = None,
        *,
        alpha: float | None = None,
        rng: RNG = None,
        components: Any = None,
        second_moment: Any = None,
        gradient: Any = None,
        grid: LayerGrid | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Start | LayeredStart:
        """The form at its published start, and the base weight that belongs to it.

        Parameters
        ----------
        weight : array, shape (m, n), or a sequence of them for a :attr:`layered` variant
        rank : int, optional
            Needed by all variants but those whose size the weight determines.
        alpha : float, optional
            By default what makes the scale 1, or what the method prescribes.
        rng : int, Generator or None
        components, second_moment, gradient : array, optional
            Of the layer: the one that :attr:`needs` names, as
            :mod:`~lowrank_sp.adapters.statistics` gathers it.
        grid : LayerGrid, optional
            Where the weights stand on the :attr:`axes`, if there are any.
        options : mapping, optional
            Other values of :attr:`options`.

        Raises
        ------
        ValueError
            If an argument is given to a variant that has no use for it, or not given to one that
            cannot do without.
        TypeError
            If a layered variant is given one weight, or another one several.

        Examples
        --------
        >>> import numpy as np
        >>> from lowrank_sp.adapters.catalog import CATALOG
        >>> weight = np.random.default_rng(0).standard_normal((8, 6))
        >>> form, base = CATALOG["DoRA"].start(weight, 2, rng=0)
        >>> form
        RowMagnitude(weight 8 x 6, up 8 x 2, down 2 x 6, magnitude 8)
        >>> CATALOG["KRAdapter"].start(weight, 2)
        Traceback (most recent call last):
        ...
        ValueError: KRAdapter has no use for rank, got 2; leave it out
        """
        self._check_weight(weight)
        if unknown := sorted(set(options or {}) - set(self.options)):
            raise ValueError(
                f"{self.name} has the options {', '.join(self.options) or 'none'}, "
                f"got {', '.join(unknown)}"
            )
        arguments = self.options | dict(options or {})
        self._add(arguments, "rank", rank, wanted=self.takes("rank"))
        if alpha is not None:
            self._add(arguments, "alpha", alpha, wanted=self.scale is not Scale.NONE)
            scale = self.scale.of(arguments.pop("alpha"), rank or 1)
            arguments |= {"alpha": scale * (rank or 1)} if self.takes("alpha") else {"scale": scale}
        known = {"components": components, "second_moment": second_moment, "gradient": gradient}
        for name, value in known.items():
            self._add(arguments, name, value, wanted=name == self.needs)
        if self.axes or grid is not None:
            self._add(arguments, "grid", grid, wanted=self.takes("grid"))
        if self.takes("rng"):
            arguments["rng"] = rng
        return _as_start(self.create(weight, **arguments), weight)

    def _check_weight(self, weight: Any) -> None:
        """Raise where one weight is given instead of many, or many instead of one."""
        shape = isinstance(weight, tuple) and all(isinstance(size, int) for size in weight)
        one = shape or not isinstance(weight, Sequence)
        if one and self.layered:
            raise TypeError(
                f"{self.name} makes one form of many layers: give it a sequence of weights, "
                f"or [weight] for a single one, got {'a shape' if shape else 'one weight'}"
            )
        if not one and not self.layered:
            raise TypeError(
                f"{self.name} makes a form of one weight, got a {type(weight).__name__} of "
                f"{len(weight)}; start it for each of them"
            )

    def _add(self, arguments: dict[str, Any], name: str, value: Any, *, wanted: bool) -> None:
        if wanted and value is None:
            axes = f" with the axes {', '.join(self.axes)}" if name == "grid" else ""
            raise ValueError(f"{self.name} needs {name}{axes}")
        if not wanted and value is not None:
            raise ValueError(f"{self.name} has no use for {name}, got {value}; leave it out")
        if wanted:
            arguments[name] = value


def _as_start(made: Any, weight: Any) -> Start | LayeredStart:
    if isinstance(made, Start):
        return made
    if isinstance(made, Form):
        return Start(made, weight)
    if isinstance(made, LayeredForm):
        return LayeredStart(made, weight)
    assert isinstance(made, Initialization | QuantizedInitialization)
    product = Product(made.up, made.down, made.scale)
    if isinstance(made, Initialization):
        return Start(product, made.residual)
    # Decoded in single precision; a layer wants its base in the dtype of its weight.
    return Start(product, rounded(made.base.to_dense(), weight))
