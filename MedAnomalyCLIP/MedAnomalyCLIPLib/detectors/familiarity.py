"""How unlike an image is to all that a detector has learned from, whatever is wrong with it.

Mean and spread of a tower's tokens tell what kind of picture it is: scanner, organ, contrast. Far from all
that was learned from, a detector guesses, and should say so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidRequest


class Familiarity(nn.Module):
    """Looks of images that a detector learned from; gives the distance to the nearest.

    Each number of a look is measured in units of its own spread over these images.

    Shapes:
        looks: (B, D), see `look_of`.
        returns: (B,) root mean square difference from the nearest look, 0 and above.
    """

    centre: Tensor
    spread: Tensor
    rows: Tensor

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.register_buffer("rows", torch.zeros(rows, size))

    def fill(self, looks: Tensor) -> None:
        """Keep (K, D) looks, one for each row.

        Raises:
            InvalidRequest: there are more or fewer.
        """
        if len(looks) != len(self.rows):
            raise InvalidRequest(
                f"{len(looks)} images cannot fill {len(self.rows)} places of the familiarity"
            )
        self.centre.copy_(looks.mean(0))
        self.spread.copy_(looks.std(0).clamp(min=1e-4))
        self.rows.copy_((looks - self.centre) / self.spread)

    def forward(self, looks: Tensor) -> Tensor:
        standard = (looks - self.centre) / self.spread
        return torch.cdist(standard, self.rows).amin(1) / looks.shape[1] ** 0.5


def look_of(taps: Sequence[Tensor], shown: Tensor) -> Tensor:
    """Mean and spread of the patch tokens of each tap, over what shows the image, each brought to one size.

    Shapes:
        taps: L times (B, N, D); shown: (B, N), which share of each patch shows the image.
        returns: (B, 2 L D).
    """
    means = [mean_token(patches, shown) for patches in taps]
    spreads = [
        mean_token((patches - mean[:, None]) ** 2, shown).sqrt()
        for patches, mean in zip(taps, means, strict=True)
    ]
    return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in (*means, *spreads)], dim=-1)


def mean_token(patches: Tensor, shown: Tensor) -> Tensor:
    """Mean patch token over what shows the image.

    Shapes:
        patches: (B, N, D); shown: (B, N), which share of each patch shows the image.
        returns: (B, D).
    """
    weight = shown.to(patches.dtype)[..., None]
    return (patches * weight).sum(1) / weight.sum(1).clamp(min=1e-6)
