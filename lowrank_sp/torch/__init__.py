"""Bridges to PyTorch: factor pairs of models, and an optimizer that runs any update rule."""

from lowrank_sp.torch.optim import FactorOptimizer as FactorOptimizer
from lowrank_sp.torch.pairs import ParameterPair as ParameterPair
from lowrank_sp.torch.pairs import lora_pairs as lora_pairs
from lowrank_sp.torch.projected import ParameterWeight as ParameterWeight
from lowrank_sp.torch.projected import ProjectedOptimizer as ProjectedOptimizer
