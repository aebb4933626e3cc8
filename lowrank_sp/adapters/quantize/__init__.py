r"""Matrices in a few bits an entry: blocks of NF4, integers or small floats.

A row is cut into blocks. A block keeps a scale (and an offset, in the affine format), an entry the
index of a level:

.. math:: \hat w_{ij} = \text{scale}_{ib}\, \text{levels}[\text{code}_{ij}] + \text{offset}_{ib},
          \qquad b = \lfloor j / \text{block} \rfloor

and every quantizer chooses the nearest level, so the error of an entry is at most half the distance
of the levels around it.
"""

from lowrank_sp.adapters.quantize._blocks import Quantized as Quantized
from lowrank_sp.adapters.quantize.formats import double as double
from lowrank_sp.adapters.quantize.formats import fp8_e4m3 as fp8_e4m3
from lowrank_sp.adapters.quantize.formats import fp8_e5m2 as fp8_e5m2
from lowrank_sp.adapters.quantize.formats import int_affine as int_affine
from lowrank_sp.adapters.quantize.formats import int_symmetric as int_symmetric
from lowrank_sp.adapters.quantize.formats import nf4 as nf4
from lowrank_sp.adapters.quantize.formats import nf4_levels as nf4_levels
