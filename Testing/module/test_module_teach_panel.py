"""The section Teach as a reader uses it: add slices, teach, look at the scores, keep or discard."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest

from harness.phantom import add_volume, axial_matrix
from harness.phantom import head as phantom_head
from MedAnomalyCLIPLib.bundle_list import list_bundles


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty but for what is tested."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def own_detectors(fresh_settings):
    return fresh_settings / "MedAnomalyCLIP" / "Detectors"


@pytest.fixture
def section(panel, head, tiny_bundle):
    """The opened section, starting from a tiny detector; the phantom is chosen for ranges."""
    panel.logic.getParameterNode().detector = str(tiny_bundle.folder)
    panel.ui.teachSection.collapsed = False
    panel.ui.teachVolumeSelector.setCurrentNode(head)
    return panel._teach


@pytest.fixture
def ui(panel, section):
    return panel.ui


@pytest.fixture
def add_range(ui, wait, section):
    def add(first=4, last=22, step=3):
        ui.teachFirstSpin.value, ui.teachLastSpin.value, ui.teachStepSpin.value = first, last, step
        ui.teachAddRangeButton.click()
        wait(lambda: not section._list.is_adding)

    return add


@pytest.fixture
def teach(ui, panel, wait, add_range):
    """Add slices where there are none, name the detector, click Teach and wait."""

    def click(name="My scanner"):
        if ui.teachTable.rowCount == 0:
            add_range()
        ui.teachNameEdit.text = name
        ui.teachButton.click()
        wait(lambda: not panel.logic.isTeaching(), seconds=200)

    return click


def column(ui, number):
    items = (ui.teachTable.item(row, number) for row in range(ui.teachTable.rowCount))
    return [item.text() if item is not None else "" for item in items]


def is_shown(widget):
    return not widget.isHidden()


def another(name="Other", seed=1, **shape):
    voxels, _ = phantom_head(seed=seed, **shape)
    return add_volume(voxels, axial_matrix(voxels.shape), name)


# Choosing slices


def test_the_section_is_folded_at_first(panel):
    assert panel.ui.teachSection.collapsed


def test_nothing_can_be_taught_without_slices(ui):
    assert ui.teachCountLabel.text == "No slices yet"
    assert not ui.teachButton.enabled
    assert not ui.teachClearButton.enabled
    assert not is_shown(ui.teachKeepButton)


def test_the_current_slice_is_that_of_the_view(ui, views):
    ui.teachAddButton.click()
    views["Red"].node.SetSliceOffset(0)
    ui.teachAddButton.click()
    views["Red"].tilt(10)
    ui.teachAddButton.click()
    assert column(ui, 0)[:2] == ["Axial 14 of 24: Head", "Axial 13 of 24: Head"]
    assert column(ui, 0)[2].startswith("Axial oblique 10°")
    assert ui.teachCountLabel.text == "3 slices of one volume; 8 or more are better"


def test_one_slice_is_not_enough(ui):
    ui.teachNameEdit.text = "Mine"
    ui.teachAddButton.click()
    assert ui.teachCountLabel.text == "1 slice; 2 are needed, 8 or more are better"
    assert not ui.teachButton.enabled


def test_a_range_starts_with_all_slices_a_few_apart(ui, head):
    assert ui.teachRangeLabel.text == "Axial slices"
    assert (ui.teachFirstSpin.value, ui.teachLastSpin.value, ui.teachStepSpin.value) == (1, 24, 1)
    tall = another("Tall", shape=(80, 40, 36))
    ui.teachVolumeSelector.setCurrentNode(tall)
    assert (ui.teachFirstSpin.value, ui.teachLastSpin.value, ui.teachStepSpin.value) == (1, 80, 5)


def test_a_range_is_added(ui, add_range):
    add_range(4, 10, 3)
    assert column(ui, 0) == [f"Axial {number} of 24: Head" for number in (4, 7, 10)]
    assert not is_shown(ui.teachMessageLabel)


def test_a_range_follows_the_view(ui, views, wait, add_range):
    views["Green"].node.SetSliceOffset(4)
    wait(lambda: ui.teachRangeLabel.text == "Coronal slices")
    assert ui.teachLastSpin.value == 80
    add_range(20, 40, 10)
    assert column(ui, 0)[0] == "Coronal 20 of 80: Head"


def test_a_range_that_the_view_has_just_changed_is_not_added_unseen(ui, views, add_range):
    views["Green"].node.SetSliceOffset(4)
    add_range(4, 10, 3)
    assert ui.teachTable.rowCount == 0
    assert "look at the range again" in ui.teachMessageLabel.text
    assert ui.teachRangeLabel.text == "Coronal slices"


def test_slices_of_another_volume_are_added_beside(ui, add_range):
    add_range(4, 10, 3)
    ui.teachVolumeSelector.setCurrentNode(another())
    add_range(4, 10, 3)
    assert column(ui, 0)[3] == "Axial 4 of 24: Other"
    assert ui.teachCountLabel.text.startswith("6 slices of 2 volumes")


def test_slices_that_show_little_are_left_out_and_told(ui, add_range):
    add_range(1, 24, 1)
    assert column(ui, 0)[0] == "Axial 3 of 24: Head"
    assert ui.teachTable.rowCount == 20
    words = "Axial 1 of 24, aligned shows little but background; 3 more slices were left out"
    assert ui.teachMessageLabel.text == words


def test_a_current_slice_that_shows_little_is_refused(ui, views):
    views["Red"].node.SetSliceOffset(-57.5)
    ui.teachAddButton.click()
    assert ui.teachTable.rowCount == 0
    assert ui.teachMessageLabel.text == "Axial 1 of 24, aligned shows little but background"


def test_a_slice_is_not_added_twice(ui, add_range):
    ui.teachAddButton.click()
    ui.teachAddButton.click()
    assert ui.teachTable.rowCount == 1
    assert ui.teachMessageLabel.text == "Axial 14 of 24, aligned is among the slices already"
    add_range(13, 15, 1)
    assert column(ui, 0) == [f"Axial {number} of 24: Head" for number in (14, 13, 15)]


def test_colour_is_not_mixed_with_grey(panel, ui, views):
    import slicer

    grey = slicer.util.arrayFromVolume(panel.ui.inputSelector.currentNode()) // 4
    colour = np.stack([grey, grey // 2, grey // 3], axis=-1).astype(np.uint8)
    ui.teachAddButton.click()
    panel.ui.inputSelector.setCurrentNode(add_volume(colour, axial_matrix(grey.shape), "Colour"))
    ui.teachAddButton.click()
    assert ui.teachTable.rowCount == 1
    assert "is colour and the others are grey" in ui.teachMessageLabel.text


def test_a_view_beside_the_volume_gives_no_slice(ui, views):
    views["Red"].node.SetSliceOffset(500)
    ui.teachAddButton.click()
    assert "does not cut the image" in ui.teachMessageLabel.text


def test_slices_are_removed_and_cleared(ui, add_range):
    add_range(4, 13, 3)
    ui.teachTable.selectRow(1)
    ui.teachRemoveButton.click()
    assert column(ui, 0) == [f"Axial {number} of 24: Head" for number in (4, 10, 13)]
    assert not ui.teachRemoveButton.enabled
    ui.teachClearButton.click()
    assert ui.teachTable.rowCount == 0


def test_a_row_brings_the_view_to_its_slice(ui, views, add_range, panel):
    add_range(4, 13, 3)
    views["Red"].composite.SetBackgroundVolumeID(None)
    ui.teachTable.selectRow(2)
    assert panel.logic.describePlane(panel.ui.inputSelector.currentNode(), "Red") == "Axial 10 of 24, aligned"


def test_a_volume_deleted_while_its_slices_are_added_is_told(ui, head, section, wait):
    import slicer

    ui.teachAddRangeButton.click()
    slicer.mrmlScene.RemoveNode(head)
    wait(lambda: not section._list.is_adding)
    assert "deleted" in ui.teachMessageLabel.text


def test_the_list_outlives_its_scene_and_the_next_patient_is_another(ui, views, add_range, section):
    import slicer

    add_range(4, 13, 3)
    slicer.mrmlScene.Clear(False)
    views["Red"].reset()
    ui.teachTable.selectRow(0)
    assert ui.teachMessageLabel.text == "The volume of this slice is no longer open."
    node = another("Next", seed=2)
    views["Red"].show(node)
    ui.teachVolumeSelector.setCurrentNode(node)
    section.update_inputs()
    add_range(4, 13, 3)
    assert ui.teachCountLabel.text == "8 slices of 2 volumes"


def test_a_scene_closed_while_slices_are_added_is_told(ui, section):
    import slicer

    ui.teachAddRangeButton.click()
    slicer.mrmlScene.Clear(False)
    assert not section._list.is_adding
    assert "closed before all slices" in ui.teachMessageLabel.text


# Teaching


def test_a_name_is_asked_for(ui, add_range):
    add_range()
    assert not ui.teachButton.enabled
    assert "name" in ui.teachStatusLabel.text
    ui.teachNameEdit.text = "Mine"
    assert ui.teachButton.enabled


def test_scores_are_shown_worst_first_before_anything_is_kept(ui, teach, own_detectors):
    teach()
    scores = [float(text) for text in column(ui, 1)]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 7
    assert all(text.endswith(" %") for text in column(ui, 2))
    assert f"the highest {scores[0]:.2f}" in ui.teachStatusLabel.text
    assert is_shown(ui.teachKeepButton)
    assert is_shown(ui.teachDiscardButton)
    assert not own_detectors.exists()


def test_scores_stand_beside_their_own_slices(ui, panel, section, teach, add_range, head):
    """Slices of two volumes, added by turns."""
    other = another()
    for first in (4, 13):
        for node in (head, other):
            ui.teachVolumeSelector.setCurrentNode(node)
            add_range(first, first + 6, 3)
    teach()
    taught = section._taught
    card = {line.split("|")[2].strip(): float(line.split("|")[3]) for line in _rows(taught, "| 1 |")}
    shown = {
        words: float(score)
        for words, score in zip(column(ui, 0), column(ui, 1), strict=True)
        if words.endswith("Head")
    }
    told = {f"{words.removesuffix(', aligned')}: Head": score for words, score in card.items()}
    assert shown == pytest.approx(told, abs=0.0056)  # of two decimals here, three there


def _rows(taught, start):
    return [line for line in taught.bundle.card.splitlines() if line.startswith(start)]


def test_a_row_brings_the_view_to_its_slice_when_scores_are_shown(ui, panel, teach, head):
    teach()
    ui.teachTable.selectRow(0)
    words = column(ui, 0)[0].removesuffix(": Head")
    assert panel.logic.describePlane(head, "Red") == f"{words}, aligned"


def test_keep_stores_the_detector_and_selects_it(ui, panel, teach, own_detectors, temporary, head):
    from MedAnomalyCLIPLib.panel_packages import load_detector

    teach("Our 3T")
    ui.teachKeepButton.click()
    found, damaged = list_bundles(own_detectors)
    assert [bundle.name for bundle in found] == ["Our 3T"]
    assert not damaged
    assert panel.ui.detectorSelector.currentText == "Our 3T 1"
    assert panel.logic.getParameterNode().detector == str(own_detectors / "Our-3T")
    assert ui.teachMessageLabel.text == "Our 3T was kept and is selected now."
    assert not is_shown(ui.teachKeepButton)
    assert not list(temporary.iterdir())
    panel.logic.detectorFactory = load_detector
    assert panel.logic.detect(head, "Red", detector=own_detectors / "Our-3T").result.percentile is not None


def test_discard_leaves_nothing_but_the_slices(ui, teach, own_detectors, temporary):
    teach()
    ui.teachDiscardButton.click()
    assert not own_detectors.exists()
    assert not list(temporary.iterdir())
    assert ui.teachTable.rowCount == 7
    assert set(column(ui, 1)) == {""}


def test_a_folder_that_cannot_be_written_keeps_the_detector_at_hand(ui, teach, own_detectors):
    own_detectors.parent.parent.mkdir(parents=True)
    own_detectors.parent.write_text("a file in its place")
    teach()
    ui.teachKeepButton.click()
    assert "could not be written" in ui.teachMessageLabel.text
    own_detectors.parent.unlink()
    ui.teachKeepButton.click()
    assert "was kept" in ui.teachMessageLabel.text


def test_other_slices_make_what_was_taught_go(ui, teach, temporary):
    teach()
    ui.teachTable.selectRow(0)
    ui.teachRemoveButton.click()
    assert ui.teachTable.rowCount == 6
    assert not is_shown(ui.teachKeepButton)
    assert set(column(ui, 1)) == {""}
    assert not list(temporary.iterdir())


def test_while_it_is_taught_the_list_rests_and_the_rest_of_the_panel_works(ui, panel, add_range, wait, head):
    add_range(3, 22, 1)
    ui.teachNameEdit.text = "Mine"
    ui.teachButton.click()
    assert ui.teachButton.text == "Cancel"
    assert is_shown(ui.teachProgressBar)
    for name in ("AddButton", "AddRangeButton", "RemoveButton", "ClearButton", "VolumeSelector", "NameEdit"):
        assert not getattr(ui, f"teach{name}").enabled
    panel.ui.detectButton.click()
    wait(lambda: not panel.logic.isRunning(), seconds=200)
    assert panel.ui.scoreLabel.text.startswith("Score")
    wait(lambda: not panel.logic.isTeaching(), seconds=200)
    assert ui.teachButton.text == "Teach"
    assert not is_shown(ui.teachProgressBar)
    assert ui.teachAddButton.enabled


def test_the_time_left_is_told(ui, panel, add_range, wait):
    add_range(3, 22, 1)
    ui.teachNameEdit.text = "Mine"
    told = set()
    ui.teachButton.click()

    def look():
        told.add(ui.teachStatusLabel.text)
        return not panel.logic.isTeaching()

    wait(look, seconds=200)
    assert "Loading the detector…" in told
    assert any(text.startswith("About ") for text in told)


def test_a_second_click_cancels(ui, panel, add_range, temporary, wait):
    add_range()
    ui.teachNameEdit.text = "Mine"
    ui.teachButton.click()
    ui.teachButton.click()
    assert not panel.logic.isTeaching()
    assert ui.teachMessageLabel.text == "Cancelled. The slices are still in the list."
    assert ui.teachTable.rowCount == 7
    ui.teachButton.click()
    wait(lambda: not panel.logic.isTeaching(), seconds=200)
    assert is_shown(ui.teachKeepButton)
    assert len(list(temporary.iterdir())) == 1  # that of the second


def test_a_scene_closed_meanwhile_does_not_stop_it(ui, panel, add_range, own_detectors, wait):
    import slicer

    add_range()
    ui.teachNameEdit.text = "Mine"
    ui.teachButton.click()
    slicer.mrmlScene.Clear(False)
    wait(lambda: not panel.logic.isTeaching(), seconds=200)
    ui.teachKeepButton.click()
    assert [bundle.name for bundle in list_bundles(own_detectors)[0]] == ["Mine"]


def test_a_volume_deleted_meanwhile_does_not_stop_it(ui, panel, add_range, head, wait):
    import slicer

    add_range()
    ui.teachNameEdit.text = "Mine"
    ui.teachButton.click()
    slicer.mrmlScene.RemoveNode(head)
    wait(lambda: not panel.logic.isTeaching(), seconds=200)
    assert is_shown(ui.teachKeepButton)
    ui.teachTable.selectRow(0)
    assert "no longer open" in ui.teachMessageLabel.text


def test_it_goes_on_while_another_module_is_shown(ui, panel, add_range, wait):
    add_range()
    ui.teachNameEdit.text = "Mine"
    ui.teachButton.click()
    panel.exit()
    wait(lambda: not panel.logic.isTeaching(), seconds=200)
    panel.enter()
    assert is_shown(ui.teachKeepButton)


@pytest.mark.parametrize("ready", [False, True])
def test_closing_slicer_or_reloading_leaves_nothing_behind(
    ui, panel, section, add_range, wait, temporary, ready
):
    add_range()
    ui.teachNameEdit.text = "Mine"
    ui.teachButton.click()
    if ready:
        wait(lambda: not panel.logic.isTeaching(), seconds=200)
        assert list(temporary.iterdir())
    panel.cleanup()
    wait(lambda: not list(temporary.iterdir()))


def test_slices_too_close_together_are_told_when_they_are_to_be_taught(panel, ui, views, teach, wait):
    voxels, _ = phantom_head()
    thin = add_volume(voxels, axial_matrix(voxels.shape, (2.0, 2.0, 1.0)), "Thin")
    ui.teachVolumeSelector.setCurrentNode(thin)
    ui.teachFirstSpin.value, ui.teachLastSpin.value, ui.teachStepSpin.value = 10, 13, 1
    ui.teachAddRangeButton.click()
    wait(lambda: ui.teachTable.rowCount == 4)
    teach()
    assert "lies less than 5 mm from all others" in ui.teachMessageLabel.text
    assert not panel.logic.isTeaching()


def test_missing_packages_are_told(ui, teach, monkeypatch):
    from MedAnomalyCLIPLib import panel_packages

    monkeypatch.setattr(panel_packages, "missing_requirements", lambda: ["monai>=1.4"])
    teach()
    assert "monai>=1.4" in ui.teachMessageLabel.text


def test_a_bug_is_not_hidden_and_leaves_the_section_usable(ui, panel, teach, monkeypatch, slot_errors):
    from MedAnomalyCLIPLib.detectors import support

    def crash(*_):
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(support, "_left_out", crash)
        teach()
    assert [str(error) for error in slot_errors] == ["a bug"]
    slot_errors.clear()
    assert ui.teachButton.text == "Teach"
    teach()
    assert is_shown(ui.teachKeepButton)


def test_everything_is_reached_with_the_tab_key(ui):
    from PySide6.QtCore import Qt

    names = ("AddButton", "AddRangeButton", "FirstSpin", "Table", "RemoveButton", "NameEdit", "Button")
    for name in (*names, "KeepButton", "DiscardButton"):
        assert getattr(ui, f"teach{name}").focusPolicy & Qt.FocusPolicy.TabFocus
