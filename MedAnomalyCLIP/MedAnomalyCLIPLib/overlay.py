"""The picture of a result: the slice as the reader sees it, the heat over it, what the colours mean.

`AnomalyResult` in, Pillow image out. Pixels are square in mm. Colour covers the mask and nothing else, and
one colour always means one anomaly value, so pictures of different slices can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from .heat import heat_colours
from .result import RESEARCH_USE_ONLY, UNLIKE, AnomalyResult
from .terminology import TERMS

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

_LONG_SIDE = (512, 2048)
_OPACITY = 0.5
_BACKGROUND = (16, 16, 20)
_TEXT = (225, 225, 225)
_BAR_TICKS = (0.0, 0.5, 1.0)


def render_overlay(result: AnomalyResult) -> Image:
    """Slice, heat above the threshold, outline of the mask, colour bar, score and threshold in words."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = picture_size(result)
    slice_image = Image.fromarray(_blend(result, width, height))
    # Lettering keeps its size relative to the picture.
    font_size = max(15, max(width, height) // 36)
    font = ImageFont.load_default(font_size)
    line, margin = round(font_size * 1.5), font_size
    header, footer = _header(result), _footer(result)

    bar_width = round(font_size * 4.2)
    text_width = max(round(font.getlength(text)) for text in (header, *footer))
    body_height = max(height, 10 * font_size)
    canvas = Image.new(
        "RGB",
        (
            max(width + bar_width, text_width) + 2 * margin,
            body_height + line * (1 + len(footer)) + 3 * margin,
        ),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin // 2), header, font=font, fill=_TEXT)
    top = margin + line
    left = margin + (canvas.width - 2 * margin - bar_width - width) // 2
    canvas.paste(slice_image, (left, top + (body_height - height) // 2))
    _draw_bar(draw, left + width + font_size, top, font_size, body_height, result.threshold, font)
    for row, text in enumerate(footer):
        draw.text((margin, top + body_height + margin // 2 + row * line), text, font=font, fill=_TEXT)
    return canvas


def picture_size(result: AnomalyResult) -> tuple[int, int]:
    """(width, height) in screen pixels of the slice with square mm pixels, neither tiny nor huge."""
    rows, columns = result.plane.shape
    row_mm, column_mm = result.plane.spacing
    extent = (columns * column_mm, rows * row_mm)
    native = max(extent) / min(row_mm, column_mm)
    scale = min(max(native, _LONG_SIDE[0]), _LONG_SIDE[1]) / max(extent)
    return max(1, round(extent[0] * scale)), max(1, round(extent[1] * scale))


def display_window(result: AnomalyResult) -> tuple[float, float]:
    """(darkest, brightest) pixel value shown: the detector's own window, else the bulk of the values."""
    if result.window is not None:
        return result.window
    shown = result.plane.pixels[result.plane.valid]
    if shown.size == 0:
        return 0.0, 1.0
    low, high = np.percentile(shown.astype(np.float64), (0.5, 99.5))
    return float(low), float(high)


def _blend(result: AnomalyResult, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: the slice, coloured where the mask is."""
    from PIL import Image

    def resized(array: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(array).resize((width, height), resampling))

    grey = resized(_display_pixels(result), Image.Resampling.BICUBIC).astype(np.float32)
    picture = grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, axis=2)
    # A box filter repeats mask pixels when enlarging, and loses none when shrinking.
    mask = resized(result.mask.astype(np.float32), Image.Resampling.BOX) > 0
    values = resized(np.asarray(result.map, dtype=np.float32), Image.Resampling.BILINEAR)
    levels = np.rint(np.clip(values, result.threshold, 1.0) * 255).astype(np.intp)
    heat = heat_colours(256)[levels]
    picture[mask] += _OPACITY * (heat[mask] - picture[mask])
    thickness = max(1, round(max(width, height) / 400))
    inside = ndimage.binary_erosion(mask, iterations=thickness)
    picture[mask & ~inside] = TERMS.colour
    return np.rint(np.clip(picture, 0, 255)).astype(np.uint8)


def _display_pixels(result: AnomalyResult) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 pixels after the window; black where there is no image."""
    plane = result.plane
    pixels = np.where(plane.valid if plane.pixels.ndim == 2 else plane.valid[..., None], plane.pixels, 0)
    if plane.pixels.dtype == np.uint8 and plane.pixels.ndim == 3:
        return pixels.astype(np.uint8)
    low, high = display_window(result)
    shown = (pixels.astype(np.float64) - low) / max(high - low, np.finfo(np.float64).tiny)
    shown = np.rint(np.clip(shown, 0, 1) * 255)
    shown[~plane.valid] = 0
    return shown.astype(np.uint8)


def _draw_bar(
    draw: ImageDraw,
    left: int,
    top: int,
    width: int,
    height: int,
    threshold: float,
    font: FreeTypeFont | ImageFont,
) -> None:
    """Colour bar from 0 (bottom) to 1 (top); dim below the threshold, where the picture shows no heat."""

    def row_of(value: float) -> int:
        return top + round((1 - value) * (height - 1))

    colours = heat_colours(height)[::-1].astype(np.float64)
    values = np.linspace(1, 0, height)
    colours[values < threshold] *= 0.35
    for row, colour in enumerate(np.rint(colours).astype(int)):
        draw.line([(left, top + row), (left + width, top + row)], fill=tuple(map(int, colour)))
    draw.rectangle([left, top, left + width, top + height - 1], outline=_TEXT)
    ticks = [(tick, _TEXT) for tick in _BAR_TICKS if abs(tick - threshold) > 0.06]
    for value, colour in (*ticks, (threshold, TERMS.colour)):
        row = row_of(value)
        draw.line([(left, row), (left + width + width // 4, row)], fill=colour, width=2)
        anchor = "la" if value > 0.97 else "ld" if value < 0.03 else "lm"
        draw.text((left + width + width // 2, row), f"{value:.2f}", font=font, fill=colour, anchor=anchor)


def _header(result: AnomalyResult) -> str:
    words = (result.plane.modality, result.plane.description or "Slice")
    return " · ".join(word for word in words if word)


def _footer(result: AnomalyResult) -> tuple[str, ...]:
    score = f"Anomaly score {result.score:.3f}"
    if result.percentile is not None:
        score += f" · higher than {result.percentile:.0f} % of the detector's normal images"
    # Pillow's own font has no superscript.
    area_mm2 = result.area_mm2 if result.plane.spacing_known else None
    area = area_in_words(area_mm2, int(result.mask.sum())).replace("²", "2")
    found = f"Threshold {result.threshold:.2f} · area at or above it {area}"
    if result.window is not None:
        unit = f" {result.plane.units}" if result.plane.units else ""
        found += f" · window {result.window[0]:.4g} to {result.window[1]:.4g}{unit}"
    detector = f"Detector {result.provenance.bundle} {result.provenance.bundle_version}"
    if result.prompt:
        detector += f" · {result.prompt}"
    warning = (UNLIKE,) if result.is_unlike else ()
    return score, *warning, found, detector, RESEARCH_USE_ONLY


def area_in_words(area_mm2: float | None, pixels: int) -> str:
    """An area with its unit; in pixels when their size in mm is not known."""
    if area_mm2 is None:
        return f"{pixels} px"
    return f"{area_mm2:.0f} mm²" if area_mm2 >= 10 or area_mm2 == 0 else f"{area_mm2:.2g} mm²"
