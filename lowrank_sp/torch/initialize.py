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
from lowrank_sp.torch.layers import check_values, matrix_of, write_weight
from lowrank_sp.torch.pairs import unlike_a_product
from lowrank_sp.torch.quantized import Codec, codec_of, relative_change
from lowrank_sp.torch.targets import keywords


class _Layer(NamedTuple):
    """One adapter of one layer of PEFT's."""

    name: str
    base: nn.Module
    up: Tensor
    down: Tensor
    scale: float


@torch.no_grad()
def initialize_(
    model: nn.Module,
    initializer: Callable[..., Any],
    *,
    data: Mapping[str, Any] | None = None,
    codecs: Mapping[type[nn.Module], Codec] | None = None,
    callback: Callable[[str, float], None] | None = None,
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
    codecs : mapping from class of layer to Codec, optional
        How to decode and code again the weights of quantized layers; see
        :class:`~lowrank_sp.torch.quantized.Codec`. Those of bitsandbytes, of 4 and 8 bits, are
        known.
    callback : callable, optional
        Called with the name of every layer and the relative error of its start,
        ``||W - base - scale B A||_F / ||W||_F``, for the weight ``W`` that the layer had, decoded.
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
        a layer; if a base is quantized in a way that is not known, has no values, or shares its
        weight with another module: untie it first. Nothing has changed then.
    TypeError
        If what the initializer returns is no pair of factors.

    Notes
    -----
    A quantized weight is decoded, and the residual is quantized again in the same format. That
    loses what quantization loses of the residual, so outputs change by as much: see ``callback``. A
    start that leaves the weight, such as ``eva``, leaves its codes as well. Where the weight is at
    hand before it was quantized, ``loftq`` and ``qpissa`` of that lose less than any start of the
    decoded one.

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
    found = [_codec(model, layer, codecs or {}) for layer in layers]
    arguments = keywords(data, [layer.name for layer in layers])
    children = np.random.default_rng(rng).spawn(len(layers))
    for layer, codec, child in zip(layers, found, children, strict=True):
        rank, weight = layer.down.shape[0], codec.decode(layer.base)
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
        # The weight may be a view of what is written now.
        before = weight.clone() if callback else weight
        layer.up.copy_(start.up.reshape(layer.up.shape))
        layer.down.copy_(start.down.reshape(layer.down.shape))
        if base is not weight:
            codec.encode(layer.base, base)
        if callback:
            after = codec.decode(layer.base)
            callback(layer.name, relative_change(before, after, layer.up, layer.down, layer.scale))
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


def _codec(model: nn.Module, layer: _Layer, codecs: Mapping[type[nn.Module], Codec]) -> Codec:
    """How the weight of a layer is read and written, after all checks."""
    weight: Any = getattr(layer.base, "weight", None)
    kind = type(layer.base).__name__
    if not isinstance(weight, Tensor):
        raise ValueError(f"{layer.name} cannot be initialized: a {kind} has no single weight")
    check_values(layer.name, weight, layer.up, layer.down)
    check_untied(model, layer.name, layer.base)
    codec = codec_of(layer.name, layer.base, codecs)
    if codec is None:
        shape = layer.up.shape[0], layer.down.shape[1:].numel()
        if not weight.is_floating_point() or tuple(matrix_of(layer.base).shape) != shape:
            raise ValueError(
                f"{layer.name} cannot be initialized: its base is a quantized {kind}, whose format "
                f"is not known; give codecs={{{kind}: Codec(decode, encode)}}, or load the base in "
                "floating point"
            )
        codec = Codec(lambda module: matrix_of(module).detach(), write_weight)
    return codec
