"""What layers see while a model runs: statistics of their inputs, means of their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_sp.adapters.statistics import MeanGradient
from lowrank_sp.torch.layers import is_linear, is_plain, is_transposed
from lowrank_sp.torch.modules import Adapted
from lowrank_sp.torch.targets import Targets, find, layer_name


@contextmanager
def collect_inputs(
    model: nn.Module,
    statistic: Callable[[Tensor], Any],
    *,
    targets: Targets,
    mask: str | None = "attention_mask",
) -> Iterator[dict[str, Any]]:
    """Within this context, gather a statistic of the inputs of layers while the model runs.

    Run the model without gradients. Inputs that layers share, as query, key and value do, are
    counted once, and their statistic is one object.

    Parameters
    ----------
    model : torch.nn.Module
        With or without adapters.
    statistic : callable
        From a first batch ``(..., n)`` to a statistic with ``update``:
        ``SecondMoment.of``, or ``functools.partial(InputPCA.of, rank=16)``.
    targets : str, iterable of str, or callable
        Linear layers, as in :func:`~lowrank_sp.torch.attaching.attach`.
    mask : str or None
        The keyword under which the model gets its mask ``(batch, length)``: tokens where it is zero
        are left out. None counts every token.

    Yields
    ------
    dict from name of a layer to statistic
        Grows with every batch. For :func:`~lowrank_sp.torch.attaching.attach` and
        :func:`~lowrank_sp.torch.initialize.initialize_`.

    Examples
    --------
    >>> import torch
    >>> from lowrank_sp.adapters import SecondMoment
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    >>> with torch.no_grad(), collect_inputs(model, SecondMoment.of, targets=["0"]) as seen:
    ...     for batch in torch.ones(5, 7, 3):
    ...         _ = model(batch)
    >>> seen["0"].count
    35
    """
    collector = _Inputs(statistic, mask)
    with ExitStack() as stack:
        # The first in line, so that it has the mask before any layer runs.
        stack.callback(
            model.register_forward_pre_hook(collector.begin, prepend=True, with_kwargs=True).remove
        )
        stack.callback(model.register_forward_hook(collector.end, always_call=True).remove)
        for name, module in find(model, targets).items():
            _base(name, module)
            hook = collector.hook(layer_name(name))
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield collector.found


@contextmanager
def collect_gradients(
    model: nn.Module, *, targets: Targets, device: torch.device | str | None = None
) -> Iterator[dict[str, MeanGradient]]:
    """Within this context, gather the mean gradient of the weights of layers over backward passes.

    Only these weights require a gradient meanwhile, and each is let go of as soon as it has been
    added up, so that no two of them exist at a time beside the means. On leaving, everything
    requires the gradients that it did, and holds those that it held.

    Parameters
    ----------
    model : torch.nn.Module
        With or without adapters.
    targets : str, iterable of str, or callable
        Linear layers, as in :func:`~lowrank_sp.torch.attaching.attach`.
    device : torch.device or str, optional
        Where to keep the means, such as ``"cpu"``; by default where the weights are.

    Yields
    ------
    dict from name of a layer to MeanGradient
        Grows with every backward pass, each counted once: the loss should be a mean over batches of
        one size.

    Raises
    ------
    ValueError
        If a layer is quantized, or if a gradient is not finite: leave that batch out.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    >>> with collect_gradients(model, targets=["0"]) as seen:
    ...     for x in (1.0, 3.0):
    ...         model(torch.full((1, 3), x)).sum().backward()
    >>> seen["0"].mean
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """
    found: dict[str, MeanGradient] = {}
    parameters = list(model.parameters())
    layers = {name: _base(name, module) for name, module in find(model, targets).items()}
    before = [(p, p.requires_grad, p.grad) for p in parameters]

    def collector(name: str, base: nn.Module) -> Callable[[Tensor], None]:
        def collect(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            if gradient is not None:
                matrix = (gradient.mT if is_transposed(base) else gradient).to(device)
                seen = found.get(name)
                found[name] = MeanGradient.of(matrix) if seen is None else seen.update(matrix)

        return collect

    with ExitStack() as stack:
        stack.callback(_restore, before)
        for p in parameters:
            p.requires_grad_(False)
        for name, base in layers.items():
            if not is_plain(base):
                raise ValueError(f"{name} is a quantized {type(base).__name__}, without a gradient")
            weight = base.get_parameter("weight")
            weight.requires_grad_(True)
            weight.grad = None
            hook = collector(layer_name(name), base)
            stack.callback(weight.register_post_accumulate_grad_hook(hook).remove)
        yield found


class _Inputs:
    """Statistics by layer, and what of the present batch is needed to find shared inputs."""

    def __init__(self, statistic: Callable[[Tensor], Any], mask: str | None) -> None:
        self.statistic, self.mask_name = statistic, mask
        self.found: dict[str, Any] = {}
        self.mask: Tensor | None = None
        self.last: tuple[Any, Any, Any] = (None, None, None)

    def begin(self, model: nn.Module, args: Any, options: dict[str, Any]) -> None:
        del model, args
        self.mask = None if self.mask_name is None else options.get(self.mask_name)
        if self.mask is not None and self.mask.ndim != 2:
            raise ValueError(
                f"{self.mask_name} must have shape (batch, length), got {tuple(self.mask.shape)}; "
                "take mask=None where no token is to be left out"
            )

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        del model, args, output
        self.mask, self.last = None, (None, None, None)

    def hook(self, name: str) -> Callable[..., None]:
        def observe(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
            del module
            self.observe(name, args[0] if args else next(iter(options.values())))

        return observe

    def observe(self, name: str, x: Tensor) -> None:
        before = self.found.get(name)
        known, before_known, after = self.last
        if x is not known or before is not before_known:
            rows = self.counted(x.detach())
            if rows.numel() == 0:
                return
            after = self.statistic(rows) if before is None else before.update(rows)
        self.last = x, before, after
        self.found[name] = after

    def counted(self, x: Tensor) -> Tensor:
        """The tokens that the mask leaves, where there is a mask and ``x`` has its tokens."""
        if self.mask is None:
            return x
        keep = self.mask.to(x.device, torch.bool)
        if x.shape[:-1] == keep.shape:
            return x[keep]
        return x[keep.flatten()] if x.shape[:-1] == (keep.numel(),) else x


def _base(name: str, module: nn.Module) -> nn.Module:
    """The linear layer that a target is, or that it adapts."""
    layer: Any = module
    if isinstance(module, Adapted):
        layer = module.base
    elif hasattr(layer, "get_base_layer"):
        layer = layer.get_base_layer()
    if not is_linear(layer):
        raise ValueError(f"{name} must be a linear layer, got a {type(module).__name__}")
    return layer


def _restore(before: list[tuple[nn.Parameter, bool, Tensor | None]]) -> None:
    for parameter, required, gradient in before:
        parameter.requires_grad_(required)
        parameter.grad = gradient
