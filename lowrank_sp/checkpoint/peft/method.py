"""A row of the grammar of PEFT's files: one method, its keys, and its form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_sp.adapters.forms import Form
from lowrank_sp.checkpoint.peft.config import Config
from lowrank_sp.checkpoint.peft.parts import Arrays, Found, Place


def always(config: Config) -> bool:  # noqa: ARG001
    """That there is one method of this type."""
    return True


@dataclass(frozen=True)
class Method:
    """A row of the grammar.

    Attributes
    ----------
    peft_type, title : str
        As the configuration names it, and as errors do.
    form : type
        The form of its layers, itself and no subclass.
    layouts : tuple of tuples of str
        Sets of ends of keys that a layer may have.
    load : callable
        From what a file holds of a layer to its form.
    save : callable
        From a form and its place to arrays by end of their keys.
    configure : callable
        From all forms to the part of the configuration that depends on them.
    chosen : callable
        Whether a configuration of ``peft_type`` means this row.
    shared : tuple of str
        Expressions for the keys of what belongs to the whole model.
    share : callable, optional
        From all forms to the arrays of those keys.
    position : callable, optional
        Where a layer stands in the model, for methods that number layers.
    needs_model : bool
        Whether nothing can be read without the base model.
    by_value : bool
        Whether ``load`` looks at values, so that shapes alone do not do.
    ignored : tuple of str
        Ends of keys that layers may have beside a layout.
    conv1d : bool
        Whether PEFT has it for weights that are stored inputs by outputs.
    places : tuple of str
        Ends of keys whose tensors hold integers.
    remedy : str
        What errors say to do about a file without layers.
    """

    peft_type: str
    title: str
    form: type[Form]
    layouts: tuple[tuple[str, ...], ...]
    load: Callable[[Found], Form]
    save: Callable[[Any, Place], Arrays]
    configure: Callable[[Mapping[str, Any]], dict[str, Any]]
    chosen: Callable[[Config], bool] = always
    shared: tuple[str, ...] = ()
    share: Callable[[Mapping[str, Any]], Arrays] | None = None
    position: Callable[[Found], int] | None = None
    needs_model: bool = False
    by_value: bool = False
    ignored: tuple[str, ...] = ()
    conv1d: bool = True
    places: tuple[str, ...] = ()
    remedy: str = ""
