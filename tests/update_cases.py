"""Every update rule, with a learning rate that suits the small problem here.

The tests run all laws on them, and docs/make_update_table.py prints their table in the guide.
"""

import numpy as np

from lowrank_sp.updates import (
    BAR,
    LORO,
    NBAR,
    OBAR,
    SAM,
    AdamW,
    AdaPreLoRA,
    AltLoRA,
    AltLoRAPlus,
    BaLoRA,
    Clip,
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
    SkipNonFinite,
    Spectron,
    StelLA,
    newton_schulz,
)

PLAIN, HEAVY = Plain(), Momentum(0.5)

RULES = {
    "gradient descent": GradientDescent(lr=0.01),
    "gradient descent, momentum": GradientDescent(lr=0.005, moments=HEAVY),
    "AdamW": AdamW(lr=0.03),
    "LoRA+": LoRAPlus(lr=0.01),
    "LoRA+, plain": LoRAPlus(lr=0.002, moments=PLAIN),
    "ScaledGD": ScaledGD(lr=0.3),
    "ScaledGD, undamped": ScaledGD(lr=0.3, damping=0.0),
    "ScaledGD, momentum": ScaledGD(lr=0.1, moments=HEAVY, weight_decay=0.01),
    "ScaledGD, ridge": ScaledGD(lr=0.1, ridge=0.1),
    "Scaled AdamW": ScaledAdamW(lr=0.03),
    "Riemannian": RiemannianGD(lr=0.3),
    "Riemannian, momentum": RiemannianGD(lr=0.1, momentum=0.5, weight_decay=0.01),
    "LoRA-Pro": LoRAPro(lr=0.05),
    "LoRA-Pro, plain": LoRAPro(lr=0.3, moments=PLAIN),
    "LoRA-Pro, Sylvester": LoRAPro(lr=0.1, moments=PLAIN, sylvester=True),
    "AdaPreLoRA": AdaPreLoRA(lr=0.05),
    "AltLoRA": AltLoRA(lr=0.3),
    "AltLoRA+": AltLoRAPlus(lr=0.03),
    "LoRA-FA": FrozenDown(lr=0.03),
    "LoRA-FA, plain": FrozenDown(lr=0.3, moments=PLAIN),
    "LoRA-RITE": LoRARite(lr=0.05),
    "LoFT": LoFT(lr=0.05),
    "RefLoRA": RefLoRA(lr=0.02),
    "RefLoRA, plain": RefLoRA(lr=0.02, moments=PLAIN),
    "RefLoRA-S": RefLoRAScalar(lr=0.03),
    "RefLoRA-S, plain": RefLoRAScalar(lr=0.01, moments=PLAIN),
    "BaLoRA": BaLoRA(lr=0.03),
    "BaLoRA, plain": BaLoRA(lr=0.02, moments=PLAIN),
    "imbalance": ImbalanceRegularized(lr=0.01),
    "nBAR": NBAR(lr=0.03),
    "nBAR, plain": NBAR(lr=0.01, moments=PLAIN),
    "oBAR": OBAR(lr=0.03),
    "oBAR, plain": OBAR(lr=0.01, moments=PLAIN),
    "LoRA-Muon": LoRAMuon(lr=0.3, weight_decay=0.01),
    "LoRA-Muon, Newton-Schulz": LoRAMuon(lr=0.3, polar=newton_schulz),
    "Spectron": Spectron(lr=0.3),
    "StelLA": StelLA(lr=0.03),
    "StelLA, plain": StelLA(lr=0.1, moments=PLAIN, width=9.0),
    "PoLAR": PoLAR(lr=0.03),
    "PoLAR, plain": PoLAR(lr=0.001, moments=PLAIN),
    "LORO": LORO(lr=0.05, period=2, lazy=1.0),
    "LORO, exact": LORO(lr=0.3, period=1, moments=PLAIN),
    "SAM": SAM(ScaledGD(lr=0.3)),
    "EFlat": EFlat(ScaledGD(lr=0.3)),
    "Clip": Clip(ScaledGD(lr=0.3), max_norm=2.0),
    "SkipNonFinite": SkipNonFinite(ScaledGD(lr=0.3)),
}

#: Rules that move in the space of the adapter: only ``scale * up @ down`` counts, not the scale.
SCALE_FREE = {
    name
    for name, rule in RULES.items()
    if rule.invariance is Gauge.GENERAL and not isinstance(rule, (RefLoRA, BaLoRA))
}
#: Rules whose first step from ``up = 0`` is a multiple of ``-G P_A``.
PROJECTED_START = [
    "ScaledGD",
    "ScaledGD, undamped",
    "Riemannian",
    "LoRA-Pro, plain",
    "AltLoRA",
    "LoRA-FA, plain",
    "RefLoRA, plain",
    "Clip",
    "SkipNonFinite",
]
#: Rules that change factors even where the gradient is zero.
RESTLESS = {
    name
    for name, rule in RULES.items()
    if getattr(rule, "weight_decay", 0.0)
    or isinstance(rule, (ImbalanceRegularized, BAR, StelLA, PoLAR))
}

SHAPE, RANK, SCALE = (12, 9), 3, 0.7


def problem(seed=0, *batch, complex_=False):
    """Target and factors of a small teacher problem."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        x = rng.standard_normal((*batch, *shape))
        return x + 1j * rng.standard_normal(x.shape) if complex_ else x

    m, n = SHAPE
    return draw(m, n), draw(m, RANK), draw(RANK, n)


def adjoint(x):
    return x.mT if not hasattr(x, "conj") else x.conj().mT


def gradients(target, up, down, scale=SCALE):
    """Of ``||scale up down - target||_F^2 / 2``, for arrays of any library."""
    residual = scale * (up @ down) - target
    if "complex" not in str(up.dtype):
        return scale * (residual @ down.mT), scale * (up.mT @ residual)
    return scale * (residual @ down.conj().mT), scale * (up.conj().mT @ residual)


def run(rule, target, up, down, steps=6, scale=SCALE, step=None):
    """Path of products on the host, and what is left in the end."""
    step = rule.step if step is None else step
    state, path = rule.init(up, down), []
    for _ in range(steps):
        up, down, state = step(up, down, *gradients(target, up, down, scale), state, scale=scale)
        path.append(up @ down)
    return path, (up, down, state)


def gauge(condition, seed=0, rank=RANK):
    """A random ``x`` of this condition number, and its inverse."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((rank, rank)))[0] for _ in range(2))
    sizes = np.geomspace(condition**-0.5, condition**0.5, rank)
    return (left * sizes) @ right, (right.T / sizes) @ left.T


def distance(path, other):
    """Largest relative difference between two paths."""
    return max(np.linalg.norm(p - q) / np.linalg.norm(p) for p, q in zip(path, other, strict=True))
