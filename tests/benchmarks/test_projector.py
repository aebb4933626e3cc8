"""Renewing the projector of GaLore at rank 128, in float32: time, and largest angle to the truth.

The singular vectors are those of cosine transforms, so the angles are against the truth. Each
method gets a gradient, and the basis of an earlier one, whose leading subspace was 0.3 off. With a
gap behind the rank at the size of a large model, without one at half of it: no angle is defined
there, and the accuracy is what of the energy of the best subspace is missing.
"""

import numpy as np
import pytest
import torch
from scipy.fft import dct
from sklearn.utils.extmath import randomized_svd

from lowrank_sp.updates import leading_subspace

RANK = 128
SIZES = {"4096 x 11008, gap of 10 %": (4096, 11008, 0.1), "2048 x 5504, no gap": (2048, 5504, 0.0)}


def orthogonal(x, axis, seed):
    """An orthogonal matrix times ``x``: two cosine transforms with random signs between."""
    signs = np.random.default_rng(seed).choice(np.float32([-1, 1]), (2, x.shape[axis]))
    for row in signs:
        x = dct(x * np.expand_dims(row, 1 - axis), axis=axis, norm="ortho", overwrite_x=True)
    return x


class Gradient:
    """``sigma_j = j^-1/2``, with a gap behind the ``RANK``-th value or without one.

    ``before`` is a basis from which each leading direction has turned by 0.3, towards one beyond.
    """

    def __init__(self, m, n, gap):
        sigma = np.arange(1, m + 1, dtype=np.float32) ** -0.5
        sigma[RANK:] *= 1 - gap
        core = np.zeros((m, n), np.float32)
        np.fill_diagonal(core, sigma)
        lead = np.eye(m, RANK, dtype=np.float32)
        before = np.cos(0.3) * lead + np.sin(0.3) * np.eye(m, RANK, -RANK, dtype=np.float32)
        self.best = float(np.sum(sigma[:RANK].astype(np.float64) ** 2))
        self.a = orthogonal(orthogonal(core, 0, 0), 1, 1)
        self.lead = orthogonal(lead, 0, 0)
        self.before = orthogonal(before.astype(np.float32), 0, 0)

    def accuracy(self, basis, gap):
        """Sine of the largest angle to the leading subspace, or the share of energy that lacks."""
        basis, _ = np.linalg.qr(np.asarray(basis, np.float64))
        if not gap:
            energy = np.sum((basis.astype(np.float32).T @ self.a).astype(np.float64) ** 2)
            return f"lacks {max(0.0, 1 - energy / self.best):.0e} of the energy"
        lead = self.lead.astype(np.float64)
        return f"sine {np.linalg.norm(basis - lead @ (lead.T @ basis), 2):.1e}"


@pytest.fixture(scope="module", params=SIZES)
def gradient(request):
    m, n, gap = SIZES[request.param]
    return Gradient(m, n, gap), gap


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
def test_renewal(gradient, method, benchmark):
    problem, gap = gradient
    torch.manual_seed(0)
    # Once, and nothing before it: the full SVD alone takes most of a minute.
    basis = benchmark.pedantic(METHODS[method], (problem.a, problem.before), rounds=1)
    benchmark.extra_info["accuracy"] = problem.accuracy(basis, gap)
