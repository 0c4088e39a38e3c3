"""Hugging Face Trainer: one callback converts the model and logs the drop rate next to the loss.

python examples/hugging_face_trainer.py
"""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import ssprop_patch as ssp
from ssprop_patch.integrations.transformers import SsPropCallback


class RandomImages(Dataset):
    def __init__(self, number: int) -> None:
        self.images = torch.randn(number, 3, 32, 32)
        self.labels = torch.randint(4, (number,))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def main() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=4
    )
    model = ResNetForImageClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            num_train_epochs=4,
            per_device_train_batch_size=16,
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, args, train_dataset=RandomImages(64))
        schedule = ssp.BarSchedule(0.8, period=2)
        SsPropCallback(schedule, meter=True, revert_at_end=True).add_to(trainer)
        trainer.train()  # prints what it saved
    for row in trainer.state.log_history:
        if "loss" in row:
            rate, loss = row["ssprop/drop_rate"], row["loss"]
            print(f"epoch {round(row['epoch']) - 1}: drop rate {rate:g}, loss {float(loss):.3f}")


if __name__ == "__main__":
    main()
