"""The shared core of all detectors: tapped tokens, aligned with text, scored, fused to a map and a score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip.towers import Inject, TappedClipViT, TappedTokens, create_vision_tower
from ..errors import InvalidRequest
from .adapters import LinearAdapter, StreamTokens, TwoHeadAdapter
from .clusters import cluster_feature
from .denoiser import Denoiser
from .familiarity import Familiarity, look_of, mean_token
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
from .stream import GatedFusion, HybridPrompts, append_prompts
from .text import HybridText


class Detection(NamedTuple):
    """What a detector says about B images.

    Attributes:
        map: (B, S, S) in [0, 1], 0 on padding.
        score: (B,) in [0, 1].
        unlikeness: (B,) 0 and above, see `familiarity`; None for detectors that do not know what they learned
            from.
    """

    map: Tensor
    score: Tensor
    unlikeness: Tensor | None = None


class HeadFeatures(NamedTuple):
    """Features of one head in the space shared with text, any length.

    Attributes:
        patches: for each tap (B, N, E).
        classes: for each tap (B, E), of the class token.
    """

    patches: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]


class Remembered(NamedTuple):
    """What a memory is filled with and asked for.

    Attributes:
        patches: for each tap (B, N, size).
        classes: for each tap (B, size).
        grid: (h, w), N = h * w.
    """

    patches: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]
    grid: tuple[int, int]


class Aligned(NamedTuple):
    """What B images look like beside text.

    Attributes:
        segmentation: what the map is made of.
        detection: what a score of patches is made of; the same where an adapter has one head.
        grid: (h, w) of the heads' features; finer than the tower's where adapters divide patches.
        pooled: (B, E) CLIP's own feature of the images.
        text: (2, E) or (B, 2, E) text features beside which they were aligned; None for the stored text bank.
        tokens: what the tower gave, before any denoising, where adapters stand beside its stream.
    """

    segmentation: HeadFeatures
    detection: HeadFeatures
    grid: tuple[int, int]
    pooled: Tensor
    text: Tensor | None = None
    tokens: TappedTokens | None = None


class AnomalyDetector(nn.Module):
    """A tapped CLIP tower, an adapter for each tap, text features, and the parts that its specification adds.

    Shapes:
        images: (B, 3, S, S), normalised; valid: (B, S, S) bool, False on padding; features: for each tap
            (B, channels, any height, any width), of another network, where the specification fuses them;
            text: (2, E) or (B, 2, E) to compare with instead of the stored text features.
        returns: `Detection`.
    """

    text_bank: Tensor
    preset_banks: Tensor
    tower: TappedClipViT

    def __init__(self, spec: DetectorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.tower = create_vision_tower(spec.tower)
        width, embed_dim, taps = self.tower.width, self.tower.embed_dim, len(spec.tower.taps)
        if spec.adapter.kind == "two_heads":
            self.adapters = nn.ModuleList(
                TwoHeadAdapter(width, embed_dim, spec.adapter.residual) for _ in range(taps)
            )
        else:
            parts = spec.adapter.subdivisions
            self.adapters = nn.ModuleList(LinearAdapter(width, embed_dim, parts) for _ in range(taps))
        self.register_buffer("text_bank", torch.zeros(2, embed_dim))
        if spec.presets:
            self.register_buffer("preset_banks", torch.zeros(len(spec.presets), 2, embed_dim))
        if spec.familiarity is not None:
            self.familiarity = Familiarity(spec.familiarity.rows, 2 * taps * width)
        if spec.text.prompts == "hybrid":
            self.text = HybridText(spec.text, spec.tower, embed_dim)
        if spec.visual_prompts is not None:
            self.visual_prompts = HybridPrompts(width, embed_dim, **asdict(spec.visual_prompts))
        if spec.feature_fusion is not None:
            fused = spec.feature_fusion
            self.feature_fusion = nn.ModuleList(
                GatedFusion(channels, width, resize=fused.resize, join=fused.join)
                for channels in fused.channels
            )
        if spec.denoiser is not None:
            self.denoiser = Denoiser(spec.denoiser, taps, width, embed_dim)
        if spec.image_score == "class_and_clusters":
            self.class_head = nn.Linear(embed_dim, embed_dim)
        elif spec.image_score == "class_and_peak":
            self.class_head = nn.Linear(embed_dim + taps * width, embed_dim)
        if spec.memory is not None:
            precision = getattr(torch, spec.memory.precision)
            size = width if spec.memory.features == "tokens" else embed_dim
            self.memory = MemoryBank(taps, spec.memory.rows, size, precision)
            self.map_fusion = RangeFusion(spec.memory.weight)
            self.score_fusion = RangeFusion(spec.memory.weight)

    def forward(
        self,
        images: Tensor,
        valid: Tensor,
        features: Sequence[Tensor] | None = None,
        text: Tensor | None = None,
    ) -> Detection:
        aligned = self.align(images, features, text)
        distances = None if self.spec.memory is None else self.memory(self.remembered(aligned).patches)
        return self.decide(aligned, self.text_features(aligned), valid, distances)

    def decide(
        self, aligned: Aligned, text: Tensor, valid: Tensor, distances: Sequence[Tensor] | None = None
    ) -> Detection:
        """Map and score of aligned images.

        Args:
            aligned: B images.
            text: (2, E) or (B, 2, E).
            valid: (B, S, S) bool, False on padding.
            distances: of their patches to the memory, L times (B, N); None to go by text alone.
        """
        maps = self.map_features(aligned, text)
        if distances is not None:
            maps = self.map_fusion(maps, self.distance_map(distances, self.remembered(aligned).grid))
        maps = smooth(maps, self.spec.smoothing).masked_fill(~valid, 0.0)
        scores = self._scores(maps, aligned, text, valid, distances)
        unlikeness = None
        if self.spec.familiarity is not None:
            unlikeness = self.familiarity(self.look(aligned, valid))
        return Detection(maps, scores, unlikeness)

    def _scores(
        self,
        maps: Tensor,
        aligned: Aligned,
        text: Tensor,
        valid: Tensor,
        distances: Sequence[Tensor] | None,
    ) -> Tensor:
        """(B,) image scores by the specification's rule."""
        rule = self.spec.image_score
        if rule in ("max_map", "mean_map"):
            return image_score(maps, valid, rule)
        if rule == "class_and_clusters":
            return self.class_score(aligned, text, valid)
        scores = self.text_score(aligned, text, valid)
        if distances is not None:
            grid = self.remembered(aligned).grid
            scores = self.score_fusion(scores, self.distance_score(distances, grid, valid))
        if rule == "class_and_peak":
            weight = self.spec.peak_weight
            scores = (1 - weight) * scores + weight * image_score(maps, valid, "max_map")
        return scores

    def text_score(self, aligned: Aligned, text: Tensor, valid: Tensor) -> Tensor:
        """(B,) what text says of whole images, before any memory."""
        if self.spec.image_score == "class_and_peak":
            return self.class_score(aligned, text, valid)
        return self.patch_score(aligned, text, valid)

    def whole_image(self, aligned: Aligned, valid: Tensor) -> Tensor:
        """(B, E + L D) CLIP's own feature and the mean token of each tap, brought to one size."""
        tokens = aligned.tokens
        if tokens is None:
            raise InvalidRequest("Only beside linear adapters can an image's tokens be averaged")
        shown = shown_share(valid, tokens.grid)
        parts = [aligned.pooled, *(mean_token(patches.float(), shown) for patches in tokens.patches)]
        return torch.cat([F.layer_norm(part.float(), part.shape[-1:]) for part in parts], dim=-1)

    def look(self, aligned: Aligned, valid: Tensor) -> Tensor:
        """(B, 2 L D) what images look like, whatever is wrong with them; see `familiarity`."""
        tokens = aligned.tokens
        if tokens is None:
            raise InvalidRequest("Only beside linear adapters can a detector know what it learned from")
        return look_of([patches.float() for patches in tokens.patches], shown_share(valid, tokens.grid))

    def text_features(self, aligned: Aligned) -> Tensor:
        """(2, E) for all images, or (B, 2, E) where each takes part in its text."""
        return self.text_bank if aligned.text is None else aligned.text

    def plain_features(self, images: Tensor) -> Tensor | None:
        """(B, E) features of a pass without prompts, where prompts ask for them; they get no gradient."""
        if self.spec.text.prompts != "hybrid" and self.spec.visual_prompts is None:
            return None
        with torch.no_grad():
            return self.tower(images).pooled

    def align(
        self,
        images: Tensor,
        features: Sequence[Tensor] | None = None,
        text: Tensor | None = None,
        plain: Tensor | None = None,
    ) -> Aligned:
        """The tower's tokens with whatever changes its stream, through denoiser and adapters.

        Args:
            images: (B, 3, S, S).
            features: for each tap (B, channels, any height, any width), where the specification fuses them.
            text: (2, E) or (B, 2, E); None for the detector's own, stored or made for each image.
            plain: (B, E) from `plain_features`, where they are at hand.
        """
        plain = self.plain_features(images) if plain is None else plain
        if text is None and self.spec.text.prompts == "hybrid":
            text = self.text(plain)
        if self.spec.adapter.kind == "linear":
            return self.align_tokens(self.tap(images, features, plain), text)
        taken: list[StreamTokens] = []

        def inject(layer: int, tokens: Tensor) -> Tensor:
            if layer not in self.spec.tower.taps:
                return tokens
            taken.append(self.adapters[len(taken)](tokens))
            return taken[-1].stream

        tapped = self.tower(images, inject)
        segmentation, detection = (
            HeadFeatures(tuple(h[:, 1:].float() for h in head), tuple(h[:, 0].float() for h in head))
            for head in ([t.segmentation for t in taken], [t.detection for t in taken])
        )
        return Aligned(segmentation, detection, tapped.grid, tapped.pooled, text)

    def _prompts_and_features(self, plain: Tensor | None, features: Sequence[Tensor] | None) -> Inject | None:
        """What is put into the stream beside linear adapters, if anything."""
        fused, taps = self.spec.feature_fusion, self.spec.tower.taps
        if fused is not None and (features is None or len(features) != len(taps)):
            raise InvalidRequest(
                f"This detector needs {len(taps)} feature maps beside its images, of another network. Only "
                "from Python can they be handed in: SliceDetector.load(features=...) takes what gives them"
            )
        if self.spec.visual_prompts is None and fused is None:
            return None
        prompts = self.visual_prompts(plain) if self.spec.visual_prompts is not None else []
        grid = self.tower.grid
        end = 1 + grid[0] * grid[1]

        def inject(layer: int, tokens: Tensor) -> Tensor:
            if fused is not None and features is not None and layer in taps:
                tap = taps.index(layer)
                patches = self.feature_fusion[tap](tokens[:, 1:end], features[tap], grid)
                tokens = torch.cat([tokens[:, :1], patches, tokens[:, end:]], dim=1)
            return append_prompts(layer, tokens, prompts)

        return inject

    def tap(
        self, images: Tensor, features: Sequence[Tensor] | None = None, plain: Tensor | None = None
    ) -> TappedTokens:
        """The tower's tokens, for adapters that stand beside its stream; arguments as for `align`."""
        return self.tower(images, self._prompts_and_features(plain, features))

    def align_tokens(self, tokens: TappedTokens, text: Tensor | None = None) -> Aligned:
        """Tapped tokens through denoiser and linear adapters.

        Args:
            tokens: as the tower gave them.
            text: (2, E) or (B, 2, E); None for the stored text bank.

        Raises:
            InvalidRequest: the denoiser needs text that each image takes part in, and none is given.
        """
        seen = tokens
        if self.spec.denoiser is not None:
            if text is None and self.spec.text.prompts == "hybrid":
                raise InvalidRequest("Hand in the images' text beside their tokens: the denoiser looks at it")
            seen = self.denoiser(tokens, self.text_bank if text is None else text)
        adapters: Any = self.adapters
        finer = self.spec.adapter.subdivisions
        patches = tuple(
            adapter.finer(t.float(), tokens.grid).float()
            for adapter, t in zip(adapters, seen.patches, strict=True)
        )
        classes = tuple(adapter(t.float()).float() for adapter, t in zip(adapters, seen.classes, strict=True))
        head = HeadFeatures(patches, classes)
        grid = (finer * tokens.grid[0], finer * tokens.grid[1])
        return Aligned(head, head, grid, tokens.pooled.float(), text, tokens)

    def denoising_loss(self, tokens: TappedTokens, text: Tensor, generator: torch.Generator) -> Tensor:
        """What the denoiser learns from, a scalar; see `Denoiser.loss`.

        Args:
            tokens: as the tower gave them (`Aligned.tokens`); they get no gradient.
            text: (2, E) or (B, 2, E); neither does it.
            generator: of all random numbers.

        Raises:
            InvalidRequest: this detector has no denoiser.
        """
        return self._denoiser().loss(tokens, text, generator)

    def fit_token_statistics(self, batches: Iterable[TappedTokens]) -> None:
        """Learn the mean and spread of the tower's tokens, which the denoiser needs before it is trained.

        Raises:
            InvalidRequest: this detector has no denoiser, or there are no tokens.
        """
        self._denoiser().fit_statistics(batches)

    def _denoiser(self) -> Denoiser:
        if self.spec.denoiser is None:
            raise InvalidRequest("This detector has no denoiser; its specification must give it one")
        return self.denoiser

    def map_tokens(self, tokens: TappedTokens, text: Tensor) -> Tensor:
        """(B, S, S) anomaly map of tapped tokens, before smoothing; text is (2, E) or (B, 2, E)."""
        return self.map_features(self.align_tokens(tokens, text), text)

    def map_features(self, aligned: Aligned, text: Tensor) -> Tensor:
        """(B, S, S) anomaly map from text alone, before smoothing; text is (2, E) or (B, 2, E)."""
        cosines = [two_class_cosines(f, text.float()) for f in self.map_head(aligned).patches]
        return anomaly_map(
            cosines,
            aligned.grid,
            self.spec.tower.image_size,
            scale=self.spec.scale,
            fusion=self.spec.fusion,
            enlarged=self.spec.enlarged,
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

    def class_score(self, aligned: Aligned, text: Tensor, valid: Tensor) -> Tensor:
        """(B,) probability of the class token, mixed with clusters of the most abnormal patches."""
        seen = aligned.pooled
        if self.spec.image_score == "class_and_peak":
            seen = self.whole_image(aligned, valid)
        feature = F.normalize(self.class_head(seen), dim=-1)
        clusters = self.spec.clusters
        if clusters.weight > 0:
            patches = [F.normalize(p, dim=-1) for p in self.map_head(aligned).patches]
            logits = torch.stack([two_class_cosines(p, text) for p in patches]).mean(0) * self.spec.scale
            hidden = shown_share(valid, aligned.grid) == 0
            abnormal = logits.softmax(1)[:, 1].masked_fill(hidden, -1.0)
            gathered = cluster_feature(patches, abnormal, clusters.count)
            feature = F.normalize(clusters.weight * gathered + (1 - clusters.weight) * feature, dim=-1)
        cosines = two_class_cosines(feature[:, None], text)[..., 0]
        return (self.spec.scale * cosines).softmax(1)[:, 1]

    def remembered(self, aligned: Aligned) -> Remembered:
        """What the memory keeps, and compares with."""
        memory, tokens = self.spec.memory, aligned.tokens
        if memory is not None and memory.features == "tokens" and tokens is not None:
            patches, classes = (tuple(t.float() for t in tap) for tap in (tokens.patches, tokens.classes))
            return Remembered(patches, classes, tokens.grid)
        head = self.map_head(aligned)
        return Remembered(head.patches, head.classes, aligned.grid)

    def map_head(self, aligned: Aligned) -> HeadFeatures:
        """The head that map and memory are made of."""
        return aligned.detection if self.spec.adapter.map_head == "detection" else aligned.segmentation
