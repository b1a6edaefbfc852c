"""A vision tower that computes in 16 bits, among parts that compute in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .importing import import_open_clip
from .towers import Inject, TappedClipViT, TappedTokens

_QUICK = 1.702


def fold_quick_gelu(tower: TappedClipViT) -> None:
    """Let a tower's x · σ(1.702 x) be computed in one step instead of three, by weights changed in place.

    It is silu(1.702 x) / 1.702, and its two factors go into the layers in front of it and behind it.
    """
    quick = import_open_clip().transformer.QuickGELU
    for block in tower.visual.transformer.resblocks:
        if isinstance(block.mlp.gelu, quick):
            with torch.no_grad():
                block.mlp.c_fc.weight.mul_(_QUICK)
                block.mlp.c_fc.bias.mul_(_QUICK)
                block.mlp.c_proj.weight.div_(_QUICK)
            block.mlp.gelu = nn.SiLU()


class LoweredTower(nn.Module):
    """A `TappedClipViT` whose weights and tokens have 16 bits.

    Images come in and tokens go out, to its taps and to whatever changes its stream, in float32. The whole
    stream has 16 bits, which autocast would bring to float32 and back around each of its normalisations.

    Args:
        tower: changed in place.
        dtype: torch.bfloat16 or torch.float16.
    """

    def __init__(self, tower: TappedClipViT, dtype: torch.dtype) -> None:
        super().__init__()
        fold_quick_gelu(tower)
        # With colours innermost convolutions suit tensor cores, and their output is a row of tokens already.
        self.tower = tower.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype
        self.width, self.embed_dim, self.grid = tower.width, tower.embed_dim, tower.grid

    def forward(self, images: Tensor, inject: Inject | None = None) -> TappedTokens:
        def inject_lowered(layer: int, tokens: Tensor) -> Tensor:
            return tokens if inject is None else inject(layer, tokens.float()).to(self.dtype)

        found = self.tower(images.to(self.dtype), None if inject is None else inject_lowered)
        patches, classes = (tuple(t.float() for t in tap) for tap in (found.patches, found.classes))
        return TappedTokens(patches, classes, found.pooled.float(), found.grid)
