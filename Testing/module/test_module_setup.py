"""The section Setup: what it says of the packages, the speed and the downloads, and what its buttons do."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from MedAnomalyCLIPLib.downloads import PLACE, downloads_folder
from MedAnomalyCLIPLib.errors import Cancelled, DependencyMissing, InvalidRequest
from MedAnomalyCLIPLib.readiness import Package, Readiness, Speed


@pytest.fixture(autouse=True)
def own_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv(PLACE, str(tmp_path / "downloads"))


@pytest.fixture
def without_monai(monkeypatch):
    """A Slicer without MONAI and ONNX Runtime; call it to install them, or those that are named."""
    real = importlib.util.find_spec
    gone = {"monai", "onnxruntime"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    return lambda *names: gone.difference_update(names or ("monai", "onnxruntime"))


@pytest.fixture
def install(panel, monkeypatch):
    """What the logic is asked to install; set `fails` to make it fail."""
    asked = SimpleNamespace(calls=[], fails=None, works=lambda: None)

    def setup(ask, wheels, tell, light):
        asked.calls.append((ask, wheels, "light" if light else "full"))
        tell("Installing monai>=1.4")
        if asked.fails:
            raise asked.fails
        asked.works()

    monkeypatch.setattr(panel.logic, "setupPythonRequirements", setup)
    return asked


def test_when_all_is_there_the_section_is_folded_and_says_so(panel):
    assert panel.ui.setupSection.collapsed
    assert panel.ui.setupSection.text == "Setup: ready"
    assert panel.ui.packagesLabel.text.startswith("All packages are installed.<br>Installed: monai ")
    assert not panel.ui.installButton.enabled
    assert panel.ui.measureButton.enabled


def test_what_is_missing_opens_the_section_and_is_named(without_monai, panel):
    assert not panel.ui.setupSection.collapsed
    assert panel.ui.setupSection.text == "Setup: not ready"
    assert "<b>onnxruntime&gt;=1.20 is not installed</b>" in panel.ui.packagesLabel.text
    assert "Light: the bundled detector on the CPU; 76 MB." in panel.ui.packagesLabel.text
    assert (
        "Full: also GPUs, other detectors, phrases of your own and Teach; 83 MB."
        in panel.ui.packagesLabel.text
    )
    assert "torch 2" in panel.ui.packagesLabel.text
    assert panel.ui.installButton.enabled
    assert panel.ui.installLightButton.enabled
    assert not panel.ui.measureButton.enabled
    assert panel.ui.speedLabel.text == "Known when everything is installed"


def test_installing_makes_it_ready_and_folds_it(without_monai, panel, install):
    install.works = without_monai
    panel.ui.installButton.click()
    assert install.calls == [(True, None, "full")]
    assert panel.ui.setupSection.collapsed
    assert not panel.ui.installButton.enabled
    assert "Installing monai>=1.4" in panel.ui.logText.plainText


def test_the_light_installation_makes_the_bundled_detector_ready(without_monai, panel, install):
    install.works = lambda: without_monai("onnxruntime")
    panel.ui.installLightButton.click()
    assert install.calls == [(True, None, "light")]
    assert panel.ui.setupSection.text == "Setup: ready, light"
    assert panel.ui.setupSection.collapsed
    assert not panel.ui.installLightButton.enabled
    assert panel.ui.installButton.enabled
    assert panel.ui.measureButton.enabled
    assert panel.ui.packagesLabel.text.startswith(
        "The bundled detector is ready, on the CPU.<br>Full: also GPUs"
    )


def test_the_light_installation_serves_the_bundled_detector_on_the_cpu_alone(
    without_monai, panel, tiny_bundle
):
    without_monai("onnxruntime")
    assert panel.logic.isReady()
    assert panel.logic.isReady(device="cpu")
    assert panel.logic.isReady(device="cuda").reasons == ("monai>=1.4 is not installed",)
    assert panel.logic.isReady(detector=tiny_bundle.folder).reasons == ("monai>=1.4 is not installed",)


def test_another_detector_asks_for_the_full_installation(without_monai, panel, tiny_bundle):
    from MedAnomalyCLIPLib.panel_packages import load_detector

    without_monai("onnxruntime")
    assert load_detector().provenance.runtime.startswith("ONNX Runtime")
    with pytest.raises(DependencyMissing, match=r"monai>=1\.4\.\nClick Install full"):
        load_detector(str(tiny_bundle.folder))


def test_light_leaves_pytorch_out(hosted_module):
    from MedAnomalyCLIPLib.panel_install import SlicerEnvironment

    light, full = ({p.name for p in SlicerEnvironment(light=kind).packages()} for kind in (True, False))
    assert full - light == {"torch", "monai", "open_clip_torch"}
    assert light < full


@pytest.mark.parametrize(
    "error",
    [Cancelled("Nothing was installed."), DependencyMissing("pip failed: mend it"), InvalidRequest("no")],
)
def test_what_went_wrong_is_shown_and_can_be_tried_again(without_monai, panel, install, error):
    install.fails = error
    panel.ui.installButton.click()
    assert panel.ui.setupMessageLabel.text == str(error)
    assert str(error) in panel.ui.logText.plainText
    assert panel.ui.installButton.enabled
    assert not panel.ui.setupSection.collapsed


def test_a_folder_of_wheels_is_used_and_remembered(without_monai, panel, install, hosted_module, tmp_path):
    panel.ui.wheelsPath.currentPath = str(tmp_path)
    panel.ui.installButton.click()
    assert install.calls == [(True, tmp_path, "full")]
    again = hosted_module.make_panel()
    assert again.ui.wheelsPath.currentPath == str(tmp_path)
    again.cleanup()


def test_after_a_restart_the_installation_goes_on_by_itself(
    without_monai, hosted_module, views, slot_errors, wait, monkeypatch
):
    from harness.pythonqt import qt

    qt.QSettings().setValue("MedAnomalyCLIP/PendingInstallation", json.dumps(["monai>=1.4"]))
    resumed = []
    monkeypatch.setattr(
        hosted_module.code.MedAnomalyCLIPLogic, "resumeSetup", lambda self, tell: resumed.append(1)
    )
    panel = hosted_module.make_panel()
    assert resumed == []
    wait(lambda: resumed == [1])
    panel.cleanup()


def test_nothing_goes_on_when_nothing_waits(panel, wait, monkeypatch):
    monkeypatch.setattr(panel.logic, "resumeSetup", lambda tell: pytest.fail("nothing was asked for"))
    with pytest.raises(TimeoutError):
        wait(lambda: False, seconds=0.2)


# Speed


def test_speed_is_unknown_until_it_is_measured(panel):
    assert panel.ui.speedLabel.text == "Not measured yet on this device"


def test_measuring_happens_in_the_background_and_is_remembered(panel, detector, wait, hosted_module):
    detector.gate.clear()
    panel.ui.measureButton.click()
    assert panel.ui.speedLabel.text == "Measuring…"
    assert not panel.ui.measureButton.enabled
    detector.gate.set()
    wait(lambda: panel.ui.measureButton.enabled, seconds=60)
    assert panel.ui.speedLabel.text.startswith("CPU, ")
    assert panel.ui.speedLabel.text.endswith(" per slice")
    assert len(set(detector.threads)) == 1
    assert "MainThread" not in detector.threads
    assert "Measured: CPU" in panel.ui.logText.plainText
    again = hosted_module.make_panel()
    assert again.ui.speedLabel.text == panel.ui.speedLabel.text
    again.cleanup()


def test_a_detector_that_cannot_be_measured_says_why(panel, wait):
    def fail(folder):
        raise DependencyMissing("torch has gone")

    panel.logic.detectorFactory = fail
    panel.ui.measureButton.click()
    wait(lambda: panel.ui.setupMessageLabel.text == "torch has gone")
    assert panel.ui.measureButton.enabled
    assert panel.ui.speedLabel.text == "Not measured yet on this device"


def test_each_device_and_precision_has_its_own_speed(panel):
    from MedAnomalyCLIPLib.panel_setup import remember_speed

    remember_speed(("", "auto", "auto"), Speed("cuda:0", "NVIDIA Big One (cuda:0)", 0.0123))
    remember_speed(("", "cpu", "auto"), Speed("cpu", "CPU, 8 threads", 12.3))
    panel._setup.update()
    assert panel.ui.speedLabel.text == "NVIDIA Big One (cuda:0): about 12 ms per slice"
    panel._parameterNode.device = "cpu"
    assert panel.ui.speedLabel.text == "CPU, 8 threads: about 12 s per slice"
    panel._parameterNode.precision = "float32"
    assert panel.ui.speedLabel.text == "Not measured yet on this device"


def test_detections_tell_the_speed_but_for_the_first(panel, head, detect, detector):
    quick = detector.detect
    seconds = iter((60.0, 2.5))

    def timed(*words, **options):
        return replace(quick(*words, **options), timings={"preprocess": 0.5, "network": next(seconds)})

    detector.detect = timed
    detect()
    assert panel.ui.speedLabel.text == "Not measured yet on this device"
    detect()
    assert panel.ui.speedLabel.text.endswith("about 3.0 s per slice")


def test_a_speed_is_that_of_the_device_of_the_click(panel, head, detect, detector, wait):
    quick = detector.detect
    detector.detect = lambda *words, **options: replace(quick(*words, **options), timings={"network": 2.5})
    detect()
    detector.gate.clear()
    panel.ui.detectButton.click()
    panel._parameterNode.device = "cpu"
    detector.gate.set()
    wait(lambda: not panel.logic.isRunning())
    assert panel.ui.speedLabel.text == "Not measured yet on this device"
    panel._parameterNode.device = "auto"
    assert panel.ui.speedLabel.text.endswith("about 2.5 s per slice")


@pytest.mark.parametrize(
    "value", ["", "not json", "[]", '{"auto|auto|": 3}', '{"auto|auto|": {"seconds": -1}}']
)
def test_damaged_settings_are_as_good_as_none(panel, value):
    from harness.pythonqt import qt

    qt.QSettings().setValue("MedAnomalyCLIP/Speeds", value)
    panel._setup.update()
    assert panel.ui.speedLabel.text == "Not measured yet on this device"


def test_leaving_while_it_measures_lets_go(hosted_module, views, slot_errors, detector):
    panel = hosted_module.make_panel()
    panel.logic.detectorFactory = lambda folder: detector
    detector.gate.clear()
    panel.ui.measureButton.click()
    panel.cleanup()
    detector.gate.set()
    assert not panel._setup._measuring.running


# Downloads


def test_no_downloads_leave_nothing_to_delete(panel):
    assert panel.ui.downloadsLabel.text == "None"
    assert not panel.ui.deleteDownloadsButton.enabled


def fetched():
    downloads_folder().mkdir(parents=True)
    (downloads_folder() / "ViT.pt").write_bytes(b"x" * 3_000_000)


def test_downloads_are_told_and_deleted_when_the_reader_agrees(panel, monkeypatch):
    import slicer

    fetched()
    panel._setup.update()
    assert panel.ui.downloadsLabel.text == "3 MB"
    asked = []
    monkeypatch.setattr(
        slicer.util, "confirmOkCancelDisplay", lambda text, title: asked.append(text) or len(asked) > 1
    )
    panel.ui.deleteDownloadsButton.click()
    assert (downloads_folder() / "ViT.pt").exists()
    panel.ui.deleteDownloadsButton.click()
    assert not downloads_folder().exists()
    assert str(downloads_folder()) in asked[0]
    assert "3 MB" in asked[0]
    assert not panel.ui.deleteDownloadsButton.enabled
    assert "Deleted downloaded models: 3 MB" in panel.ui.logText.plainText


# The logic's own words


def test_ready_is_true_in_a_condition_and_knows_the_speed(panel):
    from MedAnomalyCLIPLib.panel_setup import remember_speed

    speed = Speed("cpu", "CPU, 2 threads", 0.5)
    remember_speed(("", "auto", "auto"), speed)
    state = panel.logic.isReady()
    assert state
    assert state.speed == speed
    assert "onnxruntime" in {package.name for package in state.packages}
    of_gpus = panel.logic.isReady(device="cuda").packages
    assert {package.name for package in of_gpus} >= {"torch", "monai", "onnxruntime"}


def test_a_detector_that_is_gone_is_a_reason_not_to_be_ready(panel, tmp_path):
    state = panel.logic.isReady(detector=str(tmp_path / "gone"))
    assert not state
    assert "bundle.json" in state.reasons[0]


def test_setting_up_from_the_console_goes_through_the_same_installer(panel, without_monai):
    did = []
    panel.logic.installEnvironment = SimpleNamespace(
        packages=lambda: (Package("monai>=1.4", "monai", "1.6.1" if did else "", bool(did)),),
        installed_version=lambda name: "",
        pip_install=lambda requirements, constraints, options: did.append(requirements) or without_monai(),
        pytorch_logic=lambda: None,
    )
    state = panel.logic.setupPythonRequirements(ask=False)
    assert did == [("monai>=1.4",)]
    assert isinstance(state, Readiness)
    assert state


@pytest.fixture
def loaded(panel, detector, monkeypatch):
    """Folders of the detectors that were loaded; the panel loads ahead at once."""
    monkeypatch.setattr("MedAnomalyCLIPLib.panel_setup.WARM_UP_AFTER_MS", 0)
    folders = []
    panel.logic.detectorFactory = lambda folder, **_options: folders.append(folder) or detector
    return folders


def test_the_bundled_detector_is_loaded_when_the_panel_is_shown_and_then_used(
    panel, head, loaded, detector, wait, detect
):
    panel.enter()
    wait(lambda: loaded)
    assert not panel.logic.isRunning()
    assert panel.ui.detectButton.enabled
    detect()
    assert loaded == [""]
    assert len(detector.threads) == 1


@pytest.mark.parametrize("chosen", [{"device": "cpu"}, {"precision": "float32"}])
def test_it_is_loaded_as_it_will_be_used(panel, head, detector, loaded, wait, detect, chosen):
    options = []
    panel.logic.detectorFactory = lambda *told, **named: options.append((told, named)) or detector
    for name, value in chosen.items():
        setattr(panel.parameters(), name, value)
    panel.enter()
    wait(lambda: options)
    detect()
    assert len(options) == 1
    assert {**dict(zip(("folder", "device"), options[0][0], strict=False)), **options[0][1]} == {
        "folder": "",
        **chosen,
    }


def test_a_run_keeps_its_detector_when_the_panel_is_shown_again(
    panel, head, loaded, detector, tiny_bundle, wait
):
    panel.onDetectorChosen(str(tiny_bundle.folder))
    detector.gate.clear()
    panel.ui.detectButton.click()
    panel.onDetectorChosen("")
    panel.exit()
    panel.enter()
    time_passes()
    detector.gate.set()
    wait(lambda: not panel.logic.isRunning())
    assert loaded == [str(tiny_bundle.folder)]


def test_nothing_is_loaded_ahead_when_the_panel_was_left(panel, loaded):
    panel.enter()
    panel.exit()
    time_passes()
    assert loaded == []


def test_other_detectors_are_loaded_when_they_are_used(panel, head, loaded, tiny_bundle):
    panel.onDetectorChosen(str(tiny_bundle.folder))
    panel.enter()
    assert panel.parameters().detector == str(tiny_bundle.folder)
    time_passes()
    assert loaded == []


def test_nothing_is_loaded_ahead_without_its_packages(without_monai, panel, loaded):
    panel.enter()
    time_passes()
    assert loaded == []


def test_what_was_installed_is_loaded(without_monai, panel, install, loaded, wait):
    install.works = without_monai
    panel.ui.installLightButton.click()
    wait(lambda: loaded)


def test_a_detector_that_cannot_be_loaded_is_told_by_the_first_detection(
    panel, head, detect, wait, monkeypatch
):
    monkeypatch.setattr("MedAnomalyCLIPLib.panel_setup.WARM_UP_AFTER_MS", 0)
    tried = []

    def fail(folder):
        tried.append(folder)
        raise DependencyMissing("onnxruntime is broken")

    panel.logic.detectorFactory = fail
    panel.enter()
    wait(lambda: tried)
    time_passes()
    assert panel.ui.messageLabel.text == ""
    detect()
    assert len(tried) == 2
    assert panel.ui.messageLabel.text == "onnxruntime is broken"


def time_passes():
    """As much as timers of no delay need, and the worker after them."""
    from harness.pythonqt import application

    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        application.processEvents()
        time.sleep(0.005)
