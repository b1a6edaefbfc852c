"""Source deformation: tissue is pushed outwards from a point, as by something growing there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates

from .shapes import ConvexShape, convex_shape
from .tasks import Painted, Site, check_range, check_task


def source_radius(distance: np.ndarray, edge: np.ndarray, exponent: float) -> np.ndarray:
    """Radius from which a pixel takes its value: edge · (distance / edge)^exponent.

    Args:
        distance: (N,) distance of the pixel from the deformation's centre.
        edge: (N,) distance from the centre to the shape's edge in the same direction, positive.
        exponent: above 1, so that the tissue near the centre is magnified and the edge stays in place.

    Returns:
        (N,) radius in the unit of `distance`.
    """
    return edge * (distance / edge) ** exponent


@dataclass(frozen=True)
class SourceDeformation:
    """Radial deformation in an ellipse or rectangle (Baugh et al., Many Tasks Make Light Work, MICCAI 2023).

    A pixel at distance d from the centre c, in a direction in which the edge is r away, takes its value
    from c + r · direction · (d / r)^alpha, by cubic splines. c is uniform in the shape and
    alpha = 2^U(0.5, 2), so the middle is magnified, the rim compressed, and nothing is torn. Imitates mass
    effect.

    Attributes:
        share: how often the task is chosen, relative to the others.
        size: smallest and largest side of the shape's box as fractions of the image's.
        log2_exponent: range of log2(alpha).
    """

    share: float = 1.0
    size: tuple[float, float] = (0.2, 0.6)
    log2_exponent: tuple[float, float] = (0.5, 2.0)

    def __post_init__(self) -> None:
        check_task(self)
        check_range(self, "log2_exponent", self.log2_exponent, 0, 8)

    def draw_shape(
        self, dims: tuple[int, int], size: tuple[float, float], rng: np.random.Generator
    ) -> ConvexShape:
        return convex_shape(dims, size, rng)

    def draw_exponent(self, rng: np.random.Generator) -> float:
        return float(2 ** rng.uniform(*self.log2_exponent))

    def paint(self, site: Site, support: Sequence[np.ndarray], rng: np.random.Generator) -> Painted:
        """Repaint the box of `site`, whose shape must be convex; `support` is not used."""
        shape = site.shape
        assert isinstance(shape, ConvexShape)
        pixels = np.stack(np.nonzero(shape.mask)).astype(float)
        centre = pixels[:, rng.integers(pixels.shape[1])]
        sources = deformed_coordinates(shape, pixels, centre, self.draw_exponent(rng))

        before = site.image[site.box]
        values = map_coordinates(before, sources, order=3, mode="mirror")
        patch = before.copy()
        # Splines overshoot at steps; the deformation itself brings in no new grey levels.
        patch[shape.mask] = np.clip(values, before.min(), before.max())
        return Painted(patch, shape.mask)


def deformed_coordinates(
    shape: ConvexShape, pixels: np.ndarray, centre: np.ndarray, exponent: float
) -> np.ndarray:
    """Where pixels of a shape take their values from.

    Args:
        shape: the region that is deformed.
        pixels: (2, N) rows and columns inside the shape's mask.
        centre: (2,) row and column that everything is pushed away from.
        exponent: see `source_radius`.

    Returns:
        (2, N) rows and columns in the shape's box; a pixel at the centre stays there.
    """
    offsets = pixels - centre[:, None]
    distances = np.sqrt(np.sum(offsets * offsets, axis=0))
    directions = offsets / np.maximum(distances, 1e-12)
    moving = distances > 0
    # A pixel on the rim counts as inside the mask but may lie a rounding error beyond the analytic edge.
    edge = np.maximum(shape.edge_distance(centre, directions[:, moving]), distances[moving])
    radii = np.zeros_like(distances)
    radii[moving] = source_radius(distances[moving], edge, exponent)
    return centre[:, None] + radii * directions
