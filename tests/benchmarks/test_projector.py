"""Renewing the projector of GaLore: 4096 x 11008, rank 128, float32; time and largest angle.

The singular vectors are those of cosine transforms, so the angles are against the truth. Each
method gets the gradient of a later step, whose leading subspace has turned by 0.3 from the first.
"""

import numpy as np
import pytest
import torch
from scipy.fft import dct
from sklearn.utils.extmath import randomized_svd

from lowrank_sp.updates import leading_subspace

M, N, RANK = 4096, 11008, 128


def orthogonal(x, axis, seed):
    """An orthogonal matrix times ``x``: two cosine transforms with random signs between."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (2, x.shape[axis]))
    for row in signs:
        x = dct(x * np.expand_dims(row, 1 - axis), axis=axis, norm="ortho")
    return x.astype(np.float32)


class Gradient:
    """``sigma_j = j^-1/2``, with a gap behind the ``RANK``-th value, or without one."""

    def __init__(self, gap, turn):
        sigma = np.arange(1, M + 1) ** -0.5
        sigma[RANK:] *= 1 - gap
        core = np.zeros((M, N), np.float32)
        np.fill_diagonal(core, sigma)
        lead = np.eye(M, RANK, dtype=np.float32)
        if turn:
            # Each leading direction turns towards one from beyond.
            a, b = core[:RANK, :RANK].copy(), core[RANK : 2 * RANK, RANK : 2 * RANK].copy()
            c, s = np.cos(turn), np.sin(turn)
            core[:RANK, :RANK], core[RANK : 2 * RANK, :RANK] = c * a, s * a
            core[:RANK, RANK : 2 * RANK], core[RANK : 2 * RANK, RANK : 2 * RANK] = -s * b, c * b
            lead[:RANK] *= c
            lead[RANK : 2 * RANK] = s * np.eye(RANK)
        self.a = orthogonal(orthogonal(core, 0, 0), 1, 1)
        self.lead = orthogonal(lead, 0, 0)

    def angle(self, basis):
        """Sine of the largest angle between a subspace and the leading one."""
        basis, _ = np.linalg.qr(np.asarray(basis, np.float64))
        lead = self.lead.astype(np.float64)
        return float(np.linalg.norm(basis - lead @ (lead.T @ basis), 2))


@pytest.fixture(scope="module", params=[0.1, 0.0], ids=["gap of 10 %", "no gap"])
def pair(request):
    first, second = Gradient(request.param, 0.0), Gradient(request.param, 0.3)
    return first, second


def galore(a, _):
    """All singular vectors, as GaLore computes them."""
    return torch.linalg.svd(torch.from_numpy(a), full_matrices=False)[0][:, :RANK].numpy()


def svd_lowrank(a, _):
    return torch.svd_lowrank(torch.from_numpy(a), q=RANK + 8, niter=2)[0][:, :RANK].numpy()


METHODS = {
    "lowrank_sp leading_subspace (warm)": lambda a, old: (
        leading_subspace(a, RANK, init=old, rng=0).basis
    ),
    "lowrank_sp leading_subspace (cold)": lambda a, _: leading_subspace(a, RANK, rng=0).basis,
    "torch svd_lowrank (q=136, niter=2)": svd_lowrank,
    "sklearn randomized_svd (auto)": lambda a, _: randomized_svd(a, RANK, random_state=0)[0],
    "torch linalg.svd (as GaLore)": galore,
}


@pytest.mark.parametrize("method", METHODS)
def test_renewal(pair, method, benchmark):
    first, second = pair
    torch.manual_seed(0)
    slow = method.startswith("torch linalg.svd")
    basis = benchmark.pedantic(
        METHODS[method], (second.a, first.lead), rounds=1 if slow else 3, warmup_rounds=not slow
    )
    benchmark.extra_info["accuracy"] = f"{second.angle(basis):.1e}"
