"""What the module's self-test checks inside Slicer: no model is downloaded, no view is needed.

The test class in MedAnomalyCLIP.py takes these over; ctest and the button Reload and Test run it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import slicer
import vtk

# No test case by itself: imported by the module, it would be found there, and all would run twice.
if TYPE_CHECKING:
    from unittest import TestCase

    from .geometry import SlicePlane
    from .result import AnomalyResult
else:
    TestCase = object


class SelfTests(TestCase):
    """Mixed into a test case with a MedAnomalyCLIPLogic as `logic` and an empty scene before each test."""

    logic: Any

    def test_bright_spot_becomes_map_and_segment(self) -> None:
        """A stand-in for the detector: what is bright is anomalous."""
        self.logic.detectorFactory = lambda folder: _BrightnessDetector()
        volumeNode = self._addVolume()
        detection = self.logic.detect(volumeNode, plane=self._planeThroughSpot(volumeNode))
        self.assertEqual(detection.result.mask.sum(), 16)
        self.assertEqual(slicer.util.arrayFromVolume(detection.mapNode).shape, (1, 30, 20))
        mask = slicer.util.arrayFromSegmentBinaryLabelmap(
            detection.segmentationNode, detection.segmentId, volumeNode
        )
        self.assertEqual([mask.sum(), mask[5, 10:14, 8:12].sum()], [16, 16])

    def test_map_and_segment_lie_where_a_transformed_volume_lies(self) -> None:
        self.logic.detectorFactory = lambda folder: _BrightnessDetector()
        volumeNode = self._addVolume()
        transformNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
        matrix = vtk.vtkMatrix4x4()
        matrix.SetElement(0, 3, 100.0)
        transformNode.SetMatrixTransformToParent(matrix)
        volumeNode.SetAndObserveTransformNodeID(transformNode.GetID())
        detection = self.logic.detect(volumeNode, plane=self._planeThroughSpot(volumeNode))
        # 20 voxels of 1 mm from 0 to the left, moved by 100 mm to the right; the spot is in the middle.
        self.assertTrue(88 <= detection.result.peak_ras[0] <= 92, str(detection.result.peak_ras))
        bounds = [0.0] * 6
        for node in (detection.mapNode, detection.segmentationNode):
            node.GetRASBounds(bounds)
            self.assertEqual([round(bounds[0], 3), round(bounds[1], 3)], [80.5, 100.5])

    def test_scene_saved_and_read_again_keeps_result_and_its_explanation(self) -> None:
        import tempfile
        from pathlib import Path

        import numpy as np

        self.logic.detectorFactory = lambda folder: _BrightnessDetector()
        volumeNode = self._addVolume()
        detection = self.logic.detect(volumeNode, plane=self._planeThroughSpot(volumeNode))
        name, values = detection.mapNode.GetName(), detection.result.map
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "scene.mrb")
            self.assertTrue(slicer.mrmlScene.WriteToMRB(path))
            slicer.mrmlScene.Clear()
            self.assertTrue(slicer.mrmlScene.ReadFromMRB(path, True))
        mapNode = slicer.util.getNode(name)
        np.testing.assert_array_equal(slicer.util.arrayFromVolume(mapNode)[0], values)
        self.assertEqual(mapNode.GetAttribute("MedAnomalyCLIP.Bundle"), "brightness")
        self.assertEqual(float(mapNode.GetAttribute("MedAnomalyCLIP.Threshold")), 0.5)
        segmentations = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
        self.assertEqual([node.GetSegmentation().GetNumberOfSegments() for node in segmentations], [1])

    def test_window_of_the_view_reaches_the_detector(self) -> None:
        windows: list[Any] = []
        self.logic.detectorFactory = lambda folder: _BrightnessDetector(windows)
        volumeNode = self._addVolume()
        volumeNode.CreateDefaultDisplayNodes()
        volumeNode.GetDisplayNode().AutoWindowLevelOff()
        volumeNode.GetDisplayNode().SetWindowLevelMinMax(50, 950)
        self.logic.detect(volumeNode, plane=self._planeThroughSpot(volumeNode), window="view")
        self.assertEqual(windows, [(50, 950)])

    def test_readiness_names_every_package(self) -> None:
        """Ready or not, it is said what is there and what is missing; nothing is installed here."""
        readiness = self.logic.isReady()
        names = {package.name for package in readiness.packages}
        self.assertTrue({"onnxruntime", "numpy", "SimpleITK"} <= names)
        self.assertEqual(bool(readiness), not readiness.reasons)
        self.assertTrue(len(readiness.reasons) >= len(readiness.missing))

    def test_samples_are_offered(self) -> None:
        from .panel_samples import register_samples

        try:
            import SampleData
        except ImportError:
            self.skipTest("this Slicer has no module SampleData")
        register_samples()
        sources = SampleData.SampleDataLogic.sampleDataSourcesByCategory("MedAnomalyCLIP")
        self.assertEqual(
            [source.sampleName for source in sources], ["MRHead", "MRBrainTumor1", "MRBrainTumor2", "CTChest"]
        )

    def test_bundled_detector(self) -> None:
        """The real detector, where its packages are installed."""
        from .panel_packages import missing_light_requirements

        if missing_light_requirements():
            self.skipTest("not installed: {}".format(", ".join(missing_light_requirements())))
        volumeNode = self._addVolume()
        result = self.logic.detect(volumeNode, plane=self._planeThroughSpot(volumeNode)).result
        self.assertEqual(result.map.shape, result.plane.shape)
        self.assertTrue(0 <= result.map.min() <= result.map.max() <= 1)
        self.assertTrue(0 <= result.score <= 1)

    def _addVolume(self) -> Any:
        import numpy as np

        voxels = np.full((9, 30, 20), 100, dtype=np.int16)
        voxels[5, 10:14, 8:12] = 900
        return slicer.util.addVolumeFromArray(voxels, np.diag([-1.0, -1.0, 2.0, 1.0]), "Test volume")

    def _planeThroughSpot(self, volumeNode: Any) -> SlicePlane:
        from .geometry import cut_slice
        from .scene import volume_from_node

        return cut_slice(volume_from_node(volumeNode), 2, 5)


class _BrightnessDetector:
    """Stands in for the detector in the self-test; keeps the windows that it is called with."""

    def __init__(self, windows: list[Any] | None = None) -> None:
        self.windows: list[Any] = [] if windows is None else windows

    def detect_many(
        self, planes: Iterable[SlicePlane], *, threshold: float | None = None, window: Any = None, **_: Any
    ) -> Iterator[AnomalyResult]:
        import numpy as np

        from .result import AnomalyResult, Provenance

        provenance = Provenance("brightness", "0", "", "", "cpu", "float32")
        for plane in planes:
            self.windows.append(window)
            values = np.clip(plane.pixels / 1000, 0, 1).astype(np.float32)
            yield AnomalyResult(plane, float(values.max()), values, threshold or 0.5, provenance)
