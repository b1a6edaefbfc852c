"""Shapes of synthetic lesions: image dimensions and a random generator in, a small mask in its own box out.

Two families, as in MediCLIP (Zhang et al., MICCAI 2024): ragged blobs cut from Perlin noise, as in DRAEM
(Zavrtanik et al., ICCV 2021), and sheared, turned ellipses or rectangles, as in Many Tasks Make Light Work
(Baugh et al., MICCAI 2023), whose edge is known analytically.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .perlin import PerlinCell

# A blob is where the noise exceeds this level, and is kept when it fills at least this share of its box.
PERLIN_THRESHOLD = 0.3
PERLIN_COVERAGE = 0.2
# Grid of the cheap trial that sorts out most draws, and how far its coverage may be off the full one.
_TRIAL_SIDE = 28
_TRIAL_MARGIN = 0.03

# No box side falls below this many pixels, however small the image: a mask needs an inside.
MIN_SIDE = 4


@dataclass(frozen=True, eq=False)
class Shape:
    """A lesion's outline in its own box.

    Attributes:
        mask: (h, w) bool.
    """

    mask: np.ndarray


@dataclass(frozen=True, eq=False)
class ConvexShape(Shape):
    """A linearly deformed ellipse or rectangle.

    A point p of the plain shape, measured from its centre, lies at `matrix @ p` from the box's centre.

    Attributes:
        half_sides: (2,) half height and half width of the plain shape in pixels.
        matrix: 2x2, plain shape to box.
        ellipse: whether the plain shape is an ellipse; a rectangle otherwise.
    """

    half_sides: np.ndarray
    matrix: np.ndarray
    ellipse: bool

    def edge_distance(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Distance from a point inside to the edge, along given directions.

        With q = M^-1 o / half_sides and e = M^-1 d / half_sides the shape is the unit disc or square, and
        the distance t solves |q + t e| = 1 in the Euclidean or maximum norm.

        Args:
            origin: (2,) row and column in the box, in pixels, inside the shape.
            directions: (2, N) unit vectors.

        Returns:
            (N,) distances in pixels, not negative.
        """
        centre = (np.array(self.mask.shape) - 1) / 2
        inverse = np.linalg.inv(self.matrix) / self.half_sides[:, None]
        q = (inverse @ (origin - centre))[:, None]
        e = inverse @ directions
        if self.ellipse:
            a = np.sum(e * e, axis=0)
            b = np.sum(q * e, axis=0)
            c = np.sum(q * q) - 1
            return (np.sqrt(np.maximum(b * b - a * c, 0)) - b) / a
        with np.errstate(divide="ignore", invalid="ignore"):
            to_sides = np.where(e == 0, np.inf, (np.sign(e) - q) / e)
        return np.maximum(to_sides.min(axis=0), 0)


def side_bounds(dims: tuple[int, int], size: tuple[float, float]) -> np.ndarray:
    """Bounds of a box's sides in pixels.

    Args:
        dims: (rows, columns) of the image.
        size: smallest and largest side as fractions of the image's.

    Returns:
        (2, 2) int, one row (low, high) for each of height and width.
    """
    bounds = np.rint(np.outer(dims, size)).astype(int)
    return np.maximum(bounds, (MIN_SIDE, MIN_SIDE + 1))


def perlin_shape(dims: tuple[int, int], size: tuple[float, float], rng: np.random.Generator) -> Shape:
    """Ragged blob: one turned cell of Perlin noise, cut at 0.3, redrawn until it fills a fifth of its box.

    Args:
        dims: (rows, columns) of the image.
        size: smallest and largest side of the box as fractions of the image's; sides are uniform integers
            from the smallest to one below the largest.
        rng: source of all randomness.
    """
    bounds = side_bounds(dims, size)
    height, width = (int(side) for side in rng.integers(bounds[:, 0], bounds[:, 1]))
    while True:
        cell = PerlinCell.draw(rng)
        trial = cell.sample(height, width, grid=(min(height, _TRIAL_SIDE), min(width, _TRIAL_SIDE)))
        if np.mean(trial > PERLIN_THRESHOLD) < PERLIN_COVERAGE - _TRIAL_MARGIN:
            continue
        mask = cell.sample(height, width) > PERLIN_THRESHOLD
        if mask.mean() >= PERLIN_COVERAGE:
            return Shape(mask)


def convex_shape(dims: tuple[int, int], size: tuple[float, float], rng: np.random.Generator) -> ConvexShape:
    """Ellipse or rectangle with equal odds, sheared by N(0, 0.2) in both axes and turned by U(-90°, 90°).

    Sides are clip((0.03 + Gamma(2, 0.1)) · image side, low, high). A shape whose turned box exceeds the upper
    bound is scaled down to fit, so boxes can be smaller than the lower bound, and larger than the
    upper one by a pixel of rounding.

    Args:
        dims: (rows, columns) of the image.
        size: smallest and largest side as fractions of the image's.
        rng: source of all randomness.
    """
    bounds = side_bounds(dims, size)
    ellipse = bool(rng.random() < 0.5)
    sides = (0.03 + rng.gamma(2, 0.1, size=2)) * dims
    sides = np.clip(sides, bounds[:, 0], bounds[:, 1]).astype(int)
    shear_rows, shear_columns = rng.normal(scale=0.2, size=2)
    angle = rng.uniform(-np.pi / 2, np.pi / 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1.0, shear_rows], [shear_columns, 1.0]])

    excess = np.max(_box_sides(matrix, sides) / bounds[:, 1])
    if excess > 1:
        matrix = matrix / excess
    box = _box_sides(matrix, sides)

    half_sides = sides / 2
    rows = np.arange(box[0])[:, None] - (box[0] - 1) / 2
    columns = np.arange(box[1])[None, :] - (box[1] - 1) / 2
    inverse = np.linalg.inv(matrix) / half_sides[:, None]
    u = inverse[0, 0] * rows + inverse[0, 1] * columns
    v = inverse[1, 0] * rows + inverse[1, 1] * columns
    mask = u * u + v * v <= 1 if ellipse else np.maximum(np.abs(u), np.abs(v)) <= 1
    return ConvexShape(mask=mask, half_sides=half_sides, matrix=matrix, ellipse=ellipse)


def _box_sides(matrix: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """(2,) int sides of the box, centred on a pixel, that holds the deformed rectangle of `sides`."""
    reach = np.abs(matrix) @ ((sides - 1) / 2)
    return 2 * np.ceil(reach).astype(int) + 1
