"""Files that are written: whole after a kill, a full disk, an interrupt; else as with open()."""

import contextlib
import csv
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch._csv_table import CsvTable
from ssprop_patch._files import replacing, whole_rows, write_atomically
from ssprop_patch.metering.loggers import CsvFile

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TOO_LARGE = os.strerror(errno.EFBIG)


@contextlib.contextmanager
def room_for(count):
    """As on a disk that is nearly full: no file grows beyond ``count`` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- replaced at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["full disk", "interrupt"])
@pytest.mark.parametrize("old", [None, "old content"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, how, old):
    path = tmp_path / "file.json"
    if old is not None:
        path.write_text(old)
    if how == "full disk":
        with pytest.raises(OSError, match=TOO_LARGE), room_for(3):
            write_atomically(path, "new content")
    else:
        with pytest.raises(KeyboardInterrupt), replacing(path) as beside:
            beside.write_text("new")
            raise KeyboardInterrupt
    assert (path.read_text() if path.exists() else None) == old
    assert os.listdir(tmp_path) == ["file.json"] * (old is not None)
    write_atomically(path, "new content")
    assert path.read_text() == "new content" and os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_at_the_end(tmp_path, monkeypatch, name):
    """A full disk may be told of only by fsync."""
    (path := tmp_path / "file").write_text("old")

    def fail(*args):
        raise FULL

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_usual_mode(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "new", "text")
        open(tmp_path / "usual", "w").close()
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666, 0o755])
def test_a_file_keeps_its_mode(tmp_path, mode):
    (path := tmp_path / "file").write_text("old")
    path.chmod(mode)
    write_atomically(path, "new")
    assert path.stat().st_mode & 0o777 == mode and path.read_text() == "new"


def test_a_file_that_may_not_be_written_is_not(tmp_path, monkeypatch):
    (path := tmp_path / "file").write_text("old")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda file, how: how != os.W_OK)  # tests may run as root
    with pytest.raises(PermissionError, match="file"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(tmp_path, there):
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data" / "file", tmp_path / "link"
    link.symlink_to(Path("data") / "file")
    if there:
        target.write_text("old")
    write_atomically(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert os.listdir(tmp_path / "data") == ["file"]


def test_what_is_no_file_is_written_itself(tmp_path):
    write_atomically(os.devnull, "text")
    assert not Path(os.devnull).is_file()
    os.mkfifo(pipe := tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "text")
    reader.join()
    assert read == ["text"] and pipe.is_fifo()


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    missing = tmp_path / "no" / "file"
    for path, error in ((missing, FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(error) as caught:
            write_atomically(path, "text")
        assert caught.value.filename == str(path) or caught.value.filename == path
    assert os.listdir(tmp_path) == []


def test_long_names_relative_paths_and_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "ä" * 120 + ".json"
    write_atomically(name, "ü\n")
    assert Path(name).read_bytes() == "ü\n".encode() and os.listdir() == [name]


def test_a_file_written_by_path(tmp_path):
    path = tmp_path / "weights.pt"
    for value in (1, 2):
        with replacing(path) as beside:
            torch.save({"value": value}, beside)
            assert beside.parent == tmp_path
        assert torch.load(path) == {"value": value} and os.listdir(tmp_path) == ["weights.pt"]


def killed_while(script, *arguments, ready):
    """Run a script that writes over and over, and kill it some time after it printed ``ready``."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().strip() == ready, process.communicate()
    time.sleep(0.03)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


WRITES = """
import sys, itertools
sys.path.insert(0, sys.argv[2])
from ssprop_patch._files import write_atomically
for n in itertools.count():
    write_atomically(sys.argv[1], "begin" + chr(97 + n % 26) * 3_000_000 + "end")
    if n == 1: print("ready", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
def test_a_killed_process_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    killed_while(WRITES, str(path), str(Path(ssp.__file__).parents[1]), ready="ready")
    text = path.read_text()
    assert len(text) == 3_000_008 and text[:5] == "begin" and text[-3:] == "end"
    assert len(set(text[5:-3])) == 1
    assert all(name == "file" or name.endswith(".tmp") for name in os.listdir(tmp_path))


# --- what is written so -------------------------------------------------------------------------


def test_kernel_choices(tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text("[]\n")
    with pytest.raises(OSError, match=TOO_LARGE), room_for(1):
        ssp.kernels.save(path)
    assert path.read_text() == "[]\n" and os.listdir(tmp_path) == ["kernels.json"]
    ssp.kernels.save(path)
    assert isinstance(json.loads(path.read_text()), list)


def test_a_picture_of_the_command_line(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from ssprop_patch.cli.errors import CommandError
    from ssprop_patch.cli.output import plot

    figure, path = Figure(), tmp_path / "picture.svg"
    plot(lambda plots: figure, path)
    old = path.read_bytes()
    assert old.startswith(b"<?xml") and os.listdir(tmp_path) == ["picture.svg"]

    def fail(beside, **kwargs):
        Path(beside).write_text("half a pic")
        raise FULL

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(CommandError, match=r"picture.svg: .*No space"):
        plot(lambda plots: figure, path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["picture.svg"]
    monkeypatch.undo()
    plot(lambda plots: figure, tmp_path / "plain")
    assert (tmp_path / "plain.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CommandError, match=r"picture\.nothing"):
        plot(lambda plots: figure, tmp_path / "picture.nothing")
    assert sorted(os.listdir(tmp_path)) == ["picture.svg", "plain.png"]


# --- added to row by row ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        ("", ""),
        ("a,b", ""),
        ("a,b\n", "a,b\n"),
        ("a,b\n1,", "a,b\n"),
        ("a\r\n1\r\n", "a\r\n1\r\n"),
        ('a\n"x\ny"\n', 'a\n"x\ny"\n'),
        ('a\n1\n"x\ny', "a\n1\n"),
        ('a\n1\n"x\ny\nz', "a\n1\n"),
        ('a\n"say ""x\n""",2\n"', 'a\n"say ""x\n""",2\n'),
        ('"x\n', ""),
    ],
)
def test_whole_rows(content, whole):
    assert whole_rows(content.encode()) == whole.encode()


def test_wherever_a_write_stopped_the_next_row_stands_by_itself(tmp_path):
    path, header = tmp_path / "rows.csv", "a,b\n"
    row = '1,"two\nlines, ""quoted"""\n'
    table = CsvTable(path, ("a", "b"))
    for end in range(len(header + row) + 1):
        path.write_text((header + row)[:end])
        whole = [{"a": "1", "b": 'two\nlines, "quoted"'}] * (end == len(header + row))
        assert table.read() == whole
        table.append([{"a": 3, "b": 4}])
        assert table.read() == [*whole, {"a": "3", "b": "4"}]
        assert path.read_text().startswith(header)


def test_a_file_of_an_older_version_gets_the_columns_that_it_lacks(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,c\r\n1,3\r\n")
    table = CsvTable(path, ("a", "b", "c"), {"b": "-"})
    assert table.read() == [{"a": "1", "b": "-", "c": "3"}]
    table.append([{"a": 4, "b": 5}])
    assert path.read_text() == "a,b,c\n1,-,3\n4,5,\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [("a,c\n", "without b; with c"), ("b,a\n1,2\n", "in another order"), ("x", "with x")],
)
def test_a_file_of_other_columns_is_left_alone(tmp_path, content, why):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    table = CsvTable(path, ("a", "b"))
    for use in (table.read, table.check, table.open, lambda: table.append([])):
        with pytest.raises(ValueError, match=f"rows.csv has other columns.*{why}"):
            use()
    assert path.read_text() == content


def test_a_full_disk_leaves_no_part_of_a_row(tmp_path):
    path, columns = tmp_path / "log.csv", ("step", "rate")
    log = CsvFile(path, columns)
    log.write({"rate": 0.5}, 1)
    before = path.read_bytes()
    for count in range(6):
        with pytest.raises(OSError, match=TOO_LARGE), room_for(len(before) + count):
            log.write({"rate": 0.25}, 22)
        assert path.read_bytes() == before
        with pytest.raises(OSError, match=TOO_LARGE), room_for(len(before) + count):
            CsvTable(path, columns).append([{"step": 22, "rate": 0.25}])
        assert path.read_bytes() == before
    log.write({"rate": 0.75}, 3)
    log.close()
    assert path.read_bytes() == before + b"3,0.75\n"


@pytest.mark.parametrize("cut", [1, 6, 11, 12, 13, 18, 24])
def test_a_log_is_added_to_wherever_it_was_cut(tmp_path, cut):
    path, columns = tmp_path / "log.csv", ("step", "rate")
    whole = b"step,rate\r\n1,0.5\r\n2,0.5\r\n"
    path.write_bytes(whole[:cut])
    log = CsvFile(path, columns)
    log.write({"rate": 0.75}, 3)
    log.close()
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    kept = max(1, whole[:cut].count(b"\n"))
    before = [["step", "rate"], ["1", "0.5"], ["2", "0.5"]]
    assert rows == [*before[:kept], ["3", "0.75"]]


LOGS = """
import sys, itertools
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from ssprop_patch.metering.loggers import CsvFile
log = CsvFile(Path(sys.argv[1]), ("step", "rate"))
for n in itertools.count(1):
    log.write({"rate": 0.5}, n)
    if n == 3: print("ready", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="signals of POSIX")
def test_a_killed_process_leaves_whole_rows_and_the_next_one_adds_to_them(tmp_path):
    path = tmp_path / "log.csv"
    killed_while(LOGS, str(path), str(Path(ssp.__file__).parents[1]), ready="ready")
    log = CsvFile(path, ("step", "rate"))
    log.write({"rate": 0.25}, 0)
    log.close()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [*range(1, len(rows)), 0] and len(rows) > 3


def test_a_meter_that_could_not_log_counts_and_logs_on(tmp_path):
    from metering.by_hand import quiet_meter

    model, path = ssp.convert(nn.Conv2d(3, 8, 3), 0.5), tmp_path / "log.csv"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with quiet_meter(model) as meter:
        meter.log_to(path)
        for step in range(1, 4):
            model(torch.randn(1, 3, 5, 5)).sum().backward()
            if step == 2:
                with pytest.raises(OSError, match=TOO_LARGE), room_for(path.stat().st_size + 4):
                    optimizer.step()
            else:
                optimizer.step()
    with path.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "3"]
