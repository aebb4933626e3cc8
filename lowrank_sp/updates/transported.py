"""Rules whose moments are matrices that move with the factors: LoRA-RITE and LoFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lowrank_sp._arrays import Array, adjoint, is_complex, namespace
from lowrank_sp.updates.frames import combined, frames, left_times, times
from lowrank_sp.updates.moments import weight_of
from lowrank_sp.updates.rule import Gauge, Pair, Rule, Scalar, State, counter, over, where
from lowrank_sp.updates.slots import descend


@dataclass(frozen=True)
class LoRARite(Rule):
    r"""LoRA-RITE :cite:p:`yen2025lorarite`: adaptive matrix preconditioning in orthonormal frames.

    With ``B = Q_B R_B``, the gradient of ``A`` is measured in the frame of ``B``,
    ``u = nabla_A^H R_B^{-1} / s = G^H Q_B``, which no gauge can magnify. Its ``r x r`` second
    moment and the momentum move along as the frame turns by ``P = Q_B^H Q_B'``:

    .. math::
        V \leftarrow \beta_2 P V P^H + (1 - \beta_2)\, u^H u / n, \quad
        M \leftarrow \beta_1 M P^H + (1 - \beta_1)\, u\, (V + e I)^{-1/2}, \quad
        A^H \leftarrow A^H - \eta\, M R_B^{-H} / s

    and ``up`` likewise, in the frame of ``down``. ``e`` counts what of ``V`` the turns have lost,
    so that a direction that comes up anew does not begin with a large step. The decays are
    corrected so that the first step has full weight.

    Parameters
    ----------
    lr : float
        The adapter moves by about ``lr`` in root mean square over the frame, whatever the gradient.
    betas : (float, float)
    eps : float
        Added to the square roots of the eigenvalues of ``V``, in units of the gradient.
    weight_decay : float

    Notes
    -----
    ``O((m + n) r^2)``; state ``2 (m + n) r + 2 r^2``. Frames are found from Gram matrices instead
    of QR factorizations; both are determined up to a rotation, which cancels. The clipping of the
    published code is a wrapper here, :class:`~lowrank_sp.updates.wrappers.Clip`.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0

    @property
    def invariance(self) -> Gauge:
        return Gauge.GENERAL

    def _init(self, factors: Pair) -> State:
        xp = namespace(factors.up)
        square = xp.zeros_like(adjoint(factors.up[..., :1, :]) @ factors.up[..., :1, :])
        return {
            "step": counter(factors),
            "up_basis": xp.zeros_like(factors.up),
            "down_basis": xp.zeros_like(factors.down),
            "up_mean": xp.zeros_like(factors.up),
            "down_mean": xp.zeros_like(adjoint(factors.down)),
            "up_square": square,
            "down_square": square,
            "up_escaped": abs(square[..., 0, 0]),
            "down_escaped": abs(square[..., 0, 0]),
        }

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        xp = namespace(factors.up)
        of_up, of_down = frames(factors)
        q_up = times(factors.up, of_up.inverse)
        q_down = left_times(adjoint(of_down.inverse), factors.down)
        step = state["step"] + 1
        count = over(xp.astype(step, abs(q_up).dtype))
        decays = tuple(b * weight_of(b, count - 1) / weight_of(b, count) for b in self.betas)
        up_turn = adjoint(q_up) @ state["up_basis"]
        down_turn = q_down @ adjoint(state["down_basis"])
        up, up_kept = self._side(
            times(grads.up, of_down.inverse / scale), down_turn, _history("up", state), decays
        )
        down, down_kept = self._side(
            times(adjoint(grads.down), of_up.inverse / scale),
            up_turn,
            _history("down", state),
            decays,
        )
        up = times(up, adjoint(of_down.inverse / scale))
        down = adjoint(times(down, adjoint(of_up.inverse / scale)))
        new = Pair(
            descend(factors.up, up, lr, self.weight_decay),
            descend(factors.down, down, lr, self.weight_decay),
        )
        return new, {
            "step": step,
            "up_basis": q_up,
            "down_basis": q_down,
            **{f"up_{name}": x for name, x in up_kept._asdict().items()},
            **{f"down_{name}": x for name, x in down_kept._asdict().items()},
        }

    def _side(
        self, u: Array, turn: Array, old: _History, decays: tuple[Array, ...]
    ) -> tuple[Array, _History]:
        """Direction in the frame of the other factor, and history of one factor, as a block."""
        first, second = decays
        turned = turn @ old.square @ adjoint(turn)
        escaped = second * (old.escaped[..., None, None] + _loss(old.square, turned))
        square = second * turned + (1 - second) * (adjoint(u) @ u / u.shape[-2])
        fresh = times(u, _inverse_root(square, escaped, self.eps))
        mean = combined(first, times(old.mean, adjoint(turn)), 1 - first, fresh)
        return mean, _History(mean, square, escaped[..., 0, 0])


class _History(NamedTuple):
    """What a factor, seen as a tall block, remembers in the frame of the other one."""

    mean: Array
    square: Array
    escaped: Array


def _history(side: str, state: State) -> _History:
    return _History(*(state[f"{side}_{name}"] for name in _History._fields))


def _loss(old: Array, turned: Array) -> Array:
    """What of a second moment is lost by a turn: the lesser of two measures, ``(..., 1, 1)``."""
    xp = namespace(old)
    gaps = xp.linalg.eigvalsh(old) - xp.linalg.eigvalsh((turned + adjoint(turned)) / 2)
    lost = xp.minimum(xp.max(gaps, axis=-1), xp.sum(gaps, axis=-1))
    return xp.where(lost > 0, lost, xp.zeros_like(lost))[..., None, None]


def _inverse_root(p: Array, shift: Array, eps: float) -> Array:
    """``((p + shift I)^(1/2) + eps I)^(-1)`` of a positive semidefinite matrix."""
    xp = namespace(p)
    values, vectors = xp.linalg.eigh((p + adjoint(p)) / 2)
    values = xp.where(values > 0, values, xp.zeros_like(values)) + shift[..., 0]
    sizes = values**0.5 + eps
    return (vectors / sizes[..., None, :]) @ adjoint(vectors)


@dataclass(frozen=True)
class LoFT(Rule):
    r"""LoFT :cite:p:`tastan2026loft`: Adam of the full weight, seen through one factor at a time.

    Of the gradient, ``down`` sees ``P_B G = Q_B u`` and ``up`` sees ``G P_A``. A mean of ``u`` is
    kept, and an ``r x r`` mean of ``u_j u_j^H`` for each column ``j``; both turn with the frame.
    From them follow the mean ``F`` and the mean square ``v`` of every entry of ``P_B G``, and
    ``F / (sqrt(v) + eps)`` is pulled back to ``down``. ``up`` likewise; the two take turns, ``up``
    first, while the moments of both follow each gradient.

    Parameters
    ----------
    lr : float
        In units of Adam's step on ``W``.
    betas : (float, float)
    eps : float
    weight_decay : float
        Times ``lr``, on the factor that moves. (The published code leaves ``lr`` out.)

    Notes
    -----
    ``O(m n r^2)``; state ``2 (m + n) r + (m + n) r^2``. The published code transposes the maps that
    transport the squares, and is not invariant for that; this rule is.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-4
    weight_decay: float = 0.0

    @property
    def invariance(self) -> Gauge:
        return Gauge.GENERAL

    def _init(self, factors: Pair) -> State:
        xp = namespace(factors.up)
        up, down = xp.zeros_like(factors.up), xp.zeros_like(factors.down)
        return {
            "step": counter(factors),
            "up_mean": up,
            "down_mean": down,
            "up_square": _outer(up),
            "down_square": _outer(down.mT),
            "up_basis": up,
            "down_basis": down,
        }

    def _update(
        self, factors: Pair, grads: Pair, state: State, *, scale: Scalar, lr: Scalar
    ) -> tuple[Pair, State]:
        up, down = factors
        of_up, of_down = frames(factors)
        q_up, q_down = times(up, of_up.inverse), left_times(adjoint(of_down.inverse), down)
        step = state["step"] + 1
        # Each factor as a tall block, with the frame of the other and how that has turned.
        up_step, up_mean, up_square = self._side(
            times(grads.up, of_down.inverse / scale),
            adjoint(q_down),
            q_down @ adjoint(state["down_basis"]),
            state["up_mean"],
            state["up_square"],
            step,
        )
        down_step, down_mean, down_square = self._side(
            times(adjoint(grads.down), of_up.inverse / scale),
            q_up,
            adjoint(q_up) @ state["up_basis"],
            adjoint(state["down_mean"]),
            state["down_square"],
            step,
        )
        up_step = times(up_step, adjoint(of_down.inverse / scale))
        down_step = adjoint(times(down_step, adjoint(of_up.inverse / scale)))
        ups = state["step"] % 2 == 0
        new = Pair(
            where(ups, descend(up, up_step, lr, self.weight_decay), up),
            where(ups, down, descend(down, down_step, lr, self.weight_decay)),
        )
        return new, {
            "step": step,
            "up_mean": up_mean,
            "down_mean": adjoint(down_mean),
            "up_square": up_square,
            "down_square": down_square,
            "up_basis": q_up,
            "down_basis": q_down,
        }

    def _side(
        self, u: Array, basis: Array, turn: Array, mean: Array, square: Array, step: Array
    ) -> tuple[Array, Array, Array]:
        """Direction in the frame of the other factor, mean and squares of one factor."""
        xp = namespace(u)
        first, second = self.betas
        count = over(xp.astype(step, abs(u).dtype))
        mean = first * (mean @ adjoint(turn)) + (1 - first) * u
        # Rows turn by u -> u turn^H, so their squares u^T conj(u) by conj(turn) and turn^T.
        left = adjoint(turn).mT[..., None, :, :]
        square = second * (left @ square @ adjoint(left)) + (1 - second) * _outer(u)
        full = mean @ adjoint(basis)
        # Entry (i, j) of u basis^H is the product of row i and the conjugate of a row of basis.
        size = _quadratic(square, adjoint(basis).mT).mT
        size = (xp.where(size > 0, size, xp.zeros_like(size)) / weight_of(second, count)) ** 0.5
        adapted = full / (weight_of(first, count) * (size + self.eps))
        return adapted @ basis, mean, square


def _outer(rows: Array) -> Array:
    """``x_i^T conj(x_i)`` for the rows ``x_i`` of ``(..., k, r)``, of shape ``(..., k, r, r)``."""
    return rows[..., None] * adjoint(rows[..., None])


def _quadratic(squares: Array, rows: Array) -> Array:
    """``x_i P_j x_i^H`` for matrices ``P_j (..., k, r, r)`` and rows ``x_i``, ``(..., l, k)``."""
    xp = namespace(rows)
    left = _outer(rows)
    left = xp.reshape(left, (*left.shape[:-2], -1))
    full = left @ xp.reshape(squares, (*squares.shape[:-2], -1)).mT
    return xp.real(full) if is_complex(full.dtype) else full
