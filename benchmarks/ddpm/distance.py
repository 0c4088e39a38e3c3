"""The Frechet distance of generated images, in the features of a classifier trained here.

It is not the FID: that is the same formula in the features of one Inception network trained on
ImageNet. Numbers of the two cannot be compared, nor can distances in two different classifiers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from classifier import training
from classifier.batches import Batches
from classifier.decoded import Source
from classifier.images import Data
from classifier.options import UserError
from classifier.training import Run
from filelock import FileLock
from study import runs as classifiers
from study.settings import Settings as ClassifierSettings
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ddpm.settings import Settings
from ssprop_patch._files import replacing

CAVEAT = (
    "distance: Frechet distance in the features of a classifier trained here on the same data. It "
    "is not the Inception-FID, and cannot be compared with published ones."
)


class Features(nn.Module):
    """A trained classifier without its last layer: uint8 images to features (N, num_features).

    Attributes:
        accuracy: Of the classifier on the test images, in [0, 1].
    """

    def __init__(self, model: nn.Module, data: Data, accuracy: float) -> None:
        super().__init__()
        if not hasattr(model, "forward_head"):
            raise UserError("--feature-network must be one of timm's: its features are known")
        self.model = model.eval().requires_grad_(False)
        self.accuracy = accuracy
        self.num_features: int = model.head_hidden_size
        self.register_buffer("mean", torch.tensor(data.mean).view(-1, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(data.std).view(-1, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.model.forward_features((images - self.mean) / self.std)
        return self.model.forward_head(maps, pre_logits=True)


def trained_features(
    settings: Settings, source: Source, device: torch.device, folder: Path
) -> Features:
    """Return the features, of a classifier that is trained once and kept in ``folder``.

    Of several processes one trains, and the others wait for it.
    """
    wanted = ClassifierSettings(
        network=settings.feature_network,
        data=settings.data,
        image_size=settings.image_size,
        epochs=settings.feature_epochs,
        batch_size=min(128, len(source.train[1])),
        amp=settings.amp,
        channels_last=settings.channels_last,
        eval_every=settings.feature_epochs,
    )
    data = source.data()
    path = folder / f"classifier-{wanted.id}-{source.digest}.pt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            trained = _train(wanted, source, data, device, path)
            with replacing(path) as beside, beside.open("wb") as file:
                torch.save(trained, file)
            _checkpoint(path).unlink(missing_ok=True)
    state = torch.load(path, map_location=device, weights_only=True)
    model, _ = classifiers.build(wanted, source)
    model.load_state_dict(state["weights"])
    return Features(model, data, state["accuracy"]).to(device)


def _checkpoint(path: Path) -> Path:
    return path.with_suffix(".begun")


def _train(
    wanted: ClassifierSettings, source: Source, data: Data, device: torch.device, path: Path
) -> dict[str, object]:
    channels = classifiers.build(wanted, source)[1]
    batches = Batches(
        data,
        batch_size=wanted.batch_size,
        device=device,
        channels=channels,
        augment=True,
        channels_last=wanted.channels_last,
    )
    trained = training.train(
        Run("dense", wanted.seed, wanted.epochs * batches.steps_per_epoch),
        wanted.options(str(device)),
        batches,
        lambda: classifiers.build(wanted, source)[0],
        None,
        _checkpoint(path),
        lambda done, text: None,
    )
    accuracy = trained.history.epochs[-1]["accuracy"]
    return {"weights": trained.model.state_dict(), "accuracy": accuracy}


def distances(
    features: Features, source: Source, generated: Tensor, device: torch.device
) -> tuple[float, float]:
    """Return the distance of generated images from the test images, and a yardstick.

    The yardstick is the distance of as many real training images from the same test images: what
    a perfect generator would be given.

    Args:
        features: What the distance is measured in.
        source: The real images.
        generated: uint8, (N, C, H, W).
        device: Where.
    """
    count = min(len(generated), len(source.train[1]))
    chosen = torch.linspace(0, len(source.train[1]) - 1, count).round().long()
    metric = FrechetInceptionDistance(feature=features, reset_real_features=False).to(device)
    out = []
    _update(metric, source.test[0], True, device)
    for images in (generated, source.train[0][chosen]):
        _update(metric, images, False, device)
        out.append(float(metric.compute()))
        metric.reset()
    return out[0], out[1]


@torch.no_grad()
def _update(
    metric: FrechetInceptionDistance, images: Tensor, real: bool, device: torch.device
) -> None:
    for part in images.split(500):
        metric.update(part.to(device), real=real)
