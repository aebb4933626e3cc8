"""Algebra of updates: sums, sizes, merging, extraction, diagnostics; never an ``m x n`` array."""

from lowrank_sp.adapters.algebra import merge as merge
from lowrank_sp.adapters.algebra.diagnostics import Intruders as Intruders
from lowrank_sp.adapters.algebra.diagnostics import Sides as Sides
from lowrank_sp.adapters.algebra.diagnostics import adapter_overlap as adapter_overlap
from lowrank_sp.adapters.algebra.diagnostics import base_energy as base_energy
from lowrank_sp.adapters.algebra.diagnostics import intruders as intruders
from lowrank_sp.adapters.algebra.diagnostics import reduce_intruders as reduce_intruders
from lowrank_sp.adapters.algebra.extraction import extract as extract
from lowrank_sp.adapters.algebra.sums import add as add
from lowrank_sp.adapters.algebra.sums import average as average
from lowrank_sp.adapters.algebra.sums import resize as resize
from lowrank_sp.adapters.algebra.sums import subtract as subtract
from lowrank_sp.adapters.algebra.sums import sv_cumulative as sv_cumulative
from lowrank_sp.adapters.algebra.sums import sv_fro as sv_fro
from lowrank_sp.adapters.algebra.sums import sv_ratio as sv_ratio
