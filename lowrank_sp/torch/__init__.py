"""Bridges to PyTorch: factor pairs of models, and an optimizer that runs any update rule."""

from lowrank_sp.torch.attached import detach as detach
from lowrank_sp.torch.attached import forms_of as forms_of
from lowrank_sp.torch.attached import layered_forms_of as layered_forms_of
from lowrank_sp.torch.attached import layout as layout
from lowrank_sp.torch.attached import load_state_ as load_state_
from lowrank_sp.torch.attached import merge_ as merge_
from lowrank_sp.torch.attached import state as state
from lowrank_sp.torch.attaching import attach as attach
from lowrank_sp.torch.attaching import attach_forms as attach_forms
from lowrank_sp.torch.attaching import attach_shared as attach_shared
from lowrank_sp.torch.collect import collect_gradients as collect_gradients
from lowrank_sp.torch.collect import collect_inputs as collect_inputs
from lowrank_sp.torch.factored import FactoredLinear as FactoredLinear
from lowrank_sp.torch.factored import load_factored_ as load_factored_
from lowrank_sp.torch.initialize import initialize_ as initialize_
from lowrank_sp.torch.integers import IntegerTensor as IntegerTensor
from lowrank_sp.torch.integers import integer_weights_ as integer_weights_
from lowrank_sp.torch.modules import Adapted as Adapted
from lowrank_sp.torch.optim import FactorOptimizer as FactorOptimizer
from lowrank_sp.torch.pairs import ParameterPair as ParameterPair
from lowrank_sp.torch.pairs import lora_pairs as lora_pairs
from lowrank_sp.torch.projected import ParameterWeight as ParameterWeight
from lowrank_sp.torch.projected import ProjectedOptimizer as ProjectedOptimizer
from lowrank_sp.torch.quantized import Codec as Codec
