"""benchmarks/train_classifier.py: what it prints and writes, resuming, and what it refuses.

At the end benchmarks/bench_conv.py, bench_step.py and plot.py: their rows, layers and pictures.
"""

from __future__ import annotations

import csv
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import ssprop_patch as ssp
from ssprop_patch.timing import Quantiles

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "train_classifier.py"
sys.path.insert(0, str(SCRIPT.parent))

import bench_conv  # noqa: E402
import bench_step  # noqa: E402
import networks  # noqa: E402
import plot  # noqa: E402
import rows as schema  # noqa: E402
import train_classifier  # noqa: E402
from classifier import clock, costs, data, models, table, training  # noqa: E402
from classifier.batches import Batches, Images  # noqa: E402
from classifier.options import Options, UserError, parse  # noqa: E402
from classifier.store import Store  # noqa: E402

# Two steps an epoch. Enough to go through everything, and quick.
TINY = ["--train-images", "64", "--batch-size", "32", "--model", "timm:resnet10", "--seeds", "1"]


def script(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def rows(folder: Path, name: str = "runs.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


# --- a whole benchmark -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run all three methods for three epochs; return the output folder and what was printed."""
    folder = tmp_path_factory.mktemp("benchmark") / "out"
    process = script(*TINY, "--epochs", 3, "--output", folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out


def test_prints_one_table_with_all_methods_and_says_where_the_files_are(benchmark):
    folder, out = benchmark
    for text in ("accuracy", "backward", "total", "forward", "step", "ssProp", "equal compute"):
        assert text in out
    assert out.count("┏") == 1
    for name in ("runs.csv", "history.csv", "results.png"):
        assert f"wrote {folder / name}" in out
        assert (folder / name).exists()


def test_csv_agrees_with_the_package_and_with_itself(benchmark):
    folder, _ = benchmark
    runs = {row["method"]: row for row in rows(folder)}
    assert list(runs) == ["dense", "ssprop", "dense-equal"]
    dense, sparse = runs["dense"], runs["ssprop"]
    assert dense["steps"] == sparse["steps"] == "6"
    assert sparse["sparse_steps"] == "2"  # epochs are dense, sparse, dense
    assert dense["sparse_steps"] == runs["dense-equal"]["sparse_steps"] == "0"
    assert sparse["schedule"] == "BarSchedule(0.8, period=2)"
    assert 0.5 < float(sparse["total_flops"]) / float(dense["total_flops"]) < 0.9
    assert dense["forward_flops"] == sparse["forward_flops"]
    for row in runs.values():
        laps = sum(float(row[f"{name}_s"]) for name in clock.LAPS)
        assert laps == pytest.approx(float(row["step_s"]))
        assert laps * int(row["steps"]) == pytest.approx(float(row["train_s"]))
        last = [e for e in rows(folder, "history.csv") if e["method"] == row["method"]][-1]
        assert last["accuracy"] == row["accuracy"]
        assert last["flops"] == row["total_flops"]
        assert float(last["seconds"]) == pytest.approx(float(row["train_s"]))
        assert row["torch"] == torch.__version__


def test_equal_compute_is_within_half_a_step(benchmark):
    runs = {row["method"]: row for row in rows(benchmark[0])}
    total = {method: int(row["total_flops"]) for method, row in runs.items()}
    step = total["dense"] / int(runs["dense"]["steps"])
    assert abs(total["dense-equal"] - total["ssprop"]) <= step / 2


def test_picture_is_a_picture(benchmark):
    picture = Image.open(benchmark[0] / "results.png").convert("RGB")
    assert min(picture.size) > 800
    assert len(picture.getcolors(10**6)) > 50


def test_methods_start_alike(benchmark):
    """The first epoch is dense in both: same weights, same images, same crops, same dropout."""
    first = {e["method"]: e for e in reversed(rows(benchmark[0], "history.csv"))}
    assert first["dense"]["step"] == first["ssprop"]["step"] == "2"
    assert first["dense"]["train_loss"] == first["ssprop"]["train_loss"]
    assert first["dense"]["accuracy"] == first["ssprop"]["accuracy"]


def test_finished_benchmark_is_kept_from_other_options(benchmark, capsys):
    folder, _ = benchmark
    before = (folder / "runs.csv").read_bytes()
    assert train_classifier.main([*TINY, "--epochs", "4", "--output", str(folder)]) == 2
    assert "epochs was 3, now 4" in capsys.readouterr().err
    assert (folder / "runs.csv").read_bytes() == before


# --- interrupting and resuming ----------------------------------------------------------------


def interrupt_after_an_epoch(process: subprocess.Popen[str], file: Path, how: int) -> str:
    """Send a signal once ``file`` is written anew; return what went to standard error."""
    before = file.stat().st_mtime_ns if file.exists() else 0
    while process.poll() is None and not (file.exists() and file.stat().st_mtime_ns > before):
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()
    process.send_signal(how)
    return process.communicate(timeout=60)[1]


def test_interrupted_and_killed_run_ends_with_the_same_weights(tmp_path, capsys, monkeypatch):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    # With all that has a state: dropout, random selection, momentum, a schedule of epochs.
    arguments = [*TINY, "--model", "test_resnet", "--epochs", "12", "--methods", "ssprop"]
    arguments += ["--dropout", "0.2", "--selection", "random"]
    state = torn / "state" / "ssprop-seed0.pt"

    process = script(*arguments, "--output", torn)
    line = interrupt_after_an_epoch(process, state, signal.SIGINT)
    assert process.returncode == 130
    assert line.startswith("interrupted; to continue: python ") and line.count("\n") == 1
    assert line.rstrip().endswith("--resume")

    assert train_classifier.main([*arguments, "--output", str(torn)]) == 2
    assert "unfinished" in capsys.readouterr().err

    process = script(*arguments, "--output", torn, "--resume")
    interrupt_after_an_epoch(process, state, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    epochs = len(torch.load(state, weights_only=True)["history"]["epochs"])
    assert 2 <= epochs < 12

    changed = [*arguments, "--output", str(torn), "--resume", "--lr", "0.3"]
    assert train_classifier.main(changed) == 2
    assert "lr was 0.1, now 0.3" in capsys.readouterr().err

    assert train_classifier.main([*arguments, "--output", str(torn), "--resume"]) == 0
    assert train_classifier.main([*arguments, "--output", str(whole)]) == 0
    ((a,), (b,)) = rows(whole), rows(torn)
    for name in ("weights", "accuracy", "train_loss", "test_loss", "total_flops", "sparse_steps"):
        assert a[name] == b[name], name
    assert not state.exists()

    # Nothing is left to do: nothing is trained, and all is written again.
    (torn / "results.png").unlink()
    monkeypatch.setattr(training, "train", None)
    assert train_classifier.main([*arguments, "--output", str(torn), "--resume"]) == 0
    assert (torn / "results.png").exists()
    assert rows(torn) == [b]


def test_store_replaces_only_what_it_wrote(tmp_path):
    options = parse([*TINY, "--output", str(tmp_path), "--methods", "dense"])
    (tmp_path / "mine.txt").write_text("keep")
    store = Store(tmp_path)
    store.open(options, {})
    store.finish("dense-seed0", {"row": {}})
    (tmp_path / "runs.csv").write_text("old")
    store.open(options, {})  # finished, the same options: measured again
    assert store.result("dense-seed0") is None
    assert not (tmp_path / "runs.csv").exists()
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match=r"unfinished benchmark \(0 of 1"):
        store.open(options, {})
    more = parse([*TINY, "--output", str(tmp_path), "--seeds", "2", "--resume"])
    store.open(more, {})  # more runs than before is no change of any one of them


# --- costs and times --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "resnext26ts"])
def test_step_cost_is_the_summary_plus_the_matrix_products(name):
    model, shape = timm.create_model(name, num_classes=10), (4, 3, 64, 64)
    cost = costs.StepCost(model, shape)
    for rate in (0.0, 0.03, 0.5, 0.8, 0.97):
        summary = ssp.summary(model, input_size=shape, drop_rate=rate)
        forward, backward = cost.forward - summary.forward, cost.backward(rate)
        linear = 2 * 4 * model.num_features * 10
        assert forward >= linear
        assert backward - summary.sparse_backward >= 2 * linear
        assert backward - summary.sparse_backward < 0.1 * summary.dense_backward


@pytest.mark.parametrize(
    "schedule",
    [
        ssp.BarSchedule(0.8),
        ssp.BarSchedule(0.8, period=6, interval="step"),
        ssp.LinearSchedule(0.0, 0.9, total=70, interval="step"),
        ssp.ConstantSchedule(0.0),
    ],
)
def test_plan_gives_equal_compute_to_half_a_step(schedule):
    cost = costs.StepCost(timm.create_model("resnet18", num_classes=10), (8, 3, 32, 32))
    plan = costs.plan(cost, schedule, epochs=7, steps_per_epoch=10)
    assert plan.steps["dense"] == plan.steps["ssprop"] == len(plan.rates) == 70
    per_t = 1 if schedule.interval == "step" else 10
    assert plan.rates == [schedule(step // per_t) for step in range(70)]
    dense = sum(cost.total([0.0]))
    assert abs(sum(cost.total(plan.rates)) - plan.steps["dense-equal"] * dense) <= dense / 2


def test_warm_up_counts_as_the_median_of_its_kind():
    times = clock.Clock(torch.device("cpu"))
    times.begin()
    for step in range(20):
        sparse = step % 10 >= 5
        slow = 100.0 if step in (0, 1, 5, 11) else 0.0  # two of them after a resume
        if step == 10:
            times.begin()
        times.laps.append([0.0, 1.0, (1.0 if sparse else 3.0) + slow, 0.0])
        times.rates.append(0.8 if sparse else 0.0)
    report = clock.summary(times)
    assert report["backward_s"] == 2.0 and report["step_s"] == 3.0
    assert report["dense_backward_median_s"] == 3.0
    assert report["sparse_backward_median_s"] == 1.0
    assert report["train_s"] == 60.0 and report["warm_up_s"] == 400.0


def test_spread():
    assert table.spread([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0"
    assert table.spread([2.0, 2.0], ".1f") == table.spread([2.0], ".1f") == "2.0"


# --- bad input: one line, exit code 2, nothing written ----------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "BarShedule(0.8)"], "did you mean BarSchedule"),
        (["--schedule", "BarSchedule(1.5)"], "[0, 1)"),
        (["--model", "resnet_18"], "did you mean resnet18"),
        (["--model", "torchvision:convnext"], "did you mean convnext"),
        (["--model", "keras:resnet18"], "timm:NAME"),
        (["--model", "inception_v3"], "made for --image-size 299"),
        (["--model", "torchvision:vit_b_16"], "made for --image-size 224"),
        (["--model", "naflexvit_base_patch16_gap", "--image-size", "32"], "no convolution"),
        (["--model", "mlp_mixer"], "did you mean"),
        (["--stem", "small", "--model", "mobilenetv3_small_050"], "no 7x7 stem"),
        (["--data", "cifar10", "--data-dir", "nowhere"], "--data-dir with the folder that holds"),
        (["--data", "mnist"], "or --download"),
        (["--data", "imagefolder", "--data-dir", "nowhere"], "train/CLASS/*"),
        (["--batch-size", "4000"], "1347 training images"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "gpu"], "--device gpu"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_classifier.main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and message in line
    assert line.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--drop-rate", "1"],
        ["--drop-rate", "nan"],
        ["--epochs", "0"],
        ["--data", "imagenet"],
        ["--methods", "sparse"],
        ["--drop-rate", "0.5", "--schedule", "0.5"],
        ["--resume", "--overwrite"],
        ["--sedes", "3"],
    ],
)
def test_bad_option_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(arguments)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unexpected_failure_is_one_line_and_another_code(tmp_path, monkeypatch, capsys):
    def fail(_: object) -> None:
        raise RuntimeError("out of memory\nand much more")

    monkeypatch.setattr(data, "load", fail)
    assert train_classifier.main(["--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: RuntimeError: out of memory (")
    with pytest.raises(RuntimeError):
        train_classifier.main(["--output", str(tmp_path / "out"), "--traceback"])


# --- data and models --------------------------------------------------------------------------


def test_digits_are_scikit_learns():
    found = data.load(parse([]))
    assert (len(found.train), len(found.test), found.classes) == (1347, 450, 10)
    assert found.train.images.shape == (1347, 1, 8, 8)
    assert found.train.images.max() == 255
    assert data.load(parse(["--image-size", "16"])).train.images.shape[-1] == 16


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_mnist_files(name, tmp_path):
    folder = tmp_path / {"mnist": "MNIST", "fashionmnist": "FashionMNIST"}[name] / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        images = os.urandom(count * 28 * 28)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images)
        labels = bytes(i % 10 for i in range(count))
        head = struct.pack(">II", 2049, count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels)
    found = data.load(parse(["--data", name, "--data-dir", str(tmp_path), "--batch-size", "4"]))
    assert found.train.images.shape == (20, 1, 28, 28) and found.test.images.shape[0] == 10
    assert found.classes == 10 and found.channels == 1
    assert found.flip == (name == "fashionmnist")


def test_cifar_files(tmp_path, monkeypatch):
    # torchvision compares the files with the hashes of the real ones.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels = np.full((4, 3072), number, np.uint8)
        pixels[:, :1024] += 100  # the red channel comes first
        content = {"data": pixels, "labels": [0, 3, 9, 1]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    arguments = ["--data", "cifar10", "--data-dir", str(tmp_path), "--batch-size", "4"]
    found = data.load(parse(arguments))
    assert found.train.images.shape == (20, 3, 32, 32) and found.classes == 10 and found.flip
    assert found.train.images[0, :, 0, 0].tolist() == [100, 0, 0]
    assert found.test.images[0, :, 31, 31].tolist() == [105, 5, 5]
    assert found.mean[1] == pytest.approx(2 / 255)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of 2 classes with 6 images to train and 4 to test on."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 6), ("val", 4)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count // 2):
                pixels = torch.randint(0, 256, (30, 40, 3), generator=generator)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return tmp_path / "photos"


def folder_options(folder: Path, *more: str) -> Options:
    arguments = ["--data", "imagefolder", "--data-dir", str(folder), "--image-size", "16"]
    return parse([*arguments, "--batch-size", "2", "--workers", "0", *more])


def batches(found: data.Data, channels: int = 3, augment: bool = True) -> Batches:
    return Batches(
        found,
        batch_size=2,
        device=torch.device("cpu"),
        channels=channels,
        augment=augment,
        channels_last=False,
    )


def test_image_folder_streams_what_it_would_keep_in_memory(photos):
    kept = data.load(folder_options(photos))
    streamed = data.load(folder_options(photos, "--stream"))
    assert isinstance(kept.train, Images) and not isinstance(streamed.train, Images)
    assert (len(kept.train), len(kept.test), kept.classes) == (6, 4, 2)
    for a, b in zip(batches(kept).train(0, 0, 3), batches(streamed).train(0, 0, 3), strict=True):
        assert a[0].shape == (2, 3, 16, 16)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    for a, b in zip(batches(kept).test(), batches(streamed).test(), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_image_folder_without_parts_holds_out_a_fifth(photos):
    found = data.load(folder_options(photos / "train"))
    assert (len(found.train), len(found.test), found.classes) == (5, 1, 2)


def test_image_folder_with_a_broken_image_or_other_classes(photos):
    broken = photos / "train" / "cat" / "0.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot read the image .*0\.png"):
        data.load(folder_options(photos))
    (photos / "val" / "cat").rename(photos / "val" / "cow")
    with pytest.raises(UserError, match=r"differ in the classes \['cat', 'cow'\]"):
        data.load(folder_options(photos))


def test_batches_are_crops_of_the_padded_images_and_repeat_with_seed_and_epoch():
    found = data.load(parse(["--train-images", "64"]))
    ready = batches(found, channels=1)
    (images, labels), *_ = ready.train(3, 5, 1)
    again, other = next(ready.train(3, 5, 1)), next(ready.train(3, 6, 1))
    assert torch.equal(images, again[0]) and not torch.equal(images, other[0])
    padded = F.pad(found.train.images, [1] * 4)
    windows = padded.unfold(2, 8, 1).unfold(3, 8, 1)[:, 0].reshape(-1, 8, 8).float()
    back = images[:, 0] * ready.std + ready.mean
    for image, label in zip(back, labels, strict=True):
        which = int((windows - image).abs().amax((1, 2)).argmin())
        assert torch.allclose(windows[which], image, atol=1e-3)
        assert found.train.labels[which // 9] == label
    plain = torch.cat([b[0] for b in batches(found, channels=1, augment=False).train(0, 0, 32)])
    assert abs(plain.mean()) < 1e-3 and abs(plain.std() - 1) < 1e-2
    # torchvision's models take colour
    assert next(batches(found, channels=3).train(0, 0, 1))[0].shape == (2, 3, 8, 8)


def test_models_of_both_libraries():
    assert models.resolve("resnet18") == models.resolve("timm:resnet18") == ("timm", "resnet18")
    assert models.resolve("torchvision:resnet18") == ("torchvision", "resnet18")
    assert models.resolve("googlenet") == ("torchvision", "googlenet")  # timm has none
    options = parse(["--model", "torchvision:resnet18", "--dropout", "0.3"])
    model, channels = models.build(options, classes=7, channels=1, size=32)
    assert channels == 3 and model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert model.conv1.kernel_size == (3, 3) and model.conv1.stride == (1, 1)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.3]
    model, channels = models.build(parse([]), classes=10, channels=1, size=8)
    assert channels == 1 and model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert models.build(parse(["--stem", "own"]), classes=10, channels=1, size=8)[
        0
    ].conv1.kernel_size == (7, 7)


# --- times of layers and networks: the rows ----------------------------------------------------

SETTING = schema.Setting(
    name="net", device="Some CPU, 2.0 GHz", dtype="float32", memory_format="contiguous",
    shape="2x3x8x8", drop_rate=0.8, selection="l1", options="", iterations=3, threads=1,
    torch="2", timm="1", python="3",
)  # fmt: skip
# Seconds: forward, backward, step.
DENSE = [Quantiles(0.8, 1.0, 1.2), Quantiles(1.9, 2.0, 2.5), Quantiles(3.0, 4.0, 5.0)]
SPARSE = [Quantiles(0.9, 1.1, 1.2), Quantiles(0.7, 0.8, 1.1), Quantiles(2.0, 2.5, 3.0)]


def compared(setting: schema.Setting = SETTING, modes=("forward", "backward", "step")):
    return schema.compare(
        setting, modes, {"dense": DENSE, "sparse": SPARSE}, {"dense": 1.0, "sparse": 0.25},
        kernels={"sparse": "gather"}, peaks={"dense": 7.5, "sparse": None},
    )  # fmt: skip


def test_rows_hold_shares_and_limits():
    found = {(r.side, r.mode): r for r in compared()}
    backward, step = found["sparse", "backward"], found["sparse", "step"]
    assert (backward.p20_ms, backward.p50_ms, backward.p80_ms) == (700, 800, 1100)
    assert backward.share_of_dense == 0.4 and backward.limit_ms == 500
    assert backward.limit == pytest.approx(0.25)
    assert step.share_of_dense == 0.625 and step.limit_ms == 4000 - 1500
    assert found["sparse", "forward"].limit_ms is None is found["sparse", "forward"].limit
    assert [found["dense", m].limit for m in ("backward", "step")] == [1.0, 1.0]
    assert {key: r.peak_memory_mib for key, r in found.items() if r.peak_memory_mib} == {
        ("dense", "step"): 7.5
    }
    assert {r.kernel for r in found.values() if r.side == "sparse"} == {"gather"}


def test_rows_come_back_from_the_file_and_more_are_appended(tmp_path):
    file = tmp_path / "times.csv"
    first, second = compared(), compared(replace(SETTING, name="other", options="compiled"))
    schema.append(file, first)
    schema.append(file, second)
    assert schema.read(file) == first + second
    lines = file.read_text().splitlines()
    assert lines[0].split(",") == list(schema.FIELDS) and len(lines) == 1 + len(first + second)


def test_an_unfinished_row_is_not_read_and_cut_off_by_the_next(tmp_path):
    file, rows = tmp_path / "times.csv", compared()
    schema.append(file, rows)
    whole = file.read_bytes()
    header = whole.index(b"\n") + 1
    for end in (1, header - 1, header, header + 5, len(whole) - 9, len(whole)):
        file.write_bytes(whole[:end])
        kept = rows[: max(0, whole[:end].count(b"\n") - 1)]
        if end >= header:
            assert schema.read(file) == kept
        assert schema.check_header(file) is (end < header)
        schema.append(file, rows)
        assert schema.read(file) == kept + rows


def test_file_with_other_columns_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "times.csv"
    header = [name for name in schema.FIELDS if name != "limit_ms"] + ["limit"]
    for columns, message in (
        (header, "without limit_ms; with limit"),
        (schema.FIELDS[::-1], "in another order"),
    ):
        file.write_text(before := ",".join(columns) + "\n")
        for use in (schema.read, lambda path: schema.append(path, compared())):
            with pytest.raises(ValueError, match=message):
                use(file)
        assert file.read_text() == before
    with pytest.raises(ValueError, match="there is no folder"):
        schema.append(tmp_path / "missing" / "times.csv", compared())


@pytest.mark.parametrize("cut", [lambda line: line.rpartition(",")[0], lambda line: line[5:]])
def test_broken_line_is_named(cut, tmp_path):
    file = tmp_path / "times.csv"
    schema.append(file, [replace(compared()[1], name="x" * 5, iterations=3)])
    text = file.read_text().splitlines()
    good = schema.read(file)
    assert len(good) == 1
    file.write_text("\n".join([*text, cut(text[1]).replace(",3,1,", ",?,1,")]) + "\n")
    with pytest.raises(ValueError, match=r"times.csv, line 3"):
        schema.read(file)


@pytest.mark.parametrize("bench, what", [(bench_conv, "--layer"), (bench_step, "--network")])
def test_nothing_is_measured_for_a_file_that_cannot_be_appended_to(
    bench, what, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "times.csv"
    file.write_text("name,limit\n")
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        bench.main(["--output", str(file)])
    assert stop.value.code == 2 and "has other columns" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        bench.main([what, "nothing"])
    assert stop.value.code == 2 and "nothing" in capsys.readouterr().err


# --- single layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, layer, rest",
    [
        ("conv2d:2x6x9x9:8:3", nn.Conv2d(6, 8, 3, padding=1, bias=False), {}),
        ("Conv2d:2x6x9x9:8:3x5:stride=2x1,dilation=2,groups=2,bias=1",
         nn.Conv2d(6, 8, (3, 5), (2, 1), (2, 4), 2, 2), {}),
        ("conv2d:2x3x9x9:8:7:stride=2,padding=0,dx=0", nn.Conv2d(3, 8, 7, 2, bias=False),
         {"dx": False}),
        ("conv1d:2x6x9:8:4", nn.Conv1d(6, 8, 4, padding=1, bias=False), {}),
        ("conv3d:1x2x5x5x5:4:1", nn.Conv3d(2, 4, 1, bias=False), {}),
        ("convtranspose2d:2x6x4x4:8:2:stride=2", nn.ConvTranspose2d(6, 8, 2, 2, bias=False), {}),
        ("linear:2x5x6:8:bias=1", nn.Linear(6, 8), {}),
        ("linear:5x6:8", nn.Linear(6, 8, bias=False), {}),
    ],
)  # fmt: skip
def test_layer_is_read_from_text(text, layer, rest):
    spec = bench_conv.LayerSpec.parse(text)
    assert repr(spec.build()) == repr(layer)
    assert spec.dx is rest.get("dx", True)
    shape = text.split(":")[1]
    assert "x".join(map(str, spec.shape)) == shape
    kind, out = spec.name.split(":", 1)
    assert bench_conv.LayerSpec.parse(f"{kind}:{shape}:{out}") == spec  # the name can be used


@pytest.mark.parametrize(
    "text, message",
    [
        ("conv4d:2x6x9x9:8:3", "the kind must be one of conv1d"),
        ("conv2d", "expected conv2d:SHAPE:OUT:KERNEL"),
        ("conv2d:2x6x9x9:8", "expected conv2d:SHAPE:OUT:KERNEL"),
        ("linear:2x6:8:3", "expected linear:SHAPE:OUT"),
        ("conv2d:6x9x9:8:3", "must have 4 dimensions"),
        ("linear:6:8", "2 or more dimensions"),
        ("conv2d:2x6x9xx:8:3", "the shape must be integers >= 1"),
        ("conv2d:0x6x9x9:8:3", "the shape must be integers >= 1"),
        ("conv2d:2x6x9x9:8x8:3", "OUT must be one number"),
        ("conv2d:2x6x9x9:1:3", "one output channel"),
        ("conv2d:2x6x9x9:8:3x3x3", "KERNEL must be 2 numbers or one"),
        ("conv2d:2x6x9x9:8:3:stride=0", "stride must be integers >= 1"),
        ("conv2d:2x6x9x9:8:3:padding=same", "padding must be integers >= 0"),
        ("conv2d:2x6x9x9:8:3:strid=2,dx=1", "strid: the keys are stride"),
        ("linear:2x6:8:stride=2", "stride: the keys are bias, dx"),
        ("conv2d:2x6x9x9:8:3:bias=yes", "bias must be 0 or 1"),
        ("conv2d:2x6x9x9:8:3:groups=4", "divisible by groups"),
        ("conv2d:2x6x9x9:8:13:padding=0", "[Kk]ernel size"),
    ],
)
def test_layer_that_does_not_exist_is_refused_with_its_text(text, message):
    with pytest.raises(ValueError, match=message) as error:
        bench_conv.LayerSpec.parse(text)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "text, kept",
    [
        ("conv2d:1x64x8x8:64:3", 13 / 64),  # 12.8 rounded
        ("conv2d:1x96x8x8:96:3:groups=96", 19 / 96),
        ("conv2d:1x64x8x8:128:3:groups=32", 1 / 4),  # of four in each group one
        ("linear:4x8:10", 2 / 10),
    ],
)
def test_part_of_the_channels_that_is_kept(text, kept):
    assert bench_conv.LayerSpec.parse(text).kept(0.8) == kept


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta for a device with a queue
def test_backward_is_timed_without_its_forward(device, monkeypatch):
    clock = {"now": 0.0, "forwards": 0, "waits": 0}

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock["now"] += 10
            clock["forwards"] += 1
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            clock["now"] += 1
            return dy

    def wait() -> None:
        clock["waits"] += 1

    monkeypatch.setattr(bench_conv, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    monkeypatch.setattr(bench_conv, "waiter", lambda _: wait)
    layer = nn.Module()
    layer.forward = Slow.apply
    x = torch.ones(2, 3, requires_grad=True, device=device)
    run = bench_conv.passes(layer, x, None)
    before = clock["forwards"]
    assert run(3) == [10, 1, 11]
    assert clock["forwards"] - before == 6  # each backward, alone or in both, has its own
    # At the four ends of the three parts, of each pass or of all passes together.
    assert clock["waits"] == (4 * 3 if device == "cpu" else 4)


def test_layers_are_timed_and_written(tmp_path, capsys):
    file = tmp_path / "times.csv"
    texts = ["conv2d:2x3x9x9:10:3:stride=2,dx=0", "conv1d:2x8x16:10:3", "linear:2x5x16:20:bias=1",
             "convtranspose2d:2x8x5x5:10:2:stride=2"]  # fmt: skip
    few = ["--iterations", "2", "--warmup", "1", "--output", str(file)]
    assert bench_conv.main(["--channels-last", *few, "--layer", *texts]) == 0
    out = capsys.readouterr().out
    found = schema.read(file)
    assert len(found) == len(texts) * 2 * 3
    for text in texts:
        kind, shape, rest = text.split(":", 2)
        of_one = {(r.side, r.mode): r for r in found if r.name == f"{kind}:{rest}"}
        assert len(of_one) == 6 and f"{kind}:{rest}" in out
        for (side, mode), row in of_one.items():
            assert row.shape == shape and row.iterations == 2 and row.torch == torch.__version__
            assert row.memory_format == ("channels_last" if "2d" in kind else "contiguous")
            assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
            dense = of_one["dense", mode].p50_ms
            assert row.share_of_dense == pytest.approx(row.p50_ms / dense, rel=1e-2)
            assert row.kernel in (("gather", "matmul", "direct") if side == "sparse" else ("",))
        assert of_one["sparse", "backward"].limit_ms == pytest.approx(
            0.2 * of_one["dense", "backward"].p50_ms, abs=2e-5
        )
    assert {r.setting for r in found if r.side == "dense"} == {r.setting for r in found}


@pytest.mark.parametrize("option, dtype", [("--amp", "bfloat16 autocast"), ("--dtype", "float64")])
def test_layers_in_other_dtypes(option, dtype, tmp_path, monkeypatch):
    seen, measured = [], bench_conv.passes

    def passes(layer, x, autocast):
        seen.append((x.dtype, autocast, x.requires_grad))
        return measured(layer, x, autocast)

    monkeypatch.setattr(bench_conv, "passes", passes)
    file = tmp_path / "times.csv"
    given = [option] if option == "--amp" else [option, dtype]
    bench_conv.main([*given, "--layer", "conv2d:2x4x6x6:8:3", "conv2d:2x4x6x6:8:3:dx=0",
                     "--selection", "l2", "--iterations", "1", "--output", str(file)])  # fmt: skip
    wanted = (torch.float32, torch.bfloat16) if option == "--amp" else (torch.float64, None)
    assert seen == [(*wanted, dx) for dx in (True, True, False, False)]
    assert {(r.dtype, r.selection) for r in schema.read(file)} == {(dtype, "l2")}


# --- whole networks ----------------------------------------------------------------------------


def step_options(**given: object) -> SimpleNamespace:
    options = {
        "drop_rate": 0.8, "selection": "l1", "types": [], "amp": False, "skip_grouped": False,
        "align": 1, "compile": False,
    }  # fmt: skip
    return SimpleNamespace(**options | given)


def sparse_layers(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if hasattr(m, "_ssprop_policy")}


def test_which_layers_of_a_network_become_sparse():
    vit = timm.create_model("test_vit")
    linear = {n for n, m in vit.named_modules() if isinstance(m, nn.Linear)}
    assert sparse_layers(bench_step.make_sparse(vit, 0.8, step_options())) == {"patch_embed.proj"}
    both = bench_step.make_sparse(vit, 0.8, step_options(types=["linear"]))
    assert sparse_layers(both) == {"patch_embed.proj", *linear} - {"head"}
    assert not sparse_layers(vit)
    net = timm.create_model("test_efficientnet")
    all_of_them = sparse_layers(bench_step.make_sparse(net, 0.8, step_options()))
    rest = sparse_layers(bench_step.make_sparse(net, 0.8, step_options(skip_grouped=True)))
    grouped = {n for n, m in net.named_modules() if getattr(m, "groups", 1) > 1}
    assert rest == all_of_them - grouped != all_of_them


def test_measured_plan_says_which_layers_become_sparse(tmp_path, monkeypatch):
    asked = []

    def plan(model, *, inputs, types, drop_rate, measure, align):
        asked.append((tuple(inputs.shape), nn.Linear in types, drop_rate, measure))
        own = set(model.modules())
        # A plan of another copy would not know these layers.
        return SimpleNamespace(pays=lambda layer, name: layer in own and name.startswith("layer1"))

    monkeypatch.setattr(ssp, "plan", plan)
    net, x = timm.create_model("test_resnet"), torch.zeros(2, 3, 32, 32)
    args = step_options(types=["linear"])
    found = bench_step.make_sparse(net, 0.8, args, measured_on=x)
    assert asked == [((2, 3, 32, 32), True, 0.8, True)]
    assert sparse_layers(found) == {n for n in sparse_layers(bench_step.make_sparse(net, 0.8, args))
                                    if n.startswith("layer1")} != set()  # fmt: skip

    file = tmp_path / "times.csv"
    bench_step.main(["--network", "test_resnet:2:32", "--measured-plan", "--iterations", "1",
                     "--warmup", "1", "--output", str(file)])  # fmt: skip
    limits = {r.side: r.limit for r in schema.read(file) if r.mode == "backward"}
    assert limits["sparse"] + 0.1 < limits["plan"] < 0.99
    assert limits["rate0"] == pytest.approx(1.0, rel=1e-3)

    monkeypatch.setattr(ssp, "plan", lambda *_, **__: SimpleNamespace(pays=lambda *_: False))
    with pytest.warns(UserWarning, match="nothing to convert"):
        none = bench_step.make_sparse(net, 0.8, args, measured_on=x)
    assert bench_step.flops_left(none, x.shape, args) == 1.0


def test_the_plan_of_a_compiled_network_is_measured_compiled(monkeypatch):
    asked = []

    def plan(model, **kwargs):
        asked.append(isinstance(model, torch._dynamo.OptimizedModule))
        return SimpleNamespace(pays=lambda *_: True)

    monkeypatch.setattr(ssp, "plan", plan)
    net, x = timm.create_model("test_resnet"), torch.zeros(2, 3, 32, 32)
    for compiled in (True, False):
        bench_step.make_sparse(net, 0.8, step_options(compile=compiled), measured_on=x)
    assert asked == [True, False]


def test_networks_are_timed_and_written(tmp_path, capsys, monkeypatch):
    file = tmp_path / "times.csv"
    monkeypatch.setattr(ssp.kernels, "benchmark", False)
    bench_step.main(["--network", "test_resnet:2:32", "test_vit:1:160", "--types", "Linear",
                     "--iterations", "2", "--warmup", "1", "--selection", "l2",
                     "--measured-kernels", "--output", str(file)])  # fmt: skip
    assert ssp.kernels.choices()
    ssp.kernels.clear()
    out = capsys.readouterr().out
    found = {(r.name, r.side, r.mode): r for r in schema.read(file)}
    assert len(found) == 2 * 3 * 3
    for (name, side, mode), row in found.items():
        assert name in out and row.selection == "l2"
        assert row.options == "types=linear kernels=measured"
        assert row.shape == ("2x3x32x32" if name == "test_resnet" else "1x3x160x160")
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        assert (row.peak_memory_mib is not None) is (mode == "step")
        dense = {m: found[name, "dense", m].p50_ms for m in ("forward", "backward", "step")}
        assert row.share_of_dense == pytest.approx(row.p50_ms / dense[mode], abs=1e-3)
        if mode == "backward" and side == "sparse":
            # At least a fifth of the channels is left; where some are dense, or few, more.
            assert 0.2 < row.limit < 0.3
            step = found[name, side, "step"]
            spared = dense["backward"] - row.limit_ms
            assert step.limit_ms == pytest.approx(dense["step"] - spared, abs=1e-3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("resnet18", "'resnet18' is not NAME:BATCH:PIXELS"),
        ("resnet18:8:0", "'resnet18:8:0' is not NAME:BATCH:PIXELS"),
        ("resnett18:8:32", "timm has no network 'resnett18'; the nearest names are .*resnet18"),
        ("unet_cifar10:8:32", "the nearest names are .*unet2d_cifar10"),
        ("unet2d_cifar10:8:31", "takes a multiple of 8 pixels"),
    ],
)
def test_network_that_does_not_exist_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        bench_step.Network.parse(text)


def test_a_network_that_makes_images(tmp_path, monkeypatch):
    class Small(nn.Module):
        def __init__(self, pixels):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, images):
            return self.conv(images)

    monkeypatch.setattr(networks, "UNet", Small)
    file = tmp_path / "times.csv"
    bench_step.main(["--network", "unet2d_cifar10:2:16", "--measured-plan", "--iterations", "1",
                     "--warmup", "1", "--output", str(file)])  # fmt: skip
    rows = schema.read(file)
    assert {(r.name, r.shape) for r in rows} == {("unet2d_cifar10", "2x3x16x16")}
    assert {r.side for r in rows} == {"dense", "sparse", "rate0", "plan"}


def test_the_network_of_ddpm():
    net = networks.Network.parse("unet2d_cifar10:1:32")
    model, x = net.build(), torch.randn(net.shape)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307  # as its authors' weights
    with torch.no_grad():
        out = model(x)
    assert out.shape == x.shape and net.loss(x)(out).dim() == 0


def test_peak_memory_is_on_top_of_what_was_there(monkeypatch):
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    state = {"now": 300, "peak": 900}  # MiB; an earlier peak does not count

    def step() -> None:
        assert model.weight.grad is None  # what the last step left is not there before
        state["peak"] = max(state["peak"], 450)

    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: state["now"] << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: state["peak"] << 20)
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda _: state.update(peak=state["now"])
    )
    assert bench_step.peak_memory(step, model, device) == 150
    assert bench_step.peak_memory(step, model, torch.device("meta")) is None


def test_peak_memory_on_the_cpu():
    model = nn.Linear(2, 2)
    before = torch.ones(2**20)  # does not count

    def step() -> None:
        first = before * 2  # 4 MiB
        second = first + 1
        del first
        third = second + 1
        del second, third

    found = bench_step.peak_memory(step, model, torch.device("cpu"))
    assert found == pytest.approx(8, abs=0.01)


# --- the picture of them -----------------------------------------------------------------------


def test_picture_has_a_panel_for_each_setting_and_the_last_of_repeats():
    slower = [replace(r, share_of_dense=9.0) for r in compared()]
    other = compared(replace(SETTING, drop_rate=0.5))
    layers = compared(replace(SETTING, name="conv2d:8:3"), ("forward", "backward", "both"))
    found = plot.panels([*slower, *compared(), *other, *layers])
    assert [title.split(";")[0] for title in found] == ["networks", "networks", "single layers"]
    first, half, single = found.values()
    assert {r.share_of_dense for r in first["net", "2x3x8x8"].values()} == {0.4, 0.625}
    assert {r.drop_rate for r in half["net", "2x3x8x8"].values()} == {0.5}
    assert {p.mode for p in single["conv2d:8:3", "2x3x8x8"]} == {"backward", "both"}


def test_picture_shows_medians_quantiles_and_limits():
    (axes,) = plot.draw(compared()).axes
    marks = {m.get_xdata()[0] for m in axes.lines if m.get_marker() == "o"}
    limits = {round(m.get_xdata()[0], 6) for m in axes.lines
              if m.get_marker() == "|" and m.get_markersize() > 8}  # fmt: skip
    assert marks == {0.4, 0.625} and limits == {0.25, 0.625}
    spans = sorted(
        tuple(x for x, _ in segment)
        for whiskers in axes.collections
        for segment in whiskers.get_segments()
    )
    # 700 and 1100 of 2000 ms; 2000 and 3000 of 4000.
    assert np.allclose(spans, [(0.35, 0.55), (0.5, 0.75)])


def test_picture_is_written_beside_the_rows(tmp_path, capsys):
    file = tmp_path / "times.csv"
    schema.append(file, compared())
    assert plot.main([str(file)]) == 0
    picture = Image.open(tmp_path / "times.png").convert("RGB")
    assert picture.size[0] > 700 and len(picture.getcolors(10**6)) > 20
    assert plot.main([str(file), "-o", str(tmp_path / "other.png")]) == 0
    assert (tmp_path / "other.png").exists()

    only_dense = tmp_path / "dense.csv"
    schema.append(only_dense, [r for r in compared() if r.side == "dense"])
    missing = tmp_path / "missing.csv"
    for argument, message in ((only_dense, "no row of a sparse side"), (missing, "No such file")):
        with pytest.raises(SystemExit) as stop:
            plot.main([str(argument)])
        assert stop.value.code == 2 and message in capsys.readouterr().err
