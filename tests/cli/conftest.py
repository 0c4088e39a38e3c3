"""A file with networks, and the command line run in this process."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from ssprop_patch.__main__ import main

NETS = """
import torch
from torch import nn
from neighbour import WIDTH

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, bias=False)
        self.same = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.up = nn.ConvTranspose2d(WIDTH, 6, 2)
        self.one = nn.Conv2d(6, 1, 1)
        self.head = nn.Linear(1, 5)
        self.idle = nn.Conv2d(3, 4, 3)  # never runs

    def forward(self, x):
        x = self.same(self.same(self.stem(x)))
        return self.head(self.one(self.up(x)).mean((2, 3)))

def build():
    return Net()

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv1d(2, 4, 3)

    def forward(self, image, sound):
        return self.a(image).mean() + self.b(sound).mean()

def with_width(width):
    return Net()

def breaks():
    raise RuntimeError("no such\\n  weights")

def number():
    return 3

ready = nn.Conv2d(3, 8, 3)
CONSTANT = 3
"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("WIDTH = 10\n")
    (tmp_path / "nets.py").write_text(NETS)
    return str(tmp_path / "nets.py")


@pytest.fixture
def printed(capsys):
    """Run the command line; return what it printed, once it has ended well and without a word."""

    def run(*arguments: object) -> str:
        assert main([str(a) for a in arguments]) == 0
        out, err = capsys.readouterr()
        assert not err
        return out

    return run


@pytest.fixture
def refused(capsys):
    """Run the command line; return its one line of complaint and the exit code."""

    def run(*arguments: object) -> tuple[str, int]:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as exit_:  # argparse's way out
            code = exit_.code
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1 and err.startswith("ssprop-patch")
        return err, code

    return run


@pytest.fixture
def read_csv():
    """Read printed CSV."""
    return lambda text: list(csv.DictReader(io.StringIO(text)))
