"""Lightning: one callback converts the model, and the rest of the program stays as it is.

python examples/lightning_trainer.py
"""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ssprop_patch as ssp
from ssprop_patch.integrations.lightning import SsPropCallback


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)),
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        logged = self.trainer.logged_metrics
        rate = float(logged["ssprop/drop_rate"])
        print(f"epoch {self.current_epoch}: drop rate {rate:g}, loss {float(logged['loss']):.3f}")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def main() -> None:
    L.seed_everything(0)
    data = TensorDataset(torch.randn(64, 3, 16, 16), torch.randint(4, (64,)))
    model = Classifier()
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[SsPropCallback(ssp.BarSchedule(0.8, period=2), revert_at_end=True)],
    )
    trainer.fit(model, DataLoader(data, batch_size=16))


if __name__ == "__main__":
    main()
