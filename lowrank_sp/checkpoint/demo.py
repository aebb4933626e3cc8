"""A small checkpoint to try things on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lowrank_sp.checkpoint.initialize import initialize
from lowrank_sp.checkpoint.output import atomic_directory, holds_report
from lowrank_sp.checkpoint.report import Report
from lowrank_sp.checkpoint.spectra import save_spectra, spectra
from lowrank_sp.checkpoint.tensors import write_tensors
from lowrank_sp.checkpoint.verify import Verification, verify

_CONTENT = {"model", "pissa", "spectra.png"}
# Outputs and inputs in units of the width; the largest singular value and its decay.
_LAYERS = {
    "self_attn.q_proj": (1, 1, 12.0, 0.9),
    "self_attn.k_proj": (1, 1, 10.0, 0.8),
    "self_attn.v_proj": (1, 1, 4.0, 0.35),
    "self_attn.o_proj": (1, 1, 5.0, 0.5),
    "mlp.gate_proj": (3, 1, 9.0, 0.6),
    "mlp.up_proj": (3, 1, 6.0, 0.45),
    "mlp.down_proj": (1, 3, 7.0, 0.7),
}


def transformer_like(
    m: int,
    n: int,
    rng: np.random.Generator,
    *,
    spikes: int = 64,
    top: float = 8.0,
    decay: float = 0.6,
) -> np.ndarray:
    """A float32 matrix with the spectrum of a trained weight: spikes over a Gaussian bulk.

    ``top * j**-decay`` for ``j = 1..spikes``, on random orthonormal vectors, plus a bulk of norm 2.
    """
    spikes = min(spikes, m, n)
    bulk = rng.standard_normal((m, n), dtype=np.float32) * np.float32(2.0 / (m**0.5 + n**0.5))
    u, _ = np.linalg.qr(rng.standard_normal((m, spikes)))
    v, _ = np.linalg.qr(rng.standard_normal((n, spikes)))
    s = top * np.arange(1, spikes + 1) ** -decay
    return bulk + ((u * s) @ v.T).astype(np.float32)


def write_demo_model(
    path: str | Path, *, hidden: int = 192, layers: int = 2, seed: int = 0
) -> None:
    """Write a seeded checkpoint of Llama shape: ``model.safetensors`` and ``config.json``.

    Parameters
    ----------
    path : path
        An empty directory.
    hidden : int
        Width. The MLP is three times as wide, the vocabulary 512.
    layers : int
    seed : int
    """
    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((512, hidden), dtype=np.float32),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": rng.standard_normal((512, hidden), dtype=np.float32),
    }
    for i in range(layers):
        prefix = f"model.layers.{i}."
        for name, (rows, columns, top, decay) in _LAYERS.items():
            m, n = rows * hidden, columns * hidden
            weight = transformer_like(m, n, rng, top=top, decay=decay)
            tensors[f"{prefix}{name}.weight"] = weight
        tensors[f"{prefix}input_layernorm.weight"] = np.ones(hidden, np.float32)
        tensors[f"{prefix}post_attention_layernorm.weight"] = np.ones(hidden, np.float32)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 48,
        "num_key_value_heads": hidden // 48,
        "vocab_size": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    folder = Path(path)
    write_tensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def run_demo(
    out: str | Path, *, rank: int = 16, overwrite: bool = False
) -> tuple[Report, Verification]:
    """Initialize PiSSA on a demo model and verify it.

    ``out``, which appears whole or not at all, gets ``model/``, ``pissa/`` and ``spectra.png``.
    """
    with atomic_directory(out, overwrite=overwrite, ours=_is_demo) as folder:
        model, pissa = folder / "model", folder / "pissa"
        model.mkdir()
        write_demo_model(model)
        report = initialize(model, "pissa", pissa, rank=rank)
        outcome = verify(pissa, model)
        save_spectra(spectra(model), rank, folder / "spectra.png")
    return report, outcome


def _is_demo(folder: Path) -> bool:
    names = {item.name for item in folder.iterdir()}
    return names == _CONTENT and holds_report(folder / "pissa")
