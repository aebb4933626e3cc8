"""Weights that are kept as integers of a few bits, also while they are trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lowrank_sp.updates.integers import Integers, rows_short, turned_like

_ATEN = torch.ops.aten


class IntegerTensor(torch.Tensor):
    """A matrix that is kept as integers and scales, and decoded where it is used.

    Operations see its values and give plain tensors. ``copy_`` rounds to the nearest integers: that
    is exact for what :class:`~lowrank_sp.updates.quantized_weight.QGaLore` writes. Other operations
    in place are refused. Of a linear layer nothing decoded is kept for the backward pass.

    Attributes
    ----------
    codes : tensor of uint8
    scales : tensor
        In the dtype of the values.
    kind : Integers
    """

    codes: Tensor
    scales: Tensor
    kind: Integers

    @staticmethod
    def __new__(
        cls, codes: Tensor, scales: Tensor, kind: Integers, shape: tuple[int, ...]
    ) -> IntegerTensor:
        self = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, shape, dtype=scales.dtype, device=scales.device
        )
        self.codes, self.scales, self.kind = codes, scales, kind
        return self

    @classmethod
    def of(cls, weight: Tensor, kind: Integers) -> IntegerTensor:
        """A weight, rounded; half precision becomes float32.

        Parameters
        ----------
        weight : Tensor, shape (m, n)
        kind : Integers
        """
        wide = weight.detach().float() if weight.dtype.itemsize < 4 else weight.detach()
        kept = kind.encode(rows_short(wide))
        return cls(kept["codes"], kept["scales"], kind, tuple(weight.shape))

    def decoded(self) -> Tensor:
        """The values, as a plain tensor."""
        kept = {"codes": self.codes, "scales": self.scales}
        return turned_like(self.kind.decode(kept, min(self.shape)), self.shape)

    def _like(self, codes: Tensor, scales: Tensor) -> IntegerTensor:
        return IntegerTensor(codes, scales, self.kind, tuple(self.shape))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        del tensor_contents
        m, n = self.shape
        return f"IntegerTensor({m} x {n}, {self.kind.bits} bits, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        del types
        with torch._C.DisableTorchFunctionSubclass():  # else every result becomes a subclass
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        first, kwargs = args[0], kwargs or {}
        if func in (_ATEN.detach.default, _ATEN.alias.default):
            return first._like(first.codes, first.scales)
        if func is _ATEN.clone.default:
            return first._like(first.codes.clone(), first.scales.clone())
        if func is _ATEN._to_copy.default and kwargs.get("dtype") in (None, first.dtype):
            place = {"device": kwargs.get("device"), "copy": True}
            return first._like(first.codes.to(**place), first.scales.to(**place))
        if func is _ATEN.copy_.default and isinstance(first, cls):
            kept = first.kind.encode(rows_short(_plain(args[1]).to(first.dtype)))
            first.codes.copy_(kept["codes"])
            first.scales.copy_(kept["scales"])
            return first
        if func._schema.is_mutable and isinstance(first, cls):
            raise TypeError(
                f"a weight of integers can only be written by copy_, got {func}; "
                "train it by ProjectedOptimizer with QGaLore"
            )
        args, kwargs = (tree_map_only(cls, cls.decoded, x) for x in (args, kwargs))
        return func(*args, **kwargs)


torch.serialization.add_safe_globals([IntegerTensor, Integers])


class _Linear(torch.autograd.Function):
    """``x @ weight.T``, of which the integers are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: IntegerTensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(x, weight)
        return x @ weight.decoded().to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        rows = (y.reshape(-1, y.shape[-1]) for y in (grad, x))
        of_outputs, of_inputs = rows
        return grad @ weight.decoded().to(grad.dtype), (of_outputs.mT @ of_inputs).to(weight.dtype)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    y = _Linear.apply(input, weight)
    return y if bias is None else y + bias


def _plain(x: Tensor) -> Tensor:
    return x.decoded() if isinstance(x, IntegerTensor) else x


def integer_weights_(model: nn.Module, kind: Integers | None = None) -> list[str]:
    """Keep the weights of linear layers as integers, as Q-GaLore trains them.

    Parameters
    ----------
    model : Module
        Changed in place: its :class:`torch.nn.Linear` layers that are trained get weights that are
        :class:`IntegerTensor`. Give it the layers that the rule is to train, without embeddings and
        heads.
    kind : Integers, optional
        That of the rule, by default 8 bits in blocks of 256.

    Returns
    -------
    list of str
        Names of the weights.

    Raises
    ------
    ValueError
        If there is no such layer, or a weight is shared by two.

    Examples
    --------
    >>> import torch
    >>> from lowrank_sp.torch import ProjectedOptimizer, integer_weights_
    >>> from lowrank_sp.updates import QGaLore
    >>> layer = torch.nn.Linear(64, 48)
    >>> integer_weights_(layer)
    ['weight']
    >>> layer.weight.codes.nbytes, layer.weight.nbytes
    (3072, 12288)
    >>> optimizer = ProjectedOptimizer(layer.named_parameters(), QGaLore(rank=4))
    >>> layer(torch.ones(5, 64)).square().mean().backward()
    >>> optimizer.step()
    >>> type(layer.weight.data).__name__
    'IntegerTensor'
    """
    kind = Integers() if kind is None else kind
    owners: dict[Tensor, str] = {}
    found: dict[str, nn.Linear] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or not layer.weight.requires_grad:
            continue
        full = f"{name}.weight" if name else "weight"
        if layer.weight in owners:
            raise ValueError(
                f"{full} and {owners[layer.weight]} are one weight; untie them, or leave them out"
            )
        owners[layer.weight], found[full] = full, layer
    if not found:
        raise ValueError("the model must have a linear layer that is trained, got none")
    for layer in found.values():
        layer.weight = nn.Parameter(IntegerTensor.of(layer.weight, kind))
    return list(found)
