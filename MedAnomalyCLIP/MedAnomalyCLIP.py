"""The module as Slicer loads it: metadata, panel, logic for panel and console, self-test.

Nothing beyond Slicer itself is imported before it is used, so the module loads in a Slicer without PyTorch.
"""

import sys
import unittest

import qt
import slicer
import vtk
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import *
from slicer.util import VTKObservationMixin

from MedAnomalyCLIPLib.scene_logic_setup import SetupLogic
from MedAnomalyCLIPLib.scene_logic_teaching import TeachingLogic
from MedAnomalyCLIPLib.scene_logic_volumes import VolumeLogic
from MedAnomalyCLIPLib.scene_parameters import MedAnomalyCLIPParameterNode
from MedAnomalyCLIPLib.scene_self_test import SelfTests

POLL_INTERVAL_MS = 15
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


class MedAnomalyCLIPWidget(ScriptedLoadableModuleWidget, VTKObservationMixin):
    """The panel, made of parts in panel_*.py. What it shows is in the parameter node, logic and scene."""

    def __init__(self, parent=None):
        ScriptedLoadableModuleWidget.__init__(self, parent)
        VTKObservationMixin.__init__(self)
        self.logic = None
        self._parameterNode = None
        self._parameterNodeGuiTag = None

    # Lifecycle

    def setup(self):
        from MedAnomalyCLIPLib.panel_advanced import AdvancedSection
        from MedAnomalyCLIPLib.panel_detect import DetectPanel
        from MedAnomalyCLIPLib.panel_detectors import DetectorSelector
        from MedAnomalyCLIPLib.panel_display import DisplayPanel
        from MedAnomalyCLIPLib.panel_prompt import PromptSelector
        from MedAnomalyCLIPLib.panel_setup import SetupSection
        from MedAnomalyCLIPLib.panel_teach import TeachSection
        from MedAnomalyCLIPLib.panel_views import ViewPanel
        from MedAnomalyCLIPLib.panel_volume import VolumePanel
        from MedAnomalyCLIPLib.scene_views import ViewWatcher

        ScriptedLoadableModuleWidget.setup(self)
        uiWidget = slicer.util.loadUI(self.resourcePath("UI/MedAnomalyCLIP.ui"))
        self.layout.addWidget(uiWidget)
        self.ui = slicer.util.childWidgetVariables(uiWidget)
        uiWidget.setMRMLScene(slicer.mrmlScene)
        self.logic = MedAnomalyCLIPLogic()

        self.ui.messageLabel.hide()
        self.ui.restoreButton.connect("clicked(bool)", self.onRestoreButton)
        self.ui.ownThresholdButton.connect("clicked(bool)", self.onOwnThresholdButton)
        self._detectors = DetectorSelector(self.ui, self.onDetectorChosen, self.showMessage)
        self._prompts = PromptSelector(self.ui, self.keepChoice)
        self._advanced = AdvancedSection(
            self.ui, self.logic, lambda: self._parameterNode, self.currentViewName
        )
        log = self._advanced.log.add
        self._setup = SetupSection(self.ui, self.logic, self.chosenDetector, log)
        self._display = DisplayPanel(self.ui, self.parent, self.logic, self.keepChoice)
        self._volume = VolumePanel(self.ui, self.parent, self)
        self._detect = DetectPanel(
            self.ui, self.parent, self, lambda: self._volume.is_working, log, self._setup.learn_speed
        )
        self._teach = TeachSection(self.ui, self.logic, self.currentInputs, self.onDetectorChosen)
        self._viewPanel = ViewPanel(
            self.ui, self.logic, self.currentInputs, self.keepChoice, self._teach.update_inputs
        )

        self._pollTimer = qt.QTimer()
        self._pollTimer.interval = POLL_INTERVAL_MS
        self._pollTimer.connect("timeout()", self.onPoll)

        self._views = ViewWatcher(self.updateViews)
        scene = slicer.mrmlScene
        self.addObserver(scene, scene.StartCloseEvent, self.onSceneStartClose)
        self.addObserver(scene, scene.EndCloseEvent, self.onSceneEndClose)
        self.addObserver(scene, scene.NodeRemovedEvent, self.onNodeRemoved)
        self.initializeParameterNode()

    def enter(self):
        self.initializeParameterNode()
        self._setup.enter()

    def exit(self):
        self._setup.exit()
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
        self._detect.clear()

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
            self._viewPanel.stop()
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
        self._viewPanel.plane_changed()

    def choice(self):
        """What the reader chose of a detection, as keyword arguments of the logic."""
        from MedAnomalyCLIPLib.panel_prompt import prompt_wanted

        parameters = self.parameters()
        return {
            "detector": parameters.detector,
            "threshold": parameters.threshold if parameters.thresholdChosen else None,
            "device": parameters.device,
            "precision": parameters.precision,
            "window": self._advanced.window(),
            "prompt": prompt_wanted(parameters.preset, parameters.normalPhrases, parameters.abnormalPhrases),
        }

    def parameters(self):
        """The parameter node, also while another module is shown."""
        return self._parameterNode or self.logic.getParameterNode()

    def isShown(self):
        return self._parameterNode is not None

    def updateViews(self):
        """A view came, went or moved: update the selector and, a moment later, the plane's words."""
        self._viewPanel.show(self.logic.viewNames(), self._views.touched, self._parameterNode.viewName)
        self._viewPanel.plane_changed()

    def keepChoice(self, **choice):
        """Parameters by name that the reader chose in a widget to which none can be bound."""
        if self._parameterNode is not None:
            for name, value in choice.items():
                setattr(self._parameterNode, name, value)

    def onDetectorChosen(self, folder):
        self.showMessage("")
        self.keepChoice(detector=folder)

    def showPresets(self):
        """Offer the detector's presets, with the guess for the volume."""
        from MedAnomalyCLIPLib.scene import words_of

        selected, parameters = self._detectors.selected, self._parameterNode
        manifest = None if selected is None else selected.manifest
        self._prompts.show(manifest, parameters.preset, *words_of(parameters.inputVolume))

    def updateDetector(self):
        """Select the detector that the parameter node names, or say why it cannot be and which one is."""
        self._detectors.select_or_tell(self._parameterNode.detector)
        self._parameterNode.detector = self._detectors.folder
        self.showPresets()
        # The slider belongs to the maps that are shown; without any, it shows what the next one starts with.
        if not self._parameterNode.thresholdChosen and not self.logic.hasOverlay():
            self.showOwnThreshold()

    def onOwnThresholdButton(self):
        if self._parameterNode is not None:
            self._parameterNode.thresholdChosen = False
            self.showOwnThreshold()
            self.startPolling()

    def showOwnThreshold(self):
        """Set the slider, and with it the maps that are shown, to the selected detector's own threshold."""
        if self._detectors.selected is not None:
            self.logic.setThreshold(self._detectors.selected.manifest.threshold, wait=False)
            self._parameterNode.threshold = self.logic.threshold

    def currentViewName(self):
        """Layout name of the chosen view, or of the one last touched."""
        return self._parameterNode.viewName or self._views.touched

    def chosenDetector(self):
        """Folder of the detector that is chosen, and device and precision for it."""
        parameters = self._parameterNode
        if parameters is None:
            return "", "auto", "auto"
        return parameters.detector, parameters.device, parameters.precision

    def currentInputs(self):
        """What is chosen for a detection at this moment."""
        from MedAnomalyCLIPLib.panel_slices import Inputs

        if self._parameterNode is None:
            return Inputs(None, "", "")
        return Inputs(self._parameterNode.inputVolume, self.currentViewName(), self._parameterNode.detector)

    # Runs

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
        self._detect.show()
        self.updateButtons()

    def onRestoreButton(self):
        self.logic.restoreForegrounds()
        self.updateButtons()

    def showMessage(self, text):
        self.ui.messageLabel.text = text
        self.ui.messageLabel.setVisible(bool(text))

    def updateButtons(self):
        running = self.logic.isRunning()
        self._advanced.update()
        ready = self._parameterNode is not None and self._parameterNode.inputVolume is not None
        self._detect.update(ready, running)
        self._volume.update(ready, running)
        self.ui.ownThresholdButton.enabled = ready and not running and self._parameterNode.thresholdChosen
        self.ui.restoreButton.enabled = self.logic.hasOverlay()
        self._teach.update()


class MedAnomalyCLIPLogic(VolumeLogic, SetupLogic, TeachingLogic, ScriptedLoadableModuleLogic):
    """Detection in a scene, for the panel and for scripts; needs no window.

    The detector runs on one worker thread that lives as long as the logic. Planes are cut and nodes are
    written on the thread that calls, which has to be Slicer's main thread. Its methods are in the files
    scene_logic_*.py.

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
            used; called on the worker thread, with the device as second argument and the precision by its
            name, each unless it is "auto".
        installEnvironment: what installing asks of Slicer; panel_install.SlicerEnvironment if None.
        threshold: the one last used or set.
        smallestArea: connected parts of masks that are smaller than this, in mm², are left out.
    """

    def __init__(self):
        from MedAnomalyCLIPLib.panel_packages import load_detector

        ScriptedLoadableModuleLogic.__init__(self)
        self.detectorFactory = load_detector

    def getParameterNode(self):
        return MedAnomalyCLIPParameterNode(super().getParameterNode())

    def close(self):
        """Let go of worker and detector; nothing is written to the scene any more."""
        self.cancel()
        self._volumes = None
        self.cancelTeaching()
        if self._worker is not None:
            self._worker.close()
        self._worker = None


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
