"""The order among the benchmarks: they use what users could, and each other without circles."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import ssprop_patch as ssp

from . import BENCHMARKS

FILES = sorted(BENCHMARKS.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(BENCHMARKS).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def is_public(module: ModuleType, name: str) -> bool:
    return name in getattr(module, "__all__", ()) or (
        not hasattr(module, "__all__") and not name.startswith("_")
    )


def of_the_package(tree: ast.AST) -> Iterator[str]:
    """Yield every name of the package that a file uses, from its top: ``timing.alternate``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "ssprop_patch":
                    assert (alias.name, alias.asname) == ("ssprop_patch", "ssp")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            top, _, module = node.module.partition(".")
            if top == "ssprop_patch":
                yield from (f"{module}.{alias.name}".lstrip(".") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            words, inner = [], node
            while isinstance(inner, ast.Attribute):
                words.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id == "ssp":
                yield ".".join(reversed(words))


#: What looks inside on purpose: it measures, or checks, what the package is made of.
INSIDE = {
    "breakdown.marks": {"ops.algorithms", "ops.native.build.library"},
    "gpu_run.kernels": {
        "core.reference",
        "core.geometry.ConvParams",
        "core.selection.kept_channels",
        "ops.channel_ops",
        "ops.triton_kernels",
    },
    "gpu_run.steps": {"metering.energy.find_counter"},
}

#: What is no part of what is measured: files, text, command lines.
HELPERS = ("_csv_table.", "_files.", "_progress.", "_text.", "cli.options.")


def may_be_used(name: str) -> bool:
    if name.startswith(HELPERS):
        return True
    first, *rest = name.split(".")
    if name == "__version__":
        return True
    if not is_public(ssp, first):
        return False
    found = getattr(ssp, first)
    return not (isinstance(found, ModuleType) and rest) or is_public(found, rest[0])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_public_names_of_the_package_are_used(path):
    text = path.read_text()
    hidden = {n for n in of_the_package(ast.parse(text)) if not may_be_used(n)}
    assert hidden == INSIDE.get(name_of(path), set())
    assert "_ssprop" not in text  # what the package keeps on modules


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("from ssprop_patch.core.selection import kept_channels", ["core.selection.kept_channels"]),
        ("from ssprop_patch._validate import check_count", ["_validate.check_count"]),
        ("from ssprop_patch._files import replacing", []),
        ("def f():\n    from ssprop_patch.timing import hidden", ["timing.hidden"]),
        ("ssp.patching.convert", ["patching.convert", "patching"]),
        ("ssp.timing._device.waiter()", ["timing._device.waiter", "timing._device"]),
        ("from ssprop_patch.timing import waiter\nssp.timing.MODES[0]", []),
        ("ssp.convert(model).x", []),
    ],
)
def test_what_is_not_public_is_seen(text, names):
    assert [n for n in of_the_package(ast.parse(text)) if not may_be_used(n)] == names


def imports(path: Path) -> Iterator[str]:
    """Yield the modules here that a file imports, for type checkers and in functions included."""
    own = name_of(path)
    package = own if path.name == "__init__.py" else own.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*filter(None, parents), *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in MODULES or base in MODULES:
                    yield inner if inner in MODULES else base


def test_there_are_no_circles():
    graph = {name: set(imports(path)) - {name} for name, path in MODULES.items()}
    assert graph["classifier.batches"] == {"classifier.images"}  # the graph is one
    assert graph["zoo.runner"] == {"processes", "zoo.models"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_no_script_has_the_name_of_a_package():
    packages = {path.name for path in BENCHMARKS.iterdir() if (path / "__init__.py").exists()}
    assert packages and not packages & {path.stem for path in BENCHMARKS.glob("*.py")}


def test_what_is_converted_by_default_is_what_the_package_says():
    default = inspect.signature(ssp.convert).parameters["types"].default
    for module in ("classifier.costs", "bench_step"):
        assert default == importlib.import_module(module).CONVOLUTIONS
