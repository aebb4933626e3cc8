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
    "lowrank_sp.adapters.forms.basis",
    "lowrank_sp.adapters.forms.blocks",
    "lowrank_sp.adapters.forms.chain",
    "lowrank_sp.adapters.forms.compress",
    "lowrank_sp.adapters.forms.hadamard",
    "lowrank_sp.adapters.forms.khatri_rao",
    "lowrank_sp.adapters.forms.kronecker",
    "lowrank_sp.adapters.forms.pointwise",
    "lowrank_sp.adapters.forms.random_sum",
    "lowrank_sp.adapters.forms.sparse",
    "lowrank_sp.adapters.forms.budget",
    "lowrank_sp.adapters.forms.core",
    "lowrank_sp.adapters.forms.fixed_sides",
    "lowrank_sp.adapters.forms.magnitude",
    "lowrank_sp.adapters.forms.penalties",
    "lowrank_sp.adapters.forms.spectrum",
    "lowrank_sp.adapters.forms._chains",
    "lowrank_sp.adapters.forms._grid",
    "lowrank_sp.adapters.forms.gates",
    "lowrank_sp.adapters.forms.shared_core",
    "lowrank_sp.adapters.forms.shared_factors",
    "lowrank_sp.adapters.forms.shared_fit",
    "lowrank_sp.adapters.forms.shared_formats",
    "lowrank_sp.adapters.forms.tt",
    "lowrank_sp.adapters.forms.tt_factors",
    "lowrank_sp.adapters.algebra.diagnostics",
    "lowrank_sp.adapters.algebra.extraction",
    "lowrank_sp.adapters.algebra.merge.entrywise",
    "lowrank_sp.adapters.algebra.merge.exact",
    "lowrank_sp.adapters.algebra.merge.subspace",
    "lowrank_sp.adapters.algebra.sums",
    "lowrank_sp.adapters.federated",
    "lowrank_sp.adapters.initializers.activation",
    "lowrank_sp.adapters.initializers.allocation",
    "lowrank_sp.adapters.initializers.gradient",
    "lowrank_sp.adapters.initializers.quantized",
    "lowrank_sp.adapters.initializers.spectral",
    "lowrank_sp.adapters.quantize.formats",
    "lowrank_sp.adapters.serving.bank",
    "lowrank_sp.adapters.serving.compress",
    "lowrank_sp.adapters.serving.cost",
    "lowrank_sp.adapters.statistics",
    "lowrank_sp.estimators",
    "lowrank_sp.factors",
    "lowrank_sp.gauge",
    "lowrank_sp.inverse.completion.alternating",
    "lowrank_sp.inverse.completion.factored",
    "lowrank_sp.inverse.completion.nuclear",
    "lowrank_sp.inverse.completion.selection",
    "lowrank_sp.inverse.entries",
    "lowrank_sp.inverse.measurements",
    "lowrank_sp.inverse.synthetic.harmonics",
    "lowrank_sp.inverse.synthetic.matrices",
    "lowrank_sp.inverse.denoise",
    "lowrank_sp.inverse.robust",
    "lowrank_sp.inverse.study",
    "lowrank_sp.inverse.descent",
    "lowrank_sp.inverse.sensing.alternating",
    "lowrank_sp.inverse.sensing.factored",
    "lowrank_sp.inverse.sensing.thresholding",
    "lowrank_sp.updates.conformance",
    "lowrank_sp.updates.factorized",
    "lowrank_sp.updates.full_weight",
    "lowrank_sp.updates.projector",
    "lowrank_sp.updates.first_order",
    "lowrank_sp.updates.flatness",
    "lowrank_sp.updates.spectral",
    "lowrank_sp.updates.wrappers",
    "lowrank_sp.iterate",
    "lowrank_sp.linalg.orth",
    "lowrank_sp.linalg.sketch",
    "lowrank_sp.linalg.spectrum",
    "lowrank_sp.linalg.svd",
    "lowrank_sp.linalg.weighted",
    "lowrank_sp.tensors.completion",
    "lowrank_sp.tensors.cp",
    "lowrank_sp.tensors.cp_als",
    "lowrank_sp.tensors.cp_completion",
    "lowrank_sp.tensors.cp_nonnegative",
    "lowrank_sp.tensors.cp_sampled",
    "lowrank_sp.tensors.entries",
    "lowrank_sp.tensors.hooi",
    "lowrank_sp.tensors.hosvd",
    "lowrank_sp.tensors.joint",
    "lowrank_sp.tensors.modes",
    "lowrank_sp.tensors.mttkrp",
    "lowrank_sp.tensors.ranks",
    "lowrank_sp.tensors.rearrange",
    "lowrank_sp.tensors.streaming",
    "lowrank_sp.tensors.tt",
    "lowrank_sp.tensors.tt_cross",
    "lowrank_sp.tensors.tt_matrix",
    "lowrank_sp.tensors.tt_round",
    "lowrank_sp.tensors.tt_svd",
    "lowrank_sp.tensors.tucker",
    "lowrank_sp.testing",
    "lowrank_sp.torch.optim",
    "lowrank_sp.torch.pairs",
    "lowrank_sp.torch.projected",
}


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted > 0 or name not in WITH_EXAMPLES
