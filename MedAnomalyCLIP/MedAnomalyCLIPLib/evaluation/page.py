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
    "labels, so an upper value), or brightness, darkness and nearness to the centre. Small numbers are 95% "
    "intervals, left out below ten patients, or ± one standard deviation over draws of support images. "
    "Red and slanted: not clearly above the trivial feature, which is no result."
)
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1e; --faint: #5f5f66; --rule: #ccc;
  --grid: #e2e2e6; --warn: #8a2b00; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #16161a; --ink: #e8e8ea; --faint: #a3a3ab;
  --rule: #46464e; --grid: #303037; --warn: #ff9d73; } }
body { font: 14px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1340px;
  margin: 1.2em auto; padding: 0 1em; overflow-wrap: break-word; }
h1 { font-size: 1.4em; margin: 0; } h2 { font-size: 1.05em; margin: 1.4em 0 .3em; }
.notice { color: var(--warn); font-weight: 600; margin: .2em 0 .6em; } .faint { color: var(--faint); }
.faint p { margin: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .16em 1.6em .16em 0; vertical-align: top; } tbody th { font-weight: 400; }
thead > * > * { border-bottom: 1.5px solid var(--ink); vertical-align: bottom; } td { white-space: nowrap; }
.set th { padding-top: .5em; font-weight: 600; } tbody + tbody .set th { border-top: 1px solid var(--rule); }
.detector { font-weight: 600; } small { font-weight: 400; color: var(--faint); }
.weak { color: var(--warn); font-style: italic; } .weak small { font-style: normal; }
.charts { display: flex; flex-wrap: wrap; gap: 1em; } svg { flex: 1 1 280px; max-width: 380px; min-width: 0;
  height: auto; font: 11px system-ui, sans-serif; } svg text { fill: currentColor; }
svg .title { font-size: 12.5px; font-weight: 600; } svg polyline { fill: none; stroke-width: 1.8; }
svg .grid { stroke: var(--grid); } svg .chance { stroke: #999; stroke-width: 1; stroke-dasharray: 4 3; }
.key span { display: inline-block; margin-right: 1.2em; } .key i { display: inline-block; width: 1.4em;
  height: .22em; margin-right: .4em; vertical-align: middle; }
img { display: block; max-width: 100%; min-width: 760px; }
@media (max-width: 640px) { th, td { padding-right: .6em; } td { font-size: 13px; white-space: normal; }
  td small { display: block; font-size: 11px; } .detector small { white-space: nowrap; } }
@media print { body { font-size: 10px; } h2 { break-after: avoid; } tbody, svg, img { break-inside: avoid; }
  .charts { flex-wrap: nowrap; } svg { flex-basis: 0; } img { min-width: 0; } }
""".strip()


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
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>",
        f'<p class="notice">{escape(RESEARCH_USE_ONLY)}</p>',
        f'<div class="faint">{"".join(f"<p>{escape(fact)}</p>" for fact in facts)}</div>',
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
        f'<div class="scroll"><img alt="Contact sheet of hits, misses and false alarms" src="{sheet}"></div>',
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _table(level: str, measured: Sequence[SetMeasurement], spread: Spread) -> str:
    columns = _COLUMNS[level]
    head = "".join(f'<th scope="col">{escape(FIGURE_NAMES[name])}</th>' for name in columns)
    lines = [f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead>']
    for entry in measured:
        row = entry.row(level)
        if row is None:
            continue
        trivial = {name: _best_trivial(entry.rows, level, name) for name in columns}
        abnormal = f"{entry.abnormal} abnormal" if level == "image" else f"{entry.masks} outlined"
        cells = [
            _cell(row, name, trivial[name], spread.get((entry.name, level), {}).get(name)) for name in columns
        ]
        lines += [
            f'<tbody><tr class="set"><th colspan="{len(columns) + 1}" scope="rowgroup">{escape(entry.name)} ',
            f"<small>{entry.normal} normal and {abnormal} images</small></th></tr>",
            '<tr class="detector"><th scope="row">detector</th>',
            *cells,
            '</tr><tr><th scope="row">best trivial</th>',
            *(_trivial_cell(trivial[name]) for name in columns),
            "</tr></tbody>",
        ]
    return "".join([*lines, "</table></div>"])


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
    colours = {m.name: "currentColor" if m.name == POOLED else colour_of(i) for i, m in enumerate(measured)}
    charts = []
    for key, title, x_label, y_label, x_end in _CURVES:
        series = {m.name: (colours[m.name], m.curves[key]) for m in measured if key in m.curves}
        if series:
            charts.append(line_chart(title, x_label, y_label, series, x_end=x_end, chance=key == "roc"))
    keys = "".join(f'<span><i style="background:{c}"></i>{escape(n)}</span>' for n, c in colours.items())
    return f'<div class="charts">{"".join(charts)}</div><p class="key">{keys}</p>'
