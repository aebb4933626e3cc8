"""Forms whose rank is larger than their number of columns; see ``form_cases.Case``."""

import numpy as np
from form_cases import SHAPE, Case

from lowrank_sp._arrays import detached, from_host
from lowrank_sp.adapters import forms

M, N = SHAPE
R = 3


def chain(w, rng):
    """Two links: the earlier one is fixed, so that it must not be zero for the laws to see it."""
    first = forms.Chain.create(w, 2, alpha=4, rng=rng)
    moved = first.replace({"up": first.up + 0.5})
    return forms.merge_and_restart(moved, rank=R, scale=0.5, rng=1)


def kronecker(a, scale=1.0):
    left = a["left"] @ a["left_down"] if "left_down" in a else a["left"]
    right = a["right"] @ a["right_down"] if "right_down" in a else a["right"]
    return scale * np.kron(left, right)


def plain_kronecker(a, _):
    return kronecker(a)


def folded_columns(n, q):
    """Compression of MoRA: entry ``i`` of the input, continued, goes to ``i mod q``."""
    length = -(-n // q) * q
    continued = np.vstack([np.eye(n), np.eye(n)])[:length]
    return sum(continued[i : i + q] for i in range(0, length, q)), continued


def shared_square(a, _):
    q = a["square"].shape[0]
    stretched = np.array([np.eye(q)[i % q] for i in range(M)])
    return stretched @ a["square"] @ folded_columns(N, q)[0]


def rotated_square(a, _):
    q = a["square"].shape[0]
    rows = []
    for i in range(-(-N // q)):
        rotation = np.zeros((q, q))
        for j in range(q // 2):
            angle = i * 10000.0 ** (-2 * j / q)
            c, s = np.cos(angle), np.sin(angle)
            rotation[np.ix_([j, j + q // 2], [j, j + q // 2])] = [[c, -s], [s, c]]
        rows.append(a["square"] @ rotation @ folded_columns(N, q)[1][i * q : (i + 1) * q])
    rows = np.vstack(rows)
    return np.vstack([rows, rows])[:M]


def random_sum(a, _):
    terms = [
        a["large"][:, j, :] @ np.diag(a["gains"][:, j]) @ a["small"] @ np.diag(a["columns"][j])
        for j in range(a["gains"].shape[1])
    ]
    return 20.0 * np.sum(terms, axis=0)


def positional_sum(a, _):
    r, count = a["gains"].shape
    rows = [
        a["gains"][i, j] * a["small"][i] * a["columns"][j] for i in range(r) for j in range(count)
    ]
    columns = [a["large"][:, j, i] for j in range(count) for i in range(r)]
    return 20.0 * np.stack(columns, axis=1) @ np.stack(rows)


def places(w, count=17):
    """Places with empty rows among them, in the library of the weight."""
    drawn = np.sort(np.random.default_rng(2).choice((M - 3) * N, count, replace=False)) + 2 * N
    return forms.largest_places(indicator(w, drawn), (count + 0.5) / (M * N))


def indicator(w, drawn):
    scores = np.zeros(M * N)
    scores[drawn] = 1.0 + np.arange(len(drawn))
    return from_host(scores.reshape(M, N), w)


def sparse(a, _):
    s = np.zeros(M * N)
    for place, value in zip(a["places"].astype(int), a["values"], strict=True):
        s[place] = value
    return 2.0 * a["up"] @ a["down"] + s.reshape(M, N)


def khatri_rao(a, w):
    long = np.stack([np.kron(v, u) for u, v in zip(a["left"], a["right"], strict=True)]) * 2.0
    return long[:, : w.shape[1]] if w.shape[0] < w.shape[1] else long[:, : w.shape[0]].T


def block_diagonal(a, _):
    update = np.zeros(SHAPE)
    for i, (up, down) in enumerate(zip(a["up"], a["down"], strict=True)):
        update[i * 3 : i * 3 + 3, i * 2 : i * 2 + 2] = 2.0 * up @ down
    return update


def diagonal_grid(a, _):
    g = a["up"].shape[0]
    blocks = [
        [a["up"][i] @ np.diag(a["gains"][i, j]) @ a["down"][j] for j in range(g)] for i in range(g)
    ]
    return 2.0 * np.block(blocks)


def block_grid(a, scale):
    g, _, r = a["up"].shape
    s = r // g
    blocks = [
        [a["up"][i][:, j * s : (j + 1) * s] @ a["down"][j][i * s : (i + 1) * s] for j in range(g)]
        for i in range(g)
    ]
    return scale * np.block(blocks)


CASES = [
    Case(
        "chain",
        chain,
        lambda a, _: 0.5 * a["up"] @ a["down"] + a["earlier_up"] @ a["earlier_down"],
        num_trainable=R * (M + N),
        rank=R + 2,
        lora=R + 2,
        zero=False,
        # ``up`` of the fixed link is a shifted zero: all of its columns are one.
        attained=R + 1,
    ),
    Case(
        "delta-lora",
        lambda w, rng: forms.delta_updates(
            forms.Product.create(w, R, alpha=6, rng=rng).replace(
                {"up": forms.Product.create(w, R, rng=3).down.mT[:1, :] + detached(w)[:, :R]}
            ),
            0.5,
        ),
        lambda a, _: 3.0 * a["up"] @ a["down"] + a["earlier_up"] @ a["earlier_down"],
        num_trainable=R * (M + N),
        rank=2 * R,
        lora=2 * R,
        zero=False,
    ),
    Case(
        "hadamard of two products",
        lambda w, rng: forms.HadamardProduct.create(w, 2, alpha=4, rng=rng),
        lambda a, _: 2.0 * (a["up1"] @ a["down1"]) * (a["up2"] @ a["down2"]),
        num_trainable=2 * 2 * (M + N),
        rank=4,
        lora=4,
    ),
    Case(
        "hadamard from the weight",
        lambda w, rng: forms.HadamardProduct.from_weight(w, 2, rank2=3, scale=0.5, rng=rng),
        lambda a, _: 0.5 * (a["up1"] @ a["down1"]) * (a["up2"] @ a["down2"]),
        num_trainable=5 * (M + N),
        rank=6,
        lora=6,
    ),
    Case(
        "hadamard of large ranks",
        lambda w, rng: forms.HadamardProduct.create(w, 5, rng=rng),
        lambda a, _: (a["up1"] @ a["down1"]) * (a["up2"] @ a["down2"]),
        num_trainable=2 * 5 * (M + N),
        rank=N,
        lora=25,
    ),
    Case(
        "hadamard with the weight",
        lambda w, rng: forms.HadamardWeight.create(w, 2, rng=rng),
        lambda a, w: w * (a["up"] @ a["down"]),
        num_trainable=2 * (M + N),
        rank=N,
        lora=None,
    ),
    Case(
        "kronecker",
        lambda w, rng: forms.KroneckerProduct.create(w, 1, alpha=2, rng=rng),
        lambda a, _: kronecker(a, 2.0),
        num_trainable=3 * 2 + 4 + 4,
        rank=2,
        lora=2,
    ),
    Case(
        "kronecker, right zero, both factored",
        lambda w, rng: forms.KroneckerProduct.create_right_zero(w, 1, factor=4, both=True, rng=rng),
        plain_kronecker,
        num_trainable=(4 + 4) + (3 + 2),
        rank=1,
        lora=1,
    ),
    Case(
        "kronecker, left factored",
        lambda w, rng: forms.KroneckerProduct.create(w, 2, factor=6, both=True, rng=rng),
        plain_kronecker,
        num_trainable=2 * (6 + 2) + 2 * 4,
        rank=4,
        lora=4,
    ),
    Case(
        "kronecker, nothing factored",
        lambda w, rng: forms.KroneckerProduct.create_sorted(w, 4, alpha=8, rng=rng),
        plain_kronecker,
        num_trainable=3 * 2 + 4 * 4,
        rank=N,
        lora=None,
    ),
    Case(
        "shared square",
        lambda w, _: forms.SharedSquare.create(w, 1),
        shared_square,
        num_trainable=16,
        rank=4,
        lora=4,
    ),
    Case(
        "shared square, continued",
        lambda w, _: forms.SharedSquare.create(w, 2),
        shared_square,
        num_trainable=36,
        rank=6,
        lora=6,
    ),
    Case(
        "rotated square",
        lambda w, _: forms.RotatedSquare.create(w, 2),
        rotated_square,
        num_trainable=36,
        rank=N,
        lora=None,
    ),
    Case(
        "sum over a random basis",
        lambda w, rng: forms.RandomSum.create(w, 3, rng=rng),
        random_sum,
        num_trainable=3 * (3 + N),
        rank=N,
        lora=None,
    ),
    Case(
        "sum over a random basis, as PEFT pairs it",
        lambda w, rng: forms.PositionalRandomSum.create(w, 3, rng=rng),
        positional_sum,
        num_trainable=3 * (3 + N),
        rank=N,
        lora=None,
    ),
    Case(
        "sum over a random basis, wide",
        lambda w, rng: forms.RandomSum.create(w, 3, rng=rng),
        lambda a, w: random_sum(a, w).T,
        num_trainable=3 * (3 + N),
        rank=N,
        lora=None,
        shape=(N, M),
    ),
    Case(
        "product plus sparse",
        lambda w, rng: forms.ProductPlusSparse.create(w, 2, places=places(w), alpha=4, rng=rng),
        sparse,
        num_trainable=2 * (M + N) + 17,
        rank=N,
        lora=None,
    ),
    Case(
        "product plus sparse, values drawn",
        lambda w, rng: forms.ProductPlusSparse.create_values(
            w, 2, places=places(w), alpha=4, rng=rng
        ),
        sparse,
        num_trainable=2 * (M + N) + 17,
        rank=N,
        lora=None,
        zero=False,
    ),
    Case(
        "sine",
        lambda w, rng: forms.Sine.create(w, 2, frequency=2.0, alpha=4, rng=rng),
        lambda a, _: 2.0 * np.sin(2.0 * a["up"] @ a["down"]) / N**0.5,
        num_trainable=2 * (M + N),
        rank=N,
        lora=None,
    ),
    Case(
        "khatri-rao",
        lambda w, rng: forms.KhatriRao.create(w, rng=rng),
        khatri_rao,
        num_trainable=8 * (2 + 6),
        rank=N,
        lora=None,
    ),
    Case(
        "khatri-rao, wide, cropped",
        lambda w, rng: forms.KhatriRao.create(w, rng=rng),
        khatri_rao,
        num_trainable=8 * (2 + 7),
        rank=N,
        lora=None,
        shape=(N, M + 1),
    ),
    Case(
        "khatri-rao, tall, cropped",
        lambda w, rng: forms.KhatriRao.create(w, rng=rng),
        khatri_rao,
        num_trainable=8 * (2 + 7),
        rank=N,
        lora=None,
        shape=(M + 1, N),
    ),
    Case(
        "block diagonal",
        lambda w, rng: forms.BlockDiagonal.create(w, 1, blocks=4, alpha=2, rng=rng),
        block_diagonal,
        num_trainable=M + N,
        rank=4,
        lora=4,
    ),
    Case(
        "diagonals in a grid",
        lambda w, rng: forms.DiagonalGrid.create(w, 2, blocks=2, alpha=4, rng=rng),
        diagonal_grid,
        num_trainable=2 * (M + N) + 4 * 2,
        rank=4,
        lora=4,
    ),
    Case(
        "grid",
        lambda w, rng: forms.BlockGrid.create(w, 2, blocks=2, alpha=4, rng=rng),
        lambda a, _: block_grid(a, 2.0),
        num_trainable=2 * (M + N),
        rank=4,
        lora=4,
    ),
    Case(
        "grid and a common product",
        lambda w, rng: forms.BlockGrid.create(w, 2, blocks=2, common=1, alpha=6, rng=rng),
        lambda a, _: block_grid(a, 2.0) + 2.0 * a["common_up"] @ a["common_down"],
        num_trainable=3 * (M + N),
        rank=5,
        lora=5,
    ),
]
