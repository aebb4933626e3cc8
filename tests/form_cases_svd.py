"""Forms that are products with something in between; see ``form_cases.Case``."""

from form_cases import SHAPE, Case

from lowrank_sp.adapters import forms

M, N = SHAPE
R = 3

CASES = [
    Case(
        "product",
        lambda w, rng: forms.Product.create(w, R, alpha=6, rng=rng),
        lambda a, _: 2.0 * a["up"] @ a["down"],
        num_trainable=R * (M + N),
        rank=R,
        lora=R,
    ),
]
