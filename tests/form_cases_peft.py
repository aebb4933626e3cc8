"""Forms with few numbers in a fixed structure, as PEFT has them; see ``form_cases.Case``."""

import numpy as np
from form_cases import SHAPE, Case
from form_cases_rank import places
from scipy import linalg

from lowrank_sp._arrays import detached
from lowrank_sp.adapters import forms

M, N = SHAPE
R = 3


def fourier(shape):
    """A cosine for every coefficient."""
    m, n = shape

    def naive(a, _):
        x, y = np.arange(m)[:, None], np.arange(n)
        update = np.zeros(shape)
        for place, value in zip(a["places"].astype(int), a["values"], strict=True):
            i, j = divmod(place, n)
            update += value * np.cos(2 * np.pi * (i * x / m + j * y / n))
        return 150.0 * update / (m * n)

    return naive


def synthesis(low, length):
    """What every coefficient of a side adds to it: averages, then details."""
    taps = len(low)
    high = low[::-1] * (-1.0) ** np.arange(taps)
    half = -(-(length + taps - 2) // 2)
    basis = np.zeros((length, 2 * half))
    for x in range(length):
        for j in range(half):
            if 0 <= (t := x + taps - 2 - 2 * j) < taps:
                basis[x, j], basis[x, half + j] = low[t], high[t]
    return basis


def wavelets(shape):
    def naive(a, _):
        rows, columns = (synthesis(a["filter"], side) for side in shape)
        core = np.zeros(rows.shape[1] * columns.shape[1])
        core[a["places"].astype(int)] = a["values"]
        return 25.0 * rows @ core.reshape(rows.shape[1], -1) @ columns.T

    return naive


def circulant(a, _):
    p, q, b = a["kernel"].shape
    update = np.zeros((p * b, q * b))
    for i, j in np.ndindex(p, q):
        for x, y in np.ndindex(b, b):
            update[i * b + x, j * b + y] = a["kernel"][i, j, (y - x) % b]
    return update / (q * b)


def sparse(a, _):
    s = np.zeros(M * N)
    s[a["places"].astype(int)] = a["values"]
    return s.reshape(M, N)


def shard(a, _):
    s = a["shard"]
    return np.array([[s[i % len(s), j % s.shape[1]] for j in range(N)] for i in range(M)])


def weight_shards(a, weight):
    r, update = a["shards"].shape[1], np.zeros(SHAPE)
    for i in range(0, M, r):
        for j in range(0, N, r):
            block = weight[i : i + r, j : j + r]
            update[i : i + r, j : j + r] = (block + np.eye(r)) @ a["shards"][i // r]
    return update


def normalized(a, weight):
    terms = [
        np.outer(b / np.linalg.norm(b), row / np.linalg.norm(row))
        for b, row in zip(a["up"].T, a["down"], strict=True)
    ]
    return a["strength"][0] / R * np.sum(terms, axis=0) * np.linalg.norm(weight, axis=0)


def reflections(a, weight):
    turned = weight
    for u in a["vectors"].T:
        turned = turned - 2 * np.outer(turned @ u, u) / (u @ u)
    return turned - weight


def orthogonal_reflections(a, weight):
    q = np.linalg.qr(a["vectors"])[0]
    return -2 * weight @ q @ q.T


def skew(values):
    size = (1 + round((1 + 8 * len(values)) ** 0.5)) // 2
    k = np.zeros((size, size))
    k[np.triu_indices(size, 1)] = values
    return k - k.T


def cayley(k):
    return (np.eye(len(k)) + k) @ np.linalg.inv(np.eye(len(k)) - k)


def block_rotations(a, weight):
    turns = [cayley(skew(values)) for values in a["skew"]]
    return weight @ linalg.block_diag(*turns).T - weight


def shared_series(a, weight):
    k = skew(a["skew"][0])
    turn = np.eye(4) + 2 * k + 2 * k @ k + 2 * k @ k @ k + k @ k @ k @ k
    return weight @ linalg.block_diag(turn, turn).T - weight


def butterfly(a, weight):
    """A permutation as PEFT has it: halves of pieces, those at even places before the others."""
    turn = np.eye(N)
    for i, stage in enumerate(a["blocks"]):
        blocks = linalg.block_diag(*[cayley((block.T - block) / 2) for block in stage])
        half = stage.shape[1] // 2
        order = []
        for start in range(0, N, stage.shape[1] << i):
            halves = np.arange(start, start + (stage.shape[1] << i)).reshape(-1, half)
            order += [*halves[::2].ravel(), *halves[1::2].ravel()]
        permuted = np.eye(N)[order]
        turn = permuted @ blocks @ permuted.T @ turn
    return a["gains"] * (weight @ turn.T) - weight


def mixtures(logits, bank, top):
    found = np.zeros((*logits.shape[:-1], bank.shape[1]))
    for index in np.ndindex(*logits.shape[:-1]):
        best = np.argsort(-logits[index])[:top]
        sizes = np.exp(logits[index][best])
        found[index] = sizes @ bank[best] / sizes.sum()
    return found


def bank_factors(a, _):
    up = mixtures(a["up_logits"], a["bank"], 2)
    down = mixtures(a["down_logits"], a["bank"], 2)
    columns = [np.concatenate([piece[i] for piece in up]) for i in range(R)]
    return np.stack(columns, axis=1) @ down.reshape(R, N)


def drawn_factors(a, _):
    scaled = a["entries"] * a["gains"]
    return scaled[a["up_places"].astype(int)] @ scaled[a["down_places"].astype(int)]


def neighbours(groups, length):
    """Group of every entry, the first groups longer by one."""
    return np.repeat(
        np.arange(groups), [length // groups + (k < length % groups) for k in range(groups)]
    )


def square(inputs, outputs):
    def naive(a, _):
        q = len(a["square"])
        of_in = neighbours(q, N) if inputs else None
        of_out = neighbours(q, M) if outputs else np.arange(M) % q
        compress = np.zeros((q, N))
        if inputs:
            compress[of_in, np.arange(N)] = 1
        else:
            for i in range(-(-N // q) * q):
                compress[i % q, i % N] += 1
        return a["square"][of_out] @ compress

    return naive


CASES = [
    Case(
        "fourier",
        lambda w, rng: forms.FourierCoefficients.create(w, 17, rng=rng),
        fourier(SHAPE),
        num_trainable=17,
        rank=N,
        lora=None,
        zero=False,
    ),
    Case(
        "fourier of odd sides, as PEFT draws",
        lambda w, rng: forms.FourierCoefficients.create(w, 3, seed=777, rng=rng),
        fourier((7, 9)),
        num_trainable=3,
        rank=6,
        lora=None,
        zero=False,
        shape=(7, 9),
        attained=3,  # two of the three share a row space, two vary in one direction only
    ),
    Case(
        "wavelets: Haar",
        lambda w, rng: forms.WaveletCoefficients.create(w, 40, rng=rng),
        wavelets(SHAPE),
        num_trainable=40,
        rank=N,
        lora=None,
    ),
    Case(
        "wavelets of odd sides, as PEFT draws",
        lambda w, rng: forms.WaveletCoefficients.create(w, 30, order=3, seed=777, rng=rng),
        wavelets((7, 9)),
        num_trainable=30,
        rank=7,
        lora=None,
        shape=(7, 9),
    ),
    Case(
        "circulant blocks",
        lambda w, rng: forms.BlockCirculant.create(w, block=4, rng=rng),
        circulant,
        num_trainable=M * N // 4,
        rank=N,
        lora=None,
        zero=False,
    ),
    Case(
        "circulant blocks of odd size",
        lambda w, rng: forms.BlockCirculant.create(w, block=3, rng=rng),
        circulant,
        num_trainable=9 * 12 // 3,
        rank=9,
        lora=None,
        zero=False,
        shape=(9, 12),
    ),
    Case(
        "sparse",
        lambda w, _: forms.Sparse.create(w, places=places(w)),
        sparse,
        num_trainable=17,
        rank=N,
        lora=None,
        attained=7,  # a row of the support is empty
    ),
    Case(
        "sparse, random",
        lambda w, rng: forms.Sparse.create_random(w, 2, rng=rng),
        sparse,
        num_trainable=2 * (M + N),
        rank=N,
        lora=None,
    ),
    Case(
        "shard",
        lambda w, _: forms.SharedShard.create(w, R),
        shard,
        num_trainable=R * M,
        rank=R,
        lora=R,
    ),
    Case(
        "shard, repeated",
        lambda w, _: forms.SharedShard.create(w, R, rows=4),
        shard,
        num_trainable=R * 4,
        rank=R,
        lora=R,
    ),
    Case(
        "shards of the weight",
        lambda w, _: forms.WeightShards.create(w, 4),
        weight_shards,
        num_trainable=4 * M,
        rank=N,
        lora=None,
    ),
    Case(
        "normalized product",
        lambda w, rng: forms.NormalizedProduct.create(w, R, strength=0.1, rng=rng),
        normalized,
        num_trainable=R * (M + N) + 1,
        rank=R,
        lora=R,
    ),
    Case(
        "reflections",
        lambda w, rng: forms.Reflections.create(w, 4, rng=rng),
        reflections,
        num_trainable=4 * N,
        rank=4,
        lora=4,
    ),
    Case(
        "orthogonal reflections",
        lambda w, rng: forms.Reflections(
            forms.Product.create(w, R, rng=rng).down.mT, detached(w), orthogonal=True
        ),
        orthogonal_reflections,
        num_trainable=R * N,
        rank=R,
        lora=R,
        zero=False,
    ),
    Case(
        "block rotations",
        lambda w, _: forms.BlockRotations.create(w, block=4),
        block_rotations,
        num_trainable=2 * 6,
        rank=N,
        lora=None,
    ),
    Case(
        "block rotations, shared, by a series",
        lambda w, _: forms.BlockRotations.create(w, block=4, shared=True, order=4),
        shared_series,
        num_trainable=6,
        rank=N,
        lora=None,
    ),
    Case(
        "butterfly",
        lambda w, _: forms.ButterflyRotations.create(w, block=2, stages=3),
        butterfly,
        num_trainable=3 * 2 * N + M,
        rank=N,
        lora=None,
    ),
    Case(
        "factors of a bank",
        lambda w, rng: forms.BankFactors.create(w, R, vectors=7, length=4, rng=rng),
        bank_factors,
        num_trainable=7 * 4 + 7 * R * (M + N) // 4,
        rank=R,
        lora=R,
        zero=False,
    ),
    Case(
        "drawn factors",
        lambda w, rng: forms.DrawnFactors.create(w, R, length=11, rng=rng),
        drawn_factors,
        num_trainable=11,
        rank=R,
        lora=R,
        zero=False,
    ),
    Case(
        "shared square, neighbours",
        lambda w, _: forms.SharedSquare.create(w, 1, neighbours_in=True, neighbours_out=True),
        square(inputs=True, outputs=True),
        num_trainable=16,
        rank=4,
        lora=4,
    ),
    Case(
        "shared square of six, neighbours in",
        lambda w, _: forms.SharedSquare.create(w, 2, neighbours_in=True),
        square(inputs=True, outputs=False),
        num_trainable=36,
        rank=6,
        lora=6,
    ),
    Case(
        "shared square of six, neighbours out",
        lambda w, _: forms.SharedSquare.create(w, 2, neighbours_out=True),
        square(inputs=False, outputs=True),
        num_trainable=36,
        rank=6,
        lora=6,
    ),
]
