"""Array libraries that every law is tried on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_strict
import jax
import numpy as np
import pytest
import scipy.linalg  # noqa: F401  (its BLAS must be loaded to be limited)
import torch
from threadpoolctl import threadpool_limits

from lowrank_sp._arrays import to_host

jax.config.update("jax_enable_x64", True)
array_api_strict.set_array_api_strict_flags(api_version="2025.12")


@pytest.fixture(autouse=True, scope="session")
def threads():
    """One BLAS thread: on small matrices more would only spin. The benchmarks override this."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """Gigabytes of functions that JAX has compiled, which no other module calls."""
    yield
    jax.clear_caches()


@dataclass(frozen=True)
class Backend:
    """An array library: ``asarray`` brings a NumPy array there, ``host`` brings it back."""

    name: str
    asarray: Callable[[np.ndarray], Any]

    @staticmethod
    def host(a: Any) -> np.ndarray:
        return to_host(a)


def read_only(a: np.ndarray) -> np.ndarray:
    a = np.array(a)
    a.flags.writeable = False
    return a


def strict(a: np.ndarray) -> Any:
    return array_api_strict.asarray(a, device=array_api_strict.Device("device1"))


BACKENDS = {
    "numpy": np.array,
    "numpy-readonly": read_only,
    "strict": strict,
    "torch": lambda a: torch.asarray(np.array(a)),
    "jax": jax.numpy.asarray,
}


@pytest.fixture(params=BACKENDS)
def xp(request) -> Backend:
    return Backend(request.param, BACKENDS[request.param])


@pytest.fixture
def host() -> Callable[[Any], np.ndarray]:
    return to_host
