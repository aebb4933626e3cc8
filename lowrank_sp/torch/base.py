"""What the optimizers share: batches moved by a rule, other parameters by AdamW, safe states."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lowrank_sp.torch.batches import AnyItem, Batch, all_finite, batches
from lowrank_sp.updates.full_weight import ProjectedRule
from lowrank_sp.updates.rule import Rule

#: What ``torch.optim.AdamW`` takes by default.
_ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
_OPTIMIZERS = {Rule: "FactorOptimizer", ProjectedRule: "ProjectedOptimizer"}


class BatchedOptimizer(torch.optim.Optimizer, ABC, Generic[AnyItem]):
    """Items moved in batches by one rule, and all other parameters by AdamW.

    Parameters
    ----------
    groups : list of dict
        Groups of items under :attr:`key`, with a learning rate where they have one of their own.
    rule : Rule or ProjectedRule
    others : iterable of Parameter, or of dict
    move : callable
        The function of the rule to call, or to compile.
    compile : bool
    """

    #: Groups have their items under this name.
    key: ClassVar[str]

    def __init__(
        self,
        groups: list[dict[str, Any]],
        rule: Any,
        *,
        others: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        move: Callable[..., Any],
        compile: bool,  # noqa: A002  (torch's word)
    ) -> None:
        self.rule = rule
        self._move: Callable[..., Any] = _compiled(move) if compile else move
        self._items: list[list[AnyItem]] = []
        super().__init__(groups, {"lr": rule.lr})
        for group in as_groups(others, "params"):
            self.add_param_group(group)

    @property
    def skipped(self) -> int:
        """Steps that were skipped, because a gradient was not finite."""
        return self.param_groups[0]["skipped"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of items for the rule, or ``{"params": ...}`` for AdamW, with options.

        Parameters
        ----------
        param_group : dict
        """
        group = dict(param_group)
        items: list[AnyItem] = list(group.pop(self.key, ()))
        known = {factor: item for group in self._items for item in group for factor in item.factors}
        for item in items:
            self._check(item, known)
            known |= dict.fromkeys(item.factors, item)
        if "params" in group:
            rest = [p for p in group["params"] if p.requires_grad and p not in known]
            if not rest:
                return
            group = {**_ADAMW, **group, "params": rest, "rule": "AdamW"}
        else:
            factors = [factor for item in items for factor in item.factors]
            group |= {"params": factors, "rule": name_of(self.rule)}
        super().add_param_group({**group, "skipped": 0})
        self._items.append(items)

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
        if not self._finite():
            for group in self.param_groups:
                group["skipped"] += 1
            return loss
        for group, items in zip(self.param_groups, self._items, strict=True):
            if not items:
                self._step_others(group)
            self._step_batches(list(batches(items, self.state)), group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, in the dtypes in which it was saved.

        Parameters
        ----------
        state_dict : dict

        Raises
        ------
        ValueError
            If the state is of another rule, or of a model of other shapes; then nothing changes.
        """
        saved, groups = state_dict["param_groups"], self.param_groups
        for theirs, ours in zip(saved, groups, strict=False):
            if theirs["rule"] != ours["rule"]:
                raise ValueError(
                    f"the state must be of {ours['rule']}, got one of {theirs['rule']}; "
                    "make the optimizer with the rule that was saved"
                )
        ids = list(chain.from_iterable(group["params"] for group in saved))
        parameters = list(chain.from_iterable(group["params"] for group in groups))
        states = dict(zip(parameters, (state_dict["state"].get(i) for i in ids), strict=False))
        self._check_shapes(states)
        super().load_state_dict(state_dict)
        # The base class has rounded all states to the dtypes of the parameters.
        for parameter, state in states.items():
            if state is not None:
                self.state[parameter] = {
                    name: x.to(parameter.device, copy=True) for name, x in state.items()
                }

    def _check_shapes(self, states: dict[nn.Parameter, dict[str, Tensor] | None]) -> None:
        for item in chain.from_iterable(self._items):
            state = states.get(item.factors[0])
            if state is None:
                continue
            blank = (torch.empty(p.shape, dtype=p.dtype, device="meta") for p in item.factors)
            for name, x in self.rule.init(*(p.flatten(1) for p in blank)).items():
                found = tuple(state[name].shape) if name in state else "none"
                if found != tuple(x.shape):
                    raise ValueError(
                        f"the state must have {name} of shape {tuple(x.shape)} for {item.name}, "
                        f"got {found}; load the state that was saved with this model and rule"
                    )
        for p, state in states.items():
            if state is not None and state.get("exp_avg", p).shape != p.shape:
                raise ValueError(
                    f"the state must have exp_avg of shape {tuple(p.shape)}, got "
                    f"{tuple(state['exp_avg'].shape)}; load the state of this model"
                )

    def _check(self, item: AnyItem, known: dict[nn.Parameter, AnyItem]) -> None:
        for factor in item.factors:
            if factor in known:
                raise ValueError(self._twice(known[factor], item))

    @abstractmethod
    def _twice(self, first: AnyItem, second: AnyItem) -> str:
        """What to say about a parameter in two items."""

    def _finite(self) -> bool:
        """Whether no gradient has a NaN or an infinity."""
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        return all_finite([p.grad for p in parameters if p.grad is not None])

    def _step_batches(self, todo: Sequence[Batch[AnyItem]], lr: float) -> None:
        for batch in todo:
            self._step_batch(batch, lr)

    @abstractmethod
    def _step_batch(self, batch: Batch[AnyItem], lr: float) -> None:
        """Move a batch of items."""

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

    def move(*arrays: Any, **numbers: float) -> Any:
        # As tensors, so that one translation serves every schedule and scale.
        wide = partial(torch.tensor, dtype=torch.float64)
        with warnings.catch_warnings():
            # The look-up of array libraries is cached; a cache is no reason for concern.
            warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
            return compiled(*arrays, **{name: wide(x) for name, x in numbers.items()})

    return move


def as_groups(given: Iterable[Any], key: str) -> list[dict[str, Any]]:
    """Groups as they are, or one group of everything."""
    given = list(given)
    groups = given if given and isinstance(given[0], dict) else [{key: given}]
    return [{**group, key: list(group[key])} for group in groups if group[key]]


def check_rule(rule: Any, kind: type) -> None:
    """Raise unless it is a rule of that kind; the error names the optimizer of the other kind."""
    if isinstance(rule, type):
        name = rule.__name__
        raise TypeError(f"rule must be an instance, got the class {name}; pass {name}()")
    if not isinstance(rule, kind):
        made_for = [name for other, name in _OPTIMIZERS.items() if isinstance(rule, other)]
        hint = f"use {made_for[0]}" if made_for else "see lowrank_sp.updates"
        raise TypeError(
            f"{_OPTIMIZERS[kind]} takes a {kind.__name__}, got {type(rule).__name__}; {hint}"
        )


def name_of(rule: Any) -> str:
    """Name of a rule, with the one that it wraps."""
    inner = getattr(rule, "rule", None)
    name = type(rule).__name__
    return name if inner is None else f"{name}({name_of(inner)})"
