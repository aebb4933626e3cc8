"""Matrix completion: the low-rank matrix that has the observed entries."""

from lowrank_sp.inverse.completion.alternating import als as als
from lowrank_sp.inverse.completion.factored import lmafit as lmafit
from lowrank_sp.inverse.completion.factored import scaled_asd as scaled_asd
from lowrank_sp.inverse.completion.factored import scaled_gd as scaled_gd
from lowrank_sp.inverse.completion.gauss_newton import gnmr as gnmr
from lowrank_sp.inverse.completion.nuclear import PathPoint as PathPoint
from lowrank_sp.inverse.completion.nuclear import soft_impute as soft_impute
from lowrank_sp.inverse.completion.nuclear import soft_impute_path as soft_impute_path
from lowrank_sp.inverse.completion.nuclear import svt as svt
from lowrank_sp.inverse.completion.reweighted import matrix_irls as matrix_irls
from lowrank_sp.inverse.completion.riemannian import niht as niht
from lowrank_sp.inverse.completion.riemannian import riemannian_cg as riemannian_cg
from lowrank_sp.inverse.completion.selection import Score as Score
from lowrank_sp.inverse.completion.selection import Selection as Selection
from lowrank_sp.inverse.completion.selection import select_rank as select_rank
