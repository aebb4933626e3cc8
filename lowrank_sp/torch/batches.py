"""Pairs of one kind as one batch: factors, gradients and states are stacked, and put back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_sp.torch.pairs import ParameterPair

#: The states of an optimizer, by parameter.
States = dict[Any, dict[str, Any]]
#: Bytes of the factors of one batch on a CPU, so that all that belongs to it stays in cache.
_BATCH_BYTES = 2**21
#: Under these names a state holds float32 copies of factors in half precision.
_EXACT = ("up_float32", "down_float32")
_YES = torch.ones(())


@dataclass(frozen=True)
class Batch:
    """Pairs alike in shape, dtype, device, sharding, scale, what is frozen, and having a state."""

    pairs: Sequence[ParameterPair]
    states: States

    @property
    def scale(self) -> float:
        """The scale of all pairs."""
        return self.pairs[0].scale

    @property
    def started(self) -> bool:
        """Whether the pairs have a state."""
        return self.pairs[0].up in self.states

    def factors(self) -> tuple[Tensor, Tensor]:
        """``up (k, m, r)`` and ``down (k, r, n)``, in at least float32."""
        ups = [self._exact(pair, pair.up, _EXACT[0]) for pair in self.pairs]
        downs = [self._exact(pair, pair.down, _EXACT[1]) for pair in self.pairs]
        return _stack(ups, short=1), _stack(downs, short=0)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of :meth:`factors`; None for a factor that is frozen."""
        ups, downs = [p.up.grad for p in self.pairs], [p.down.grad for p in self.pairs]
        return (
            None if ups[0] is None else _stack(ups, short=1),
            None if downs[0] is None else _stack(downs, short=0),
        )

    def state(self) -> dict[str, Tensor]:
        """What the rule remembers of the pairs."""
        states = [self.states[pair.up] for pair in self.pairs]
        names = [name for name in states[0] if name not in _EXACT]
        return {name: _together([state[name] for state in states]) for name in names}

    def put(self, up: Tensor, down: Tensor, state: dict[str, Tensor]) -> None:
        """Write new factors into the parameters, and keep the new state."""
        kept = {name: _whole(x).unbind() for name, x in state.items()}
        for name, new in zip(_EXACT, (up, down), strict=True):
            if self.pairs[0].up.dtype != new.dtype:
                kept[name] = _whole(new).unbind()
        for i, (pair, new_up, new_down) in enumerate(
            zip(self.pairs, up.unbind(), down.unbind(), strict=True)
        ):
            for factor, new in ((pair.up, new_up), (pair.down, new_down)):
                factor.copy_(new.reshape(factor.shape))
            if kept:
                self.states[pair.up] = {name: x[i] for name, x in kept.items()}
                # Tools for checkpoints want a state of every parameter.
                self.states[pair.down] = {"is_with_up": _YES}

    def _exact(self, pair: ParameterPair, factor: nn.Parameter, name: str) -> Tensor:
        rounded = factor.float() if factor.dtype.itemsize < 4 else factor
        exact = self.states[pair.up].get(name) if self.started else None
        if exact is None:
            return rounded
        # Where somebody else has written to the parameter, the copy is out of date.
        return torch.where(exact.to(factor.dtype) == factor.flatten(1), exact, rounded.flatten(1))


def batches(pairs: Iterable[ParameterPair], states: States) -> Iterator[Batch]:
    """Batches of the pairs that have a gradient."""
    alike: dict[Any, list[ParameterPair]] = defaultdict(list)
    for pair in pairs:
        if any(factor.grad is not None for factor in pair.factors):
            alike[pair.scale, pair.up in states, *map(_kind, pair.factors)].append(pair)
    for same in alike.values():
        up, down = same[0].factors
        size = (up.numel() + down.numel()) * up.element_size()
        portion = max(1, _BATCH_BYTES // size) if up.device.type == "cpu" else len(same)
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


def replicating(x: Tensor) -> AbstractContextManager[None]:
    """Where ``x`` is sharded, a context in which constants count as present on every rank."""
    if not _sharded(x):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def _kind(factor: Any) -> tuple[Any, ...]:
    layout = (factor.device_mesh, factor.placements) if _sharded(factor) else ()
    return factor.shape, factor.dtype, factor.device, factor.grad is None, layout


def _stack(tensors: Sequence[Any], *, short: int) -> Tensor:
    """A batch of matrices; shards are cut across the axis that is not ``short``, the rank."""
    return torch.stack([_cut_lengthwise(x.flatten(1), short) for x in tensors])


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
