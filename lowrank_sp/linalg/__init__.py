"""Linear algebra of one matrix: factorizations, sketches, weighted approximation, spectra."""

from lowrank_sp.linalg.orth import orthonormalize as orthonormalize
from lowrank_sp.linalg.svd import minor_svd as minor_svd
from lowrank_sp.linalg.svd import randomized_svd as randomized_svd
from lowrank_sp.linalg.svd import singular_values as singular_values
from lowrank_sp.linalg.svd import truncated_svd as truncated_svd
