"""What a frozen tower gave for images that come again unchanged, so that it runs once for each of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST = 4 * 2**30  # bytes; what comes later is computed each time


class TowerCache:
    """Outputs by image, on the CPU, in the precision they came in.

    Images go through the tower one by one. In a batch their outputs would be rounded differently with each
    batch size, so that a run that goes on after an interruption would not be the one that was interrupted.
    """

    def __init__(self, largest: int = LARGEST) -> None:
        self._kept: dict[tuple[str, int], tuple[Tensor, ...]] = {}
        self._room = largest

    def through(
        self, kind: str, indices: Tensor, compute: Callable[[slice], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Outputs of a batch, kept ones for those of its images that there are such of.

        Args:
            kind: which output.
            indices: (B,) what tells the images.
            compute: gives tensors, without gradients, of as many rows as the part of the batch has.
        """
        rows = [
            self._row((kind, index), slice(place, place + 1), compute)
            for place, index in enumerate(indices.tolist())
        ]
        return tuple(
            torch.stack([tensor.to(indices.device) for tensor in output])
            for output in zip(*rows, strict=True)
        )

    def _row(
        self, key: tuple[str, int], part: slice, compute: Callable[[slice], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        if key in self._kept:
            return self._kept[key]
        row = tuple(output[0] for output in compute(part))
        size = sum(tensor.nbytes for tensor in row)
        if size <= self._room:
            self._kept[key] = tuple(tensor.to("cpu", copy=True) for tensor in row)
            self._room -= size
        return row
