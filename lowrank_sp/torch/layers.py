"""Layers that can be adapted, linear ones, embeddings, convolutions: their weights as matrices.

The matrix of a layer is outputs by inputs, ``(m, n)``: of an embedding, its width by its entries;
of a convolution, its channels by the inputs of one output, channels times kernel.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_sp._arrays import to_host
from lowrank_sp.adapters.forms._form import Delta
from lowrank_sp.factors import Factored
from lowrank_sp.operators import LinearOperator

#: Convolutions by the module, with the function that convolves kernels of one point.
_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is ``(n, m)``, as in GPT-2."""
    # A module of that type exists only where transformers has been imported.
    library: Any = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of a kind known here."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution of a kind known here."""
    return isinstance(module, tuple(_CONVOLUTIONS))


def why_not(module: nn.Module) -> str | None:
    """Why the update of a matrix is not the update of a layer, or None where it is."""
    kind = type(module).__name__
    if is_linear(module):
        return None
    if isinstance(module, nn.Embedding):
        if type(module).forward is not nn.Embedding.forward:
            return f"{kind} does not look up rows alone, it has a forward pass of its own"
        if module.max_norm is not None:
            return f"its rows are cut to norm {module.max_norm} at each lookup; set max_norm=None"
        return None
    if is_convolution(module):
        if not any(type(module).forward is known.forward for known in _CONVOLUTIONS):
            return f"{kind} does not convolve alone, it has a forward pass of its own"
        if cast(Any, module).groups > 1:
            return (
                f"its {cast(Any, module).groups} groups of channels are matrices of their own; "
                "adapt layers with groups=1"
            )
        return None
    return f"a form is the update of a matrix, and it is a {kind}"


def matrix_of(module: nn.Module) -> Tensor:
    """Weight of a layer as a matrix ``(m, n)``; a view, unless kernels lie channels last."""
    weight = cast(Tensor, module.weight)
    return weight.mT if _is_flipped(module) else weight.flatten(1)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """``(m, n)`` of a layer, whatever its weight is stored as."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    m, n = matrix_of(module).shape
    return m, n


def write_weight(module: nn.Module, matrix: Any) -> None:
    """Give the weight of a layer the values of a matrix ``(m, n)``."""
    values = matrix if isinstance(matrix, Tensor) else torch.tensor(to_host(matrix))
    weight = cast(Tensor, module.weight)
    with torch.no_grad():
        weight.copy_((values.mT if _is_flipped(module) else values).reshape(weight.shape))


def is_plain(module: nn.Module) -> bool:
    """Whether the weight is a matrix of floats, and not quantized."""
    weight = matrix_of(module)
    return weight.is_floating_point() and tuple(weight.shape) == shape_of(module)


def check_values(name: str, *tensors: Tensor) -> None:
    """Raise if a tensor of a layer is on the meta device."""
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            f"{name} is on the meta device, which has shapes and no values; load the weights "
            "first, and adapters after them"
        )


def looked_up(base: nn.Module, ids: Tensor, delta: Factored) -> Tensor:
    """The rows that an embedding with the weight ``delta`` would give."""
    embedding, (left, right) = cast(nn.Embedding, base), delta.factors()
    rows = functional.embedding(
        ids,
        right.mT,
        embedding.padding_idx,
        scale_grad_by_freq=embedding.scale_grad_by_freq,
    )
    return rows @ left.mT


def convolved(base: nn.Module, x: Tensor, delta: Delta) -> Tensor:
    """What a convolution with the weight ``delta`` and no bias would make of ``x``.

    In two factors, the right one is convolved, and the left one mixes its channels.
    """
    # The method of all convolutions that pads in their mode.
    convolve, kernel = cast(Any, base)._conv_forward, cast(Tensor, base.weight).shape[1:]
    if not isinstance(delta, Factored):
        dense = delta.to_dense() if isinstance(delta, LinearOperator) else delta
        return convolve(x, dense.reshape(-1, *kernel), None)
    left, right = delta.factors()
    mix = next(f for known, f in _CONVOLUTIONS.items() if isinstance(base, known))
    points = (1,) * (len(kernel) - 1)
    return mix(convolve(x, right.reshape(-1, *kernel), None), left.reshape(*left.shape, *points))


def _is_flipped(module: nn.Module) -> bool:
    """Whether the weight is inputs by outputs."""
    return isinstance(module, nn.Embedding) or is_transposed(module)
