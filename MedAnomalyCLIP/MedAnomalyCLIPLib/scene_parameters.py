"""What the panel remembers, in the scene and so in a saved one too."""

from typing import Annotated, Union

from slicer import (
    vtkMRMLColorNode,
    vtkMRMLScalarVolumeNode,
    vtkMRMLSegmentationNode,
    vtkMRMLVectorVolumeNode,
)
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper


@parameterNodeWrapper
class MedAnomalyCLIPParameterNode:
    """What the panel remembers, also in a saved scene.

    Attributes:
        inputVolume: the image to look at.
        viewName: layout name of the slice view; empty for the one last touched.
        detector: folder of the detector; empty for the bundled one.
        threshold: map value from which a pixel counts as anomalous.
        thresholdChosen: whether the reader set the threshold; until then it is the detector's own.
        opacity: of the map over the image.
        preset: what slices are compared with: "auto", "own" for phrases, the name of one of the detector's
            presets, or nothing for images of any kind.
        normalPhrases, abnormalPhrases: own phrases, separated by semicolons.
        device: to run on, as torch names it; "auto" for the fastest.
        precision: to compute in, "auto" for the fastest that changes little, see `SliceDetector.load`.
        windowRule: "detector" for its own rule, "view" for what the reader sees, "manual" for windowLow to
            windowHigh, voxel values that become black and white.
        smallestArea: in mm²; smaller connected parts do not count.
        colours: colour node of the maps; None for this module's own.
        overlayVisible, legendVisible: whether maps and outlines, and their legend, are shown.
        rangeAxis, rangeFirst, rangeLast: slices of Detect range, from 1; 0 for the last one.
        resume: whether Detect range goes on with an earlier run.
        outputMap, outputSegmentation: nodes of Detect range; None to make them.
    """

    # Slicer's wrapper knows typing.Union only, and wants None in a union of nodes.
    inputVolume: Union[vtkMRMLScalarVolumeNode, vtkMRMLVectorVolumeNode, None]  # noqa: UP007
    viewName: str = ""
    detector: str = ""
    threshold: Annotated[float, WithinRange(0.0, 1.0)] = 0.5
    thresholdChosen: bool = False
    opacity: Annotated[float, WithinRange(0.0, 1.0)] = 0.5
    preset: str = "auto"
    normalPhrases: str = ""
    abnormalPhrases: str = ""
    device: str = "auto"
    precision: str = "auto"
    windowRule: str = "detector"
    windowLow: float = 0.0
    windowHigh: float = 0.0
    smallestArea: Annotated[float, WithinRange(0.0, 500.0)] = 0.0
    colours: vtkMRMLColorNode
    overlayVisible: bool = True
    legendVisible: bool = True
    rangeAxis: str = ""
    rangeFirst: int = 1
    rangeLast: int = 0
    resume: bool = False
    outputMap: vtkMRMLScalarVolumeNode
    outputSegmentation: vtkMRMLSegmentationNode
