"""Patch features and a text bank in, anomaly maps and image scores out."""

from __future__ import annotations

import math
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
    return text @ F.normalize(features, dim=-1).mT


def anomaly_map(
    cosines: Sequence[Tensor], grid: tuple[int, int], size: int, *, scale: float, fusion: str
) -> Tensor:
    """Probability of "abnormal" at each pixel of the network's input, fused over taps.

    Logits are up-sampled before the softmax (bilinear, corners aligned, as all four published systems do).

    Args:
        cosines: L times (B, 2, N), N = h * w.
        grid: (h, w).
        size: S, side of the input in pixels.
        scale: 1 / temperature.
        fusion: "mean_then_softmax" averages logits over taps (MediCLIP's code); "softmax_then_mean" averages
            probabilities (MediCLIP's paper; MVFA up to the factor L).

    Returns:
        (B, S, S) in [0, 1].
    """
    logits = [scale * c.unflatten(2, grid) for c in cosines]
    if fusion == "mean_then_softmax":
        logits = [torch.stack(logits).mean(0)]
    maps = [
        F.interpolate(m, size=(size, size), mode="bilinear", align_corners=True).softmax(1)[:, 1]
        for m in logits
    ]
    return torch.stack(maps).mean(0)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, S, S) maps, edges mirrored; sigma in pixels, 0 for none."""
    if sigma <= 0:
        return maps
    radius = min(math.ceil(3 * sigma), maps.shape[-1] - 1)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(maps[:, None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


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
