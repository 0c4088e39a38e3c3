"""Running somebody's training script, and putting a conversion into it on the way."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schedule.schedules import Schedule

if TYPE_CHECKING:
    from ..core.rule import Remainder, Selection

FACTORIES = ("timm.create_model", "torchvision.models.get_model")


@dataclass(frozen=True)
class ScriptOptions:
    """How a script's network is found and converted.

    Attributes:
        schedule: One that counts epochs.
        exclude: As for :func:`ssprop_patch.convert`.
        factories: Dotted names of what builds the network; none: those of ``FACTORIES`` that are
            installed.
        epoch_function: What trains one epoch: a name in the script, or dotted in another module.
        epoch_argument: That function's parameter for the number of the epoch.
        selection, remainder: As for :func:`ssprop_patch.convert`.
    """

    schedule: Schedule
    exclude: tuple[str, ...] = ()
    factories: tuple[str, ...] = ()
    epoch_function: str = "train_one_epoch"
    epoch_argument: str = "epoch"
    selection: Selection = "l1"
    remainder: Remainder = None

    @property
    def drops_channels(self) -> bool:
        """Whether the dropped channels get no gradient at all, which can be seen in ``.grad``."""
        return self.selection != "principal" and self.remainder is None


def run_script(script: str, arguments: Sequence[str], how: ScriptOptions) -> None:
    """Run a script as ``python script *arguments`` does, with its network converted.

    Raises:
        SystemExit: If the script ends with a code that is not 0, or cannot be followed.
    """
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    conversion = _Conversion(how)
    with contextlib.ExitStack() as undo:
        # First: a script beside a timm of its own, as in timm's repository, means that one.
        undo.enter_context(_command_line(script, arguments))
        for name in how.factories or FACTORIES:
            undo.callback(_restore, _wrap(name, conversion.built, required=bool(how.factories)))
        undo.callback(register_optimizer_step_pre_hook(conversion.before_step).remove)
        try:
            _execute(script)
        except SystemExit as end:
            if end.code:
                raise
    conversion.finish()


@contextlib.contextmanager
def _command_line(script: str, arguments: Sequence[str]) -> Iterator[None]:
    """Make ``sys.argv`` and ``sys.path`` what ``python script *arguments`` makes them."""
    argv, path = sys.argv, sys.path
    # Python has put the folder of this command first or, for -m, the current one; the script
    # expects its own there.
    started_from = {"", os.getcwd(), str(Path(argv[0]).resolve().parent)}
    sys.argv = [script, *arguments]
    sys.path = [str(Path(script).resolve().parent), *path[path[0] in started_from :]]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


def _execute(script: str) -> None:
    """Run a file as ``__main__``; runpy would make ``sys.argv[0]`` and ``__file__`` the same."""
    path = os.path.abspath(script)
    module, before = types.ModuleType("__main__"), sys.modules["__main__"]
    module.__file__ = path
    code = compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    sys.modules["__main__"] = module
    try:
        exec(code, vars(module))
    finally:
        sys.modules["__main__"] = before


def _wrap(name: str, then: Callable[[str, Any], None], required: bool) -> list[Any]:
    """Let ``then(name, result)`` see what a function returns, wherever its package imported it.

    Returns:
        What :func:`_restore` takes. Empty if the package is not installed and not ``required``.
    """
    module, _, attribute = name.rpartition(".")
    package = name.partition(".")[0]
    if not required and importlib.util.find_spec(package) is None:
        return []
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        if required:
            raise _refusal(f"--factory {name}: {error}") from error
        _say(f"left out {name}: {error}")  # the script may well do without it
        return []
    if isinstance(function, type):
        raise _refusal(f"--factory {name}: a class; name a function that returns one")

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then(name, result)
        return result

    # timm.create_model is timm.models.create_model too, and the script may import either.
    replaced = []
    for key, mod in list(sys.modules.items()):
        if key.partition(".")[0] == package and mod is not None:
            names = [n for n, value in vars(mod).items() if value is function]
            replaced += [(mod, n, function) for n in names]
    for mod, n, _ in replaced:
        setattr(mod, n, wrapper)
    return replaced


def _restore(replaced: list[Any]) -> None:
    """Undo :func:`_wrap`."""
    for mod, name, function in replaced:
        setattr(mod, name, function)


def _refusal(text: str) -> SystemExit:
    # No ordinary exception, which the script might catch.
    return SystemExit(f"ssprop-patch run: error: {text}")


def _say(text: str) -> None:
    """Print on standard error, in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        sys.stderr.write(f"ssprop: {text}\n")
        sys.stderr.flush()


class _Conversion:
    """Converts the script's network, follows its epochs, and looks whether gradients are sparse."""

    def __init__(self, how: ScriptOptions) -> None:
        self._how = how
        self._controller: Any = None
        self._model: Any = None
        self._layers: list[Any] = []
        self._ran: dict[Any, int] = {}  # sparse calls of each layer, when the epoch began
        self._look_at: str | None = None  # whose gradients to look at, at the next step

    def built(self, factory: str, model: Any) -> None:
        """Convert ``model`` if it is the first; a teacher for distillation comes later."""
        from torch import nn

        from ..patching.convert import convert
        from ..patching.dry_run import dry_run
        from ..schedule.controller import get_controller

        if self._controller is not None or not isinstance(model, nn.Module):
            return
        # First, so that a script that cannot be followed fails before it trains.
        self._wrap_epoch_function()
        how = self._how
        planned = dry_run(model, exclude=how.exclude)
        convert(
            model,
            how.schedule,
            exclude=how.exclude,
            selection=how.selection,
            remainder=how.remainder,
        )
        self._model = model
        self._layers = [row.module for row in planned.converted]
        self._controller = get_controller(model)
        _say(
            f"{type(model).__name__} of {factory}: {len(planned.converted)} of {len(planned)} "
            f"convolutions converted, {how.schedule!r}"
        )

    def _wrap_epoch_function(self) -> None:
        # Only here, since the script has to have run its definitions.
        module, _, name = self._how.epoch_function.rpartition(".")
        owner = sys.modules.get(module or "__main__")
        function = getattr(owner, name, None)
        argument = self._how.epoch_argument
        if function is None or argument not in inspect.signature(function).parameters:
            self._look_at = "first step"
            if self._how.schedule.is_constant:
                return
            raise _refusal(
                f"{self._how.schedule!r} counts epochs, and the script has no function "
                f"{self._how.epoch_function} with a parameter {argument!r} to learn them from; "
                "name it with --epoch-function and --epoch-argument"
            )
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            epoch = given.arguments[argument]
            self._controller.step(epoch)
            self._look_at = f"epoch {epoch}"
            self._ran = self._sparse_calls()
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Report on the gradients of an epoch's first optimizer step: the only proof there is."""
        if self._controller is None:
            raise _refusal(
                "the script trains, and has called none of "
                f"{', '.join(self._how.factories or FACTORIES)}, so nothing is converted; say with "
                "--factory what builds its network"
            )
        if self._look_at is None:
            return
        weights = [m._parameters.get("weight") for m in self._layers]
        gradients = [w.grad for w in weights if w is not None and w.grad is not None]
        # A layer in front of a batch norm whose weight starts at zero has no gradient at first.
        rows = [(g == 0).flatten(1).all(1) for g in gradients if g.any()]
        if not rows:
            return  # another network's optimizer
        what, self._look_at = self._look_at, None
        rate = self._controller.drop_rate
        if not self._how.drops_channels:
            self._report_calls(what, rate)
            return
        share = sum(int(r.sum()) for r in rows) / sum(len(r) for r in rows)
        _say(
            f"{what}: drop rate {rate:g}; {share:.1%} of the rows of the convolutions' weight "
            "gradients are zero"
        )
        if share < rate / 10:  # a few rows are zero in any network
            _say(
                "WARNING: these gradients look dense: is the network scripted, or in eval()? (Many "
                "accumulated batches, or many ranks, add up to the same.)"
            )

    def _report_calls(self, what: str, rate: float) -> None:
        """Report which layers ran sparse; in ``.grad`` nothing can be seen of it."""
        from ..schedule.call_counts import was_compiled

        if was_compiled():  # whose calls nobody counts
            _say(f"{what}: drop rate {rate:g}")
            return
        now = self._sparse_calls()
        sparse = sum(n > self._ran.get(module, 0) for module, n in now.items())
        _say(f"{what}: drop rate {rate:g}; {sparse} of {len(now)} convolutions ran sparse")
        if rate and not sparse:
            _say("WARNING: none ran sparse: is the network scripted, or in eval()?")

    def _sparse_calls(self) -> dict[Any, int]:
        from ..patching.dry_run import dry_run

        if self._how.drops_channels:
            return {}
        return {row.module: row.ran.sparse for row in dry_run(self._model) if row.ran is not None}

    def finish(self) -> None:
        """Complain if the script is through and has trained something else."""
        if self._look_at is not None:
            _say(f"WARNING: {self._look_at}: no gradient has reached the converted network")
