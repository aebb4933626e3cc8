"""An optimizer for pre-training: weights by a rule whose history lies in a subspace."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import nn

from lowrank_sp.torch.base import BatchedOptimizer, as_groups, check_rule
from lowrank_sp.torch.batches import Batch, gathered, replicating
from lowrank_sp.updates.full_weight import ProjectedRule
from lowrank_sp.updates.rule import nowhere


@dataclass(frozen=True, eq=False)
class ParameterWeight:
    """One weight of a model.

    Parameters
    ----------
    name : str
        What error messages call it.
    weight : Parameter, shape (m, n)
    index : int
        Its number among the weights of an optimizer.
    """

    name: str
    weight: nn.Parameter
    index: int

    roles: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def scale(self) -> float:
        """1: a weight has none."""
        return 1.0

    @property
    def factors(self) -> tuple[nn.Parameter, ...]:
        """``(weight,)``."""
        return (self.weight,)

    @property
    def short(self) -> tuple[int, ...]:
        """The axis that the subspace lies on: shards are cut along the other, and need no sums."""
        m, n = self.weight.shape
        return (0 if m < n else 1,)


class ProjectedOptimizer(BatchedOptimizer[ParameterWeight]):
    """Train weights by GaLore, Fira, APOLLO or LoQT, and all other parameters by AdamW.

    Parameters
    ----------
    params : iterable of Parameter, of (name, Parameter), or of dict
        Matrices among them are moved by the rule. A dict ``{"params": ..., "lr": ...}`` makes a
        group with a learning rate of its own. All others get AdamW with its default options.
    rule : ProjectedRule
        How the matrices move; ``rule.lr`` is the learning rate of groups that name none.
    others : iterable of Parameter, or of dict
        Parameters for AdamW, in groups with its options, as ``torch.optim.AdamW`` takes them; it
        may be ``model.parameters()``, for matrices of ``params`` are passed over. Embeddings and
        heads are commonly trained so.
    compile : bool
        Whether ``torch.compile`` translates the step between renewals; worth it on GPUs.

    Raises
    ------
    TypeError
        If the rule is a class, or one for :class:`FactorOptimizer`.
    ValueError
        If no matrix is among ``params``, or if the rank is too large for one, which is named.

    Notes
    -----
    Weights of one shape are moved as one batch where they are small. Their subspaces are renewed at
    different steps, spread evenly, so that no step pays for all; the first step does, since none
    has a subspace yet.

    The state of a weight is a flat dict of tensors, safe for ``torch.load(weights_only=True)``. All
    random draws follow from numbers in it, so a resumed run takes the same path bit for bit. Of
    weights in half precision a float32 copy is kept; float32 weights under ``torch.autocast`` need
    less memory.

    Weights sharded by FSDP2 stay sharded: they and their gradients are cut along the longer side
    for the step, which needs no more than the traffic of one shard. Where a subspace is renewed,
    every rank gathers the gradient of that weight.

    Examples
    --------
    >>> import torch
    >>> from lowrank_sp.torch import ProjectedOptimizer
    >>> from lowrank_sp.updates import GaLore
    >>> target = torch.outer(torch.arange(4.0), torch.ones(6))
    >>> layer = torch.nn.Linear(6, 4)
    >>> optimizer = ProjectedOptimizer(layer.named_parameters(), GaLore(rank=1, lr=0.05, scale=1.0))
    >>> for _ in range(200):
    ...     optimizer.zero_grad()
    ...     ((layer.weight - target) ** 2).sum().backward()
    ...     optimizer.step()
    >>> bool(torch.linalg.norm(layer.weight - target) < 2)
    True
    """

    key = "weights"

    def __init__(
        self,
        params: Iterable[Any],
        rule: ProjectedRule,
        *,
        others: Iterable[nn.Parameter] | Iterable[dict[str, Any]] = (),
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        check_rule(rule, ProjectedRule)
        groups, rest = _weights(params)
        if not groups:
            raise ValueError(
                "ProjectedOptimizer needs at least one matrix that requires a gradient; "
                "see torch.optim.AdamW for a model without"
            )
        more = as_groups(others, "params")
        taken = {p for group in more for p in group["params"]}
        more.append({"params": [p for p in rest if p not in taken]})
        super().__init__(groups, rule, others=more, move=rule.move, compile=compile)

    @property
    def kept(self) -> dict[str, int]:
        """How often a weight kept its subspace at a renewal because its gradient was zero.

        By name, for weights to which that happened. It is tried again at each step, until there is
        a gradient.
        """
        counts = {
            item.name: int(self.state[item.weight]["kept"])
            for item in chain.from_iterable(self._items)
            if item.weight in self.state
        }
        return {name: count for name, count in counts.items() if count}

    def _step_batch(self, batch: Batch[ParameterWeight], lr: float) -> None:
        rule: ProjectedRule = self.rule
        (weight,), (grad,) = batch.factors(), batch.gradients()
        with replicating(weight):
            state = batch.state() if batch.started else self._start(batch, weight)
            # What the host reads: the subspaces, and one number of each kind for every weight.
            known = {
                name: gathered(x)
                for name, x in state.items()
                if x.ndim == 1 or name.startswith("basis")
            }
            if not nowhere(rule.due(known)):
                weight, state = rule.renew(weight, rule.choose(gathered(grad), known), state)
            weight, state = self._move(weight, grad, state, lr=lr)
            batch.put((weight,), state)

    def _start(self, batch: Batch[ParameterWeight], weight: torch.Tensor) -> dict[str, Any]:
        index = [item.index for item in batch.items]
        count = sum(len(items) for items in self._items)
        where = torch.tensor(index, dtype=torch.int32, device=weight.device)
        return self.rule.init(weight, index=where, count=count)

    def _check(self, item: ParameterWeight, known: dict[nn.Parameter, ParameterWeight]) -> None:
        super()._check(item, known)
        m, n = item.weight.shape
        if not 1 <= self.rule.rank <= min(m, n):
            raise ValueError(
                f"rank must be in 1..{min(m, n)} for {item.name} of shape {m} x {n}, got "
                f"{self.rule.rank}; take a smaller rank, or give the weight to others only"
            )

    def _twice(self, first: ParameterWeight, second: ParameterWeight) -> str:
        return f"a weight may be given once, got one as {first.name} and as {second.name}"


def _weights(params: Iterable[Any]) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Groups of the matrices among parameters, and the other parameters."""
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    found: list[dict[str, Any]] = []
    rest: list[nn.Parameter] = []
    index = 0
    for group in groups:
        weights = []
        for entry in group["params"]:
            name, p = entry if isinstance(entry, tuple) else (f"weight {index}", entry)
            if p.ndim == 2 and p.requires_grad:
                weights.append(ParameterWeight(name, p, index))
                index += 1
            else:
                rest.append(p)
        options = {name: x for name, x in group.items() if name != "params"}
        if weights:
            found.append({"weights": weights, **options})
    return found, rest
