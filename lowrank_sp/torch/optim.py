"""One optimizer for all update rules: factor pairs by a rule, other parameters by AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from lowrank_sp.torch.base import BatchedOptimizer, as_groups, check_rule, name_of
from lowrank_sp.torch.batches import Batch, replicating
from lowrank_sp.torch.host import in_memory, share, torch_on_one_thread, with_numpy
from lowrank_sp.torch.pairs import ParameterPair
from lowrank_sp.updates.rule import Rule


class FactorOptimizer(BatchedOptimizer[ParameterPair]):
    """Train factor pairs by an update rule, and all other parameters by AdamW.

    Pairs of one shape are moved as one batch; on CPUs in portions that fit the cache, several at a
    time, and the rule sees NumPy's arrays, whose calls cost least. The mathematics is done in at
    least float32; of factors in half precision a float32 copy is kept in the state, so that small
    steps add up. Sharded factors (DTensor, as FSDP2 makes them) stay sharded: the ranks exchange
    ``r x r`` sums, and ``down`` once, which FSDP2 cuts along the rank.

    Parameters
    ----------
    pairs : iterable of ParameterPair, or of dict
        From :func:`lora_pairs`. A dict ``{"pairs": ..., "lr": ...}`` makes a group with a learning
        rate of its own.
    rule : Rule
        How the pairs move; ``rule.lr`` is the learning rate of groups that name none. Learning-rate
        schedulers change the one in ``param_groups``.
    others : iterable of Parameter, or of dict
        Parameters for AdamW, in groups with its options, as ``torch.optim.AdamW`` takes them; it
        may be ``model.parameters()``, since factors of the pairs and parameters that need no
        gradient are passed over.
    compile : bool
        Whether ``torch.compile`` translates the rule; worth it on GPUs.

    Raises
    ------
    TypeError
        If the rule is a class, or one for :class:`ProjectedOptimizer`.
    ValueError
        If there is no pair, if two pairs share a factor, if a factor is frozen under a rule that
        only moves both (``rule.joint``), or if a core stands between the factors under a rule for
        products (not ``rule.factorwise``); the message names the pair.

    Notes
    -----
    A step in which any gradient is infinite or NaN is skipped as a whole: no parameter and no state
    changes, and :attr:`skipped` counts it. On accelerators the check waits for the gradients once
    per step, as that of ``torch.amp.GradScaler`` does, which works with this optimizer as well.

    The state of a pair is a flat dict of tensors under its ``up``, so that ``state_dict`` can be
    saved with ``torch.save``, read with ``torch.load(weights_only=True)``, and resharded by
    ``torch.distributed.checkpoint``. A resumed run follows the same path.

    Examples
    --------
    >>> import torch
    >>> from lowrank_sp.torch import FactorOptimizer, ParameterPair
    >>> from lowrank_sp.updates import ScaledGD
    >>> target = torch.outer(torch.arange(4.0), torch.ones(3))
    >>> up, down = torch.nn.Parameter(torch.ones(4, 1)), torch.nn.Parameter(torch.ones(1, 3))
    >>> optimizer = FactorOptimizer([ParameterPair("w", up, down)], ScaledGD(lr=0.5))
    >>> for _ in range(40):
    ...     optimizer.zero_grad()
    ...     ((up @ down - target) ** 2).sum().div(2).backward()
    ...     optimizer.step()
    >>> torch.allclose(up @ down, target)
    True
    """

    key = "pairs"

    def __init__(
        self,
        pairs: Iterable[ParameterPair] | Iterable[dict[str, Any]],
        rule: Rule,
        *,
        others: Iterable[nn.Parameter] | Iterable[dict[str, Any]] = (),
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        check_rule(rule, Rule)
        groups = as_groups(pairs, "pairs")
        if not any(group["pairs"] for group in groups):
            raise ValueError("FactorOptimizer needs at least one pair; see lora_pairs(model)")
        self._compiled = compile
        move = rule.step if compile else with_numpy(rule.step)
        super().__init__(groups, rule, others=others, move=move, compile=compile)

    @torch.no_grad()
    def settle(self) -> None:
        """Put into the parameters what was trained: to be called before they are saved or tested.

        Rules for flat minima ask for gradients beside the factors, and leave them there between two
        steps; see :meth:`~lowrank_sp.updates.rule.Rule.settle`. Nothing changes under other rules.
        """
        for pair in chain.from_iterable(self._items):
            if pair.up in self.state:
                up, down = (factor.flatten(1) for factor in pair.factors)
                for factor, x in zip(
                    pair.factors, self.rule.settle(up, down, self.state[pair.up]), strict=True
                ):
                    factor.copy_(x.reshape(factor.shape))

    def _finite(self) -> bool:
        # Other threads would spin beside those of the steps, and have little to read.
        with torch_on_one_thread():
            return super()._finite()

    def _step_batches(self, todo: Sequence[Batch[ParameterPair]], lr: float) -> None:
        if self._compiled or not all(in_memory(batch.items[0].up) for batch in todo):
            super()._step_batches(todo, lr)
        else:
            share([partial(self._step_batch, batch, lr) for batch in todo])

    def _step_batch(self, batch: Batch[ParameterPair], lr: float) -> None:
        grads = batch.gradients()
        if self.rule.joint and any(grad is None for grad in grads):
            raise ValueError(_joint(self.rule, batch.items[0]))
        up, down = batch.factors()
        with replicating(up):
            state = batch.state() if batch.started else self.rule.init(up, down)
            up, down, state = self._move(up, down, *grads, state, scale=batch.scale, lr=lr)
            batch.put((up, down), state)

    def _check(self, item: ParameterPair, known: dict[nn.Parameter, ParameterPair]) -> None:
        super()._check(item, known)
        if item.core is not None and not self.rule.factorwise:
            raise ValueError(
                f"{name_of(self.rule)} moves a product of two factors, and {item.name} has a core "
                "between them; take StelLA, PoLAR or AdamW, or give its parameters to others only"
            )
        if self.rule.joint and not all(factor.requires_grad for factor in item.factors):
            raise ValueError(_joint(self.rule, item))

    def _twice(self, first: ParameterPair, second: ParameterPair) -> str:
        return (
            f"a factor may belong to one pair, got one in {first.name} and in {second.name}; "
            "untie the adapters, or give the tied ones to others"
        )


def _joint(rule: Rule, pair: ParameterPair) -> str:
    return (
        f"{name_of(rule)} moves both factors together, but one has no gradient in "
        f"{pair.name}; freeze a factor under a rule such as ScaledGD or AdamW"
    )
