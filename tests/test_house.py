"""The order of the house: imports go downward only, and there are no circles."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import ssprop_patch

ROOT = Path(ssprop_patch.__file__).parent
# From the ground up; what stands in one line may import each other, file by file.
FLOORS = (
    (
        "_torch_compat",
        "_csv_table",
        "_device",
        "_files",
        "_progress",
        "_text",
        "_validate",
        "class_swap",
    ),
    ("core",),
    ("schedule",),
    ("ops",),
    ("functional", "patching"),
    ("flops",),
    ("metering", "timing"),
    ("integrations", "_picture", "plots"),
    ("cli",),
    ("__init__",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in ROOT.rglob("*.py")}


def imports(module, path):
    """Yield what a module imports of the package, those for type checkers included."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = package.split(".") if package else []
        base = parts[: len(parts) - node.level + 1]
        source = ".".join([*base, node.module] if node.module else base)
        for alias in node.names:
            inner = f"{source}.{alias.name}" if source else alias.name
            found = inner if inner in MODULES else source
            if found != module:
                yield found or "__init__"


GRAPH = {m or "__init__": set(imports(m, path)) for m, path in MODULES.items()}


def test_imports_go_downward():
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if FLOOR[other.partition(".")[0]] > FLOOR[module.partition(".")[0]]
    ]
    assert not upward


def test_there_are_no_circles():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_every_module_has_its_floor():
    assert {m.partition(".")[0] for m in GRAPH} == set(FLOOR)
