"""Saving and loading one run's state, so that a kill at any moment leaves a whole file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Protocol

import torch

from classifier.options import UserError
from ssprop_patch._files import replacing, write_atomically


class Stateful(Protocol):
    """What has a state: a model, an optimizer, a controller, ..."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class RandomState:
    """The generators that layers such as dropout draw from, as something with a state."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the generators of torch, of the device and of Python."""
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        if self.device.type != "cpu":
            state["device"] = getattr(torch, self.device.type).get_rng_state()  # the current one
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set them."""
        torch.set_rng_state(state["torch"])
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        if "device" in state:
            getattr(torch, self.device.type).set_rng_state(state["device"])


def save(path: Path, parts: dict[str, Stateful]) -> None:
    """Write the state of each part to ``path``."""
    states = {name: part.state_dict() for name, part in parts.items()}
    with replacing(path) as beside, beside.open("wb") as file:
        torch.save(states, file)


def load(path: Path, parts: dict[str, Stateful]) -> None:
    """Set the state of each part from ``path``; without such a file, leave all as it is."""
    if not path.exists():
        return
    try:
        states = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read: delete it to repeat this run") from error
    for name, part in parts.items():
        part.load_state_dict(states[name])


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``, whole or not at all."""
    write_atomically(path, json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    """Return what ``write_json`` wrote, None where there is nothing."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: delete it, or pass --overwrite") from error
