"""The shared core of all detectors: tapped tokens, aligned with text, scored, fused to a map and a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..clip.towers import TappedClipViT, TappedTokens, create_vision_tower
from .adapters import LinearAdapter, StreamTokens, TwoHeadAdapter
from .fusion import RangeFusion
from .memory import MemoryBank
from .scoring import (
    anomaly_map,
    enlarge,
    image_score,
    mean_patch_score,
    shown_share,
    smooth,
    two_class_cosines,
)
from .specification import DetectorSpec


class Detection(NamedTuple):
    """What a detector says about B images.

    Attributes:
        map: (B, S, S) in [0, 1], 0 on padding.
        score: (B,) in [0, 1].
    """

    map: Tensor
    score: Tensor


class HeadFeatures(NamedTuple):
    """Features of one head in the space shared with text, any length.

    Attributes:
        patches: for each tap (B, N, E).
        classes: for each tap (B, E), of the class token.
    """

    patches: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]


class Aligned(NamedTuple):
    """What B images look like beside text.

    Attributes:
        segmentation: what the map is made of.
        detection: what a score of patches is made of; the same where an adapter has one head.
        grid: (h, w) of the patches.
    """

    segmentation: HeadFeatures
    detection: HeadFeatures
    grid: tuple[int, int]


class AnomalyDetector(nn.Module):
    """A tapped CLIP tower, an adapter for each tap, a text bank, and where asked for a memory.

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
        self.adapters = nn.ModuleList(self._create_adapter() for _ in spec.tower.taps)
        self.register_buffer("text_bank", torch.zeros(2, self.tower.embed_dim))
        if spec.memory is not None:
            self.memory = MemoryBank(
                len(spec.tower.taps),
                spec.memory.rows,
                self.tower.embed_dim,
                getattr(torch, spec.memory.precision),
            )
            self.map_fusion = RangeFusion(spec.memory.weight)
            self.score_fusion = RangeFusion(spec.memory.weight)

    def _create_adapter(self) -> nn.Module:
        if self.spec.adapter.kind == "two_heads":
            return TwoHeadAdapter(self.tower.width, self.tower.embed_dim, self.spec.adapter.residual)
        return LinearAdapter(self.tower.width, self.tower.embed_dim)

    def forward(self, images: Tensor, valid: Tensor) -> Detection:
        aligned = self.align(images)
        maps = self.map_features(aligned, self.text_bank)
        if self.spec.memory is not None:
            distances = self.memory(self.map_head(aligned).patches)
            maps = self.map_fusion(maps, self.distance_map(distances, aligned.grid))
        maps = smooth(maps, self.spec.smoothing).masked_fill(~valid, 0.0)
        if self.spec.image_score != "mean_patch":
            return Detection(maps, image_score(maps, valid, self.spec.image_score))
        scores = self.patch_score(aligned, self.text_bank, valid)
        if self.spec.memory is not None:
            scores = self.score_fusion(scores, self.distance_score(distances, aligned.grid, valid))
        return Detection(maps, scores)

    def align(self, images: Tensor) -> Aligned:
        """The tower's tokens with whatever changes its stream, through the adapters; (B, 3, S, S) in."""
        if self.spec.adapter.kind == "linear":
            return self.align_tokens(self.tower(images))
        taken: list[StreamTokens] = []

        def inject(layer: int, tokens: Tensor) -> Tensor:
            if layer not in self.spec.tower.taps:
                return tokens
            taken.append(self.adapters[len(taken)](tokens))
            return taken[-1].stream

        grid = self.tower(images, inject).grid
        return Aligned(
            _split([tap.segmentation for tap in taken]), _split([tap.detection for tap in taken]), grid
        )

    def align_tokens(self, tokens: TappedTokens) -> Aligned:
        """Tokens of a tower that no adapter changed, through the linear adapters."""
        patches, classes = (
            tuple(adapter(t.float()).float() for adapter, t in zip(self.adapters, taps, strict=True))
            for taps in (tokens.patches, tokens.classes)
        )
        head = HeadFeatures(patches, classes)
        return Aligned(head, head, tokens.grid)

    def map_tokens(self, tokens: TappedTokens, text: Tensor) -> Tensor:
        """(B, S, S) anomaly map of tapped tokens, before smoothing; text is (2, E) or (B, 2, E)."""
        return self.map_features(self.align_tokens(tokens), text)

    def map_features(self, aligned: Aligned, text: Tensor) -> Tensor:
        """(B, S, S) anomaly map from text alone, before smoothing; text is (2, E) or (B, 2, E)."""
        cosines = [two_class_cosines(f, text.float()) for f in self.map_head(aligned).patches]
        return anomaly_map(
            cosines, aligned.grid, self.spec.tower.image_size, scale=self.spec.scale, fusion=self.spec.fusion
        )

    def patch_score(self, aligned: Aligned, text: Tensor, valid: Tensor) -> Tensor:
        """(B,) mean probability of the detection head's patches."""
        cosines = [two_class_cosines(f, text.float()) for f in aligned.detection.patches]
        return mean_patch_score(cosines, shown_share(valid, aligned.grid), self.spec.scale)

    def distance_map(self, distances: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """(B, S, S) mean over taps of patches' distances to the memory, L times (B, N)."""
        return enlarge(
            torch.stack(list(distances)).mean(0)[:, None].unflatten(2, grid), self.spec.tower.image_size
        )[:, 0]

    def distance_score(self, distances: Sequence[Tensor], grid: tuple[int, int], valid: Tensor) -> Tensor:
        """(B,) mean distance to the memory over the pixels that show the image."""
        return image_score(self.distance_map(distances, grid), valid, "mean_map")

    def map_head(self, aligned: Aligned) -> HeadFeatures:
        """The head that map and memory are made of."""
        return aligned.detection if self.spec.adapter.map_head == "detection" else aligned.segmentation


def _split(taps: Sequence[Tensor]) -> HeadFeatures:
    """Class token first, then patches; L times (B, 1 + N, E)."""
    return HeadFeatures(tuple(tap[:, 1:].float() for tap in taps), tuple(tap[:, 0].float() for tap in taps))
