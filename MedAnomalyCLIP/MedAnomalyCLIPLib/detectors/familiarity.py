"""How unlike an image is to all that a detector has learned from, whatever is wrong with it.

The mean of a tower's early tokens tells what kind of picture it is: scanner, organ, contrast. Far from all
that was learned from, a detector guesses, and should say so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidRequest
from .memory import coreset, nearest_distance


class Familiarity(nn.Module):
    """Looks of images that a detector learned from; gives the distance to the nearest.

    Looks are centred on their mean first, since all tokens of a tower share much.

    Shapes:
        looks: (B, D), see `mean_token`.
        returns: (B,) 1 - cosine with the nearest look, in [0, 2].
    """

    centre: Tensor
    rows: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("rows", torch.zeros(rows, width))

    def fill(self, looks: Tensor) -> None:
        """Keep (K, D) looks; where there are more than rows, those that cover the others best.

        Raises:
            InvalidRequest: there are fewer looks than rows.
        """
        if len(looks) < len(self.rows):
            raise InvalidRequest(
                f"There are {len(looks)} looks for {len(self.rows)} places of the familiarity"
            )
        self.centre.copy_(looks.mean(0))
        unit = F.normalize(looks - self.centre, dim=-1)
        self.rows.copy_(unit if len(unit) == len(self.rows) else unit[coreset(unit, len(self.rows))])

    def forward(self, looks: Tensor) -> Tensor:
        return nearest_distance(looks - self.centre, self.rows)


def mean_token(patches: Tensor, shown: Tensor) -> Tensor:
    """Mean patch token over what shows the image.

    Shapes:
        patches: (B, N, D); shown: (B, N), which share of each patch shows the image.
        returns: (B, D).
    """
    weight = shown.to(patches.dtype)[..., None]
    return (patches * weight).sum(1) / weight.sum(1).clamp(min=1e-6)
