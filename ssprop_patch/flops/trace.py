"""Which layers and products a model runs, on what shapes: found without touching the model."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from random import getstate, setstate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch_compat import FakeTensorMode, is_dynamo_imported, tree_leaves, tree_map_only
from .._validate import check_count
from ..core.operations import OutputMask
from ..ops.lazy_grad.producers import producers
from ..schedule.controller import find_controllers
from .products import Product, Products

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TracedCall:
    """One call of a layer, as far as its cost depends on it.

    Attributes:
        before: The layers whose outputs the input was made of, if a gradient of two resolutions
            would pass all that lies in between.
    """

    module: nn.Module
    input_shape: Shape
    weight_shape: Shape
    output_shape: Shape
    output_mask: OutputMask
    before: tuple[nn.Module, ...] = ()

    @property
    def channels(self) -> int:
        return self.output_shape[1 - len(self.weight_shape)]

    @property
    def macs(self) -> int:
        """Multiply-adds; a transposed convolution applies its kernel at each input position."""
        transposed = getattr(self.module, "transposed", False)
        at = self.input_shape if transposed else self.output_shape
        return prod(at) // at[1 - len(self.weight_shape)] * prod(self.weight_shape)


class Trace(NamedTuple):
    """What one forward pass runs.

    Attributes:
        calls: The calls of layers, in order, with their number.
        products: All other convolutions, matrix products and attention.
        unknown: Why something could not be counted; empty if all was.
    """

    calls: Counter[TracedCall]
    products: list[Product]
    unknown: str


def trace(
    model: nn.Module,
    layers: Sequence[nn.Module],
    input_size: Any,
    inputs: Any,
    also: Sequence[nn.Module] = (),
    follow: bool = False,
) -> Trace:
    """Run one forward pass; return the calls of ``layers``, and all other products.

    Args:
        model: Any module.
        layers: The layers whose calls are wanted.
        input_size, inputs: As for :func:`ssprop_patch.summary`.
        also: Modules whose products are to be known as theirs.
        follow: Whether calls say which layers come ``before``.

    Raises:
        TypeError, ValueError: As :func:`ssprop_patch.summary`.
    """
    make, shown = _inputs(model, input_size, inputs)
    error: Exception | None = None
    # Without data first, which is fast, needs no memory and cannot change a value. A model that
    # wants targets in training mode may run in eval mode, and one that looks at values only there.
    for fake, training in ((True, True), (True, False), (False, False)):
        calls: Counter[TracedCall] = Counter()
        products = Products()
        as_is = training and model.training
        with untouched(model), torch.inference_mode(False), torch.enable_grad():
            for module in model.modules():
                if not as_is:
                    module.training = training
                if fake:  # observers, not part of the computation, as the pre-hooks may be
                    for name in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):
                        vars(module)[name] = OrderedDict()
            for module in also:
                vars(module)["forward"] = _noted(module, products)
            made: dict[Any, nn.Module] | None = {} if follow else None
            for module in layers:
                vars(module)["forward"] = _recorded(module, calls, products, made)
            try:
                _run(model, make, fake, products)
                return Trace(calls, products.found, products.unknown)
            except Exception as e:
                error = e
    raise ValueError(
        f"the model does not run on {shown}: {type(error).__name__}: {error}"
    ) from error


def _noted(module: Any, products: Products) -> Callable[..., Any]:
    forward = module.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        around, products.layer = products.layer, module
        try:
            return forward(*args, **kwargs)
        finally:
            products.layer = around

    return noted


def _recorded(
    module: Any,
    calls: Counter[TracedCall],
    products: Products,
    made: dict[Any, nn.Module] | None,
) -> Callable[..., Any]:
    forward = module.forward  # not a hook, so that a call of .forward counts too

    def recorded(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        x = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        y = next(t for t in tree_leaves(out) if isinstance(t, Tensor))
        need_x, need_w, need_b = (
            y.requires_grad and t is not None and t.requires_grad
            for t in (x, module.weight, module.bias)
        )
        shapes = tuple(x.shape), tuple(module.weight.shape), tuple(y.shape)
        makers: dict[nn.Module, None] = {}
        if made is not None:
            before = producers(x.grad_fn, made.__contains__) or ()
            makers = dict.fromkeys(made[node] for node in before)
            made[y.grad_fn] = module
        call = TracedCall(module, *shapes, (need_x, need_w, need_b), tuple(makers))
        calls[call] += 1
        products.claim(2 * call.macs)
        return out

    return recorded


def _run(
    model: nn.Module,
    make: Callable[[FakeTensorMode | None], Any],
    fake: bool,
    products: Products,
) -> None:
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    if not fake:
        args, kwargs = make(None)
        state = {**params, **{name: b.clone() for name, b in buffers.items()}}
        with products:
            torch.func.functional_call(model, state, args, kwargs)
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args, kwargs = make(mode)
        state = {name: mode.from_tensor(t) for name, t in {**params, **buffers}.items()}
        with products:
            torch.func.functional_call(model, state, args, kwargs)


def _inputs(
    model: nn.Module, input_size: Any, inputs: Any
) -> tuple[Callable[[FakeTensorMode | None], tuple[tuple[Any, ...], dict[str, Any]]], str]:
    """Return what makes positional and keyword arguments, and how an error calls them."""
    if inputs is not None:
        if not isinstance(inputs, (Tensor, tuple, Mapping)):
            raise TypeError(
                "inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
                f"arguments, got {type(inputs).__name__}; a single argument that is a list goes "
                "in a tuple: inputs=(images,)"
            )
        kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
        args = (inputs,) if isinstance(inputs, Tensor) else () if kwargs else tuple(inputs)

        def copies(mode: FakeTensorMode | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
            def one(t: Tensor) -> Tensor:
                return t.detach().clone().requires_grad_(t.requires_grad)

            return tree_map_only(Tensor, mode.from_tensor if mode else one, (args, kwargs))

        shapes = [tuple(t.shape) for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        return copies, f"inputs of shapes {shapes}"

    if not isinstance(input_size, Sequence) or isinstance(input_size, str):
        raise TypeError(f"input_size must be a shape or a list of shapes, got {input_size!r}")
    many = any(isinstance(size, Sequence) for size in input_size)
    sizes = [
        tuple(check_count(n, "each of input_size", 1) for n in size)
        for size in (input_size if many else [input_size])
    ]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def random(mode: FakeTensorMode | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(torch.randn(n, dtype=like.dtype, device=like.device) for n in sizes), {}

    return random, f"input_size {input_size}"


@contextlib.contextmanager
def untouched(model: nn.Module, *, eager: bool = True) -> Iterator[None]:
    """Put back, whatever happens, what running a model may change beside its buffers' values.

    That is every attribute of every module, the content of those that are plain containers
    (hooks, caches, lists of features), training flags, the random states, and the counts of calls.

    Args:
        model: Any module.
        eager: Whether what is compiled runs eagerly meanwhile.
    """
    held = [
        c
        for m in model.modules()
        for c in (vars(m), *vars(m).values())
        if isinstance(c, (dict, list, set))
    ]
    before = [(c, _content(c)) for c in held]
    flags = [(m, m.training) for m in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    python = getstate()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d.index for d in devices]))
        for controller in find_controllers(model):
            stack.enter_context(controller.watchdog.unseen())
        if eager and is_dynamo_imported():  # a compiled part would be compiled once more
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            for container, content in before:
                _put_back(container, content)
            for module, flag in flags:
                if module.training != flag:
                    module.training = flag
            setstate(python)


def _put_back(container: Any, content: list[Any]) -> None:
    now = _content(container)
    if len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True)):
        return
    container.clear()
    if isinstance(container, dict):
        half = len(content) // 2
        container.update(zip(content[:half], content[half:], strict=True))
    elif isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _content(container: Any) -> list[Any]:
    if isinstance(container, dict):
        return [*container.keys(), *container.values()]
    return list(container)
