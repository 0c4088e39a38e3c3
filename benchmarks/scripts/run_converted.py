"""Run a training script as it is, with the network that it builds converted by ssprop_patch.

    python run_converted.py [options] path/to/train.py [the script's own arguments]
    torchrun --nproc_per_node=2 run_converted.py [options] path/to/train.py [...]

Made for timm's train.py and torchvision's references/*/train.py; README.md says what was tried.
Not a line of the script is changed. The first network that one of the factories returns is
converted before the script sees it, and the function that trains one epoch tells the controller
which epoch that is. So a resumed run goes on with the right drop rate, with nothing to save.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FACTORIES = ("timm.create_model", "torchvision.models.get_model")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (default: the process's)."""
    options, schedule = parse(arguments)
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    patch = Patch(options, schedule)
    with contextlib.ExitStack() as undo:
        # First: a script beside a timm of its own, as in timm's repository, means that one.
        undo.enter_context(command_line(options.script, options.arguments))
        for name in options.factory or FACTORIES:
            replaced = wrap_factory(name, patch.built, required=bool(options.factory))
            undo.callback(restore, replaced)
        undo.callback(register_optimizer_step_pre_hook(patch.before_step).remove)
        try:
            runpy.run_path(options.script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    patch.finish()


# --- the command line ---------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Any]:
    """Return the options and the schedule that they ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--drop-rate",
        type=float,
        metavar="D",
        help="BarSchedule(D): every other epoch drops this fraction of the channels (default: 0.8)",
    )
    rate.add_argument(
        "--schedule",
        metavar="TEXT",
        help="any schedule that counts epochs, as 'CosineSchedule(0.0, 0.8, total=90)', or a "
        "number for a constant drop rate",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="convolutions to leave dense, as for ssprop_patch.convert; may be repeated",
    )
    parser.add_argument(
        "--selection",
        choices=("l1", "l2"),
        default="l1",
        help="how channels are scored (default: %(default)s, the paper's)",
    )
    parser.add_argument(
        "--factory",
        action="append",
        metavar="MODULE.NAME",
        help="what the script calls to build its network; may be repeated "
        f"(default: {' and '.join(FACTORIES)})",
    )
    parser.add_argument(
        "--epoch-function",
        default="train_one_epoch",
        metavar="[MODULE.]NAME",
        help="what the script calls to train one epoch: a name in the script, or in a module that "
        "it imports (default: %(default)s)",
    )
    parser.add_argument(
        "--epoch-argument",
        default="epoch",
        metavar="NAME",
        help="that function's parameter for the number of the epoch (default: %(default)s)",
    )
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments")
    options = parser.parse_args(arguments)
    if not Path(options.script).is_file():
        parser.error(f"there is no file {options.script!r}")

    import ssprop_patch as ssp  # not before: --help need not wait for torch

    try:
        if options.schedule is not None:
            schedule = ssp.parse_schedule(options.schedule)
        else:
            schedule = ssp.BarSchedule(0.8 if options.drop_rate is None else options.drop_rate)
    except (TypeError, ValueError) as error:
        parser.error(f"--schedule {error}")
    if schedule.interval != "epoch":
        # It would start from 0 again where a run is resumed: the scripts' checkpoints do not hold
        # the count, and how many steps an epoch has, only they know.
        parser.error("a schedule here must count epochs")
    return options, schedule


@contextlib.contextmanager
def command_line(script: str, arguments: list[str]) -> Iterator[None]:
    """Make ``sys.argv`` and ``sys.path`` what ``python script *arguments`` makes them."""
    argv, path = sys.argv, sys.path
    sys.argv = [script, *arguments]
    # Python has put this file's folder first; the script expects its own there.
    own = str(Path(__file__).resolve().parent)
    sys.path = [str(Path(script).resolve().parent), *(p for p in path if p != own)]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


# --- putting something in between ---------------------------------------------------------------


def wrap_factory(name: str, then: Callable[[str, Any], None], required: bool) -> list[Any]:
    """Let ``then(name, result)`` see what a function returns, wherever its package imported it.

    Returns:
        What :func:`restore` takes. Empty if the package is not installed and not ``required``.
    """
    module, _, attribute = name.rpartition(".")
    package = name.partition(".")[0]
    if not required and importlib.util.find_spec(package) is None:
        return []
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        if required:
            sys.exit(f"run_converted: --factory {name}: {error}")
        say(f"left out {name}: {error}")  # the script may well do without it
        return []
    if isinstance(function, type):
        sys.exit(f"run_converted: --factory {name}: a class; name a function that returns one")

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


def restore(replaced: list[Any]) -> None:
    """Undo :func:`wrap_factory`."""
    for mod, name, function in replaced:
        setattr(mod, name, function)


def say(text: str) -> None:
    """Print on standard error, in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        sys.stderr.write(f"ssprop: {text}\n")
        sys.stderr.flush()


class Patch:
    """Converts the script's network, hears of its epochs, and looks whether gradients are sparse.

    Args:
        options: From the command line.
        schedule: What to convert with.
    """

    def __init__(self, options: argparse.Namespace, schedule: Any) -> None:
        self.options, self.schedule = options, schedule
        self.controller: Any = None
        self._layers: list[Any] = []
        self._look_at: str | None = None  # whose gradients to look at, at the next step

    def built(self, factory: str, model: Any) -> None:
        """Convert ``model`` if it is the first; a teacher for distillation comes later."""
        from torch import nn

        import ssprop_patch as ssp

        if self.controller is not None or not isinstance(model, nn.Module):
            return
        # First, so that a script that cannot be followed fails before it trains.
        self._wrap_epoch_function()
        exclude = self.options.exclude
        plan = ssp.plan(model, exclude=exclude)
        ssp.convert(model, self.schedule, exclude=exclude, selection=self.options.selection)
        self._layers = [row.module for row in plan.converted]
        self.controller = ssp.get_controller(model)
        say(
            f"{type(model).__name__} of {factory}: {len(plan.converted)} of {len(plan)} "
            f"convolutions converted, {self.schedule!r}"
        )

    def _wrap_epoch_function(self) -> None:
        # Only here, since the script has to have run its definitions: runpy keeps them in __main__.
        module, _, name = self.options.epoch_function.rpartition(".")
        owner = sys.modules.get(module or "__main__")
        function = getattr(owner, name, None)
        argument = self.options.epoch_argument
        if function is None or argument not in inspect.signature(function).parameters:
            self._look_at = "first step"
            if self.schedule.is_constant:
                return
            sys.exit(
                f"run_converted: {self.schedule!r} counts epochs, and the script has no function "
                f"{self.options.epoch_function} with a parameter {argument!r} to learn them from; "
                "name it with --epoch-function and --epoch-argument"
            )
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            epoch = given.arguments[argument]
            self.controller.step(epoch)
            self._look_at = f"epoch {epoch}"
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Report on the gradients of an epoch's first optimizer step: the only proof there is."""
        if self.controller is None:
            sys.exit(
                "run_converted: the script trains, and has called none of "
                f"{', '.join(self.options.factory or FACTORIES)}, so nothing is converted; say "
                "with --factory what builds its network"
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
        share = sum(int(r.sum()) for r in rows) / sum(len(r) for r in rows)
        rate = self.controller.drop_rate
        say(
            f"{what}: drop rate {rate:g}; {share:.1%} of the rows of the convolutions' weight "
            "gradients are zero"
        )
        if share < rate / 10:  # a few rows are zero in any network
            say(
                "WARNING: these gradients look dense: is the network scripted, or in eval()? (Many "
                "accumulated batches, or many ranks, add up to the same.)"
            )

    def finish(self) -> None:
        """Complain if the script is through and has trained something else."""
        if self._look_at is not None:
            say(f"WARNING: {self._look_at}: no gradient has reached the converted network")


if __name__ == "__main__":
    main()
