"""Where the body is in a slice: image in, mask out."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import binary_closing, binary_fill_holes, binary_opening, gaussian_filter, label

# Tissue can be darker than Otsu's threshold (fluid, lung, shadow), air hardly reaches this share of it.
_THRESHOLD_SHARE = 0.4
# A body that is smaller than this share of the frame is not believed, nor is background smaller than this.
_SMALLEST_BODY = 0.02
_SMALLEST_BACKGROUND = 0.02


def foreground(image: np.ndarray) -> np.ndarray:
    """Body or organ in a medical slice; the whole frame where the picture fills it.

    Background is what is dark and reaches the frame's edge: smoothed pixels below 0.4 of Otsu's threshold
    that are connected to the border. What remains is opened and closed to drop labels and bridge gaps, cut
    down to its largest part, and its holes are filled. Images without such background (most ultrasound and
    radiographs) give the whole frame.

    Args:
        image: (H, W) float, any range, dark background.

    Returns:
        (H, W) bool.
    """
    from skimage.filters import threshold_otsu

    whole = np.ones(image.shape, bool)
    low, high = float(image.min()), float(image.max())
    if not high > low:
        return whole
    reach = max(1, round(min(image.shape) / 100))
    smooth = gaussian_filter(np.asarray(image, np.float32), reach)
    dark = smooth < low + _THRESHOLD_SHARE * (threshold_otsu(image) - low)
    background = _touching_border(dark)
    if background.mean() < _SMALLEST_BACKGROUND:
        return whole
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach
    body = binary_opening(~background, disc, iterations=2)
    body = _largest_part(binary_fill_holes(binary_closing(np.pad(body, 3 * reach), disc, iterations=3)))
    body = body[3 * reach : -3 * reach, 3 * reach : -3 * reach]
    return body if body.mean() >= _SMALLEST_BODY else whole


def _touching_border(mask: np.ndarray) -> np.ndarray:
    """The parts of `mask` that reach the array's edge."""
    parts, count = label(mask)
    reaching = np.zeros(count + 1, bool)
    for edge in (parts[0], parts[-1], parts[:, 0], parts[:, -1]):
        reaching[edge] = True
    reaching[0] = False
    return reaching[parts]


def _largest_part(mask: np.ndarray) -> np.ndarray:
    parts, count = label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts == sizes.argmax()
