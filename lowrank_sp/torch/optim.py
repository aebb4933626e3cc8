"""One optimizer for all update rules: factor pairs by a rule, other parameters by AdamW."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from lowrank_sp.torch.batches import Batch, all_finite, batches, replicating
from lowrank_sp.torch.pairs import ParameterPair
from lowrank_sp.updates.rule import Rule

#: What ``torch.optim.AdamW`` takes by default.
_ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


class FactorOptimizer(torch.optim.Optimizer):
    """Train factor pairs by an update rule, and all other parameters by AdamW.

    Pairs of one shape are moved as one batch, on CPUs in portions that fit the cache. The
    mathematics is done in at least float32; of factors in half precision a float32 copy is kept in
    the state, so that small steps add up. Sharded factors (DTensor, as FSDP2 makes them) stay
    sharded: the ranks exchange ``r x r`` sums, and ``down`` once, which FSDP2 cuts along the rank.

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
    ValueError
        If there is no pair, if two pairs share a factor, or if a factor is frozen under a rule that
        only moves both (``rule.joint``); the message names the pair.

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

    def __init__(
        self,
        pairs: Iterable[ParameterPair] | Iterable[dict[str, Any]],
        rule: Rule,
        *,
        others: Iterable[nn.Parameter] | Iterable[dict[str, Any]] = (),
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        self.rule = rule
        self._move: Callable[..., Any] = _compiled(rule.step) if compile else rule.step
        self._pairs: list[list[ParameterPair]] = []
        groups = _groups(pairs, "pairs")
        if not any(group["pairs"] for group in groups):
            raise ValueError("FactorOptimizer needs at least one pair; see lora_pairs(model)")
        super().__init__(groups, {"lr": rule.lr})
        for group in _groups(others, "params"):
            self.add_param_group(group)

    @property
    def skipped(self) -> int:
        """Steps that were skipped, because a gradient was not finite."""
        return self.param_groups[0]["skipped"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add ``{"pairs": ...}`` for the rule or ``{"params": ...}`` for AdamW, with options.

        Parameters
        ----------
        param_group : dict
        """
        group = dict(param_group)
        pairs = list(group.pop("pairs", ()))
        known = {factor: pair for group in self._pairs for pair in group for factor in pair.factors}
        for pair in pairs:
            _check(pair, self.rule, known)
            known |= dict.fromkeys(pair.factors, pair)
        if "params" in group:
            rest = [p for p in group["params"] if p.requires_grad and p not in known]
            if not rest:
                return
            group = {**_ADAMW, **group, "params": rest, "rule": "AdamW"}
        else:
            factors = [factor for pair in pairs for factor in pair.factors]
            group |= {"params": factors, "rule": _name(self.rule)}
        super().add_param_group({**group, "skipped": 0})
        self._pairs.append(pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """Move all parameters that have gradients.

        Parameters
        ----------
        closure : callable, optional
            Clears the gradients, computes them anew, and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        if not all_finite([p.grad for p in parameters if p.grad is not None]):
            for group in self.param_groups:
                group["skipped"] += 1
            return loss
        for group, pairs in zip(self.param_groups, self._pairs, strict=True):
            if not pairs:
                self._step_others(group)
            for batch in batches(pairs, self.state):
                self._step_batch(batch, group["lr"])
        return loss

    @torch.no_grad()
    def settle(self) -> None:
        """Put into the parameters what was trained: to be called before they are saved or tested.

        Rules for flat minima ask for gradients beside the factors, and leave them there between two
        steps; see :meth:`~lowrank_sp.updates.rule.Rule.settle`. Nothing changes under other rules.
        """
        for pair in chain.from_iterable(self._pairs):
            if pair.up in self.state:
                up, down = (factor.flatten(1) for factor in pair.factors)
                for factor, x in zip(
                    pair.factors, self.rule.settle(up, down, self.state[pair.up]), strict=True
                ):
                    factor.copy_(x.reshape(factor.shape))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, in the dtypes in which it was saved.

        Parameters
        ----------
        state_dict : dict
        """
        saved, groups = state_dict["param_groups"], self.param_groups
        for theirs, ours in zip(saved, groups, strict=False):
            if theirs["rule"] != ours["rule"]:
                raise ValueError(
                    f"the state must be of {ours['rule']}, got one of {theirs['rule']}; "
                    "make the optimizer with the rule that was saved"
                )
        super().load_state_dict(state_dict)
        # The base class has rounded all states to the dtypes of the parameters.
        ids = chain.from_iterable(group["params"] for group in saved)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for i, parameter in zip(ids, parameters, strict=True):
            if i in state_dict["state"]:
                self.state[parameter] = {
                    name: x.to(parameter.device, copy=True)
                    for name, x in state_dict["state"][i].items()
                }

    def _step_batch(self, batch: Batch, lr: float) -> None:
        grads = batch.gradients()
        if self.rule.joint and any(grad is None for grad in grads):
            raise ValueError(_joint(self.rule, batch.pairs[0]))
        up, down = batch.factors()
        with replicating(up):
            state = batch.state() if batch.started else self.rule.init(up, down)
            up, down, state = self._move(up, down, *grads, state, scale=batch.scale, lr=lr)
            batch.put(up, down, state)

    def _step_others(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            if p not in self.state:
                zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                step = torch.zeros((), dtype=torch.float32)
                self.state[p] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _compiled(step: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(step)

    def move(*arrays: Any, scale: float, lr: float) -> Any:
        # As tensors, so that one translation serves every schedule and scale.
        wide = partial(torch.tensor, dtype=torch.float64)
        with warnings.catch_warnings():
            # The look-up of array libraries is cached; a cache is no reason for concern.
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            return compiled(*arrays, scale=wide(scale), lr=wide(lr))

    return move


def _groups(given: Iterable[Any], key: str) -> list[dict[str, Any]]:
    """Groups as they are, or one group of everything."""
    given = list(given)
    groups = given if given and isinstance(given[0], dict) else [{key: given}]
    return [{**group, key: list(group[key])} for group in groups if group[key]]


def _check(pair: ParameterPair, rule: Rule, known: dict[nn.Parameter, ParameterPair]) -> None:
    for factor in pair.factors:
        if factor in known:
            raise ValueError(
                f"a factor may belong to one pair, got one in {known[factor].name} and in "
                f"{pair.name}; untie the adapters, or give the tied ones to others"
            )
    if rule.joint and not all(factor.requires_grad for factor in pair.factors):
        raise ValueError(_joint(rule, pair))


def _name(rule: Rule) -> str:
    """Name of a rule, with the one that it wraps."""
    inner = getattr(rule, "rule", None)
    name = type(rule).__name__
    return name if inner is None else f"{name}({_name(inner)})"


def _joint(rule: Rule, pair: ParameterPair) -> str:
    return (
        f"{_name(rule)} moves both factors together, but one has no gradient in "
        f"{pair.name}; freeze a factor under a rule such as ScaledGD or AdamW"
    )
