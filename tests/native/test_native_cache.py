"""Compiled libraries are kept for other processes; what cannot be trusted is compiled again."""

import ctypes
import errno
import itertools
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from native_checks import forget, needs_compiler

from ssprop_patch.ops.native import build, cache

DAY = 24 * 3600
NUMBERS = ("float", "double")
ALL = build._LIBRARIES
OTHER_KEY = f"passes-float-{'0' * 32}-{'1' * 64}.so"


@pytest.fixture
def folder(fresh_build):
    """The folder of the cache, not made yet."""
    return fresh_build


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """A folder with what the compiler makes of the sources."""
    if build.find_compiler() is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("libraries")
    for number, (name, (files, _)) in itertools.product(NUMBERS, build._LIBRARIES.items()):
        sources = [str(Path(build.__file__).with_name("csrc") / file) for file in files]
        flags = ["-O0", "-fopenmp", f"-DT={number}", "-shared", "-fPIC"]
        target = folder / f"{name}-{number}.so"
        subprocess.run([*build.find_compiler(), *flags, *sources, "-o", str(target)], check=True)
    return folder


@pytest.fixture
def compiled(folder, libraries, monkeypatch, tmp_path):
    """Load the library as a new process does, and return how often the compiler was called.

    What stands in for the compiler copies what the real one has made, as it takes a moment only.
    There is but one library, or the others would be compiled with it.
    """
    monkeypatch.setattr(build, "_LIBRARIES", {"passes": build._LIBRARIES["passes"]})
    log, script = tmp_path / "log", tmp_path / "compiler"
    script.write_text(f"""#!/bin/sh
[ "$1" = --version ] && exit
echo called >> {log}
for target; do :; done # the last argument
cp {libraries}/"${{target##*/}}" "$target"
""")
    script.chmod(0o700)
    monkeypatch.setenv("CC", str(script))

    def load():
        forget()
        scores, index = torch.tensor([1.0, 3.0, 2.0]), torch.zeros(2, dtype=torch.int64)
        work = torch.zeros(3)
        build.library("float").topk_indices(
            scores.data_ptr(), 1, 3, 2, work.data_ptr(), index.data_ptr()
        )
        assert index.tolist() == [1, 2]
        return len(log.read_text().split()) if log.exists() else 0

    return load


def entries(folder):
    return sorted(path for path in folder.iterdir() if path.name != "lock")


def put(path, content):
    """Write a file anew: libraries that are loaded must not change."""
    beside = path.with_name("beside")
    beside.write_bytes(content)
    beside.chmod(0o600)
    os.replace(beside, path)


# --- what is kept -------------------------------------------------------------------------------


def test_it_is_compiled_once(compiled, folder):
    assert compiled() == compiled() == 1
    assert Path(build.library("float")._name).parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    (entry,) = entries(folder)
    assert entry.stat().st_mode & 0o777 == 0o600


def test_other_numbers_and_functions_are_others(compiled, folder, monkeypatch):
    monkeypatch.setattr(build, "_LIBRARIES", ALL)
    assert compiled() == 2  # what is needed soon, at the same time
    for arguments in (("double",), ("float", "conv"), ("double", "conv")):
        assert build.library(*arguments) is not None
    assert compiled() == 4 and len(entries(folder)) == 4


def test_all_that_changes_a_library_is_in_its_name(folder, monkeypatch, tmp_path):
    sources = tmp_path / "csrc"
    sources.mkdir()
    file = sources / "a.c"
    file.write_text("int a;")
    said = tmp_path / "said"
    said.write_text("version 1")
    compilers = [tmp_path / "cc", tmp_path / "cc2"]
    for path in compilers:
        path.write_text(f"#!/bin/sh\ncat {said}\n")
        path.chmod(0o700)

    def stem(name="passes-float", compiler=compilers[0], flags=("-O3",)):
        cache._version_of.cache_clear()
        return cache.find_entry(name, [str(compiler)], flags, sources).stem

    first = stem()
    assert first == stem()
    (sources / "a.c~").write_text("of an editor")
    assert first == stem()
    found = [first, stem("conv-float"), stem(compiler=compilers[1]), stem(flags=("-O3", "-g"))]
    file.write_text("int b;")
    found.append(stem())
    file.rename(sources / "b.c")
    found.append(stem())
    said.write_text("version 2")
    found.append(stem())
    monkeypatch.setattr(cache, "_processor", lambda: "another")
    found.append(stem())
    assert len(set(found)) == len(found) == 8


def test_the_processor_has_a_description():
    assert len(cache._processor()) > 3 and "MHz" not in cache._processor()


def test_without_a_version_nothing_is_kept(folder, tmp_path):
    assert cache.find_entry("passes-float", ["false"], (), tmp_path) is None
    assert cache.find_entry("passes-float", ["not-there"], (), tmp_path) is None


# --- where --------------------------------------------------------------------------------------


def test_the_folder(folder, monkeypatch, tmp_path):
    assert cache.find_folder() == folder and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSPROP_PATCH_CACHE", "~/other/place")
    assert cache.find_folder() == tmp_path / "other/place"
    monkeypatch.delenv("SSPROP_PATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.find_folder() == tmp_path / "xdg/ssprop_patch"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # its specification wants that ignored
    assert cache.find_folder() == tmp_path / ".cache/ssprop_patch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.find_folder() == tmp_path / ".cache/ssprop_patch"
    monkeypatch.setenv("HOME", "relative")
    assert cache.find_folder() is None


@pytest.mark.parametrize("value", ["", "0"])
def test_switched_off(value, compiled, folder, monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    monkeypatch.setenv("SSPROP_PATCH_CACHE", value)
    assert compiled() == 1 and compiled() == 2
    assert not folder.exists() and not entries(home)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777])
def test_a_folder_that_others_may_write_to(mode, compiled, folder):
    assert compiled() == 1
    folder.chmod(mode)
    assert compiled() == 2 and compiled() == 3
    assert len(entries(folder)) == 1


def test_a_folder_of_another_user(compiled, folder, monkeypatch):
    assert compiled() == 1
    monkeypatch.setattr(cache.os, "geteuid", lambda: os.getuid() + 1)
    assert compiled() == 2 and len(entries(folder)) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_nothing_is_made_in_the_home_of_another_user(folder, monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 12345, -1)
    monkeypatch.delenv("SSPROP_PATCH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    assert cache.find_folder() is None and not entries(home)


@pytest.mark.parametrize("name", ["file", "file/below", "null\0"])
def test_what_cannot_be_a_folder(name, compiled, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    if "\0" in name:  # which no variable holds
        monkeypatch.setattr(cache.os, "environ", {**os.environ, "SSPROP_PATCH_CACHE": name})
        assert cache.find_folder() is None
        return
    monkeypatch.setenv("SSPROP_PATCH_CACHE", str(tmp_path / name))
    assert compiled() == 1 and compiled() == 2


@pytest.mark.parametrize("step", ["mkstemp", "replace"])
def test_a_folder_that_takes_no_file(step, compiled, folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "no space left on the device")

    owner = {"mkstemp": cache.tempfile, "replace": cache.os}[step]
    monkeypatch.setattr(owner, step, refuse)
    assert compiled() == 1 and compiled() == 2 and not entries(folder)
    monkeypatch.undo()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_to_write(compiled, folder):
    folder.mkdir(mode=0o500)
    assert compiled() == 1 and compiled() == 2 and not entries(folder)


def test_a_folder_that_nothing_can_be_run_from(compiled, folder, monkeypatch):
    real = ctypes.CDLL

    def load(path):
        if Path(path).parent == folder:
            raise OSError("failed to map segment from shared object")
        return real(path)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert compiled() == 1 and compiled() == 2 and len(entries(folder)) == 1


# --- what is not trusted ------------------------------------------------------------------------


DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "without its last byte": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "one bit": lambda content: content[:999] + bytes([content[999] ^ 1]) + content[1000:],
    "text": lambda content: b"not a library",
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_library_is_compiled_again(damage, compiled, folder):
    assert compiled() == 1
    (entry,) = entries(folder)
    content = entry.read_bytes()
    put(entry, DAMAGES[damage](content))
    assert compiled() == 2 and compiled() == 2
    assert all(cache._is_intact(path) for path in entries(folder))


def test_a_link_is_not_followed(compiled, folder, tmp_path):
    assert compiled() == 1
    (entry,) = entries(folder)
    elsewhere = tmp_path / "elsewhere.so"
    entry.rename(elsewhere)
    content = elsewhere.read_bytes()
    entry.symlink_to(elsewhere)
    assert compiled() == 2 and compiled() == 2
    assert not entry.is_symlink() and elsewhere.read_bytes() == content


@pytest.mark.parametrize("mode", [0o666, 0o660, 0o602])
def test_a_library_that_others_may_write_to(mode, compiled, folder):
    assert compiled() == 1
    entries(folder)[0].chmod(mode)
    assert compiled() == 2 and compiled() == 2
    assert entries(folder)[0].stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_a_library_of_another_user(compiled, folder):
    assert compiled() == 1
    os.chown(entries(folder)[0], 12345, -1)
    assert compiled() == 2 and compiled() == 2
    assert entries(folder)[0].stat().st_uid == os.geteuid()


def test_a_folder_or_a_pipe_in_its_place(compiled, folder):
    assert compiled() == 1
    (entry,) = entries(folder)
    entry.unlink()
    os.mkfifo(entry)
    assert compiled() == 2 and compiled() == 2
    entry.unlink()
    entry.mkdir()
    assert compiled() == 3 and compiled() == 4
    assert entries(folder) == [entry]  # nothing unfinished either


# --- what is removed ----------------------------------------------------------------------------


def test_libraries_that_were_not_used_for_long_are_removed(compiled, folder):
    folder.mkdir(mode=0o700)
    old, recent = folder / OTHER_KEY, folder / OTHER_KEY.replace("1", "2")
    unfinished, foreign = folder / f"{OTHER_KEY}.abc_1.tmp", folder / "libsomething.so"
    for path, days in ((old, 61), (unfinished, 61), (recent, 59), (foreign, 1000)):
        path.write_text("")
        os.utime(path, (time.time() - days * DAY,) * 2)
    assert compiled() == 1
    assert not old.exists() and not unfinished.exists()
    assert recent.exists() and foreign.exists() and len(entries(folder)) == 3


def test_a_library_in_use_stays(compiled, folder):
    assert compiled() == 1
    (entry,) = entries(folder)
    os.utime(entry, (time.time() - 100 * DAY,) * 2)
    assert compiled() == 1
    assert time.time() - entry.stat().st_mtime < DAY


@needs_compiler
def test_a_time_that_cannot_be_set(compiled, folder, monkeypatch):
    assert compiled() == 1
    (entry,) = entries(folder)
    os.utime(entry, (0, 0))

    def refuse(*args):
        raise PermissionError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(cache.os, "utime", refuse)
    assert compiled() == 1
