"""Matrix sensing: the low-rank matrix that has given linear measurements."""

from lowrank_sp.inverse.sensing.alternating import alt_gd_min as alt_gd_min
from lowrank_sp.inverse.sensing.alternating import (
    alternating_minimization as alternating_minimization,
)
from lowrank_sp.inverse.sensing.factored import factored_gd as factored_gd
from lowrank_sp.inverse.sensing.factored import scaled_gd as scaled_gd
from lowrank_sp.inverse.sensing.thresholding import niht as niht
from lowrank_sp.inverse.sensing.thresholding import nuclear_norm as nuclear_norm
