"""Adapter parameterizations: formulas for the update of a weight."""

from lowrank_sp.adapters.forms._form import Conversion as Conversion
from lowrank_sp.adapters.forms._form import FixedDown as FixedDown
from lowrank_sp.adapters.forms._form import FixedUp as FixedUp
from lowrank_sp.adapters.forms._form import Form as Form
from lowrank_sp.adapters.forms._form import LayeredForm as LayeredForm
from lowrank_sp.adapters.forms._form import Product as Product
from lowrank_sp.adapters.forms._form import Start as Start
from lowrank_sp.adapters.forms._parts import Fixed as Fixed
from lowrank_sp.adapters.forms._parts import Parts as Parts
from lowrank_sp.adapters.forms._parts import Trained as Trained
from lowrank_sp.adapters.forms._parts import Weight as Weight
