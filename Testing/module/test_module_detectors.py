"""Choosing a detector in the panel: the list, the folder dialog, the model card, and what can go wrong."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from harness.application import load_bundle, save_bundle
from MedAnomalyCLIPLib.bundle import CARD, WEIGHTS, default_bundle_path, read_manifest

BUNDLED = read_manifest(default_bundle_path())


@pytest.fixture
def qt(slicer_application):
    from harness.pythonqt import qt

    return qt


@pytest.fixture
def own_detectors(fresh_settings):
    """Where the user's own detectors are looked for; not made yet."""
    return fresh_settings / "MedAnomalyCLIP" / "Detectors"


@pytest.fixture
def real_panel(panel):
    """The panel with networks instead of the stand-in."""
    from MedAnomalyCLIPLib.panel_packages import load_detector

    panel.logic.detectorFactory = load_detector
    return panel


@pytest.fixture
def browse(panel, qt, monkeypatch):
    """Click the browse button and choose a folder."""

    def choose(folder):
        dialog = SimpleNamespace(getExistingDirectory=lambda parent, title, start: str(folder))
        monkeypatch.setattr(qt, "QFileDialog", dialog)
        panel.ui.detectorBrowseButton.click()

    return choose


def offered(panel):
    return [panel.ui.detectorSelector.itemText(i) for i in range(panel.ui.detectorSelector.count)]


def choose(panel, title):
    panel.ui.detectorSelector.setCurrentIndex(offered(panel).index(title))


def enter_again(panel):
    panel.exit()
    panel.enter()


# Choosing


def test_the_bundled_detector_is_selected_at_first(panel):
    assert offered(panel) == ["Bundled detector"]
    assert panel.logic.getParameterNode().detector == ""
    expected = f"{BUNDLED.name}, version {BUNDLED.version}. Research use only."
    assert panel.ui.detectorLabel.text == expected


def test_detectors_in_the_users_folder_are_offered(panel, make_bundle, own_detectors):
    make_bundle("second", own_detectors)
    make_bundle("first", own_detectors, version="0.3")
    enter_again(panel)
    assert offered(panel) == ["Bundled detector", "first 0.3", "second 1"]


def test_detectors_of_one_name_are_told_apart_by_their_folders(panel, make_bundle, own_detectors):
    make_bundle("tiny", own_detectors)
    shutil.copytree(own_detectors / "tiny", own_detectors / "copy")
    enter_again(panel)
    assert sorted(offered(panel)[1:]) == ["tiny 1 (copy)", "tiny 1 (tiny)"]


def test_a_detector_chosen_from_the_list_detects(real_panel, head, make_bundle, own_detectors, detect):
    import slicer

    make_bundle("mine", own_detectors, version="7")
    enter_again(real_panel)
    choose(real_panel, "mine 7")
    assert real_panel.ui.detectorLabel.text == "mine, version 7. Research use only."
    detect()
    assert "Detector: mine, version 7" in real_panel.ui.resultLabel.text.splitlines()
    assert slicer.util.getNode("Head anomaly map*").GetAttribute("MedAnomalyCLIP.Bundle") == "mine"


def test_a_detector_chosen_by_its_folder_detects(real_panel, head, tiny_bundle, browse, detect):
    browse(tiny_bundle.folder)
    assert real_panel.ui.detectorSelector.currentText == "tiny 1"
    assert real_panel.logic.getParameterNode().detector == str(tiny_bundle.folder)
    detect()
    assert not real_panel.ui.messageLabel.text
    reference = tiny_bundle.manifest.reference.percentile(real_panel._detect.result.score)
    assert f"Higher than {int(reference)} %" in real_panel.ui.resultLabel.text


def test_a_folder_dialog_that_was_cancelled_changes_nothing(panel, browse):
    browse("")
    assert panel.ui.detectorSelector.currentText == "Bundled detector"
    assert not panel.ui.messageLabel.text


def test_a_detector_chosen_before_is_offered_in_the_next_session(
    panel, hosted_module, browse, make_bundle, tmp_path
):
    for name in ("one", "two"):
        browse(make_bundle(name).folder)
    browse(default_bundle_path())
    assert panel.ui.detectorSelector.currentText == "Bundled detector"
    other = hosted_module.make_panel()
    assert offered(other) == ["Bundled detector", "two 1", "one 1"]
    shutil.rmtree(tmp_path / "two")
    enter_again(other)
    assert offered(other) == ["Bundled detector", "one 1"]
    other.cleanup()


def test_settings_that_hold_something_else_are_ignored(panel, qt):
    for value in ('{"a": 1}', "[1, null]", "no JSON"):
        qt.QSettings().setValue("MedAnomalyCLIP/RecentDetectors", value)
        enter_again(panel)
        assert offered(panel) == ["Bundled detector"]


def test_a_script_may_choose_too(panel, tiny_bundle):
    panel.logic.getParameterNode().detector = str(tiny_bundle.folder)
    assert panel.ui.detectorSelector.currentText == "tiny 1"


def test_the_users_folder_is_made_only_when_asked_for(panel, own_detectors, qt, monkeypatch):
    opened = []
    monkeypatch.setattr(qt, "QDesktopServices", SimpleNamespace(openUrl=opened.append))
    assert not own_detectors.exists()
    panel.ui.detectorsFolderButton.click()
    assert own_detectors.is_dir()
    assert [url.toLocalFile() for url in opened] == [str(own_detectors)]


def test_a_users_folder_that_cannot_be_made_is_told(panel, own_detectors):
    own_detectors.parent.parent.mkdir()
    own_detectors.parent.write_text("a file in its place")
    panel.ui.detectorsFolderButton.click()
    assert "cannot be made" in panel.ui.messageLabel.text


def test_everything_about_detectors_is_reached_with_the_tab_key(panel):
    from PySide6.QtCore import Qt

    widgets = ("Selector", "BrowseButton", "sFolderButton")
    for name in (*(f"detector{widget}" for widget in widgets), "modelCardButton", "ownThresholdButton"):
        assert getattr(panel.ui, name).focusPolicy & Qt.FocusPolicy.TabFocus


# The choice and a run


def test_a_choice_made_while_the_detector_runs_is_for_the_next_run(
    panel, head, detector, make_bundle, browse, wait, detect
):
    loaded = []
    panel.logic.detectorFactory = lambda folder: loaded.append(folder) or detector
    detector.gate.clear()
    panel.ui.detectButton.click()
    wait(lambda: bool(detector.threads))
    folder = make_bundle().folder
    browse(folder)
    assert panel.ui.detectorSelector.currentText == "tiny 1"
    assert panel.ui.detectButton.text == "Cancel"
    detector.gate.set()
    wait(lambda: not panel.logic.isRunning())
    assert loaded == [""]
    assert panel.ui.scoreLabel.text.startswith("Score")
    detect()
    assert loaded == ["", str(folder)]


def test_the_result_names_the_detector_that_made_it_whatever_is_selected_now(
    panel, head, detect, tiny_bundle, browse
):
    detect()
    browse(tiny_bundle.folder)
    assert "Detector: brightness, version 1.2" in panel.ui.resultLabel.text


def test_a_score_is_compared_with_the_detectors_image_threshold(
    real_panel, head, make_bundle, browse, detect
):
    browse(make_bundle("strict", image_threshold=1.0).folder)
    detect()
    assert "Below its image threshold, 1.00" in real_panel.ui.resultLabel.text
    browse(make_bundle("lenient", image_threshold=0.0).folder)
    detect()
    assert "Reaches its image threshold, 0.00" in real_panel.ui.resultLabel.text


# Thresholds


def test_the_slider_starts_at_the_threshold_of_the_selected_detector(panel, make_bundle, browse):
    assert panel.ui.thresholdSlider.value == pytest.approx(BUNDLED.threshold)
    browse(make_bundle(threshold=0.3).folder)
    assert panel.ui.thresholdSlider.value == pytest.approx(0.3)
    assert not panel.logic.getParameterNode().thresholdChosen


def test_a_threshold_finer_than_the_slider_is_still_the_detectors_own(
    real_panel, head, make_bundle, browse, detect
):
    browse(make_bundle(threshold=0.43219).folder)
    real_panel.ui.opacitySlider.value = 0.8
    detect()
    assert not real_panel.logic.getParameterNode().thresholdChosen
    assert real_panel._detect.result.threshold == 0.43219


def test_a_threshold_that_the_reader_chose_stays_with_another_detector(
    real_panel, head, make_bundle, browse, detect
):
    real_panel.ui.thresholdSlider.value = 0.25
    browse(make_bundle(threshold=0.7).folder)
    assert real_panel.ui.thresholdSlider.value == pytest.approx(0.25)
    detect()
    assert real_panel._detect.result.threshold == pytest.approx(0.25)


def test_reset_goes_back_to_the_detectors_own_threshold(real_panel, head, make_bundle, browse, detect):
    import slicer

    assert not real_panel.ui.ownThresholdButton.enabled
    real_panel.ui.thresholdSlider.value = 0.25
    browse(make_bundle(threshold=0.7).folder)
    detect()
    real_panel.ui.ownThresholdButton.click()
    assert real_panel.ui.thresholdSlider.value == pytest.approx(0.7)
    assert not real_panel.ui.ownThresholdButton.enabled
    assert slicer.util.getNode("Head anomaly map*").GetAttribute("MedAnomalyCLIP.Threshold") == "0.7"
    detect()
    assert real_panel._detect.result.threshold == 0.7


def test_the_slider_stays_with_the_map_that_is_shown_until_the_next_one(
    real_panel, head, make_bundle, browse, detect
):
    browse(make_bundle("one", threshold=0.3).folder)
    detect()
    browse(make_bundle("two", threshold=0.7).folder)
    assert real_panel.ui.thresholdSlider.value == pytest.approx(0.3)
    detect()
    assert real_panel.ui.thresholdSlider.value == pytest.approx(0.7)


# What can go wrong


def test_a_folder_that_holds_no_detector_leaves_the_choice_as_it_was(
    panel, make_bundle, browse, tmp_path, head, detect
):
    browse(make_bundle("good").folder)
    (tmp_path / "pictures").mkdir()
    browse(tmp_path / "pictures")
    assert "choose the folder of a detector" in panel.ui.messageLabel.text
    assert "Selected is: good 1" in panel.ui.messageLabel.text
    assert panel.ui.detectorSelector.currentText == "good 1"
    assert panel.logic.getParameterNode().detector == str(tmp_path / "good")
    detect()
    assert panel.ui.scoreLabel.text.startswith("Score")
    assert not panel.ui.messageLabel.text


def test_a_damaged_detector_is_offered_as_such_and_refused_with_the_reason(panel, make_bundle, own_detectors):
    (make_bundle("half", own_detectors).folder / WEIGHTS).write_bytes(b"half")
    enter_again(panel)
    assert offered(panel) == ["Bundled detector", "half (cannot be used)"]
    choose(panel, "half (cannot be used)")
    assert "incomplete" in panel.ui.messageLabel.text
    assert panel.ui.detectorSelector.currentText == "Bundled detector"


def test_the_message_goes_when_another_detector_is_chosen(panel, make_bundle, browse, tmp_path):
    browse(tmp_path)
    assert panel.ui.messageLabel.text
    browse(make_bundle().folder)
    assert not panel.ui.messageLabel.text


def test_weights_of_other_content_are_refused_when_they_are_loaded(
    real_panel, head, tiny_bundle, browse, detect
):
    weights = tiny_bundle.folder / WEIGHTS
    weights.write_bytes(bytes(weights.stat().st_size))
    browse(tiny_bundle.folder)
    detect()
    assert "altered" in real_panel.ui.messageLabel.text
    assert real_panel.ui.scoreLabel.text == "No result yet"


def test_a_detector_that_vanished_since_it_was_chosen_is_refused_at_the_click(
    panel, head, tiny_bundle, browse
):
    browse(tiny_bundle.folder)
    shutil.rmtree(tiny_bundle.folder)
    panel.ui.detectButton.click()
    assert "choose the folder of a detector" in panel.ui.messageLabel.text
    assert not panel.logic.isRunning()


def test_a_detector_that_vanished_gives_way_to_the_bundled_one(panel, tiny_bundle, browse):
    browse(tiny_bundle.folder)
    shutil.rmtree(tiny_bundle.folder)
    enter_again(panel)
    assert panel.logic.getParameterNode().detector == ""
    assert f"Selected is: {BUNDLED.name} {BUNDLED.version}" in panel.ui.messageLabel.text


def test_a_saved_scene_brings_back_its_detector(panel, head, tiny_bundle, browse, tmp_path):
    import slicer

    browse(tiny_bundle.folder)
    save_bundle(tmp_path / "case.mrb")
    slicer.mrmlScene.Clear(False)
    assert panel.ui.detectorSelector.currentText == "Bundled detector"
    load_bundle(tmp_path / "case.mrb")
    panel.enter()
    assert panel.ui.detectorSelector.currentText == "tiny 1"


def test_a_saved_scene_whose_detector_vanished_says_so_and_detects_with_the_bundled_one(
    panel, head, views, tiny_bundle, browse, tmp_path, detect, detector
):
    import slicer

    browse(tiny_bundle.folder)
    save_bundle(tmp_path / "case.mrb")
    slicer.mrmlScene.Clear(False)
    shutil.rmtree(tiny_bundle.folder)
    load_bundle(tmp_path / "case.mrb")
    panel.enter()
    assert f"The detector in {tiny_bundle.folder} cannot be used" in panel.ui.messageLabel.text
    assert f"Selected is: {BUNDLED.name} {BUNDLED.version}" in panel.ui.messageLabel.text
    assert panel.ui.detectorSelector.currentText == "Bundled detector"
    loaded = []
    panel.logic.detectorFactory = lambda folder: loaded.append(folder) or detector
    detect()
    assert loaded == [""]


def test_an_installation_without_its_detector_says_so_and_takes_another(
    panel, tiny_bundle, browse, monkeypatch
):
    from MedAnomalyCLIPLib import panel_detectors
    from MedAnomalyCLIPLib.resources import resource_path

    monkeypatch.setattr(panel_detectors, "default_bundle_path", lambda: resource_path("Models/missing"))
    enter_again(panel)
    assert offered(panel) == ["Bundled detector (cannot be used)"]
    assert "missing" in panel.ui.detectorLabel.text
    assert not panel.ui.modelCardButton.enabled
    browse(tiny_bundle.folder)
    assert panel.ui.detectorSelector.currentText == "tiny 1"
    assert panel.ui.modelCardButton.enabled


# The model card


def shown_card(panel):
    return panel._detectors._card_dialog, panel._detectors._card_text.toPlainText()


def test_the_model_card_of_the_selected_detector_is_shown(panel, make_bundle, browse):
    panel.ui.modelCardButton.click()
    dialog, text = shown_card(panel)
    assert dialog.visible
    assert "Intended use" in text
    browse(make_bundle("mine", card="# Mine\n\n| a | b |\n|---|---|\n| cell | 5 < 6 |\n").folder)
    panel.ui.modelCardButton.click()
    dialog, text = shown_card(panel)
    assert dialog.windowTitle == "Model card: mine 1"
    assert "cell" in text and "5 < 6" in text and "|" not in text


def test_a_detector_without_a_card_says_so(panel, tiny_bundle, browse):
    (tiny_bundle.folder / CARD).unlink()
    browse(tiny_bundle.folder)
    panel.ui.modelCardButton.click()
    assert shown_card(panel)[1] == "This detector has no model card."


@pytest.mark.parametrize(
    "markup",
    [
        "![x]({})",
        "!![x]({})",
        "![x][1]\n\n[1]: {}",
        "<img src='{}'>",
        "<p><IMG src='{}'/></p>",
        "`<img src={}>`",
    ],
)
def test_a_card_opens_no_file_when_it_is_shown(qt, slicer_application, markup):
    from MedAnomalyCLIPLib.panel_detectors import inert_markdown

    picture = qt.QTextBrowser()
    picture.setMarkdown(inert_markdown("before " + markup.format("file:///nowhere/picture.png") + " after"))
    assert "<img" not in picture.toHtml()
    assert "before" in picture.toPlainText()


def test_a_card_that_names_a_page_shows_its_address(qt, slicer_application):
    from MedAnomalyCLIPLib.panel_detectors import inert_markdown

    text = qt.QTextBrowser()
    text.setMarkdown(inert_markdown("see <https://example.org/paper>"))
    assert text.toPlainText().strip() == "see https://example.org/paper"


def test_what_a_detector_says_of_itself_is_no_markup(panel, make_bundle, browse):
    browse(make_bundle("bold", description="<img src='file:///x.png'>").folder)
    assert "<img" not in panel.ui.detectorLabel.toolTip


def test_the_card_is_closed_with_the_panel(hosted_module, views):
    panel = hosted_module.make_panel()
    panel.ui.modelCardButton.click()
    dialog = panel._detectors._card_dialog
    panel.cleanup()
    assert not dialog.visible


def test_no_text_of_the_detector_row_is_cut_off(panel, make_bundle, browse, wait):
    browse(make_bundle("A detector with a long name, as published", version="2026.11").folder)
    layout = panel.parent.layout()
    panel.parent.resize(380, layout.heightForWidth(380))
    panel.parent.show()
    label = panel.ui.detectorLabel
    wait(lambda: label.height >= label.heightForWidth(label.width))
    assert panel.parent.width == 380
