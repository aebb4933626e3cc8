"""One small layer, or four of them, for every row of the catalog."""

from math import isqrt

import numpy as np

from lowrank_sp.adapters.catalog import CATALOG
from lowrank_sp.adapters.forms import LayerGrid, factorized

M, N, R = 48, 40, 2
LAYERS, TYPES, HEADS = 2, 2, 4
COUNT = LAYERS * TYPES

rng = np.random.default_rng(0)
WEIGHTS = [rng.standard_normal((M, N)) / N**0.5 for _ in range(COUNT)]
INPUTS = rng.standard_normal((100, N)) * np.linspace(0.5, 2.0, N)
GRADIENT = rng.standard_normal((M, N))
DATA = {
    "gradient": GRADIENT,
    "second_moment": INPUTS.T @ INPUTS / len(INPUTS),
    "components": np.linalg.svd(INPUTS - INPUTS.mean(axis=0), full_matrices=False)[2],
}
#: Options at which a row is tried, where its own are too large for a small layer, or one step.
OPTIONS = {
    "LoRETTA": {"bond": 2},
    "C3A": {"block": 8},
    "DeLoRA": {"strength": 0.1},
    "FourierFT": {"count": 200},
    "WaveFT": {"count": 200},
    "OFT": {"block": 8},
    "BOFT": {"block": 4, "stages": 2},
    "VB-LoRA": {"vectors": 10, "length": 8},
}
#: Rows whose size the weight or an option determines.
WITHOUT_RANK = {"SVDiff", "SVFT", "KRAdapter", "QuanTA", "C3A", "FourierFT", "WaveFT"}
WITHOUT_RANK |= {"OFT", "BOFT"}


def grid_of(row):
    """Where four weights stand on the axes of a row."""
    if not row.axes:
        return None
    blocks = {"head of inputs": (M, N // HEADS), "head of outputs": (M // HEADS, N)}
    places = [(layer, kind) for layer in range(LAYERS) for kind in range(TYPES)]
    return LayerGrid.indexed([(M, N)] * COUNT, places, blocks.get(row.axes[-1]))


def start_of(row, asarray=np.asarray, seed=0):
    """The form of a row at its published start, and its base weights."""
    weights = [asarray(w) for w in WEIGHTS]
    data = {name: asarray(DATA[name]) for name in DATA if name == row.needs}
    return row.start(
        weights if row.layered else weights[0],
        None if row.name in WITHOUT_RANK else R,
        rng=seed,
        grid=grid_of(row),
        options=OPTIONS.get(row.name),
        **data,
    )


def evaluated(expression, row, form):
    """The value of an expression of a row; ``N, M, D, R`` are what sides are factored into."""
    known = {} if row.layered else form.sizes()
    known |= {"m": M, "n": N, "r": R, "T": TYPES, "H": HEADS, "isqrt": isqrt}
    known |= {"L": LAYERS if row.axes else COUNT}
    known |= {"N": factorized(N, 3), "M": factorized(M, 3), "D": factorized(M, 3)}
    known |= {"R": factorized(R * (M + N), 4)}
    return eval(expression, {}, known | row.options | OPTIONS.get(row.name, {}))


ROWS = list(CATALOG.values())
