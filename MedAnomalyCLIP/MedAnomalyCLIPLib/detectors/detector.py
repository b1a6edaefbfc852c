"""The shared core of all detectors: tapped tokens, aligned with text, scored, fused to a map and a score."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..clip.towers import TappedClipViT, TappedTokens, create_vision_tower
from .adapters import LinearAdapter
from .scoring import anomaly_map, image_score, smooth, two_class_cosines
from .specification import DetectorSpec


class Detection(NamedTuple):
    """What a detector says about B images.

    Attributes:
        map: (B, S, S) in [0, 1], 0 on padding.
        score: (B,) in [0, 1].
    """

    map: Tensor
    score: Tensor


class AnomalyDetector(nn.Module):
    """A tapped CLIP tower, an adapter for each tap, and a text bank.

    Shapes:
        images: (B, 3, S, S), normalised; valid: (B, S, S) bool, False on padding.
        returns: `Detection`.
    """

    text_bank: Tensor
    tower: TappedClipViT

    def __init__(self, spec: DetectorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tower = create_vision_tower(spec.tower)
        self.adapters = nn.ModuleList(
            LinearAdapter(self.tower.width, self.tower.embed_dim) for _ in spec.tower.taps
        )
        self.register_buffer("text_bank", torch.zeros(2, self.tower.embed_dim))

    def forward(self, images: Tensor, valid: Tensor) -> Detection:
        maps = self.map_tokens(self.tower(images), self.text_bank)
        maps = smooth(maps, self.spec.smoothing).masked_fill(~valid, 0.0)
        return Detection(maps, image_score(maps, valid, self.spec.image_score))

    def map_tokens(self, tokens: TappedTokens, text: Tensor) -> Tensor:
        """(B, S, S) anomaly map of tapped tokens, before smoothing; text is (2, E) or (B, 2, E)."""
        cosines = [
            two_class_cosines(adapter(patches).float(), text.float())
            for adapter, patches in zip(self.adapters, tokens.patches, strict=True)
        ]
        return anomaly_map(
            cosines, tokens.grid, self.spec.tower.image_size, scale=self.spec.scale, fusion=self.spec.fusion
        )
