"""The LoRA side: initializers of adapter factors."""

from lowrank_sp.adapters.initializers import INITIALIZERS as INITIALIZERS
from lowrank_sp.adapters.initializers import Initialization as Initialization
from lowrank_sp.adapters.initializers import gaussian as gaussian
from lowrank_sp.adapters.initializers import lora as lora
from lowrank_sp.adapters.initializers import milora as milora
from lowrank_sp.adapters.initializers import olora as olora
from lowrank_sp.adapters.initializers import orthogonal as orthogonal
from lowrank_sp.adapters.initializers import pissa as pissa
