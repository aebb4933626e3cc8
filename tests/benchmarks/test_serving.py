"""Serving and aggregation at the sizes of a 4096-wide layer, rank 16, in float32.

A batch of 256 rows for 64 adapters, beside one pass of the batch per adapter and beside PEFT's
mixed batches; 200 adapters in one shared basis; the rounds of 100 clients, beside dense matrices.
Accuracies are relative errors, for shared bases with the memory above that of the factors.
"""

import tracemalloc

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lowrank_sp import Stop
from lowrank_sp.adapters import federated
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.quantize import int_symmetric, nf4
from lowrank_sp.adapters.serving import AdapterBank, jd_clustered, jd_diag, jd_full

WIDTH, RANK = 4096, 16


def adapters(count, *, common=0, seed=0):
    """Gaussian factors; with ``common``, half of them from a space of that dimension."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    left, right = normal(WIDTH, common), normal(common, WIDTH)
    return [
        Product(
            (normal(WIDTH, RANK) + left @ normal(common, RANK) / max(1, common) ** 0.5) / 64,
            (normal(RANK, WIDTH) + normal(RANK, common) @ right / max(1, common) ** 0.5) / 64,
            2.0,
        )
        for _ in range(count)
    ]


ROWS, ADAPTERS = 256, 64


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, ADAPTERS, ROWS)
    pairs = adapters(ADAPTERS)
    x = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
    exact = np.zeros((ROWS, WIDTH))
    for k, p in enumerate(pairs):
        rows = x[ids == k].astype(float)
        exact[ids == k] = p.scale * (rows @ p.down.T.astype(float)) @ p.up.T.astype(float)
    return pairs, x, ids, exact


def in_torch(pairs):
    return [Product(torch.tensor(p.up), torch.tensor(p.down), p.scale) for p in pairs]


def one_pass_each(pairs, x, ids):
    y = np.zeros((len(x), WIDTH), x.dtype)
    for k, p in enumerate(pairs):
        y += (ids == k)[:, None] * (p.scale * ((x @ p.down.T) @ p.up.T))
    return y


def numpy_pass_each(pairs, x, ids):
    return lambda: one_pass_each(pairs, x, ids)


def torch_pass_each(pairs, x, ids):
    pairs, x, ids = in_torch(pairs), torch.tensor(x), torch.tensor(ids)

    def run():
        y = torch.zeros_like(x)
        for k, p in enumerate(pairs):
            y += (ids == k)[:, None] * (p.scale * ((x @ p.down.T) @ p.up.T))
        return y

    return run


def peft_mixed_batch(pairs, x, ids):
    """The layer's own loop over the adapters of a batch, without the product with the weight."""
    base = nn.Linear(1, 1, bias=False)
    base.in_features = base.out_features = WIDTH
    base.weight = nn.Parameter(torch.zeros(1, 1).expand(WIDTH, WIDTH), requires_grad=False)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["0"])
    model = get_peft_model(nn.Sequential(base), config, adapter_name="0")
    for k in range(1, len(pairs)):
        model.add_adapter(str(k), config)
    layer = model.base_model.model[0]
    for k, p in enumerate(pairs):
        layer.lora_A[str(k)].weight.data = torch.tensor(p.down)
        layer.lora_B[str(k)].weight.data = torch.tensor(p.up)
    layer.base_layer.forward = torch.zeros_like
    x, names = torch.tensor(x), [str(k) for k in ids]

    def run():
        with torch.no_grad():
            return layer.eval()(x, adapter_names=names)

    return run


def bank_of(quantizer=None):
    def prepared(pairs, x, ids):
        bank = AdapterBank.of(pairs)
        bank = bank if quantizer is None else bank.map(quantizer)
        return lambda: bank.apply(x, ids)

    return prepared


def torch_bank(pairs, x, ids):
    bank, x = AdapterBank.of(in_torch(pairs)), torch.tensor(x)
    return lambda: bank.apply(x, ids)


SERVED = {
    "AdapterBank, NumPy": bank_of(),
    "AdapterBank, PyTorch": torch_bank,
    "one pass per adapter, NumPy": numpy_pass_each,
    "one pass per adapter, PyTorch": torch_pass_each,
    "PEFT mixed batch": peft_mixed_batch,
    "AdapterBank, 8 bits": bank_of(lambda a: int_symmetric(a, bits=8)),
    "AdapterBank, NF4": bank_of(nf4),
}


@pytest.mark.parametrize("name", SERVED)
def test_a_batch(name, batch, benchmark):
    *data, exact = batch
    y = benchmark.pedantic(SERVED[name](*data), rounds=5, warmup_rounds=1)
    error = np.linalg.norm(np.asarray(y) - exact) / np.linalg.norm(exact)
    benchmark.extra_info["accuracy"] = f"{error:.1e}"


STOP = Stop(25)
SHARED = {
    "JD-Full": lambda pairs: jd_full(pairs, rank=64, rng=0, stop=STOP),
    "JD-Diag": lambda pairs: jd_diag(pairs, rank=64, rng=0, stop=STOP),
    "clustered, 4 bases": lambda pairs: jd_clustered(pairs, rank=64, clusters=4, rng=0, stop=STOP),
}


@pytest.mark.parametrize("name", SHARED)
def test_two_hundred_adapters_in_shared_bases(name, benchmark):
    pairs = adapters(200, common=48)
    solution = benchmark.pedantic(SHARED[name], (pairs,), rounds=1)
    tracemalloc.start()
    SHARED[name](pairs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    factors = sum(p.up.nbytes + p.down.nbytes for p in pairs)
    benchmark.extra_info["accuracy"] = (
        f"{solution.value.error:.3f} after {solution.n_iter} sweeps; memory {peak / factors:.1f} "
        "times that of the factors"
    )


def dense_mean(pairs):
    total = np.zeros((WIDTH, WIDTH), np.float32)
    for p in pairs:
        total += (p.scale / len(pairs)) * (p.up @ p.down)
    return total


def dense_fedit(pairs):
    up, down = (sum(getattr(p, part) for p in pairs) / len(pairs) for part in ("up", "down"))
    return np.linalg.norm(dense_mean(pairs) - pairs[0].scale * up @ down)


def dense_flexlora(pairs):
    f = torch.svd_lowrank(torch.from_numpy(dense_mean(pairs)), q=RANK + 8, niter=4)
    return float(f[1][0])


ROUNDS = {
    "fedit": federated.fedit,
    "fedex": federated.fedex,
    "flora": federated.flora,
    "lora_fair": federated.lora_fair,
    "flora_na": lambda pairs: federated.flora_na(pairs, rng=0),
    "flexlora, ranks 4 to 16": lambda pairs: federated.flexlora(
        pairs, ranks=[4, 8, 12, 16] * 25, rng=0
    ),
    "FedIT by dense matrices": dense_fedit,
    "FlexLoRA by dense matrices, torch.svd_lowrank": dense_flexlora,
}


@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_of_a_hundred_clients(name, benchmark):
    pairs = adapters(100, common=48)
    result = benchmark.pedantic(ROUNDS[name], (pairs,), rounds=1)
    tracemalloc.start()
    ROUNDS[name](pairs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    factors = sum(p.up.nbytes + p.down.nbytes for p in pairs)
    if isinstance(result, tuple):
        result = result[-1]
    error = getattr(result, "error", None)
    told = "" if error is None else f"error {error:.4g}; "
    benchmark.extra_info["accuracy"] = f"{told}memory {peak / factors:.1f} times the factors"
