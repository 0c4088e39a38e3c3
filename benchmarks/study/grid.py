"""From a study's file to its runs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classifier.options import UserError

from study.settings import LISTS, Settings, resolve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_SECTIONS = ("seeds", "settings", "conditions", "methods")


@dataclass(frozen=True)
class Study:
    """A name and all runs, each once, in the order in which they are to be trained."""

    name: str
    runs: tuple[Settings, ...]


def read(path: Path) -> Study:
    """Return the study that a TOML file describes.

    Raises:
        UserError: If there is no such file, or something in it is wrong.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # of TOML, or of the text's encoding
        raise UserError(f"{path} is not TOML: {error}") from error
    try:
        return Study(path.stem, tuple(expand(content)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def expand(content: Mapping[str, Any]) -> Iterator[Settings]:
    """Yield the runs: seeds x conditions x methods, without those that are the same.

    ``settings`` hold for all runs; each table of ``conditions`` is met by each table of
    ``methods``. In all of them a list means each of its values in turn (of ``types`` and
    ``exclude``, whose values are lists themselves, a list of lists). ``seeds`` is a number or a
    list. Seed by seed, so that what an unfinished study has is comparable, and methods innermost,
    so that a drift of the machine hits all alike.
    """
    if unknown := sorted(set(content) - set(_SECTIONS)):
        raise UserError(f"{', '.join(unknown)}: a study has only {', '.join(_SECTIONS)}")
    common = content.get("settings", {})
    conditions, methods = content.get("conditions", [{}]), content.get("methods", [{}])
    for name, tables in (("settings", [common]), ("conditions", conditions), ("methods", methods)):
        tables = tables if isinstance(tables, list) else [None]
        if not tables or not all(isinstance(table, dict) for table in tables):
            how = "[settings]" if name == "settings" else f"[[{name}]]"
            raise UserError(f"write {name} as {how}, one table with names and values")
        if any("seed" in table for table in tables):
            raise UserError("give seeds = 3 or seeds = [0, 1, 2] above all tables, not seed")
    seen = set()
    for seed, condition, method in itertools.product(_seeds(content), conditions, methods):
        if twice := sorted(set(condition) & set(method)):
            raise UserError(f"{', '.join(twice)}: in conditions and in methods; which one counts?")
        for values in _product({**common, **condition, **method}):
            settings = resolve({**values, "seed": seed})
            if settings not in seen:
                seen.add(settings)
                yield settings


def _seeds(content: Mapping[str, Any]) -> list[int]:
    seeds = content.get("seeds", 3)
    listed = list(range(seeds)) if type(seeds) is int else seeds
    if not isinstance(listed, list) or not listed or not all(type(s) is int for s in listed):
        raise UserError(f"seeds must be a number above 0 or a list of numbers, got {seeds!r}")
    return listed


def _product(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    axes = []
    for name, value in table.items():
        several = isinstance(value, list)
        if name in LISTS:
            several = several and bool(value) and all(isinstance(v, list) for v in value)
        if several and not value:
            raise UserError(f"{name} = [] leaves no run")
        axes.append(value if several else [value])
    for values in itertools.product(*axes):
        yield dict(zip(table, values, strict=True))
