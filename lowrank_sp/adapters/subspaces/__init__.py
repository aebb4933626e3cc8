"""Updates in chosen subspaces: continual learning, safety, unlearning, spectra."""

from lowrank_sp.adapters.subspaces.blind_product import BlindProduct as BlindProduct
from lowrank_sp.adapters.subspaces.continual import inflora as inflora
from lowrank_sp.adapters.subspaces.continual import overlap_penalty as overlap_penalty
from lowrank_sp.adapters.subspaces.continual import scheduled_energy as scheduled_energy
from lowrank_sp.adapters.subspaces.projectors import Projector as Projector
from lowrank_sp.adapters.subspaces.projectors import input_span as input_span
from lowrank_sp.adapters.subspaces.projectors import restricted as restricted
from lowrank_sp.adapters.subspaces.projectors import span as span
from lowrank_sp.adapters.subspaces.safe_product import SafeProduct as SafeProduct
from lowrank_sp.adapters.subspaces.safety import Gated as Gated
from lowrank_sp.adapters.subspaces.safety import alignment as alignment
from lowrank_sp.adapters.subspaces.safety import harmful_outputs as harmful_outputs
from lowrank_sp.adapters.subspaces.safety import published_alignment as published_alignment
from lowrank_sp.adapters.subspaces.safety import safe_lora as safe_lora
from lowrank_sp.adapters.subspaces.spectral import at_stable_rank as at_stable_rank
from lowrank_sp.adapters.subspaces.spectral import clipped as clipped
from lowrank_sp.adapters.subspaces.spectral import powered as powered
from lowrank_sp.adapters.subspaces.spectral import reweighted as reweighted
from lowrank_sp.adapters.subspaces.trailing import TrailingPart as TrailingPart
from lowrank_sp.adapters.subspaces.unlearning import fila as fila
from lowrank_sp.adapters.subspaces.unlearning import negated as negated
from lowrank_sp.adapters.subspaces.unlearning import row_importance as row_importance
