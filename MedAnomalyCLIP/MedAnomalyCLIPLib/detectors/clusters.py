"""The most abnormal patches of an image, gathered in clusters, as one feature of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .memory import coreset

PATCHES_PER_CLUSTER = 5
STEPS = 30


def cluster_feature(patches: Sequence[Tensor], abnormal: Tensor, count: int) -> Tensor:
    """Mean of the centres of the most abnormal patches' clusters (AdaCLIP's hybrid semantic fusion).

    Shapes:
        patches: L times (B, N, E), unit length; abnormal: (B, N) probability.
        returns: (B, E), unit length.
    """
    chosen = abnormal.topk(min(abnormal.shape[1], PATCHES_PER_CLUSTER * count), dim=1).indices
    features = []
    for image, indices in enumerate(chosen):
        selected = torch.stack([tap[image, indices] for tap in patches])  # L, K, E
        labels = k_means(torch.cat(list(selected), dim=-1), count)
        features.append(mean_of_centres(selected.mean(0), labels))
    return F.normalize(torch.stack(features), dim=-1)


def mean_of_centres(features: Tensor, labels: Tensor) -> Tensor:
    """(E,) mean over clusters of the mean of their members; features (K, E), labels (K,)."""
    members = F.one_hot(labels).to(features.dtype)
    members = members[:, members.any(0)]
    return (members.T @ features / members.sum(0)[:, None]).mean(0)


@torch.no_grad()
def k_means(points: Tensor, count: int) -> Tensor:
    """Cluster of each point, (K, F) to (K,).

    Lloyd's iterations from points that lie far from each other, so that the same image always gets the same
    clusters (the published systems start from random ones).
    """
    centres = points[coreset(F.normalize(points, dim=-1), min(count, len(points)))]
    labels = torch.cdist(points, centres).argmin(1)
    for _ in range(STEPS):
        members = F.one_hot(labels, len(centres)).to(points.dtype)
        means = members.T @ points / members.sum(0).clamp(min=1)[:, None]
        centres = torch.where(members.any(0)[:, None], means, centres)
        moved = torch.cdist(points, centres).argmin(1)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels
