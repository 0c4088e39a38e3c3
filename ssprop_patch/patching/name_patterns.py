"""Patterns that name layers: exact names, blocks, ends of names, regular expressions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import nn


def matches(pattern: str, aliases: Sequence[str]) -> bool:
    """Whether a pattern means the layer with these names, see :func:`ssprop_patch.plan`."""
    return any(
        name == pattern
        or name.startswith(pattern + ".")
        or name.endswith("." + pattern)
        or _fullmatch(pattern, name)
        for name in aliases
    )


def _fullmatch(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False  # then it can only be a name


def check_patterns(patterns: Sequence[str], layers: Mapping[nn.Module, Sequence[str]]) -> None:
    """Raise unless each pattern is text and matches one of ``layers``, given with their names."""
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be text, got {pattern!r}")
        if any(matches(pattern, aliases) for aliases in layers.values()):
            continue
        names = [name for aliases in layers.values() for name in aliases]
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
        raise ValueError(
            f"the pattern {pattern!r} matches no layer to convert; the nearest names are "
            f"{', '.join(map(repr, near)) or 'none, as there is no such layer'}"
        )
