"""The module as Slicer loads it: metadata, panel, logic for panel and console, self-test.

Nothing beyond Slicer itself is imported before it is used, so the module loads in a Slicer without PyTorch.
"""

import sys
import unittest
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Union

import qt
import slicer
import vtk
from slicer import (
    vtkMRMLColorNode,
    vtkMRMLScalarVolumeNode,
    vtkMRMLSegmentationNode,
    vtkMRMLVectorVolumeNode,
)
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import *
from slicer.util import VTKObservationMixin

from MedAnomalyCLIPLib.errors import Cancelled, InvalidRequest, MedAnomalyCLIPError
from MedAnomalyCLIPLib.scene_self_test import SelfTests

POLL_INTERVAL_MS = 15
PLANE_LABEL_DELAY_MS = 150
OWN_PHRASES = "own"
HOMEPAGE = "https://github.com/MedAnomalyCLIP/SlicerMedAnomalyCLIP"
PAPERS = (
    "MVFA: C. Huang et al., Adapting Visual-Language Models for Generalizable Anomaly Detection in Medical"
    " Images, CVPR 2024.",
    "MediCLIP: X. Zhang et al., MediCLIP: Adapting CLIP for Few-shot Medical Image Anomaly Detection,"
    " MICCAI 2024.",
    "AdaCLIP: Y. Cao et al., AdaCLIP: Adapting CLIP with Hybrid Learnable Prompts for Zero-Shot Anomaly"
    " Detection, ECCV 2024.",
    "CLIP: A. Radford et al., Learning Transferable Visual Models From Natural Language Supervision,"
    " ICML 2021.",
)


class MedAnomalyCLIP(ScriptedLoadableModule):
    """What Slicer shows about the module."""

    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = _("MedAnomalyCLIP")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.dependencies = []
        self.parent.contributors = ["The MedAnomalyCLIP developers"]
        self.parent.helpText = _(
            "Looks for abnormalities in the slice that a view shows, and returns an anomaly score, a heat map"
            " over that slice, and a segment. Choose a volume, move a slice view to the slice in question and"
            " click Detect. Works on aligned and tilted views and on transformed volumes. The section Setup"
            " installs the Python packages that are missing."
            "<p>Research use only. A candidate, not a diagnosis.</p>"
            '<p><a href="{address}">Documentation and tutorial</a></p>'
        ).format(address=f"{HOMEPAGE}#readme")
        self.parent.acknowledgementText = _(
            "If you use it in your work, please cite this extension ({address}) and the method of the"
            " detector you used:{papers}Built on MONAI, PyTorch and OpenCLIP."
        ).format(address=HOMEPAGE, papers="".join(f"<p>{paper}</p>" for paper in PAPERS))
        slicer.app.connect("startupCompleted()", _registerSampleData)


def _registerSampleData():
    from MedAnomalyCLIPLib.panel_samples import register_samples

    register_samples()


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


class MedAnomalyCLIPWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel. What it shows is in the parameter node, the logic and the scene, but for the last result."""

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self._parameterNode = None
        self._parameterNodeGuiTag = None
        self._result = None

    # Lifecycle

    def setup(self):
        from MedAnomalyCLIPLib.panel_advanced import AdvancedSection
        from MedAnomalyCLIPLib.panel_detectors import DetectorSelector
        from MedAnomalyCLIPLib.panel_display import DisplayPanel
        from MedAnomalyCLIPLib.panel_prompt import PromptSelector
        from MedAnomalyCLIPLib.panel_setup import SetupSection
        from MedAnomalyCLIPLib.panel_teach import TeachSection
        from MedAnomalyCLIPLib.panel_views import ViewSelector
        from MedAnomalyCLIPLib.panel_volume import VolumePanel
        from MedAnomalyCLIPLib.scene_views import ViewWatcher

        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/MedAnomalyCLIP.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = MedAnomalyCLIPLogic()

        self.ui.detectButton.toolTip = _("Detect on the plane that the view shows now (Ctrl+Return)")
        self.ui.messageLabel.hide()
        self.ui.detectButton.connect("clicked(bool)", self.onDetectButton)
        self.ui.restoreButton.connect("clicked(bool)", self.onRestoreButton)
        self.ui.ownThresholdButton.connect("clicked(bool)", self.onOwnThresholdButton)
        self._viewSelector = ViewSelector(self.ui.viewSelector, self.onViewChosen)
        self._detectors = DetectorSelector(self.ui, self.onDetectorChosen, self.showMessage)
        self._prompts = PromptSelector(self.ui, self.onPresetChosen)
        self._advanced = AdvancedSection(
            self.ui, self.logic, lambda: self._parameterNode, self.currentViewName
        )
        self._setup = SetupSection(self.ui, self.logic, self.chosenDetector, self._advanced.log.add)
        self._display = DisplayPanel(self.ui, self.parent, self.logic, self.onColoursChosen)
        self._volume = VolumePanel(self.ui, self.parent, self)
        self._teach = TeachSection(self.ui, self.logic, self.currentInputs, self.onDetectorChosen)
        self._shortcut = qt.QShortcut(self.parent)
        self._shortcut.setKey(qt.QKeySequence("Ctrl+Return"))
        self._shortcut.connect("activated()", self.onDetectButton)

        self._pollTimer = qt.QTimer()
        self._pollTimer.interval = POLL_INTERVAL_MS
        self._pollTimer.connect("timeout()", self.onPoll)
        self._planeTimer = qt.QTimer()
        self._planeTimer.interval = PLANE_LABEL_DELAY_MS
        self._planeTimer.singleShot = True
        self._planeTimer.connect("timeout()", self.updatePlaneLabel)

        self._views = ViewWatcher(self.updateViews)
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(scene, scene.NodeRemovedEvent, self.onNodeRemoved)
        self.initializeParameterNode()

    def enter(self):
        self.initializeParameterNode()

    def exit(self):
        self.setParameterNode(None)

    def cleanup(self):
        self._pollTimer.stop()
        self.setParameterNode(None)
        self.removeObservers()
        self._detectors.close()
        self._setup.close()
        self._advanced.close()
        self._volume.close()
        self._teach.close()
        self.logic.close()

    def onReload(self):
        """The developer's Reload button reads the library anew too, not only this file."""
        for name in [name for name in sys.modules if name.split(".")[0] == "MedAnomalyCLIPLib"]:
            del sys.modules[name]
        ScriptedLoadableModuleWidget.onReload(self)

    def onSceneStartClose(self, caller, event):
        if self.logic.isRunning():
            self.stopRun(_("The scene was closed while the detector ran; the result was dropped."))
        self.logic.forgetResults()
        self._teach.scene_closed()
        self.setParameterNode(None)
        self._volume.clear()
        self._result = None
        self.showResult()

    def onSceneEndClose(self, caller, event):
        if self.parent.isEntered:
            self.initializeParameterNode()

    def onNodeRemoved(self, caller, event):
        if not slicer.mrmlScene.IsBatchProcessing():
            self._volume.show_outputs()
            self.updateButtons()

    # Parameters and views

    def initializeParameterNode(self):
        node = self.logic.getParameterNode()
        if node.inputVolume is None:  # before the selector is bound, which would choose any
            node.inputVolume = self.logic.volumeInViews()
        self.setParameterNode(node)

    def setParameterNode(self, node):
        if self._parameterNode is not None:
            self._parameterNode.disconnectGui(self._parameterNodeGuiTag)
            self.removeObservers(self.onParameters)
            self._volume.forget()
            self._views.stop()
            self._planeTimer.stop()
        self._parameterNode = node
        if node is not None:
            self.logic.threshold = node.threshold
            self.logic.smallestArea = node.smallestArea
            # Widgets of the .ui file name their parameter in the dynamic property SlicerParameterName.
            self._parameterNodeGuiTag = node.connectGui(self.ui)
            self.addObserver(node.parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameters)
            self._views.start()
            self.updateViews()
            self.updateDetector()
            self._volume.show()
            self._display.show(node)
        self.updateButtons()

    def onParameters(self, caller, event):
        """Volume, detector, threshold or opacity changed, by the reader or by a script."""
        if self._parameterNode is None:
            return
        if self._parameterNode.detector != self._detectors.folder:
            self.updateDetector()
        if abs(self._parameterNode.threshold - self.logic.threshold) > 1e-6:
            self._parameterNode.thresholdChosen = True
            self.logic.setThreshold(self._parameterNode.threshold, wait=False)
            self.startPolling()
        if self._parameterNode.smallestArea != self.logic.smallestArea:
            self.logic.setSmallestArea(self._parameterNode.smallestArea, wait=False)
            self.startPolling()
        self.showPresets()
        self._setup.update_speed()
        self._volume.show()
        self._display.show(self._parameterNode)
        self.updateButtons()
        self._planeTimer.start()

    def choice(self):
        """What the reader chose of a detection, as keyword arguments of the logic."""
        parameters = self.parameters()
        prompt = parameters.preset
        if prompt == OWN_PHRASES:
            prompt = self._prompts.own_phrases(parameters.normalPhrases, parameters.abnormalPhrases)
        return {
            "detector": parameters.detector,
            "threshold": parameters.threshold if parameters.thresholdChosen else None,
            "device": parameters.device,
            "window": self._advanced.window(),
            "prompt": prompt,
        }

    def parameters(self):
        """The parameter node, also while another module is shown."""
        return self._parameterNode or self.logic.getParameterNode()

    def isShown(self):
        return self._parameterNode is not None

    def updateViews(self):
        """A view came, went or moved: update the selector and, a moment later, the plane's words."""
        self._viewSelector.show(self.logic.viewNames(), self._views.touched, self._parameterNode.viewName)
        self._planeTimer.start()

    def onViewChosen(self, viewName):
        if self._parameterNode is not None:
            self._parameterNode.viewName = viewName

    def onDetectorChosen(self, folder):
        self.showMessage("")
        if self._parameterNode is not None:
            self._parameterNode.detector = folder

    def onPresetChosen(self, preset):
        if self._parameterNode is not None:
            self._parameterNode.preset = preset

    def showPresets(self):
        """Offer the detector's presets, with the guess for the volume."""
        from MedAnomalyCLIPLib.scene import words_of

        selected, parameters = self._detectors.selected, self._parameterNode
        manifest = None if selected is None else selected.manifest
        self._prompts.show(manifest, parameters.preset, *words_of(parameters.inputVolume))

    def updateDetector(self):
        """Select the detector that the parameter node names, or say why it cannot be and which one is."""
        try:
            self._detectors.select(self._parameterNode.detector)
        except MedAnomalyCLIPError as error:
            words = _("The detector in {folder} cannot be used: {reason}.\nSelected is: {detector}")
            detector = self._detectors.title() or _("none")
            folder = self._parameterNode.detector or _("the installation")
            self.showMessage(words.format(folder=folder, reason=error, detector=detector))
        self._parameterNode.detector = self._detectors.folder
        self.showPresets()
        # The slider belongs to the maps that are shown; without any, it shows what the next one starts with.
        if not self._parameterNode.thresholdChosen and not self.logic.hasOverlay():
            self.showOwnThreshold()

    def onOwnThresholdButton(self):
        if self._parameterNode is not None:
            self._parameterNode.thresholdChosen = False
            self.showOwnThreshold()

    def showOwnThreshold(self):
        """Set the slider, and with it the maps that are shown, to the selected detector's own threshold."""
        if self._detectors.selected is not None:
            self.logic.setThreshold(self._detectors.selected.manifest.threshold)
            self._parameterNode.threshold = self.logic.threshold

    def onColoursChosen(self, node):
        if self._parameterNode is not None:
            self._parameterNode.colours = node

    def currentViewName(self):
        """Layout name of the chosen view, or of the one last touched."""
        return self._parameterNode.viewName or self._views.touched

    def chosenDetector(self):
        """Folder of the detector that is chosen, and the device for it."""
        parameters = self._parameterNode
        return (parameters.detector, parameters.device) if parameters is not None else ("", "auto")

    def currentInputs(self):
        """What is chosen for a detection at this moment."""
        from MedAnomalyCLIPLib.panel_slices import Inputs

        if self._parameterNode is None:
            return Inputs(None, "", "")
        return Inputs(self._parameterNode.inputVolume, self.currentViewName(), self._parameterNode.detector)

    def updatePlaneLabel(self):
        if self._parameterNode is None:
            return
        volume = self._parameterNode.inputVolume
        text = ""
        if volume is not None:
            try:
                text = self.logic.describePlane(volume, self.currentViewName())
            except MedAnomalyCLIPError as error:
                text = str(error)
        self.ui.planeLabel.text = text
        self._teach.update_inputs()

    # Detection

    def onDetectButton(self):
        if self.logic.isRunning() and not self._volume.is_working:
            self.stopRun(_("Cancelled."))
        elif self.ui.detectButton.enabled:
            self.startRun()

    def startRun(self):
        parameters = self._parameterNode
        self.showMessage("")
        try:
            self.logic.startDetection(
                parameters.inputVolume,
                self.currentViewName(),
                opacity=parameters.opacity,
                onDone=self.onDone,
                **self.choice(),
            )
        except MedAnomalyCLIPError as error:
            self.showMessage(str(error))
            return
        self.ui.scoreLabel.text = _("Detecting…")
        self.ui.resultLabel.text = ""
        self._pollTimer.start()
        self.updateButtons()

    def startPolling(self):
        self._pollTimer.start()

    def stopRun(self, message):
        self.logic.cancel()
        self.showMessage(message)
        self.onRunEnded()

    def onPoll(self):
        running = False
        try:
            with slicer.util.tryWithErrorDisplay(_("Detection failed.")):
                running = self.logic.poll()
        finally:
            if not running:
                self.onRunEnded()

    def onDone(self, detection, error):
        """There is a detection, or an error that the reader can mend."""
        if error is not None:
            self.showMessage(str(error))
            self._advanced.log.add(str(error))
            return
        self._result = detection.result
        self._advanced.log.add(self.logWords(detection.result))
        # Both sliders may have been moved while the detector ran, or another module may be shown by now.
        parameters = self.parameters()
        self.followThreshold(parameters, detection.result.threshold)
        self.logic.setVisible(parameters.overlayVisible, parameters.opacity)
        self._setup.learn_speed(parameters.detector, parameters.device, detection.result)

    def followThreshold(self, parameters, threshold):
        """A first result is there: it follows the slider if the reader moved that, else the slider it."""
        if parameters.thresholdChosen:
            self.logic.setThreshold(parameters.threshold, wait=False)
        else:
            self.logic.threshold = float(threshold)
            parameters.threshold = float(threshold)

    def onRunEnded(self):
        self._pollTimer.stop()
        self._volume.end()
        self.showResult()
        self.updateButtons()

    def onRestoreButton(self):
        self.logic.restoreForegrounds()
        self.updateButtons()

    # What the panel says

    def logWords(self, result):
        """A line for the log; the volume's name may be a patient's, and stays out of it."""
        from MedAnomalyCLIPLib.panel_words import duration_words

        words = _("{plane}: score {score:.2f}, {detector} {version} on {device}, {duration}")
        return words.format(
            plane=result.plane.description,
            score=result.score,
            detector=result.provenance.bundle,
            version=result.provenance.bundle_version,
            device=result.provenance.device,
            duration=duration_words(sum(result.timings.values())),
        )

    def showResult(self):
        from MedAnomalyCLIPLib.panel_words import result_words

        result = self._result
        if result is None:
            self.ui.scoreLabel.text = _("No result yet")
            self.ui.resultLabel.text = ""
            return
        self.ui.scoreLabel.text = _("Score {score:.2f}").format(score=result.score)
        self.ui.resultLabel.text = result_words(result)

    def showMessage(self, text):
        self.ui.messageLabel.text = text
        self.ui.messageLabel.setVisible(bool(text))

    def updateButtons(self):
        running = self.logic.isRunning()
        self._advanced.update()
        ready = self._parameterNode is not None and self._parameterNode.inputVolume is not None
        single = running and not self._volume.is_working
        self.ui.detectButton.text = _("Cancel") if single else _("Detect")
        self.ui.detectButton.enabled = single or (ready and not running)
        self._volume.update(ready, running)
        self.ui.ownThresholdButton.enabled = ready and not running and self._parameterNode.thresholdChosen
        self.ui.restoreButton.enabled = self.logic.hasOverlay()
        self._teach.update()


@dataclass(frozen=True)
class Detection:
    """A result and the nodes that hold it.

    Attributes:
        result: MedAnomalyCLIPLib.result.AnomalyResult: score, map, mask, plane.
        mapNode: volume node of the map.
        segmentationNode, segmentId: the mask; None when nothing reached the threshold.
    """

    result: Any
    mapNode: Any
    segmentationNode: Any = None
    segmentId: str | None = None


@dataclass(frozen=True)
class _Run:
    """A detection on its way."""

    volumeNode: Any
    viewName: str
    opacity: float
    smallestArea: float
    future: Future
    onDone: Callable[[Detection | None, MedAnomalyCLIPError | None], None] | None = None


class MedAnomalyCLIPLogic(ScriptedLoadableModuleLogic):
    """Detection in a scene, for the panel and for scripts; needs no window.

    The detector runs on one worker thread that lives as long as the logic. Planes are cut and nodes are
    written on the thread that calls, which has to be Slicer's main thread.

    Example:
        logic = MedAnomalyCLIPLogic()
        detection = logic.detect(volumeNode, "Red")
        other = logic.detect(volumeNode, "Red", detector="/detectors/mvfa-brain")
        print(detection.result.score, other.result.score, other.result.provenance.bundle)
        for slice in logic.detectSlices(volumeNode, indices=range(10, 20)):
            print(slice.result.plane.description, slice.result.score)
        print(logic.detectVolume(volumeNode, resume=True).to_pandas())
        taught = logic.teach({normalNode: range(20, 100, 5)}, "Our scanner, FLAIR")
        mine = taught.keep(logic.detectorsFolder())

    Attributes:
        detectorFactory: makes the detector in a folder, the bundled one if that is empty, when it is first
            used; called on the worker thread,
            with the device as second argument unless that is "auto".
        installEnvironment: what installing asks of Slicer; panel_install.SlicerEnvironment if None.
        threshold: the one last used or set.
        smallestArea: connected parts of masks that are smaller than this, in mm², are left out.
    """

    def __init__(self):
        from MedAnomalyCLIPLib.panel_packages import load_detector

        ScriptedLoadableModuleLogic.__init__(self)
        self.detectorFactory = load_detector
        self.threshold = 0.5
        self.smallestArea = 0.0
        self._worker = None
        self.installEnvironment = None
        self._run = None
        self._volumes = None
        self._mapDisplay = None
        self._teaching = None

    def getParameterNode(self):
        return MedAnomalyCLIPParameterNode(super().getParameterNode())

    # Detecting on one plane

    def detect(self, volumeNode, viewName="", *, plane=None, opacity=0.5, **choice):
        """Detect on one plane, wait, and write the result to the scene.

        Args:
            volumeNode: scalar or colour volume.
            viewName: slice view to take the plane from and to show the map in; empty to show it nowhere.
            plane: MedAnomalyCLIPLib.geometry.SlicePlane to use instead of the view's.
            detector: folder of a detector (bundle.json, weights.safetensors, MODEL_CARD.md); empty for the
                bundled one. It is loaded at its first use and kept until another one is asked for.
            threshold: map value from which a pixel counts; None for the detector's own.
            opacity: of the map over the image.
            device: "auto" for the fastest, or as torch names it: "cpu", "cuda:1", "mps".
            window: (low, high) voxel values that the detector is shown as black and white, or "view" for
                those that the reader sees; None for the detector's own rule.
            prompt: what the slice is compared with: the name of one of the detector's presets, "" for images
                of any kind, "auto" to go by what the volume says of itself, or
                MedAnomalyCLIPLib.prompt.Prompt(normal=(...,), abnormal=(...,)) for phrases of your own.

        Returns:
            Detection

        Raises:
            MedAnomalyCLIPError: the message says what is wrong and what to do.
        """
        run = self._start(volumeNode, viewName, plane, opacity, **choice)
        return self._deliver(run)

    def startDetection(self, volumeNode, viewName, *, opacity=0.5, onDone=None, **choice):
        """As `detect`, without waiting; call `poll` from time to time. The plane is that of this moment.

        Args:
            onDone: called by `poll` with a Detection and None, or with None and a MedAnomalyCLIPError.

        Raises:
            InvalidRequest: another detection is on its way.
        """
        if self.isRunning():
            raise InvalidRequest(_("A detection is running; wait for it or cancel it"))
        self._run = self._start(volumeNode, viewName, None, opacity, onDone, **choice)

    # Detecting on many slices

    def detectSlices(self, volumeNode, *, onFailure=None, **request):
        """Detect on slices of a volume, one after the other; each is in the scene before it is yielded.

        All go to one map and one segmentation on the volume's own grid, and to one table. When the loop is
        left, or an error ends it, what was yielded stays, and `resume=True` goes on from there.

        Args:
            volumeNode: scalar or colour volume, under a linear transform or none.
            axis: 0, 1, 2 for I, J, K, or "axial", "coronal", "sagittal"; None as the slices were acquired.
            indices: slices along that axis, from 0; None for all.
            detector, threshold, opacity, device, window, prompt: as for `detect`.
            resume: keep what an earlier run with the same detector left, and do the other slices only.
            viewNames: slice views that show the map; None for those that show the volume.
            mapNode, segmentationNode: nodes to write to; None for those of the volume.
            onFailure: called with index and MedAnomalyCLIPError of a slice that gave no result, before going
                on; None to raise the error.

        Yields:
            Detection

        Raises:
            MedAnomalyCLIPError: as for `detect`.
        """
        run = self._startRun(volumeNode, **request)
        for outcome in self._jobs().finish(run):
            if outcome.error is None:
                yield self._detectionOf(run, outcome.result)
            elif onFailure is None:
                raise outcome.error
            else:
                onFailure(outcome.index, outcome.error)

    def detectVolume(self, volumeNode, *, onProgress=None, isCancelled=None, **request):
        """Detect on a volume and wait; arguments as for `detectSlices`.

        Args:
            onProgress: called with the number of slices done and to do, after each slice.
            isCancelled: asked before each slice; what is done stays.

        Returns:
            MedAnomalyCLIPLib.scene_run.VolumeDetection: nodes, rows, `to_pandas()`, slices that failed.
        """
        run = self._startRun(volumeNode, **request)
        for _outcome in self._jobs().finish(run):
            self._showAsChosen(run.volumeMap)
            if onProgress is not None:
                onProgress(run.done, run.total)
            if isCancelled is not None and isCancelled():
                break
        return run.detection()

    def startRange(self, volumeNode, *, onSlice=None, onDone=None, **request):
        """As `detectVolume`, without waiting; call `poll` from time to time, which writes one slice at most.

        Args:
            onSlice: called by `poll` with slices done, slices to do, and the outcome of the last one
                (MedAnomalyCLIPLib.slice_stream.SliceOutcome).
            onDone: called by `poll` with a VolumeDetection (None if there is no result at all), and a
                MedAnomalyCLIPError or None.

        Returns:
            int: slices to do.

        Raises:
            MedAnomalyCLIPError: nothing was started.
        """
        run = self._startRun(volumeNode, **request)

        def sliceDone(done, total, outcome):
            self._showAsChosen(run.volumeMap)
            if onSlice is not None:
                onSlice(done, total, outcome)

        self._jobs().start(run, sliceDone, onDone)
        return run.total

    def runningDetection(self):
        """What the run over a volume that is on its way has so far: a VolumeDetection or None."""
        run = self._jobs().running
        return run.detection() if run is not None else None

    def volumeDetection(self, node):
        """What the scene holds of a volume, or in a map of one: a VolumeDetection, None if nothing."""
        return self._jobs().detection(node)

    def exportResults(self, node, folder, *, overwrite=False):
        """Write what the scene holds of a volume to a folder, with the files of the command line, and wait.

        Args:
            node: the volume, or the map of one.
            folder: appears when it is complete.
            overwrite: replace the results of an earlier export.
        """
        job = self._jobs().export(self._jobs().map_of(node), folder, overwrite)
        while job.step():
            pass

    def startExport(self, node, folder, *, overwrite=False, onSlice=None, onDone=None):
        """As `exportResults`, without waiting; callbacks and returned value as for `startRange`."""
        job = self._jobs().export(self._jobs().map_of(node), folder, overwrite)
        self._jobs().start(job, onSlice, onDone)
        return job.total

    def poll(self):
        """One short step of what is on its way, if it is due; whether there is more to do."""
        working = self._volumes is not None and self._volumes.poll()
        run = self._run
        if run is None or not run.future.done():
            return run is not None or working
        self._run = None
        detection, error = None, None
        try:
            detection = self._deliver(run)
        except MedAnomalyCLIPError as caught:
            error = caught
        if run.onDone is not None:
            run.onDone(detection, error)
        return self.isRunning()

    def isRunning(self):
        return self._run is not None or (self._volumes is not None and self._volumes.busy)

    def cancel(self):
        """End what is on its way. Slices of a range that are done stay; anything else is dropped.

        A slice that the worker has begun is finished there, and then forgotten.
        """
        if self._run is not None:
            self._run.future.cancel()
            self._run = None
        if self._volumes is not None:
            self._volumes.cancel()

    def close(self):
        """Let go of worker and detector; nothing is written to the scene any more."""
        self.cancel()
        self._volumes = None
        self.cancelTeaching()
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def _start(self, volumeNode, viewName, plane, opacity, onDone=None, **choice):
        from MedAnomalyCLIPLib import scene

        submit = self._submitter(volumeNode, **choice)
        if plane is None:
            plane = scene.plane_in_view(volumeNode, viewName)
        return _Run(volumeNode, viewName, opacity, self.smallestArea, submit(plane), onDone)

    def _startRun(
        self,
        volumeNode,
        *,
        threshold=None,
        opacity=0.5,
        viewNames=None,
        mapNode=None,
        segmentationNode=None,
        resume=False,
        detector="",
        device="auto",
        window=None,
        prompt="auto",
        **request,
    ):
        from MedAnomalyCLIPLib.scene_navigation import views_of
        from MedAnomalyCLIPLib.scene_run import RunOptions

        if self._run is not None:
            raise InvalidRequest(_("A detection is running; wait for it or cancel it"))
        if volumeNode is not None and viewNames is None:
            viewNames = views_of(volumeNode)
        options = RunOptions(
            tuple(viewNames or ()), opacity, self._display().colours, mapNode, segmentationNode
        )
        return self._jobs().make_run(
            volumeNode,
            self._submitter(volumeNode, detector, threshold, device, window, prompt),
            resume=resume,
            options=options,
            threshold=threshold,
            min_area_mm2=self.smallestArea,
            **request,
        )

    def _submitter(self, volumeNode, detector="", threshold=None, device="auto", window=None, prompt="auto"):
        """Hands planes of a volume to a detector on the worker."""
        key, load = self._detectorOf(detector, device)
        window = self._windowOf(volumeNode, window)
        prompt = self._promptOf(volumeNode, detector, prompt)
        return lambda plane: self._workerThread().submit(key, load, plane, threshold, window, prompt)

    def _detectorOf(self, detector, device):
        """What tells a detector from others, and how to make it."""
        from MedAnomalyCLIPLib.bundle_list import BundleSummary

        folder = str(detector or "")
        # A folder whose detector was trained anew since is another detector.
        manifest = BundleSummary.read(folder).manifest if folder else None
        factory = self.detectorFactory
        arguments = (folder,) if device == "auto" else (folder, device)
        return (factory, folder, manifest, device), partial(factory, *arguments)

    def _windowOf(self, volumeNode, window):
        from MedAnomalyCLIPLib.scene_views import displayed_window

        if not isinstance(window, str):
            return window
        if window != "view":
            raise InvalidRequest(
                _("A window is two voxel values, or the word view, not {window}").format(window=window)
            )
        return displayed_window(volumeNode)

    def _promptOf(self, volumeNode, detector, prompt):
        """What to compare with; a preset's name, or "auto", stands for it."""
        from MedAnomalyCLIPLib.bundle import default_bundle_path
        from MedAnomalyCLIPLib.bundle_list import BundleSummary
        from MedAnomalyCLIPLib.panel_prompt import chosen_prompt
        from MedAnomalyCLIPLib.scene import words_of

        if not isinstance(prompt, str):
            return prompt
        manifest = BundleSummary.read(detector or default_bundle_path()).manifest
        return chosen_prompt(manifest, prompt, *words_of(volumeNode))

    def _workerThread(self):
        from MedAnomalyCLIPLib.runtime import DetectorWorker

        if self._worker is None:
            self._worker = DetectorWorker()
        return self._worker

    def _jobs(self):
        from MedAnomalyCLIPLib.scene_jobs import VolumeJobs

        if self._volumes is None:
            self._volumes = VolumeJobs(lambda function: self._workerThread().call(function))
        return self._volumes

    def _deliver(self, run):
        """Wait for a run and write its result to the scene."""
        from MedAnomalyCLIPLib import scene, scene_segments

        result = replace(run.future.result(), min_area_mm2=run.smallestArea)
        if not slicer.mrmlScene.IsNodePresent(run.volumeNode):
            raise Cancelled(_("The volume was deleted while the detector ran; the result was dropped."))
        slicer.mrmlScene.SaveStateForUndo()
        with slicer.util.RenderBlocker():
            mapNode = scene.write_map(result, run.volumeNode, run.viewName, self._display().colours)
            if run.viewName:
                scene.show_map(mapNode, run.viewName, run.opacity)
                self._display().apply()
            segmentationNode, segmentId = scene_segments.write_segment(result, run.volumeNode) or (None, None)
        self.threshold = result.threshold
        return Detection(result, mapNode, segmentationNode, segmentId)

    def _detectionOf(self, run, result):
        self._showAsChosen(run.volumeMap)
        segmentation = run.volumeMap.segmentation
        return Detection(result, run.volumeMap.node, segmentation, run.volumeMap.segment_id)

    # Setting up

    def isReady(self, detector="", device="auto"):
        """Whether a detector can run: MedAnomalyCLIPLib.readiness.Readiness, true in a condition if it can.

        Nothing is imported to find out, so the speed is known only if it was measured before.
        """
        from MedAnomalyCLIPLib.bundle import default_bundle_path
        from MedAnomalyCLIPLib.bundle_list import BundleSummary
        from MedAnomalyCLIPLib.panel_setup import remembered_speed
        from MedAnomalyCLIPLib.readiness import check_readiness
        from MedAnomalyCLIPLib.resources import resource_path

        return check_readiness(
            resource_path("requirements.txt"),
            lambda: BundleSummary.read(detector or default_bundle_path()),
            remembered_speed(str(detector), device),
        )

    def setupPythonRequirements(self, ask=True, wheels=None, tell=None):
        """Install the Python packages that are missing. On Slicer's main thread only.

        Args:
            ask: show what would be installed, and install nothing unless that is agreed to.
            wheels: folder of wheels to install from without network; None for the usual sources.
            tell: called with a line about each step.

        Returns:
            Readiness, as `isReady`.

        Raises:
            Cancelled: declined, or Slicer has to be restarted first.
            DependencyMissing: something could not be installed; the message says what to do.
        """
        from MedAnomalyCLIPLib.panel_install import Installer

        Installer(self.installEnvironment, tell).install(ask=ask, wheels=wheels)
        return self.isReady()

    def resumeSetup(self, tell=None):
        """Go on with an installation that waited for a restart of Slicer; False if none did."""
        from MedAnomalyCLIPLib.panel_install import Installer

        return Installer(self.installEnvironment, tell).resume()

    def measureSpeed(self, detector="", device="auto"):
        """Time a detector on made-up slices, on the worker: a Future of MedAnomalyCLIPLib.readiness.Speed."""
        from MedAnomalyCLIPLib.readiness import measure_speed

        return self._workerThread().use(*self._detectorOf(detector, device), measure_speed)

    def availableDevices(self):
        """Devices of this computer, as torch names them, asked on the worker: a Future of their names."""
        from MedAnomalyCLIPLib.runtime import available_devices

        return self._workerThread().call(available_devices)

    def previewInput(self, volumeNode, viewName="", *, plane=None, detector="", window=None):
        """What a detector is shown of a plane: a Future of MedAnomalyCLIPLib.preview.NetworkPicture.

        Arguments as for `detect`.
        """
        from MedAnomalyCLIPLib import scene
        from MedAnomalyCLIPLib.bundle import default_bundle_path
        from MedAnomalyCLIPLib.bundle_list import BundleSummary
        from MedAnomalyCLIPLib.panel_packages import require_packages
        from MedAnomalyCLIPLib.preview import network_picture

        require_packages()
        spec = BundleSummary.read(detector or default_bundle_path()).manifest.preprocess
        if plane is None:
            plane = scene.plane_in_view(volumeNode, viewName)
        window = self._windowOf(volumeNode, window)
        return self._workerThread().call(lambda: network_picture(plane, spec, window))

    # Teaching

    def teach(self, slices, name, *, axis=None, detector="", onProgress=None):
        """Make a detector for one scanner and protocol of normal slices, and wait for it.

        Args:
            slices: {volume node: its slices}, each a position along `axis` from 0, or a
                MedAnomalyCLIPLib.geometry.SlicePlane that was cut from it. Where all are planes, anything
                else may stand for the volume.
            name: of the detector; it is shown and stored, so without patients' names.
            axis: 0, 1 or 2 for I, J or K; None for the axis along which each volume was acquired.
            detector: folder of the detector to start from; empty for the bundled one.
            onProgress: called with MedAnomalyCLIPLib.teaching.TeachingProgress.

        Returns:
            MedAnomalyCLIPLib.taught_detector.TaughtDetector: look at its `left_one_out`, then `keep` it in a
            folder, for example `detectorsFolder()`, or `discard` it.

        Raises:
            MedAnomalyCLIPError: the message says what is wrong and what to do.
        """
        return self._sceneTeaching().teach(slices, name, axis, detector, onProgress)

    def startTeaching(self, slices, name, *, axis=None, detector="", onDone=None):
        """As `teach`, without waiting; call `pollTeaching` from time to time.

        Args:
            onDone: called by `pollTeaching` with a TaughtDetector and None, or with None and a
                MedAnomalyCLIPError.

        Raises:
            InvalidRequest: another detector is being taught.
        """
        self._sceneTeaching().start(slices, name, axis, detector, onDone)

    def pollTeaching(self):
        """Cut the next slice, or deliver the detector if it is there; whether teaching goes on."""
        return self._teaching is not None and self._teaching.poll()

    def isTeaching(self):
        return self._teaching is not None and self._teaching.is_running

    def teachingProgress(self):
        """MedAnomalyCLIPLib.teaching.TeachingProgress of the detector being taught; None before it begins."""
        return None if self._teaching is None else self._teaching.progress

    def cancelTeaching(self):
        """Stop after the step that the worker is at; nothing is left of the detector."""
        if self._teaching is not None:
            self._teaching.cancel()

    def detectorsFolder(self):
        """Where the user's own detectors are."""
        from MedAnomalyCLIPLib.panel_detectors import detectors_folder

        return detectors_folder()

    def _sceneTeaching(self):
        from MedAnomalyCLIPLib.scene_teaching import SceneTeaching

        if self._teaching is None:
            self._teaching = SceneTeaching(self._workerThread)
        return self._teaching

    # What is shown

    def setThreshold(self, threshold, *, wait=True):
        """Change the threshold of all maps shown, and of their segments; nothing is detected again.

        Args:
            threshold: map value from which a pixel counts.
            wait: bring all slices of volumes up to date here; else `poll` does, some at a time.
        """
        self.threshold = threshold
        self._updateMasks(wait, threshold=threshold)

    def setSmallestArea(self, area, *, wait=True):
        """Leave parts smaller than this, in mm², out of all maps shown and of their segments; as above."""
        self.smallestArea = area
        self._updateMasks(wait, min_area_mm2=area)

    def _updateMasks(self, wait, **changes):
        from MedAnomalyCLIPLib.scene_display import shown_maps, update_slice_map

        for mapNode in shown_maps():
            volumeMap = self._jobs().map_of(mapNode)
            if volumeMap is None:
                update_slice_map(mapNode, **changes)
            else:
                self._jobs().refresh(volumeMap, wait=wait, **changes)

    def setOpacity(self, opacity):
        """Change the opacity of the maps in all views; other foregrounds are left alone."""
        self._display().set_opacity(opacity)

    def setColours(self, colourNode):
        """Show maps in the colours of a colour node from now on; None for this module's own."""
        self._display().set_colours(colourNode)

    def setLegend(self, visible):
        """Show or hide the colour legend of the maps."""
        self._display().set_legend(visible)

    def setVisible(self, visible, opacity=0.5):
        """Show or hide maps, legends and outlines, so that the bare image can be compared."""
        self._display().set_visible(visible, opacity)

    def _showAsChosen(self, volumeMap):
        """A map that has just come into view follows the choices for all maps."""
        if volumeMap is not None and len(volumeMap.rows) == 1:
            self.threshold = volumeMap.threshold
            self._display().apply()

    def _display(self):
        from MedAnomalyCLIPLib.scene_display import MapDisplay

        if self._mapDisplay is None:
            self._mapDisplay = MapDisplay()
        return self._mapDisplay

    def showVolumeMap(self, node, opacity=0.5):
        """Show the map of a volume in the views that show that volume."""
        from MedAnomalyCLIPLib.scene_navigation import views_of

        volumeMap = self._jobs().map_of(node)
        if volumeMap is not None and volumeMap.source is not None:
            volumeMap.show(views_of(volumeMap.source), opacity)
            self.setOpacity(opacity)
            self._display().apply()

    def restoreForegrounds(self):
        """Put back what the views showed before their maps."""
        from MedAnomalyCLIPLib import scene

        for viewName in self.viewNames():
            scene.restore_foreground(viewName)

    def hasOverlay(self):
        from MedAnomalyCLIPLib.scene_display import shown_maps

        return bool(shown_maps())

    def forgetResults(self):
        """For a scene that is closed: its nodes are gone, and others may get their IDs."""
        self._mapDisplay = None
        if self._volumes is not None:
            self._volumes.forget()

    # Going from slice to slice

    def jumpToSlice(self, node, index):
        """Bring the views of a volume to a slice that was analysed, those across it to its highest value.

        Args:
            node: the volume, or the map of one.
            index: of the slice, from 0.
        """
        from MedAnomalyCLIPLib.scene_navigation import jump_to_slice

        volumeMap = self._jobs().map_of(node)
        if volumeMap is not None:
            jump_to_slice(volumeMap, index)

    def nextCandidate(self, node, step=1):
        """Jump to the next candidate after the slice in view, or the one before it.

        Args:
            node: the volume, or the map of one.
            step: 1 for the next, -1 for the previous one.

        Returns:
            int: index of the slice; None when there is no further candidate that way.
        """
        from MedAnomalyCLIPLib.scene_navigation import slice_in_views

        detection = self.volumeDetection(node)
        if detection is None:
            return None
        here = slice_in_views(detection.volumeMap)
        if here is None:
            here = -1 if step > 0 else detection.volumeMap.slices
        ahead = [index for index in detection.candidates if (index - here) * step > 0]
        if not ahead:
            return None
        found = min(ahead) if step > 0 else max(ahead)
        self.jumpToSlice(node, found)
        return found

    # What there is to look at

    def viewNames(self):
        """Layout names of the slice views."""
        from MedAnomalyCLIPLib import scene_views

        return scene_views.slice_view_names()

    def volumeInViews(self):
        """A volume to start with: the first in a slice view's background, None if there is none."""
        from MedAnomalyCLIPLib.scene_views import slice_logic

        # Not from the view's logic, which still holds the volumes of a scene that was just closed.
        shown = (
            slice_logic(name).GetSliceCompositeNode().GetBackgroundVolumeID() for name in self.viewNames()
        )
        nodes = (slicer.mrmlScene.GetNodeByID(volumeID) for volumeID in shown if volumeID)
        return next((node for node in nodes if node is not None), None)

    def describePlane(self, volumeNode, viewName):
        """The plane of a view in words."""
        from MedAnomalyCLIPLib import scene

        text = scene.plane_in_view(volumeNode, viewName).description
        if not scene.is_shown(volumeNode, viewName):
            text += _(" (the view does not show this volume)")
        return text


class MedAnomalyCLIPTest(SelfTests, ScriptedLoadableModuleTest):
    """Runs inside Slicer, with or without views, without any download; its tests: scene_self_test.py."""

    def setUp(self):
        slicer.mrmlScene.Clear()
        self.logic = MedAnomalyCLIPLogic()

    def tearDown(self):
        self.logic.close()

    def runTest(self):
        for name in (name for name in dir(self) if name.startswith("test_")):
            self.delayDisplay(name)
            self.setUp()
            try:
                getattr(self, name)()
            except unittest.SkipTest as reason:
                self.delayDisplay(str(reason))
            finally:
                self.tearDown()
