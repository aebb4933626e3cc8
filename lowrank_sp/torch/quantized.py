"""Quantized weights of layers: decoded for an initializer, and coded again for the residual."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Codec(NamedTuple):
    """How the quantized weight of a kind of layer is read and written.

    Attributes
    ----------
    decode : callable
        From a layer to its weight as a floating matrix ``(m, n)``, which may be a new one.
    encode : callable
        From a layer and a matrix ``(m, n)`` to None: quantizes the matrix in the format that the
        layer has, and gives it to the layer in place of its weight.

    Examples
    --------
    A layer of four bits without any packing:

    >>> import torch
    >>> from lowrank_sp.adapters.quantize import nf4
    >>> class Coded(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return torch.nn.functional.linear(x, self.coded.to_dense(), self.bias)
    >>> def encode(layer, weight):
    ...     layer.coded = nf4(weight)
    >>> codec = Codec(decode=lambda layer: layer.coded.to_dense(), encode=encode)
    >>> layer = Coded(64, 32)
    >>> codec.encode(layer, layer.weight.detach())
    >>> codec.decode(layer).shape
    torch.Size([32, 64])
    """

    decode: Callable[[Any], Tensor]
    encode: Callable[[Any, Tensor], None]


def codec_of(name: str, module: nn.Module, codecs: Mapping[type[nn.Module], Codec]) -> Codec | None:
    """The codec of a layer: one of those given, or of bitsandbytes, or None.

    Raises
    ------
    ValueError
        If bitsandbytes cannot decode the weight any more.
    """
    # Layers of bitsandbytes exist only where it has been imported.
    library: Any = sys.modules.get("bitsandbytes")
    known = dict(codecs)
    if library is not None:
        known.setdefault(library.nn.Linear4bit, Codec(_decode_4bit, _encode_4bit))
        known.setdefault(library.nn.Linear8bitLt, Codec(_decode_8bit, _encode_8bit))
    weight: Any = module.weight
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        # Unpacking gives other values where the scales are not quantized (bitsandbytes 0.50).
        raise ValueError(
            f"{name} was packed for CPUs by bitsandbytes when it was called, and cannot be decoded "
            "exactly; load the model anew and initialize before it is called"
        )
    return next((known[kind] for kind in type(module).__mro__ if kind in known), None)


def _decode_4bit(module: Any) -> Tensor:
    library: Any = sys.modules["bitsandbytes"]
    return library.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)


def _encode_4bit(module: Any, weight: Tensor) -> None:
    old = module.weight
    new = type(old)(
        weight.to(old.quant_state.dtype),
        requires_grad=False,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
        quant_storage=old.quant_storage,
        module=module,
    )
    # It is quantized on its way to a device.
    module.weight = new.to(old.device)


def _decode_8bit(module: Any) -> Tensor:
    library: Any = sys.modules["bitsandbytes"]
    # The scales move from the weight to the state of the layer when that is first called.
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return library.functional.int8_vectorwise_dequant(module.weight.data, scales)


def _encode_8bit(module: Any, weight: Tensor) -> None:
    new = type(module.weight)(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    module.weight = new.to(module.weight.device)
    module.init_8bit_state()


def relative_change(weight: Tensor, base: Tensor, up: Tensor, down: Tensor, scale: float) -> float:
    """``||weight - base - scale up @ down||_F / ||weight||_F``; 0 where the weight is."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    rest = weight.to(wide) - base.to(wide)
    rest -= scale * (up.to(wide).flatten(1) @ down.to(wide).flatten(1))
    size = float(torch.linalg.vector_norm(weight, dtype=wide))
    return float(torch.linalg.vector_norm(rest)) / size if size else 0.0
