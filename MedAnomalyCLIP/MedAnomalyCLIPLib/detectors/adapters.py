"""Small trainable modules that turn a tower's patch tokens into features of the space shared with text."""

from __future__ import annotations

from torch import Tensor, nn


class LinearAdapter(nn.Module):
    """One affine map per token, which is what a 1x1 convolution over the patch grid is.

    MediCLIP has one for each tap (Zhang et al., MediCLIP, MICCAI 2024, section 2.2).

    Shapes:
        tokens: (B, N, D) patch tokens after one transformer layer.
        returns: (B, N, E).
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens)
