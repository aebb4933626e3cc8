"""Low-rank inverse problems: make them, solve them, study them."""

from lowrank_sp.inverse.entries import Entries as Entries
from lowrank_sp.inverse.measurements import DenseSensing as DenseSensing
from lowrank_sp.inverse.measurements import EntrySampling as EntrySampling
from lowrank_sp.inverse.measurements import GaussianSensing as GaussianSensing
from lowrank_sp.inverse.measurements import Hankel as Hankel
from lowrank_sp.inverse.measurements import HankelLift as HankelLift
from lowrank_sp.inverse.measurements import Measurement as Measurement
from lowrank_sp.inverse.measurements import PartialFourier as PartialFourier
from lowrank_sp.inverse.measurements import RankOneSensing as RankOneSensing
from lowrank_sp.inverse.pattern import Identifiability as Identifiability
from lowrank_sp.inverse.pattern import Pattern as Pattern
