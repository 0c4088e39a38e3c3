"""The records of a model's layers: how they are put on, kept on, and taken off again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..core.rule import BackwardRule
from ..patching.conversion import Conversion, apply_conversion
from ..patching.dry_run import dry_run
from ..patching.eligibility import DEFAULT_TYPES
from ..patching.layer_kinds import LAYERS, base_layer, is_patched_layer
from ..patching.plan import PlanRow
from ..patching.reasons import Reason
from ..schedule.controller import SparsityController
from ..schedule.layer_policy import LayerPolicy
from .hooks import Hook
from .layer_record import LayerRecord, Metering
from .other_work import OtherWork

_COUNTED = (*DEFAULT_TYPES, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside its wrappers (DDP, ``torch.compile``)."""
    while True:
        children = dict(model.named_children())
        if list(children) not in (["module"], ["_orig_mod"]):
            return model
        (model,) = children.values()


class Instrumentation:
    """Gives each layer of a model a record of its calls.

    Layers that are not converted get a policy that never drops a channel, so that they are counted
    in the same way; hooks count what no policy sees, see :meth:`_ran_unseen`.

    Args:
        model: The model, or what wraps it.
        others, meter, count_channels: As of :class:`LayerRecord`.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If it has no layer to count, or one that cannot be counted. Nothing has changed
            then.
    """

    def __init__(
        self, model: nn.Module, others: OtherWork, meter: Metering, *, count_channels: bool
    ) -> None:
        self.records: dict[str, LayerRecord] = {}
        self.not_counted: tuple[str, ...] = ()
        self.converted: set[str] = set()
        self._model, self._inner = model, inner_model(model)
        self._others, self._meter, self._count_channels = others, ref(meter), count_channels
        self._policies: dict[nn.Module, LayerPolicy] = {}
        self._hooks: list[Any] = []
        self._said = False
        rows = self._rows()
        _close_meters(row.module for row in rows)
        self._put_on(Conversion.of(model))

    @property
    def layers(self) -> tuple[nn.Module, ...]:
        """The layers that are counted."""
        return tuple(self._policies)

    @property
    def is_training(self) -> bool:
        """Whether the model, not only a part of it, is in training mode."""
        return self._inner.training

    @property
    def drop_rate(self) -> float:
        """The drop rate in force; of the first controller, if there are several."""
        return self._controller.drop_rate

    def _rows(self) -> list[PlanRow]:
        """Return the layers to count, and those that convolve in their own way.

        Raises:
            ValueError: If there is no layer to count, or one that cannot be counted.
        """
        found = dry_run(self._model, types=_COUNTED)
        refused = [f"  {row.name or '(model)'}: {row.reason}" for row in found.refused]
        if refused:
            raise ValueError("cannot meter this model:\n" + "\n".join(refused))
        if not any(_is_countable(row) or is_patched_layer(row.module) for row in found):
            raise ValueError(f"no layer to count in this {type(self._model).__name__}")
        return list(found)

    def _put_on(self, before: Conversion) -> None:
        found = self._rows()
        rows = [row for row in found if row.module in before.layers or _is_countable(row)]
        names = self._names(found)
        converted = {row.name: before.layers.get(row.module) for row in rows}
        dense = SparsityController(0.0)  # where nothing is converted
        policies, records, bystanders = {}, {}, []
        for row in rows:
            name, policy = names[row.module], converted[row.name]
            if policy is None:
                controller = _nearest_controller(row.name, converted) or dense
                policy = LayerPolicy(controller, BackwardRule(), 0.0)
                bystanders.append((row.module, controller))
            record = self.records.get(name) or self._new_record(name, row)
            records[name] = record
            policies[row.module] = LayerPolicy.metered(policy, record)
        apply_conversion(before._replace(layers=policies), within=self._model)
        # The steps of whoever trains these alone do not count for a controller they only borrow.
        for module, controller in bystanders:
            controller.step_counter.discard(module)
        self._before, self._policies = before, policies
        self.records.update(records)
        self.not_counted = tuple(names[row.module] for row in found if row.module not in policies)
        self._controller = next(
            (policy.controller for policy in converted.values() if policy is not None), dense
        )
        self.converted = {names[row.module] for row in rows if converted[row.name] is not None}
        self._hook_layers()

    def _new_record(self, name: str, row: PlanRow) -> LayerRecord:
        meter = self._meter()
        assert meter is not None  # it is the one that asks
        return LayerRecord(
            name,
            _is_transposed(row),
            count_channels=self._count_channels,
            others=self._others,
            meter=meter,
        )

    def _names(self, found: Any) -> dict[nn.Module, str]:
        """Return the layers' names without the wrappers around the model."""
        inside = {m: name for name, m in self._inner.named_modules()}
        return {row.module: inside.get(row.module, row.name) or "(model)" for row in found}

    def follow(self) -> bool:
        """Count on where the model was converted again; say so, once, where it was reverted.

        Returns:
            Whether there is anything to count.
        """
        if all(vars(m).get("_ssprop_policy") is p for m, p in self._policies.items()):
            return True
        now = self._without_records()
        if now.layers:
            self._put_on(now)
            return True
        if not self._said:
            self._said = True
            warnings.warn(
                "this model was reverted while a Meter counts in it: no FLOPs are counted from "
                "now on. Close the meter first; to meter the dense model, make a new one.",
                stacklevel=4,
            )
        return False

    def put_on_again(self) -> None:
        """Count on after :meth:`take_off`."""
        self._put_on(Conversion.of(self._model))

    def take_off(self) -> None:
        """Leave the model as it was before, or as it was converted since."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        apply_conversion(self._without_records(), within=self._model)
        self._policies = {}

    def _without_records(self) -> Conversion:
        """Return how things would stand without this."""
        now = Conversion.of(self._model)
        layers = {}
        for module, policy in now.layers.items():
            if self._policies.get(module) is not policy:
                layers[module] = policy  # converted again since
            elif module in self._before.layers:
                layers[module] = self._before.layers[module]
        return now._replace(layers=layers)

    # --- calls that no policy sees ----------------------------------------------------------------

    def _hook_layers(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            module.register_forward_hook(Hook(self._ran_unseen), with_kwargs=True)
            for module in self._policies
            if base_layer(type(module)) is not None
        ]

    def _ran_unseen(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], y: Any) -> None:
        """Take note of a call that had no autograd function of this package's own.

        In training these are the calls of layers that get no gradient (frozen, or checkpointed for
        the first time), and those of a part that is kept in eval mode.
        """
        if torch.compiler.is_compiling() or not self._inner.training or not isinstance(y, Tensor):
            return
        if module.training and y.requires_grad:
            return
        policy = vars(module).get("_ssprop_policy")
        if policy is not None and policy.observer is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            policy.observer.dense(x, module.weight, module.bias, y)


@contextlib.contextmanager
def unmetered(model: nn.Module) -> Iterator[None]:
    """Have no meter count in ``model``, nor slow it down, while it runs for another purpose."""
    with contextlib.ExitStack() as stack:
        for meter in _meters(model.modules()):
            stack.enter_context(meter.paused())
        yield


def _meters(layers: Iterable[nn.Module]) -> list[Metering]:
    """Return the meters that count any of these layers."""
    policies = (vars(layer).get("_ssprop_policy") for layer in layers)
    observers = [p.observer for p in policies if p is not None and p.observer is not None]
    found = (observer.meter() for observer in observers)
    return list({id(meter): meter for meter in found if meter is not None}.values())


def _close_meters(layers: Iterable[nn.Module]) -> None:
    """Close the meters that count any of these layers: a new one takes over."""
    for meter in _meters(layers):
        meter.close()
        warnings.warn(
            "ssprop_patch: this model was metered already: that Meter is closed, what it counted "
            "stays in its report, and the new one counts from here",
            stacklevel=4,
        )


def _is_countable(row: PlanRow) -> bool:
    """Whether a layer that is not converted can be counted, by the way a conversion would go."""
    return row.action == "convert" or row.why is Reason.ONE_CHANNEL


def _is_transposed(row: PlanRow) -> bool:
    base = base_layer(row.cls)
    return base is not None and LAYERS[base].transposed


def _nearest_controller(
    name: str, converted: Mapping[str, LayerPolicy | None]
) -> SparsityController | None:
    """Return the controller of the converted layers around the layer ``name``.

    So that whoever asks a part of a model for its controller finds the one it had before.
    """
    while name:
        name = name.rpartition(".")[0]
        for other, policy in converted.items():
            if policy is not None and other.startswith(f"{name}." if name else ""):
                return policy.controller
    return None
