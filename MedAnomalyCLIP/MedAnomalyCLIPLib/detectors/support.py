"""Fill a detector's memory from a support set, and learn the scales of its evidence from it."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.towers import patch_grid
from ..errors import InvalidRequest
from ..steps import Step, run_steps
from .detector import Aligned, AnomalyDetector, Detection
from .memory import nearest_distance
from .specification import DetectorSpec

NORMAL_ONLY_HEADROOM = 2.0  # anomalies lie above all that normal images show, about as far again
FILLED = ("memory", "map_fusion", "score_fusion")
"""Parts of a detector that a support set fills."""

COMPARE = "compare"
"""The stage in which normal images go through the network and are compared with each other."""
_NO_MEMORY = "This detector has no memory to fill; its specification must give it one"
_TIMED = 8
_ROWS_COMPARED = 2048  # at once; more would leave a processor's cache


class SupportSet(NamedTuple):
    """Images that a detector may look at before it is used.

    Attributes:
        images: (K, 3, S, S), prepared as for detection.
        valid: (K, S, S) bool, False on padding.
        originals: for each image a number that it shares with other views (augmentations) of the same
            original; empty where all differ.
        left_out: (K, K) bool, [i, j] whether j is out of the memory that i is compared with, beside views of
            one original; None where no others are. `neighbours.left_out` makes it.
    """

    images: Tensor
    valid: Tensor
    originals: tuple[int, ...] = ()
    left_out: Tensor | None = None


def with_fitting_memory(spec: DetectorSpec, images: int) -> DetectorSpec:
    """The same detector, its memory with no more rows than so many images have patches."""
    if spec.memory is None:
        raise InvalidRequest(_NO_MEMORY)
    parts = spec.adapter.subdivisions**2 if spec.memory.features == "aligned" else 1
    available = images * (math.prod(patch_grid(spec.tower)) * parts + spec.memory.class_token)
    return replace(spec, memory=replace(spec.memory, rows=min(spec.memory.rows, available)))


def take_over(detector: AnomalyDetector, start: AnomalyDetector) -> None:
    """Give a detector the weights and text of another one; what a support set will fill stays as it is.

    Raises:
        InvalidRequest: the two have other parts, or are of another size.
    """
    filled = FILLED if detector.spec.memory is not None else ()
    state = {key: value for key, value in start.state_dict().items() if key.partition(".")[0] not in filled}
    try:
        odd = detector.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise InvalidRequest(f"The detector to start from is of another size: {error}") from error
    faults = [key for key in odd.missing_keys if not key.startswith(FILLED)] + odd.unexpected_keys
    if faults:
        raise InvalidRequest(
            f"The detector to start from has other parts than the recipe: {', '.join(faults[:3])}"
        )


def remember(
    detector: AnomalyDetector, normal: SupportSet, abnormal: SupportSet | None = None
) -> list[Detection]:
    """Fill the memory with the patches of normal images, and set the ranges of text and memory.

    An image would be its own nearest neighbour. So its evidence for the ranges is measured against a memory
    without it, without other views of it, and without what else the support set leaves out for it. Abnormal
    images, if there are any, set the upper ends.

    Args:
        detector: with a memory in its specification; changed in place.
        normal, abnormal: the support set.

    Returns:
        What the detector says of each normal image when neither it nor what is left out with it is in the
        memory; one image each.

    Raises:
        InvalidRequest: the detector has no memory, the memory has more rows than the images have patches, or
            an image has no other to be compared with.
    """
    return run_steps(remembering(detector, normal, abnormal))


@torch.no_grad()
def remembering(
    detector: AnomalyDetector, normal: SupportSet, abnormal: SupportSet | None = None
) -> Generator[Step, None, list[Detection]]:
    """`remember`, in steps: one for each normal image, then those of the choice of rows."""
    if detector.spec.memory is None:
        raise InvalidRequest(_NO_MEMORY)
    comparison = _Comparison(_left_out(normal).to(normal.images.device))
    seen = []
    for image in normal.images:
        seen.append(detector.align(image[None]))
        rows = memory_rows(detector, seen[-1])
        comparison.add([F.normalize(tap, dim=-1) for tap in rows], detector.remembered(seen[-1]).patches)
        yield Step(COMPARE, len(seen), len(normal.images))
    everything = comparison.rows()
    yield from detector.memory.filling(everything)

    held_out = comparison.distances()
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


class _Comparison:
    """How far each image's patches are from the nearest rows of the images that it is compared with.

    One product of an image's rows with those of the images before it tells both sides; so a memory is never
    rebuilt, and K images cost half of K times K products of one with one.
    """

    def __init__(self, left_out: Tensor) -> None:
        """`left_out` as in `SupportSet`, (K, K), itself and views of it included."""
        self._compared = ~left_out
        self._count = 0
        self._rows: list[Tensor] = []  # for each tap (K, R, E), as far as images were added
        self._closest: list[Tensor] = []  # for each tap (K, N), the highest cosine so far

    def add(self, rows: Sequence[Tensor], patches: Sequence[Tensor]) -> None:
        """Compare the next image with all before it.

        Args:
            rows: L times (R, E), unit length, what the memory keeps of it; its patches are the last of them.
            patches: L times (1, N, E).
        """
        total, place = len(self._compared), self._count
        if place == 0:
            self._rows = [tap.new_empty(total, *tap.shape) for tap in rows]
            self._closest = [
                own.new_full((total, found.shape[1]), -1.0) for own, found in zip(rows, patches, strict=True)
            ]
        for own, kept, closest in zip(rows, self._rows, self._closest, strict=True):
            kept[place] = own
            at_once = max(1, _ROWS_COMPARED // len(own))
            for start in range(0, place, at_once):
                self._compare(kept, closest, place, slice(start, min(start + at_once, place)))
        self._count += 1

    def _compare(self, kept: Tensor, closest: Tensor, place: int, before: slice) -> None:
        own, others = kept[place], kept[before]
        looks, is_looked_at = self._compared[place, before], self._compared[before, place]
        if not (looks.any() or is_looked_at.any()):
            return
        cosines = (own @ others.flatten(0, 1).T).view(len(own), *others.shape[:2])  # (R, images, R)
        patches = closest.shape[1]
        seen = cosines[-patches:].amax(2).masked_fill(~looks, -1.0)
        closest[place] = torch.maximum(closest[place], seen.amax(1))
        shown = cosines.amax(0)[:, -patches:].masked_fill(~is_looked_at[:, None], -1.0)
        closest[before] = torch.maximum(closest[before], shown)

    def rows(self) -> list[Tensor]:
        """All rows, L times (K * R, E)."""
        return [tap.flatten(0, 1) for tap in self._rows]

    def distances(self) -> list[list[Tensor]]:
        """For each image L times (1, N)."""
        return [[1 - tap[place][None] for tap in self._closest] for place in range(self._count)]


def comparison_seconds(detector: AnomalyDetector) -> float:
    """How long it takes on this device to compare one image with one other."""
    patches, embed_dim = math.prod(detector.tower.grid), detector.tower.embed_dim
    own = [detector.text_bank.new_ones(patches, embed_dim) for _ in detector.spec.tower.taps]
    comparison = _Comparison(torch.zeros(_TIMED, _TIMED, dtype=torch.bool, device=own[0].device))
    for _ in range(_TIMED):
        started = time.perf_counter()
        comparison.add(own, [tap[None] for tap in own])
        comparison.distances()[-1][-1].amax().item()  # waits for the device
    return (time.perf_counter() - started) / (_TIMED - 1)


def _left_out(normal: SupportSet) -> Tensor:
    """(K, K) bool: views of one original, and what the set says beside.

    Raises:
        InvalidRequest: an image has nothing to be compared with.
    """
    originals = torch.tensor(normal.originals or range(len(normal.images)))
    out = originals[:, None] == originals
    if normal.left_out is not None:
        out = out | normal.left_out.cpu()
    if len(out) < 2 or out.all(1).any():
        raise InvalidRequest(
            "A memory needs two different normal images, to learn how much they differ; slices of one volume "
            "only differ where they lie apart"
        )
    return out


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
