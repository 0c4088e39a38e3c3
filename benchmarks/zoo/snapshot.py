"""What of a network must be as before, once the patch is off again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SAMPLED = 1_000_000  # elements of a parameter above which not all are compared


class Snapshot:
    """What of a network must be as before: classes, attributes, hooks, values."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.named_modules(remove_duplicate=False))
        self._classes = [type(m) for _, m in self._modules]
        # References, not copies: so that identity can be compared.
        self._attributes = [
            {key: (value, _content(value)) for key, value in vars(m).items()}
            for _, m in self._modules
        ]
        self._keys = list(model.state_dict())
        self._values = {name: fingerprint(p) for name, p in model.named_parameters()}

    def differences(self, model: nn.Module) -> set[str]:
        """Return the names of what differs now."""
        found = set()
        modules = list(model.named_modules(remove_duplicate=False))
        if [(n, id(m)) for n, m in modules] != [(n, id(m)) for n, m in self._modules]:
            found.add("modules")
        if list(model.state_dict()) != self._keys:
            found.add("state_dict keys")
        for (name, module), cls, attributes in zip(
            self._modules, self._classes, self._attributes, strict=True
        ):
            if type(module) is not cls:
                found.add(f"class of {name}")
            now = vars(module)
            for key in attributes.keys() ^ now.keys():
                found.add(f"{name}.{key}")
            if list(attributes) != list(now) and attributes.keys() == now.keys():
                found.add(f"order of attributes of {name}")
            for key in attributes.keys() & now.keys():
                value, content = attributes[key]
                same = now[key] is value or (_plain(value) and now[key] == value)
                if not same or not _same_content(_content(value), content):
                    found.add(f"{name}.{key}")
        for name, p in model.named_parameters():
            if fingerprint(p) != self._values[name]:
                found.add(f"values of {name}")
        return found


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, torch.Size, type(None)))


def _content(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, (list, set)) else None


def _same_content(one: list[Any] | None, two: list[Any] | None) -> bool:
    if one is None or two is None:
        return one is two
    return len(one) == len(two) and all(a is b for a, b in zip(one, two, strict=True))


def fingerprint(t: Tensor) -> tuple[Any, ...]:
    """Return what changes when a tensor, or a bit of its values, does."""
    t = t.detach()
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(t.element_size())
    total = None
    if bits and t.is_contiguous() and not t.is_complex():
        step = 1 if t.numel() < SAMPLED else 127  # a large one by a sample
        total = t.view(-1).view(bits)[::step].sum(dtype=torch.int64).item()
    return t.data_ptr(), t._version, tuple(t.shape), t.dtype, total
