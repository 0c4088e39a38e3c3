"""Private names of torch: all in one module, all there, and none of them needed."""

import ast
import copy
import functools
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ssprop_patch
from ssprop_patch import _torch_compat as compat

PACKAGE = Path(ssprop_patch.__file__).parent
VERSION = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])

# Before and from which version a name may be missing. All others exist in torch 2.6 to 2.14.
MAY_BE_MISSING = {
    "torch._C._dynamo.eval_frame.skip_code": VERSION >= (2, 7),
    "torch._C._dynamo.eval_frame.set_code_exec_strategy": VERSION < (2, 7),
    "torch._C._dynamo.eval_frame._FrameExecStrategy": VERSION < (2, 7),
    "torch._C._dynamo.eval_frame._FrameAction": VERSION < (2, 7),
    "torch.utils._python_dispatch.TorchDispatchMode._should_skip_dynamo": VERSION < (2, 14),
}


# --- they are there ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", compat.NAMES)
def test_torch_has_the_name(name):
    if "distributed" in name and not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    found = compat._find(name)
    compat.NAMES.pop()
    if found is None:
        assert MAY_BE_MISSING.get(name), f"torch {torch.__version__} has no {name}"


def test_no_name_is_looked_up_twice():
    assert len(set(compat.NAMES)) == len(compat.NAMES)
    assert set(MAY_BE_MISSING) <= set(compat.NAMES)


def test_calls_go_to_torchs_own_functions():
    assert compat.linear is nn.functional.linear
    assert compat.will_engine_execute_node is torch._C._will_engine_execute_node
    assert compat.tree_map is torch.utils._pytree.tree_map


@pytest.mark.parametrize("module", ["torch._dynamo", "torch._subclasses", "torch.distributed"])
def test_torch_has_the_modules_that_are_known_by_their_names(module):
    assert importlib.util.find_spec(module) is not None


def test_the_modules_of_fakes_and_shards_are_known():
    from torch._subclasses import FakeTensor

    assert compat.is_fake_class(FakeTensor)
    assert not compat.is_fake_class(nn.Parameter)
    assert not compat.is_shard_class(nn.Parameter)
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        assert compat.is_shard_class(DTensor)


def test_dynamo_reads_the_attribute_of_functions_to_call_while_tracing():
    def function():
        return True

    compat.call_while_tracing(function)
    assert vars(function) == vars(torch.compiler.assume_constant_result(lambda: True))


# --- nowhere else -----------------------------------------------------------------------------

# Of modules, see the docstring of _torch_compat; of namedtuples; and of the standard library.
ALLOWED = {
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_conv_forward",
    "_reversed_padding_repeated_twice",
    "_output_padding",
    "_orig_mod",
    "_replace",
    "_asdict",
    "_fields",
    "_getframe",
    "_hooks",
}
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "_torch_compat.py" and path.parent != PACKAGE / "ops" / "native"
]
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def is_private(name):
    return re.fullmatch(r"_(?!ssprop_)[A-Za-z]\w*", name) is not None


def defined_here():
    """The private names that the package itself defines: functions, attributes, slots, ..."""
    found = set()
    for path, tree in TREES.items():
        if path.name == "_torch_compat.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and isinstance(node.value, ast.Name)
                and node.value.id == "self"
            ):
                found.add(node.attr)
    return {name for name in found if is_private(name)}


OURS = defined_here()


def modules_of(tree):
    """The names by which a file calls torch and what it imports from torch."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            inside = getattr(node, "module", None) or ""
            for alias in node.names:
                full = f"{inside}.{alias.name}" if inside else alias.name
                if full.partition(".")[0] == "torch" and not getattr(node, "level", 0):
                    found.add((alias.asname or alias.name).partition(".")[0])
    return found


def chain_of(node):
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else ""), parts[::-1]


def private_names(tree):
    """Yield the lines and texts of what looks like a private name of torch."""
    of_torch = modules_of(tree)
    docstrings = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            inside = getattr(node, "module", None) or ""
            for alias in node.names:
                parts = [*inside.split("."), *alias.name.split(".")]
                parts = [part for part in parts if part]
                if parts[0] == "torch" and any(map(is_private, parts)):
                    yield node.lineno, ".".join(parts)
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root, parts = chain_of(node)
            theirs = root in of_torch and "ops" not in parts
            if node.attr not in ALLOWED and (theirs or node.attr not in OURS):
                yield node.lineno, ".".join([root, *parts])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in docstrings:
                continue
            path = re.search(r"\btorch(\.\w+)*\._[A-Za-z]", node.value)
            if path or (is_private(node.value) and node.value not in OURS | ALLOWED):
                yield node.lineno, node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_private_name_of_torch_is_used(path):
    found = [f"line {line}: {text}" for line, text in sorted(private_names(TREES[path]))]
    assert not found, "private names of torch belong into _torch_compat"


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._C._something()",
        "import torch.nn.functional as F\nF._something()",
        "from torch.utils import _pytree",
        "from torch._subclasses import FakeTensor",
        "import torch._dynamo",
        "def f(node):\n    return node._sequence_nr()",
        "def f(t):\n    return t._version",
        "import torch\nx = getattr(torch, '_disable_dynamo')",
        "x = 'torch._dynamo' in y",
    ],
)
def test_a_private_name_is_found(code):
    assert list(private_names(ast.parse(code)))


# --- and not needed ---------------------------------------------------------------------------

LAZY = {
    "torch._C._FunctionBase._sequence_nr",
    "torch.Tensor._version",
    "torch.Tensor._backward_hooks",
    "torch.Tensor._make_wrapper_subclass",
    "torch._C._disabled_torch_function_impl",
}

# Not imported anew: what is compiled once, and the structure that its functions take.
COMPILED = ("ssprop_patch.ops.native.build", "ssprop_patch.ops.native.conv_shape")


def import_without(hidden):
    """Import the package anew as if torch did not have these names."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "ssprop_patch"]:
        if name not in COMPILED:
            del sys.modules[name]
    importlib.import_module("ssprop_patch")
    spec = importlib.util.find_spec("ssprop_patch._torch_compat")
    module = importlib.util.module_from_spec(spec)
    module._hidden = frozenset(hidden)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    assert set(hidden) <= set(module.NAMES)
    return importlib.import_module("ssprop_patch"), module


def use_without(hidden):
    """Train a small network, and look at it in other ways, where torch lacks some names."""
    import oracle

    ssp, names = import_without(hidden)
    assert LAZY.isdisjoint(hidden) == names.CAN_BE_LAZY
    graph = importlib.import_module("ssprop_patch.ops.lazy_grad.graph")
    graph._MIN_ELEMENTS = graph._MIN_RELU_ELEMENTS = graph._MIN_POSITIONS = 0

    torch.manual_seed(0)
    blocks = [
        layer
        for c_in in (3, 8)
        for layer in (nn.Conv2d(c_in, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    model = nn.Sequential(*blocks, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    types = (*oracle.CONVOLUTIONS, nn.Linear)
    dense = copy.deepcopy(model)
    with oracle.network(dense, 0.5, types) as record:
        dense(x).square().sum().backward()
    assert record.dropped == 4
    expected = [p.grad for p in dense.parameters()]

    ssp.convert(model, 0.5, types=types)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with ssp.Meter(model, energy=False) as meter:
        model(x).square().sum().backward()
        optimizer.step()
        report = meter.report()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-11, atol=1e-11)
    assert report.steps == 1
    assert meter.drop_rate == 0.5
    assert report.totals.backwards == 4

    # One gradient alone; a rate for a while, by a decorator; what traces and what records calls.
    (only,) = torch.autograd.grad(model(x).square().sum(), [model[3].weight])
    torch.testing.assert_close(only, expected[4], rtol=1e-11, atol=1e-11)

    @ssp.dense(model)
    def rate():
        return ssp.get_controller(model).drop_rate

    @ssp.dense(model)
    def rates():
        yield rate()
        return (yield ssp.get_controller(model).drop_rate)

    assert rate() == 0
    assert [(r, ssp.get_controller(model).drop_rate) for r in rates()] == [(0, 0.5), (0, 0.5)]
    assert ssp.summary(model, input_size=(2, 3, 6, 6)).layers[0].output_shape[0] == 2
    calls = importlib.import_module("ssprop_patch.timing.recorded_calls")
    (call, count), *_ = calls.record_calls(model, [model[0]], x)
    (made,), _ = call.make_inputs(torch.Generator())
    assert (made.shape, count) == (x.shape, 1)


def test_the_package_works_without_any_of_them():
    path = [str(PACKAGE.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "SSPROP_PATCH_CFLAGS": "-O0",
    }
    done = subprocess.run(
        [sys.executable, "-c", "import test_torch_compat as t; t.use_without_each()"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["none", *NAMES, "all"]


# The last one imports Dynamo, which others are to do without.
NAMES = sorted(compat.NAMES, key="torch._disable_dynamo".__eq__)


def use_without_each():
    torch.set_num_threads(1)
    loader = importlib.machinery.SourceFileLoader
    compiled = functools.cache(lambda data, path: compile(data, path, "exec", dont_inherit=True))
    loader.source_to_code = lambda self, data, path: compiled(data, path)  # imported often
    for name, hidden in (("none", ()), *((n, (n,)) for n in NAMES), ("all", NAMES)):
        try:
            use_without(hidden)
        except BaseException as error:
            raise AssertionError(f"without {name}") from error
        print(name)
