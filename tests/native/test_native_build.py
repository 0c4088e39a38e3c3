"""How the C functions are compiled, what is said where they are not, and what C declares."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_checks import needs_compiler

import ssprop_patch
from ssprop_patch.ops import channel_ops, native
from ssprop_patch.ops.native import batch_norm, build
from ssprop_patch.ops.native.cell_shape import CellShape
from ssprop_patch.ops.native.conv_shape import ConvShape

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CSRC = Path(native.__file__).with_name("csrc")


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


# --- when there are none ------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_build")
def test_switched_off(monkeypatch):
    monkeypatch.setenv("SSPROP_PATCH_NATIVE", "0")
    assert build.library("float") is None
    assert not native.is_available(torch.ones(2, 2))
    assert native.why_unavailable() == "SSPROP_PATCH_NATIVE is 0" and not native.may_be_available()


@pytest.mark.usefixtures("fresh_build")
def test_not_on_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "not Linux" in native.why_unavailable() and not native.may_be_available()
    assert build.library("float") is None


@pytest.mark.usefixtures("fresh_build")
@pytest.mark.parametrize("given", [None, "", " "])
def test_without_a_compiler_nothing_is_said(given, monkeypatch, recwarn):
    if given is None:
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", given)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.library("float") is None and not recwarn and not native.may_be_available()
    assert native.why_unavailable() == "no C compiler was found ($CC, gcc, cc)"


@pytest.mark.usefixtures("fresh_build")
@pytest.mark.parametrize(
    "compiler, said",
    [
        ("false", "false: exit status 1"),
        ("a-compiler-that-is-not-there", "No such file.*a-compiler-that-is-not-there"),
        ("gcc 'unfinished", "No such file.*unfinished"),
    ],
)
def test_a_compiler_that_fails_is_warned_of(compiler, said, monkeypatch, recwarn):
    monkeypatch.setenv("CC", compiler)
    assert native.may_be_available()
    assert re.search(f"^the compiler failed: .*{said}", native.why_unavailable())
    assert not recwarn  # who asks gets an answer
    message = f"could not compile.*{said}.*torch's own operations are used"
    with pytest.warns(UserWarning, match=message):
        assert build.library("float") is None
    t = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(channel_ops.channel_sum(t, 1), t.abs().sum((0, 2, 3)))


@pytest.mark.usefixtures("fresh_build")
@pytest.mark.parametrize(
    "output, said",
    [
        (
            "In file included from x:\nx.c:1:2: error: no T\nx.c:2: error: more",
            "x.c:1:2: error: no T",
        ),
        ("\nlicense expired\nbye", "license expired"),
        ("\\377 error", "\ufffd error"),
    ],
    ids=["errors", "none", "no text"],
)
def test_of_what_a_compiler_says_the_first_error_counts(output, said, monkeypatch, tmp_path):
    compiler = script(tmp_path / "compiler", f"printf '{output}' >&2\nexit 1")
    monkeypatch.setenv("CC", compiler)
    assert native.why_unavailable() == f"the compiler failed: {said}"


@pytest.mark.usefixtures("fresh_build")
def test_a_compiler_that_does_not_end(monkeypatch, tmp_path):
    compiler = script(tmp_path / "compiler", '[ "$1" = --version ] || exec sleep 60')
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    assert "took more than 0.2 seconds" in native.why_unavailable()


@needs_compiler
@pytest.mark.usefixtures("fresh_build")
def test_flags_that_are_no_flags(monkeypatch):
    for flags in ("'unfinished", "-no-such-flag"):
        monkeypatch.setenv("SSPROP_PATCH_CFLAGS", flags)
        assert native.why_unavailable().startswith("the compiler failed: ")
        build._build.cache_clear()


# --- when there are -----------------------------------------------------------------------------


@needs_compiler
@pytest.mark.usefixtures("fresh_build")
def test_no_reason_where_they_work(recwarn):
    assert native.why_unavailable() is None and native.may_be_available() and not recwarn


@needs_compiler
@pytest.mark.usefixtures("fresh_build")
def test_one_line_is_all_that_is_said():
    # In a process of its own, with every warning an error.
    code = "from ssprop_patch.ops.native import build; print(build.library('float'))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert "CDLL" in done.stdout and len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(shutil.which("gcc") is None, reason="other compilers warn of other things")
@pytest.mark.parametrize("number", ["float", "double"])
@pytest.mark.parametrize("file", sorted(f.name for f in CSRC.glob("*.c")))
def test_the_compiler_has_nothing_to_warn_of(file, number, tmp_path):
    warnings = ["-Wall", "-Wextra", "-Wmissing-prototypes", "-Wredundant-decls", "-Wshadow"]
    command = ["gcc", *build._FLAGS, *warnings, "-Werror", f"-DT={number}", "-c", str(CSRC / file)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what C and Python have to agree on ---------------------------------------------------------


def prototypes():
    """Yield the names and parameters of the functions that ssprop.h declares."""
    text = re.sub(r"/\*.*?\*/", "", (CSRC / "ssprop.h").read_text(), flags=re.DOTALL)
    for name, parameters in re.findall(r"^(?:int|void) (\w+)\(([^)]*)\);", text, re.MULTILINE):
        yield name, [parameter.strip() for parameter in parameters.split(",")]


def type_of(parameter):
    if "ConvShape" in parameter:
        return build._SHAPE
    if "CellShape" in parameter:
        return build._CELLS
    if "*" in parameter:
        return build._POINTER
    return {"int64_t": build._INT64, "int": build._INT}[parameter.split()[0]]


def test_python_calls_what_the_header_declares():
    declared = {name: tuple(map(type_of, parameters)) for name, parameters in prototypes()}
    declared.pop("cells_of_rows")  # only C calls it
    assert declared == {**build._PASSES, **build._CONV} and len(declared) == 20
    block = re.search(r"#define BLOCK (\d+)", (CSRC / "common.h").read_text())
    assert block is not None and int(block[1]) == batch_norm._BLOCK


@needs_compiler
@pytest.mark.parametrize("shape", [ConvShape, CellShape])
def test_shapes_lie_alike_in_c_and_python(tmp_path, shape):
    names, cls = [field[0] for field in shape._fields_], shape.__name__
    printed = "".join(
        f'printf("%zu %zu\\n", offsetof({cls}, {name}), sizeof((({cls} *)0)->{name}));'
        for name in names
    )
    source, program = tmp_path / "main.c", tmp_path / "main"
    source.write_text(
        '#include "ssprop.h"\n#include <stddef.h>\n#include <stdio.h>\n'
        f'int main(void) {{ {printed} printf("%zu\\n", sizeof({cls})); }}'
    )
    compiler = build.find_compiler()
    subprocess.run(
        [*compiler, "-DT=float", f"-I{CSRC}", str(source), "-o", str(program)], check=True
    )
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    fields = [getattr(shape, name) for name in names]
    expected = [number for field in fields for number in (field.offset, field.size)]
    assert [int(number) for number in said] == [*expected, ctypes.sizeof(shape)]


def test_the_sources_are_packaged():
    # setuptools leaves out of a wheel what is neither Python nor named in pyproject.toml.
    root = Path(ssprop_patch.__file__).parent
    pyproject = root.with_name("pyproject.toml")
    if not pyproject.exists():
        pytest.skip("the package is installed without its repository")
    patterns = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]
    packaged = {file for pattern in patterns["ssprop_patch"] for file in root.glob(pattern)}
    needed = {f for f in root.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
    assert {"conv.c", "ssprop.h", "py.typed"} <= {f.name for f in needed}
    assert packaged == needed
