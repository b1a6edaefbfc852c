"""Slice views without windows: Slicer's own slice logic, and pictures of what it would show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

PRESETS = {"Red": "Axial", "Yellow": "Sagittal", "Green": "Coronal"}
SIZE = (320, 320)  # columns, rows
_MANAGERS = ("vtkMRMLColorLegendDisplayableManager", "vtkMRMLSegmentationsDisplayableManager2D")

_views: dict[str, SliceView] = {}


def slice_views() -> dict[str, SliceView]:
    """Red, Yellow and Green, made once: a slice node added again after a scene was cleared is not in it."""
    if not _views:
        _views.update({name: SliceView(name) for name in PRESETS})
    return _views


class SliceView:
    """One slice view.

    Attributes:
        name: layout name, for example "Red".
        logic: vtkMRMLSliceLogic, also found through slicer.app.applicationLogic().
    """

    def __init__(self, name: str) -> None:
        self.name = name
        application_logic = slicer.app.applicationLogic()
        self.logic = slicer.vtkMRMLSliceLogic()
        self.logic.SetMRMLApplicationLogic(application_logic)
        self.logic.SetMRMLScene(slicer.mrmlScene)
        self.logic.AddSliceNode(name)
        application_logic.GetSliceLogics().AddItem(self.logic)
        self._window: _Window | None = None
        self.reset()

    @property
    def node(self) -> vtk.vtkObject:
        return self.logic.GetSliceNode()

    @property
    def composite(self) -> vtk.vtkObject:
        return self.logic.GetSliceCompositeNode()

    def reset(self) -> None:
        """As after starting Slicer: preset orientation, nothing shown, not linked."""
        self.node.SetOrientation(PRESETS[self.name])
        self.node.SetSliceOffset(0)
        self.node.SetDimensions(*SIZE, 1)
        for layer in ("Background", "Foreground", "Label"):
            getattr(self.composite, f"Set{layer}VolumeID")(None)
        self.composite.SetForegroundOpacity(0.0)
        self.composite.SetLinkedControl(False)
        self.composite.SetHotLinkedControl(False)

    def show(self, volume_node: vtk.vtkObject) -> None:
        """Volume in the background, fitted to the view."""
        self.composite.SetBackgroundVolumeID(volume_node.GetID())
        self.logic.FitSliceToAll()

    def tilt(self, degrees: float) -> None:
        """Turn the plane around its own horizontal axis, through its centre."""
        angle = np.deg2rad(degrees)
        turn = np.eye(4)
        turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        matrix = slicer.util.arrayFromVTKMatrix(self.node.GetSliceToRAS()) @ turn
        slicer.util.updateVTKMatrixFromArray(self.node.GetSliceToRAS(), matrix)
        self.node.UpdateMatrices()

    def pixel_at(self, ras: np.ndarray) -> tuple[int, int]:
        """(row, column) of a picture of this view where a point in RAS mm is shown; row 0 is the top."""
        ras_to_xy = np.linalg.inv(slicer.util.arrayFromVTKMatrix(self.node.GetXYToRAS()))
        x, y = (ras_to_xy @ [*ras, 1.0])[:2]
        return self.node.GetDimensions()[1] - 1 - round(float(y)), round(float(x))

    def layers(self) -> np.ndarray:
        """(H, W, 3) uint8: the image layers blended as Slicer does, without segments or legends."""
        self.logic.UpdatePipeline()
        connection = self.logic.GetImageDataConnection()
        if connection is None:
            return np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
        producer = connection.GetProducer()
        producer.Update()
        return _pixels(producer.GetOutputDataObject(0))[:, :, :3].copy()

    def displayed_values(self) -> np.ndarray:
        """(H, W) background voxels as resampled for display, before window and level."""
        reslice = self.logic.GetBackgroundLayer().GetReslice()
        reslice.Update()
        return _pixels(reslice.GetOutput())[:, :, 0]

    def picture(self, path: Path | None = None) -> np.ndarray:
        """(H, W, 3) uint8: everything, rendered offscreen; also written as PNG if a path is given."""
        self.open_window()
        image = self._window.render(self.logic)
        if path is not None:
            writer = vtk.vtkPNGWriter()
            writer.SetFileName(str(path))
            writer.SetInputData(image)
            writer.Write()
        return _pixels(image)[:, :, :3].copy()

    def open_window(self) -> None:
        """Make the offscreen window; a colour legend made before its view exists is never drawn."""
        if self._window is None:
            self._window = _Window(self.logic)


class _Window:
    """Offscreen render window of one view, with the displayable managers that our nodes need."""

    def __init__(self, logic: vtk.vtkObject) -> None:
        self._window = vtk.vtkRenderWindow()
        self._window.SetOffScreenRendering(1)
        self._window.SetMultiSamples(0)
        self._window.SetSize(*SIZE)
        self._window.SetAlphaBitPlanes(1)
        renderer = vtk.vtkRenderer()
        renderer.GetActiveCamera().ParallelProjectionOn()
        self._window.AddRenderer(renderer)
        # Without an interactor the segmentations' manager ends the process.
        self._interactor = vtk.vtkRenderWindowInteractor()
        self._interactor.SetRenderWindow(self._window)
        self._interactor.Initialize()
        # The image comes before the managers, else segments are blended over black.
        self._mapper = vtk.vtkImageMapper()
        self._mapper.SetColorWindow(255)
        self._mapper.SetColorLevel(127.5)
        actor = vtk.vtkActor2D()
        actor.SetMapper(self._mapper)
        actor.GetProperty().SetDisplayLocationToBackground()
        renderer.AddViewProp(actor)
        factory = slicer.vtkMRMLSliceViewDisplayableManagerFactory.GetInstance()
        for manager in _MANAGERS:
            if not factory.IsDisplayableManagerRegistered(manager):
                factory.RegisterDisplayableManager(manager)
        self._managers = slicer.vtkMRMLDisplayableManagerGroup()
        self._managers.SetRenderer(renderer)
        self._managers.Initialize(factory, renderer)
        self._managers.SetMRMLDisplayableNode(logic.GetSliceNode())

    def render(self, logic: vtk.vtkObject) -> vtk.vtkImageData:
        self._mapper.SetInputConnection(logic.GetImageDataConnection())
        columns, rows, _ = logic.GetSliceNode().GetDimensions()
        self._window.SetSize(columns, rows)
        self._window.Render()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self._window)
        grab.SetInputBufferTypeToRGB()
        grab.ReadFrontBufferOff()
        grab.Update()
        return grab.GetOutput()


def _pixels(image: vtk.vtkImageData) -> np.ndarray:
    """(H, W, components), row 0 at the top."""
    columns, rows, _ = image.GetDimensions()
    values = vtk_to_numpy(image.GetPointData().GetScalars())
    return values.reshape(rows, columns, -1)[::-1]
