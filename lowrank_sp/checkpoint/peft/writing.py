"""Adapters into the directories that PEFT reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_sp.adapters.forms import Form, Product
from lowrank_sp.checkpoint.adapter import Adapter
from lowrank_sp.checkpoint.model import Checkpoint
from lowrank_sp.checkpoint.peft.config import CONFIG
from lowrank_sp.checkpoint.peft.method import Method
from lowrank_sp.checkpoint.peft.methods import METHODS
from lowrank_sp.checkpoint.peft.parts import Place, Svd, host
from lowrank_sp.checkpoint.peft.reading import FINGERPRINT, ORDER, PREFIX, SHARED, WEIGHTS
from lowrank_sp.checkpoint.tensors import CheckpointError, write_tensors


def write_adapter(
    path: str | Path,
    adapter: Adapter,
    *,
    model: Checkpoint | None = None,
    svd: Svd | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a directory.

    The most frequent rank and alpha become the global ones, and every other layer is listed under
    both ``rank_pattern`` and ``alpha_pattern``, since PEFT takes the global alpha for a layer that
    has only a rank. An initializer is named only where it says what is trained: PEFT would run it
    again on loading.

    Parameters
    ----------
    path : path
        An existing directory.
    adapter : Adapter
        Of one form in all layers, in the order that they have in the model (TinyLoRA numbers
        them). Arrays of any library; bfloat16 is stored as float32.
    model : Checkpoint, optional
    svd : callable, optional
        The base model, and how PEFT decomposes it, as in
        :func:`~lowrank_sp.checkpoint.peft.read_adapter`: PSOFT needs both.

    Raises
    ------
    CheckpointError
        If the form has no method in PEFT, if layers have several forms, or if PEFT could not tell
        the form from what a file can say: the remedy is then most often
        :meth:`~lowrank_sp.adapters.forms.Form.to_lora`.
    """
    path = Path(path)
    forms = dict(adapter.layers)
    method = _method(forms, adapter.method)
    if adapter.fan_in_fan_out and not method.conv1d:
        raise CheckpointError(
            f"PEFT has no {method.title} for weights that are stored inputs by outputs; convert "
            "the forms by to_lora()"
        )
    tensors: dict[str, np.ndarray] = {}
    for name, form in forms.items():
        arrays = method.save(form, Place(name, method.title, model, adapter.fan_in_fan_out, svd))
        for end, array in _placed(name, arrays, adapter).items():
            tensors[f"{PREFIX}{name}.{end}"] = host(array)
    for key, array in ({} if method.share is None else method.share(forms)).items():
        tensors[f"{SHARED}{key}"] = host(array)
    config = {
        "peft_type": method.peft_type,
        "task_type": None,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "target_modules": sorted(forms),
        "modules_to_save": None,
        **({"fan_in_fan_out": adapter.fan_in_fan_out} if method.conv1d else {}),
        **method.configure(forms),
    }
    metadata = {} if adapter.fingerprint is None else {FINGERPRINT: adapter.fingerprint}
    if method.position is not None:
        metadata[ORDER] = "\n".join(forms)
    write_tensors(path / WEIGHTS, tensors, metadata)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _method(forms: Mapping[str, Form], title: str | None) -> Method:
    if not forms:
        raise CheckpointError("an adapter must have at least one layer, got none")
    kinds = {type(form): name for name, form in forms.items()}
    if len(kinds) > 1:
        (one, first), (other, second), *_ = kinds.items()
        raise CheckpointError(
            f"a file of PEFT has one form for all layers, got {one.__name__} of {first} and "
            f"{other.__name__} of {second}; convert them to LoRA"
        )
    ((kind, name),) = kinds.items()
    rows = [method for method in METHODS if method.form is kind]
    if not rows and issubclass(kind, Product):
        rows = [method for method in METHODS if method.form is Product]
    if not rows:
        raise CheckpointError(
            f"{name}: {kind.__name__} has no method in PEFT; convert it by to_lora()"
        )
    return next((row for row in rows if row.title == title), rows[-1])


def _placed(name: str, arrays: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The factors of plain LoRA under the keys, and in the shapes, of the kind of layer."""
    embedding, kernel = name in adapter.embeddings, adapter.kernels.get(name, ())
    if not embedding and not kernel:
        return dict(arrays)
    if set(arrays) != {"lora_A.weight", "lora_B.weight"}:
        raise CheckpointError(
            f"{name}: embeddings and convolutions are written as plain LoRA only; convert it by "
            "to_lora()"
        )
    down, up = arrays["lora_A.weight"], arrays["lora_B.weight"]
    if embedding:
        return {"lora_embedding_A": down, "lora_embedding_B": up}
    down, up = host(down), host(up)
    return {
        "lora_A.weight": down.reshape(down.shape[0], -1, *kernel),
        "lora_B.weight": up.reshape(*up.shape, *(1 for _ in kernel)),
    }
