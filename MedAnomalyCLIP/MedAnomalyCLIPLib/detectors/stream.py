"""What goes into a tower's stream beside its own tokens: prompts, and features from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HybridPrompts(nn.Module):
    """Vectors for the first layers of a tower: learned ones, plus ones that an image's own feature gives.

    The second kind is the same for all layers (Cao et al., AdaCLIP, ECCV 2024, section 3.3).

    Shapes:
        pooled: (B, E) image features.
        returns: for each layer (B, n, D), or (1, n, D) where no image plays a part.
    """

    def __init__(
        self,
        width: int,
        embed_dim: int,
        length: int,
        depth: int,
        *,
        static: bool = True,
        dynamic: bool = True,
    ) -> None:
        super().__init__()
        self.depth = depth
        self.static = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn(length, width)) for _ in range(depth if static else 0)
        )
        self.dynamic = nn.ModuleList(nn.Linear(embed_dim, width) for _ in range(length if dynamic else 0))

    def forward(self, pooled: Tensor) -> list[Tensor]:
        if not self.dynamic:
            return [vectors[None] for vectors in self.static]
        own = torch.stack([head(pooled) for head in self.dynamic], dim=1)
        return [own + vectors for vectors in self.static] if self.static else [own] * self.depth


def append_prompts(layer: int, tokens: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Prompts behind all tokens: put there before the first layer, replaced before each of the next.

    Args:
        layer: how many layers the tokens have passed.
        tokens: (B, T, D).
        prompts: for each of the first layers (B or 1, n, D).
    """
    if layer >= len(prompts):
        return tokens
    own = tokens if layer == 0 else tokens[:, : -prompts[layer].shape[1]]
    return torch.cat([own, prompts[layer].expand(len(tokens), -1, -1)], dim=1)


class GatedFusion(nn.Module):
    """Feature maps of another network, let into the patch tokens of one tap through a gate.

    Args:
        channels: of the feature map.
        width: D, of the tokens.
        resize: "grid" brings the map to the patches' grid in two dimensions; "line" stretches its pixels, row
            behind row, along one, as DiffusionCLIP's published code does: rows stay in place, columns do not.
        join: "zero" adds what passes the gate times a weight that starts at 0, so that nothing changes at
            first; "norm" adds it whole and normalises the sum, as published.

    Shapes:
        patches: (B, N, D), N = h * w; features: (B, channels, any height, any width).
        returns: (B, N, D).
    """

    def __init__(self, channels: int, width: int, *, resize: str = "grid", join: str = "zero") -> None:
        super().__init__()
        self.resize = resize
        self.project = nn.Conv2d(channels, width, 1)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Sequential(
            nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width), nn.Sigmoid()
        )
        if join == "norm":
            self.out_norm = nn.LayerNorm(width)
        else:
            self.weight = nn.Parameter(torch.zeros(width))
        self.join = join

    def forward(self, patches: Tensor, features: Tensor, grid: tuple[int, int]) -> Tensor:
        other = self.norm(self._tokens(self.project(features), grid))
        passed = self.gate(torch.cat([patches, other], dim=-1)) * other
        return self.out_norm(patches + passed) if self.join == "norm" else patches + self.weight * passed

    def _tokens(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.resize == "grid":
            return F.interpolate(maps, grid, mode="bilinear", align_corners=False).flatten(2).mT
        return F.interpolate(maps.flatten(2), grid[0] * grid[1], mode="linear", align_corners=False).mT
