"""Line charts as SVG, small enough to stand inside a page: series of points in, markup out."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import numpy as np

from .metrics import Curve

_WIDTH, _HEIGHT = 300, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 30, 44
_POINTS = 200
# Okabe and Ito's, told apart without colour vision; the colour of the text is for all sets together.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7a00", "#7a5195")


def colour_of(index: int) -> str:
    """The colour of a series by its place."""
    return _COLOURS[index % len(_COLOURS)]


def thinned(curve: Curve) -> Curve:
    """The same curve with at most a few hundred points: the ends, and points evenly spaced along it."""
    x, y = (np.asarray(values, dtype=np.float64) for values in curve)
    if len(x) <= _POINTS:
        return x, y
    way = np.concatenate([[0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    at = np.searchsorted(way, np.linspace(0, way[-1], _POINTS)).clip(0, len(x) - 1)
    kept = np.unique(np.concatenate([[0], at, [len(x) - 1]]))
    return x[kept], y[kept]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, tuple[str, Curve]],
    *,
    x_end: float = 1.0,
    chance: bool = False,
) -> str:
    """An SVG element with axes from 0.

    Args:
        title, x_label, y_label: in words.
        series: for each name, a colour and a curve.
        x_end: right end of the horizontal axis; the vertical one ends at 1.
        chance: whether to draw the diagonal.
    """
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        return f"{_LEFT + wide * x / x_end:.1f},{_TOP + high * (1 - y):.1f}"

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>',
    ]
    for value in _ticks(x_end):
        across = _LEFT + wide * value / x_end
        parts += [
            f'<path class="grid" d="M{across:.1f} {_TOP}v{high}"/>',
            f'<text x="{across:.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{value:.1f}</text>',
        ]
    for value in _ticks(1.0):
        down = _TOP + high * (1 - value)
        parts += [
            f'<path class="grid" d="M{_LEFT} {down:.1f}h{wide}"/>',
            f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{value:.1f}</text>',
        ]
    middle = _TOP + high / 2
    parts += [
        f'<text x="{_LEFT + wide / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    if chance:
        parts.append(f'<polyline class="chance" points="{place(0, 0)} {place(1, 1)}"/>')
    for name, (colour, curve) in series.items():
        points = " ".join(place(x, y) for x, y in zip(*thinned(curve), strict=True))
        parts.append(
            f'<polyline stroke="{colour}" points="{points}"><title>{escape(name)}</title></polyline>'
        )
    return "".join([*parts, "</svg>"])


def _ticks(end: float) -> list[float]:
    """Round numbers from 0 to the end of an axis, which lies at 1 or below."""
    step = 0.2 if end > 0.5 else 0.1
    return [number * step for number in range(round(end / step) + 1)]
