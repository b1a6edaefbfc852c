"""Pictures of the panel and of a slice with overlay, outline and legend, for README and extension index.

    python Testing/screenshots.py
    python Testing/screenshots.py /tmp/pictures --volume series_folder --slice 17 --modality MR

Writes to Resources, if no folder is named: `panel.png`, `slice.png`, and both side by side as
`screenshot.png`; `setup.png`, the sections that are folded there; `running.png`, the panel before a
detection and as it goes through a volume; `outputs.png`, its table and the plot; `teach.png`, the section
Teach with the scores of slices that were left out.
Slices are drawn by Slicer's own libraries; the panel by the harness's stand-ins, so fonts and frames differ a
little from Slicer's. Without --volume a head-like phantom is shown, which is no patient.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "Testing"), str(ROOT / "MedAnomalyCLIP")]

PANEL_WIDTH = 400
SECTIONS = ("setup", "inputs", "detect", "display", "outputs", "teach", "advanced")
VIEW_SIZE = 640
GAP = 12


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    from harness import application
    from harness.scripted_module import HostedModule
    from harness.slice_views import slice_views

    application.start()
    view = slice_views()["Red"]
    view.node.SetDimensions(VIEW_SIZE, VIEW_SIZE, 1)
    view.open_window()
    volume_node, place = phantom_node() if arguments.volume is None else loaded_node(arguments)
    view.show(volume_node)
    view.node.RotateToVolumePlane(volume_node)
    view.logic.FitSliceToAll()
    view.node.JumpSlice(*place)
    view.tilt(arguments.tilt)

    panel = HostedModule(ROOT / "MedAnomalyCLIP" / "MedAnomalyCLIP.py").make_panel()
    if arguments.stand_in:
        from harness.fake_detector import BrightnessDetector

        panel.logic.detectorFactory = lambda folder: BrightnessDetector()
    open_only(panel, "inputs", "detect", "outputs")
    idle = picture_of(panel, arguments.folder / "running.png")
    open_only(panel, "inputs", "detect", "display")
    detect(panel, arguments.threshold)
    panel_picture = picture_of(panel, arguments.folder / "panel.png")
    view.picture(arguments.folder / "slice.png")
    join(panel_picture, arguments.folder / "slice.png", arguments.folder / "screenshot.png")
    print(panel.ui.scoreLabel.text, "|", panel.ui.resultLabel.text.replace("\n", " | "))

    open_only(panel, "inputs", "detect", "outputs")
    panel.ui.rangeButton.click()
    while panel.logic.isRunning() and panel.ui.rangeProgress.value < panel.ui.rangeProgress.maximum // 2:
        process_events(0.02)
    panel.logic.poll, poll = lambda: True, panel.logic.poll  # it waits for its picture
    picture_of(panel, arguments.folder / "running.png")
    join(idle, arguments.folder / "running.png", arguments.folder / "running.png")
    panel.logic.poll = poll
    while panel.logic.isRunning():
        process_events(0.05)
    open_only(panel, "outputs")
    panel.ui.nextButton.click()
    panel_picture = picture_of(panel, arguments.folder / "outputs.png")
    plot = arguments.folder / ".plot.png"
    draw_plot(panel.ui.resultsTable.mrmlTableNode(), plot)
    join(panel_picture, plot, arguments.folder / "outputs.png")
    plot.unlink()
    teach(panel, volume_node, arguments.folder / "teach.png")
    show_setup(panel).save(str(arguments.folder / "setup.png"))
    panel.cleanup()


def open_only(panel: Any, *names: str) -> None:
    """Fold all sections but these."""
    for name in SECTIONS:
        getattr(panel.ui, f"{name}Section").collapsed = name not in names


def show_setup(panel: Any) -> Any:
    """The sections Setup and Advanced, measured and with a preview."""
    ui = panel.ui
    open_only(panel, "setup", "advanced")
    for button in (ui.measureButton, ui.previewButton):
        process_events(0.2)
        button.click()
        while not button.enabled:
            process_events(0.05)
    panel.parent.resize(PANEL_WIDTH, panel.parent.layout().heightForWidth(PANEL_WIDTH))
    process_events(0.5)
    return panel.parent.grab()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "Resources", help="where they go")
    parser.add_argument("--volume", type=Path, help="image file or series folder; a phantom if left out")
    parser.add_argument("--modality", help="DICOM code, for files that do not say it")
    parser.add_argument("--slice", type=int, help="slice along K, from 0; the middle one if left out")
    parser.add_argument("--tilt", type=float, default=0.0, help="degrees to tilt the view by")
    parser.add_argument("--threshold", type=float, help="the detector's own if left out")
    parser.add_argument("--stand-in", action="store_true", help="bright is anomalous; no detector needed")
    return parser.parse_args()


def phantom_node() -> tuple[Any, Any]:
    """A head-like phantom with a bright spot, and the middle of that spot in RAS mm."""
    import numpy as np
    from scipy.ndimage import gaussian_filter

    from harness import phantom

    voxels, spot = phantom.head((40, 256, 232))
    voxels = gaussian_filter(voxels.astype(float), (0, 1.2, 1.2)).astype(np.int16)
    matrix = phantom.axial_matrix(voxels.shape, (0.8, 0.8, 4.0))
    node = phantom.add_volume(voxels, matrix, "Phantom (no patient)")
    k, j, i = np.argwhere(spot).mean(axis=0)
    return node, (matrix @ [i, j, k, 1])[:3]


def loaded_node(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """A volume read by our own library, and the middle of the chosen slice in RAS mm."""
    import slicer

    from MedAnomalyCLIPLib.volume import read_volume

    volume = read_volume(arguments.volume, modality=arguments.modality)
    class_name = "vtkMRMLVectorVolumeNode" if volume.is_colour else None
    node = slicer.util.addVolumeFromArray(volume.voxels, volume.ijk_to_ras, "Volume", class_name)
    node.SetAttribute("DICOM.Modality", volume.modality)
    i, j, k = ((size - 1) / 2 for size in volume.size)
    if arguments.slice is not None:
        k = arguments.slice
    return node, (volume.ijk_to_ras @ [i, j, k, 1])[:3]


def detect(panel: Any, threshold: float | None) -> None:
    if threshold is not None:
        panel.ui.thresholdSlider.value = threshold
    panel.ui.detectButton.click()
    while panel.logic.isRunning():
        process_events(0.05)
    process_events(0.2)
    if panel.ui.messageLabel.text:
        raise SystemExit(panel.ui.messageLabel.text)


def picture_of(panel: Any, path: Path) -> Any:
    """The panel as tall as it wants to be."""
    process_events(0.2)
    panel.parent.resize(PANEL_WIDTH, panel.parent.layout().heightForWidth(PANEL_WIDTH))
    panel.parent.show()
    process_events(0.3)
    picture = panel.parent.grab()
    picture.save(str(path))
    return picture


def draw_plot(table: Any, path: Path) -> None:
    """A chart node as VTK's charts draw it; Slicer's plot view, which is one of them, needs its own Qt."""
    import vtk

    from MedAnomalyCLIPLib.scene_table import chart_of

    chart_node = chart_of(table)
    view, chart = vtk.vtkContextView(), vtk.vtkChartXY()
    for number in range(chart_node.GetNumberOfPlotSeriesNodes()):
        series = chart_node.GetNthPlotSeriesNode(number)
        names = [table.GetTable().GetColumnName(c) for c in range(table.GetTable().GetNumberOfColumns())]
        line = chart.AddPlot(vtk.vtkChart.LINE)
        line.SetInputData(
            table.GetTable(), names.index(series.GetXColumnName()), names.index(series.GetYColumnName())
        )
        line.SetColorF(*series.GetColor())
        line.SetWidth(2)
        line.GetPen().SetLineType(series.GetLineStyle())
        line.SetMarkerStyle(series.GetMarkerStyle())
        line.SetLabel(series.GetName())
    chart.SetTitle(chart_node.GetTitle())
    chart.SetShowLegend(chart_node.GetLegendVisibility())
    for axis, title in ((vtk.vtkAxis.BOTTOM, chart_node.GetXAxisTitle()), (0, chart_node.GetYAxisTitle())):
        chart.GetAxis(axis).SetTitle(title)
    view.GetScene().AddItem(chart)
    window = view.GetRenderWindow()
    window.SetOffScreenRendering(1)
    window.SetSize(VIEW_SIZE, VIEW_SIZE * 2 // 3)
    window.SetMultiSamples(0)
    view.GetRenderer().SetBackground(1, 1, 1)
    window.Render()
    grab = vtk.vtkWindowToImageFilter()
    grab.SetInput(window)
    writer = vtk.vtkPNGWriter()
    writer.SetFileName(str(path))
    writer.SetInputConnection(grab.GetOutputPort())
    writer.Write()


def teach(panel: Any, volume_node: Any, path: Path) -> None:
    """Teach with every second slice, and draw the section with the scores before anything is kept."""
    ui = panel.ui
    open_only(panel, "teach")
    ui.teachVolumeSelector.setCurrentNode(volume_node)
    ui.teachStepSpin.value = 2
    ui.teachNameEdit.text = "1.5T T2, head coil"
    ui.teachAddRangeButton.click()
    while not ui.teachButton.enabled:  # until all slices are added
        process_events(0.05)
    ui.teachButton.click()
    while panel.logic.isTeaching():
        process_events(0.05)
    panel.parent.resize(PANEL_WIDTH, panel.parent.layout().heightForWidth(PANEL_WIDTH))
    process_events(0.5)
    panel.parent.grab().save(str(path))


def process_events(seconds: float) -> None:
    from harness.pythonqt import application

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        application.processEvents()
        time.sleep(0.01)


def join(panel_picture: Any, slice_path: Path, path: Path) -> None:
    """Panel and slice side by side, on one background."""
    from PySide6.QtGui import QColor, QPainter, QPixmap

    slice_picture = QPixmap(str(slice_path))
    width = panel_picture.width() + slice_picture.width() + 3 * GAP
    joined = QPixmap(width, max(panel_picture.height(), slice_picture.height()) + 2 * GAP)
    joined.fill(QColor("#d8dbe0"))
    painter = QPainter(joined)
    painter.drawPixmap(GAP, GAP, panel_picture)
    painter.drawPixmap(panel_picture.width() + 2 * GAP, GAP, slice_picture)
    painter.end()
    joined.save(str(path))


if __name__ == "__main__":
    main()
