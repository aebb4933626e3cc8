"""Update rules on a factor pair, and the law they are measured on."""

from lowrank_sp.updates.first_order import AdamW as AdamW
from lowrank_sp.updates.first_order import GradientDescent as GradientDescent
from lowrank_sp.updates.first_order import LoRAPlus as LoRAPlus
from lowrank_sp.updates.first_order import ScaledAdamW as ScaledAdamW
from lowrank_sp.updates.first_order import ScaledGD as ScaledGD
from lowrank_sp.updates.moments import Adam as Adam
from lowrank_sp.updates.moments import Momentum as Momentum
from lowrank_sp.updates.moments import Moments as Moments
from lowrank_sp.updates.moments import Plain as Plain
from lowrank_sp.updates.rule import Pair as Pair
from lowrank_sp.updates.rule import Rule as Rule
