"""
The updates of all layers as one tensor
=======================================

LoTR, FacT, LoRTA, MetaTT: adapters that train one tensor for all layers instead of a product for
each. They differ in the format of the core that a layer has between the factors that all share.
Here the updates of a model are given, as trained LoRA would leave them, and fitted in each of the
formats: what do they lose, for how many numbers?
"""

# %%
# A model of which the updates are known
# --------------------------------------
#
# Six layers like MiniLM's, at half its width, with updates of rank 8 of four matrices each. Two
# thirds of their energy lie in one pair of subspaces for all layers, with cores that drift from
# layer to layer; the last third is private.

import math

import matplotlib.pyplot as plt
import numpy as np

from lowrank_sp import LowRank, Stop
from lowrank_sp.adapters import forms
from lowrank_sp.adapters.forms import LayerGrid

rng = np.random.default_rng(0)
d, rank, layers, types = 192, 8, 6, 4
up, down = (np.linalg.qr(rng.standard_normal((d, 12)))[0] for _ in range(2))


def private(part):
    """An update of rank 8 of Frobenius norm ``part``."""
    f = LowRank(rng.standard_normal((d, rank)), rng.standard_normal((rank, d)))
    return f * (part / float(f.norm()))


by_type = rng.standard_normal((types, 12, rank))
by_layer = rng.standard_normal((2, rank, 12))
deltas, places = [], []
for layer in range(layers):
    mixed = by_layer[0] + layer / layers * by_layer[1]
    for kind in range(types):
        shared = LowRank(up @ by_type[kind], mixed @ down.T)
        whole = shared * (math.sqrt(2 / 3) / float(shared.norm())) + private(math.sqrt(1 / 3))
        deltas.append(whole.svd(rank=rank).split())
        places.append((kind, layer))
size = math.sqrt(sum(float(w.norm()) ** 2 for w in deltas))
print(len(deltas), "updates:", deltas[0])

# %%
# One grid says where the weights stand
# -------------------------------------
#
# A weight has a position on every axis of the tensor: here its type and its layer. With a single
# axis, all weights in a row, a train has a free core for each, which is LoTR and FacT-TT; on two
# axes it is MetaTT. With heads of the outputs as a third axis, a CP decomposition is LoRTA's.

row = LayerGrid.numbered(deltas)
pairs = LayerGrid.indexed(deltas, places)
heads = LayerGrid.indexed(deltas, places, block=(d // 12, d))
for grid in (row, pairs, heads):
    print("blocks of", grid.block, "on axes of", grid.sizes)

WAYS = {
    "free cores (LoTR, FacT-TT)": (forms.fit_shared_tt, row, (2, 4, 8, 12, 24)),
    "mixed cores (FacT-TK)": (forms.fit_shared_tucker, row, (4, 12)),
    "train (MetaTT)": (forms.fit_shared_tt, pairs, (4, 8, 12, 24)),
    "CP with heads (LoRTA)": (forms.fit_shared_cp, heads, (4, 16, 48)),
}
results = {}
for name, (fit, grid, ranks) in WAYS.items():
    fits = [fit(deltas, k, grid=grid, rng=0, stop=Stop(20)).value for k in ranks]
    results[name] = [(form.num_trainable, error / size) for form, error in fits]

spectra = np.array([np.asarray(w.svd().s) for w in deltas])
alone = [
    (k * 2 * d * len(deltas), math.sqrt(float(np.sum(spectra[:, k:] ** 2))) / size)
    for k in range(1, rank)
]

fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
axes[0].plot(*zip(*alone, strict=True), "o-", color="0.4", label="LoRA of each layer")
for name, points in results.items():
    axes[0].plot(*zip(*points, strict=True), "o-", label=name)
axes[0].set(xscale="log", xlabel="trained numbers", ylabel="relative error", ylim=(0, 1.02))
axes[0].legend(frameon=False, fontsize=8)

# %%
# Formats that share reach the common part with a fraction of the numbers of separate products, and
# then hardly go on: what is private to a weight is out of their reach, whatever the format of the
# core. A CP decomposition has diagonal cores, which cannot mix the common directions anew in every
# weight; on updates like these it takes many more terms.
#
# A sweep of ranks
# ----------------
#
# The bonds of a train are trimmed by truncated SVDs, one bond after the other, and the error is
# known. Training would go on from there, at a smaller rank.

full = forms.fit_shared_tt(deltas, 24, grid=pairs, rng=0).value.form
sweep = [forms.truncate_shared_tt(full, k) for k in (24, 20, 16, 12, 8, 4)]
ranks = [form.up.shape[1] for form, _ in sweep]
axes[1].plot(ranks, [error / size for _, error in sweep], "o-", color="C2")
axes[1].set(xlabel="largest bond", xticks=ranks, ylabel="relative change")
axes[1].set(title="a train of bond 24, trimmed")
axes[1].invert_xaxis()

# %%
# Every layer of the result is plain LoRA, exactly, whenever a file for other libraries is needed:

lora = full.layer(7).to_lora()
print(lora.form, "with error", lora.error)
