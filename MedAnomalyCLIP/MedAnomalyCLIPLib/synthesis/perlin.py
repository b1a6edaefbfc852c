"""One cell of Perlin gradient noise, evaluated where it is wanted instead of resampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class PerlinCell:
    """Gradient noise on the unit square, to be turned about the centre of a box of pixels.

    With corner gradients g_ij of unit length and s(t) = 6t^5 - 15t^4 + 10t^3, the noise at (x, y) is
    sqrt(2) · sum_ij s_i(x) s_j(y) g_ij · (x - i, y - j), where s_1 = s and s_0 = 1 - s. Its range is [-1, 1].

    Attributes:
        gradients: (2, 2, 2) unit vector at corner [i, j]; i along rows, j along columns.
        angle: turn of the noise in its box, in radians.
    """

    gradients: np.ndarray
    angle: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> PerlinCell:
        """Gradients in uniform directions, turn uniform within a quarter circle either way."""
        directions = rng.uniform(0, 2 * np.pi, size=(2, 2))
        gradients = np.stack([np.cos(directions), np.sin(directions)], axis=-1)
        return cls(gradients, float(rng.uniform(-np.pi / 2, np.pi / 2)))

    def sample(self, height: int, width: int, grid: tuple[int, int] | None = None) -> np.ndarray:
        """Noise in a box of (height, width) pixels; 0 where the turned square does not reach.

        The square is stretched to the box before it is turned, so elongated boxes hold turned, elongated
        blobs.

        Args:
            height: rows of the box.
            width: columns of the box.
            grid: how many rows and columns to evaluate, evenly spread over the box; every pixel if None.

        Returns:
            (height, width) or `grid` float32.
        """
        rows, columns = grid or (height, width)
        y = np.linspace(-(height - 1) / 2, (height - 1) / 2, rows, dtype=np.float32)[:, None]
        x = np.linspace(-(width - 1) / 2, (width - 1) / 2, columns, dtype=np.float32)[None, :]
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        u = (cos * y + sin * x + np.float32((height - 1) / 2)) / np.float32(height)
        v = (cos * x - sin * y + np.float32((width - 1) / 2)) / np.float32(width)
        reached = (u >= 0) & (u <= (height - 1) / height) & (v >= 0) & (v <= (width - 1) / width)

        g = (np.sqrt(2) * self.gradients).astype(np.float32)
        fade_u, fade_v = _fade(u), _fade(v)
        first = _blend(_ramp(g[0, 0], u, v), _ramp(g[1, 0], u - 1, v), fade_u)
        second = _blend(_ramp(g[0, 1], u, v - 1), _ramp(g[1, 1], u - 1, v - 1), fade_u)
        return np.where(reached, _blend(first, second, fade_v), np.float32(0))


def _fade(t: np.ndarray) -> np.ndarray:
    return t * t * t * (t * (t * 6 - 15) + 10)


def _ramp(gradient: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return gradient[0] * u + gradient[1] * v


def _blend(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return a + (b - a) * weight
