"""Random views of a batch of images, so that no scanner's look and no position is learned.

Everything runs on whole batches with torch, on the device of the images. All randomness comes from the
generator handed in, one of the CPU; noise is drawn on the device, with a seed from it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def random_view(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One random crop, turn and change of contrast of each image.

    Shapes:
        images: (B, 3, H, W) uint8.
        returns: (B, 3, side, side) float32 in [0, 1].
    """
    views = random_placement(images.float() / 255.0, side, generator)
    return random_appearance(views, generator)


def random_placement(
    images: Tensor, side: int, generator: torch.Generator, inner: Tensor | None = None
) -> Tensor:
    """Images at places of `random_matrices`.

    Shapes:
        images: (B, C, H, W); channels that belong together, as an image and its mask, move together.
        inner: (B,), see `random_matrices`.
        returns: (B, C, side, side).
    """
    return place(images, random_matrices(len(images), generator, inner), side)


def place(images: Tensor, matrices: Tensor, side: int) -> Tensor:
    """Images (B, C, H, W) seen through matrices (B, 2, 3), black beyond their border; (B, C, side, side)."""
    grid = F.affine_grid(matrices.to(images), [*images.shape[:2], side, side], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", align_corners=False)


def random_matrices(count: int, generator: torch.Generator, inner: Tensor | None = None) -> Tensor:
    """Random crops of 40 to 120 % of the area, rotations within 25 degrees, left-right mirrors.

    Shapes:
        inner: (B,) share of each side that the crop is taken from, at the centre, so that padding, which can
            tell a class by a picture's shape, is not seen; None for all.
        returns: (B, 2, 3), for `place`.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    scale = uniform(0.4, 1.2).sqrt()
    aspect = uniform(-0.2, 0.2).exp()
    angle = uniform(-25.0, 25.0) * (math.pi / 180)
    mirror = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    room = (1 - scale).clamp(min=0)
    if inner is not None:
        scale, room = scale * inner, room * inner
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = scale * aspect * angle.cos() * mirror
    matrix[:, 0, 1] = -scale * angle.sin()
    matrix[:, 1, 0] = scale * angle.sin() * mirror
    matrix[:, 1, 1] = scale / aspect * angle.cos()
    matrix[:, 0, 2] = uniform(-1, 1) * room
    matrix[:, 1, 2] = uniform(-1, 1) * room
    return matrix


def random_appearance(images: Tensor, generator: torch.Generator) -> Tensor:
    """What scanners and their settings change in a picture, so that no scanner's look is learned as disease.

    Window, gamma, contrast, slow shading across the picture (bias field), inversion, loss of resolution, blur
    and noise, all random.

    Shapes:
        images: (B, C, S, S) in [0, 1]; so is what is returned.
    """
    count, device = images.shape[0], images.device

    def draw() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator).to(device)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * draw()

    def sometimes(odds: float, changed: Tensor, same: Tensor) -> Tensor:
        return torch.where(draw() < odds, changed, same)

    low, high = uniform(-0.05, 0.12), uniform(0.8, 1.05)
    images = sometimes(0.4, (images - low) / (high - low), images)
    images = images.clamp(0, 1) ** uniform(-0.5, 0.5).exp()
    images = images * uniform(0.7, 1.25) + uniform(-0.08, 0.08)
    shading = torch.randn(count, 1, 3, 3, generator=generator).to(device) * 0.12
    images = images * (1 + F.interpolate(shading, size=images.shape[-2:], mode="bicubic", align_corners=True))
    images = sometimes(0.08, 1 - images, images)
    images = sometimes(0.2, _coarser(images, int(torch.randint(2, 4, (), generator=generator))), images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = sometimes(0.25, blurred, images)
    own = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    noise = torch.randn(count, 1, *images.shape[-2:], generator=own, device=device)
    images = images + noise * uniform(0, 0.04)
    return images.clamp(0, 1)


def _coarser(images: Tensor, factor: int) -> Tensor:
    """What is left of images that were once sampled this many times more coarsely."""
    small = F.interpolate(images, scale_factor=1 / factor, mode="bilinear", antialias=True)
    return F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
