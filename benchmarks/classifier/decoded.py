"""Small images in folders, archives or torchvision's files: decoded once, kept as one tensor."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from filelock import FileLock
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as TF

from classifier.data import TORCHVISION, Labelled, digits, from_torchvision, in_memory
from classifier.images import Data
from classifier.options import UserError
from ssprop_patch._files import replacing

_PARTS = {"train": "train", "test": "test", "val": "test", "valid": "test"}
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_NOT_MIRRORED = ("digits", "mnist")  # a mirrored one is another sign


@dataclass(frozen=True)
class Source:
    """All images of a data set, and where they came from.

    Attributes:
        name: Of the data set.
        train, test: uint8 (N, C, H, W) and int64 (N,).
        origin: What was read, for people.
        digest: Of the pixels and labels: equal exactly when all of them are.
    """

    name: str
    train: Labelled
    test: Labelled
    origin: str
    digest: str

    def data(self, share: float = 1.0, seed: int = 0, test_share: float = 1.0) -> Data:
        """Return a share (0 < share <= 1) of the training images, which depends on the seed.

        Args:
            test_share: Of the test images, the same for all seeds.
        """
        chosen = stratified(self.train[1], share, seed)
        train = (self.train[0][chosen], self.train[1][chosen])
        tested = stratified(self.test[1], test_share, 0)
        test = (self.test[0][tested], self.test[1][tested])
        flip = self.name not in _NOT_MIRRORED
        return in_memory(self.name, train, test, flip, train[0].shape[-1])


def stratified(labels: Tensor, share: float, seed: int) -> Tensor:
    """Return the indices, increasing, of a share of each class: rounded, but at least one image.

    Args:
        labels: int64, (N,).
        share: 0 < share <= 1.
        seed: Which images: the same ones each time, and of a larger share with the same seed a
            subset.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero().flatten()
        shuffled = of_class[torch.randperm(len(of_class), generator=generator)]
        parts.append(shuffled[: max(1, round(share * len(of_class)))])
    return torch.cat(parts).sort().values


def load(
    name: str, *, data_dir: Path | None, cache_dir: Path, size: int, download: bool = False
) -> Source:
    """Return a data set as squares of ``size`` pixels.

    Args:
        name: ``digits`` (scikit-learn's), one of torchvision's (``cifar10``, ``cifar100``,
            ``mnist``, ``fashionmnist``), or any other name for the images in ``data_dir``.
        data_dir: torchvision's folder; or a folder or a tar archive that holds
            ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg`` (or ``val``, ``valid``; png, webp,
            ...). Default: ``./data``.
        cache_dir: Where the decoded images of a folder or archive are kept.
        size: Pixels; images of another size are resized by their shorter side and cropped.
        download: Let torchvision download its data.

    Raises:
        UserError: If there are no such data, or an image cannot be read.
    """
    place = (data_dir or Path("data")).expanduser()
    if place.name.endswith(_ARCHIVES) or (place / "train").is_dir():
        return _kept(name, place, cache_dir, size)
    if name == "digits":
        train, test = digits()
        return _source(name, train, test, size, "scikit-learn's digits")
    if name in TORCHVISION:
        train, test = from_torchvision(name, place, download)
        return _source(name, train, test, size, f"torchvision's {name}")
    raise UserError(
        f"no images of {name!r} in {place}: pass --data-dir with a folder or a tar archive that "
        f"holds train/CLASS/*.jpg and test/CLASS/*.jpg, or name one of {', '.join(TORCHVISION)}"
    )


def _source(name: str, train: Labelled, test: Labelled, size: int, origin: str) -> Source:
    data = in_memory(name, train, test, True, size)
    parts = [(part.images, part.labels) for part in (data.train, data.test)]
    digest = hashlib.sha256()
    for tensor in (*parts[0], *parts[1]):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return Source(name, *parts, origin, digest.hexdigest()[:12])


def _kept(name: str, place: Path, cache_dir: Path, size: int) -> Source:
    """Return the images of a folder or archive, from the cache where they are in it."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / f"{name}-{size}-{_stamp(place)}.pt"
    # Of several processes one decodes, and the others wait for it.
    with FileLock(f"{path}.lock"):
        if path.exists():
            state = torch.load(path, weights_only=True)
        else:
            train, test = _decode(place, size)
            source = _source(name, train, test, size, "")
            state = {"train": source.train, "test": source.test, "digest": source.digest}
            with replacing(path) as beside, beside.open("wb") as file:
                torch.save(state, file)
    return Source(name, tuple(state["train"]), tuple(state["test"]), place.name, state["digest"])


def _stamp(place: Path) -> str:
    """Return a digest that changes when a file of the folder, or the archive, does."""
    try:
        files = sorted(place.rglob("*")) if place.is_dir() else [place]
        facts = [
            (str(f.relative_to(place)), f.stat().st_size, f.stat().st_mtime_ns)
            for f in files
            if f.is_file()
        ]
    except OSError as error:
        raise UserError(f"--data-dir {place}: {error.strerror or error}") from error
    if not facts:
        raise UserError(f"--data-dir {place}: no such file, or an empty folder")
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _decode(place: Path, size: int) -> tuple[Labelled, Labelled]:
    found: dict[str, list[tuple[str, str, Tensor]]] = {"train": [], "test": []}
    for path, content in _files(place):
        # The folder may lie in others: photos/train/cat/1.jpg.
        *_, part, label, name = ("", "", *PurePosixPath(path).parts)
        hidden = name.startswith(".")
        if part in _PARTS and name.lower().endswith(IMG_EXTENSIONS) and not hidden:
            found[_PARTS[part]].append((label, name, _image(content, size, path)))
    classes = sorted({label for label, _, _ in found["train"]})
    others = {label for label, _, _ in found["test"]}
    if not classes or not others:
        raise UserError(f"{place} does not hold train/CLASS/*.jpg and test/CLASS/*.jpg")
    if odd := sorted(set(classes) ^ others):
        raise UserError(f"{place}: train and test differ in the classes {odd}")
    out = []
    for part in ("train", "test"):
        # By name: an archive may hold them in any order.
        entries = sorted(found[part], key=lambda entry: entry[:2])
        labels = torch.tensor([classes.index(label) for label, _, _ in entries])
        out.append((torch.stack([image for _, _, image in entries]), labels))
    return out[0], out[1]


def _files(place: Path) -> Iterator[tuple[str, bytes]]:
    if place.is_dir():
        for file in sorted(place.rglob("*")):
            if file.is_file():
                yield file.relative_to(place).as_posix(), file.read_bytes()
        return
    try:
        with tarfile.open(place) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"--data-dir {place} cannot be read as an archive: {error}") from error


def _image(content: bytes, size: int, path: str) -> Tensor:
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"cannot read the image {path}: {error}") from error
    if image.size != (size, size):
        image = TF.center_crop(TF.resize(image, size, antialias=True), size)
    return TF.pil_to_tensor(image)
