"""Measure the table of update rules in the guide: python docs/make_update_table.py."""

import sys
from pathlib import Path

from lowrank_sp.updates import AdamW, Gauge, LoFT, LoRAPro, Rule, conformance
from lowrank_sp.updates.conformance import step_seconds

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from update_cases import RULES  # noqa: E402

SHAPE, RANK = (4096, 4096), 16
PROMISE = {Gauge.GENERAL: "GL(r)", Gauge.UNITARY: "O(r)", Gauge.NONE: "none"}


def number(drift):
    """A drift in one digit."""
    return "∞" if drift > 1e6 else f"{drift:.0e}".replace("e-0", "e-").replace("e+0", "e")


def label(name: str, rule: Rule) -> str:
    """The class of a rule, the one that it wraps, and what the name says beside its own."""
    wrapped = getattr(rule, "rule", None)
    inner = f"({type(wrapped).__name__})" if wrapped is not None else ""
    _, comma, variant = name.partition(",")
    return f"`{type(rule).__name__}{inner}`{comma}{variant}"


def seconds(rule):
    """Seconds of a step."""
    return step_seconds(rule, shape=SHAPE, rank=RANK, repeats=12)


def main():
    """Write the table, and fail if a promise is not kept."""
    lines = [
        "| rule | invariant under | drift, condition 1 | 10 | 1000 | drift, O(r) | state | step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    # Arrays of m x n, once freed, change how memory is handed out: these rules come last.
    costs = {}
    for name in sorted(RULES, key=lambda name: type(RULES[name]) in (LoRAPro, LoFT)):
        # The unit is measured just after, so that both meet the same load of the machine.
        costs[name] = seconds(RULES[name]) / seconds(AdamW())
    for name, rule in RULES.items():
        found = conformance(rule)
        assert found.holds(), found
        drifts = " | ".join(map(number, found.drifts))
        lines.append(
            f"| {label(name, rule)} | {PROMISE[found.promise]} | {drifts} "
            f"| {number(found.unitary)} | {found.state:.1f} | {costs[name]:.2g} |"
        )
    table = HERE / "_tables" / "update_rules.md"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
