"""Gaussian intensity change: a blob gets brighter or darker by a smooth random texture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from ..errors import InvalidRequest
from .shapes import Shape, perlin_shape
from .tasks import Painted, Site, check_range, check_task, length_scale


@dataclass(frozen=True)
class GaussIntensityChange:
    """Adds u · T · G(M) inside a blob M (Zhang et al., MediCLIP, MICCAI 2024).

    T is coin-flip noise, blurred and stretched to [0, 1] over the whole image; G(M) is the blob with a
    softened edge; u is the amplitude, positive or negative with equal odds. Imitates lesions that change the
    signal: oedema, opacities, hypoechoic masses.

    Attributes:
        share: how often the task is chosen, relative to the others.
        size: smallest and largest side of the blob's box as fractions of the image's.
        amplitude: range of |u|, as a fraction of the grey range.
        texture_blur: standard deviations of T's blur in pixels of a 224-pixel image, one of them chosen.
        edge_blur: range of the standard deviation of G, likewise.
    """

    share: float = 1.0
    size: tuple[float, float] = (0.3, 0.8)
    amplitude: tuple[float, float] = (0.4, 0.6)
    texture_blur: tuple[float, ...] = (4.0, 7.0)
    edge_blur: tuple[float, float] = (1.0, 4.0)

    def __post_init__(self) -> None:
        check_task(self)
        check_range(self, "amplitude", self.amplitude, 0, 1)
        check_range(self, "edge_blur", self.edge_blur, 0, np.inf)
        if not self.texture_blur or min(self.texture_blur) < 0:
            raise InvalidRequest(
                f"{type(self).__name__}: texture_blur is {self.texture_blur}; give numbers from 0 up"
            )

    def draw_shape(self, dims: tuple[int, int], size: tuple[float, float], rng: np.random.Generator) -> Shape:
        return perlin_shape(dims, size, rng)

    def draw_texture(self, dims: tuple[int, int], scale: float, rng: np.random.Generator) -> np.ndarray:
        """u · T for a whole image: its extreme is u itself, its other end 0.

        Args:
            dims: (rows, columns).
            scale: factor for the blur, which is given for 224 pixels.
            rng: source of all randomness.

        Returns:
            `dims` float32.
        """
        coins = rng.integers(0, 2, size=dims, dtype=np.uint8).astype(np.float32)
        texture = gaussian_filter(coins, scale * self.texture_blur[rng.integers(len(self.texture_blur))])
        texture -= texture.min()
        amplitude = rng.uniform(*self.amplitude) * (1 if rng.random() < 0.5 else -1)
        return texture * np.float32(amplitude / max(float(texture.max()), 1e-12))

    def paint(self, site: Site, support: Sequence[np.ndarray], rng: np.random.Generator) -> Painted:
        """Repaint the box of `site`; `support` is not used."""
        scale = length_scale(site.image)
        mask = site.shape.mask
        texture = self.draw_texture(site.image.shape, scale, rng)[site.box]
        soft = gaussian_filter(mask.astype(np.float32), scale * rng.uniform(*self.edge_blur))
        patch = site.image[site.box]
        return Painted(np.where(mask, np.clip(patch + texture * soft, 0, 1), patch), mask)
