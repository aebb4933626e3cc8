"""Measure the table of update rules in the guide: python docs/make_update_table.py."""

from pathlib import Path

from lowrank_sp.updates import (
    NBAR,
    OBAR,
    SAM,
    AdamW,
    AdaPreLoRA,
    AltLoRA,
    AltLoRAPlus,
    BaLoRA,
    EFlat,
    FrozenDown,
    Gauge,
    GradientDescent,
    ImbalanceRegularized,
    LoFT,
    LoRAMuon,
    LoRAPlus,
    LoRAPro,
    LoRARite,
    Momentum,
    Plain,
    PoLAR,
    RefLoRA,
    RefLoRAScalar,
    RiemannianGD,
    ScaledAdamW,
    ScaledGD,
    Spectron,
    StelLA,
    conformance,
)
from lowrank_sp.updates.conformance import step_seconds

PLAIN = Plain()
RULES = {
    "`GradientDescent`": GradientDescent(),
    "`AdamW`": AdamW(),
    "`LoRAPlus`": LoRAPlus(),
    "`ScaledGD`": ScaledGD(),
    "`ScaledGD`, `Momentum`": ScaledGD(moments=Momentum()),
    "`ScaledGD`, `ridge`": ScaledGD(ridge=1e-2),
    "`ScaledAdamW`": ScaledAdamW(),
    "`RiemannianGD`": RiemannianGD(),
    "`LoRAPro`": LoRAPro(),
    "`LoRAPro`, `Plain`": LoRAPro(moments=PLAIN),
    "`LoRAPro`, `sylvester`": LoRAPro(moments=PLAIN, sylvester=True, lr=0.1),
    "`AdaPreLoRA`": AdaPreLoRA(),
    "`AltLoRA`": AltLoRA(),
    "`AltLoRAPlus`": AltLoRAPlus(),
    "`FrozenDown`": FrozenDown(),
    "`LoRARite`": LoRARite(),
    "`LoFT`": LoFT(),
    "`RefLoRA`": RefLoRA(),
    "`RefLoRA`, `Plain`": RefLoRA(moments=PLAIN),
    "`RefLoRAScalar`": RefLoRAScalar(),
    "`BaLoRA`": BaLoRA(),
    "`ImbalanceRegularized`": ImbalanceRegularized(),
    "`NBAR`": NBAR(),
    "`OBAR`": OBAR(),
    "`LoRAMuon`": LoRAMuon(),
    "`Spectron`": Spectron(),
    "`StelLA`": StelLA(),
    "`PoLAR`": PoLAR(),
    "`SAM(ScaledGD)`": SAM(ScaledGD()),
    "`EFlat(ScaledGD)`": EFlat(ScaledGD()),
}
SHAPE, RANK = (4096, 4096), 16
PROMISE = {Gauge.GENERAL: "GL(r)", Gauge.UNITARY: "O(r)", Gauge.NONE: "none"}


def number(drift):
    """A drift in one digit."""
    return "∞" if drift > 1e6 else f"{drift:.0e}".replace("e-0", "e-").replace("e+0", "e")


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
    for name in sorted(RULES, key=lambda name: name in ("`LoRAPro`", "`LoFT`")):
        # The unit is measured just after, so that both meet the same load of the machine.
        costs[name] = seconds(RULES[name]) / seconds(AdamW())
    for name, rule in RULES.items():
        found = conformance(rule)
        assert found.holds(), found
        drifts = " | ".join(map(number, found.drifts))
        lines.append(
            f"| {name} | {PROMISE[found.promise]} | {drifts} | {number(found.unitary)} "
            f"| {found.state:.1f} | {costs[name]:.2g} |"
        )
    table = Path(__file__).parent / "_tables" / "update_rules.md"
    table.parent.mkdir(exist_ok=True)
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
