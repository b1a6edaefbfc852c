"""Losses on anomaly maps and image scores: focal and Dice, as all four published systems use them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

SMOOTH = 1e-5
SURE = 1e-7  # what is taken off a probability of 0 or 1, the least that float32 can tell from 1

PixelWeight = Callable[[Tensor], Tensor]


def focal_loss(
    probability: Tensor,
    mask: Tensor,
    gamma: float = 2.0,
    *,
    valid: Tensor | None = None,
    weight: PixelWeight | None = None,
) -> Tensor:
    """Two-class focal loss on probabilities: mean of -(1 - p_t)^gamma log p_t (Lin et al., ICCV 2017).

    The one-hot target is clamped to [1e-5, 1 - 1e-5] and 1e-5 is added to p_t, as in the published systems.

    Args:
        probability: (B, H, W), of "abnormal", in [0, 1].
        mask: (B, H, W), 0 or 1.
        gamma: how little well-recognised pixels count.
        valid: (B, H, W) bool, False where a pixel shows no image and counts nothing; None for all True.
        weight: gives each pixel a factor from its p_t, for example `OverlapWeight`; (B, H, W) to (B, H, W).
    """
    mask = mask.clamp(SMOOTH, 1 - SMOOTH)
    right = mask * probability + (1 - mask) * (1 - probability) + SMOOTH
    terms = -((1 - right).clamp(min=0) ** gamma) * right.log()
    if weight is not None:
        terms = terms * weight(right)
    if valid is None:
        return terms.mean()
    return terms.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)


def dice_loss(probability: Tensor, mask: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """1 minus the soft Dice overlap of each image, (2 Σpg + 1) / (Σp + Σg + 1), averaged over images.

    Shapes:
        probability, mask: (B, H, W); valid: (B, H, W) bool, False where a pixel counts nothing.
    """
    if valid is not None:
        probability, mask = probability.masked_fill(~valid, 0.0), mask.masked_fill(~valid, 0.0)
    overlap = (probability * mask).sum((1, 2))
    total = probability.sum((1, 2)) + mask.sum((1, 2))
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def map_loss(
    probability: Tensor, mask: Tensor, *, valid: Tensor | None = None, weight: PixelWeight | None = None
) -> Tensor:
    """MediCLIP's loss: focal over both classes plus Dice of "abnormal", equal weights.

    Arguments as for `focal_loss`; the mask may be bool.
    """
    mask = mask.to(torch.float32)
    return focal_loss(probability, mask, valid=valid, weight=weight) + dice_loss(
        probability, mask, valid=valid
    )


def image_loss(probability: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of images' probabilities of "abnormal", mean over images; finite at 0 and 1 too.

    Shapes:
        probability, label: (B,), in [0, 1].
    """
    inside = SURE + (1 - 2 * SURE) * probability.float()  # in this form 0 and 1 keep a gradient
    label = label.to(inside.dtype)
    return -(label * inside.log() + (1 - label) * (-inside).log1p()).mean()


class OverlapWeight(nn.Module):
    """Weight of a pixel in the focal loss that follows how well lesions have been outlined so far.

    DiffusionCLIP's "dynamically modulated weight" (there after Yu et al., YOLO-FaceV2, 2022, Slide Loss):
    with μ a running mean of the overlap (IoU) of prediction and mask, never taken below 0.2, a pixel whose
    right class has the probability p_t weighs 1 up to μ - 0.1, e^(1 - μ) between μ - 0.1 and μ, and
    e^(1 - p_t) from μ on. So pixels that are nearly recognised as well as lesions are on average weigh most.
    The published code leaves this loss out of use, and its overlap at a constant 0.5; here it is measured.

    Attributes:
        mean: (), μ, 1 at first.
        updates: (), how many batches have moved it.

    Shapes:
        right: (B, H, W), p_t.
        returns: (B, H, W).
    """

    mean: Tensor
    updates: Tensor

    def __init__(self, decay: float = 0.999, warm_up: float = 2000.0) -> None:
        super().__init__()
        self.decay, self.warm_up = decay, warm_up
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, right: Tensor) -> Tensor:
        level = self.mean.clamp(min=0.2).to(right.dtype)
        above = torch.where(right >= level, (1 - right).exp(), (1 - level).exp())
        return torch.where(right <= level - 0.1, torch.ones_like(right), above)

    @torch.no_grad()
    def observe(self, probability: Tensor, mask: Tensor, valid: Tensor | None = None) -> None:
        """Let a batch move the mean, by `mean_overlap`; one without lesions moves nothing.

        Call it before the batch's loss, as published. Arguments as for `focal_loss`.
        """
        overlap = mean_overlap(probability, mask, valid)
        if overlap is not None:
            self.move(overlap)

    @torch.no_grad()
    def move(self, overlap: Tensor | float) -> None:
        """μ ← d μ + (1 - d) overlap, d = 0.999 (1 - e^(-n / 2000)) at the n-th batch."""
        self.updates += 1
        decay = self.decay * -math.expm1(-int(self.updates) / self.warm_up)
        self.mean.mul_(decay).add_((1 - decay) * overlap)


def mean_overlap(probability: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor | None:
    """Intersection over union of what reaches 0.5 and the mask, mean over the images with a lesion.

    Only valid pixels count; None where no image of the batch shows a lesion. Arguments as for `focal_loss`.
    """
    valid = torch.ones_like(mask, dtype=torch.bool) if valid is None else valid
    found, lesion = (probability >= 0.5) & valid, (mask >= 0.5) & valid
    ill = lesion.any(2).any(1)
    if not ill.any():
        return None
    both = (found & lesion).sum((1, 2))[ill]
    either = (found | lesion).sum((1, 2))[ill]
    return (both / either).mean()
