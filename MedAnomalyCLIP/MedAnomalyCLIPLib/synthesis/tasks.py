"""What every painting task offers, and the part of the image it works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import InvalidRequest
from .shapes import Shape

# Side of the images for which lengths in pixels (blurs) were published; other sides scale them.
PUBLISHED_SIDE = 224

# Half a grey level of an 8-bit image: a smaller change is no change.
INVISIBLE = 0.5 / 255


@dataclass(frozen=True, eq=False)
class Site:
    """A shape put at its place in an image.

    Attributes:
        image: (H, W) float32 in [0, 1], left untouched.
        shape: the outline to paint.
        corner: row and column of the first pixel of the shape's box; the box lies inside the image.
    """

    image: np.ndarray
    shape: Shape
    corner: tuple[int, int]

    @property
    def box(self) -> tuple[slice, slice]:
        height, width = self.shape.mask.shape
        row, column = self.corner
        return slice(row, row + height), slice(column, column + width)


@dataclass(frozen=True, eq=False)
class Painted:
    """The repainted box of a site.

    Attributes:
        patch: (h, w) float32 in [0, 1], equal to the image outside `mask`.
        mask: (h, w) bool, the pixels to be called abnormal.
    """

    patch: np.ndarray
    mask: np.ndarray


class Task(Protocol):
    """One way of painting a lesion; a frozen dataclass of numbers, so that it is configuration too.

    Attributes:
        share: how often it is chosen, relative to the other tasks.
        size: smallest and largest side of a lesion's box as fractions of the image's.
    """

    @property
    def share(self) -> float: ...

    @property
    def size(self) -> tuple[float, float]: ...

    def draw_shape(
        self, dims: tuple[int, int], size: tuple[float, float], rng: np.random.Generator
    ) -> Shape: ...

    def paint(self, site: Site, support: Sequence[np.ndarray], rng: np.random.Generator) -> Painted: ...


def length_scale(image: np.ndarray) -> float:
    """Factor from lengths published for 224 pixels to lengths in this image."""
    return min(image.shape) / PUBLISHED_SIDE


def check_range(owner: object, name: str, values: tuple[float, float], low: float, high: float) -> None:
    """Refuse a pair that is not low <= first <= second <= high."""
    if len(values) != 2 or not low <= values[0] <= values[1] <= high:
        raise InvalidRequest(
            f"{type(owner).__name__}: {name} is {tuple(values)}; give two numbers from {low} to {high}, "
            "the smaller one first"
        )


def check_task(task: Task) -> None:
    """Refuse a negative share or an impossible size range."""
    if not task.share >= 0:
        raise InvalidRequest(f"{type(task).__name__}: share is {task.share}; it cannot be negative")
    check_range(task, "size", task.size, 0.02, 0.9)
