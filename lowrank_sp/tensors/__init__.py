"""Low-rank tensors: CP, Tucker, tensor trains, and the joint factorizations of many matrices."""

from lowrank_sp.tensors.entries import TensorEntries as TensorEntries
from lowrank_sp.tensors.hooi import hooi as hooi
from lowrank_sp.tensors.hooi import tucker2 as tucker2
from lowrank_sp.tensors.hosvd import hosvd as hosvd
from lowrank_sp.tensors.hosvd import st_hosvd as st_hosvd
from lowrank_sp.tensors.modes import fold as fold
from lowrank_sp.tensors.modes import khatri_rao as khatri_rao
from lowrank_sp.tensors.modes import kronecker as kronecker
from lowrank_sp.tensors.modes import mode_dot as mode_dot
from lowrank_sp.tensors.modes import multi_mode_dot as multi_mode_dot
from lowrank_sp.tensors.modes import unfold as unfold
from lowrank_sp.tensors.tucker import Tucker as Tucker
