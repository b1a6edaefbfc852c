"""The ImageNet network whose features a new tower learns to reproduce; used in training, never shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip.importing import import_open_clip
from ..errors import UnreadableImage

CHANNELS = (128, 96, 320, 1280)


class Teacher(nn.Module):
    """MobileNetV2 1.0 as converted from TensorFlow: dense features at four depths, on the student's grid.

    Channels are standardised with statistics taken once from the training images, since the raw features of
    different channels differ in size by orders of magnitude.

    Shapes:
        images: (B, 3, S, S) in [0, 1].
        returns: four (B, N, C) with C = 128, 96, 320, 1280, and the pooled (B, 1280).
    """

    network: Any

    def __init__(self, weights: Path, grid: tuple[int, int]) -> None:
        super().__init__()
        import_open_clip()  # timm needs the same care with torchvision, and comes with open_clip
        import timm

        self.grid = grid
        self.network = timm.create_model(
            "mobilenetv2_100", pretrained=False, num_classes=1001, pad_type="same"
        ).eval()
        try:
            stored = load_file(weights)
        except Exception as error:
            raise UnreadableImage(
                f"{weights.name} is not a safetensors file that can be read: {error}"
            ) from error
        counters = {k: v for k, v in self.network.state_dict().items() if not v.is_floating_point()}
        self.network.load_state_dict({**{k: v.float() for k, v in stored.items()}, **counters})
        self.requires_grad_(False)
        self.network.to(
            memory_format=torch.channels_last
        )  # twice as fast for depthwise convolutions on a CPU
        for index, count in enumerate(CHANNELS):
            self.register_buffer(f"mean{index}", torch.zeros(count))
            self.register_buffer(f"deviation{index}", torch.ones(count))

    def raw(self, images: Tensor) -> list[Tensor]:
        """Four (B, N, C) features, not standardised."""
        last, taps = self.network.forward_intermediates(
            (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        )
        fine = F.pixel_unshuffle(taps[2], 2)
        maps = [fine, taps[3], taps[4], last]
        return [
            F.interpolate(m.float(), size=self.grid, mode="bilinear", align_corners=False).flatten(2).mT
            for m in maps
        ]

    @torch.no_grad()
    def fit_statistics(self, images: Tensor) -> None:
        """Take each channel's mean and deviation from a sample of images (B, 3, S, S)."""
        features = [self.raw(chunk) for chunk in images.split(32)]
        for index in range(len(CHANNELS)):
            tokens = torch.cat([f[index] for f in features]).flatten(0, 1)
            getattr(self, f"mean{index}").copy_(tokens.mean(0))
            getattr(self, f"deviation{index}").copy_(tokens.std(0).clamp(min=1e-3))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        features = [
            (f - getattr(self, f"mean{i}")) / getattr(self, f"deviation{i}")
            for i, f in enumerate(self.raw(images))
        ]
        return features, features[-1].mean(1)
