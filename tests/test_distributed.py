"""A real Dask cluster on this machine: the same job elsewhere, and a matrix larger than memory."""

import dask.array as da
import numpy as np
import pytest
from dask.distributed import Client, LocalCluster

import lowrank_sp as lr
from lowrank_sp import checkpoint

ROWS, COLUMNS, RANK, BLOCK = 131_072, 1024, 6, 4096  # 512 MiB in float32
ALLOWED = "400MiB"


@pytest.fixture(scope="module")
def client():
    cluster = LocalCluster(
        n_workers=1, threads_per_worker=1, memory_limit=ALLOWED, dashboard_address=None
    )
    with cluster, Client(cluster) as client:
        yield client


def test_checkpoint_job_on_a_cluster_equals_the_serial_one(client, tmp_path):
    (tmp_path / "model").mkdir()
    checkpoint.write_demo_model(tmp_path / "model", hidden=96, layers=1)
    checkpoint.initialize(tmp_path / "model", "pissa", tmp_path / "here", rank=4)
    checkpoint.initialize(
        tmp_path / "model", "pissa", tmp_path / "there", rank=4, executor=client.get_executor()
    )
    here, there = (
        checkpoint.read_adapter(tmp_path / d / "adapter").layers for d in ("here", "there")
    )
    for name, layer in here.items():
        product = layer.up @ layer.down
        error = np.linalg.norm(product - there[name].up @ there[name].down)
        assert error <= 100 * np.finfo(np.float32).eps * np.linalg.norm(product)
    assert checkpoint.verify(tmp_path / "there", tmp_path / "model").passed


def test_matrix_larger_than_the_memory_allowed(client):
    rng = np.random.default_rng(0)
    v, _ = np.linalg.qr(rng.standard_normal((COLUMNS, RANK)))
    s = 10.0 / np.arange(1, RANK + 1)

    def rows(block_info=None):
        # Columns of a discrete cosine transform: orthonormal over all rows, known in every block.
        start, stop = block_info[None]["array-location"][0]
        i = np.arange(start, stop)[:, None]
        u = np.sqrt(2 / ROWS) * np.cos(np.pi * (i + 0.5) * np.arange(1, RANK + 1) / ROWS)
        return ((u * s) @ v.T).astype(np.float32)

    chunks = ((BLOCK,) * (ROWS // BLOCK), (COLUMNS,))
    matrix = da.map_blocks(rows, chunks=chunks, meta=np.empty((0, 0), np.float32))
    limit = next(iter(client.scheduler_info()["workers"].values()))["memory_limit"]
    assert matrix.nbytes > limit
    f = lr.truncated_svd(matrix, RANK, rng=0)
    assert np.all(abs(f.s - s) <= f.bounds)
    lr.testing.assert_same_subspace(f.vh.T, v.astype(np.float32), tol=1e-3)
