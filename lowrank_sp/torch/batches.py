"""Parameters of one kind as one batch: they, gradients and states are stacked, and put back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

#: The states of an optimizer, by parameter.
States = dict[Any, dict[str, Any]]
#: Bytes of the parameters of one batch on a CPU, so that all that belongs to it stays in cache.
_BATCH_BYTES = 2**21
#: The same on an accelerator, where a batch costs its copy.
_BATCH_BYTES_ACCELERATOR = 2**28
_YES = torch.ones(())


class Item(Protocol):
    """Matrices that a rule moves together: the two factors of a pair, or one weight.

    Attributes
    ----------
    name : str
    roles : tuple of str
        What the rule calls the matrices.
    short : tuple of int
        The axis of each along which shards are not to be cut.
    """

    roles: ClassVar[tuple[str, ...]]

    @property
    def name(self) -> str: ...
    @property
    def short(self) -> tuple[int, ...]: ...
    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """The matrices; the state is kept under the first."""
        ...

    @property
    def scale(self) -> float:
        """What the rule needs to know of all of a batch."""
        ...


AnyItem = TypeVar("AnyItem", bound=Item)


@dataclass(frozen=True)
class Batch(Generic[AnyItem]):
    """Items alike in shape, dtype, device, sharding, scale, what is frozen, and having a state."""

    items: Sequence[AnyItem]
    states: States

    @property
    def scale(self) -> float:
        """The scale of all items."""
        return self.items[0].scale

    @property
    def started(self) -> bool:
        """Whether the items have a state."""
        return self.items[0].factors[0] in self.states

    def factors(self) -> tuple[Tensor, ...]:
        """The matrices of each role, stacked, in at least float32."""
        return tuple(
            self._stack([self._exact(item, k) for item in self.items], k)
            for k in range(len(self.items[0].roles))
        )

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of :meth:`factors`; None for what is frozen."""
        found = []
        for k in range(len(self.items[0].roles)):
            grads = [item.factors[k].grad for item in self.items]
            found.append(None if grads[0] is None else self._stack(grads, k))
        return tuple(found)

    def state(self) -> dict[str, Tensor]:
        """What the rule remembers of the items."""
        states = [self.states[item.factors[0]] for item in self.items]
        copies = [_exact_name(role) for role in self.items[0].roles]
        names = [name for name in states[0] if name not in copies]
        return {name: _together([state[name] for state in states]) for name in names}

    def put(self, new: Sequence[Tensor], state: dict[str, Tensor]) -> None:
        """Write new matrices into the parameters, and keep the new state."""
        kept = {name: _whole(x).unbind() for name, x in state.items()}
        for role, x in zip(self.items[0].roles, new, strict=True):
            if self.items[0].factors[0].dtype != x.dtype:
                kept[_exact_name(role)] = _whole(x).unbind()
        for i, item in enumerate(self.items):
            for factor, x in zip(item.factors, new, strict=True):
                factor.copy_(x[i].reshape(factor.shape))
            if kept:
                first, *others = item.factors
                self.states[first] = {name: x[i] for name, x in kept.items()}
                # Tools for checkpoints want a state of every parameter.
                for other in others:
                    self.states[other] = {f"is_with_{item.roles[0]}": _YES}

    def _stack(self, tensors: Sequence[Any], k: int) -> Tensor:
        """A batch of matrices of one role; shards are cut across the axis that is not short."""
        cut = [_cut_lengthwise(x.flatten(1), self.items[0].short[k]) for x in tensors]
        # A weight may be large, and no rule keeps it; factors are kept by some in their state.
        alone = len(cut) == 1 and len(self.items[0].roles) == 1
        return cut[0].unsqueeze(0) if alone else torch.stack(cut)

    def _exact(self, item: AnyItem, k: int) -> Tensor:
        factor = item.factors[k]
        rounded = factor.float() if factor.dtype.itemsize < 4 else factor
        name = _exact_name(item.roles[k])
        exact = self.states[item.factors[0]].get(name) if self.started else None
        if exact is None:
            return rounded
        # Where somebody else has written to the parameter, the copy is out of date.
        return torch.where(exact.to(factor.dtype) == factor.flatten(1), exact, rounded.flatten(1))


def _exact_name(role: str) -> str:
    """Under this name a state holds the float32 copy of a matrix in half precision."""
    return f"{role}_float32"


def batches(items: Iterable[AnyItem], states: States) -> Iterator[Batch[AnyItem]]:
    """Batches of the items that have a gradient."""
    alike: dict[Any, list[AnyItem]] = defaultdict(list)
    for item in items:
        if any(factor.grad is not None for factor in item.factors):
            alike[item.scale, item.factors[0] in states, *map(_kind, item.factors)].append(item)
    for same in alike.values():
        factors = same[0].factors
        size = sum(factor.numel() * factor.element_size() for factor in factors)
        on_cpu = factors[0].device.type == "cpu"
        portion = max(1, (_BATCH_BYTES if on_cpu else _BATCH_BYTES_ACCELERATOR) // size)
        for start in range(0, len(same), portion):
            yield Batch(same[start : start + portion], states)


def all_finite(tensors: Sequence[Any]) -> bool:
    """Whether no entry of any tensor is NaN or infinite, by one sum over each.

    Ranks that share a sharded tensor agree, after one exchange of the sums.
    """
    sums: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        local = tensor.to_local() if _sharded(tensor) else tensor
        # Half precision would overflow in the sum of finite entries.
        total = local.sum(dtype=torch.promote_types(local.dtype, torch.float32))
        sums[tensor.device_mesh if _sharded(tensor) else tensor.device].append(total)
    totals = [_over_ranks(place, torch.stack(found)) for place, found in sums.items()]
    return all(bool(total.isfinite().all()) for total in totals)


def _over_ranks(place: Any, totals: Tensor) -> Tensor:
    if isinstance(place, torch.device):
        return totals
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(totals, place, [Partial()] * place.ndim).full_tensor()


def gathered(x: Any) -> Tensor:
    """``x`` as a whole on every rank."""
    return x.full_tensor() if _sharded(x) else x


def replicating(x: Tensor) -> AbstractContextManager[None]:
    """Where ``x`` is sharded, a context in which constants count as present on every rank."""
    if not _sharded(x):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def _kind(factor: Any) -> tuple[Any, ...]:
    layout = (factor.device_mesh, factor.placements) if _sharded(factor) else ()
    return factor.shape, factor.dtype, factor.device, factor.grad is None, layout


def _together(parts: Sequence[Tensor]) -> Tensor:
    """A batch of the parts; without a copy, where they are all of what a step has left behind."""
    whole = parts[0]._base
    if whole is None or whole.shape != (len(parts), *parts[0].shape):
        return torch.stack(list(parts))
    untouched = all(x._base is whole and _same(x, whole[i]) for i, x in enumerate(parts))
    return whole if untouched else torch.stack(list(parts))


def _same(x: Tensor, y: Tensor) -> bool:
    return x.storage_offset() == y.storage_offset() and x.stride() == y.stride()


def _cut_lengthwise(x: Any, short: int) -> Tensor:
    if not _sharded(x):
        return x
    from torch.distributed.tensor import Shard

    long = [Shard(1 - short) if place.is_shard(short) else place for place in x.placements]
    return x.redistribute(placements=long)


def _whole(x: Any) -> Tensor:
    """``x``, with sums over ranks that are still open carried out."""
    if not _sharded(x) or not any(place.is_partial() for place in x.placements):
        return x
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if place.is_partial() else place for place in x.placements]
    return x.redistribute(placements=whole)


def _sharded(x: Any) -> bool:
    return hasattr(x, "placements")
