"""``adapter_config.json``: numbers, patterns of numbers, and what layers must agree on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

from lowrank_sp.checkpoint.tensors import CheckpointError, read_object

CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Config:
    """The configuration of an adapter that is read."""

    values: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Config:
        """That of a directory."""
        return cls(read_object(folder / CONFIG, "adapter config"))

    def number(self, key: str, default: float) -> float:
        """A number, or an error."""
        value = self.values.get(key)
        return check_number(default if value is None else value, key)

    def get(self, key: str, default: Any = None) -> Any:
        """Any value."""
        return self.values.get(key, default)

    def rank(self, name: str, key: str = "r", default: float = 8) -> float:
        """The rank of a layer, by ``rank_pattern``."""
        pattern = check_pattern(self.values.get("rank_pattern"), "rank_pattern")
        return pattern_value(pattern, name, self.number(key, default))

    @cached_property
    def alphas(self) -> dict[re.Pattern[str], Any]:
        """``alpha_pattern``."""
        return check_pattern(self.values.get("alpha_pattern"), "alpha_pattern")

    def alpha(self, name: str, key: str, default: float) -> float:
        """The alpha of a layer; ``key`` is what the method calls it."""
        return pattern_value(self.alphas, name, self.number(key, default))

    def scale(self, name: str, rank: int, key: str = "lora_alpha", default: float = 8) -> float:
        """``alpha / rank``, or over its root where the configuration says so."""
        alpha = self.alpha(name, key, default)
        return alpha / (math.sqrt(rank) if self.get("use_rslora") else rank)


def check_number(value: Any, what: str) -> Any:
    """``value`` if it is a real number, or an error."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise CheckpointError(f"{what} must be a number, got {value!r}")
    return value


def check_pattern(pattern: Any, what: str) -> dict[re.Pattern[str], Any]:
    """Numbers by compiled regular expression for the end of a module name, as PEFT reads them.

    ``what`` names the pattern in errors; None is an empty one.
    """
    if not isinstance(pattern, Mapping | None):
        raise CheckpointError(
            f"{what} must map regular expressions to numbers, got {type(pattern).__name__}"
        )
    compiled = {}
    for key, value in (pattern or {}).items():
        try:
            expression = re.compile(rf"(?:.*\.)?(?:{key})$")
        except re.error as error:
            raise CheckpointError(f"{what} {key!r}: not a regular expression ({error})") from error
        compiled[expression] = check_number(value, f"{what} of {key!r}")
    return compiled


def pattern_value(pattern: Mapping[re.Pattern[str], Any], name: str, default: Any) -> Any:
    """The value of the first expression that matches a module name."""
    return next((value for key, value in pattern.items() if key.match(name)), default)


def patterned(
    ranks: Mapping[str, int], scales: Mapping[str, float], *, alpha: str = "lora_alpha"
) -> dict[str, Any]:
    """Ranks and alphas as they are written: the most frequent pair, and patterns for the rest.

    A layer that differs is in both patterns, since PEFT takes the global alpha for one that has
    only a rank.
    """
    sizes = [(rank, plain(scales[name] * rank)) for name, rank in ranks.items()]
    common = max(sorted(set(sizes)), key=sizes.count)
    other = {
        _pattern_of(name, ranks): size
        for name, size in zip(ranks, sizes, strict=True)
        if size != common
    }
    return {
        "r": common[0],
        alpha: common[1],
        "rank_pattern": {name: size[0] for name, size in other.items()},
        "alpha_pattern": {name: size[1] for name, size in other.items()},
    }


def counted(
    values: Mapping[str, int], key: str, pattern: str | None = None
) -> dict[str, int | dict[str, int]]:
    """Counts as they are written: the most frequent one, and a pattern for the rest."""
    found = list(values.values())
    most = max(sorted(set(found)), key=found.count)
    other = {
        # Some methods ask for a dot before an expression: the other branch does without.
        _pattern_of(name, values).replace("^", "(?!)|^"): value
        for name, value in values.items()
        if value != most
    }
    return {key: most, pattern or f"{key}_pattern": other}


def _pattern_of(name: str, names: Mapping[str, Any]) -> str:
    """An expression that matches one of the names alone."""
    if any(other.endswith(f".{name}") for other in names):
        return f"^{re.escape(name)}"
    return name


def common(values: Mapping[str, Any], what: str, method: str) -> Any:
    """The value that all layers have, for what a configuration has only once."""
    (first, expected), *others = values.items()
    for name, value in others:
        if value != expected:
            raise CheckpointError(
                f"a file of {method} has one {what} for all layers, got {expected} of {first} and "
                f"{value} of {name}; write them as adapters of their own"
            )
    return expected


def plain(alpha: float) -> float | int:
    """A number without the rounding of a division that has been undone."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
