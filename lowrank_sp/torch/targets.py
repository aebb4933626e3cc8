"""Which layers of a model are meant, and what is known of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from torch import nn

from lowrank_sp.torch.layers import is_linear, why_not
from lowrank_sp.torch.modules import Adapted, Shared

#: How layers are named: see :func:`lowrank_sp.torch.attaching.attach`.
Targets = str | Iterable[str] | Callable[[str, nn.Module], bool]

_ALL_LINEAR = "all-linear"


def find(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """Modules that targets mean, by name, in the order of the model.

    Raises
    ------
    ValueError
        If a target means none; the names that are nearest to it are listed.
    """
    modules = dict(walk(model))
    if callable(targets):
        chosen = {name: m for name, m in modules.items() if targets(name, m)}
        if not chosen:
            raise ValueError(f"no module of {type(model).__name__} satisfies the predicate")
        return chosen
    if isinstance(targets, str):
        if targets == _ALL_LINEAR:
            return _all_linear(model, modules)
        chosen = {name: m for name, m in modules.items() if re.fullmatch(targets, name)}
        if not chosen:
            raise ValueError(
                f"{_unknown(model, targets, modules)}; a string is a regular expression for whole "
                f"names, [{targets!r}] means names that end so"
            )
        return chosen
    wanted = list(targets)
    for target in wanted:
        if not any(_ends_with(name, target) for name in modules):
            raise ValueError(_unknown(model, target, modules))
    if not wanted:
        raise ValueError("at least one target is needed, got none")
    return {
        name: m for name, m in modules.items() if any(_ends_with(name, target) for target in wanted)
    }


def find_exactly(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Modules of these very names, or the error of :func:`find`."""
    modules = dict(walk(model))
    for name in names:
        if name not in modules:
            raise ValueError(_unknown(model, name, modules))
    return {name: modules[name] for name in names}


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules below a model by name, each once; nothing inside of adapters."""
    seen: set[nn.Module] = {model}

    def below(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for key, child in module.named_children():
            if child not in seen and not isinstance(child, Shared):
                seen.add(child)
                yield prefix + key, child
                if not isinstance(child, Adapted):
                    yield from below(child, f"{prefix}{key}.")

    return below(model, "")


def check_adaptable(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise, with the reason, unless a module can be replaced by one with an adapter."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, Adapted):
        reason = "it has an adapter; detach or merge that first"
    elif isinstance(parent, nn.MultiheadAttention):
        reason = "torch.nn.MultiheadAttention takes its weight and does not call it"
    elif isinstance(parent, nn.TransformerEncoderLayer):
        reason = "torch.nn.TransformerEncoderLayer takes its weight past the module in evaluation"
    else:
        reason = why_not(module)
    if reason:
        raise ValueError(f"{name} cannot be adapted: {reason}")


def check_linear(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise, with the reason, unless a module can be replaced by another linear layer."""
    check_adaptable(model, name, module)
    if not is_linear(module):
        raise ValueError(f"{name} must be a linear layer, got a {type(module).__name__}")


def keywords(data: Mapping[str, Any] | None, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What is known of every layer, under the names of arguments of initializers.

    ``data`` has for every layer a statistic or a mapping of arguments.
    """
    if data is None:
        return {name: {} for name in names}
    known = {layer_name(name): given for name, given in data.items()}
    found = {}
    for name in names:
        if layer_name(name) not in known:
            near = get_close_matches(layer_name(name), list(known), 3, 0.4)
            raise ValueError(
                f"there are no data of {name}; there are of {', '.join(near or list(known)[:3])}"
            )
        given = known[layer_name(name)]
        arguments = given if isinstance(given, Mapping) else {given.key: given.arrays()[given.key]}
        found[name] = dict(arguments)
    return found


def layer_name(name: str) -> str:
    """Name of a layer without what PEFT and adapters add to it."""
    return name.removeprefix("base_model.model.").removesuffix(".base_layer").removesuffix(".base")


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """All linear layers but the one that makes the output of a language model."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    chosen = {name: m for name, m in modules.items() if is_linear(m) and m is not output}
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no linear layer without an adapter")
    return chosen


def _unknown(model: nn.Module, target: str, modules: Mapping[str, nn.Module]) -> str:
    layers = [name for name, m in modules.items() if isinstance(m, Adapted) or not why_not(m)]
    names = {name: name for name in layers} | {name.rpartition(".")[2]: name for name in layers}
    near = get_close_matches(target, list(names), 3, 0.4) or list(names)[:3]
    hint = f"the nearest names are {', '.join(near)}" if near else "it has no layer to adapt"
    return f"no module of {type(model).__name__} is called {target}; {hint}"
