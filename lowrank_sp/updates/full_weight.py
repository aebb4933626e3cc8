"""Rules on one full weight whose history lies in a subspace: the protocol, and GaLore."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lowrank_sp._arrays import (
    Array,
    adjoint,
    as_compute,
    device,
    from_host,
    is_array,
    namespace,
    real_dtype,
    to_host,
)
from lowrank_sp.factors import check_rank
from lowrank_sp.updates.moments import Adam, Moments, named, part
from lowrank_sp.updates.projector import (
    Every,
    Subspace,
    check_angle,
    leading_subspace,
    overlap,
)
from lowrank_sp.updates.rule import Scalar, State, over, rounded, where


class Choice(NamedTuple):
    """What :meth:`ProjectedRule.choose` found, for every weight of a batch.

    Attributes
    ----------
    basis : array, shape (..., s, r)
    angle : array, shape (...)
        Bound of the sine of its angle to the leading subspace; 1 where there is none.
    due : array of bool, shape (...)
        Where a subspace was looked for.
    kept : array of bool, shape (...)
        Where the old one stays, because the gradient is zero.
    """

    basis: Array
    angle: Array
    due: Array
    kept: Array


@dataclass(frozen=True)
class ProjectedRule(ABC):
    r"""An update rule on a weight ``W (..., m, n)`` that remembers gradients in a subspace.

    With an orthonormal ``P (s, r)`` on the shorter side of the gradient, ``s = min(m, n)``, and its
    longer side ``l``, the moments see ``R = P^H G`` for ``m < n``, and ``R = P^H G^H`` otherwise:
    ``r l`` numbers in the place of ``m n``.

    A rule is a frozen dataclass of hyper-parameters with pure functions of arrays of any library,
    as :class:`~lowrank_sp.updates.rule.Rule` is for factor pairs: leading axes are batch axes, and
    the state is a flat dict of arrays that have them. :meth:`step` is :meth:`choose` and
    :meth:`renew` where a new subspace is due, and :meth:`move`. The first of these works on the
    host; the others can be compiled and take sharded arrays.

    Parameters
    ----------
    rank : int
        In ``1..min(m, n)``.
    lr : float
    scale : float
        Factor of the direction, beside the learning rate.
    when : Every
        When to renew the subspace.
    moments : Moments
        Of the coordinates ``R``.
    weight_decay : float
        The weight shrinks by ``1 - lr weight_decay`` each step.
    seed : int
        Together with the index of the weight and the number of renewals it seeds all draws.

    Notes
    -----
    State of a weight, in numbers: ``s r`` of the basis, and that of the moments, ``2 l r`` under
    Adam. Besides ``"basis"`` it holds ``"age"``, the steps since the renewal; ``"interval"``, those
    until the next; ``"renewals"``; ``"kept"``, how often the old subspace stayed because the
    gradient was zero, which is tried again at the next step; ``"angle"``, the certified sine of the
    angle between ``P`` and the leading subspace of the gradient that it was chosen from.
    """

    rank: int = 128
    lr: float = 1e-3
    scale: float = 1.0
    when: Every = field(default_factory=Every)
    moments: Moments = field(default_factory=Adam)
    weight_decay: float = 0.0
    seed: int = 0

    def init(self, weight: Array, *, index: Any = 0, count: int = 1) -> State:
        """State before the first step.

        Parameters
        ----------
        weight : array, shape (..., m, n)
        index : int, or integer array of shape (...)
            Which one this is of ``count`` weights. Their renewals are spread evenly over the
            steps, and their random draws differ.
        count : int
        """
        w = short_first(as_compute(weight))
        xp = namespace(w)
        s, long = w.shape[-2:]
        check_rank(self.rank, s, (s, long))
        batch, place = w.shape[:-2], {"device": device(w)}
        zero = xp.zeros(batch, dtype=xp.int32, **place)
        index = zero + (xp.astype(index, xp.int32) if is_array(index) else index)
        basis = xp.zeros((*batch, s, self.rank), dtype=w.dtype, **place)
        # By a product, so that shards are laid out as those of the coordinates of gradients.
        coordinates = xp.zeros_like(adjoint(basis) @ w)
        return {
            "step": zero,
            "age": zero + self.when.gap * index // count,
            "interval": zero + self.when.gap,
            "renewals": zero,
            "kept": zero,
            "index": index,
            "angle": xp.ones(batch, dtype=real_dtype(xp, w.dtype), **place),
            **self._stored(basis),
            **named("moment", self.moments.init(coordinates)),
            **self.when.init(coordinates),
        }

    def step(
        self, weight: Array, grad: Array, state: State, *, lr: Scalar = None
    ) -> tuple[Array, State]:
        """One step.

        Parameters
        ----------
        weight : array, shape (..., m, n)
        grad : array, shape (..., m, n)
            Gradient of the loss with respect to ``weight``.
        state : dict of arrays
            From :meth:`init` or the step before.
        lr : float, or array of shape (...), optional
            Learning rate of this step in the place of ``self.lr``.

        Returns
        -------
        (array, dict of arrays)
            New weight in the dtype of the old one, and new state.
        """
        w, due = as_compute(weight), self.due(state)
        if namespace(due).any(due):
            w, state = self.renew(w, self.choose(grad, state), state)
        w, state = self.move(w, grad, state, lr=lr)
        return rounded(w, weight), state

    def due(self, state: State) -> Array:
        """Whether the subspace is to be renewed before the next step, shape (...)."""
        return (state["renewals"] == 0) | self.when.due(state)

    def choose(self, grad: Array, state: State) -> Choice:
        """New subspaces where they are due; the values of ``grad`` are read on the host.

        Parameters
        ----------
        grad : array, shape (..., m, n)
        state : dict of arrays
        """
        g = short_first(as_compute(grad))
        xp = namespace(g)
        due = to_host(xp.asarray(self.due(state)))
        index, renewals = (to_host(xp.asarray(state[name])) for name in ("index", "renewals"))
        angles = np.array(to_host(xp.asarray(state["angle"])))
        kept = np.zeros(due.shape, dtype=bool)
        olds, bases = self._basis(state), []
        for i in np.ndindex(due.shape):
            old = olds[(*i, ...)]
            if due[i]:
                rng = np.random.default_rng([self.seed, int(index[i]), int(renewals[i])])
                found = self._look(g[(*i, ...)], old if renewals[i] else None, rng)
                old, angles[i], kept[i] = found.basis, found.angle, found.zero
            bases.append(old)
        basis = xp.reshape(xp.stack(bases), olds.shape)
        return Choice(
            basis,
            # A copy to some devices makes a list of one of a single number.
            xp.reshape(from_host(angles, g), due.shape),
            self.due(state),
            xp.reshape(from_host(kept, g, xp.bool), due.shape),
        )

    def renew(self, weight: Array, choice: Choice, state: State) -> tuple[Array, State]:
        """Weight and state with the subspaces of :meth:`choose`.

        Parameters
        ----------
        weight : array, shape (..., m, n)
        choice : Choice
        state : dict of arrays
        """
        xp = namespace(choice.basis)
        new = choice.due & ~choice.kept
        again = new & (state["renewals"] > 0)
        stored = self._stored(choice.basis)
        turn = adjoint(self._basis(stored)) @ self._basis(state)
        changes = {"age": xp.zeros_like(state["age"]), **self.when.renewed(overlap(turn), state)}
        changes |= named("moment", self._turned(part("moment", state), turn))
        return weight, {
            **state,
            **{name: where(again, x, state[name]) for name, x in changes.items()},
            **{name: where(new, x, state[name]) for name, x in stored.items()},
            "angle": where(new, choice.angle, state["angle"]),
            "renewals": state["renewals"] + xp.astype(new, xp.int32),
            "kept": state["kept"] + xp.astype(choice.due & choice.kept, xp.int32),
        }

    def move(
        self, weight: Array, grad: Array, state: State, *, lr: Scalar = None
    ) -> tuple[Array, State]:
        """The step in the subspace at hand; takes and returns what :meth:`step` does."""
        w, g = as_compute(weight), short_first(as_compute(grad))
        lr = over(self.lr if lr is None else lr)
        basis = self._basis(state)
        coordinates = adjoint(basis) @ g
        step = state["step"] + 1
        adapted, history = self.moments.turn(coordinates, part("moment", state), step)
        direction, more = self._direction(g, basis, coordinates, adapted, state)
        if w.shape[-2] >= w.shape[-1]:
            direction = adjoint(direction)
        kept = w if self.weight_decay == 0 else (1 - lr * self.weight_decay) * w
        return self._kept(kept - lr * self.scale * direction, weight, state), {
            **state,
            "step": step,
            "age": state["age"] + 1,
            **named("moment", history),
            **self.when.watch(coordinates, g, state),
            **more,
        }

    def _stored(self, basis: Array) -> State:
        """How a basis is kept in the state, under names that begin with ``basis``."""
        return {"basis": basis}

    def _basis(self, state: State) -> Array:
        """The basis that is kept in a state."""
        return state["basis"]

    def _kept(self, new: Array, weight: Array, state: State) -> Array:  # noqa: ARG002
        """The new weight as it is kept, in the dtype of the old one."""
        return rounded(new, weight)

    def _turned(self, history: State, turn: Array) -> State:  # noqa: ARG002
        """What the moments keep where the basis turns by ``turn = P_new^H P_old``."""
        return history

    @abstractmethod
    def _look(self, g: Array, old: Array | None, rng: np.random.Generator) -> Subspace:
        """A subspace for one gradient ``(s, l)``, given the one before."""

    @abstractmethod
    def _direction(
        self, g: Array, basis: Array, coordinates: Array, adapted: Array, state: State
    ) -> tuple[Array, State]:
        """What to descend along, ``(..., s, l)``, and what to change in the state."""


@dataclass(frozen=True)
class GaLore(ProjectedRule):
    r"""GaLore :cite:p:`zhao2024galore`: Adam on the gradient, seen in its leading subspace.

    .. math:: W \leftarrow W - \eta \alpha\, P\, \mathrm{Adam}(P^H G) \qquad (m < n)

    and likewise from the right for ``m >= n``. ``P`` spans the leading singular vectors of the
    gradient at the renewal, to a certified angle, started from the last one.

    Parameters
    ----------
    rank, lr, scale, when, moments, weight_decay, seed
        As in :class:`ProjectedRule`; ``scale`` is :math:`\alpha`.
    tol : float
        Sine of the angle to which the subspace is found, where there is a gap.
    transport : bool
        Whether moments turn with the basis, by ``T = P_new^H P_old``: means by ``T``, and squares
        by the squares of its entries, which keeps their sum if the subspace stays. The published
        code leaves them as they are, in coordinates that have changed their meaning.

    Notes
    -----
    ``4 m n r`` flops a step; a renewal costs two to five times that, where a full SVD costs
    ``O(m n s)``. Lotus :cite:p:`miao2026lotus` is this rule with ``when``
    :class:`~lowrank_sp.updates.projector.Displacement`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> target = rng.standard_normal((8, 2)) @ rng.standard_normal((2, 20))
    >>> rule = GaLore(rank=2, lr=0.1, scale=1.0)
    >>> weight = np.zeros((8, 20))
    >>> state = rule.init(weight)
    >>> for _ in range(300):
    ...     weight, state = rule.step(weight, weight - target, state)
    >>> bool(np.linalg.norm(weight - target) < 1e-2 * np.linalg.norm(target))
    True
    >>> sum(x.size for name, x in state.items() if name.startswith("moment")), weight.size
    (80, 160)
    """

    scale: float = 0.25
    tol: float = 1e-2
    transport: bool = True

    def __post_init__(self) -> None:
        check_angle(self.tol)

    def _turned(self, history: State, turn: Array) -> State:
        return self.moments.transport(history, turn) if self.transport else history

    def _look(self, g: Array, old: Array | None, rng: np.random.Generator) -> Subspace:
        return leading_subspace(g, self.rank, init=old, tol=self.tol, rng=rng)

    def _direction(
        self,
        g: Array,  # noqa: ARG002
        basis: Array,
        coordinates: Array,  # noqa: ARG002
        adapted: Array,
        state: State,  # noqa: ARG002
    ) -> tuple[Array, State]:
        return basis @ adapted, {}


def short_first(x: Array) -> Array:
    """``x`` or its adjoint, whichever has no more rows than columns; square is turned."""
    return x if x.shape[-2] < x.shape[-1] else adjoint(x)


def norm_of(x: Array) -> Array:
    """Frobenius norms, shape (...)."""
    return namespace(x).sum(abs(x) ** 2, axis=(-2, -1)) ** 0.5
