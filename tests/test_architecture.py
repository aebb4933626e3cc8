"""The house: who imports whom, what an import costs, and that all that is public is documented."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_sp
import lowrank_sp.inverse.completion
import lowrank_sp.inverse.sensing
import lowrank_sp.inverse.synthetic
from lowrank_sp import adapters, inverse, linalg, operators, tensors, updates

PACKAGE = Path(lowrank_sp.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

#: Floors from the ground up; rooms on one floor do not import each other.
FLOORS = [
    ["_threads", "tasks"],
    ["_compiled"],
    ["_arrays"],
    ["operators", "gauge"],
    ["factors", "iterate"],
    ["linalg"],
    ["testing"],
    ["tensors", "updates"],
    ["inverse"],
    ["adapters", "estimators", "plot"],
    ["checkpoint", "jax", "torch"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

HEAVY = {
    "dask",
    "jax",
    "matplotlib",
    "numba",
    "rich",
    "scipy",
    "sklearn",
    "tensorly",
    "torch",
    "typer",
}
#: What a room may load when it is imported.
ALLOWED = {"cli": {"typer", "rich"}, "torch": {"torch"}, "jax": {"jax"}, "_compiled": {"numba"}}
ALLOWED["lowrank_sp.inverse._compiled"] = {"numba"}
ALLOWED["lowrank_sp.updates._compiled"] = {"numba"}
ALLOWED["estimators"] = {"sklearn"}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(tree):
    """Dotted names that a piece of code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def rooms_imported(tree):
    modules = {name for name in imports(tree) if name.split(".")[0] == "lowrank_sp"}
    return {room_of(name) for name in modules} & set(FLOOR)


def at_module_level(tree):
    """The code that runs on import: all but the bodies of functions and ``if TYPE_CHECKING``."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):  # noqa: ARG002
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


paths = pytest.mark.parametrize("path", MODULES, ids=module_name)


@paths
def test_rooms_import_only_from_rooms_below(path):
    room = room_of(module_name(path))
    if room == "__init__":
        return
    assert room in FLOOR, f"{room} has no floor yet: add it to FLOORS"
    for other in rooms_imported(parse(path)) - {room}:
        assert FLOOR[other] < FLOOR[room], f"{room} imports {other}"


@paths
def test_heavy_libraries_are_imported_where_they_are_used(path):
    tree = parse(path)
    name = module_name(path)
    room = room_of(name)
    libraries = {name.split(".")[0] for name in imports(at_module_level(tree))}
    assert libraries & HEAVY <= ALLOWED.get(room, set()) | ALLOWED.get(name, set())
    if room != "torch":
        assert "torch" not in {name.split(".")[0] for name in imports(parse(path))}


def test_the_checks_can_fail():
    bad = ast.parse("def f():\n    import torch\nimport scipy.linalg\nfrom lowrank_sp import cli")
    assert {name.split(".")[0] for name in imports(bad)} == {"torch", "scipy", "lowrank_sp"}
    assert rooms_imported(bad) == {"cli"}
    assert {"scipy"} <= {name.split(".")[0] for name in imports(at_module_level(bad))}
    assert "torch" not in set(imports(at_module_level(bad)))


def test_import_is_light():
    heavy = sorted(HEAVY - {"scipy"} | {"scipy.linalg", "scipy.sparse", "safetensors"})
    code = f"import lowrank_sp, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def exported():
    bridge = importlib.import_module("lowrank_sp.torch")
    solvers = (inverse, inverse.completion, inverse.sensing, inverse.synthetic, updates)
    algebra = (adapters.algebra, adapters.algebra.merge)
    many = (
        *algebra,
        adapters.federated,
        adapters.serving,
        adapters.compensate,
        adapters.compress,
        adapters.subspaces,
    )
    for module in (lowrank_sp, linalg, operators, tensors, adapters, *many, bridge, *solvers):
        for name, thing in vars(module).items():
            ours = getattr(thing, "__module__", "").startswith("lowrank_sp")
            kind = inspect.isclass(thing) or inspect.isfunction(thing)
            if ours and kind and not name.startswith("_"):
                yield pytest.param(thing, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("thing", list(exported()))
def test_all_that_is_public_has_a_docstring(thing):
    assert thing.__doc__
    assert thing.__doc__.strip()
    # A dataclass without a docstring gets its signature as one.
    assert not thing.__doc__.startswith(f"{thing.__name__}(")
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            public = not name.startswith("_") and (
                inspect.isfunction(member) or isinstance(member, property)
            )
            if public:
                assert inspect.getdoc(getattr(thing, name)), f"{thing.__name__}.{name}"
