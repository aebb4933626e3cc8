"""Serving many adapters of one base: banks, shared bases, and when to merge."""

from lowrank_sp.adapters.serving.bank import AdapterBank as AdapterBank
from lowrank_sp.adapters.serving.clustered import jd_clustered as jd_clustered
from lowrank_sp.adapters.serving.compress import jd_diag as jd_diag
from lowrank_sp.adapters.serving.compress import jd_full as jd_full
from lowrank_sp.adapters.serving.cost import Work as Work
from lowrank_sp.adapters.serving.cost import factor_work as factor_work
from lowrank_sp.adapters.serving.cost import merging_pays_from as merging_pays_from
from lowrank_sp.adapters.serving.cost import switch_work as switch_work
from lowrank_sp.adapters.serving.shared import SharedAdapters as SharedAdapters
