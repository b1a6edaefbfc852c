"""Rows to a table node and to a plot of the score along the volume.

The table is a view of the rows, made anew when they change; nothing is read back from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import slicer
import vtk
from slicer.i18n import tr as _
from vtk.util.numpy_support import numpy_to_vtk

from .scene_nodes import SOURCE, new_result_node
from .scene_views import Node
from .slice_table import SliceRow

CHART = "MedAnomalyCLIP.Chart"
"""Node reference from a table to the chart of its scores."""

_SCORE_COLOUR = (0.0, 0.45, 0.70)  # told apart from the next one without colour vision too
_LIMIT_COLOUR = (0.84, 0.37, 0.0)


def write_table(node: Node, rows: Sequence[SliceRow], image_threshold: float | None) -> None:
    """Write rows to a table node, and let its plot follow.

    Columns: slice (from 1, as views count), score, percentile, area in mm², highest map value, and where that
    is; a remark where a slice is empty or unlike what the detector was made for; where the detector has one,
    its image threshold, for the plot.
    """
    peaks = np.array([row.peak_ras or (np.nan,) * 3 for row in rows], dtype=float).reshape(-1, 3).round(1)
    columns = {
        _("Slice"): np.array([row.index + 1 for row in rows], dtype=np.int32),
        _("Score"): np.array([row.score for row in rows], dtype=float).round(4),
        _("Percentile"): np.array(
            [np.nan if row.percentile is None else row.percentile for row in rows], dtype=float
        ).round(1),
        _("Area mm²"): np.array([row.area_mm2 for row in rows], dtype=float).round(1),
        _("Peak"): np.array([row.peak for row in rows], dtype=float).round(4),
        _("Peak R"): peaks[:, 0],
        _("Peak A"): peaks[:, 1],
        _("Peak S"): peaks[:, 2],
    }
    if image_threshold is not None:
        columns[_("Image threshold")] = np.full(len(rows), round(image_threshold, 4))
    table = vtk.vtkTable()
    for name, values in columns.items():
        array = numpy_to_vtk(np.ascontiguousarray(values), deep=True)
        array.SetName(name)
        table.AddColumn(array)
    table.AddColumn(_remarks(rows))
    node.SetAndObserveTable(table)
    node.SetUseColumnTitleAsColumnHeader(True)
    node.SetLocked(True)  # a table of measurements is not for typing into
    if rows:
        _write_chart(node, image_threshold is not None)


def _remarks(rows: Sequence[SliceRow]) -> vtk.vtkStringArray:
    """A column of words about slices whose score says little."""
    column = vtk.vtkStringArray()
    column.SetName(_("Remark"))
    for row in rows:
        column.InsertNextValue(_("empty") if row.empty else _("unlike") if row.unlike else "")
    return column


def chart_of(table: Node | None) -> Node | None:
    """The vtkMRMLPlotChartNode of a table's scores; None before the first row."""
    return None if table is None else table.GetNodeReference(CHART)


def _write_chart(table: Node, has_limit: bool) -> None:
    if chart_of(table) is not None:
        return
    source = table.GetNodeReference(SOURCE)
    chart = new_result_node("vtkMRMLPlotChartNode", "chart", source)
    series = _new_series(table, _("Score"), _SCORE_COLOUR)
    series.SetMarkerStyle(series.MarkerStyleCircle)
    chart.AddAndObservePlotSeriesNodeID(series.GetID())
    if has_limit:
        limit = _new_series(table, _("Image threshold"), _LIMIT_COLOUR)
        limit.SetMarkerStyle(limit.MarkerStyleNone)
        limit.SetLineStyle(limit.LineStyleDash)
        chart.AddAndObservePlotSeriesNodeID(limit.GetID())
    chart.SetTitle(_("Anomaly score along the volume"))
    chart.SetXAxisTitle(_("Slice"))
    chart.SetYAxisTitle(_("Score"))
    chart.SetLegendVisibility(has_limit)
    chart.SetGridVisibility(True)
    table.SetNodeReferenceID(CHART, chart.GetID())


def _new_series(table: Node, column: str, colour: tuple[float, float, float]) -> Node:
    series = new_result_node("vtkMRMLPlotSeriesNode", "scores", table.GetNodeReference(SOURCE))
    series.SetName(column)
    series.SetAndObserveTableNodeID(table.GetID())
    series.SetPlotType(series.PlotTypeScatter)
    series.SetXColumnName(_("Slice"))
    series.SetYColumnName(column)
    series.SetColor(*colour)
    return series


def show_chart(chart: Node) -> list[Node]:
    """Show a chart in the layout's plot views, made part of the layout if need be, with points to click.

    Returns:
        the qMRMLPlotViews that show it; none without a window.
    """
    layout = slicer.app.layoutManager()
    if layout is None:
        return []
    slicer.modules.plots.logic().ShowChartInLayout(chart)
    views = []
    for index in range(layout.plotViewCount):
        widget = layout.plotWidget(index)
        node = widget.mrmlPlotViewNode()
        if node is not None and node.GetPlotChartNodeID() == chart.GetID():
            node.SetInteractionMode(node.InteractionModeSelectPoints)
            views.append(widget.plotView())
    return views
