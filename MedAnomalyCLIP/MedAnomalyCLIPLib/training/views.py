"""The fixed views of a support image that few-shot training learns from: it, turned, shifted and mirrored.

An image with its mask and validity goes in, eleven of each come out, always the same (Huang et al., MVFA,
CVPR 2024).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ANGLES = (-math.pi / 8, -math.pi / 16, math.pi / 16, math.pi / 8)
# In halves of the side: 5 % of it in each direction.
SHIFTS = ((0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1))
VIEW_COUNT = 1 + len(ANGLES) + len(SHIFTS) + 2


def few_shot_views(image: Tensor, mask: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One image as MVFA's few-shot training sees it, with its mask and its validity.

    All three are moved alike, by bilinear interpolation; a pixel belongs to the mask, or is valid, where more
    than half of what it was made from is.

    Shapes:
        image: (C, S, S) float; mask, valid: (S, S), 0 or 1 of any type.
        returns: images (11, C, S, S) float, masks (11, S, S) bool, validity (11, S, S) bool.
    """
    maps = torch.stack([mask, valid]).to(image)
    views = placements(torch.cat([image, maps]))
    return views[:, :-2], views[:, -2] > 0.5, views[:, -1] > 0.5


def placements(planes: Tensor) -> Tensor:
    """As it is, four rotations, four shifts, mirrored left-right, mirrored up-down; reflected at the borders.

    Shapes:
        planes: (C, S, S) float; returns: (11, C, S, S).
    """
    turns = [
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
        for angle in ANGLES
    ]
    shifts = [[[1.0, 0.0, x], [0.0, 1.0, y]] for x, y in SHIFTS]
    matrices = torch.tensor(turns + shifts, dtype=planes.dtype, device=planes.device)
    grid = F.affine_grid(matrices, [len(matrices), *planes.shape], align_corners=False)
    moved = F.grid_sample(
        planes.expand(len(matrices), -1, -1, -1),
        grid,
        mode="bilinear",
        padding_mode="reflection",
        align_corners=False,
    )
    # Interpolation would give these three back with errors of rounding.
    return torch.cat([planes[None], moved, planes.flip(-1)[None], planes.flip(-2)[None]])
