"""Small trainable modules that turn a tower's tokens into features of the space shared with text."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class LinearAdapter(nn.Module):
    """One affine map per token, which is what a 1x1 convolution over the patch grid is.

    MediCLIP has one for each tap (Zhang et al., MediCLIP, MICCAI 2024, section 2.2). With subdivisions, each
    token tells of the parts of its patch too: f x f features of a grid f times as fine (sub-pixel
    convolution, Shi et al., CVPR 2016).

    Shapes:
        tokens: (B, N, D) patch tokens after one transformer layer.
        returns: (B, N, E), the mean of a patch's parts.
    """

    def __init__(self, width: int, embed_dim: int, subdivisions: int = 1) -> None:
        super().__init__()
        self.subdivisions = subdivisions
        self.linear = nn.Linear(width, embed_dim * subdivisions**2)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.linear(tokens)
        return parts if self.subdivisions == 1 else parts.unflatten(-1, (-1, self.subdivisions**2)).mean(-1)

    def finer(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features of all parts, (B, f h * f w, E), of tokens on a grid (h, w)."""
        parts = self.linear(tokens)
        if self.subdivisions == 1:
            return parts
        # A pixel shuffle that keeps each feature's numbers side by side.
        factor, (height, width) = self.subdivisions, grid
        parts = parts.unflatten(2, (-1, factor, factor)).unflatten(1, grid)
        return parts.permute(0, 1, 4, 2, 5, 3).reshape(-1, factor * height * factor * width, parts.shape[3])


class BottleneckAdapter(nn.Module):
    """Two linear maps with a leaky ReLU behind each: down to text-space features, and back up.

    What the first gives is compared with the text bank; what the second gives can go back into the
    transformer's stream (Huang et al., MVFA, CVPR 2024, section 3.2).

    Shapes:
        tokens: (B, T, D).
        returns: features (B, T, E), residual (B, T, D).
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, embed_dim, bias=False)
        self.up = nn.Linear(embed_dim, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        features = F.leaky_relu(self.down(tokens))
        return features, F.leaky_relu(self.up(features))


class StreamTokens(NamedTuple):
    """What a pair of adapters gives at one tap.

    Attributes:
        segmentation, detection: (B, T, E) features of the two heads.
        stream: (B, T, D) tokens that go on into the next layer.
    """

    segmentation: Tensor
    detection: Tensor
    stream: Tensor


class TwoHeadAdapter(nn.Module):
    """A bottleneck for the map and one for the image score; both also change the transformer's stream.

    The stream becomes (1 - 2r) x + r s + r d, with the residuals s and d of the two heads.

    Shapes:
        tokens: (B, T, D) class and patch tokens after one transformer layer.
        returns: `StreamTokens`.
    """

    def __init__(self, width: int, embed_dim: int, residual: float) -> None:
        super().__init__()
        self.residual = residual
        self.segmentation = BottleneckAdapter(width, embed_dim)
        self.detection = BottleneckAdapter(width, embed_dim)

    def forward(self, tokens: Tensor) -> StreamTokens:
        segmentation, back = self.segmentation(tokens)
        detection, back_too = self.detection(tokens)
        stream = (1 - 2 * self.residual) * tokens + self.residual * (back + back_too)
        return StreamTokens(segmentation, detection, stream)
