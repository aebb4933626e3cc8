"""Linear operators: anything that multiplies a block of columns."""

from lowrank_sp.operators._base import Adjoint as Adjoint
from lowrank_sp.operators._base import LinearOperator as LinearOperator
from lowrank_sp.operators._base import Product as Product
from lowrank_sp.operators._base import Scaled as Scaled
from lowrank_sp.operators._base import Sum as Sum
from lowrank_sp.operators._sources import Dask as Dask
from lowrank_sp.operators._sources import Dense as Dense
from lowrank_sp.operators._sources import Rows as Rows
from lowrank_sp.operators._sources import SciPy as SciPy
from lowrank_sp.operators._sources import Sparse as Sparse
from lowrank_sp.operators._sources import as_operator as as_operator
