"""MODEL: of timm, of torchvision, of a file; and what is none."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import ssprop_patch as ssp
from ssprop_patch.cli.models import load_model


def test_a_function_a_class_and_a_ready_network_of_a_file_are_models(nets):
    before = list(sys.path)
    assert load_model(f"{nets}:build").stem.out_channels == 10
    assert type(load_model(f"{nets}:Net")).__name__ == "Net"
    assert isinstance(load_model(f"{nets}:ready"), nn.Conv2d)
    assert sys.path == before


def test_detectors_and_segmenters_of_torchvision_are_built_without_a_download(monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("asked for weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    for name in ("lraspp_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"):
        model = load_model(f"torchvision:{name}")
        assert len(ssp.plan(model).converted) > 10


@pytest.mark.parametrize(
    ("model", "message", "code"),
    [
        ("timm:resnet_18", "did you mean resnet18", 2),
        ("torchvision:mobilenetv3_small", "did you mean mobilenet_v3_small", 2),
        ("timm:", "timm.list_models()", 2),
        ("resnet18", "for example timm:resnet18", 2),
        ("keras:resnet18", "PATH.py:FUNCTION", 2),
        ("timm:resnet18.no_such_tag", "no_such_tag", 1),
        ("nowhere.py:build", "there is no file 'nowhere.py'", 2),
        ("NETS", "nets.py:FUNCTION", 2),
        ("NETS:biuld", "did you mean build", 2),
        ("NETS:CONSTANT", "is a int, no function", 2),
        ("NETS:with_width", "missing 1 required positional argument: 'width'", 1),
        ("NETS:breaks", "RuntimeError: no such weights", 1),
        ("NETS:number", "returned a int, not an nn.Module", 1),
    ],
)
def test_a_model_that_is_none_is_one_line(model, message, code, nets, refused):
    line, found = refused("report", model.replace("NETS", nets), "--input-size", 1, 3, 8, 8)
    assert message in line
    assert found == code


def test_a_file_that_does_not_run_is_one_line(tmp_path, refused):
    for text, message in (("import no_such_library", "no_such_library"), ("def", "SyntaxError")):
        (tmp_path / "broken.py").write_text(text)
        line, code = refused("report", f"{tmp_path}/broken.py:f", "--input-size", 1, 3, 8, 8)
        assert message in line and "broken.py" in line and code == 1


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_library_is_one_line_that_says_what_to_install(library, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    line, code = refused("report", f"{library}:resnet18", "--input-size", 1, 3, 8, 8)
    assert line == f"ssprop-patch: error: {library} is not installed: pip install {library}\n"
    assert code == 1
