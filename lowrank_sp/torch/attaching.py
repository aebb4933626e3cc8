"""Adapters of any form into models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_sp._arrays import RNG, as_compute
from lowrank_sp.adapters.catalog import LayeredStart
from lowrank_sp.adapters.forms import Fixed, Form, LayeredForm, Product, Start, Trained, Weight
from lowrank_sp.adapters.initializers import Initialization, QuantizedInitialization
from lowrank_sp.factors import Factored
from lowrank_sp.torch.attached import SHARED, check_movable, swap
from lowrank_sp.torch.layers import check_values, is_plain, matrix_of, shape_of, write_weight
from lowrank_sp.torch.modules import Arrays, Pool, Shared, adapted
from lowrank_sp.torch.targets import Targets, check_adaptable, find, find_exactly, keywords


def attach(
    model: nn.Module,
    create: Callable[..., Any],
    *,
    targets: Targets,
    data: Mapping[str, Any] | None = None,
    dropout: float = 0.0,
    rng: RNG = None,
) -> nn.Module:
    """Give layers of a model an adapter each, and freeze everything else.

    Linear layers, embeddings and convolutions can be adapted. A target is replaced by an
    :class:`~lowrank_sp.torch.modules.Adapted`, which holds the layer itself and the arrays of the
    form: the trained ones as parameters, the fixed ones as buffers. Fixed arrays that several
    layers have in common are registered once, at the model. A form that depends on the weight
    refers to that of the layer.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place.
    create : callable
        From ``(weight, rng=...)`` to a :class:`~lowrank_sp.adapters.forms.Form`, or a
        :class:`~lowrank_sp.adapters.forms.Start`, which moves the weight of the layer as well, or
        what an initializer returns, which makes a :class:`~lowrank_sp.adapters.forms.Product`.
        ``functools.partial`` of the ``create`` of a form, of an initializer, or of the ``start`` of
        a variant of the :mod:`~lowrank_sp.adapters.catalog` will do. The weight
        is a matrix ``(m, n)``, outputs by inputs, in at least float32; of a quantized layer it is
        the shape only. Of an embedding ``n`` counts its entries, of a convolution channels times
        kernel.
    targets : str, iterable of str, or callable
        As in PEFT: a regular expression for the whole name of a module, ``"all-linear"``, or names
        and ends of names. Or a predicate of a name and a module.
    data : mapping from name of a layer to statistic, optional
        Passed to ``create`` under the names that initializers give them, as by
        :func:`~lowrank_sp.torch.initialize.initialize_`.
    dropout : float
        Probability of dropping an input of the adapter in training; embeddings drop none.
    rng : int, Generator or None
        One child is spawned for every layer.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        If a target is no module of the model, the names nearest to it are listed; if a module
        cannot be adapted, or has no values yet, the reason is given; if the update of an embedding
        is no product of two factors. The model is then as it was.
    TypeError
        If the form is made from the weight itself, and the layer is quantized.

    Notes
    -----
    The adapter is in float32 where the weight is in half precision, and adds to an output that is
    rounded once. Attach before the model is compiled, sharded or given to an optimizer. Set
    ``requires_grad`` again for what is to be trained beside the adapters.

    Until all layers have been made, the weights that starts move are held beside the old ones.

    Examples
    --------
    >>> from functools import partial
    >>> import torch
    >>> from lowrank_sp.adapters import forms
    >>> from lowrank_sp.torch import forms_of
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    >>> model = attach(model, partial(forms.Product.create, rank=2), targets=["0"], rng=0)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.adapter.up', '0.adapter.down']
    >>> forms_of(model)
    {'0': Product(up 6 x 2, down 2 x 4)}
    """
    found = _checked(model, find(model, targets))
    keys = keywords(data, found)
    children = np.random.default_rng(rng).spawn(len(found))
    made = {}
    for (name, module), child in zip(found.items(), children, strict=True):
        weight = _weight(module)
        made[name] = _without(weight, create(weight, rng=child, **keys[name]))
    return attach_forms(model, made, dropout=dropout)


def attach_shared(
    model: nn.Module,
    create: Callable[..., LayeredForm | LayeredStart],
    *,
    targets: Targets,
    dropout: float = 0.0,
    rng: RNG = None,
) -> nn.Module:
    """Give layers of a model one form for all of them, which share its arrays.

    Parameters
    ----------
    model, targets, dropout
        As in :func:`attach`.
    create : callable
        From ``(weights, rng=...)`` to a :class:`~lowrank_sp.adapters.forms.LayeredForm`, or to a
        :class:`~lowrank_sp.adapters.catalog.LayeredStart`, where ``weights`` are those of all
        targets, in the order of the modules of the model.
    rng : int, Generator or None

    Returns
    -------
    torch.nn.Module
        The model. The arrays are parameters and buffers of its module ``shared_adapters``.
    """
    found = _checked(model, find(model, targets))
    weights = [_weight(module) for module in found.values()]
    made = _without(weights, create(weights, rng=np.random.default_rng(rng)))
    return attach_forms(model, {tuple(found): made}, dropout=dropout)


def attach_forms(model: nn.Module, forms: Mapping[Any, Any], *, dropout: float = 0.0) -> nn.Module:
    """Attach forms that exist: read from a file, taken from another model, or made one by one.

    Parameters
    ----------
    model, dropout
        As in :func:`attach`.
    forms : mapping
        From the name of a module to what ``create`` of :func:`attach` may return, of arrays of any
        library; and from a tuple of names to what ``create`` of :func:`attach_shared` may return.

    Returns
    -------
    torch.nn.Module
        The model.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    single = {name: _start(made) for name, made in forms.items() if isinstance(name, str)}
    layered = {
        names: _layered_start(made) for names, made in forms.items() if not isinstance(names, str)
    }
    names = [*single, *(name for group in layered for name in group)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"a layer gets one form, got several for {', '.join(twice)}")
    modules = _checked(model, find_exactly(model, names))
    for name, (form, _) in single.items():
        _check_form(name, form, shape_of(modules[name]))
        _check_lookup(name, form, modules[name])
    for group, (form, _) in layered.items():
        _check_group(group, form, [shape_of(modules[name]) for name in group])
        for index, name in enumerate(group):
            _check_lookup(name, form.layer(index), modules[name])
    moved = {name: weight for name, (_, weight) in single.items() if weight is not None}
    for group, (_, weights) in layered.items():
        if weights is not None and len(weights) != len(group):
            raise ValueError(
                f"the start must have the weights of {len(group)} layers, got {len(weights)}"
            )
        moved |= {} if weights is None else dict(zip(group, weights, strict=True))
    for name in moved:
        check_movable(model, name, modules[name])

    pool = Pool()
    likes = {name: _like(modules[name]) for name in names}
    links = _pooled(pool, {name: form for name, (form, _) in single.items()}, likes)
    shared: list[nn.Module] = [pool] if any(links.values()) else []
    new: dict[nn.Module, nn.Module] = {}
    for name, weight in moved.items():
        write_weight(modules[name], weight)
    for name, (form, _) in single.items():
        base = modules[name]
        new[base] = adapted(base, Arrays(form, likes[name], pool, links[name]), dropout=dropout)
    for group, (form, _) in layered.items():
        arrays = Arrays(form, likes[group[0]])
        shared.append(arrays)
        for index, name in enumerate(group):
            new[modules[name]] = adapted(modules[name], arrays, index, dropout)
    swap(model, new)
    if shared:
        if not hasattr(model, SHARED):
            model.add_module(SHARED, Shared())
        cast(Shared, model.get_submodule(SHARED)).extend(shared)
    _freeze(model)
    return model


def _checked(model: nn.Module, found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    for name, module in found.items():
        check_adaptable(model, name, module)
        check_values(name, matrix_of(module))
    return found


def _weight(module: nn.Module) -> Any:
    """What forms are made of: the weight in at least float32, or the shape of a quantized one."""
    return as_compute(matrix_of(module).detach()) if is_plain(module) else shape_of(module)


def _like(module: nn.Module) -> Tensor:
    """An empty tensor as the arrays of an adapter of the module shall be."""
    weight = matrix_of(module)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.empty(0, dtype=dtype, device=weight.device)


def _start(made: Any) -> tuple[Form, Any]:
    """A form, and the weight that belongs to it where that is a new one."""
    if isinstance(made, Form):
        return made, None
    if isinstance(made, Start):
        return made.form, made.weight
    if isinstance(made, Initialization):
        return Product(made.up, made.down, made.scale), made.residual
    if isinstance(made, QuantizedInitialization):
        return Product(made.up, made.down, made.scale), made.base.to_dense()
    raise TypeError(
        f"a layer needs a Form, a Start or an Initialization, got {type(made).__name__}; forms of "
        "many layers go with attach_shared"
    )


def _layered_start(made: Any) -> tuple[Any, Any]:
    """A form of many layers, and the weights that belong to it where those are new ones."""
    return (made.form, made.weights) if isinstance(made, LayeredStart) else (made, None)


def _without(weights: Any, made: Any) -> Any:
    """The form alone where a start leaves the weights that it was made from."""
    if isinstance(made, (Start, LayeredStart)) and made[1] is weights:
        return made.form
    return made


def _check_form(name: str, form: Form, shape: tuple[int, int]) -> None:
    if tuple(form.shape) != shape:
        raise ValueError(f"the form of {name} must have its shape {shape}, got {form.shape}")
    if not form.arrays(Trained):
        raise ValueError(f"the form of {name} has nothing to train: {form}")
    for array_name, array in form.arrays(Weight).items():
        if tuple(array.shape) != shape:
            raise ValueError(
                f"{array_name} of the form of {name} must be the weight, of shape {shape}, got "
                f"{tuple(array.shape)}"
            )


def _check_lookup(name: str, form: Form, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding) and not isinstance(form.delta(), Factored):
        raise ValueError(
            f"{name} is an embedding, which looks up rows of a product of two factors, and the "
            f"update of {type(form).__name__} is none; take a form such as Product"
        )


def _check_group(names: Sequence[str], form: Any, shapes: Sequence[tuple[int, int]]) -> None:
    if not isinstance(form, LayeredForm):
        raise TypeError(
            f"a group of layers needs a LayeredForm, got {type(form).__name__}; forms of single "
            "layers go with attach"
        )
    if form.num_layers != len(names):
        raise ValueError(
            f"the form must be of {len(names)} layers, as {', '.join(names)} are, "
            f"got one of {form.num_layers}"
        )
    for index, (name, shape) in enumerate(zip(names, shapes, strict=True)):
        if tuple(form.layer(index).shape) != shape:
            raise ValueError(
                f"layer {index} of the form must have the shape of {name}, {shape}, "
                f"got {form.layer(index).shape}"
            )


def _pooled(
    pool: Pool, forms: Mapping[str, Form], likes: Mapping[str, Tensor]
) -> dict[str, dict[str, str]]:
    """Register the fixed arrays that several forms have; say for each which of its are where."""
    places = {
        name: {key: _identity(array) for key, array in form.arrays(Fixed).items()}
        for name, form in forms.items()
    }
    counts = Counter(place for own in places.values() for place in set(own.values()))
    keys: dict[Any, str] = {}
    links: dict[str, dict[str, str]] = {name: {} for name in forms}
    for name, own in places.items():
        arrays = forms[name].arrays()
        for key, place in own.items():
            if counts[place] > 1:
                if place not in keys:
                    keys[place] = pool.add(arrays[key], likes[name])
                links[name][key] = keys[place]
    return links


def _identity(array: Any) -> tuple[Any, ...]:
    """The same for views of the same numbers, and for the same object."""
    if isinstance(array, Tensor) and array.numel() and not array.is_meta:
        return array.data_ptr(), array.shape, array.stride(), array.dtype, array.device
    if isinstance(array, np.ndarray) and array.size:
        return array.ctypes.data, array.shape, array.strides, array.dtype
    return (id(array),)


def _freeze(model: nn.Module) -> None:
    """Freeze all but the arrays of adapters."""
    holders = [module for module in model.modules() if isinstance(module, (Arrays, Pool))]
    adapters = {p for holder in holders for p in holder.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)
