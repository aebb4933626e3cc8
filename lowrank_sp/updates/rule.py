"""What an update rule is: hyper-parameters, a state of plain arrays, and one pure step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lowrank_sp._arrays import Array, as_compute, compiling, device, is_array, namespace

#: Named arrays, each with the leading axes of the factors.
State = dict[str, Array]
#: A number, or an array of one number for every pair of a batch.
Scalar = Any


class Pair(NamedTuple):
    """Two arrays that belong together: factors, their gradients, or steps of both.

    ``up`` has shape ``(..., m, r)`` and ``down`` has shape ``(..., r, n)``.
    """

    up: Array
    down: Array


class Gauge(Enum):
    """Changes of gauge ``(up @ x, inv(x) @ down)`` that leave a path of products as it is."""

    GENERAL = "every invertible x"
    UNITARY = "unitary x"
    NONE = "none"


class Rule(ABC):
    """An update rule on the factor pair of ``W = W_0 + scale * up @ down``.

    A rule is a frozen dataclass of hyper-parameters with two pure functions, :meth:`init` and
    :meth:`step`. They take arrays of any library, and leading axes are batch axes: pairs of one
    shape are stacked and moved at once.

    Attributes
    ----------
    lr : float
        Learning rate. :meth:`step` takes another one as an argument, so that schedules, traced by
        a compiler or not, need no new rule.
    invariance : Gauge
        What the rule promises; :func:`~lowrank_sp.updates.conformance.conformance` measures it.
    joint : bool
    factorwise : bool
        Whether the factors may be those of ``scale * up @ core @ down``: each moves by its own
        gradient.

    Notes
    -----
    To write a rule, define ``_update``, and ``_init`` where it keeps a state; see the
    :doc:`guide </updates>`. What every rule promises:

    - *State*: a flat dict of arrays, each with the leading axes of the factors, in the compute
      dtype; safe to save, to stack and to hand to ``jax.jit``. ``state["step"]`` counts the steps
      taken, in int32, where a rule needs to know.
    - *Precision*: the mathematics is done in at least float32, and the new factors are rounded to
      the dtype of the old ones once. Whoever trains in half precision keeps float32 factors and
      copies them, since small steps are lost otherwise.
    - *Frozen factors*: a factor whose gradient is None stays as it is. ``joint`` rules refuse.
    - *Cold start*: ``up`` or ``down`` may be zero or rank deficient. A rule that inverts a Gram
      matrix takes the pseudo-inverse, so a factor does not move along directions in which the other
      factor has no extent. With ``up = 0``, the usual start, the first step therefore moves ``up``
      alone, by the step that the Gram matrix of ``down`` prescribes. A rule that changes the gauge
      leaves a pair alone whose product is rank deficient, since no balanced gauge exists there.
    - *Gradients that are not finite* give a step that is not finite. Wrap the rule in
      :class:`~lowrank_sp.updates.wrappers.SkipNonFinite` to have such steps skipped and counted.
    """

    lr: float

    #: Whether nothing is made of ``up @ down``, so that a core may stand between the factors.
    factorwise: ClassVar[bool] = False

    @property
    def joint(self) -> bool:
        """Whether the two factors only move together, so that neither can be frozen."""
        return False

    @property
    @abstractmethod
    def invariance(self) -> Gauge:
        """Changes of gauge that leave the path of ``up @ down`` as it is."""

    def init(self, up: Array, down: Array) -> State:
        """State before the first step.

        Parameters
        ----------
        up : array, shape (..., m, r)
        down : array, shape (..., r, n)
        """
        return self._init(Pair(as_compute(up), as_compute(down)))

    def step(
        self,
        up: Array,
        down: Array,
        grad_up: Array | None,
        grad_down: Array | None,
        state: State,
        *,
        scale: Scalar = 1.0,
        lr: Scalar = None,
    ) -> tuple[Array, Array, State]:
        """One step.

        Parameters
        ----------
        up : array, shape (..., m, r)
        down : array, shape (..., r, n)
        grad_up, grad_down : array, or None for a factor that is frozen
            Gradients of the loss with respect to ``up`` and ``down``: ``scale * G @ down^H`` and
            ``scale * up^H @ G`` for a gradient ``G`` with respect to ``W``.
        state : dict of arrays
            From :meth:`init` or the step before.
        scale : float, or array of shape (...)
            The factor between ``up @ down`` and the change of ``W``.
        lr : float, or array of shape (...), optional
            Learning rate of this step in the place of ``self.lr``.

        Returns
        -------
        (array, array, dict of arrays)
            New ``up`` and ``down`` in the dtypes of the old ones, and the new state.
        """
        frozen = [name for name, g in (("grad_up", grad_up), ("grad_down", grad_down)) if g is None]
        if frozen and self.joint:
            raise ValueError(
                f"{type(self).__name__} moves both factors together, got {frozen[0]} = None; "
                "freeze a factor under a rule such as ScaledGD or AdamW"
            )
        factors = Pair(as_compute(up), as_compute(down))
        grads = Pair(_gradient(grad_up, factors.up), _gradient(grad_down, factors.down))
        lr = self.lr if lr is None else lr
        new, state = self._update(factors, grads, state, scale=over(scale), lr=over(lr))
        return (
            up if grad_up is None else rounded(new.up, up),
            down if grad_down is None else rounded(new.down, down),
            state,
        )

    def settle(self, up: Array, down: Array, state: State) -> tuple[Array, Array]:  # noqa: ARG002
        """The factors to keep when training ends.

        They are ``up`` and ``down``, but for rules that have gradients taken beside the factors,
        such as :class:`~lowrank_sp.updates.flatness.SAM`.
        """
        return up, down

    def _init(self, factors: Pair) -> State:  # noqa: ARG002
        return {}

    @abstractmethod
    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        """The step, on arrays in the compute dtype; ``scale`` and ``lr`` broadcast to factors."""


def over(x: Scalar) -> Scalar:
    """A number for every pair of a batch, shaped to multiply their factors."""
    return x[..., None, None] if is_array(x) and x.ndim > 0 else x


def where(condition: Array, x: Array, y: Array) -> Array:
    """``x`` or ``y`` for every pair of a batch."""
    if isinstance(condition, np.ndarray) and condition.all() == condition.any():
        return x if condition.all() else y
    xp = namespace(x)
    shape = (*condition.shape, *(1 for _ in range(x.ndim - condition.ndim)))
    return xp.where(xp.reshape(condition, shape), x, y)


def nowhere(condition: Array) -> bool:
    """Whether a condition is known to hold for no pair of a batch; a traced one is not known."""
    if compiling():
        return False
    try:
        return not bool(namespace(condition).any(condition))
    except TypeError:
        return False


def counter(factors: Pair) -> Array:
    """A step counter at zero, one for every pair of a batch."""
    xp = namespace(factors.up)
    return xp.zeros(factors.up.shape[:-2], dtype=xp.int32, device=device(factors.up))


def _gradient(grad: Array | None, factor: Array) -> Array:
    return namespace(factor).zeros_like(factor) if grad is None else as_compute(grad)


def rounded(new: Array, old: Array) -> Array:
    """``new`` in the dtype of ``old``."""
    return new if new.dtype == old.dtype else namespace(new).astype(new, old.dtype)
