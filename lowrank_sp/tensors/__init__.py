"""Low-rank tensors: CP, Tucker, tensor trains, and the joint factorizations of many matrices."""

from lowrank_sp.tensors.cp import CP as CP
from lowrank_sp.tensors.cp_als import cp_als as cp_als
from lowrank_sp.tensors.cp_completion import cp_completion as cp_completion
from lowrank_sp.tensors.cp_nonnegative import cp_hals as cp_hals
from lowrank_sp.tensors.cp_sampled import cp_arls as cp_arls
from lowrank_sp.tensors.entries import TensorEntries as TensorEntries
from lowrank_sp.tensors.hooi import hooi as hooi
from lowrank_sp.tensors.hooi import tucker2 as tucker2
from lowrank_sp.tensors.hosvd import hosvd as hosvd
from lowrank_sp.tensors.hosvd import st_hosvd as st_hosvd
from lowrank_sp.tensors.joint import joint_diagonal as joint_diagonal
from lowrank_sp.tensors.joint import joint_svd as joint_svd
from lowrank_sp.tensors.modes import fold as fold
from lowrank_sp.tensors.modes import khatri_rao as khatri_rao
from lowrank_sp.tensors.modes import kronecker as kronecker
from lowrank_sp.tensors.modes import mode_dot as mode_dot
from lowrank_sp.tensors.modes import multi_mode_dot as multi_mode_dot
from lowrank_sp.tensors.modes import unfold as unfold
from lowrank_sp.tensors.mttkrp import mttkrp as mttkrp
from lowrank_sp.tensors.rearrange import Kronecker as Kronecker
from lowrank_sp.tensors.rearrange import nearest_kronecker as nearest_kronecker
from lowrank_sp.tensors.tucker import Tucker as Tucker
