"""Print the tables of variants from the catalog: python docs/make_catalog_table.py."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp.adapters.catalog import METHODS, Axis, Method, Variant
from lowrank_sp.adapters.forms import LayeredForm
from lowrank_sp.factors import Factored
from lowrank_sp.operators import LinearOperator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from catalog_cases import ROWS, WEIGHTS, start_of  # noqa: E402

TITLES = {
    Axis.START: "starts",
    Axis.FACTORS: "factors",
    Axis.RANK: "rank",
    Axis.LAYERS: "layers",
    Axis.RULE: "rules",
}


def name(row: Variant | Method) -> str:
    """Name and reference of a row."""
    return f"{row.name} {{cite:p}}`{row.reference}`"


def facts(row: Variant) -> tuple[str, str, str]:
    """What is measured: form, whether the layer starts where it was, exact conversion."""
    start = start_of(row)
    one, base = (
        (start.form.layer(0), start.weights[0])
        if isinstance(start.form, LayeredForm)
        else (start.form, start.weight)
    )
    delta = one.delta()
    dense = delta.to_dense() if isinstance(delta, LinearOperator) else delta
    moved = np.linalg.norm(base + dense - WEIGHTS[0]) > 1e-9 * np.linalg.norm(WEIGHTS[0])
    changed = base is not WEIGHTS[0] and np.any(np.asarray(base) != WEIGHTS[0])
    where = "no" if moved else "yes, by its base" if changed else "yes"
    return (
        type(start.form).__name__,
        where,
        "exact" if isinstance(delta, Factored) else "best rank r",
    )


def table(rows: list[Variant]) -> str:
    """One table."""
    lines = [
        "| variant | update | form | trained numbers | rank at most | starts at the weight "
        "| to plain LoRA | PEFT |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        form, where, lora = facts(row)
        link = f"{{py:class}}`~lowrank_sp.adapters.forms.{form}`"
        peft = f"`{row.peft}`" if row.peft else "only here"
        lines.append(
            f"| {name(row)} | ${row.formula}$ | {link} | `{row.trainable}` | `{row.rank_bound}` "
            f"| {where} | {lora} | {peft} |"
        )
    return "\n".join(lines) + "\n"


def documented(thing: Callable[..., Any]) -> str:
    """The name under which the API pages have a function, a class or a method."""
    pages = "".join(page.read_text(encoding="utf-8") for page in (HERE / "api").glob("*.md"))
    owner = thing.__qualname__.partition(".")[0]
    module = thing.__module__
    while f"~{module}.{owner}\n" not in pages:
        module = module.rpartition(".")[0]
    return f"{module}.{thing.__qualname__}"


def life() -> str:
    """The table of methods by stage of life."""
    lines = ["| stage | method | what it does | here | needs |", "|---|---|---|---|---|"]
    for row in METHODS.values():
        method = "." in row.function.__qualname__
        role = "meth" if method else "class" if isinstance(row.function, type) else "func"
        link = f"{{py:{role}}}`~{documented(row.function)}`"
        needs = ", ".join(f"`{argument}`" for argument in row.needs)
        lines.append(f"| {row.stage} | {name(row)} | ${row.formula}$ | {link} | {needs} |")
    return "\n".join(lines) + "\n"


def tables() -> dict[str, str]:
    """All tables by the names of their files."""
    return {
        f"catalog_{title}.md": table([row for row in ROWS if row.axis is axis])
        for axis, title in TITLES.items()
    } | {"catalog_life.md": life()}


def main() -> None:
    """Write them."""
    for file, text in tables().items():
        (HERE / "_tables" / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
