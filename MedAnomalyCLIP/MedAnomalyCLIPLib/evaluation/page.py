"""The report as one page of HTML that needs no other file: table, curves, contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ..result import RESEARCH_USE_ONLY
from .charts import colour_of, line_chart
from .image_sets import DETECTOR, POOLED, Row, SetMeasurement
from .metrics import SPECIFICITY
from .pixels import PRO_LIMIT

Spread = Mapping[tuple[str, str], Mapping[str, tuple[float, float]]]

FIGURE_NAMES = {
    "auroc": "AUROC",
    "ap": "AP",
    "f1max": "F1-max",
    "sensitivity": f"Sens. at {SPECIFICITY:.0%} spec.",
    "pro": f"PRO (FPR < {PRO_LIMIT:g})",
    "dice": "Dice",
    "dice per image": "Dice per image",
}
_COLUMNS = {
    "image": ("auroc", "ap", "f1max", "sensitivity"),
    "pixel": ("auroc", "ap", "pro", "dice", "dice per image"),
}
_CURVES = (
    ("roc", "ROC, images", "false alarm rate", "sensitivity", 1.0),
    ("pr", "Precision and recall, images", "recall", "precision", 1.0),
    ("pro", "Per-region overlap, pixels", "false positive rate", "mean overlap", PRO_LIMIT),
)
_READING = (
    "Below each detector stands the best that a trivial feature reaches, for each figure by itself: "
    "brightness, contrast, share of dark pixels, shape and size of the picture (direction chosen with the "
    "labels, so an upper value), or brightness, darkness and nearness to the centre. Small numbers are 95 % "
    "intervals, or ± one standard deviation over draws of support images. Red: not clearly above the trivial "
    "feature, which is no result."
)
_STYLE = """
:root { color-scheme: light; }
body { font: 14px/1.4 system-ui, sans-serif; color: #1a1a1e; max-width: 1340px; margin: 1.2em auto; padding: 0 1em; }
h1 { font-size: 1.4em; margin: 0; } h2 { font-size: 1.05em; margin: 1.4em 0 .3em; }
.notice { color: #8a2b00; font-weight: 600; margin: .2em 0 .6em; } .faint { color: #666; }
table { border-collapse: collapse; } th, td { text-align: right; padding: .16em .7em; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
thead th { border-bottom: 1.5px solid #1a1a1e; } tr.detector td { border-top: 1px solid #ccc; font-weight: 600; }
td small { font-weight: 400; color: #666; } td.weak { color: #8a2b00; }
.charts { display: flex; flex-wrap: wrap; gap: 1em; } svg { width: 300px; height: 300px; font: 11px system-ui, sans-serif; }
svg .title { font-size: 12.5px; font-weight: 600; } svg polyline { fill: none; stroke-width: 1.8; }
svg .grid { stroke: #e2e2e6; } svg .chance { stroke: #999; stroke-width: 1; stroke-dasharray: 4 3; }
.key span { margin-right: 1.2em; } .key i { display: inline-block; width: 1.4em; height: .22em; margin-right: .4em; vertical-align: middle; }
img { max-width: 100%; } @media print { body { font-size: 10px; } }
""".strip()  # noqa: E501


def report_page(
    title: str, facts: Sequence[str], measured: Sequence[SetMeasurement], spread: Spread, sheet: str
) -> str:
    """The whole page.

    Args:
        title: of the page.
        facts: lines about the detector, the images and the method, in words.
        measured: what was measured; the sets together last.
        spread: mean and standard deviation over draws of support images, {(set, level): {figure: (mean,
            deviation)}}; empty when there is one detector.
        sheet: the contact sheet as a data URI.
    """
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        f'<p class="notice">{escape(RESEARCH_USE_ONLY)}</p>',
        *(f'<div class="faint">{escape(fact)}</div>' for fact in facts),
        "<h2>Which images are abnormal</h2>",
        _table("image", measured, spread),
    ]
    if any(m.row("pixel") for m in measured):
        parts += ["<h2>Where the lesions are</h2>", _table("pixel", measured, spread)]
    parts += [
        f'<p class="faint">{escape(_READING)}</p>',
        "<h2>Curves</h2>",
        _charts(measured),
        "<h2>Hits, misses, false alarms</h2>",
        f'<img alt="Contact sheet of hits, misses and false alarms" src="{sheet}">',
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _table(level: str, measured: Sequence[SetMeasurement], spread: Spread) -> str:
    columns = _COLUMNS[level]
    head = "".join(f"<th>{escape(FIGURE_NAMES[name])}</th>" for name in columns)
    lines = [f"<table><thead><tr><th>set</th><th></th>{head}</tr></thead><tbody>"]
    for entry in measured:
        row = entry.row(level)
        if row is None:
            continue
        trivial = {name: _best_trivial(entry.rows, level, name) for name in columns}
        images = f"{entry.normal} + {entry.abnormal if level == 'image' else entry.masks} images"
        cells = [
            _cell(row, name, trivial[name], spread.get((entry.name, level), {}).get(name)) for name in columns
        ]
        lines += [
            f'<tr class="detector"><td>{escape(entry.name)} <small>{images}</small></td><td>detector</td>',
            *cells,
            "</tr><tr><td></td><td>best trivial</td>",
            *(_trivial_cell(trivial[name]) for name in columns),
            "</tr>",
        ]
    return "".join([*lines, "</tbody></table>"])


def _cell(row: Row, name: str, trivial: tuple[float, str] | None, spread: tuple[float, float] | None) -> str:
    if name not in row.figures:
        return "<td>–</td>"
    value, low, small = row.figures[name], row.figures[name], ""
    if spread is not None:
        value, low = spread[0], spread[0] - spread[1]
        small = f"± {spread[1]:.2f}"
    elif name in row.intervals:
        low, high = row.intervals[name]
        small = f"{low:.2f}–{high:.2f}"
    weak = ' class="weak"' if trivial is not None and low <= trivial[0] else ""
    return f"<td{weak}>{value:.2f} <small>{small}</small></td>"


def _trivial_cell(trivial: tuple[float, str] | None) -> str:
    if trivial is None:
        return "<td>–</td>"
    return f"<td>{trivial[0]:.2f} <small>{escape(trivial[1])}</small></td>"


def _best_trivial(rows: Sequence[Row], level: str, name: str) -> tuple[float, str] | None:
    others = [r for r in rows if r.level == level and r.ranker != DETECTOR and name in r.figures]
    return max(((r.figures[name], r.ranker) for r in others), default=None)


def _charts(measured: Sequence[SetMeasurement]) -> str:
    colours = {m.name: "#000" if m.name == POOLED else colour_of(i) for i, m in enumerate(measured)}
    charts = []
    for key, title, x_label, y_label, x_end in _CURVES:
        series = {m.name: (colours[m.name], m.curves[key]) for m in measured if key in m.curves}
        if series:
            charts.append(line_chart(title, x_label, y_label, series, x_end=x_end, chance=key == "roc"))
    keys = "".join(f'<span><i style="background:{c}"></i>{escape(n)}</span>' for n, c in colours.items())
    return f'<div class="charts">{"".join(charts)}</div><p class="key">{keys}</p>'
