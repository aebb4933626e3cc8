"""Forms of one update as tensor trains and gates, and forms that layers share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from form_cases import SHAPE, Case
from form_cases_peft import drawn_factors, mixtures

from lowrank_sp.adapters import forms
from lowrank_sp.adapters.forms import LayerGrid

M, N = SHAPE


def parts(a, field):
    """The arrays of a field that holds a tuple."""
    return [a[f"{field}.{k}"] for k in range(sum(name.startswith(f"{field}.") for name in a))]


def entries(cores):
    """All entries of a tensor train, one by one."""
    shape = [c.shape[1] for c in cores]
    found = np.zeros(shape)
    for index in np.ndindex(*shape):
        row = np.ones((1, 1))
        for core, i in zip(cores, index, strict=True):
            row = row @ core[:, i, :]
        found[index] = row[0, 0]
    return found


def tensor_train(a, _):
    inputs, outputs = parts(a, "inputs"), parts(a, "outputs")
    n = np.prod([c.shape[1] for c in inputs])
    return 3.0 * entries([*inputs, *outputs]).reshape(n, -1).T


def train_matrix(a, _):
    cores = parts(a, "cores")
    rows, columns = [c.shape[1] for c in cores], [c.shape[2] for c in cores]
    update = np.zeros((np.prod(rows), np.prod(columns)))
    for i in np.ndindex(*rows):
        for j in np.ndindex(*columns):
            row = np.ones((1, 1))
            for core, p, q in zip(cores, i, j, strict=True):
                row = row @ core[:, p, q, :]
            update[np.ravel_multi_index(i, rows), np.ravel_multi_index(j, columns)] = row[0, 0]
    return 3.0 * update


def train_factors(scale):
    def naive(a, _):
        downs, ups = parts(a, "downs"), parts(a, "ups")
        rank = ups[0].shape[1]
        down_t, up_t = entries(downs).reshape(-1, rank), entries(ups).reshape(rank, -1)
        return scale * (down_t @ up_t).T

    return naive


def generated_factors(rank):
    def naive(a, _):
        cores, flat = parts(a, "cores"), 0.0
        rows, columns = [c.shape[1] for c in cores], [c.shape[2] for c in cores]
        flat = np.zeros(np.prod(rows))
        for i in np.ndindex(*rows):
            for j, z in zip(np.ndindex(*columns), a["latent"], strict=True):
                row = np.ones((1, 1))
                for core, p, q in zip(cores, i, j, strict=True):
                    row = row @ core[:, p, q, :]
                flat[np.ravel_multi_index(i, rows)] += row[0, 0] * z
        w1, w2 = flat[: N * rank].reshape(N, rank), flat[N * rank :].reshape(rank, M)
        return 0.01 * (w1 @ w2).T

    return naive


def circuit(gates, axes, x):
    """Gates on pairs of axes of one vector, by sums over both indices."""
    x = x.reshape(axes)
    order = len(axes)
    for gate, (b, a) in zip(gates, combinations(range(order - 1, -1, -1), 2), strict=True):
        gate = gate.reshape(axes[a], axes[b], axes[a], axes[b])
        y = np.zeros(axes)
        for i in np.ndindex(*axes):
            for p in range(axes[a]):
                for q in range(axes[b]):
                    j = list(i)
                    j[a], j[b] = p, q
                    y[i] += gate[i[a], i[b], p, q] * x[tuple(j)]
        x = y
    return x.ravel()


def pair_gates(axes, shape, scale=1.0):
    def naive(a, _):
        update = np.zeros(shape)
        for k in range(shape[1]):
            unit = np.eye(np.prod(axes))[k]
            column = circuit(parts(a, "gates"), axes, unit)
            if "start.0" in a:
                column = column - circuit(parts(a, "start"), axes, unit)
            update[:, k] = scale * column[: shape[0]]
        return update

    return naive


def core_blocks(a, _):
    up, core, down = a["up"], a["core"], a["down"]
    rows = [np.hstack([up @ core[i, j] @ down for j in range(2)]) for i in range(3)]
    return np.vstack(rows)[:M, :N]


def blocks_of(weight, rng):
    """Blocks of 5 x 6 that reach over both edges."""
    grid = LayerGrid.numbered([weight], block=(5, 6))
    form = forms.SharedTT.create_zero_up([weight], 2, grid=grid, rng=rng).layer(0)
    return forms.CoreBlocks(form.up, form.core, form.down, form.size)


CASES = [
    Case(
        "tensor train",
        lambda w, rng: forms.TensorTrain.create(w, 3, order=2, scale=3.0, rng=rng),
        tensor_train,
        num_trainable=1 * 2 * 2 + 2 * 4 * 3 + 3 * 3 * 3 + 3 * 4 * 1,
        rank=3,
        lora=3,
        zero=False,
    ),
    Case(
        "tensor train by TT-SVD",
        lambda w, rng: forms.TensorTrain.create_tt_svd(
            w, (1, 2, 2, 3, 3, 1), inputs=(2, 4), outputs=(2, 2, 3), scale=3.0, rng=rng
        ),
        tensor_train,
        num_trainable=4 + 16 + 12 + 18 + 9,
        rank=2,
        lora=2,
        zero=False,
    ),
    Case(
        "train matrix",
        lambda w, rng: forms.TrainMatrix.create(w, 3, order=2, scale=3.0, rng=rng),
        train_matrix,
        num_trainable=1 * 3 * 2 * 3 + 3 * 4 * 4 * 1,
        rank=8,
        lora=None,
        zero=False,
    ),
    Case(
        "train factors, long bonds",
        lambda w, rng: forms.TrainFactors.create(w, 3, bond=4, order=2, alpha=6.0, rng=rng),
        train_factors(2.0),
        num_trainable=(1 * 2 * 2 + 2 * 4 * 3 + 3 * 3 * 1) + (1 * 3 * 3 + 3 * 3 * 4 + 4 * 4 * 1),
        rank=3,
        lora=3,
        zero=False,
    ),
    Case(
        "train factors, short bonds",
        lambda w, rng: forms.TrainFactors.create(w, 3, bond=2, order=2, alpha=6.0, rng=rng),
        train_factors(2.0),
        num_trainable=52,
        rank=2,
        lora=2,
        zero=False,
    ),
    Case(
        "generated factors",
        lambda w, rng: forms.GeneratedFactors.create(w, 2, bond=2, order=2, width=3, rng=rng),
        generated_factors(2),
        num_trainable=1 * 5 * 3 * 2 + 2 * 8 * 3 * 1,
        rank=2,
        lora=2,
        zero=False,
    ),
    Case(
        "pair gates",
        lambda w, rng: forms.PairGates.create(w, axes=(2, 3, 2), scale=3.0, rng=rng),
        pair_gates((2, 3, 2), SHAPE, 3.0),
        num_trainable=36 + 16 + 36,
        rank=8,
        lora=None,
    ),
    Case(
        "pair gates, padded",
        lambda w, rng: forms.PairGates.create(w, axes=(4, 4), rng=rng),
        pair_gates((4, 4), (7, 9)),
        num_trainable=256,
        rank=7,
        lora=None,
        shape=(7, 9),
    ),
    Case(
        "pair gates beside a shifted weight",
        lambda w, rng: forms.PairGates.shifted(w, axes=(2, 2, 3), rng=rng).form,
        pair_gates((2, 2, 3), SHAPE),
        num_trainable=36 + 36 + 16,
        rank=8,
        lora=None,
        zero=False,
    ),
    Case(
        "core blocks",
        blocks_of,
        core_blocks,
        num_trainable=5 * 2 + 2 * 6 + 6 * 4,
        rank=4,
        lora=4,
        zero=True,
    ),
]


@dataclass(frozen=True)
class LayeredCase:
    """One form of several layers at one setting.

    ``create(weights, rng)`` makes it; ``naive(a, k)`` computes the dense update of layer ``k`` from
    a dictionary ``a`` of its arrays by name; ``lora`` holds the ranks of the exact conversions.
    """

    name: str
    create: Callable[[Sequence[Any], Any], forms.LayeredForm]
    naive: Callable[[dict[str, np.ndarray], int], np.ndarray]
    num_trainable: int
    lora: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    zero: bool = True


def weights_of(case, dtype=np.float64):
    rng = np.random.default_rng(7)
    return [rng.standard_normal(shape).astype(dtype) for shape in case.shapes]


# Two layers with queries, keys of half as many heads, and an MLP of twice the width.
ATTENTION = ((8, 8), (4, 8)) * 2
MLP = ((8, 8), (16, 8), (8, 16))
TYPES = [(0, 0), (1, 0), (0, 1), (1, 1)]  # (type, layer)
OUT_HEADS = LayerGrid.indexed(ATTENTION, TYPES, block=(2, 8))
IN_HEADS = LayerGrid.indexed(ATTENTION, TYPES, block=(8, 4))
SLOTS = LayerGrid.numbered(MLP, block=(8, 8))


def tt_core(a, index):
    core = np.eye(a["up"].shape[1])
    for k, i in enumerate(index):
        core = core @ a[f"cores.{k}"][i]
    return core


def cp_core(a, index):
    row = np.ones(a["up"].shape[1])
    for k, i in enumerate(index):
        row = row * a[f"factors.{k}"][i]
    return np.diag(row)


def tucker_core(a, index):
    letters = "abcd"[: len(index)]
    rows = [a[f"factors.{k}"][i] for k, i in enumerate(index)]
    return np.einsum(f"{letters}xy,{','.join(letters)}->xy", a["core"], *rows)


def cut(grid, core, scale=1.0):
    """Block by block."""

    def naive(a, k):
        (m, n), (u, v) = grid.shapes[k], grid.block
        update = np.zeros((m + u, n + v))
        places = iter(grid.indices[k])
        for i in range(0, m, u):
            for j in range(0, n, v):
                block = a["up"] @ core(a, next(places)) @ a["down"]
                update[i : i + u, j : j + v] = scale * block
        return update[:m, :n]

    return naive


def tied(a, k):
    m, n = ATTENTION[k]
    outputs, terms = np.diag(a["outputs"][k][:m]), np.diag(a["terms"][k])
    return 2.0 * outputs @ a["up"][:m] @ terms @ a["down"][:, :n]


def tied_case(form, num_trainable):
    return LayeredCase(
        form.__name__,
        lambda w, rng: form.create(w, 3, scale=2.0, rng=rng),
        tied,
        num_trainable=num_trainable,
        lora=(3, 3, 3, 3),
        shapes=ATTENTION,
    )


def banked(a, k):
    up, down = (mixtures(a[f"{side}_logits.{k}"], a["bank"], 2) for side in ("up", "down"))
    return up.swapaxes(1, 2).reshape(-1, 2) @ down.reshape(2, -1)


SAME = ((6, 5),) * 3
PLAIN = LayerGrid.numbered(SAME)
PAIRS = LayerGrid.indexed([*SAME, (6, 5)], [(0, 0), (0, 1), (1, 0), (1, 1)])

LAYERED = [
    LayeredCase(
        "free cores: LoTR",
        lambda w, rng: forms.SharedTT.create(w, 3, scale=2.0, rng=rng),
        cut(PLAIN, tt_core, 2.0),
        num_trainable=3 * 11 + 3 * 9,
        lora=(3, 3, 3),
        shapes=SAME,
    ),
    LayeredCase(
        "free cores of slots: FacT-TT",
        lambda w, rng: forms.SharedTT.create_zero_up(w, 3, grid=SLOTS, scale=2.0, rng=rng),
        cut(SLOTS, tt_core, 2.0),
        num_trainable=3 * 16 + 5 * 9,
        lora=(3, 3, 3),
        shapes=MLP,
    ),
    LayeredCase(
        "train of two axes: MetaTT-4D",
        lambda w, rng: forms.SharedTT.create_identity(w, (2, 3, 2), grid=PAIRS, rng=rng),
        cut(PAIRS, tt_core),
        num_trainable=2 * 11 + 2 * 6 + 2 * 6,
        lora=(2, 2, 2, 2),
        shapes=(*SAME, (6, 5)),
    ),
    LayeredCase(
        "train of three axes: MetaTT-5D",
        lambda w, rng: forms.SharedTT.create_identity(w, 2, grid=OUT_HEADS, scale=2.0, rng=rng),
        cut(OUT_HEADS, tt_core, 2.0),
        num_trainable=2 * 10 + (2 + 2 + 4) * 4,
        lora=(2, 2, 2, 2),
        shapes=ATTENTION,
    ),
    LayeredCase(
        "CP with heads of inputs: LoRTA as published",
        lambda w, rng: forms.SharedCP.create(w, 3, grid=IN_HEADS, scale=2.0, rng=rng),
        cut(IN_HEADS, cp_core, 2.0),
        num_trainable=3 * (8 + 4 + 2 + 2 + 2),
        lora=(3, 3, 3, 3),
        shapes=ATTENTION,
    ),
    LayeredCase(
        "CP with heads of outputs: LoRTA turned over",
        lambda w, rng: forms.SharedCP.create(w, 3, grid=OUT_HEADS, scale=2.0, rng=rng),
        cut(OUT_HEADS, cp_core, 2.0),
        num_trainable=3 * (2 + 8 + 2 + 2 + 4),
        lora=(3, 3, 3, 3),
        shapes=ATTENTION,
    ),
    LayeredCase(
        "CP with orthogonal factors: CaRA",
        lambda w, rng: forms.SharedCP.create_orthogonal(
            w, 3, grid=SLOTS, normal_axes=(0,), scale=2.0, rng=rng
        ),
        cut(SLOTS, cp_core, 2.0),
        num_trainable=3 * (8 + 8 + 5),
        lora=(3, 3, 3),
        shapes=MLP,
    ),
    LayeredCase(
        "mixed cores of slots: FacT-TK",
        lambda w, rng: forms.SharedTucker.create(w, 3, grid=SLOTS, scale=2.0, rng=rng),
        cut(SLOTS, tucker_core, 2.0),
        num_trainable=3 * 16 + 27 + 5 * 3,
        lora=(3, 3, 3),
        shapes=MLP,
    ),
    LayeredCase(
        "Tucker of all axes: TensLoRA",
        lambda w, rng: forms.SharedTucker.create_zero_core(
            w, (2, 1, 3, 2, 4), grid=OUT_HEADS, scale=2.0, rng=rng
        ),
        cut(OUT_HEADS, tucker_core, 2.0),
        num_trainable=(2 * 2 + 2 * 1 + 4 * 3) + 2 * 2 + 4 * 8 + 2 * 1 * 3 * 2 * 4,
        lora=(4, 4, 4, 4),
        shapes=ATTENTION,
    ),
    tied_case(forms.Tied, 3 * 16 + 4 * (8 + 3)),
    tied_case(forms.TiedGains, 4 * (8 + 3)),
    tied_case(forms.TiedDown, 3 * 8 + 4 * (8 + 3)),
    LayeredCase(
        "shared down: ShareLoRA A",
        lambda w, rng: forms.SharedDown.create(w, 3, scale=2.0, rng=rng),
        lambda a, k: 2.0 * a[f"ups.{k}"] @ a["down"],
        num_trainable=3 * (8 + 8 + 4 + 8 + 4),
        lora=(3, 3, 3, 3),
        shapes=ATTENTION,
    ),
    LayeredCase(
        "shared up: ShareLoRA B",
        lambda w, rng: forms.SharedUp.create(w, 3, scale=2.0, rng=rng),
        lambda a, k: 2.0 * a["up"] @ a[f"downs.{k}"],
        num_trainable=3 * (8 + 8 + 16),
        lora=(3, 3),
        shapes=((8, 8), (8, 16)),
    ),
    LayeredCase(
        "shared pair: ShareLoRA AB",
        lambda w, rng: forms.SharedPair.create(w, 3, scale=2.0, rng=rng),
        lambda a, k: 2.0 * a["up"][: ATTENTION[k][0]] @ a["down"],
        num_trainable=3 * 16,
        lora=(3, 3, 3, 3),
        shapes=ATTENTION,
    ),
    LayeredCase(
        "bank of vectors: VB-LoRA",
        lambda w, rng: forms.VectorBank.create(w, 2, vectors=5, length=4, rng=rng),
        banked,
        num_trainable=5 * 4 + 5 * 2 * (8 + 8 + 4 + 8) // 4 * 2,
        lora=(2, 2, 2, 2),
        shapes=ATTENTION,
        zero=False,
    ),
    LayeredCase(
        "drawn entries: Uni-LoRA",
        lambda w, rng: forms.DrawnEntries.create(w, 2, length=13, rng=rng),
        lambda a, k: drawn_factors(
            {**a, "up_places": a[f"up_places.{k}"], "down_places": a[f"down_places.{k}"]}, None
        ),
        num_trainable=13,
        lora=(2, 2, 2, 2),
        shapes=ATTENTION,
        zero=False,
    ),
]
