"""convert, revert and converted: put the sparse backward on a model and take it off again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import nn

from .._torch_compat import DecoratorContextManager
from .._validate import check_count
from ..class_swap import is_patched
from ..core.rule import Remainder, Selection, resolve_rule
from ..schedule import presets
from ..schedule.controller import SparsityController
from ..schedule.layer_policy import LayerPolicy
from ..schedule.schedules import Schedule, constant
from .conversion import Conversion, apply_conversion
from .dry_run import dry_run
from .eligibility import DEFAULT_TYPES, Types
from .filters import FilterFn
from .layer_kinds import is_patched_layer
from .layer_rules import rule_of_layer
from .plan import Plan
from .reasons import Reason
from .sync_selection import synchronized

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Model = TypeVar("Model", bound=nn.Module)


# Equal to it, but not the same: who gives the preset itself has given a schedule.
_DEFAULT = replace(presets.PAPER)


def convert(
    model: Model,
    schedule: Schedule | float | Callable[[int], float] = _DEFAULT,
    *,
    drop_rate: float | None = None,
    types: Types = DEFAULT_TYPES,
    steps_per_epoch: int | None = None,
    filter_fn: FilterFn | None = None,
    exclude: str | Sequence[str] = (),
    overrides: Mapping[str, float] | None = None,
    align: int = 1,
    selection: Selection = "l1",
    remainder: Remainder = None,
    sync_selection: bool | ProcessGroup = False,
    controller: SparsityController | None = None,
    strict: bool = True,
) -> Model:
    """Give every Conv1d, Conv2d and Conv3d of ``model`` a sparse backward, in place.

    Other layers are converted when their class is named in ``types``.

    Parameters, buffers, hooks, optimizer references and ``state_dict`` keys stay; the forward is
    bit-identical. Converting again is converting once with the new arguments.

    Args:
        model: Any module; a single convolution, a compiled or a wrapped model too.
        schedule: A schedule, a number (constant rate), or a callable t -> drop rate. Default: the
            paper's, 80 % of the channels dropped in every other epoch (arXiv 2408.12561).
        drop_rate: In place of a schedule, a constant rate: ``drop_rate=0.8`` is ``schedule=0.8``.
        types: Classes of layers to convert, subclasses included: besides Conv1d, Conv2d and Conv3d
            also ``nn.ConvTranspose1d/2d/3d`` and ``nn.Linear`` (a channel is an output feature;
            ``exclude`` the classifier), and classes of other libraries that call ``F.conv1d/2d/3d``
            in their forward, such as timm's CondConv2d (each sample's channels for themselves).
        steps_per_epoch: Optimizer steps in one epoch, for a schedule that counts epochs
            (``len(loader)``; with gradient accumulation accordingly fewer). Without it call
            ``get_controller(model).step(epoch)`` at the start of every epoch.
        filter_fn: ``filter_fn(module, name) -> bool``: False leaves a layer dense.
        exclude: Patterns of layers to leave dense, see :func:`ssprop_patch.plan`.
        overrides: ``{pattern: rate}``: rates of their own for some layers, in force whenever the
            controller's rate is above 0.
        align: Round the number of kept channels (of each group, in grouped layers) up to a
            multiple of this. Convolution kernels compute whole blocks of channels, 8 or 16, so that
            13 of 64 cost as much as 16: ``align=16`` keeps more of the gradient for the same time.
            A layer with no more channels than that stays dense. ``summary`` and ``Meter`` say the
            true rate.
        selection: How channels are scored: ``"l1"`` (the paper), ``"l2"``, ``"random"``, or a
            callable that takes dy, shape (N, C_out, *spatial), and returns (C_out,) scores. Or
            ``"principal"`` (:class:`ssprop_patch.Principal` has its settings): dy goes back along
            its leading directions over channels, as many as channels would be kept; depthwise
            layers, and those in which that costs more than it saves, keep channels by ``"l1"``:
            ``plan(model, selection="principal")`` says which. Or ``"ahead"``
            (:class:`ssprop_patch.Ahead` has its settings; needs ``remainder="coarse"``): channels
            are chosen by a running mean of earlier scores, so that the layers above form no more
            than these, and block means of the others.
        remainder: What becomes of the gradient that is not selected. None: it is dropped, as in the
            paper. ``"coarse"`` (:class:`ssprop_patch.Coarse` has its settings): it goes back
            averaged over blocks of about 4 x 4 positions, for one or two percent of the FLOPs.
        sync_selection: Under DDP or FSDP, whether all ranks keep the same channels: those that one
            process with the whole batch would keep. By default each rank chooses by its own part
            of the batch, so that the averaged gradient has more non-zero rows than one rank's.
            Costs an all-reduce of C_out numbers for each sparse layer in each backward
            (accumulated ones too; of C_out ** 2 at refreshes of directions, and nothing between
            them), in a process group of its own; nothing at rate 0, in
            ``eval()``, or in a single process. Scores of all ranks count the same, whatever their
            batch sizes; ``"random"`` draws from the first rank's seed. All ranks must run the same
            layers in the same order: where one leaves a sparse layer out (data-dependent paths,
            ``join()``), the others wait for it. True means all ranks; a ``ProcessGroup`` means its
            ranks, for models that are not the same on all (``mesh.get_group("dp")``).
        controller: Share an existing one, in place of ``schedule`` and ``steps_per_epoch``.
        strict: Whether a model in which nothing can be converted is an error or a warning.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a rate, a pattern or a schedule is not valid, if nothing can be converted
            (under ``strict``), or a layer cannot be (lazy, or wrapped after an earlier
            conversion). Nothing has changed then.
    """
    todo = dry_run(model, types=types, filter_fn=filter_fn, exclude=exclude, overrides=overrides)
    if todo.refused:
        raise ValueError(_refusal("convert", todo))
    if drop_rate is not None:
        schedule = constant(drop_rate, schedule is not _DEFAULT)
    rule = resolve_rule(selection, remainder)
    align = check_count(align, "align", 1)
    if controller is None:
        controller = SparsityController(schedule, steps_per_epoch=steps_per_epoch)
    elif not isinstance(controller, SparsityController):
        again = type(controller).__qualname__ == SparsityController.__qualname__
        raise TypeError(
            f"controller must be a SparsityController, got {controller!r}"
            + ", made before this package was imported again: make a new one" * again
        )
    elif schedule is not _DEFAULT or steps_per_epoch is not None:
        raise ValueError(
            "schedule, drop_rate and steps_per_epoch belong to the controller: give them to "
            "SparsityController(...), or leave controller out"
        )
    score_fn = controller.random_scores if selection == "random" else rule.score_fn
    rule = rule._replace(score_fn=synchronized(score_fn, sync_selection))
    if not todo.converted:
        message = f"nothing to convert in this {type(model).__name__}: " + (
            f"all its convolutions stay dense\n{todo}" if len(todo) else "no convolution in it"
        )
        # That nothing calls a layer was read off the code around it: enough to leave it dense and
        # to say so, not to stop a training.
        if strict and not any(row.why is Reason.NEVER_CALLED for row in todo):
            raise ValueError(message + " (strict=False makes this a warning)")
        warnings.warn(message, stacklevel=2)

    layers = {
        row.module: LayerPolicy(controller, rule_of_layer(rule, row.module), row.drop_rate, align)
        for row in todo.converted
    }
    roots = {model: controller} if layers else {}
    apply_conversion(Conversion(layers, roots), within=model)
    return model


def revert(model: Model) -> Model:
    """Take the sparse backward off again; everything else stays as it is.

    Args:
        model: A converted model or a part of one. One that is not converted is left alone.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: If something was put on a layer's class after conversion (a parametrization,
            FSDP) and has to come off first. Nothing has changed then.
    """
    _check_that_nothing_is_wrapped(model)
    apply_conversion(Conversion({}, {}), within=model)
    return model


def _check_that_nothing_is_wrapped(model: nn.Module) -> None:
    wrapped = Plan(tuple(row for row in dry_run(model).refused if is_patched(row.module)))
    if wrapped.rows:
        raise ValueError(_refusal("revert", wrapped))


def is_converted(module: nn.Module) -> bool:
    """Whether the module itself, or anything below it, has a sparse backward."""
    return any(is_patched_layer(m) for m in module.modules())


class converted(DecoratorContextManager, Generic[Model]):  # lower case, as torch.no_grad
    """Converted inside, reverted after: a context manager, and a decorator.

    A model that was converted before gets that conversion back, on exceptions too.

    Args:
        model: As for :func:`convert`.
        **kwargs: As for :func:`convert`.
    """

    def __init__(self, model: Model, *args: Any, **kwargs: Any) -> None:
        self.model, self._args, self._kwargs = model, args, kwargs
        self._before: list[Conversion] = []

    def clone(self) -> converted[Model]:
        """Return a fresh manager with the same arguments, for each call of a decorated function."""
        return type(self)(self.model, *self._args, **self._kwargs)

    def __enter__(self) -> Model:
        before = Conversion.of(self.model)
        try:
            convert(self.model, *self._args, **self._kwargs)
            self._before.append(before)
            return self.model
        except BaseException:  # an interrupt may come after the conversion
            self._before[:] = [b for b in self._before if b is not before]
            apply_conversion(before, within=self.model)
            raise

    def __exit__(self, *exc_info: object) -> None:
        _check_that_nothing_is_wrapped(self.model)
        before, done = self._before[-1], False
        try:
            apply_conversion(before, within=self.model)
            done = True
        finally:
            if not done:  # an interrupt came: nobody will leave this block again
                apply_conversion(before, within=self.model)
            self._before[:] = [b for b in self._before if b is not before]


def _refusal(verb: str, refused: Plan) -> str:
    rows = "\n".join(f"  {row.name or '(model)'}: {row.reason}" for row in refused.refused)
    return f"cannot {verb}, and nothing was changed:\n{rows}"
