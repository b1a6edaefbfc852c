"""One picture of what a detector finds and misses: hits, misses and false alarms, with the true outlines.

Records and results in, Pillow image out. Nothing on it tells whose images they are: they are called by
their number in the list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from ..datasets.planes import lesion_mask
from ..datasets.records import ImageRecord
from ..heat import heat_colours
from ..overlay import display_window
from ..result import RESEARCH_USE_ONLY, AnomalyResult
from ..terminology import TERMS

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

OUTCOMES = ("hit", "miss", "false alarm", "correct rejection")
_SHOWN = {
    "hit": ("Hits: abnormal images with the highest scores", True),
    "miss": ("Misses: abnormal images with the lowest scores", False),
    "false alarm": ("False alarms: normal images with the highest scores", True),
}
_TRUTH = (255, 255, 255)
_BACKGROUND, _TEXT, _FAINT = (16, 16, 20), (225, 225, 225), (150, 150, 155)
_SIDE, _GAP, _LINE, _FONT = 150, 10, 20, 14
_OPACITY = 0.55


@dataclass(frozen=True)
class OperatingPoint:
    """The score from which an image counts as found.

    Attributes:
        threshold: image score.
        origin: where it comes from, in words.
    """

    threshold: float
    origin: str

    def outcome(self, record: ImageRecord, result: AnomalyResult) -> str:
        """One of `OUTCOMES`; empty for an image without a label."""
        if record.abnormal is None:
            return ""
        called = result.score >= self.threshold
        return {
            (True, True): "hit",
            (True, False): "miss",
            (False, True): "false alarm",
            (False, False): "correct rejection",
        }[record.abnormal, called]


def contact_sheet(
    records: Sequence[ImageRecord],
    results: Sequence[AnomalyResult],
    point: OperatingPoint,
    *,
    columns: int = 4,
) -> Image:
    """Hits, misses and false alarms in one row each; the sets take turns.

    Each image is shown twice: as it is with the true outline in white, and with the heat above the pixel
    threshold and the outline of the detector's mask.
    """
    from PIL import Image, ImageDraw, ImageFont

    chosen = choose_examples(records, results, point, columns)
    tile_width, tile_height = 2 * _SIDE + 4, _SIDE + _LINE + _GAP
    width = columns * (tile_width + _GAP) + _GAP
    rows = [(title, chosen[outcome]) for outcome, (title, _) in _SHOWN.items()]
    height = _GAP + sum(_LINE + _GAP // 2 + (tile_height if tiles else 0) for _, tiles in rows) + 2 * _LINE
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    top = _GAP
    for title, indices in rows:
        draw.text((_GAP, top), title if indices else f"{title.split(':')[0]}: none", font=font, fill=_TEXT)
        top += _LINE + _GAP // 2
        for column, index in enumerate(indices):
            left = _GAP + column * (tile_width + _GAP)
            for place, picture in enumerate(_pair(records[index], results[index])):
                image = Image.fromarray(picture)
                offset = ((_SIDE - image.width) // 2, (_SIDE - image.height) // 2)
                sheet.paste(image, (left + place * (_SIDE + 4) + offset[0], top + offset[1]))
            words = f" · image {index + 1} · score {results[index].score:.2f}"
            name = _shortened(records[index].set, tile_width - font.getlength(words), font)
            draw.text((left, top + _SIDE + 2), name + words, font=font, fill=_FAINT)
        top += tile_height if indices else 0
    words = f"White: outline of the lesion. Turquoise and heat: found, from {results[0].threshold:.2f} up."
    draw.text((_GAP, top), words, font=font, fill=_TEXT)
    limit = f"An image counts as found from score {point.threshold:.2f} up, {point.origin}."
    draw.text((_GAP, top + _LINE), f"{limit} {RESEARCH_USE_ONLY}", font=font, fill=_FAINT)
    return sheet


def choose_examples(
    records: Sequence[ImageRecord], results: Sequence[AnomalyResult], point: OperatingPoint, count: int
) -> Mapping[str, list[int]]:
    """For hits, misses and false alarms, the indices of the most extreme images; the sets take turns."""
    chosen = {}
    for outcome, (_, highest_first) in _SHOWN.items():
        found = [i for i, r in enumerate(records) if point.outcome(r, results[i]) == outcome]
        found.sort(key=lambda i: (-results[i].score if highest_first else results[i].score, i))
        seen: dict[str, int] = {}
        turns = []
        for i in found:
            seen[records[i].set] = seen.get(records[i].set, 0) + 1
            turns.append((seen[records[i].set], i))
        order = sorted(range(len(found)), key=lambda k: turns[k][0])
        chosen[outcome] = [found[k] for k in order[:count]]
    return chosen


def _pair(record: ImageRecord, result: AnomalyResult) -> tuple[np.ndarray, np.ndarray]:
    """Two (h, w, 3) uint8 pictures that fit a tile: with the true outline, and with what was found."""
    from PIL import Image

    row_mm, column_mm = result.plane.spacing
    rows, columns = result.plane.shape
    scale = _SIDE / max(rows * row_mm, columns * column_mm)
    size = max(1, round(columns * column_mm * scale)), max(1, round(rows * row_mm * scale))

    def fitted(array: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return np.array(Image.fromarray(array).resize(size, how))

    pixels = fitted(_shown_pixels(result), Image.Resampling.BILINEAR)
    plain = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    heated = plain.astype(np.float32)
    found = fitted(result.mask.astype(np.float32), Image.Resampling.BOX) > 0
    levels = fitted(result.map.astype(np.float32), Image.Resampling.BILINEAR).clip(result.threshold, 1)
    heat = heat_colours(256)[np.rint(levels * 255).astype(np.intp)]
    heated[found] += _OPACITY * (heat[found] - heated[found])
    heated[_edge(found)] = TERMS.colour
    truth = lesion_mask(record, result.plane)
    if truth is not None:
        outlined = fitted(truth.astype(np.float32), Image.Resampling.BOX) > 0
        # Without a dark line along it, white is lost around the bright lesions of many sequences.
        plain[_edge(ndimage.binary_erosion(outlined))] = _BACKGROUND
        plain[_edge(outlined)] = _TRUTH
    return plain, heated.astype(np.uint8)


def _shortened(text: str, width: float, font: FreeTypeFont | ImageFont) -> str:
    """As much of a text as has room."""
    if font.getlength(text) <= width:
        return text
    fitting = (text[:length].rstrip() + "…" for length in range(len(text), 0, -1))
    return next((short for short in fitting if font.getlength(short) <= width), "…")


def _edge(mask: np.ndarray) -> np.ndarray:
    return mask & ~ndimage.binary_erosion(mask)


def _shown_pixels(result: AnomalyResult) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 pixels between the detector's own black and white."""
    pixels = result.plane.pixels
    if pixels.ndim == 3 and pixels.dtype == np.uint8:
        return pixels
    low, high = display_window(result)
    shown = (pixels.astype(np.float64) - low) / max(high - low, np.finfo(np.float64).tiny)
    return np.rint(np.nan_to_num(shown).clip(0, 1) * 255).astype(np.uint8)
