"""The published variants by name: each is a form, where it starts, its scale and its rule."""

import difflib as _difflib

from lowrank_sp.adapters.catalog._variant import Axis as Axis
from lowrank_sp.adapters.catalog._variant import LayeredStart as LayeredStart
from lowrank_sp.adapters.catalog._variant import Scale as Scale
from lowrank_sp.adapters.catalog._variant import Variant as Variant
from lowrank_sp.adapters.catalog.factors import FACTORS as _FACTORS
from lowrank_sp.adapters.catalog.factors import STARTS as _STARTS
from lowrank_sp.adapters.catalog.layers import LAYERS as _LAYERS
from lowrank_sp.adapters.catalog.life import METHODS as METHODS
from lowrank_sp.adapters.catalog.life import Method as Method
from lowrank_sp.adapters.catalog.life import Stage as Stage
from lowrank_sp.adapters.catalog.rank import RANK as _RANK
from lowrank_sp.adapters.catalog.rules import RULES as _RULES

#: All variants by name.
CATALOG: dict[str, Variant] = {
    row.name: row for row in (*_STARTS, *_FACTORS, *_RANK, *_LAYERS, *_RULES)
}


def variant(name: str) -> Variant:
    """The variant of a name, in any case.

    Raises
    ------
    ValueError
        If there is none; the closest names are listed.

    Examples
    --------
    >>> variant("lora").start((6, 4), rank=2, rng=0).form
    Product(up 6 x 2, down 2 x 4)
    >>> variant("Dorra")
    Traceback (most recent call last):
    ...
    ValueError: no variant is called 'Dorra'; did you mean one of DoRA, DeLoRA, NoRA?
    """
    known = {key.lower(): row for key, row in CATALOG.items()}
    found = known.get(name.lower())
    if found is None:
        close = _difflib.get_close_matches(name.lower(), known, n=3) or ["lora", "dora", "pissa"]
        names = ", ".join(known[key].name for key in close)
        raise ValueError(f"no variant is called {name!r}; did you mean one of {names}?")
    return found
