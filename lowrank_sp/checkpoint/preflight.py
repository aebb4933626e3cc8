"""What an engine would refuse, or get wrong without a word, of an adapter on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowrank_sp.checkpoint.adapter import base_mismatch
from lowrank_sp.checkpoint.job import check_choice
from lowrank_sp.checkpoint.model import Checkpoint
from lowrank_sp.checkpoint.peft.config import Config, check_pattern, pattern_value
from lowrank_sp.checkpoint.peft.parts import NotGiven
from lowrank_sp.checkpoint.peft.reading import FINGERPRINT, PREFIX, WEIGHTS, read_adapter
from lowrank_sp.checkpoint.tensors import (
    CheckpointError,
    OptionError,
    Tensor,
    read_header,
    read_metadata,
)

#: Values that vLLM allows for ``max_lora_rank``.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_RANK = 16
# Initializers that change the base weight when PEFT loads an adapter that names them.
_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FACTOR = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_[AB](?:\.weight)?")
_MERGE = "merge the adapter into the base"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or may be.

    Attributes
    ----------
    severity : "error" or "warning"
        An engine refuses an error, or computes something else than was trained; a warning holds
        under a condition that the message names.
    layer : str or None
        The module, or None for the whole adapter.
    message : str
        What happens.
    remedy : str
        What to do about it.
    """

    severity: Literal["error", "warning"]
    layer: str | None
    message: str
    remedy: str

    def __str__(self) -> str:
        where = "" if self.layer is None else f"{self.layer}: "
        return f"{self.severity}: {where}{self.message}; {self.remedy}"


@dataclass(frozen=True)
class _Files:
    """What there is to look at."""

    path: Path
    config: Config
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    model: Checkpoint | None
    max_lora_rank: int

    def ranks(self) -> dict[str, int]:
        """Rank of every layer with the factors of LoRA."""
        return {
            match[1]: tensor.shape[0]
            for key, tensor in self.tensors.items()
            if ".lora_A" in key and (match := _FACTOR.fullmatch(key)) and tensor.shape
        }

    def is_lora(self) -> bool:
        """Whether the configuration is one of LoRA and its variants."""
        return self.config.get("peft_type") == "LORA"


def preflight(
    adapter: str | Path,
    *,
    engine: str,
    model: Checkpoint | None = None,
    max_lora_rank: int | None = None,
) -> list[Finding]:
    """What PEFT or vLLM would refuse, or get wrong, of an adapter; nothing if all is well.

    Parameters
    ----------
    adapter : path
        A directory of PEFT. Only headers are read.
    engine : "peft" or "vllm"
    model : Checkpoint, optional
        The base that the adapter shall be used with. Layers and shapes are then compared, and
        whether it is the base that the adapter was made for:
        :func:`~lowrank_sp.checkpoint.adapter.base_mismatch`.
    max_lora_rank : int, optional
        What vLLM will be started with, by default 16, as it has it; other engines have none.

    Returns
    -------
    list of Finding
        Errors first.

    Raises
    ------
    CheckpointError
        If a file is missing or unreadable, or an argument is none that the engine takes.
    """
    check_choice(engine, _CHECKS, "engine")
    if engine != "vllm" and max_lora_rank is not None:
        raise OptionError(f"max_lora_rank is for vllm only, got {max_lora_rank} for {engine}")
    max_lora_rank = _VLLM_RANK if max_lora_rank is None else max_lora_rank
    if max_lora_rank not in VLLM_RANKS:
        raise OptionError(
            f"max_lora_rank must be one of {', '.join(map(str, VLLM_RANKS))}, got {max_lora_rank}"
        )
    path = Path(adapter)
    config, weights = Config.read(path), path / WEIGHTS
    tensors, metadata = read_header(weights), read_metadata(weights)
    files = _Files(path, config, tensors, metadata, model, max_lora_rank)
    found = [finding for check in (*_ALWAYS, *_CHECKS[engine]) for finding in check(files)]
    return sorted(found, key=lambda finding: finding.severity)


def _other_tensors(x: _Files) -> Iterator[Finding]:
    """Tensors that the method does not have, and layers that are not whole."""
    saved = x.config.get("modules_to_save") or ()
    foreign = [
        key
        for key in x.tensors
        if any(f".{name}." in f".{key.removeprefix(PREFIX)}" for name in saved)
    ]
    if foreign:
        return
    try:
        read_adapter(x.path, model=None if x.ranks() else x.model)
    except NotGiven:
        return
    except CheckpointError as error:
        message = str(error).removeprefix(f"{x.path / WEIGHTS}: ").removeprefix(f"{x.path}: ")
        yield Finding("error", None, message, "write the adapter again, whole")


def _moving_initializer(x: _Files) -> Iterator[Finding]:
    start = str(x.config.get("init_lora_weights")).lower()
    if not start.startswith(_MOVING):
        return
    again = "at random" if "niter" in start else "on loading"
    yield Finding(
        "error",
        None,
        f"init_lora_weights is {start}: the adapter belongs to a base weight that PEFT changes "
        f"{again}, and other engines do not",
        "convert it to plain LoRA by its untrained start, or serve it with its residual base and "
        "init_lora_weights true",
    )


def _model_mismatch(x: _Files) -> Iterator[Finding]:
    if x.model is None:
        return
    for name, rank in x.ranks().items():
        weight = x.model.tensors.get(f"{name}.weight")
        if weight is None:
            if name in x.model.factored:
                message = "two factors stand in place of its weight"
                yield Finding("error", name, message, "use the model that was compressed")
            else:
                remedy = "check the prefix of the names"
                yield Finding("error", name, "no module of the model", remedy)
            continue
        ends = ("", ".weight")
        down = next(t for e in ends if (t := x.tensors.get(f"{PREFIX}{name}.lora_A{e}")))
        up = next((t for e in ends if (t := x.tensors.get(f"{PREFIX}{name}.lora_B{e}"))), None)
        sides = {down.shape[-1], up.shape[0] if up else down.shape[-1]}
        if len(weight.shape) == 2 and len(down.shape) == 2 and not sides <= set(weight.shape):
            yield Finding(
                "error",
                name,
                f"factors of rank {rank} with the sides {sorted(sides)} for a weight "
                f"{weight.shape}",
                "use the base that the adapter was trained on",
            )
    base = x.config.get("base_model_name_or_path")
    if reason := base_mismatch(x.model, base=base, fingerprint=x.metadata.get(FINGERPRINT)):
        yield Finding("error", None, reason, "use the base that the adapter was trained on")


def _targets(x: _Files) -> Iterator[Finding]:
    targets = x.config.get("target_modules")
    if not targets:
        yield Finding("error", None, "target_modules is missing", "list the modules of the file")
        return
    for name in x.ranks():
        if isinstance(targets, str):
            found = targets == "all-linear" or re.fullmatch(targets, name)
        else:
            found = any(name == target or name.endswith(f".{target}") for target in targets)
        if not found:
            yield Finding(
                "error",
                name,
                "target_modules does not name it, so its tensors are dropped",
                "add it to target_modules",
            )


def _ranks_of_config(x: _Files) -> Iterator[Finding]:
    """Ranks that PEFT would expect, and patterns of ranks that change scales."""
    if not x.is_lora():
        return
    patterns = {
        what: check_pattern(x.config.get(what), what) for what in ("rank_pattern", "alpha_pattern")
    }
    rank, alpha = x.config.number("r", 8), x.config.number("lora_alpha", 8)
    for name, actual in x.ranks().items():
        expected = pattern_value(patterns["rank_pattern"], name, rank)
        if expected != actual:
            yield Finding(
                "error",
                name,
                f"rank {actual} in the file and {expected} in the configuration",
                "give r or rank_pattern the rank of the file",
            )
        if actual != rank and pattern_value(patterns["alpha_pattern"], name, None) is None:
            yield Finding(
                "warning",
                name,
                f"rank {actual} by rank_pattern without alpha_pattern has the global alpha, and so "
                f"the scale {x.config.scale(name, actual):g}, not "
                f"{x.config.scale(name, int(rank)):g}",
                f"give it {alpha * actual / rank:g} in alpha_pattern, unless it was trained so",
            )


def _drawn_again(x: _Files) -> Iterator[Finding]:
    if x.config.get("save_projection", True) is False:
        yield Finding(
            "warning",
            None,
            "projections are not saved, and drawn again on loading: the same only with the same "
            "target modules and precision",
            "save the adapter with save_projection=True",
        )
    if x.config.get("peft_type") == "PSOFT":
        yield Finding(
            "warning",
            None,
            "the singular vectors that the adapter turns are not saved, and their signs depend on "
            "device and library",
            "convert it to LoRA where it was trained",
        )
    if x.config.get("kasa_config") is not None:
        yield Finding(
            "warning",
            None,
            "KaSA cuts the weights of the base when it is loaded, for good",
            "load the base again for other adapters",
        )


def _vllm_kind(x: _Files) -> Iterator[Finding]:
    refused: dict[str, tuple[bool, str, str]] = {
        "peft_type": (
            not x.is_lora(),
            f"peft_type is {x.config.get('peft_type')}, not LORA",
            "convert it to LoRA",
        ),
        "use_dora": (bool(x.config.get("use_dora")), "DoRA is refused", _MERGE),
        "kasa": (
            x.config.get("kasa_config") is not None,
            "KaSA is read as LoRA without its diagonal and the cut of the base",
            _MERGE,
        ),
        "modules_to_save": (
            bool(x.config.get("modules_to_save")),
            f"modules_to_save is {x.config.get('modules_to_save')}, which is refused",
            "merge those modules into the base and leave them out",
        ),
        "bias": (
            x.config.get("bias", "none") != "none" or bool(x.config.get("lora_bias")),
            "biases are not supported",
            _MERGE,
        ),
    }
    for is_so, message, remedy in refused.values():
        if is_so:
            yield Finding("error", None, message, remedy)


def _vllm_tensors(x: _Files) -> Iterator[Finding]:
    for key, tensor in x.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            yield Finding("error", None, f"{key} is not a factor of LoRA", "leave it out, or merge")
        elif len(tensor.shape) > 2:
            yield Finding("error", match[1], "a convolution is not supported", _MERGE)


def _vllm_ranks(x: _Files) -> Iterator[Finding]:
    ranks = x.ranks()
    most = max([*ranks.values(), int(x.config.number("r", 8))])
    if most > x.max_lora_rank:
        enough = [allowed for allowed in VLLM_RANKS if allowed >= most]
        remedy = f"start vLLM with max_lora_rank={enough[0]}" if enough else "resize the adapter"
        yield Finding("error", None, f"rank {most} is above {x.max_lora_rank}", remedy)


def _vllm_scales(x: _Files) -> Iterator[Finding]:
    """VLLM has one scale, of the global rank and alpha."""
    if not x.is_lora():
        return
    rank = int(x.config.number("r", 8))
    shared = Config({**x.config.values, "alpha_pattern": None}).scale("", rank)
    for name, actual in x.ranks().items():
        own = x.config.scale(name, actual)
        if abs(own - shared) > 1e-6 * abs(shared):
            yield Finding(
                "error",
                name,
                f"rank_pattern and alpha_pattern are ignored: scale {shared:g} instead of {own:g}",
                "write it with one scale: multiply the difference into up",
            )


Check = Callable[[_Files], Iterator[Finding]]
_ALWAYS: tuple[Check, ...] = (
    _other_tensors,
    _moving_initializer,
    _model_mismatch,
    _targets,
)
_CHECKS: dict[str, tuple[Check, ...]] = {
    "peft": (_ranks_of_config, _drawn_again),
    "vllm": (_vllm_kind, _vllm_tensors, _vllm_ranks, _vllm_scales),
}
