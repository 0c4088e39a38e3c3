"""Networks of other libraries."""

import pytest
import torch

import ssprop_patch as ssp

from .common import check_training


def train_on(x, loss_of=lambda out: out.square().mean()):
    def train(model):
        torch.manual_seed(0)  # of dropout
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()

    return train


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", ["Unet", "FPN", "DeepLabV3Plus"])
def test_segmentation_models_pytorch(name):
    smp = pytest.importorskip(
        "segmentation_models_pytorch", reason="pip install segmentation-models-pytorch"
    )

    def make():
        torch.manual_seed(0)
        return getattr(smp, name)("resnet18", encoder_weights=None, classes=3).double()

    x = images(2, 3, 64, 64)
    sparse = check_training(train_on(x), make)
    assert ssp.revert(sparse) is sparse and not ssp.is_converted(sparse)


@pytest.mark.parametrize("kind", ["UNet", "DynUNet"])
def test_monai(kind):
    nets = pytest.importorskip("monai.networks.nets", reason="pip install monai")

    def make():
        torch.manual_seed(0)
        if kind == "UNet":
            return nets.UNet(3, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1).double()
        return nets.DynUNet(
            3,
            1,
            2,
            kernel_size=[3] * 3,
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            filters=[4, 8, 8],
        ).double()

    check_training(train_on(images(2, 1, 8, 8, 8)), make)


def test_monai_trainer():
    """Of ignite, with batches that are dictionaries."""
    monai = pytest.importorskip("monai", reason="pip install monai")
    pytest.importorskip("ignite", reason="pip install pytorch-ignite")
    from monai.engines import SupervisedTrainer

    from .common import batches

    def train(model):
        SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=2,
            train_data_loader=[{"image": x, "label": y} for x, y in batches()],
            network=model,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            loss_function=torch.nn.CrossEntropyLoss(),
            prepare_batch=lambda batch, device, non_blocking: (batch["image"], batch["label"]),
        ).run()

    assert monai.__version__
    check_training(train)


def unet():
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )


def test_diffusers():
    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        model(images(2, 3, 8, 8), torch.tensor([3, 4])).sample.square().mean().backward()
        optimizer.step()

    check_training(train, lambda: unet().double())


def test_diffusers_layerwise_casting():
    """Weights in bfloat16 at rest, in float32 while a layer runs: as without the casting."""

    def gradients(cast):
        model = unet()
        for p in model.parameters():
            p.data = p.data.bfloat16().float()
        ssp.convert(model, 0.5)
        if cast:
            model.enable_layerwise_casting(torch.bfloat16, torch.float32)
        model(images(2, 3, 8, 8).float(), torch.tensor([3, 4])).sample.square().mean().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.dim() == 4}

    found, expected = gradients(True), gradients(False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    zero = [int((g.flatten(1) == 0).all(1).sum()) for g in found.values()]
    assert all(zero)
