"""CutPaste: a blob of another normal image, turned and scaled, lands where it does not belong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import binary_closing, binary_dilation, binary_fill_holes, map_coordinates

from ..errors import InvalidRequest
from .poisson import poisson_blend
from .shapes import Shape, perlin_shape
from .tasks import INVISIBLE, Painted, Site, check_range, check_task

# The part of a support image that a patch is taken from stays within this share of its sides.
SOURCE_SHARE = 0.8
BLENDS = ("hard", "poisson", "either")
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)


@dataclass(frozen=True)
class SourceTransform:
    """Box of the target to support image: source = matrix @ (target - box corner) + offset, in pixels.

    Attributes:
        matrix: 2x2 rotation times scale.
        offset: (2,) row and column.
    """

    matrix: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True)
class CutPaste:
    """Patch of a normal image pasted into another (Zhang et al., MediCLIP, MICCAI 2024).

    The patch is turned by U(-45°, 45°) and scaled by s or 1/s, s = 1 + Exp(0.1), then pasted as it is
    ("hard", the published code), with seamless gradients ("poisson", the paper), or one of the two at equal
    odds ("either"). Pixels that the paste leaves as they were are not called abnormal; gaps and holes between
    changed ones are. Imitates foreign structure: masses, devices, tissue where it does not belong.

    Attributes:
        share: how often the task is chosen, relative to the others.
        size: smallest and largest side of the blob's box as fractions of the image's.
        blend: "hard", "poisson" or "either".
        rotation: range of the turn in degrees.
        scale_spread: mean of the exponential draw that s adds to 1.
    """

    share: float = 1.0
    size: tuple[float, float] = (0.1, 0.6)
    blend: str = "hard"
    rotation: tuple[float, float] = (-45.0, 45.0)
    scale_spread: float = 0.1

    def __post_init__(self) -> None:
        check_task(self)
        check_range(self, "rotation", self.rotation, -180, 180)
        if self.blend not in BLENDS:
            raise InvalidRequest(f"CutPaste: blend is {self.blend!r}; choose one of {', '.join(BLENDS)}")
        if not self.scale_spread >= 0:
            raise InvalidRequest(f"CutPaste: scale_spread is {self.scale_spread}; it cannot be negative")

    def draw_shape(self, dims: tuple[int, int], size: tuple[float, float], rng: np.random.Generator) -> Shape:
        return perlin_shape(dims, size, rng)

    def draw_transform(
        self, box: tuple[int, int], source_dims: tuple[int, int], rng: np.random.Generator
    ) -> SourceTransform:
        """Where in a support image a patch comes from.

        Args:
            box: (rows, columns) of the patch.
            source_dims: (rows, columns) of the support image.
            rng: source of all randomness.
        """
        angle = np.deg2rad(rng.uniform(*self.rotation))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        largest = np.min(SOURCE_SHARE * np.array(source_dims) / _extent(turn, box)[1])
        growth = 1 + rng.exponential(self.scale_spread)
        matrix = turn * min(growth if rng.random() < 0.5 else 1 / growth, largest)
        low, extent = _extent(matrix, box)
        room = np.maximum(np.array(source_dims) - extent.astype(int), 0)
        return SourceTransform(matrix, rng.integers(0, room, endpoint=True) - low)

    def paint(self, site: Site, support: Sequence[np.ndarray], rng: np.random.Generator) -> Painted:
        """Repaint the box of `site` from one of the `support` images, or from the image itself."""
        origin = np.asarray(support[int(rng.integers(len(support)))]) if len(support) else site.image
        mask = site.shape.mask
        transform = self.draw_transform(mask.shape, origin.shape, rng)
        seamless = self.blend == "poisson" or (self.blend == "either" and rng.random() < 0.5)
        before = site.image[site.box]
        patch = before.copy()
        if seamless:
            patch = _paste_seamlessly(site, origin, transform)
        else:
            patch[mask] = _sample(origin, transform, np.stack(np.nonzero(mask)))
        changed = changed_region(before, patch, mask)
        return Painted(np.where(changed, patch, before), changed)


def changed_region(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Visibly changed pixels of a pasted patch, with gaps closed and holes filled.

    Published as the label 1 - exp(-delta^2 / (2 · 0.2^2)) of the difference in grey levels, closed and
    filled, which is binary but for rounding; here it is binary.

    Args:
        before: (h, w) image in [0, 1].
        after: (h, w) image in [0, 1].
        mask: (h, w) bool, where the patch was pasted.

    Returns:
        (h, w) bool, a part of `mask`.
    """
    changed = np.pad(mask & (np.abs(after - before) > INVISIBLE), 1)
    closed = binary_fill_holes(binary_closing(changed, _EIGHT_NEIGHBOURS))
    return closed[1:-1, 1:-1] & mask


def _paste_seamlessly(site: Site, origin: np.ndarray, transform: SourceTransform) -> np.ndarray:
    """(h, w) the site's box with the source cloned into the shape; the frame around the box takes part."""
    rows, columns = site.box
    top, left = min(rows.start, 1), min(columns.start, 1)
    frame = (slice(rows.start - top, rows.stop + 1), slice(columns.start - left, columns.stop + 1))
    target = site.image[frame]
    mask = np.zeros(target.shape, bool)
    inner = (slice(top, top + site.shape.mask.shape[0]), slice(left, left + site.shape.mask.shape[1]))
    mask[inner] = site.shape.mask

    source = np.zeros(target.shape, np.float32)
    needed = binary_dilation(mask)
    source[needed] = _sample(origin, transform, np.stack(np.nonzero(needed)) - [[top], [left]])
    return np.clip(poisson_blend(target, source, mask)[inner], 0, 1)


def _extent(matrix: np.ndarray, box: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Lowest corner and sides, in whole pixels, of the turned box."""
    corners = matrix @ np.array([[0, 0, box[0], box[0]], [0, box[1], 0, box[1]]], float)
    low = np.floor(corners.min(axis=1))
    return low, np.ceil(corners.max(axis=1)) - low


def _sample(image: np.ndarray, transform: SourceTransform, pixels: np.ndarray) -> np.ndarray:
    """(N,) float32 values for (2, N) pixels of the target's box, by cubic splines from around them."""
    points = transform.matrix @ pixels + transform.offset[:, None]
    limits = np.array(image.shape)
    # A spline's influence fades within a few pixels, so only the neighbourhood is filtered.
    low = np.clip(np.floor(points.min(axis=1)).astype(int) - 6, 0, limits - 1)
    high = np.clip(np.ceil(points.max(axis=1)).astype(int) + 7, low + 1, limits)
    region = np.asarray(image[low[0] : high[0], low[1] : high[1]], np.float32)
    values = map_coordinates(region, points - low[:, None], order=3, mode="mirror")
    return np.clip(values, region.min(), region.max())
