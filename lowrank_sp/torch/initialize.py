"""Adapters of PEFT filled by any initializer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_sp._arrays import RNG
from lowrank_sp.adapters.initializers import CoreStart, QuantizedInitialization
from lowrank_sp.torch.attached import check_untied
from lowrank_sp.torch.modules import is_transposed
from lowrank_sp.torch.pairs import unlike_a_product
from lowrank_sp.torch.targets import keywords


class _Layer(NamedTuple):
    """One adapter of one layer of PEFT's."""

    name: str
    base: nn.Module
    up: Tensor
    down: Tensor
    scale: float

    @property
    def weight(self) -> Tensor:
        """The weight as ``(m, n)``, a view: of embeddings ``m`` is their length."""
        weight: Any = self.base.weight
        flipped = is_transposed(self.base) or isinstance(self.base, nn.Embedding)
        return weight.detach().mT if flipped else weight.detach().flatten(1)


@torch.no_grad()
def initialize_(
    model: nn.Module,
    initializer: Callable[..., Any],
    *,
    data: Mapping[str, Any] | None = None,
    rng: RNG = None,
) -> nn.Module:
    """Fill the LoRA adapters of a PEFT model, and give every base weight its residual.

    Ranks and scales are those that the layers have, with their patterns and stabilized scales, so
    that outputs stay the same to rounding under initializers that compensate the weight.

    Parameters
    ----------
    model : torch.nn.Module
        From ``peft.get_peft_model``, with adapters on linear layers (also GPT-2's), embeddings and
        convolutions. Changed in place: all adapters that require a gradient.
    initializer : callable
        Of :mod:`lowrank_sp.adapters.initializers`, or like them: ``(weight, rank, *, alpha, rng,
        dtype)`` and its data. Further options by ``functools.partial``. Of LoftQ and QPiSSA the
        base gets the values of the quantized weight.
    data : mapping from name of a layer to statistic, optional
        A statistic is passed under its ``key``, such as ``second_moment``; of a mapping all
        entries are. :func:`~lowrank_sp.torch.collect.collect_inputs` and
        :func:`~lowrank_sp.torch.collect.collect_gradients` make such mappings. Names
        are those in the model without PEFT.
    rng : int, Generator or None
        One child is spawned for every layer.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        If there is no such adapter; if one is not a product of two factors; if there are no data of
        a layer; if a base is quantized, or shares its weight with another module: dequantize or
        untie it first. Nothing has changed then.
    TypeError
        If what the initializer returns is no pair of factors.

    Examples
    --------
    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from lowrank_sp.adapters import pissa
    >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> x = torch.ones(1, 8)
    >>> y = base(x)
    >>> model = initialize_(get_peft_model(base, LoraConfig(r=2, target_modules=["0"])), pissa)
    >>> torch.allclose(model(x), y, atol=1e-6)
    True
    """
    layers = list(_layers_of_peft(model))
    if not layers:
        raise ValueError(
            f"no trainable LoRA adapter of PEFT in {type(model).__name__}; make one by "
            "peft.get_peft_model, or use attach for models without PEFT"
        )
    for layer in layers:
        _check_base(model, layer)
    arguments = keywords(data, [layer.name for layer in layers])
    children = np.random.default_rng(rng).spawn(len(layers))
    for layer, child in zip(layers, children, strict=True):
        rank, weight = layer.down.shape[0], layer.weight
        start = initializer(
            weight,
            rank,
            alpha=layer.scale * rank,
            rng=child,
            dtype=layer.up.dtype,
            **arguments[layer.name],
        )
        if isinstance(start, CoreStart) or not hasattr(start, "down"):
            raise TypeError(
                f"the initializer must return two factors, got a {type(start).__name__} for "
                f"{layer.name}; attach a form that has all its parts"
            )
        base = (
            start.base.to_dense() if isinstance(start, QuantizedInitialization) else start.residual
        )
        layer.up.copy_(start.up.reshape(layer.up.shape))
        layer.down.copy_(start.down.reshape(layer.down.shape))
        if base is not weight:
            weight.copy_(base)
    return model


def _layers_of_peft(model: nn.Module) -> Iterator[_Layer]:
    # A model of PEFT's exists only where PEFT has been imported.
    peft: Any = sys.modules.get("peft")
    for name, module in model.named_modules():
        if peft is None or not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        layer: Any = module
        factors = {k: (layer.lora_B[k].weight, layer.lora_A[k].weight) for k in layer.lora_A}
        factors |= {k: (layer.lora_embedding_B[k], a) for k, a in layer.lora_embedding_A.items()}
        for adapter, (up, down) in factors.items():
            if up.requires_grad or down.requires_grad:
                if kind := unlike_a_product(layer, adapter):
                    raise ValueError(
                        f"{name}.{adapter} is {kind}, not a product of two factors; freeze it"
                    )
                scale = float(layer.scaling[adapter])
                yield _Layer(name, layer.get_base_layer(), up.detach(), down.detach(), scale)


def _check_base(model: nn.Module, layer: _Layer) -> None:
    weight: Any = getattr(layer.base, "weight", None)
    kind = type(layer.base).__name__
    if not isinstance(weight, Tensor):
        raise ValueError(f"{layer.name} cannot be initialized: a {kind} has no single weight")
    shape = layer.up.shape[0], layer.down.shape[1:].numel()
    if not weight.is_floating_point() or tuple(layer.weight.shape) != shape:
        raise ValueError(
            f"{layer.name} cannot be initialized: its base is a quantized {kind}, which cannot "
            "hold the residual; load the base in floating point, and quantize it by loftq or qpissa"
        )
    check_untied(model, layer.name, layer.base)
