"""What layers remember from step to step, as a part of their controller's state."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn

from .._text import counted
from ..core.ahead import Scores, make_team
from ..core.principal import Subspace
from .step_counter import StepCounter


def memories(counter: StepCounter) -> dict[str, tuple[nn.Module, Subspace | Scores]]:
    """Return the layers that have one, by their names in the models that were converted.

    Where several models share a controller, the number of the model comes before the name; what is
    in none of them any more has the number of the layer.
    """
    found = {m: s for m in counter.layers if (s := _memory_of(m)) is not None}
    names: dict[nn.Module, str] = {}
    roots = counter.roots
    for number, root in enumerate(roots):
        prefix = f"{number}:" if len(roots) > 1 else ""
        for name, module in root.named_modules():
            if module in found:
                names.setdefault(module, prefix + (name or "(model)"))
    for number, module in enumerate(found):
        names.setdefault(module, f"layer {number}")
    return {names[m]: (m, memory) for m, memory in found.items()}


def _memory_of(module: nn.Module) -> Subspace | Scores | None:
    policy = vars(module).get("_ssprop_policy")
    return None if policy is None else policy.rule.subspace or policy.rule.ahead


def layers_state(counter: StepCounter) -> dict[str, Any]:
    """Return the state of each layer that has any."""
    layers = {name: memory for name, (_, memory) in memories(counter).items()}
    names = {id(memory): name for name, memory in layers.items()}
    state = {}
    for name, memory in layers.items():
        state[name] = memory.state_dict()
        if isinstance(memory, Scores):  # in their order, in which scores are added
            mates = [names.get(id(member)) for member in memory.team.members]
            state[name]["team"] = [mate for mate in mates if mate is not None]
    return state


def check_layers_state(counter: StepCounter, state: Any) -> None:
    """Raise an error if ``state`` does not belong to these layers.

    Raises:
        ValueError: If it does not.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"the state of the layers must be a dict, got {type(state).__name__}")
    layers = memories(counter)
    if set(state) != set(layers):
        odd = sorted(set(state) ^ set(layers))
        where = "this model" if odd[0] in layers else "the state"
        raise ValueError(
            f"the state has what {counted(len(state), 'layer')} remember, in this model "
            f"{len(layers)} do: {odd[0]!r} is in {where} only. Convert with the selection, and the "
            "layers, that it was saved with."
        )
    for name, (module, memory) in layers.items():
        if isinstance(memory, Scores):
            _check_scores(name, module, state[name], state)
        else:
            _check_directions(name, module, state[name])


def load_layers_state(counter: StepCounter, state: Mapping[str, Any]) -> None:
    """Let all layers go on where ``state`` was taken, which was checked."""
    layers = memories(counter)
    for name, (_, memory) in layers.items():
        memory.load_state_dict(state[name])
    for name, (_, memory) in layers.items():
        if isinstance(memory, Scores):
            mates = [layers[mate][1] for mate in state[name]["team"]]
            make_team([mate for mate in mates if isinstance(mate, Scores)])


def _check_scores(name: str, module: Any, state: Any, layers: Mapping[str, Any]) -> None:
    try:
        passes, scores, team = int(state["passes"]), state["scores"], state["team"]
        wrong = passes < 0 or name not in team or not set(team) <= set(layers)
        wrong = wrong or not (scores is None or isinstance(scores, Tensor))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: not the scores of a layer: {error!r}") from error
    if wrong:
        raise ValueError(f"{name}: not the scores of a layer")
    if scores is not None and tuple(scores.shape) != (module.out_channels,):
        raise ValueError(
            f"{name}: the state is of another layer, of {tuple(scores.shape)} channels: this is "
            f"{module}"
        )


def _check_directions(name: str, module: Any, state: Any) -> None:
    try:
        passes, bases = int(state["passes"]), state["bases"]
        given = {key: tuple(basis["covariance"].shape) for key, basis in bases.items()}
        vectors = {key: tuple(basis["vectors"].shape) for key, basis in bases.items()}
        asked = [int(basis["asked"]) for basis in bases.values()]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: not the state of a layer's directions: {error!r}") from error
    sizes = _sizes(module)
    fits = all(
        key in sizes
        and given[key] == (groups, sizes[key], sizes[key])
        and vectors[key][:2] == (groups, sizes[key])
        and vectors[key][2] <= sizes[key]
        for groups in [getattr(module, "groups", 1)]
        for key in bases
    )
    tensors = [t for basis in bases.values() for t in (basis["covariance"], basis["vectors"])]
    if passes < 0 or min(asked, default=1) < 1 or not all(isinstance(t, Tensor) for t in tensors):
        raise ValueError(f"{name}: not the state of a layer's directions")
    if not fits:
        raise ValueError(
            f"{name}: the state is of another layer, its covariances have the shapes {given}: "
            f"this is {module}"
        )


def _sizes(module: Any) -> dict[str, int]:
    """Return the lengths of the vectors that a layer's directions are of."""
    if isinstance(module, nn.Linear):
        n = module.in_features
        return {"dy": module.out_features, "dx": n, "dw": n}
    n = module.in_channels // module.groups
    sizes = {"dy": module.out_channels // module.groups}
    return sizes if module.transposed else {**sizes, "dx": n, "dw": n * prod(module.kernel_size)}
