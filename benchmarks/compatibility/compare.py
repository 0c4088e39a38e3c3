"""What every library's trainings are compared by."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from zoo import oracle

import ssprop_patch as ssp

RATE = 0.5

#: Trains a network that it makes, after giving it to a function, and returns its final state.
Train = Callable[[Callable[[nn.Module], object]], dict[str, Tensor]]


def in_all(train: Train, *, steps: int, schedule: object = None) -> Iterator[tuple[str, str]]:
    """Yield what was compared, and how it came out.

    Args:
        train: One training; the function that it calls with the network converts it, or not.
        steps: How many optimizer steps the training has.
        schedule: The schedule of the sparse training; default: a constant rate, which asks for no
            steps to be counted.
    """
    controllers = []

    def converted(rate: object) -> Callable[[nn.Module], object]:
        def convert(model: nn.Module) -> None:
            ssp.convert(model, rate)
            controllers.append(ssp.get_controller(model))

        return convert

    plain = train(lambda model: None)
    if _distance(train(lambda model: None), plain) > 0:
        yield "the plain training, twice", "differs: nothing can be compared"
        return
    same = _distance(train(converted(0.0)), plain) == 0
    yield "rate 0 against the plain training", "bit for bit" if same else "differs"

    with _masking() as mask:
        masked = train(mask)
    sparse = train(converted(RATE if schedule is None else schedule))
    off = _distance(sparse, masked) / _distance(plain, masked)
    yield (
        f"rate {RATE:g} against masked gradients",
        f"{off:.0e} of the distance between masked and plain",
    )

    train(converted(ssp.LambdaSchedule(_constant, interval="step")))
    yield "optimizer steps counted", f"{controllers[-1].t} of {steps}"


def _constant(t: int) -> float:
    return RATE


def _distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two states."""
    return sum((one[n].double() - t.double()).square().sum().item() for n, t in two.items()) ** 0.5


class _masking:
    """The oracle, put on a network when that is known."""

    def __enter__(self) -> Callable[[nn.Module], object]:
        self._network = None

        def mask(model: nn.Module) -> None:
            self._network = oracle.network(model, RATE)
            self._network.__enter__()

        return mask

    def __exit__(self, *exc_info: object) -> None:
        if self._network is not None:
            self._network.__exit__(*exc_info)
