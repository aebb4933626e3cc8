"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import lowrank_sp

NAMES = [
    name
    for _, name, _ in pkgutil.walk_packages(lowrank_sp.__path__, "lowrank_sp.")
    if name != "lowrank_sp.cli"
]
WITH_EXAMPLES = {
    "lowrank_sp.factors",
    "lowrank_sp.gauge",
    "lowrank_sp.iterate",
    "lowrank_sp.linalg.orth",
    "lowrank_sp.linalg.sketch",
    "lowrank_sp.linalg.spectrum",
    "lowrank_sp.linalg.svd",
    "lowrank_sp.linalg.weighted",
    "lowrank_sp.testing",
}


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted > 0 or name not in WITH_EXAMPLES
