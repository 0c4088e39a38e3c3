"""benchmarks/train_classifier.py: what it prints and writes, resuming, and what it refuses."""

from __future__ import annotations

import csv
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

import ssprop_patch as ssp

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "train_classifier.py"
sys.path.insert(0, str(SCRIPT.parent))

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
