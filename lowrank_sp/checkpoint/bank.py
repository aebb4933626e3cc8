"""Banks of adapters from PEFT directories, and back: one directory per adapter, as engines load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lowrank_sp._arrays import as_compute, dtype_name, to_host
from lowrank_sp.adapters.forms import Product
from lowrank_sp.adapters.serving import AdapterBank
from lowrank_sp.checkpoint.adapter import Adapter, check_same_base
from lowrank_sp.checkpoint.output import atomic_directory
from lowrank_sp.checkpoint.peft import read_adapter, write_adapter
from lowrank_sp.checkpoint.tensors import CheckpointError


def read_bank(paths: Mapping[str, str | Path]) -> dict[str, AdapterBank]:
    """Banks by module name, of the adapters in PEFT directories.

    Parameters
    ----------
    paths : mapping from adapter name to directory

    Returns
    -------
    dict from module name to AdapterBank
        Every bank holds the adapters that have this module, under their names.

    Raises
    ------
    CheckpointError
        If a directory cannot be read, or if two adapters were made for different base models, or
        for different shapes of a module, which are named.
    """
    if not paths:
        raise CheckpointError("at least one adapter directory is needed, got none")
    adapters = {name: read_adapter(path) for name, path in paths.items()}
    check_same_base(adapters)
    layers: dict[str, dict[str, Product]] = {}
    for name, adapter in adapters.items():
        for module, form in adapter.products().items():
            layers.setdefault(module, {})[name] = form
    banks = {}
    for module, found in layers.items():
        try:
            banks[module] = AdapterBank.of(found)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{module}: {error}") from error
    return banks


def write_bank(
    path: str | Path,
    banks: Mapping[str, AdapterBank],
    *,
    base: str,
    names: list[str] | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, Path]:
    """Write every adapter of some banks as a PEFT directory of its own, under its name.

    Parameters
    ----------
    path : str or Path
        A directory that does not exist yet; it appears when all is written.
    banks : mapping from module name to AdapterBank
        An adapter gets the modules whose banks hold it. Quantized banks are decoded.
    base : str
        What the configurations name as the base model.
    names : list of str, optional
        Adapters to write; by default all.
    fan_in_fan_out : bool
        Whether the base stores its weights inputs by outputs.

    Returns
    -------
    dict from adapter name to Path

    Raises
    ------
    CheckpointError
        If a name is in no bank or no plain name of a directory, or if ``path`` exists.
    """
    known = list(dict.fromkeys(name for bank in banks.values() for name in bank.names))
    wanted = known if names is None else list(names)
    for name in wanted:
        if name not in known:
            raise CheckpointError(f"no adapter {name!r} in the banks; they have {known[:5]}")
        if name in ("", ".", "..") or Path(name).name != name:
            raise CheckpointError(f"{name!r} is no name of a directory; rename the adapter")
    with atomic_directory(path) as folder:
        for name in wanted:
            layers = {
                module: _on_disk(bank[name]) for module, bank in banks.items() if name in bank.names
            }
            (folder / name).mkdir()
            adapter = Adapter(layers, base, fan_in_fan_out=fan_in_fan_out)
            write_adapter(folder / name, adapter)
    return {name: Path(path) / name for name in wanted}


def _on_disk(pair: Product) -> Product:
    # NumPy has no bfloat16.
    up, down = (
        as_compute(f) if dtype_name(f.dtype) == "bfloat16" else f for f in (pair.up, pair.down)
    )
    return Product(to_host(up), to_host(down), pair.scale)
