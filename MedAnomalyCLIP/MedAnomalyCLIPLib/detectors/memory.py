"""A memory of normal patches: how far each patch of an image is from the nearest of them."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidRequest
from ..steps import Step, run_steps

CHOOSE = "choose"
"""The stage in which a memory chooses what it keeps."""

ROWS_AT_ONCE = 8192
_CANDIDATES = 1024


class MemoryBank(nn.Module):
    """Unit-length features of normal patches, for each tap.

    The search is exact. It runs in the precision of the queries, a few thousand rows at a time, so that rows
    stored in half precision need no second copy.

    Shapes:
        rows: (L, M, E).
    """

    rows: Tensor

    def __init__(self, taps: int, rows: int, embed_dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(taps, rows, embed_dim, dtype=dtype))

    def fill(self, features: Sequence[Tensor]) -> None:
        """Keep normal features; where there are more than rows, those that cover the others best.

        Args:
            features: L times (K, E), K at least the number of rows, any length.

        Raises:
            InvalidRequest: there are fewer features than rows.
        """
        run_steps(self.filling(features))

    def filling(self, features: Sequence[Tensor]) -> Generator[Step, None, None]:
        """`fill`, in steps of some thousand comparisons each."""
        taps, count = self.rows.shape[:2]
        for tap, (kept, found) in enumerate(zip(self.rows, features, strict=True)):
            if len(found) < count:
                raise InvalidRequest(
                    f"The memory has {count} rows, but the normal images give {len(found)} patches only; "
                    "give more images, or make the memory smaller"
                )
            unit = F.normalize(found.float(), dim=-1)
            if len(unit) > count:
                unit = unit[(yield from coreset_steps(unit, count, tap, taps))]
            kept.copy_(unit)
            yield Step(CHOOSE, (tap + 1) * count, taps * count)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Distance 1 - cosine to the nearest row of the same tap; L times (B, N, E) to L times (B, N)."""
        return [nearest_distance(f, rows) for f, rows in zip(features, self.rows, strict=True)]


def nearest_distance(features: Tensor, rows: Tensor) -> Tensor:
    """1 - cosine of each feature with its nearest row.

    Shapes:
        features: (..., E), any length; rows: (M, E), unit length, of any precision.
        returns: (...).
    """
    queries = F.normalize(features, dim=-1)
    closest = torch.full(queries.shape[:-1], -1.0, device=queries.device, dtype=queries.dtype)
    for some in rows.split(ROWS_AT_ONCE):
        closest = torch.maximum(closest, (queries @ some.to(queries.dtype).T).amax(-1))
    return 1 - closest


def coreset(features: Tensor, count: int) -> Tensor:
    """Indices of features that leave no other far away: each one is the farthest from those before it.

    The greedy k-centre choice of PatchCore (Roth et al., CVPR 2022); the first is the farthest from the mean.
    Distances only shrink, so the farthest of a few candidates is the farthest of all for as long as it is
    farther than the others were when they were last measured; so many choices cost one matrix product.

    Shapes:
        features: (K, E), unit length.
        returns: (count,).
    """
    return run_steps(coreset_steps(features, count))


def coreset_steps(features: Tensor, count: int, tap: int = 0, taps: int = 1) -> Generator[Step, None, Tensor]:
    """`coreset`, in steps; `tap` of `taps` is the how-manieth such choice this one is."""
    distance = 1 - features @ F.normalize(features.mean(0), dim=0)
    chosen = new = [distance.argmax()]
    distance = torch.full_like(distance, float("inf"))
    while len(chosen) < count:
        distance = torch.minimum(distance, nearest_distance(features, features[torch.stack(new)]))
        candidates = distance.topk(min(_CANDIDATES, len(features))).indices
        near, own = distance[candidates], features[candidates]
        others = distance.scatter(0, candidates, -1.0).amax()
        new = []
        while len(chosen) + len(new) < count:
            farthest = near.argmax()
            if new and near[farthest] < others:
                break
            new.append(candidates[farthest])
            near = torch.minimum(near, 1 - own @ own[farthest])
        chosen = chosen + new
        yield Step(CHOOSE, tap * count + len(chosen), taps * count)
    return torch.stack(chosen)
