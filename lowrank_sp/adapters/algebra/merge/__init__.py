"""Merging: many updates of one weight become one, with the error that this makes."""

from lowrank_sp.adapters.algebra.merge.entrywise import entrywise as entrywise
from lowrank_sp.adapters.algebra.merge.entrywise import factorwise as factorwise
from lowrank_sp.adapters.algebra.merge.entrywise import linear as linear
from lowrank_sp.adapters.algebra.merge.exact import Merged as Merged
from lowrank_sp.adapters.algebra.merge.exact import cat as cat
from lowrank_sp.adapters.algebra.merge.exact import svd as svd
from lowrank_sp.adapters.algebra.merge.rules import EntryRule as EntryRule
from lowrank_sp.adapters.algebra.merge.rules import dare as dare
from lowrank_sp.adapters.algebra.merge.rules import dare_ties as dare_ties
from lowrank_sp.adapters.algebra.merge.rules import magnitude_prune as magnitude_prune
from lowrank_sp.adapters.algebra.merge.rules import ties as ties
from lowrank_sp.adapters.algebra.merge.subspace import knots as knots
from lowrank_sp.adapters.algebra.merge.subspace import tsv as tsv
