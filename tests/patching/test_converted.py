"""converted(...): a conversion for a while."""

import pytest

import ssprop_patch as ssp

from .networks import NAMES, all_rows, backward, make, optimizer_step, snapshot


def test_converted_as_context_manager():
    model = make()
    before = snapshot(model)
    with ssp.converted(model, 0.5, exclude="stem") as inside:
        assert inside is model
        assert all_rows(backward(model)) == {**dict.fromkeys(NAMES, 4), "stem": 8}
    assert snapshot(model) == before


def test_converted_takes_the_schedule_by_name():
    model = make()
    with ssp.converted(model, schedule=0.75):
        assert ssp.get_controller(model).drop_rate == 0.75


def test_converted_as_decorator():
    model = make()

    @ssp.converted(model, 0.5)
    def passes(n):
        return [all_rows(backward(model))["stem"] for _ in range(n)]

    assert not ssp.is_converted(model)
    for n in (1, 2):
        assert passes(n) == [4] * n
        assert not ssp.is_converted(model)


def test_converted_on_exception():
    model = make()
    before = snapshot(model)
    with pytest.raises(KeyError), ssp.converted(model, 0.5):
        raise KeyError
    assert snapshot(model) == before


def test_converted_nests_and_gives_an_earlier_conversion_back():
    model = make()
    ssp.convert(model, ssp.LambdaSchedule(lambda t: 0.5, interval="step"), overrides={"stem": 0.25})
    controller = ssp.get_controller(model)
    before, grads = snapshot(model), all_rows(backward(model))
    with pytest.raises(KeyError), ssp.converted(model, 0.75, exclude="layer1"):
        inner = ssp.get_controller(model)
        with ssp.converted(model, 0.875):
            assert all_rows(backward(model)) == dict.fromkeys(NAMES, 1)
        assert ssp.get_controller(model) is inner
        assert all_rows(backward(model)) == {n: 8 if "layer1" in n else 2 for n in NAMES}
        optimizer_step(model)
        assert controller.t == 0  # not in force, so it does not count
        raise KeyError
    assert snapshot(model) == before
    assert all_rows(backward(model)) == grads
    optimizer_step(model)
    assert controller.t == 1


def test_converted_with_bad_arguments_changes_nothing():
    model = make()
    ssp.convert(model, 0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="drop_rate"), ssp.converted(model, 1.5):
        pytest.fail("never entered")
    assert snapshot(model) == before
