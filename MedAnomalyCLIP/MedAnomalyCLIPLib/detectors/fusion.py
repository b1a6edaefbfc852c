"""Two kinds of evidence, text and memory, brought to one scale and averaged."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RangeFusion(nn.Module):
    """Weighted mean of evidence from text and from memory, each scaled from its own range to [0, 1].

    The ranges are learned from the support set and stored, so that an image's result depends on no other
    test image. (MVFA's published evaluation takes them from the whole test set.)

    Attributes:
        ranges: (2, 2), lowest and highest of text, then of memory.
    """

    ranges: Tensor

    def __init__(self, memory_weight: float) -> None:
        super().__init__()
        self.memory_weight = memory_weight
        self.register_buffer("ranges", torch.tensor([[0.0, 1.0], [0.0, 1.0]]))

    def forward(self, text: Tensor, memory: Tensor) -> Tensor:
        """Evidence of any one shape; the result has it too."""
        scaled = [
            ((value - low) / (high - low)).clamp(0, 1)
            for value, (low, high) in zip((text, memory), self.ranges.to(text.dtype), strict=True)
        ]
        return (1 - self.memory_weight) * scaled[0] + self.memory_weight * scaled[1]

    def learn(self, text: Tensor, memory: Tensor, headroom: float = 1.0) -> None:
        """Take the ranges from evidence on the support set.

        Args:
            text, memory: evidence of any shape.
            headroom: how far the scale reaches, in units of what the support set spans; above 1 where the
                support set shows normal images only, which anomalies exceed.
        """
        for kept, found in zip(self.ranges, (text, memory), strict=True):
            low, span = found.amin(), found.amax() - found.amin()
            kept.copy_(torch.stack([low, low + headroom * span.clamp(min=1e-6)]))
