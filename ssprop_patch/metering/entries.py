"""Which modules of a model are called from outside of it, and when.

Most often it is the model itself. But a trainer may call its parts only: Lightning calls the
``training_step`` of the module that it is given, a GAN is two networks. And in a backward pass
checkpointing calls the parts whose forward it repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .hooks import Hook

Begins = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], bool]
Ends = Callable[[Any, bool], None]


class Entries:
    """Tells of each call of a module that no other module of the model calls.

    At first all modules are watched; once an iteration has shown which ones are called from
    outside, only these and what is in none of them.

    Args:
        model: The model.
        begins: Is called with a module, its positional and its keyword arguments, before such a
            call; returns whether it is to be told of its end, too.
        ends: Is called after it with what it returned, and whether it did; else an exception left
            it.
    """

    def __init__(self, model: nn.Module, begins: Begins, ends: Ends) -> None:
        self._model, self._begins, self._ends = model, begins, ends
        self._hooks: dict[nn.Module, tuple[Any, ...]] = {}
        self._running: nn.Module | None = None
        self._entries: set[nn.Module] = set()
        self._settled = False
        self.seen = False  # a call in this iteration
        self.watch_all()

    def watch_all(self) -> None:
        """Watch every module that computes anything."""
        for module in self._model.modules():
            if module in self._hooks or isinstance(module, torch.jit.ScriptModule):
                continue
            if module._modules or module._parameters or module is self._model:
                self._hooks[module] = self._hook(module)
        self._settled = False

    def _hook(self, module: nn.Module) -> tuple[Any, ...]:
        return (
            module.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            module.register_forward_hook(Hook(self._after)),
            # Where an exception leaves the call, only this one; else it finds the call ended.
            module.register_forward_hook(Hook(self._left), always_call=True),
        )

    def next_iteration(self) -> bool:
        """Begin to look anew; return whether anything was called in the iteration that ends."""
        seen, self.seen = self.seen, False
        if seen and not self._settled:
            self._settled = True
            inside = {part for entry in self._entries for part in entry.modules()} - self._entries
            for module in inside & self._hooks.keys():
                self._unhook(module)
        elif not seen and self._settled:
            self.watch_all()  # other parts are called now
        return seen

    def close(self) -> None:
        """Watch nothing any more."""
        for module in list(self._hooks):
            self._unhook(module)

    def _unhook(self, module: nn.Module) -> None:
        for hook in self._hooks.pop(module):
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or module not in self._hooks:  # a replica has them too
            return
        # One that runs already and begins again was left by an interrupt, which ends no call.
        if self._running not in (None, module) or not self._begins(module, args, kwargs):
            return
        self._running, self.seen = module, True
        if module not in self._entries:
            self._entries.add(module)
            self._settled = False

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and module is self._running:
            self._running = None
            self._ends(output, True)

    def _left(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and module is self._running:
            self._running = None
            self._ends(None, False)
