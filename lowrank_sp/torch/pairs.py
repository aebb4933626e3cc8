"""Factor pairs of a model: which parameters form ``weight + scale * up @ down``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lowrank_sp.torch.modules import Arrays

#: Variants of PEFT's layers whose update is ``scale * up @ down``, whatever they add to it.
_PLAIN_VARIANTS = ("ALora", "Dora", "MiCA", "_DoraConvNd")


@dataclass(frozen=True, eq=False)
class ParameterPair:
    """The two parameters of one adapter, which adds ``scale * up @ down`` to a weight.

    With a core, it adds ``scale * up @ core @ down``, and only rules that make nothing of the
    product move the pair; see :attr:`~lowrank_sp.updates.rule.Rule.factorwise`.

    Parameters
    ----------
    name : str
        What error messages call it.
    up : Parameter, shape (m, r)
        ``B`` in the literature. Kernels of shape (m, r, 1, ...) are read as matrices.
    down : Parameter, shape (r, n)
        ``A`` in the literature. Kernels of shape (r, channels, k, ...) are read as matrices.
    scale : float
        ``alpha / r`` of LoRA, ``alpha / sqrt(r)`` of rsLoRA.
    core : Tensor, shape (r,) or (r, r), optional
        What stands between the factors, a diagonal or a matrix. It is not moved with them: an
        optimizer takes it among the other parameters.

    Raises
    ------
    ValueError
        Where the ranks, dtypes or devices of the factors differ.
    """

    name: str
    up: nn.Parameter
    down: nn.Parameter
    scale: float = 1.0
    core: Tensor | None = None

    roles: ClassVar[tuple[str, ...]] = ("up", "down")

    def __post_init__(self) -> None:
        up, down = self.up, self.down
        if up.ndim < 2 or down.ndim < 2 or up.shape[1:].numel() != down.shape[0]:
            raise ValueError(
                f"up must be (m, r) and down (r, n) with one rank r, got "
                f"{tuple(up.shape)} and {tuple(down.shape)} in {self.name}"
            )
        if not up.is_floating_point() or up.dtype != down.dtype or up.device != down.device:
            raise ValueError(
                f"up and down must be of one floating dtype on one device, got {up.dtype} on "
                f"{up.device} and {down.dtype} on {down.device} in {self.name}"
            )
        rank = self.rank
        if self.core is not None and self.core.shape not in ((rank,), (rank, rank)):
            raise ValueError(
                f"core must be ({rank},) or ({rank}, {rank}), got {tuple(self.core.shape)} in "
                f"{self.name}"
            )

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """``(up, down)``."""
        return self.up, self.down

    @property
    def short(self) -> tuple[int, int]:
        """The axes of the rank, along which shards are not to be cut."""
        return 1, 0

    @property
    def rank(self) -> int:
        """Columns of ``up``, which are the rows of ``down``."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the update: ``(m, n)``."""
        return self.up.shape[0], self.down.shape[1:].numel()

    def delta(self) -> Tensor:
        """The update of the weight, ``scale * up @ down`` or with the core, shape (m, n)."""
        up, core = self.up.flatten(1), self.core
        if core is not None:
            up = up * core if core.ndim == 1 else up @ core
        return self.scale * (up @ self.down.flatten(1))


def lora_pairs(model: nn.Module) -> list[ParameterPair]:
    """Trainable factor pairs of a model: of PEFT's LoRA layers, attached forms, and own modules.

    Layers are recognized by their type, never by the names of their parameters: PEFT's LoRA layers
    on linear maps (GPT-2's transposed ones too), embeddings, convolutions and attention, with all
    their adapters that require a gradient, the products in forms that
    :func:`~lowrank_sp.torch.attaching.attach` put there, some with a core between the factors, and
    any module with parameters ``up`` and ``down`` and a number ``scale``. Scales are read off the
    layers as they are now, so that rank-stabilized scaling and the patterns of ranks and alphas are
    respected.

    Wrap or shard the model first: the pairs refer to its parameters as they are.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    list of ParameterPair
        Where one factor is frozen, the pair is among them; where both are, it is not.

    Raises
    ------
    ValueError
        If there is no such pair; or, naming it, if a trainable adapter is not the product of two
        factors: AdaLoRA, KaSA and other variants with something in between, stacks of experts,
        grouped convolutions, tensor-parallel layers of Megatron.

    Examples
    --------
    >>> import torch
    >>> class Adapted(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.base = torch.nn.Linear(6, 4).requires_grad_(False)
    ...         self.up = torch.nn.Parameter(torch.zeros(4, 2))
    ...         self.down = torch.nn.Parameter(torch.randn(2, 6))
    ...         self.scale = 0.5
    >>> [pair] = lora_pairs(torch.nn.Sequential(Adapted()))
    >>> pair.name, pair.shape, pair.rank, pair.scale
    ('0', (4, 6), 2, 0.5)
    """
    pairs = [pair for name, module in model.named_modules() for pair in _pairs_of(name, module)]
    if not pairs:
        raise ValueError(
            f"no trainable factor pair in {type(model).__name__}; add an adapter or make one "
            "active, or describe the pairs yourself: ParameterPair(name, up, down, scale)"
        )
    return pairs


def _pairs_of(name: str, module: nn.Module) -> Iterator[ParameterPair]:
    # A model of PEFT's exists only where PEFT has been imported.
    peft: Any = sys.modules.get("peft")
    if peft is not None and isinstance(module, peft.tuners.lora.LoraLayer):
        yield from _pairs_of_peft(name, module)
        return
    if isinstance(module, Arrays):
        products = list(module.products())
        place = name.removesuffix(".adapter")
        for first, (up, *core, down), scale in products:
            if _trainable(up, down):
                full_name = place if len(products) == 1 else f"{place}.{first}"
                yield ParameterPair(full_name, up, down, scale, *core)
        return
    up: Any = getattr(module, "up", None)
    down: Any = getattr(module, "down", None)
    scale = getattr(module, "scale", None)
    if _trainable(up, down) and isinstance(scale, (int, float)):
        yield ParameterPair(name, up, down, float(scale))


def _pairs_of_peft(name: str, layer: Any) -> Iterator[ParameterPair]:
    factors = {k: (layer.lora_B[k], layer.lora_A[k]) for k in layer.lora_A}
    factors |= {k: (layer.lora_embedding_B[k], b) for k, b in layer.lora_embedding_A.items()}
    for adapter, pair in factors.items():
        up, down = (getattr(factor, "weight", factor) for factor in pair)
        if _trainable(up, down):
            full_name = f"{name}.{adapter}"
            if kind := unlike_a_product(layer, adapter):
                raise ValueError(f"{full_name} is {kind}, not a product of two factors; freeze it")
            yield ParameterPair(full_name, up, down, float(layer.scaling[adapter]))


def unlike_a_product(layer: Any, adapter: str) -> str | None:
    """What an adapter of PEFT's is, when it is not ``up @ down``."""
    peft: Any = sys.modules["peft"]
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and not type(variant).__name__.startswith(_PLAIN_VARIANTS):
        return f"a {type(variant).__name__}"
    if isinstance(layer, peft.tuners.adalora.AdaLoraLayer):
        return "AdaLoRA"
    if getattr(layer, "num_experts", 1) > 1:
        return f"a stack of {layer.num_experts} experts"
    if getattr(layer.get_base_layer(), "groups", 1) > 1:
        return "a grouped convolution"
    if isinstance(layer, peft.tuners.lora.tp_layer.LoraParallelLinear):
        return "a slice of a tensor-parallel layer"
    return None


def _trainable(up: Any, down: Any) -> bool:
    """Whether both are parameters, and one of them at least is to be trained."""
    both = isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter)
    return both and (up.requires_grad or down.requires_grad)
