"""Fill a detector's memory from a support set, and learn the scales of its evidence from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InvalidRequest
from .detector import Aligned, AnomalyDetector, Detection
from .memory import nearest_distance

NORMAL_ONLY_HEADROOM = 2.0  # anomalies lie above all that normal images show, about as far again


class SupportSet(NamedTuple):
    """Images that a detector may look at before it is used.

    Attributes:
        images: (K, 3, S, S), prepared as for detection.
        valid: (K, S, S) bool, False on padding.
        originals: for each image a number that it shares with other views (augmentations) of the same
            original; empty where all differ.
    """

    images: Tensor
    valid: Tensor
    originals: tuple[int, ...] = ()


@torch.no_grad()
def remember(
    detector: AnomalyDetector, normal: SupportSet, abnormal: SupportSet | None = None
) -> list[Detection]:
    """Fill the memory with the patches of normal images, and set the ranges of text and memory.

    An image would be its own nearest neighbour. So its evidence for the ranges is measured against a memory
    without it and without other views of it. Abnormal images, if there are any, set the upper ends.

    Args:
        detector: with a memory in its specification; changed in place.
        normal, abnormal: the support set.

    Returns:
        What the detector says of each normal image when neither it nor another view of it is in the memory;
        one image each.

    Raises:
        InvalidRequest: the detector has no memory, the memory has more rows than the images have patches, or
            all images are views of one.
    """
    if detector.spec.memory is None:
        raise InvalidRequest("This detector has no memory to fill; its specification must give it one")
    originals = normal.originals or tuple(range(len(normal.images)))
    if len(set(originals)) < 2:
        raise InvalidRequest("A memory needs two different normal images, to learn how much they differ")
    seen = [detector.align(image[None]) for image in normal.images]
    everything = _joined([memory_rows(detector, aligned) for aligned in seen])
    detector.memory.fill(everything)

    held_out = _held_out(detector, seen, originals, everything)
    evidence = [
        _evidence(detector, *found) for found in zip(seen, normal.valid[:, None], held_out, strict=True)
    ]
    if abnormal is not None:
        for image, valid in zip(abnormal.images, abnormal.valid, strict=True):
            aligned = detector.align(image[None])
            distances = _distances(detector, aligned, everything)
            evidence.append(_evidence(detector, aligned, valid[None], distances))
    headroom = NORMAL_ONLY_HEADROOM if abnormal is None else 1.0
    text_map, memory_map, text_score, memory_score = (torch.cat(e) for e in zip(*evidence, strict=True))
    detector.map_fusion.learn(text_map, memory_map, headroom)
    detector.score_fusion.learn(text_score, memory_score, headroom)
    return [
        detector.decide(aligned, detector.text_features(aligned), valid[None], distances)
        for aligned, valid, distances in zip(seen, normal.valid, held_out, strict=True)
    ]


def memory_rows(detector: AnomalyDetector, aligned: Aligned) -> list[Tensor]:
    """What a memory keeps of B images, for each tap (B * N, E), class tokens first where it keeps them."""
    kept = detector.remembered(aligned)
    rows = [patches.flatten(0, 1) for patches in kept.patches]
    if detector.spec.memory is not None and detector.spec.memory.class_token:
        rows = [torch.cat([c, p]) for c, p in zip(kept.classes, rows, strict=True)]
    return rows


def _held_out(
    detector: AnomalyDetector, seen: Sequence[Aligned], originals: Sequence[int], rows: Sequence[Tensor]
) -> list[list[Tensor]]:
    """For each image the distances of its patches to the rows of other originals, for each tap."""
    whose = torch.tensor(originals, device=rows[0].device).repeat_interleave(len(rows[0]) // len(seen))
    distances: dict[int, list[Tensor]] = {}
    for original in dict.fromkeys(originals):
        others = [tap[whose != original] for tap in rows]
        for place, aligned in enumerate(seen):
            if originals[place] == original:
                distances[place] = _distances(detector, aligned, others)
    return [distances[place] for place in range(len(seen))]


def _joined(rows: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Unit-length rows of several images, joined for each tap."""
    return [F.normalize(torch.cat(tap), dim=-1) for tap in zip(*rows, strict=True)]


def _distances(detector: AnomalyDetector, aligned: Aligned, rows: Sequence[Tensor]) -> list[Tensor]:
    """Of B images' patches to rows of each tap, L times (B, N)."""
    patches = detector.remembered(aligned).patches
    return [nearest_distance(f, r) for f, r in zip(patches, rows, strict=True)]


def _evidence(
    detector: AnomalyDetector, aligned: Aligned, valid: Tensor, distances: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map values of text and memory where the image is, and their scores."""
    text, grid = detector.text_features(aligned), detector.remembered(aligned).grid
    return (
        detector.map_features(aligned, text)[valid],
        detector.distance_map(distances, grid)[valid],
        detector.text_score(aligned, text, valid),
        detector.distance_score(distances, grid, valid),
    )
