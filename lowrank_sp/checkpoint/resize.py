"""Adapters of another rank, from their factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp.adapters import algebra
from lowrank_sp.adapters.forms import Product
from lowrank_sp.checkpoint.job import (
    Adapted,
    Progress,
    adapt,
    as_product,
    capped,
    check_choice,
    check_size,
    output,
    read_adapters,
    save_adapter,
    save_report,
)
from lowrank_sp.checkpoint.report import JobReport
from lowrank_sp.checkpoint.tensors import OptionError
from lowrank_sp.factors import LowRank
from lowrank_sp.tasks import Executor

#: Rules that choose a rank from the singular values and a threshold, by name.
RANK_RULES: dict[str, Callable[[Any, float], int]] = {
    "sv_ratio": algebra.sv_ratio,
    "sv_cumulative": algebra.sv_cumulative,
    "sv_fro": algebra.sv_fro,
}


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    tol: float | None = None,
    rule: str | None = None,
    threshold: float | None = None,
    overwrite: bool = False,
    executor: Executor | None = None,
    ahead: int = 4,
    progress: Progress | None = None,
) -> JobReport:
    """Write the best approximation of an adapter of lower rank.

    :func:`lowrank_sp.adapters.algebra.resize` of every layer: nothing of the size of a weight is
    formed. The scale of a layer stays, so its alpha changes with its rank.

    Parameters
    ----------
    adapter : path
        A directory of plain LoRA.
    out : path
        Directory to create. It gets ``adapter/`` and ``report.json``, and appears at the end,
        whole.
    rank, tol
        The most a layer may have, and how far each may be from what it was, relative to its norm.
        A layer of a lower rank keeps it.
    rule : str, optional
        A name in :data:`RANK_RULES`, instead of ``tol``.
    threshold : float, optional
        What the rule takes.
    overwrite, executor, ahead, progress
        As in :func:`~lowrank_sp.checkpoint.initialize.initialize`.

    Returns
    -------
    JobReport

    Raises
    ------
    CheckpointError
        If the adapter is no plain LoRA, or anything is wrong with the options or the output
        directory. Nothing is left behind.
    """
    if rank is None and tol is None and rule is None:
        raise OptionError(
            "resize needs a rank, a tol or a rule, got none of them; pass --rank, --tol or --rule"
        )
    check_size(rank, tol)
    if (rule is None) != (threshold is None):
        raise OptionError(
            f"a rule needs a threshold, and only a rule does, got rule {rule} and threshold "
            f"{threshold}; pass --rule and --threshold, or neither"
        )
    if rule is not None and tol is not None:
        raise OptionError(f"tol or a rule choose ranks, got tol {tol} and rule {rule}")
    if rule is not None and threshold is not None:
        _check_rule(rule, threshold)
    inputs = {"adapter": adapter}
    source = read_adapters(inputs)["adapter"]
    with output(out, inputs, overwrite=overwrite) as folder:
        found, rows = adapt(
            _resize,
            source.layers,
            lambda name: (as_product(source.layers[name], name), rank, tol, rule, threshold),
            executor=executor,
            ahead=ahead,
            progress=progress,
        )
        save_adapter(folder / "adapter", replace(source, layers=found))
        options = {"rank": rank, "tol": tol, "rule": rule, "threshold": threshold}
        return save_report(folder, "resize", inputs, options, rows)


def _check_rule(rule: str, threshold: float) -> None:
    check_choice(rule, RANK_RULES, "rule")
    try:
        RANK_RULES[rule](np.ones(1), threshold)
    except ValueError as error:
        raise OptionError(f"threshold of {rule}: {error}") from error


def _resize(
    product: Product,
    rank: int | None,
    tol: float | None,
    rule: str | None,
    threshold: float | None,
) -> Adapted:
    rank, note = capped(rank, product.rank_bound)
    # Without the scale, which the result keeps.
    every = algebra.resize(LowRank(product.up, product.down))
    if rule is not None and threshold is not None:
        chosen = RANK_RULES[rule](every.s, threshold)
        rank = chosen if rank is None else min(rank, chosen)
    f = every.truncate(rank, tol=tol)
    size = abs(product.scale)
    left, right = f.split().factors()
    resized = Product(left, right, product.scale)
    return Adapted(resized, size * float(every.norm()), size * float(f.error), note)
