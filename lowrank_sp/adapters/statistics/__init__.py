"""What a layer sees of its data, gathered batch by batch in bounded memory.

Every statistic is a frozen value: ``update`` returns a new one that has seen one more batch, and
two of them add up, so that batches may be shared out over workers. ``arrays`` names its parts;
:func:`pack` and :func:`unpack` turn the statistics of many layers into one flat mapping of arrays,
such as a safetensors file holds, and back.
"""

from lowrank_sp.adapters.statistics.batches import peak_scaled as peak_scaled
from lowrank_sp.adapters.statistics.components import InputPCA as InputPCA
from lowrank_sp.adapters.statistics.files import Statistic as Statistic
from lowrank_sp.adapters.statistics.files import pack as pack
from lowrank_sp.adapters.statistics.files import unpack as unpack
from lowrank_sp.adapters.statistics.means import MeanGradient as MeanGradient
from lowrank_sp.adapters.statistics.means import MeanMagnitude as MeanMagnitude
from lowrank_sp.adapters.statistics.means import MeanSquare as MeanSquare
from lowrank_sp.adapters.statistics.means import SecondMoment as SecondMoment
