"""
What a round of federated averaging loses
=========================================

Eight clients have data for one linear layer, each with a target of its own, and train adapters of
rank 4 on them. After every round a server aggregates. The methods of
:mod:`lowrank_sp.adapters.federated` differ in what the mean of the updates becomes; each reports
the distance from it.
"""

# %%
# Clients
# -------
#
# The target of a client is a common matrix of rank 4 and a private one of rank 1. The loss of a
# client is the squared distance from its target; that of all is least at the mean of the targets,
# of which an adapter of rank 4 can only have the larger part.

import matplotlib.pyplot as plt
import numpy as np

import lowrank_sp as lr
from lowrank_sp.adapters import federated
from lowrank_sp.adapters.forms import Product

m, n, r, count = 60, 50, 4, 8
rng = np.random.default_rng(0)


def normal(*shape):
    """Gaussian columns of unit length, about."""
    return rng.standard_normal(shape) / shape[0] ** 0.5


common = normal(m, r) @ (
    np.array([[4.0], [3.0], [2.0], [1.0]]) * rng.standard_normal((r, n)) / n**0.5
)
targets = [common + 2.0 * normal(m, 1) @ rng.standard_normal((1, n)) / n**0.5 for _ in range(count)]
mean = sum(targets) / count
least = lr.relative_error(lr.truncated_svd(mean, r), mean)
print(f"relative distance of the best matrix of rank {r} from the mean: {least:.3f}")


def trained(adapter, base, target, frozen, steps, rate=0.15):
    """An adapter after some steps of gradient descent on its client's loss."""
    up, down = adapter.up, adapter.down
    for _ in range(steps):
        gap = base + adapter.scale * up @ down - target
        up_step, down_step = gap @ down.T, up.T @ gap
        up = up if frozen == "up" else up - rate * up_step
        down = down if frozen == "down" else down - rate * down_step
    return Product(up, down, adapter.scale)


# %%
# Rounds
# ------
#
# Every client trains the adapter that it got, on the base weight that it has, and sends it back.
# After FLoRA all begin with a new adapter, whose ``down`` is drawn anew.

methods = {
    "FedIT": federated.fedit,
    "LoRA-FAIR": federated.lora_fair,
    "FLoRA-NA": lambda clients: federated.flora_na(clients, rng=0),
    "FFA-LoRA": federated.ffa,
    "RoLoRA": federated.rolora,
    "FedEx-LoRA": federated.fedex,
    "FLoRA": federated.flora,
}


def run(name, steps, rounds=40):
    """Relative error of every aggregation, and distance of the weight from the mean target."""
    draws = np.random.default_rng(1)

    def fresh():
        return Product(np.zeros((m, r)), draws.standard_normal((r, n)) / n**0.5)

    adapter, base, errors, distances = fresh(), np.zeros((m, n)), [], []
    for k in range(rounds):
        frozen = {"FFA-LoRA": "down", "RoLoRA": ("down", "up")[k % 2]}.get(name)
        clients = [trained(adapter, base, target, frozen, steps) for target in targets]
        options = {"frozen": frozen} if name == "RoLoRA" else {}
        aggregate = methods[name](clients, **options)
        weight = base + aggregate.update().to_dense()
        errors.append(aggregate.error / federated.flora(clients).update().norm())
        distances.append(np.linalg.norm(weight - mean) / np.linalg.norm(mean))
        if aggregate.correction is not None:
            base = base + aggregate.correction.to_dense()
        adapter = aggregate.adapter or fresh()
    return errors, distances


fig, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
colors = {name: f"C{k}" for k, name in enumerate(methods)}
final = {}
for ax, steps in zip(axes[1:], (5, 20), strict=True):
    for name, color in colors.items():
        errors, distances = run(name, steps)
        final[name, steps] = distances[-1]
        ax.semilogy(distances, color=color, label=name)
        if steps == 20:
            axes[0].plot(errors, color=color)
    ax.axhline(least, color="0.7", zorder=0)
    ax.set(xlabel="round", title=f"distance from the mean, {steps} local steps", ylim=(0.03, 1.2))
axes[0].set(xlabel="round", title="bias of a round, 20 local steps", ylabel="relative to $D^*$")
axes[0].legend(*axes[1].get_legend_handles_labels(), frameon=False, fontsize="small", loc="center")

# %%
# The bias of a round grows with the local steps, over which the clients move apart; that of five
# steps is below one percent. Of the three adapters of rank 4 that are handed back, the best one is
# hardly better than the means here: most of the bias is what no matrix of rank 4 can hold. The
# others have none.
#
# The grey line is the distance of the best matrix of rank 4, which is all that an adapter can reach
# on a fixed base. RoLoRA gets there with either number of steps, while the biased methods stop
# above it. FFA-LoRA is exact, and stuck: it is confined to the rows of the ``down`` that was drawn
# at the start. FedEx-LoRA and FLoRA move the base, so that ranks add up over the rounds, and with
# few steps FedEx-LoRA passes the line. Exact aggregation is no cure for clients that drift,
# however: with twenty steps each of them fits its own target, and the mean of these fits is not the
# fit of the mean.

for name in methods:
    print(f"{name:12s} {final[name, 5]:.3f} {final[name, 20]:.3f}")
assert abs(final["RoLoRA", 5] - least) < 1e-3
