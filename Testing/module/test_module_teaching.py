"""Teaching a detector from a script: no panel, no window."""

from __future__ import annotations

import tempfile
import threading
import time

import numpy as np
import pytest

from MedAnomalyCLIPLib.errors import Cancelled, DependencyMissing, InvalidRequest, UnsupportedImage

SLICES = range(3, 21, 3)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty but for what is tested."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def start(tiny_bundle):
    return str(tiny_bundle.folder)


@pytest.fixture
def logic(hosted_module, views):
    logic = hosted_module.code.MedAnomalyCLIPLogic()
    yield logic
    logic.close()


@pytest.fixture
def done(logic, wait):
    """Collects what `onDone` is called with; call it to wait for that."""

    class Done(list):
        def __call__(self, taught, error):
            self.append((taught, error))

        def wait(self):
            wait(lambda: not logic.pollTeaching(), seconds=200)
            return self[-1]

    return Done()


def test_a_script_teaches_keeps_and_detects(logic, head, start):
    told = []
    taught = logic.teach({head: SLICES}, "Mine", detector=start, onProgress=told.append)
    assert len(taught.left_one_out) == len(SLICES)
    # How many of its stages are seen depends on how fast they pass.
    assert {progress.stage for progress in told if progress} <= {
        "load",
        "prepare",
        "compare",
        "choose",
        "write",
    }
    assert any(told)
    folder = taught.keep(logic.detectorsFolder())
    result = logic.detect(head, "Red", detector=folder).result
    assert result.provenance.bundle == "Mine"
    assert result.percentile is not None


def test_planes_that_were_cut_before_and_slices_by_number_are_the_same(logic, head, start):
    from MedAnomalyCLIPLib.geometry import cut_slice
    from MedAnomalyCLIPLib.scene import volume_from_node

    planes = [cut_slice(volume_from_node(head), 2, index) for index in SLICES]
    one = logic.teach({head: SLICES}, "Mine", detector=start)
    two = logic.teach({"another name": planes}, "Mine", detector=start)
    assert one.bundle.manifest == two.bundle.manifest
    assert one.left_one_out == two.left_one_out


def test_several_volumes_are_told_apart(logic, head, start):
    import slicer

    from harness.phantom import add_volume, axial_matrix
    from harness.phantom import head as phantom_head

    voxels, _ = phantom_head(seed=1)
    other = add_volume(voxels, axial_matrix(voxels.shape), "Other")
    taught = logic.teach({head: [5, 9], other: [5, 9]}, "Two", detector=start)
    assert "4 slices of 2 volumes" in taught.bundle.card
    assert "Head" not in taught.bundle.card
    with pytest.raises(InvalidRequest, match="among the slices already"):
        logic.teach({head: [5, 5]}, "Twice", detector=start)
    assert slicer.mrmlScene.IsNodePresent(head)


def test_the_axis_may_be_chosen(logic, head, start):
    assert "sagittal" in logic.teach({head: range(20, 50, 6)}, "x", axis=0, detector=start).bundle.card


def test_no_node_is_left_in_the_scene(logic, head, start):
    import slicer

    slicer.mrmlScene.GetSubjectHierarchyNode()  # made by Slicer when it is first asked for
    before = slicer.mrmlScene.GetNumberOfNodes()
    logic.teach({head: SLICES}, "Mine", detector=start)
    assert slicer.mrmlScene.GetNumberOfNodes() == before


def test_starting_returns_at_once_and_the_network_runs_elsewhere(logic, head, start, done, monkeypatch):
    from MedAnomalyCLIPLib.detectors.detector import AnomalyDetector

    threads, align = set(), AnomalyDetector.align

    def spied(self, *arguments):
        threads.add(threading.current_thread())
        return align(self, *arguments)

    monkeypatch.setattr(AnomalyDetector, "align", spied)
    logic.startTeaching({head: SLICES}, "Mine", detector=start, onDone=done)
    assert logic.isTeaching()
    assert not done
    taught, error = done.wait()
    assert error is None
    assert taught.name == "Mine"
    assert not logic.isTeaching()
    assert threads
    assert threading.main_thread() not in threads


def test_one_slice_is_cut_at_each_poll(logic, head, start, done, monkeypatch):
    from MedAnomalyCLIPLib import scene_slices

    cut, counts = scene_slices.cut_slice, []
    monkeypatch.setattr(scene_slices, "cut_slice", lambda *a: counts.append(1) or cut(*a))
    logic.startTeaching({head: SLICES}, "Mine", detector=start, onDone=done)
    for number in range(1, len(SLICES) + 1):
        logic.pollTeaching()
        assert len(counts) == number
    done.wait()


def test_the_main_thread_is_never_held_for_long(logic, head, start, done):
    """Apart from the first call, which imports."""
    logic.teach({head: SLICES}, "Warm", detector=start).discard()
    longest = 0.0
    logic.startTeaching({head: SLICES}, "Mine", detector=start, onDone=done)
    while logic.isTeaching():
        begun = time.thread_time()
        logic.pollTeaching()
        longest = max(longest, time.thread_time() - begun)
        time.sleep(0.002)
    assert longest < 0.05


def test_16_normal_slices_are_enough_to_tell_painted_ones_from_others(logic, views):
    """The bundled detector, in less than two minutes of one core; held-out slices of the same volume."""
    from benchmarks.teach import divided, figures, normal_slices, painted
    from harness.phantom import add_volume, axial_matrix
    from harness.phantom import head as phantom_head
    from MedAnomalyCLIPLib.detection import SliceDetector
    from MedAnomalyCLIPLib.geometry import cut_slice
    from MedAnomalyCLIPLib.scene import volume_from_node

    voxels, spot = phantom_head((60, 128, 112))
    voxels[spot] = 560  # as what is around it
    node = add_volume(voxels, axial_matrix(voxels.shape, (1.8, 1.8, 2.5)), "Normal")
    volume = volume_from_node(node)
    slices, held_out = divided(volume, 2, normal_slices(volume, 2, None), 16)
    begun = time.process_time()
    taught = logic.teach({node: slices}, "Mine")
    assert time.process_time() - begun < 120
    cases = [
        case
        for number, index in enumerate(held_out[::2])
        for case in painted(cut_slice(volume, 2, index), number, seed=0)
    ]
    found = figures(SliceDetector.load(taught.bundle.folder, device="cpu"), cases)
    assert (found["normal"], found["painted"]) == (4, 12)
    assert found["image_auroc"] > 0.7
    assert found["pixel_auroc"] > 0.85


def test_a_detection_comes_between_two_steps(logic, head, start, done):
    logic.startTeaching({head: range(24)}, "Mine", detector=start, onDone=done)
    while logic.teachingProgress() is None or logic.teachingProgress().stage != "compare":
        logic.pollTeaching()
    logic.detect(head, "Red", detector=start)
    assert logic.isTeaching()
    assert done.wait()[0] is not None


def test_a_second_teaching_is_refused(logic, head, start):
    logic.startTeaching({head: SLICES}, "Mine", detector=start)
    with pytest.raises(InvalidRequest, match="being taught"):
        logic.startTeaching({head: SLICES}, "Mine", detector=start)


@pytest.mark.parametrize("polls", [0, 3, 7, 12])
def test_cancelling_leaves_nothing(logic, head, start, done, temporary, polls, wait):
    logic.startTeaching({head: SLICES}, "Mine", detector=start, onDone=done)
    for _ in range(polls):
        logic.pollTeaching()
    logic.cancelTeaching()
    assert not logic.isTeaching()
    assert not logic.pollTeaching()
    logic.close()
    wait(lambda: not list(temporary.iterdir()))
    assert not done


def test_a_cancelled_detector_that_was_ready_is_gone(logic, head, start, temporary):
    logic.startTeaching({head: SLICES}, "Mine", detector=start)
    for _ in SLICES:
        logic.pollTeaching()
    logic._teaching._run.future.result(timeout=60)
    assert list(temporary.iterdir())
    logic.cancelTeaching()
    assert not list(temporary.iterdir())


def test_a_volume_deleted_before_its_slices_are_cut_ends_it(logic, head, start, done):
    import slicer

    logic.startTeaching({head: SLICES}, "Mine", detector=start, onDone=done)
    logic.pollTeaching()
    slicer.mrmlScene.RemoveNode(head)
    taught, error = done.wait()
    assert taught is None
    assert isinstance(error, Cancelled)


def test_a_volume_deleted_afterwards_is_not_missed(logic, head, start, done):
    import slicer

    logic.startTeaching({head: SLICES}, "Mine", detector=start, onDone=done)
    for _ in SLICES:
        logic.pollTeaching()
    slicer.mrmlScene.RemoveNode(head)
    assert done.wait()[0] is not None


@pytest.mark.parametrize(
    ("slices", "name", "error"),
    [([3], "Mine", InvalidRequest), (SLICES, " ", InvalidRequest), ([3, 99], "Mine", InvalidRequest)],
)
def test_what_cannot_be_taught_is_refused_and_the_next_one_is_not(logic, head, start, slices, name, error):
    with pytest.raises(error):
        logic.teach({head: slices}, name, detector=start)
    assert logic.teach({head: SLICES}, "Mine", detector=start)


def test_no_volume_is_refused(logic, start):
    with pytest.raises(UnsupportedImage, match="choose one"):
        logic.teach({None: [1, 2]}, "Mine", detector=start)


def test_missing_packages_are_told_as_for_detection(logic, head, monkeypatch):
    from MedAnomalyCLIPLib import panel_packages

    monkeypatch.setattr(panel_packages, "missing_requirements", lambda: ["monai>=1.4"])
    with pytest.raises(DependencyMissing, match="monai"):
        logic.teach({head: SLICES}, "Mine")


def test_interrupting_the_console_stops_the_worker(logic, head, start, temporary, wait):
    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        logic.teach({head: SLICES}, "Mine", detector=start, onProgress=interrupt)
    logic.close()
    wait(lambda: not list(temporary.iterdir()))


# Slices of nodes


def test_a_view_is_brought_back_to_a_plane(views, head):
    from MedAnomalyCLIPLib.scene import plane_in_view
    from MedAnomalyCLIPLib.scene_navigation import show_plane

    views["Red"].tilt(12)
    plane = plane_in_view(head, "Red")
    views["Red"].tilt(-12)
    views["Red"].node.SetSliceOffset(40)
    views["Red"].composite.SetBackgroundVolumeID(None)
    show_plane(head, plane, "Red")
    again = plane_in_view(head, "Red")
    assert again.description == plane.description
    centre = [(size - 1) / 2 for size in reversed(plane.shape)]
    away = np.linalg.inv(again.ijk_to_ras) @ [*plane.to_ras(*centre), 1]
    assert abs(away[2]) * np.linalg.norm(again.ijk_to_ras[:3, 2]) < 1e-3
    assert views["Red"].composite.GetBackgroundVolumeID() == head.GetID()


def test_a_range_is_counted_along_the_axis_that_a_view_shows(views, head):
    from MedAnomalyCLIPLib.scene_slices import SliceStack

    assert SliceStack.of(head, "Red") == SliceStack(2, 24, "Axial")
    assert SliceStack.of(head, "Green") == SliceStack(1, 80, "Coronal")
    views["Green"].tilt(20)
    assert SliceStack.of(head, "Green") == SliceStack(2, 24, "Axial")
    views["Red"].node.SetSliceOffset(1000)
    assert SliceStack.of(head, "Red") == SliceStack(2, 24, "Axial")
