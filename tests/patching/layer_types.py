"""Networks with linear layers and transposed convolutions."""

import oracle
import torch.nn.functional as F
from torch import nn

ALL = (*oracle.CONVOLUTIONS, *oracle.TRANSPOSED, nn.Linear)


class UNet(nn.Module):
    """Down and up again, as networks for segmentation and diffusion do."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, 2, 1)
        self.middle = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.time = nn.Linear(4, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2)
        self.smooth = nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        h = self.middle(F.relu(self.down(x)))
        h = h + self.time(x.mean((2, 3)).repeat(1, 2)[:, :4])[..., None, None]
        return self.out(self.smooth(self.up(h, output_size=x.shape[2:])).tanh())
