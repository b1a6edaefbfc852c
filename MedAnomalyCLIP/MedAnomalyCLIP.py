"""The module as Slicer loads it: metadata, panel, logic for panel and console, self-test.

Nothing beyond Slicer itself is imported before it is used, so the module loads in a Slicer without PyTorch.
"""

import sys
import unittest
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Annotated, Any, Union

import qt
import slicer
import vtk
from slicer import vtkMRMLScalarVolumeNode, vtkMRMLVectorVolumeNode
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.parameterNodeWrapper import WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import *
from slicer.util import VTKObservationMixin

from MedAnomalyCLIPLib.errors import Cancelled, InvalidRequest, MedAnomalyCLIPError

POLL_INTERVAL_MS = 50
PLANE_LABEL_DELAY_MS = 150


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
            " click Detect. Works on aligned and tilted views and on transformed volumes."
            "<p>Research use only. A candidate, not a diagnosis.</p>"
        )
        self.parent.acknowledgementText = _(
            "The detectors follow MVFA (Huang et al., CVPR 2024) and MediCLIP (Zhang et al., MICCAI 2024)."
            " Built on MONAI, PyTorch and OpenCLIP."
        )


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
    """

    # Slicer's wrapper knows typing.Union only, and wants None in a union of nodes.
    inputVolume: Union[vtkMRMLScalarVolumeNode, vtkMRMLVectorVolumeNode, None]  # noqa: UP007
    viewName: str = ""
    detector: str = ""
    threshold: Annotated[float, WithinRange(0.0, 1.0)] = 0.5
    thresholdChosen: bool = False
    opacity: Annotated[float, WithinRange(0.0, 1.0)] = 0.5


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
        from MedAnomalyCLIPLib.panel_detectors import DetectorSelector
        from MedAnomalyCLIPLib.panel_teach import TeachSection
        from MedAnomalyCLIPLib.panel_views import ViewSelector
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
        self._result = None
        self.showResult()

    def onSceneEndClose(self, caller, event):
        if self.parent.isEntered:
            self.initializeParameterNode()

    def onNodeRemoved(self, caller, event):
        if not slicer.mrmlScene.IsBatchProcessing():
            self.updateButtons()

    # Parameters and views

    def initializeParameterNode(self):
        self.setParameterNode(self.logic.getParameterNode())
        if self._parameterNode.inputVolume is None:
            self._parameterNode.inputVolume = self.logic.volumeInViews()

    def setParameterNode(self, node):
        if self._parameterNode is not None:
            self._parameterNode.disconnectGui(self._parameterNodeGuiTag)
            self.removeObservers(self.onParameters)
            self._views.stop()
            self._planeTimer.stop()
        self._parameterNode = node
        if node is not None:
            self.logic.threshold = node.threshold
            # Widgets of the .ui file name their parameter in the dynamic property SlicerParameterName.
            self._parameterNodeGuiTag = node.connectGui(self.ui)
            self.addObserver(node.parameterNode, vtk.vtkCommand.ModifiedEvent, self.onParameters)
            self._views.start()
            self.updateViews()
            self.updateDetector()
        self.updateButtons()

    def onParameters(self, caller, event):
        """Volume, detector, threshold or opacity changed, by the reader or by a script."""
        if self._parameterNode is None:
            return
        if self._parameterNode.detector != self._detectors.folder:
            self.updateDetector()
        if abs(self._parameterNode.threshold - self.logic.threshold) > 1e-6:
            self._parameterNode.thresholdChosen = True
            self.logic.setThreshold(self._parameterNode.threshold)
        self.logic.setOpacity(self._parameterNode.opacity)
        self.updateButtons()
        self._planeTimer.start()

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

    def currentViewName(self):
        """Layout name of the chosen view, or of the one last touched."""
        return self._parameterNode.viewName or self._views.touched

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
        if self.logic.isRunning():
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
                detector=parameters.detector,
                threshold=parameters.threshold if parameters.thresholdChosen else None,
                opacity=parameters.opacity,
                onDone=self.onDone,
            )
        except MedAnomalyCLIPError as error:
            self.showMessage(str(error))
            return
        self.ui.scoreLabel.text = _("Detecting…")
        self.ui.resultLabel.text = ""
        self._pollTimer.start()
        self.updateButtons()

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
            return
        self._result = detection.result
        # Both sliders may have been moved while the detector ran, or another module may be shown by now.
        parameters = self._parameterNode or self.logic.getParameterNode()
        if parameters.thresholdChosen:
            self.logic.setThreshold(parameters.threshold)
        else:
            parameters.threshold = float(detection.result.threshold)
        self.logic.setOpacity(parameters.opacity)

    def onRunEnded(self):
        self._pollTimer.stop()
        self.showResult()
        self.updateButtons()

    def onRestoreButton(self):
        self.logic.restoreForegrounds()
        self.updateButtons()

    # What the panel says

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
        ready = self._parameterNode is not None and self._parameterNode.inputVolume is not None
        self.ui.detectButton.text = _("Cancel") if running else _("Detect")
        self.ui.detectButton.enabled = running or ready
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
        taught = logic.teach({normalNode: range(20, 100, 5)}, "Our scanner, FLAIR")
        mine = taught.keep(logic.detectorsFolder())

    Attributes:
        detectorFactory: makes the detector in a folder, the bundled one if that is empty, when it is first
            used; called on the worker thread.
        threshold: the one last used or set.
    """

    def __init__(self):
        from MedAnomalyCLIPLib.panel_packages import load_detector

        ScriptedLoadableModuleLogic.__init__(self)
        self.detectorFactory = load_detector
        self.threshold = 0.5
        self._worker = None
        self._run = None
        self._teaching = None
        self._detections = {}  # map node ID: (Detection, volume node)

    def getParameterNode(self):
        return MedAnomalyCLIPParameterNode(super().getParameterNode())

    # Detecting

    def detect(self, volumeNode, viewName="", *, plane=None, detector="", threshold=None, opacity=0.5):
        """Detect on one plane, wait, and write the result to the scene.

        Args:
            volumeNode: scalar or colour volume.
            viewName: slice view to take the plane from and to show the map in; empty to show it nowhere.
            plane: MedAnomalyCLIPLib.geometry.SlicePlane to use instead of the view's.
            detector: folder of a detector (bundle.json, weights.safetensors, MODEL_CARD.md); empty for the
                bundled one. It is loaded at its first use and kept until another one is asked for.
            threshold: map value from which a pixel counts; None for the detector's own.
            opacity: of the map over the image.

        Returns:
            Detection

        Raises:
            MedAnomalyCLIPError: the message says what is wrong and what to do.
        """
        run = self._start(volumeNode, viewName, plane, detector, threshold, opacity)
        return self._deliver(run)

    def startDetection(self, volumeNode, viewName, *, detector="", threshold=None, opacity=0.5, onDone=None):
        """As `detect`, without waiting; call `poll` from time to time. The plane is that of this moment.

        Args:
            onDone: called by `poll` with a Detection and None, or with None and a MedAnomalyCLIPError.

        Raises:
            InvalidRequest: another detection is on its way.
        """
        if self._run is not None:
            raise InvalidRequest(_("A detection is running; wait for it or cancel it"))
        self._run = self._start(volumeNode, viewName, None, detector, threshold, opacity, onDone)

    def poll(self):
        """Write the result if it is there; whether the run goes on."""
        run = self._run
        if run is None or not run.future.done():
            return run is not None
        self._run = None
        detection, error = None, None
        try:
            detection = self._deliver(run)
        except MedAnomalyCLIPError as caught:
            error = caught
        if run.onDone is not None:
            run.onDone(detection, error)
        return self._run is not None

    def isRunning(self):
        return self._run is not None

    def cancel(self):
        """Drop the run's result. A slice that the worker has begun is finished there, and then forgotten."""
        if self._run is not None:
            self._run.future.cancel()
            self._run = None

    def close(self):
        """Let go of worker and detector; nothing is written to the scene any more."""
        self.cancel()
        self.cancelTeaching()
        if self._worker is not None:
            self._worker.close()
        self._worker = None
        self._detections.clear()

    def _start(self, volumeNode, viewName, plane, detector, threshold, opacity, onDone=None):
        from MedAnomalyCLIPLib import scene
        from MedAnomalyCLIPLib.bundle_list import BundleSummary

        folder = str(detector or "")
        # A folder whose detector was trained anew since is another detector.
        manifest = BundleSummary.read(folder).manifest if folder else None
        if plane is None:
            plane = scene.plane_in_view(volumeNode, viewName)
        self._makeWorker()
        factory = self.detectorFactory
        future = self._worker.submit((factory, folder, manifest), lambda: factory(folder), plane, threshold)
        return _Run(volumeNode, viewName, opacity, future, onDone)

    def _makeWorker(self):
        from MedAnomalyCLIPLib.runtime import DetectorWorker

        if self._worker is None:
            self._worker = DetectorWorker()
        return self._worker

    def _deliver(self, run):
        """Wait for a run and write its result to the scene."""
        from MedAnomalyCLIPLib import scene, scene_segments

        result = run.future.result()
        if not slicer.mrmlScene.IsNodePresent(run.volumeNode):
            raise Cancelled(_("The volume was deleted while the detector ran; the result was dropped."))
        with slicer.util.RenderBlocker():
            mapNode = scene.write_map(result, run.volumeNode, run.viewName)
            if run.viewName:
                scene.show_map(mapNode, run.viewName, run.opacity)
            segmentationNode, segmentId = scene_segments.write_segment(result, run.volumeNode) or (None, None)
        detection = Detection(result, mapNode, segmentationNode, segmentId)
        self._detections[mapNode.GetID()] = detection, run.volumeNode
        self.threshold = result.threshold
        return detection

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
            self._teaching = SceneTeaching(self._makeWorker)
        return self._teaching

    # What is shown

    def setThreshold(self, threshold):
        """Change the threshold of all maps shown, and of their segments; nothing is detected again."""
        from MedAnomalyCLIPLib import scene, scene_segments

        self.threshold = threshold
        for mapNode in self._shownMaps():
            scene.set_map_threshold(mapNode, threshold)
            detection, volumeNode = self._detections.get(mapNode.GetID(), (None, None))
            if detection is not None and slicer.mrmlScene.IsNodePresent(volumeNode):
                scene_segments.write_segment(replace(detection.result, threshold=threshold), volumeNode)

    def setOpacity(self, opacity):
        """Change the opacity of the maps in all views; other foregrounds are left alone."""
        from MedAnomalyCLIPLib import scene

        for viewName in self.viewNames():
            scene.set_overlay_opacity(viewName, opacity)

    def restoreForegrounds(self):
        """Put back what the views showed before their maps."""
        from MedAnomalyCLIPLib import scene

        for viewName in self.viewNames():
            scene.restore_foreground(viewName)

    def hasOverlay(self):
        return bool(self._shownMaps())

    def forgetResults(self):
        """For a scene that is closed: its nodes are gone, and others may get their IDs."""
        self._detections.clear()

    def _shownMaps(self):
        from MedAnomalyCLIPLib import scene

        maps = [scene.shown_map(viewName) for viewName in self.viewNames()]
        return list({node.GetID(): node for node in maps if node is not None}.values())

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


class MedAnomalyCLIPTest(ScriptedLoadableModuleTest):
    """Runs inside Slicer, with or without views, without any download."""

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

    def test_bright_spot_becomes_map_and_segment(self):
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

    def test_bundled_detector(self):
        """The real detector, where its packages are installed."""
        from MedAnomalyCLIPLib.panel_packages import missing_requirements

        if missing_requirements():
            self.skipTest("not installed: {}".format(", ".join(missing_requirements())))
        volumeNode = self._addVolume()
        result = self.logic.detect(volumeNode, plane=self._planeThroughSpot(volumeNode)).result
        self.assertEqual(result.map.shape, result.plane.shape)
        self.assertTrue(0 <= result.map.min() <= result.map.max() <= 1)
        self.assertTrue(0 <= result.score <= 1)

    def _addVolume(self):
        import numpy as np

        voxels = np.full((9, 30, 20), 100, dtype=np.int16)
        voxels[5, 10:14, 8:12] = 900
        return slicer.util.addVolumeFromArray(voxels, np.diag([-1.0, -1.0, 2.0, 1.0]), "Test volume")

    def _planeThroughSpot(self, volumeNode):
        from MedAnomalyCLIPLib.geometry import cut_slice
        from MedAnomalyCLIPLib.scene import volume_from_node

        return cut_slice(volume_from_node(volumeNode), 2, 5)


class _BrightnessDetector:
    """Stands in for the detector in the self-test."""

    def detect(self, plane, *, threshold=None):
        import numpy as np

        from MedAnomalyCLIPLib.result import AnomalyResult, Provenance

        values = np.clip(plane.pixels / 1000, 0, 1).astype(np.float32)
        provenance = Provenance("brightness", "0", "", "", "cpu", "float32")
        return AnomalyResult(plane, float(values.max()), values, threshold or 0.5, provenance)
