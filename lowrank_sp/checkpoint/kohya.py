"""Adapters in one safetensors file, with the names of kohya and LyCORIS, or of diffusers.

kohya joins the path of a module by underscores, ``lora_unet_down_blocks_0_attn_to_q``, which does
not say where the dots were. diffusers keeps them, ``unet.down_blocks.0.attn.to_q``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowrank_sp.adapters.forms import (
    Form,
    HadamardProduct,
    KroneckerProduct,
    Product,
    RowMagnitude,
)
from lowrank_sp.checkpoint.adapter import Adapter
from lowrank_sp.checkpoint.model import Checkpoint
from lowrank_sp.checkpoint.peft.config import Config, plain
from lowrank_sp.checkpoint.peft.lycoris import save_loha, save_lokr
from lowrank_sp.checkpoint.peft.parts import Place, host, made
from lowrank_sp.checkpoint.peft.reading import FINGERPRINT
from lowrank_sp.checkpoint.tensors import (
    CheckpointError,
    Tensor,
    parse_object,
    read_header,
    read_metadata,
    write_tensors,
)

# Other names for the same factors.
_SYNONYMS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_linear_layer.down.weight": "lora_down.weight",
    "lora_linear_layer.up.weight": "lora_up.weight",
}
_LORA = ("lora_down.weight", "lora_up.weight")
_LOHA = tuple(f"hada_w{i}_{ab}" for i in (1, 2) for ab in "ab")
_LOKR = tuple(f"lokr_w{i}{part}" for i in (1, 2) for part in ("", "_a", "_b"))
_LEFT, _RIGHT = (((f"lokr_w{i}",), (f"lokr_w{i}_a", f"lokr_w{i}_b")) for i in (1, 2))
_ENDS = (*_SYNONYMS, *_LORA, "lora_mid.weight", *_LOHA, *_LOKR, "alpha", "dora_scale")
#: What the metadata call the configuration of an adapter of diffusers.
_DIFFUSERS = "lora_adapter_metadata"
#: What ours call the name of the base, beside its fingerprint.
_BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class _Layer:
    """Arrays of one layer by the end of their names, which are those of kohya."""

    arrays: Mapping[str, np.ndarray]
    place: Place
    config: Config | None

    def scale(self, rank: int) -> float:
        """``alpha / rank`` by the tensor or the configuration; one where neither is there."""
        if "alpha" in self.arrays:
            return float(self.arrays["alpha"].reshape(())) / rank
        return 1.0 if self.config is None else self.config.scale(self.place.name, rank)


def read_kohya(
    path: str | Path,
    *,
    prefix: str,
    modules: Checkpoint | Iterable[str] | None = None,
    model: Checkpoint | None = None,
) -> Adapter:
    """The adapter of one model in a file with the names of kohya, LyCORIS or diffusers.

    Parameters
    ----------
    path : path
        A ``.safetensors`` file.
    prefix : str
        Of the keys of the model: ``lora_unet``, ``lora_te``, ``lora_te1``, ``lora_te2`` or
        ``lycoris``; ``unet``, ``transformer`` or ``text_encoder`` in diffusers. Other keys are of
        other models.
    modules : Checkpoint or iterable of str, optional
        Names of the modules of the model, to tell dots from underscores in the names of kohya.
    model : Checkpoint, optional
        The base model, for DoRA.

    Returns
    -------
    Adapter
        With the name and the fingerprint of its base where :func:`write_kohya` wrote them; other
        files have none. Factors of convolutions with a middle tensor are multiplied out.

    Raises
    ------
    CheckpointError
        If a name stands for no module, or for several; if a tensor is missing, unknown, or of a
        wrong shape.
    """
    path = Path(path)
    names = _Names(path, prefix, modules)
    found: dict[str, dict[str, Tensor]] = {}
    ends = "|".join(map(re.escape, sorted(_ENDS, key=len, reverse=True)))
    pattern = re.compile(rf"{re.escape(prefix)}([_.])(.+)\.({ends})")
    tensors = read_header(path)
    own = [key for key in tensors if key.startswith((f"{prefix}_", f"{prefix}."))]
    for key in own:
        if (match := pattern.fullmatch(key)) is None:
            raise CheckpointError(f"{path}: {key} is not a part of LoRA, DoRA, LoHa or LoKr")
        name = names.dotted(match[2]) if match[1] == "_" else match[2]
        found.setdefault(name, {})[_SYNONYMS.get(match[3], match[3])] = tensors[key]
    if not found:
        first = min(tensors, default="none")
        raise CheckpointError(f"{path}: no key begins with {prefix}; the first key is {first}")
    config = _diffusers_config(path, prefix)
    layers: dict[str, Form] = {}
    kernels: dict[str, tuple[int, ...]] = {}
    for name, parts in sorted(found.items()):
        arrays = {end: tensor.read() for end, tensor in parts.items()}
        layers[name], kernel = _read(path, _Layer(arrays, Place(name, "DoRA", model), config))
        if kernel:
            kernels[name] = kernel
    metadata = read_metadata(path)
    return Adapter(layers, metadata.get(_BASE), metadata.get(FINGERPRINT), kernels=kernels)


class _Names:
    """Names of modules by their names with underscores."""

    def __init__(self, path: Path, prefix: str, modules: Checkpoint | Iterable[str] | None) -> None:
        self.path, self.prefix = path, prefix
        if isinstance(modules, Checkpoint):
            modules = (name.rpartition(".")[0] for name in modules.tensors)
        self.given = modules is not None
        self.known: dict[str, list[str]] = {}
        for name in dict.fromkeys(modules or ()):
            self.known.setdefault(name.replace(".", "_"), []).append(name)

    def dotted(self, joined: str) -> str:
        """The module that a name means."""
        if not self.given:
            raise CheckpointError(
                f"{self.path}: {self.prefix}_{joined} does not say where its dots were; the model "
                "does: pass it as base, or the names of its modules"
            )
        meant = self.known.get(joined, [])
        if len(meant) != 1:
            which = f"may be {' or '.join(meant)}" if meant else "is no module of the model"
            raise CheckpointError(f"{self.path}: {self.prefix}_{joined} {which}")
        return meant[0]


def _diffusers_config(path: Path, prefix: str) -> Config | None:
    """The configuration of the adapter of one model, which newer files of diffusers have."""
    text = read_metadata(path).get(_DIFFUSERS)
    if text is None:
        return None
    try:
        values = parse_object(text.encode())
    except ValueError as error:
        raise CheckpointError(f"{path}: {_DIFFUSERS} is not readable ({error})") from error
    own = f"{prefix}."
    return Config({k.removeprefix(own): v for k, v in values.items() if k.startswith(own)})


def _read(path: Path, x: _Layer) -> tuple[Form, tuple[int, ...]]:
    """A form, and the size of its kernel."""
    ends = set(x.arrays) - {"alpha"}
    kernel: tuple[int, ...] = ()
    try:
        if ends == set(_LORA):
            up, down, kernel = _factors(x)
            return made(Product, up=up, down=down, scale=x.scale(down.shape[0])), kernel
        if ends == {*_LORA, "lora_mid.weight"}:
            return _tucker(x)
        if ends == {*_LORA, "dora_scale"}:
            return _dora(x), ()
        if ends == set(_LOHA):
            up1, down1, up2, down2 = (x.arrays[end] for end in _LOHA)
            scale = x.scale(down1.shape[0])
            form = made(HadamardProduct, up1=up1, down1=down1, up2=up2, down2=down2, scale=scale)
            return form, ()
        if ends in [{*left, *right} for left in _LEFT for right in _RIGHT]:
            return _lokr(x), ()
    except CheckpointError:
        raise
    except (TypeError, ValueError) as error:
        shapes = ", ".join(f"{end} {a.shape}" for end, a in x.arrays.items())
        raise CheckpointError(f"{path}: {x.place.name}: {error}; the file has {shapes}") from error
    raise CheckpointError(
        f"{path}: {x.place.name} must have the tensors of LoRA, DoRA, LoHa or LoKr, got "
        f"{', '.join(sorted(x.arrays))}"
    )


def _factors(x: _Layer) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    down, up = (x.arrays[end] for end in _LORA)
    kernel = down.shape[2:]
    if kernel and up.shape[2:] == (1,) * len(kernel):
        return up.reshape(up.shape[:2]), down.reshape(down.shape[0], -1), kernel
    return up, down, kernel


def _tucker(x: _Layer) -> tuple[Product, tuple[int, ...]]:
    """A convolution between two of size one: the first two are one matrix."""
    down, up = (x.arrays[end] for end in _LORA)
    middle = x.arrays["lora_mid.weight"]
    kernel = middle.shape[2:]
    if not kernel or down.shape[2:] != (1,) * len(kernel) or up.shape[2:] != down.shape[2:]:
        raise ValueError("a middle tensor needs a kernel, and factors with kernels of size one")
    inputs = np.tensordot(middle, down.reshape(down.shape[:2]), axes=(1, 0))
    inputs = np.moveaxis(inputs, -1, 1).reshape(middle.shape[0], -1)
    scale = x.scale(down.shape[0])
    return made(Product, up=up.reshape(up.shape[:2]), down=inputs, scale=scale), kernel


def _dora(x: _Layer) -> RowMagnitude:
    down, up = (x.arrays[end] for end in _LORA)
    lengths = x.arrays["dora_scale"]
    if lengths.shape != (up.shape[0], 1):
        raise ValueError(
            f"dora_scale must be one length for every output, ({up.shape[0]}, 1); lengths of "
            "columns have no form here"
        )
    return made(
        RowMagnitude,
        weight=x.place.weight(),
        up=up,
        down=down,
        magnitude=lengths[:, 0],
        scale=x.scale(down.shape[0]),
    )


def _lokr(x: _Layer) -> KroneckerProduct:
    """Here a product of two matrices has no scale, whatever alpha says."""
    left, right = (
        [x.arrays[end] for end in ends if end in x.arrays] for ends in (_LOKR[:3], _LOKR[3:])
    )
    factored = [pair[1] for pair in (left, right) if len(pair) == 2]
    return made(
        KroneckerProduct,
        left=left[0],
        right=right[0],
        left_down=left[1] if len(left) == 2 else None,
        right_down=right[1] if len(right) == 2 else None,
        scale=x.scale(factored[-1].shape[0]) if factored else 1.0,
    )


def write_kohya(path: str | Path, adapter: Adapter, *, prefix: str) -> None:
    """Write an adapter into one file with the names of kohya and LyCORIS.

    Parameters
    ----------
    path : path
        Of the ``.safetensors`` file.
    adapter : Adapter
        Of plain LoRA, DoRA, LoHa or LoKr. A LoKr of two unfactored matrices, for which LyCORIS
        knows no scale, has its scale multiplied into the first. The name and the fingerprint of its
        base stand in the metadata.
    prefix : str
        As in :func:`read_kohya`: ``lora_unet``, ``lora_te``, ..., or ``lycoris``.

    Raises
    ------
    CheckpointError
        If the names of two modules become the same, or a form is none of these.
    """
    joined = Counter(name.replace(".", "_") for name in adapter.layers)
    tensors: dict[str, np.ndarray] = {}
    ranks: list[int] = []
    alphas: list[float] = []
    kinds: set[str] = set()
    for name, form in adapter.layers.items():
        short = name.replace(".", "_")
        if joined[short] > 1:
            raise CheckpointError(f"{name}: another module is called {prefix}_{short} as well")
        if name in adapter.embeddings:
            raise CheckpointError(f"{name}: kohya has no LoRA of embeddings")
        kind, rank, scale, arrays = _written(name, form, adapter.kernels.get(name, ()))
        alpha = plain(scale * rank)
        for end, array in {**arrays, "alpha": _scalar(alpha)}.items():
            tensors[f"{prefix}_{short}.{end}"] = array
        kinds.add(kind)
        ranks.append(rank)
        alphas.append(alpha)
    plain_lora = kinds <= {"lora"}
    base = {_BASE: adapter.base, FINGERPRINT: adapter.fingerprint}
    write_tensors(
        Path(path),
        tensors,
        {
            "ss_network_module": "networks.lora" if plain_lora else "lycoris.kohya",
            "ss_network_dim": str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic",
            "ss_network_alpha": str(alphas[0]) if len(set(alphas)) == 1 else "Dynamic",
            **({} if plain_lora else {"ss_network_args": json.dumps({"algo": min(kinds)})}),
            **{key: value for key, value in base.items() if value is not None},
        },
    )


def _written(
    name: str, form: Form, kernel: tuple[int, ...]
) -> tuple[str, int, float, dict[str, np.ndarray]]:
    """The algorithm, the rank, the scale and the arrays of a layer."""
    if kernel and not isinstance(form, Product):
        raise CheckpointError(f"{name}: convolutions are written as plain LoRA only; use to_lora()")
    if isinstance(form, Product):
        up, down = host(form.up), host(form.down)
        if kernel:
            up = up.reshape(*up.shape, *(1 for _ in kernel))
            down = down.reshape(down.shape[0], -1, *kernel)
        return "lora", down.shape[0], form.scale, {_LORA[0]: down, _LORA[1]: up}
    if type(form) is RowMagnitude:
        arrays = {
            _LORA[0]: host(form.down),
            _LORA[1]: host(form.up),
            "dora_scale": host(form.magnitude)[:, None],
        }
        return "locon", form.down.shape[0], form.scale, arrays
    place = Place(name, "LyCORIS", None)
    if type(form) is HadamardProduct:
        arrays = {end: host(a) for end, a in save_loha(form, place).items()}
        return "loha", form.down1.shape[0], form.scale, arrays
    if type(form) is KroneckerProduct:
        arrays = {end: host(a) for end, a in save_lokr(form, place).items()}
        ranks = [d.shape[0] for d in (form.left_down, form.right_down) if d is not None]
        if len(set(ranks)) > 1:
            raise CheckpointError(
                f"{name}: both parts must have one rank, got {ranks}; multiply one of them out"
            )
        if not ranks:
            arrays["lokr_w1"] = arrays["lokr_w1"] * form.scale
            return "lokr", 1, 1.0, arrays
        return "lokr", ranks[0], form.scale, arrays
    raise CheckpointError(
        f"{name}: {type(form).__name__} has no names in kohya or LyCORIS; convert it by to_lora()"
    )


def _scalar(alpha: float) -> np.ndarray:
    """In single precision, as others write it, if that is exact."""
    single = np.float32(alpha)
    return np.asarray(single if float(single) == alpha else np.float64(alpha))
