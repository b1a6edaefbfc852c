"""Losses on anomaly maps: focal and Dice, as all four published systems use them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SMOOTH = 1e-5


def focal_loss(probability: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """Two-class focal loss on probabilities: mean of -(1 - p_t)^gamma log p_t (Lin et al., ICCV 2017).

    The one-hot target is clamped to [1e-5, 1 - 1e-5] and 1e-5 is added to p_t, as in the published systems.

    Shapes:
        probability: (B, H, W), of "abnormal", in [0, 1]; mask: (B, H, W), 0 or 1.
    """
    mask = mask.clamp(SMOOTH, 1 - SMOOTH)
    right = mask * probability + (1 - mask) * (1 - probability) + SMOOTH
    return (-((1 - right).clamp(min=0) ** gamma) * right.log()).mean()


def dice_loss(probability: Tensor, mask: Tensor) -> Tensor:
    """1 minus the soft Dice overlap of each image, (2 Σpg + 1) / (Σp + Σg + 1), averaged over images.

    Shapes:
        probability, mask: (B, H, W).
    """
    overlap = (probability * mask).sum((1, 2))
    total = probability.sum((1, 2)) + mask.sum((1, 2))
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def map_loss(probability: Tensor, mask: Tensor) -> Tensor:
    """MediCLIP's loss: focal over both classes plus Dice of "abnormal", equal weights."""
    mask = mask.to(torch.float32)
    return focal_loss(probability, mask) + dice_loss(probability, mask)


def image_loss(probability: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of images' probabilities of "abnormal", mean over images.

    Shapes:
        probability, label: (B,), in [0, 1].
    """
    return F.binary_cross_entropy(probability, label.to(probability.dtype))
