"""Low-rank inverse problems with known truth."""

from lowrank_sp.inverse.synthetic.draws import degrees_of_freedom as degrees_of_freedom
from lowrank_sp.inverse.synthetic.draws import low_rank as low_rank
from lowrank_sp.inverse.synthetic.draws import positions as positions
from lowrank_sp.inverse.synthetic.harmonics import Harmonics as Harmonics
from lowrank_sp.inverse.synthetic.harmonics import harmonics as harmonics
from lowrank_sp.inverse.synthetic.matrices import Completion as Completion
from lowrank_sp.inverse.synthetic.matrices import Robust as Robust
from lowrank_sp.inverse.synthetic.matrices import Sensing as Sensing
from lowrank_sp.inverse.synthetic.matrices import completion as completion
from lowrank_sp.inverse.synthetic.matrices import robust as robust
from lowrank_sp.inverse.synthetic.matrices import sensing as sensing
