"""Patterns that name layers: exact names, blocks, ends of names, regular expressions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

_SHOWN = 3  # names in an error
# A likeness of 1 is equality: how near a name must be, and what is as near as another.
_NEAR, _AS_NEAR = 0.65, 0.05


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


def check_patterns(
    patterns: Sequence[str], layers: Mapping[nn.Module, Sequence[str]], model: nn.Module
) -> None:
    """Raise unless each pattern is text and matches one of ``layers``.

    Args:
        patterns: What the user gave.
        layers: Of ``model``, those that a plan lists, with their names.
        model: Whose other modules may be what was meant.
    """
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be text, got {pattern!r}")
        if not any(matches(pattern, aliases) for aliases in layers.values()):
            names = [name for aliases in layers.values() for name in aliases]
            raise ValueError(
                f"the pattern {pattern!r} matches no layer to convert{_hint(pattern, names, model)}"
            )


def _hint(pattern: str, names: Sequence[str], model: nn.Module) -> str:
    for name, module in model.named_modules():
        if name and matches(pattern, (name,)):
            return (
                f", only {name!r} ({type(module).__name__}), which stays dense anyway: types= "
                "names the classes to convert"
            )
    if not names:
        return "; there is no such layer"
    near = nearest(pattern, names)
    if not near:
        shown = ", ".join(map(repr, names[:_SHOWN])) + ", ..." * (len(names) > _SHOWN)
        return f"; no name is near it, there are {shown}"
    one = len(near) == 1
    return f"; the nearest name{' is' if one else 's are'} {', '.join(map(repr, near))}"


def nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the few that differ least from a pattern, of all that it could have meant.

    A layer's name, that of a block around it, the end of either: ``layr1`` is nearer to the block
    ``layer1`` than to any ``layer1.0.conv1`` in it.
    """
    meant = dict.fromkeys(part for name in names for part in _parts(name))
    likeness = {name: difflib.SequenceMatcher(None, name, pattern).ratio() for name in meant}
    least = max(_NEAR, *likeness.values()) - _AS_NEAR
    found = sorted((n for n in meant if likeness[n] > least), key=lambda n: -likeness[n])
    return found[:_SHOWN]


def _parts(name: str) -> Iterable[str]:
    words = name.split(".")
    for i in range(len(words)):
        yield ".".join(words[: i + 1])
        yield ".".join(words[i:])
