"""What is attached to a model: looked at, saved, merged, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_sp.adapters.forms import Form, LayeredForm
from lowrank_sp.torch.layers import (
    is_convolution,
    is_plain,
    is_transposed,
    matrix_of,
    write_weight,
)
from lowrank_sp.torch.modules import Adapted, Arrays, Pool, Shared

#: The attribute of a model that holds what its layers share.
SHARED = "shared_adapters"


def detach(model: nn.Module) -> dict[str, Form]:
    """Take all adapters out of a model.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place: every layer that had been replaced is back, with the same parameters, and
        requires the gradients that it did. Where a start has moved the weight, it stays moved,
        since it is the weight that the form belongs to; :func:`merge_` gives the sum of both.

    Returns
    -------
    dict from name to Form
        As :func:`forms_of`, of the arrays themselves.

    Raises
    ------
    ValueError
        If the model has no adapter.
    """
    forms = {name: layer.form() for name, layer in layers_of(model).items()}
    _remove(model)
    return forms


@torch.no_grad()
def merge_(model: nn.Module) -> nn.Module:
    """Add every update to its weight, in place, and take the adapters out.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The model, of its own modules only. Outputs change by the rounding of the weights.

    Raises
    ------
    ValueError
        If the model has no adapter; if a layer is quantized, or shares its weight with another,
        which it is then named with. Nothing is merged then.
    """
    layers = layers_of(model)
    for name, layer in layers.items():
        check_movable(model, name, layer.base)
    for layer in layers.values():
        write_weight(layer.base, layer.form().merge(matrix_of(layer.base)))
    _remove(model)
    return model


def forms_of(model: nn.Module) -> dict[str, Form]:
    """The forms that are attached, as they are now.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict from name to Form
        Of the parameters and buffers themselves, not of copies. Of a form of many layers every
        layer has its share.

    Raises
    ------
    ValueError
        If the model has no adapter.
    """
    return {name: layer.form() for name, layer in layers_of(model).items()}


def layered_forms_of(model: nn.Module) -> dict[tuple[str, ...], LayeredForm]:
    """The forms of many layers that are attached, under the names of their layers.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict from tuple of str to LayeredForm
        What :func:`~lowrank_sp.torch.attaching.attach_forms` takes; empty where every layer has a
        form of its own.
    """
    groups: dict[Arrays[Any], dict[int, str]] = {}
    for name, layer in layers_of(model).items():
        if layer.index is not None:
            groups.setdefault(layer.arrays, {})[layer.index] = name
    return {
        tuple(names[index] for index in sorted(names)): arrays.form(None, None)
        for arrays, names in groups.items()
    }


def layout(model: nn.Module) -> dict[str, Any]:
    """How adapted layers store their weights: what a file must say beside the forms.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict from str to object
        ``embeddings``, ``kernels`` and ``fan_in_fan_out`` of
        :class:`~lowrank_sp.checkpoint.Adapter`, so that
        ``Adapter(forms_of(model), **layout(model))`` can be written as a file of PEFT.

    Examples
    --------
    >>> from functools import partial
    >>> import torch
    >>> from lowrank_sp.adapters import forms
    >>> from lowrank_sp.torch import attach
    >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Conv1d(4, 6, 3))
    >>> model = attach(model, partial(forms.Product.create, rank=2), targets=["0", "1"], rng=0)
    >>> layout(model)
    {'embeddings': frozenset({'0'}), 'kernels': {'1': (3,)}, 'fan_in_fan_out': False}
    """
    bases = {name: layer.base for name, layer in layers_of(model).items()}
    return {
        "embeddings": frozenset(n for n, base in bases.items() if isinstance(base, nn.Embedding)),
        "kernels": {
            name: tuple(base.get_parameter("weight").shape[2:])
            for name, base in bases.items()
            if is_convolution(base)
        },
        "fan_in_fan_out": any(is_transposed(base) for base in bases.values()),
    }


def state(model: nn.Module) -> dict[str, Tensor]:
    """All arrays of the adapters, trained and fixed, and nothing else.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict from str to Tensor
        ``<layer>.<array of the form>``, and ``shared_adapters.<number>.<array>`` for what layers
        share. They are the tensors of the model, without a graph; save them with
        ``safetensors.torch.save_file`` or ``torch.save``, and read them by :func:`load_state_`.
    """
    return {name: array.detach() for name, array in _arrays_of(model).items()}


@torch.no_grad()
def load_state_(model: nn.Module, arrays: Mapping[str, Tensor]) -> nn.Module:
    """Write the arrays of :func:`state` into a model with the same adapters.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    arrays : mapping from str to Tensor

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        If an array is missing, is not one of the model, or has another shape; it is named, and
        nothing is written.
    """
    own = _arrays_of(model)
    problems = [f"{name} is missing" for name in own if name not in arrays]
    problems += [f"{name} is unknown" for name in arrays if name not in own]
    problems += [
        f"{name} has shape {tuple(arrays[name].shape)}, not {tuple(array.shape)}"
        for name, array in own.items()
        if name in arrays and arrays[name].shape != array.shape
    ]
    if problems:
        raise ValueError(f"the state must be of the adapters of the model: {'; '.join(problems)}")
    for name, array in own.items():
        array.copy_(arrays[name])
    return model


def check_movable(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise unless the weight of a layer can be given other values."""
    if not is_plain(module):
        raise ValueError(
            f"{name} is a quantized {type(module).__name__}, whose weight cannot be changed; "
            "dequantize it first"
        )
    check_untied(model, name, module)


def check_untied(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise if a weight that is to be changed belongs to another module as well."""
    for other, owner in model.named_modules():
        for key, parameter in owner.named_parameters(recurse=False):
            if parameter is module.weight and owner is not module:
                raise ValueError(
                    f"{name} shares its weight with {other}.{key}, which would change with it; "
                    "untie them first"
                )


def layers_of(model: nn.Module) -> dict[str, Adapted]:
    """All layers with an adapter, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapter; attach one first")
    return layers


def _arrays_of(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Arrays):
            place = name.removesuffix(".adapter")
            found |= {f"{place}.{array_name}": array for array_name, array in module.own()}
        elif isinstance(module, Pool):
            found |= {f"{name}.{number}": array for number, array in module.named_buffers()}
    return found


def swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules wherever the old ones are."""
    for module in list(model.modules()):
        for key, child in list(module._modules.items()):
            if child is not None and child in new and module is not new[child]:
                setattr(module, key, new[child])


def _remove(model: nn.Module) -> None:
    layers = layers_of(model).values()
    swap(model, {layer: layer.base for layer in layers})
    for layer in layers:
        for name in layer.thawed:
            layer.base.get_parameter(name).requires_grad_(True)
    for module in list(model.modules()):
        for key, child in list(module._modules.items()):
            if isinstance(child, Shared):
                delattr(module, key)
