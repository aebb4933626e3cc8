"""Where an adapter starts: factors of the update, and the base weight that makes up for them.

A layer computes ``weight @ x`` with ``weight = residual + scale * up @ down``. Every initializer is
a function ``(weight, rank, *, alpha=None, rng=None, dtype=None)``, with the data that it needs as
one more keyword, and keeps that identity, to the rounding of the dtypes in which its parts are
stored: the residual is derived from the factors after they were cast.
"""

from collections.abc import Callable as _Callable
from typing import NamedTuple as _NamedTuple

from lowrank_sp.adapters.initializers._start import Initialization as Initialization
from lowrank_sp.adapters.initializers.activation import corda_ipm as corda_ipm
from lowrank_sp.adapters.initializers.activation import corda_kpm as corda_kpm
from lowrank_sp.adapters.initializers.activation import eva as eva
from lowrank_sp.adapters.initializers.activation import weighted as weighted
from lowrank_sp.adapters.initializers.allocation import Allocation as Allocation
from lowrank_sp.adapters.initializers.allocation import allocate_by_energy as allocate_by_energy
from lowrank_sp.adapters.initializers.allocation import (
    allocate_by_sensitivity as allocate_by_sensitivity,
)
from lowrank_sp.adapters.initializers.allocation import allocate_by_variance as allocate_by_variance
from lowrank_sp.adapters.initializers.gradient import CoreStart as CoreStart
from lowrank_sp.adapters.initializers.gradient import lora_ga as lora_ga
from lowrank_sp.adapters.initializers.gradient import lora_one as lora_one
from lowrank_sp.adapters.initializers.gradient import lora_sb as lora_sb
from lowrank_sp.adapters.initializers.plain import gaussian as gaussian
from lowrank_sp.adapters.initializers.plain import lora as lora
from lowrank_sp.adapters.initializers.plain import orthogonal as orthogonal
from lowrank_sp.adapters.initializers.quantized import (
    QuantizedInitialization as QuantizedInitialization,
)
from lowrank_sp.adapters.initializers.quantized import loftq as loftq
from lowrank_sp.adapters.initializers.quantized import qpissa as qpissa
from lowrank_sp.adapters.initializers.spectral import kasa as kasa
from lowrank_sp.adapters.initializers.spectral import mica as mica
from lowrank_sp.adapters.initializers.spectral import milora as milora
from lowrank_sp.adapters.initializers.spectral import nora as nora
from lowrank_sp.adapters.initializers.spectral import olora as olora
from lowrank_sp.adapters.initializers.spectral import pissa as pissa


class Calibrated(_NamedTuple):
    """An initializer that needs data, and the keyword under which it takes them.

    The keyword is also the key of the data in a calibration file, ``<layer>.<statistic>``.
    """

    initializer: _Callable[..., Initialization]
    statistic: str


#: Initializers that need the weight only, by name, for programs that take a name from their user.
INITIALIZERS: dict[str, _Callable[..., Initialization]] = {
    "lora": lora,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
    "mica": mica,
    "nora": nora,
}

#: Initializers that need data of the layer, by name.
CALIBRATED: dict[str, Calibrated] = {
    "eva": Calibrated(eva, "components"),
    "weighted": Calibrated(weighted, "second_moment"),
    "corda_ipm": Calibrated(corda_ipm, "second_moment"),
    "corda_kpm": Calibrated(corda_kpm, "second_moment"),
    "lora_ga": Calibrated(lora_ga, "gradient"),
    "lora_one": Calibrated(lora_one, "gradient"),
}
