"""Forms that are products with something in between; see ``form_cases.Case``."""

import numpy as np
from form_cases import SHAPE, Case

from lowrank_sp.adapters import forms
from lowrank_sp.updates import random_support

M, N = SHAPE
R = 3
K = min(SHAPE)


def lengths(a, axis):
    return np.sqrt(np.sum(a * a, axis=axis, keepdims=True))


def row_magnitude(a, weight):
    moved = weight + 2.0 * a["up"] @ a["down"]
    return a["magnitude"][:, None] * moved / lengths(moved, 1) - weight


def both_magnitudes(a, weight):
    moved = weight + 2.0 * a["up"] @ a["down"]
    moved = a["rows"][:, None] * moved / lengths(moved, 1)
    return moved / lengths(moved, 0) * a["columns"] - weight


def rotated(a, _):
    k = np.zeros((R, R))
    k[np.triu_indices(R, 1)] = a["skew"]
    k = k - k.T
    rotation = (np.eye(R) + k) @ np.linalg.inv(np.eye(R) - k)
    core = np.diag(a["left"]) @ rotation @ np.diag(a["right"]) - np.eye(R)
    return 2.0 * a["up"] @ core @ a["down"]


def shifted(a, weight):
    after = np.maximum(a["s"] + 2.0 * a["shift"], 0.0)
    return (a["u"] * after) @ a["vh"] - weight


def sparse(a, _):
    size = a["u"].shape[1]
    core = np.zeros((size, size))
    for place, value in zip(a["places"], a["values"], strict=True):
        core[divmod(int(place), size)] = value
    return (a["u"] @ core @ a["vh"]) / (1.0 + np.exp(-a["gate"]))


CASES = [
    Case(
        "product",
        lambda w, rng: forms.Product.create(w, R, alpha=6, rng=rng),
        lambda a, _: 2.0 * a["up"] @ a["down"],
        num_trainable=R * (M + N),
        rank=R,
        lora=R,
    ),
    Case(
        "fixed up",
        lambda w, rng: forms.FixedUp.create(w, R, alpha=6, rng=rng),
        lambda a, _: 2.0 * a["up"] @ a["down"],
        num_trainable=R * N,
        rank=R,
        lora=R,
    ),
    Case(
        "fixed down",
        lambda w, rng: forms.FixedDown.create(w, R, alpha=6, rng=rng),
        lambda a, _: 2.0 * a["up"] @ a["down"],
        num_trainable=R * M,
        rank=R,
        lora=R,
    ),
    Case(
        "diagonal core",
        lambda w, rng: forms.DiagonalCore.create(w, R, alpha=6, rng=rng),
        lambda a, _: 2.0 * a["up"] @ np.diag(a["core"]) @ a["down"],
        num_trainable=R * (M + N + 1),
        rank=R,
        lora=R,
    ),
    Case(
        "diagonal core at identity",
        lambda w, rng: forms.DiagonalCore.at_identity(w, R, alpha=6, rng=rng),
        lambda a, _: 2.0 * a["up"] @ np.diag(a["core"]) @ a["down"],
        num_trainable=R * (M + N + 1),
        rank=R,
        lora=R,
        zero=False,
    ),
    Case(
        "diagonal core beside a truncated weight",
        lambda w, rng: forms.DiagonalCore.beside_truncated(w, R, alpha=6, rng=rng).form,
        lambda a, _: 2.0 * a["up"] @ np.diag(a["core"]) @ a["down"],
        num_trainable=R * (M + N + 1),
        rank=R,
        lora=R,
    ),
    Case(
        "full core",
        lambda w, rng: forms.FullCore.create(w, R, alpha=6, rng=rng),
        lambda a, _: 2.0 * a["up"] @ a["core"] @ a["down"],
        num_trainable=R * (M + N + R),
        rank=R,
        lora=R,
    ),
    Case(
        "full core at identity",
        lambda w, rng: forms.FullCore.at_identity(w, R, alpha=6, rng=rng),
        lambda a, _: 2.0 * a["up"] @ a["core"] @ a["down"],
        num_trainable=R * (M + N + R),
        rank=R,
        lora=R,
        zero=False,
    ),
    Case(
        "fixed sides",
        lambda w, rng: forms.FixedSides.create(w, R, alpha=6, rng=rng),
        lambda a, _: 2.0 * a["up"] @ a["core"] @ a["down"],
        num_trainable=R * R,
        rank=R,
        lora=R,
        zero=False,
    ),
    Case(
        "combined core",
        lambda w, rng: forms.CombinedCore.create(w, R, size=5, rng=rng),
        lambda a, _: (
            a["up"]
            @ sum(v * p for v, p in zip(a["coefficients"], a["basis"], strict=True))
            @ a["down"]
        ),
        num_trainable=5,
        rank=R,
        lora=R,
    ),
    Case(
        "rotated core",
        lambda w, rng: forms.RotatedCore.create(w, R, alpha=6, rng=rng),
        rotated,
        num_trainable=R * (R - 1) // 2 + 2 * R,
        rank=R,
        lora=R,
    ),
    Case(
        "row magnitude",
        lambda w, rng: forms.RowMagnitude.create(w, R, alpha=6, through_norm=True, rng=rng),
        row_magnitude,
        num_trainable=R * (M + N) + M,
        rank=K,
        lora=None,
    ),
    Case(
        "both magnitudes",
        lambda w, rng: forms.BothMagnitudes.create(w, R, alpha=6, through_norm=True, rng=rng),
        both_magnitudes,
        num_trainable=R * (M + N) + M + N,
        rank=K,
        lora=None,
    ),
    Case(
        "spectral shift",
        lambda w, rng: forms.SpectralShift.create(w, scale=2.0, rng=rng),
        shifted,
        num_trainable=K,
        rank=K,
        lora=K,
    ),
    Case(
        "sparse core, banded",
        lambda w, rng: forms.SparseCore.create(
            w, places=forms.banded_places(K, 2, like=w), rng=rng
        ),
        sparse,
        num_trainable=K * 5 - 6 + 1,
        rank=K,
        lora=K,
        zero=False,
    ),
    Case(
        "sparse core, random",
        lambda w, rng: forms.SparseCore.create(
            w, 5, places=random_support((5, 5), 9 / 25, like=w, rng=0), rng=rng
        ),
        sparse,
        num_trainable=9 + 1,
        rank=5,
        lora=5,
        zero=False,
        attained=4,  # one row of the support is empty
    ),
    Case(
        "gains",
        lambda w, rng: forms.Gains.create(w, R, rng=rng),
        lambda a, _: np.diag(a["outer"]) @ a["up"] @ np.diag(a["inner"]) @ a["down"],
        num_trainable=M + R,
        rank=R,
        lora=R,
    ),
    Case(
        "gains, more than a side",
        lambda w, rng: forms.Gains.create(w, N + 2, rng=rng),
        lambda a, _: np.diag(a["outer"]) @ a["up"] @ np.diag(a["inner"]) @ a["down"],
        num_trainable=M + N + 2,
        rank=K,
        lora=N + 2,
    ),
]
