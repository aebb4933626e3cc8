"""
Update rules on an ill-conditioned problem
==========================================

One matrix of rank 3 and condition 20 is to be found from Gaussian measurements, by the update rules
that also train LoRA adapters, twice: from balanced factors, and from the same matrix in a bad
gauge. Rules that are invariant take the same path both times.
"""

# %%
# The problem
# -----------

import matplotlib.pyplot as plt
import numpy as np

import lowrank_sp as lr
from lowrank_sp import updates
from lowrank_sp.inverse import sensing, synthetic

p = synthetic.sensing(shape=(24, 20), rank=3, oversampling=5, condition=20, rng=0)
measurement = p.measurement.stored()
start = sensing.scaled_gd(measurement, p.data, rank=3, rng=0, stop=lr.Stop(max_iter=0)).value
up, down = start.split("balanced").factors()

rng = np.random.default_rng(0)
left, right = (np.linalg.qr(rng.standard_normal((3, 3)))[0] for _ in range(2))
stretch = np.array([0.1, 1.0, 10.0])
gauge, inverse = (left * stretch) @ right, (right.T / stretch) @ left.T

starts = {"balanced start": (up, down), "bad gauge": (up @ gauge, inverse @ down)}
same = np.linalg.norm(up @ down - up @ gauge @ inverse @ down) / np.linalg.norm(up @ down)
print(f"both starts are the same matrix to {same:.0e}")

# %%
# The rules
# ---------
#
# Each with a learning rate that was chosen out of four for the balanced start. Rules whose steps
# have a fixed size, as those of Adam have, let it fall to zero along a cosine; ``step`` takes the
# learning rate as an argument.

steps = 150
size = float(start.s[0])
plain = updates.Plain()
rules = {
    "GradientDescent": (updates.GradientDescent(lr=1 / size), False),
    "AdamW": (updates.AdamW(lr=0.1, weight_decay=0.0), True),
    "LoRAPlus": (updates.LoRAPlus(lr=0.1, ratio=4), True),
    "ScaledAdamW": (updates.ScaledAdamW(lr=0.1), True),
    "RefLoRA": (updates.RefLoRA(lr=0.1), True),
    "ScaledGD": (updates.ScaledGD(lr=0.6, damping=0.0), False),
    "RiemannianGD": (updates.RiemannianGD(lr=0.6), False),
    "LoRAPro": (updates.LoRAPro(lr=0.6, moments=plain), False),
    "AltLoRA": (updates.AltLoRA(lr=0.9, beta=0.5), False),
    "LoRARite": (updates.LoRARite(lr=0.5), True),
    "LoRAMuon": (updates.LoRAMuon(lr=2.0), True),
    "LoFT": (updates.LoFT(lr=0.2), True),
}


def errors(rule, factor, falls, up, down):
    """Relative error after each step."""
    state, path = rule.init(up, down), []
    with np.errstate(all="ignore"):
        for k in range(steps):
            residual = measurement.forward(up @ down) - p.data
            g = measurement.adjoint(residual).to_dense()
            rate = factor * rule.lr * (0.5 + 0.5 * np.cos(np.pi * k / steps) if falls else 1.0)
            new_up, new_down, state = rule.step(up, down, g @ down.T, up.T @ g, state, lr=rate)
            if not (np.all(np.isfinite(new_up)) and np.linalg.norm(new_up @ new_down) < 1e6):
                break
            up, down = new_up, new_down
            path.append(lr.relative_error(up @ down, p.truth))
    return path + [np.nan] * (steps - len(path))


def last(path):
    """What a path ends with; infinite if it diverged."""
    return path[-1] if np.isfinite(path[-1]) else np.inf


curves = {}
for name, (rule, falls) in rules.items():
    best = min((0.1, 0.3, 1.0, 2.0), key=lambda c: last(errors(rule, c, falls, up, down)))
    curves[name] = {where: errors(rule, best, falls, *factors) for where, factors in starts.items()}

# %%
# Invariant rules do not see the gauge
# ------------------------------------
#
# Solid lines are rules that promise invariance under every change of gauge, dashed ones do not. On
# the right, gradient descent diverges with the rate that was best on the left, and the rules with
# Adam's division by entries follow other paths. The first-order rules in the tangent space converge
# at a rate that the condition of the matrix does not slow down.

fig, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
colors = plt.get_cmap("tab20").colors
for color, (name, paths) in zip(colors, curves.items(), strict=False):
    general = rules[name][0].invariance is updates.Gauge.GENERAL
    for ax, (where, path) in zip(axes, paths.items(), strict=True):
        ax.plot(path, "-" if general else "--", color=color, label=name, linewidth=1.6)
        ax.set(title=where, xlabel="step", yscale="log")
axes[0].set(ylabel="relative error", ylim=(1e-10, 3))
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)

# %%
# The largest difference between the errors of both paths:

for name, paths in curves.items():
    one, other = (np.array(path) for path in paths.values())
    drift = np.max(abs(one - other))
    invariant = rules[name][0].invariance is updates.Gauge.GENERAL
    print(f"{name:16s} {'invariant' if invariant else '':10s} {drift:.0e}")
