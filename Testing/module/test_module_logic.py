"""The logic as a script uses it: no panel, no window."""

from __future__ import annotations

import re
import sys
import textwrap
import unittest
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from MedAnomalyCLIPLib.detectors.presets import PRESETS
from MedAnomalyCLIPLib.errors import BundleInvalid, Cancelled, InvalidRequest, UnsupportedImage


@pytest.fixture
def logic(hosted_module, views, detector):
    logic = hosted_module.code.MedAnomalyCLIPLogic()
    logic.detectorFactory = lambda folder: detector
    yield logic
    detector.gate.set()
    logic.close()


def finish(logic, wait):
    wait(lambda: not logic.poll())


def test_detecting_on_a_view_shows_the_map_there(logic, head, views):
    detection = logic.detect(head, "Green")
    assert views["Green"].composite.GetForegroundVolumeID() == detection.mapNode.GetID()
    assert views["Red"].composite.GetForegroundVolumeID() is None


def test_a_plane_of_ones_own_needs_no_view(logic, head, views):
    from MedAnomalyCLIPLib.geometry import cut_slice
    from MedAnomalyCLIPLib.scene import volume_from_node

    plane = cut_slice(volume_from_node(head), 2, 13)
    detection = logic.detect(head, plane=plane)
    assert detection.result.plane is plane
    assert detection.segmentationNode.GetSegmentation().GetSegment(detection.segmentId)
    assert all(view.composite.GetForegroundVolumeID() is None for view in views.values())


def test_a_colour_volume_is_detected_on(logic, head, views):
    import slicer

    from harness.phantom import add_volume, axial_matrix

    grey = slicer.util.arrayFromVolume(head) // 4
    colour = np.stack([grey, grey // 2, grey // 3], axis=-1).astype(np.uint8)
    node = add_volume(colour, axial_matrix(grey.shape), "Colour")
    detection = logic.detect(node, "Red", threshold=0.05)
    assert detection.result.plane.pixels.shape[-1] == 3
    assert detection.segmentationNode is not None


def test_nothing_found_gives_a_map_and_no_segment(logic, head):
    detection = logic.detect(head, "Red", threshold=1.0)
    assert detection.mapNode is not None
    assert detection.segmentationNode is None


def test_neither_view_nor_plane_is_refused(logic, head):
    with pytest.raises(InvalidRequest, match="slice view"):
        logic.detect(head)


def test_no_volume_is_refused(logic):
    with pytest.raises(UnsupportedImage, match="choose one"):
        logic.detect(None, "Red")


def test_the_detector_is_made_once(logic, head, detector):
    made = []
    logic.detectorFactory = lambda folder: made.append(1) or detector
    logic.detect(head, "Red")
    logic.detect(head, "Green")
    assert made == [1]


def test_a_factory_that_failed_is_asked_again(logic, head, detector):
    attempts = []

    def factory(folder):
        attempts.append(1)
        if len(attempts) == 1:
            raise UnsupportedImage("not yet")
        return detector

    logic.detectorFactory = factory
    with pytest.raises(UnsupportedImage):
        logic.detect(head, "Red")
    logic.detect(head, "Red")
    assert len(attempts) == 2


def test_starting_returns_before_the_result_is_there(logic, head, detector, wait):
    detections = []
    detector.gate.clear()
    logic.startDetection(head, "Red", onDone=lambda detection, error: detections.append((detection, error)))
    assert logic.isRunning()
    assert logic.poll()
    assert not detections
    detector.gate.set()
    finish(logic, wait)
    (detection, error) = detections[0]
    assert detection.result.score > 0.8
    assert error is None


def test_a_second_start_is_refused(logic, head, detector):
    detector.gate.clear()
    logic.startDetection(head, "Red")
    with pytest.raises(InvalidRequest, match="running"):
        logic.startDetection(head, "Green")


def test_an_error_on_the_worker_reaches_the_callback(logic, head, detector, wait):
    errors = []

    def refuse(*_, **__):
        raise UnsupportedImage("no")

    detector.detect = refuse
    logic.startDetection(head, "Red", onDone=lambda detection, error: errors.append(error))
    finish(logic, wait)
    assert isinstance(errors[0], UnsupportedImage)


def test_a_callback_may_start_the_next_detection(logic, head, wait):
    done = []

    def next_one(detection, error):
        done.append(detection)
        if len(done) == 1:
            logic.startDetection(head, "Green", onDone=next_one)

    logic.startDetection(head, "Red", onDone=next_one)
    finish(logic, wait)
    assert len(done) == 2


def test_a_volume_deleted_meanwhile_is_told_as_cancelled(logic, head, detector, wait):
    import slicer

    errors = []
    detector.gate.clear()
    logic.startDetection(head, "Red", onDone=lambda detection, error: errors.append(error))
    slicer.mrmlScene.RemoveNode(head)
    detector.gate.set()
    finish(logic, wait)
    assert isinstance(errors[0], Cancelled)


def test_a_closed_logic_writes_nothing_and_can_start_again(logic, head, detector, wait):
    import slicer

    detector.gate.clear()
    logic.startDetection(head, "Red")
    wait(lambda: bool(detector.threads))
    logic.close()
    detector.gate.set()
    assert not logic.poll()
    assert not slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
    assert logic.detect(head, "Red").result.score > 0.8


def test_the_threshold_moves_the_segments_of_all_shown_maps(logic, head, views):
    red, green = logic.detect(head, "Red"), logic.detect(head, "Green")
    assert red.segmentId == green.segmentId

    def voxels():
        import slicer

        node, segment_id = red.segmentationNode, red.segmentId
        return int(slicer.util.arrayFromSegmentBinaryLabelmap(node, segment_id, head).sum())

    before = voxels()
    logic.setThreshold(0.5)
    bright = [(r.result.map >= 0.5).sum() for r in (red, green)]
    assert before < voxels() <= sum(bright)
    assert voxels() > max(bright)


def test_the_score_of_a_warped_volume_is_that_of_the_plane_seen(logic, head, views):
    """Bent out of the way, the bright spot is no longer in the slice."""
    from harness.phantom import add_linear_transform, translation

    head.SetAndObserveTransformNodeID(add_linear_transform(translation(0, 0, 60)).GetID())
    assert logic.detect(head, "Red").result.score < 0.8


ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "MedAnomalyCLIP" / "Resources" / "Models" / "default" / "bundle.json"
needs_the_bundled_detector = pytest.mark.skipif(not BUNDLE.is_file(), reason="no bundled detector here")


@needs_the_bundled_detector
def test_the_modules_own_test_class_passes(hosted_module, slicer_scene):
    case = hosted_module.code.MedAnomalyCLIPTest
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun == 7
    assert not result.errors + result.failures
    assert [case.id().split(".")[-1] for case, _ in result.skipped] == ["test_samples_are_offered"]


def test_the_test_class_passes_as_reload_and_test_runs_it(hosted_module, slicer_scene):
    hosted_module.code.MedAnomalyCLIPTest().runTest()


@needs_the_bundled_detector
def test_the_bundled_detector_detects_in_the_scene(hosted_module, head, views):
    logic = hosted_module.code.MedAnomalyCLIPLogic()
    detection = logic.detect(head, "Red", threshold=0.0)
    logic.close()
    assert 0 <= detection.result.score <= 1
    import slicer

    shown = slicer.util.arrayFromVolume(detection.mapNode)[0]
    np.testing.assert_array_equal(shown, detection.result.map)
    assert detection.mapNode.GetAttribute("MedAnomalyCLIP.BundleSHA256")


# Detectors of one's own


@pytest.fixture
def real_logic(hosted_module, views):
    """The logic as a script gets it, with networks instead of the stand-in."""
    logic = hosted_module.code.MedAnomalyCLIPLogic()
    yield logic
    logic.close()


def test_a_folder_is_all_that_another_detector_needs(real_logic, head, make_bundle):
    from MedAnomalyCLIPLib.detection import SliceDetector

    bundle = make_bundle("mine", threshold=0.4321, image_threshold=0.9)
    result = real_logic.detect(head, "Red", detector=bundle.folder).result
    expected = SliceDetector.load(bundle.folder).detect(result.plane)
    np.testing.assert_array_equal(result.map, expected.map)
    assert (result.score, result.percentile) == (expected.score, expected.percentile)
    assert (result.threshold, result.image_threshold) == (0.4321, 0.9)


@pytest.fixture
def make_published(make_bundle, tiny_tower):
    """A published system around the tiny tower, on disk; returns its folder."""

    def make(system):
        spec = PRESETS[system].detector
        parts = replace(
            spec,
            tower=replace(tiny_tower, taps=(1, 2, 3, 4)),
            text=replace(spec.text, name="Brain"),
            memory=spec.memory and replace(spec.memory, rows=64),
        )
        return make_bundle(system, detector=parts).folder

    return make


@pytest.mark.parametrize("system", [name for name in PRESETS if not PRESETS[name].detector.feature_fusion])
def test_a_detector_of_every_published_system_detects_as_it_does_without_a_scene(
    real_logic, head, make_published, system
):
    from MedAnomalyCLIPLib.detection import SliceDetector

    folder = make_published(system)
    result = real_logic.detect(head, "Red", detector=folder).result
    expected = SliceDetector.load(folder).detect(result.plane)
    assert (result.score, result.provenance) == (expected.score, expected.provenance)
    np.testing.assert_array_equal(result.map, expected.map)


def test_a_detector_that_wants_more_than_the_image_is_refused_in_words(real_logic, head, make_published):
    with pytest.raises(InvalidRequest, match="needs 4 feature maps beside its images"):
        real_logic.detect(head, "Red", detector=make_published("diffusionclip"))


def test_the_nodes_name_the_detector_that_was_used(real_logic, head, make_bundle):
    bundle = make_bundle("mine", version="2.5", image_threshold=0.75)
    detection = real_logic.detect(head, "Red", detector=str(bundle.folder), threshold=0.0)
    facts = {
        "Bundle": "mine",
        "BundleVersion": "2.5",
        "BundleSHA256": bundle.manifest.weights_sha256,
        "ImageThreshold": "0.75",
    }
    for node in (detection.mapNode, detection.segmentationNode):
        assert {key: node.GetAttribute(f"MedAnomalyCLIP.{key}") for key in facts} == facts


def test_a_threshold_of_ones_own_goes_before_the_detectors(real_logic, head, make_bundle):
    folder = make_bundle(threshold=0.4).folder
    assert real_logic.detect(head, "Red", detector=folder, threshold=0.2).result.threshold == 0.2
    assert real_logic.detect(head, "Red", detector=folder).result.threshold == 0.4


def test_a_folder_that_holds_no_detector_is_refused(logic, head, tmp_path):
    with pytest.raises(BundleInvalid, match="choose the folder of a detector"):
        logic.detect(head, "Red", detector=tmp_path)
    assert not logic.isRunning()


def test_a_detector_is_kept_until_another_is_asked_for(logic, head, detector, make_bundle):
    loaded = []
    logic.detectorFactory = lambda folder: loaded.append(Path(folder).name) or detector
    one, two = make_bundle("one").folder, make_bundle("two").folder
    for folder in (one, one, two, two, "", "", one):
        logic.detect(head, "Red", detector=folder)
    assert loaded == ["one", "two", "", "one"]


def test_a_detector_trained_anew_in_its_folder_is_loaded_anew(real_logic, head, make_bundle):
    folder = make_bundle(seed=1).folder
    before = real_logic.detect(head, "Red", detector=folder).result
    make_bundle(seed=2)
    after = real_logic.detect(head, "Red", detector=folder).result
    assert before.provenance.bundle_sha256 != after.provenance.bundle_sha256
    assert not np.array_equal(before.map, after.map)


# What the documentation tells to type


@pytest.fixture
def typed(hosted_module, views, tiny_bundle, tmp_path, monkeypatch):
    """Types an example into a console whose scene holds a head named MRHead, shown in Red."""
    import slicer

    from harness import phantom

    voxels, _ = phantom.head((104, 64, 56))
    node = phantom.add_volume(voxels, phantom.axial_matrix(voxels.shape, (3.0, 3.0, 1.5)), "MRHead")
    views["Red"].show(node)
    logic = hosted_module.code.MedAnomalyCLIPLogic()
    monkeypatch.setattr(slicer.util, "getModuleLogic", {"MedAnomalyCLIP": logic}.get, raising=False)
    samples = SimpleNamespace(downloadSample={"MRBrainTumor1": node}.get)
    monkeypatch.setitem(sys.modules, "SampleData", samples)
    monkeypatch.chdir(tmp_path)

    def type_in(example, **names):
        example = example.replace("/detectors/mvfa-brain", str(tiny_bundle.folder))
        names = {"slicer": slicer, **names}
        exec(compile(example, "example", "exec"), names)
        return names

    yield type_in
    logic.close()


def test_the_console_example_of_the_readme_runs(typed, capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```\n(logic = slicer\.util\.getModuleLogic.*?)```", text, re.DOTALL)
    names = typed(example)
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert names["other"].result.provenance.bundle == "tiny"
    assert names["mine"].is_dir()


def test_the_console_example_of_the_tutorial_runs(typed, capsys):
    text = (ROOT / "Resources" / "tutorial.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```\n(import SampleData.*?)```", text, re.DOTALL)
    names = typed(example)
    assert names["detection"].result.window is not None
    assert capsys.readouterr().out.splitlines()[0] == "ready"


def test_the_example_of_the_logic_itself_runs(typed, hosted_module, detector, capsys):
    """But for its last two lines, which teach as the README's example does."""
    import slicer

    logic = hosted_module.code.MedAnomalyCLIPLogic()
    logic.detectorFactory = lambda folder: detector
    example = textwrap.dedent(re.search(r"Example:\n(.*?)\n\n", logic.__doc__, re.DOTALL)[1])
    example, found, _rest = example.partition("taught =")
    assert found
    typed(example, MedAnomalyCLIPLogic=lambda: logic, volumeNode=slicer.util.getNode("MRHead"))
    logic.close()
    assert len(capsys.readouterr().out.splitlines()) > 12
