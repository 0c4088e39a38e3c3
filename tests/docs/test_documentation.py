"""The documentation holds: its Python blocks and the examples run, its links lead somewhere.

The blocks of a file run in order, in one namespace. Names that the text leaves to the reader
(``model``, ``loader``, ...) are small stand-ins. A block after a comment ``<!-- not run: why -->``
is only compiled.
"""

from __future__ import annotations

import ast
import csv
import functools
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ssprop_patch as ssp

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "benchmarks" / "scripts").glob("*.md")),
]
EXAMPLES = {
    "lightning_trainer": "lightning",
    "hugging_face_trainer": "transformers",
    "accelerate_loop": "accelerate",
}
LIBRARIES = ("accelerate", "fastai", "lightning", "timm", "torchvision", "transformers")

quick = pytest.mark.quick


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- Python blocks --------------------------------------------------------------------------------


class Block(NamedTuple):
    page: Path
    line: int
    source: str
    not_run: str | None

    @property
    def code(self):
        """Compiled with its line numbers in the page, so that a failure points there."""
        tree = ast.parse(self.source)
        ast.increment_lineno(tree, self.line)
        return compile(tree, str(self.page), "exec")


FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```python\n(?P<source>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start("source")), m["source"], m["why"])
        for m in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


class Network(nn.Module):
    """Small, with the names of a ResNet's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.layer4(self.layer1(self.bn1(self.conv1(x)).relu()))
        return self.head(x.mean((2, 3)))


def batches() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(4, 3, 16, 16), torch.randint(10, (4,))), 2)


def readers_names(path: Path) -> dict[str, Any]:
    """Return what the text leaves to its reader."""
    model = Network()
    nothing = SimpleNamespace(range_test=lambda loader: None, reset=lambda: None)
    return {
        "ssp": ssp,
        "torch": torch,
        "nn": nn,
        "model": model,
        "loader": batches(),
        "x": torch.randn(2, 3, 16, 16),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "epochs": 2,
        "path": path / "checkpoint.pt",
        "finder": nothing,
    }


def of_lightning() -> dict[str, Any]:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Network()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return {"model": Module(), "loader": batches()}


def of_transformers() -> dict[str, Any]:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=4
    )
    args = transformers.TrainingArguments(
        "run", num_train_epochs=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    image = {"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(1)}
    model = transformers.ResNetForImageClassification(config)
    return {"trainer": transformers.Trainer(model, args, train_dataset=[image] * 4)}


def of_accelerate() -> dict[str, Any]:
    from accelerate import Accelerator

    return {"accelerator": Accelerator(cpu=True)}


#: What a block that mentions this needs besides; a trainer's block has a model of its own.
SPECIAL = {
    "integrations.lightning": ("lightning", of_lightning),
    "integrations.transformers": ("transformers", of_transformers),
    "accelerator.": ("accelerate", of_accelerate),
}


def missing_library(block: Block) -> str | None:
    """Return the library that a block needs and that is not installed."""
    needed = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(block.source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
    }
    needed |= {library for mark, (library, _) in SPECIAL.items() if mark in block.source}
    for library in LIBRARIES:
        if library in needed:
            try:
                importlib.import_module(library)
            except ImportError:
                return library
    return None


class Reading:
    """A page that is read from its beginning."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.blocks, self.folder, self.done = blocks_of(page), folder, 0
        self.names = readers_names(folder)

    def up_to(self, block: Block) -> None:
        """Run what was not run yet, so that a block may be asked for alone."""
        while self.done < len(self.blocks) and self.blocks[self.done].line <= block.line:
            current = self.blocks[self.done]
            self.done += 1
            if not current.not_run and not missing_library(current):
                self.run(current)

    def run(self, block: Block) -> None:
        special = [make() for mark, (_, make) in SPECIAL.items() if mark in block.source]
        names = self.names
        for extra in special:
            names = {**names, **extra}
        exec(block.code, names)


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    yield functools.cache(lambda page: Reading(page, tmp_path_factory.mktemp(page.stem)))
    ssp.kernels.benchmark = False
    ssp.kernels.clear()
    forget_accelerator()


def forget_accelerator() -> None:
    if "accelerate" in sys.modules:  # which keeps what is of one process in singletons
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"{short(b.page)}:{b.line}")
@pytest.mark.filterwarnings("ignore")
def test_a_block_runs(block, reading, monkeypatch):
    if block.not_run:
        compile(block.source, str(block.page), "exec")
        pytest.skip(block.not_run)
    if library := missing_library(block):
        pytest.skip(f"{library} is not installed")
    page = reading(block.page)
    monkeypatch.chdir(page.folder)
    page.up_to(block)


@quick
def test_there_is_a_block_to_paste():
    first = blocks_of(PAGES[0])[0].source
    assert "import ssprop_patch as ssp" in first and "ssp.revert(model)" in first


# --- links, length --------------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@quick
@pytest.mark.parametrize("page", LINKED, ids=short)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{short(page)} links to {link}"
        assert target.is_relative_to(ROOT), f"{short(page)} links out of the repository: {link}"
        if anchor:
            assert anchor in anchors(target), f"{short(page)} links to {link}"


@quick
def test_links_out_of_the_documentation_stay_within_its_site():
    """By the hook of mkdocs, which the tests do without."""
    hooks = runpy.run_path(str(ROOT / "docs/hooks.py"))
    pictures = []
    page = "[a](guide.md), [b](../README.md#x), ![c](../benchmarks/c.png)"
    for url, link in (
        (None, "b"),
        ("https://host/repo/", "[b](https://host/repo/blob/main/README.md#x)"),
    ):
        made = hooks["leave_docs"](page, url, pictures.append)
        assert made == f"[a](guide.md), {link}, ![c](benchmarks/c.png)"
    assert pictures == ["benchmarks/c.png"] * 2
    for path in (ROOT / "docs").glob("*.md"):
        assert "](../" not in hooks["leave_docs"](path.read_text(encoding="utf-8"), None, str)


@quick
def test_the_readme_fits():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 180
    assert 'pip install -e ".[test]" && pytest' in lines
    assert 'pip install -e ".[bench]" && python benchmarks/train_classifier.py' in lines


@quick
@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_step_times_are_those_of_the_committed_rows(page):
    with (ROOT / "benchmarks/results/bench_step_rules.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shares = {
        (r["device"], r["name"], r["side"], r["mode"]): float(r["share_of_dense"])
        for r in rows
        if r["share_of_dense"]
    }
    times = re.compile(r"\d\.\d\d / \d\.\d\d")
    devices = {
        "AVX2": "AMD EPYC (AVX2)",
        "AVX-512": "AMD EPYC (AVX512)",
        "AVX-512, Intel": "Intel(R) Xeon(R) Processor (AVX512)",
    }
    head, found = [], 0
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if line.startswith("|") and not head:
            head = cells
        elif not line.startswith("|"):
            head = []
        if not any(name in devices for name in head):
            continue
        network = cells[0].partition(",")[0]
        for column, cell in zip(head[1:], cells[1:], strict=True):
            if not times.fullmatch(cell):
                continue
            # A column for each machine, or a table of one for each machine.
            machine = devices[column if column in devices else head[0]]
            side = "l1" if column in devices else column.replace(" ", "")
            expected = [shares[machine, network, side, mode] for mode in ("backward", "step")]
            assert cell == " / ".join(f"{share:.2f}" for share in expected), line
            found += 1
    assert found >= 10


@quick
def test_the_version_to_cite_is_this_one():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {ssp.__version__}\n" in citation


@quick
def test_the_guide_is_complete():
    """Every page of docs/ is in the index."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.name == "index.md" or f"({page.name})" in index


# --- examples -------------------------------------------------------------------------------------


def run_python(*arguments: str, cwd: Path) -> str:
    """Return what a process of its own prints."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


RATES = [f"epoch {epoch}: drop rate {rate}" for epoch, rate in enumerate(["0", "0.8"] * 2)]


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """Runs a script in this process, which has imported what it needs; returns what it prints."""

    def run(script: Path) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    forget_accelerator()
    yield run
    forget_accelerator()


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs(name, run_here):
    pytest.importorskip(EXAMPLES[name])
    out = run_here(ROOT / "examples" / f"{name}.py")
    assert [line.partition(",")[0] for line in out.splitlines() if "drop rate" in line] == RATES


def test_the_plain_loop_resumes(tmp_path, run_here):
    """And runs in a process of its own."""
    pytest.importorskip("sklearn")
    script = ROOT / "examples" / "plain_loop.py"
    before = run_python(str(script), "--epochs", "3", cwd=tmp_path).splitlines()
    after = run_here(script).splitlines()
    assert len(after) == 1
    assert [line.partition(",")[0] for line in before + after] == RATES


@quick
def test_examples_are_short():
    for path in (ROOT / "examples").glob("*.py"):
        assert path.stem in {*EXAMPLES, "plain_loop"} and len(path.read_text().splitlines()) < 70


def test_the_notebook_runs(capsys):
    pytest.importorskip("torchvision")
    path = ROOT / "examples" / "quickstart.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    assert notebook["nbformat"] == 4 and len({cell["id"] for cell in cells}) == len(cells)
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), names)
    out = capsys.readouterr().out
    assert "drop rate 0.8: 13 of 64 rows" in out and out.rstrip().endswith("False")


def test_the_flops_of_the_readme_are_those_of_the_results():
    rows = csv.DictReader((ROOT / "benchmarks/results/step_flops.csv").open())
    shares = {row["network"]: float(row["step_share"]) for row in rows}
    table = re.findall(
        r"^\| (\w+), \d+×3×[^|]*\|[^|]*\|[^|]*\|[^|]*\| ([\d.]+) \|$",
        (ROOT / "README.md").read_text(),
        re.M,
    )
    assert len(table) == 6
    for network, share in table:
        assert f"{shares[network]:.2f}" == share, network
