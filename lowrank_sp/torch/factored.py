"""Linear layers in two factors, and models that are loaded from factored checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_sp.torch.attached import check_untied, swap
from lowrank_sp.torch.layers import shape_of
from lowrank_sp.torch.targets import check_linear, find_exactly


class FactoredLinear(nn.Module):
    """A linear layer whose weight is ``up @ down``: ``y = up (down x) + bias``.

    Its parameters have the names of a factored checkpoint. They start at zero.

    Parameters
    ----------
    in_features, out_features : int
        ``n`` and ``m``.
    rank : int
        It takes ``rank (m + n)`` parameters and as many multiplications a vector.
    bias : bool
    device, dtype
        As in ``torch.nn.Linear``.

    Attributes
    ----------
    up : Parameter, shape (m, rank)
    down : Parameter, shape (rank, n)
    bias : Parameter, shape (m,), or None

    Examples
    --------
    >>> import torch
    >>> layer = FactoredLinear(8, 6, rank=2)
    >>> layer(torch.ones(3, 8)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([3, 6]), 34)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))

        self.up, self.down = zeros(out_features, rank), zeros(rank, in_features)
        self.bias = zeros(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The product with the input, of shape ``(..., m)``."""
        return functional.linear(functional.linear(x, self.down), self.up, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for the printed model."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={bias}"


@torch.no_grad()
def load_factored_(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a factored checkpoint: its layers in two factors, everything else as it is.

    Parameters
    ----------
    model : torch.nn.Module
        Of the architecture of the checkpoint, as from ``AutoModel.from_config``; its values do not
        matter. Changed in place: layers of the configuration become :class:`FactoredLinear`, in
        the dtype and on the device of their weights.
    path : path
        A directory that :func:`lowrank_sp.checkpoint.write_factored` wrote.

    Returns
    -------
    torch.nn.Module
        The model.

    Raises
    ------
    ValueError
        If the directory is no factored checkpoint; if a layer is not in the model, or shares its
        weight; if a parameter is missing or of another shape, which is named. Nothing
        has changed then.
    """
    path = Path(path)
    ranks = _ranks(path)
    new: dict[nn.Module, nn.Module] = {}
    for name, module in find_exactly(model, ranks).items():
        check_linear(model, name, module)
        check_untied(model, name, module)
        new[module] = _factored(module, ranks[name])
    swap(model, new)
    try:
        for target, tensor in _pairs(model, path):
            target.copy_(tensor)
    except ValueError:
        swap(model, {factored: module for module, factored in new.items()})
        raise
    return model


def _factored(module: nn.Module, rank: int) -> FactoredLinear:
    """What stands in place of a linear layer."""
    weight = cast(Tensor, module.weight)
    m, n = shape_of(module)
    bias = getattr(module, "bias", None) is not None
    factored = FactoredLinear(n, m, rank, bias=bias, device=weight.device, dtype=weight.dtype)
    factored.train(module.training)
    return factored.requires_grad_(weight.requires_grad)


def _ranks(path: Path) -> dict[str, int]:
    try:
        ranks = json.loads((path / "config.json").read_text())["factored"]["ranks"]
        return {str(name): int(rank) for name, rank in ranks.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a factored checkpoint, config.json must have its ranks ({error!r})"
        ) from error


def _pairs(model: nn.Module, path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors of a model with those on disk, once all of them are known to fit."""
    from safetensors import SafetensorError, safe_open

    try:
        with ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(file, framework="pt"))
                for file in sorted(path.glob("*.safetensors"))
            ]
            where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
            own = model.state_dict(keep_vars=True)
            _check(own, {name: where[name].get_slice(name).get_shape() for name in where}, path)
            for name, target in own.items():
                if name in where:
                    yield target, where[name].get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not readable ({error})") from error


def _check(own: Mapping[str, Tensor], stored: Mapping[str, list[int]], path: Path) -> None:
    # Parameters under two names, as of tied embeddings, are stored under one of them.
    loaded = {target for name, target in own.items() if name in stored}
    for name, target in own.items():
        if name not in stored and target not in loaded:
            raise ValueError(f"{path}: there is no {name}; is it the checkpoint of another model?")
        if name in stored and list(target.shape) != stored[name]:
            raise ValueError(
                f"{path}: {name} must have shape {tuple(target.shape)}, got {tuple(stored[name])}"
            )
        if target.is_meta:
            raise ValueError(f"{name} is on the meta device; call model.to_empty first")
