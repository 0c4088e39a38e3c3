"""Scalars: which, when, to TensorBoard, to a CSV file, to a function."""

import csv

import pytest
import torch

import ssprop_patch as ssp
from metering import by_hand
from metering.by_hand import RATES, by_step, quiet_meter, train

TOTALS = [
    "ssprop/drop_rate",
    "ssprop/backward_saved",
    "ssprop/total_saved",
    "ssprop/flops",
    "ssprop/layers_saved",
]
KEPT = ["ssprop/kept/0", "ssprop/kept/2", "ssprop/kept/4"]


def logged(steps, convert=True, **kwargs):
    model = ssp.convert(by_hand.net(), by_step()) if convert else by_hand.net()
    rows = {}
    with quiet_meter(model) as meter:
        meter.log_to(lambda scalars, step: rows.update({step: scalars}), **kwargs)
        train(model, steps)
    return rows


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_step_logs_the_rate_that_was_in_force_in_it():
    rows = logged(2 * len(RATES))
    assert list(rows) == list(range(1, 2 * len(RATES) + 1))
    assert [row["ssprop/drop_rate"] for row in rows.values()] == [*RATES, *RATES]
    k = [max(1, int((1 - rate) * 12 + 0.5)) for rate in RATES]
    assert [row["ssprop/kept/2"] for row in rows.values()] == [*k, *k]


def test_the_rate_is_that_of_the_step_whoever_hears_of_it_first():
    """Controller and meter are told of a step in an order that nobody fixes."""
    from ssprop_patch.schedule import step_counter

    for order in (sorted, lambda *a, **k: sorted(*a, **k, reverse=True)):
        model, rates = ssp.convert(by_hand.net(), by_step()), []
        with quiet_meter(model) as meter:
            watches = [ssp.get_controller(model).step_counter, meter._watch]
            meter.log_to(lambda scalars, step, to=rates: to.append(scalars["ssprop/drop_rate"]))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(step_counter, "_watches", order(watches, key=watches.index))
                train(model, len(RATES))
        assert rates == list(RATES)


def test_a_temporary_rate_is_the_one_in_force():
    model, rates = ssp.convert(by_hand.net(), by_step()), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with quiet_meter(model) as meter:
        meter.log_to(lambda scalars, step: rates.append(scalars["ssprop/drop_rate"]))
        for i in range(3):
            with ssp.sparsity(model, 0.9):
                by_hand.loss_of(model(by_hand.batch(i))).backward()
            optimizer.step()
        assert rates == [0.9] * 3 and meter.drop_rate == 0.9


def test_a_rate_that_the_trainer_sets_and_a_model_that_is_called_in_parts():
    model, rates = ssp.convert(by_hand.net(), by_step()), []
    with quiet_meter(model) as meter:
        meter.log_to(lambda scalars, step: rates.append(scalars["ssprop/drop_rate"]))
        for t in (2, 1, 3):
            ssp.get_controller(model).step(t)
            train(model, 1, call=lambda x: model[3:](model[:3](x)))
    assert rates == [RATES[2], RATES[1], RATES[3]]


def test_the_rate_is_that_of_the_converted_layers_even_if_the_first_one_is_left_out():
    model = ssp.convert(by_hand.net(), 0.5, exclude="^0$")
    with quiet_meter(model) as meter:
        assert meter.drop_rate == 0.5


def test_shares_are_those_of_the_run_so_far():
    rows = logged(3)
    net, x = by_hand.net(), by_hand.batch(0)
    parts = [by_hand.by_summary(net, x, [rate]) for rate in RATES]
    layers = [by_hand.layers_by_summary(net, x, [rate]) for rate in RATES]
    for step, row in rows.items():
        forward, dense, sparse = map(sum, zip(*parts[:step], strict=True))
        _, alone, left = map(sum, zip(*layers[:step], strict=True))
        assert row["ssprop/layers_saved"] == pytest.approx((alone - left) / alone, rel=1e-12)
        assert row["ssprop/backward_saved"] == pytest.approx((dense - sparse) / dense, rel=1e-12)
        assert row["ssprop/total_saved"] == pytest.approx((dense - sparse) / (forward + dense))
        assert row["ssprop/flops"] == forward + sparse


def test_every_so_many_steps_and_without_layers():
    rows = logged(7, every=3, layers=False)
    assert list(rows) == [3, 6]
    assert all(list(row) == TOTALS for row in rows.values())
    assert list(logged(1)[1]) == [*TOTALS, *KEPT]
    assert logged(1, convert=False)[1]["ssprop/drop_rate"] == 0.0


def test_tensorboard_gets_the_scalars_with_their_steps(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = ssp.convert(by_hand.net(), by_step())
    with quiet_meter(model) as meter, tensorboard.SummaryWriter(tmp_path) as writer:
        meter.log_to(writer, every=2)
        train(model, 5)
    found = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(found.Tags()["scalars"]) == sorted([*TOTALS, *KEPT])
    rates = [(e.step, round(e.value, 6)) for e in found.Scalars("ssprop/drop_rate")]
    assert rates == [(2, RATES[1]), (4, RATES[3])]


def test_anything_with_add_scalar_will_do():
    class Writer:
        def __init__(self):
            self.calls = []

        def add_scalar(self, *args):
            self.calls.append(args)

    model, writer = ssp.convert(by_hand.net(), 0.5), Writer()
    with quiet_meter(model) as meter:
        meter.log_to(writer, layers=False)
        train(model, 1)
    assert [(name, step) for name, _, step in writer.calls] == [(name, 1) for name in TOTALS]


def test_a_csv_file_has_one_header_and_a_row_a_step_at_once(tmp_path):
    path = tmp_path / "run.csv"
    model = ssp.convert(by_hand.net(), by_step())
    with quiet_meter(model) as meter:
        meter.log_to(path)
        for t in range(3):
            train(model, 1, start=t)
            assert [row["step"] for row in rows_of(path)] == [str(i + 1) for i in range(t + 1)]
    assert list(rows_of(path)[0]) == ["step", *TOTALS, *KEPT]
    assert [float(row["ssprop/drop_rate"]) for row in rows_of(path)] == list(RATES[:3])


def write_log(path, steps, state=None, **kwargs):
    """Log a new run of a model, or one resumed from a state; return the run's state."""
    model = ssp.convert(by_hand.net(), 0.5)
    with quiet_meter(model) as meter:
        meter.log_to(path, layers=False, **kwargs)
        if state is not None:
            meter.load_state_dict(state)
        train(model, steps)
        return meter.state_dict()


def test_a_new_run_takes_the_place_of_an_old_one_and_a_resumed_one_adds_to_it(tmp_path):
    path = tmp_path / "run.csv"
    write_log(path, 3)
    write_log(path, 0)  # comes to no step, and leaves what there is
    assert len(rows_of(path)) == 3
    state = write_log(str(path), 2)
    assert [row["step"] for row in rows_of(path)] == ["1", "2"]
    with path.open("a") as file:
        file.write("7,0.")  # and the process is killed
    write_log(path, 1, state)
    assert [row["step"] for row in rows_of(path)] == ["1", "2", "3"]
    write_log(path, 1, append=True)
    assert [row["step"] for row in rows_of(path)] == ["1", "2", "3", "1"]
    write_log(path, 1, state, append=False)
    assert [row["step"] for row in rows_of(path)] == ["3"]
    assert path.read_text().count("step") == 1


@pytest.mark.parametrize("held", ["a,b\n1,2\n", "half a head", "step,loss\n1,2\n"])
@pytest.mark.parametrize("append", [None, False, True])
def test_a_file_that_is_no_log_is_left_alone(tmp_path, held, append):
    path = tmp_path / "run.csv"
    path.write_text(held)
    with quiet_meter(ssp.convert(by_hand.net(), 0.5)) as meter:
        with pytest.raises(ValueError, match="no log of a Meter"):
            meter.log_to(path, append=append)
        train(meter._model, 1)
    assert path.read_text() == held


def test_a_log_of_other_columns_is_not_added_to(tmp_path):
    path = tmp_path / "run.csv"
    write_log(path, 2)
    with quiet_meter(ssp.convert(by_hand.net(), 0.5)) as meter:
        with pytest.raises(ValueError, match="other columns and cannot be added to"):
            meter.log_to(path, append=True)
        meter.log_to(path)
        train(meter._model, 1)
    assert list(rows_of(path)[0]) == ["step", *TOTALS, *KEPT]


def test_what_a_target_raises_comes_out_of_the_optimizers_step():
    model = ssp.convert(by_hand.net(), by_step())

    def full(scalars, step):
        raise OSError("disk full")

    with quiet_meter(model) as meter:
        meter.log_to(full)
        with pytest.raises(OSError, match="disk full"):
            train(model, 1)
        assert meter.steps == 1
        assert ssp.get_controller(model).t == 1


def test_several_targets_each_in_their_own_time():
    model, seen = ssp.convert(by_hand.net(), 0.5), []
    with quiet_meter(model) as meter:
        meter.log_to(lambda scalars, step: seen.append(("a", step)), every=2)
        meter.log_to(lambda scalars, step: seen.append(("b", step)), every=3)
        meter.on_step(lambda m: seen.append(("c", m.steps)) if m.steps == 6 else None)
        train(model, 6)
    assert seen == [("a", 2), ("b", 3), ("a", 4), ("a", 6), ("b", 6), ("c", 6)]


@pytest.mark.parametrize(("target", "every"), [(3, 1), (None, 1), (print, 0), (print, 1.5)])
def test_what_is_no_target_is_refused(target, every):
    with quiet_meter(by_hand.net()) as meter, pytest.raises((TypeError, ValueError)):
        meter.log_to(target, every=every)
