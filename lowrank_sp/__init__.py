"""Low-rank matrices and tensors as signal processing, and the LoRA adapters they initialize."""

from lowrank_sp.factors import SVD as SVD
from lowrank_sp.factors import LowRank as LowRank
from lowrank_sp.iterate import Record as Record
from lowrank_sp.iterate import Solution as Solution
from lowrank_sp.iterate import Stop as Stop
from lowrank_sp.iterate import iterate as iterate
from lowrank_sp.linalg.orth import orthonormalize as orthonormalize
from lowrank_sp.linalg.sketch import StreamingSVD as StreamingSVD
from lowrank_sp.linalg.sketch import generalized_nystrom as generalized_nystrom
from lowrank_sp.linalg.sketch import nystrom as nystrom
from lowrank_sp.linalg.spectrum import effective_rank as effective_rank
from lowrank_sp.linalg.spectrum import energy_rank as energy_rank
from lowrank_sp.linalg.spectrum import gavish_donoho_rank as gavish_donoho_rank
from lowrank_sp.linalg.spectrum import gavish_donoho_threshold as gavish_donoho_threshold
from lowrank_sp.linalg.spectrum import principal_angles as principal_angles
from lowrank_sp.linalg.spectrum import stable_rank as stable_rank
from lowrank_sp.linalg.spectrum import subspace_overlap as subspace_overlap
from lowrank_sp.linalg.svd import minor_svd as minor_svd
from lowrank_sp.linalg.svd import randomized_svd as randomized_svd
from lowrank_sp.linalg.svd import singular_values as singular_values
from lowrank_sp.linalg.svd import truncated_svd as truncated_svd
from lowrank_sp.linalg.weighted import output_norm as output_norm
from lowrank_sp.linalg.weighted import weighted_low_rank as weighted_low_rank
from lowrank_sp.operators import LinearOperator as LinearOperator
from lowrank_sp.operators import as_operator as as_operator
from lowrank_sp.testing import relative_error as relative_error

__version__ = "0.1.0"
