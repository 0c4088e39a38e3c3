"""From MODEL, as it stands on the command line, to a network."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .errors import CommandError, UsageError, one_line
from .options import MODELS


def load_model(text: str) -> nn.Module:
    """Return the network that ``text`` names, with random weights; nothing is downloaded.

    Raises:
        UsageError: If there is no such model, file or function.
        CommandError: If the library is not installed, or the model cannot be built.
    """
    kind, colon, name = text.rpartition(":")
    if colon and kind.endswith(".py"):
        return _from_file(Path(kind), name)
    library, colon, name = text.partition(":")
    if colon and library in ("timm", "torchvision"):
        return _from_timm(name) if library == "timm" else _from_torchvision(name)
    if text.endswith(".py"):
        raise UsageError(f"MODEL {text}: name a function in it: {text}:FUNCTION")
    hint = f"; for example timm:{text}" if text and not colon else ""
    raise UsageError(f"MODEL {text!r} is none of {MODELS}{hint}")


def _from_timm(name: str) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    return _built(f"timm:{name}", timm.create_model, name)


def _from_torchvision(name: str) -> nn.Module:
    models = _library("torchvision").models
    known = models.list_models()
    if name not in known:
        raise _unknown("torchvision", name, known)
    takes = inspect.signature(models.get_model_builder(name)).parameters
    kwargs: dict[str, Any] = {"weights": None}
    if "weights_backbone" in takes:
        kwargs["weights_backbone"] = None  # else torchvision downloads them
    if name in ("googlenet", "inception_v3"):
        kwargs["init_weights"] = False  # takes long, and a warning without it
    return _built(f"torchvision:{name}", models.get_model, name, **kwargs)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise CommandError(f"{name} is not installed: pip install {name}") from error


def _unknown(library: str, name: str, known: Iterable[str]) -> UsageError:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{library}.list_models() lists them"
    return UsageError(f"{library} has no model {name!r}; {hint}")


def _from_file(path: Path, name: str) -> nn.Module:
    if not path.is_file():
        raise UsageError(f"MODEL: there is no file {str(path)!r}")
    module = _run_file(path)
    made = getattr(module, name, None)
    if made is None:
        near = difflib.get_close_matches(name, [n for n in vars(module) if n[0] != "_"], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"MODEL: {path} has no function {name!r}{hint}")
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise UsageError(f"MODEL: {name!r} in {path} is a {type(made).__name__}, no function")
        made = _built(f"{path}:{name}", made)
    if not isinstance(made, nn.Module):
        raise CommandError(f"{path}:{name} returned a {type(made).__name__}, not an nn.Module")
    return made


def _run_file(path: Path) -> ModuleType:
    """Run a file as ``import`` would: it finds its neighbours, and its classes their module."""
    module_name = f"_ssprop_patch_cli_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise CommandError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _built(what: str, function: Any, *args: Any, **kwargs: Any) -> nn.Module:
    try:
        return function(*args, **kwargs)
    except Exception as error:  # whatever a builder may raise is the user's to read
        raise CommandError(f"{what}: {type(error).__name__}: {one_line(error)}") from error
