"""Patch features and a text bank in, anomaly maps and image scores out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def two_class_cosines(features: Tensor, text: Tensor) -> Tensor:
    """Cosine of each patch with the normal and the abnormal text feature.

    Shapes:
        features: (B, N, E), any length.
        text: (2, E) or (B, 2, E), unit length; normal first.
        returns: (B, 2, N).
    """
    text = text.expand(features.shape[0], -1, -1) if text.ndim == 2 else text
    lengths = torch.linalg.vector_norm(features, dim=-1).clamp(min=1e-12)
    return text @ features.mT / lengths[:, None]


def anomaly_map(
    cosines: Sequence[Tensor],
    grid: tuple[int, int],
    size: int,
    *,
    scale: float,
    fusion: str,
    enlarged: str = "logits",
) -> Tensor:
    """Probability of "abnormal" at each pixel of the network's input, fused over taps.

    Args:
        cosines: L times (B, 2, N), N = h * w.
        grid: (h, w).
        size: S, side of the input in pixels.
        scale: 1 / temperature.
        fusion: "mean_then_softmax" averages logits over taps (MediCLIP's code); "softmax_then_mean" averages
            probabilities (MediCLIP's paper; MVFA up to the factor L).
        enlarged: what is brought to pixels, bilinear: "logits" before the softmax, corners aligned (MVFA,
            MediCLIP, AdaCLIP and those built on them), or "probabilities" after it, edges aligned
            (AnomalyCLIP).

    Returns:
        (B, S, S) in [0, 1].
    """
    logits = [scale * c.unflatten(2, grid) for c in cosines]
    if fusion == "mean_then_softmax":
        logits = [torch.stack(logits).mean(0)]
    if enlarged == "probabilities":
        mean = torch.stack([m.softmax(1)[:, 1:] for m in logits]).mean(0)
        return F.interpolate(mean, size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    maps = [enlarge(m, size).softmax(1)[:, 1] for m in logits]
    return torch.stack(maps).mean(0)


def enlarge(maps: Tensor, size: int) -> Tensor:
    """(B, C, h, w) up-sampled to (B, C, size, size), bilinear, corners aligned."""
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=True)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, S, S) maps, edges mirrored; sigma in pixels, 0 for none.

    The same as SciPy's `gaussian_filter`, with which the published systems smooth their maps.
    """
    if sigma <= 0:
        return maps
    radius = min(int(4 * sigma + 0.5), maps.shape[-1])
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for _ in range(2):  # along rows, then, the maps turned, along columns
        lines = F.conv1d(_mirrored(maps, radius).flatten(0, 1)[:, None], kernel.view(1, 1, -1))
        maps = lines.view_as(maps).mT
    return maps


def _mirrored(lines: Tensor, radius: int) -> Tensor:
    """Lines (..., S) with `radius` values more at both ends, c b a | a b c ... x y z | z y x."""
    return torch.cat([lines[..., :radius].flip(-1), lines, lines[..., -radius:].flip(-1)], dim=-1)


def image_score(maps: Tensor, valid: Tensor, rule: str) -> Tensor:
    """One number for each image, from the part of its map that shows the image.

    Shapes:
        maps: (B, S, S).
        valid: (B, S, S) bool, False on padding.
        returns: (B,).
    """
    inside = maps.masked_fill(~valid, 0.0)
    if rule == "max_map":
        return inside.amax((1, 2))
    return inside.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


def mean_patch_score(cosines: Sequence[Tensor], shown: Tensor, scale: float) -> Tensor:
    """Mean probability of "abnormal" over taps and patches, each patch by the share that shows the image.

    Shapes:
        cosines: L times (B, 2, N).
        shown: (B, N), which share of each patch shows the image.
        returns: (B,).
    """
    probability = torch.stack([(scale * c).softmax(1)[:, 1] for c in cosines]).mean(0)
    return (probability * shown).sum(1) / shown.sum(1).clamp(min=1e-6)


def shown_share(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which share of each patch shows the image; (B, S, S) bool to (B, N)."""
    return F.adaptive_avg_pool2d(valid[:, None].float(), grid).flatten(1)
