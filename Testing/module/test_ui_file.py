"""What can be read off the panel's .ui file, and the harness would not notice."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from MedAnomalyCLIPLib.result import RESEARCH_USE_ONLY

PANEL = Path(__file__).parents[2] / "MedAnomalyCLIP" / "Resources" / "UI" / "MedAnomalyCLIP.ui"


@pytest.fixture(scope="module")
def panel_xml():
    return ElementTree.parse(PANEL).getroot()


def test_every_mrml_widget_is_given_the_scene(panel_xml):
    """In Slicer a node selector without this connection stays empty; the harness would not notice.

    Not a table view: one that knows the scene takes its table from a view node, and drops the one it has.
    """
    outermost = panel_xml.find("widget").get("name")
    wanted = {
        (outermost, "mrmlSceneChanged(vtkMRMLScene*)", w.get("name"), "setMRMLScene(vtkMRMLScene*)")
        for w in panel_xml.find("widget").iter("widget")
        if w.get("class").startswith("qMRML") and w.get("class") != "qMRMLTableView"
        if w.get("name") != outermost
    }
    made = {
        tuple(c.findtext(key) for key in ("sender", "signal", "receiver", "slot"))
        for c in panel_xml.iter("connection")
    }
    assert wanted
    assert wanted <= made


def test_the_outermost_widget_can_hold_a_scene(panel_xml):
    assert panel_xml.find("widget").get("class") == "qMRMLWidget"


def test_every_widget_class_that_is_not_qts_is_declared(panel_xml):
    used = {w.get("class") for w in panel_xml.iter("widget") if not w.get("class").startswith("Q")}
    assert used == {c.findtext("class") for c in panel_xml.iter("customwidget")}


def test_every_bound_widget_names_a_parameter(panel_xml, hosted_module):
    bound = {
        p.find("string").text for p in panel_xml.iter("property") if p.get("name") == "SlicerParameterName"
    }
    assert {"inputVolume", "threshold", "opacity", "smallestArea", "resume", "outputMap"} <= bound
    assert bound <= set(vars(hosted_module.code.MedAnomalyCLIPParameterNode))


def test_the_panel_says_that_it_is_for_research(panel_xml):
    assert RESEARCH_USE_ONLY in {s.text for s in panel_xml.iter("string")}


def test_everything_that_can_be_chosen_or_clicked_tells_what_it_does(panel_xml, panel):
    passive = {"QLabel", "QProgressBar", "QGroupBox", "ctkCollapsibleButton", "qMRMLWidget"}
    active = {w.get("name") for w in panel_xml.iter("widget") if w.get("class") not in passive}
    assert len(active) > 50
    assert [name for name in sorted(active) if not getattr(panel.ui, name).toolTip] == []


def test_colours_of_text_and_background_are_left_to_the_readers_theme(panel_xml):
    """Dark and high-contrast themes stay readable: styles draw borders, and nothing in the code sets any."""
    styles = [
        p.findtext("string") for p in panel_xml.iter("property") if p.get("name") in ("styleSheet", "palette")
    ]
    rules = [rule.strip() for style in styles for rule in style.split("{")[1].rstrip("} ").split(";")]
    assert {rule.split(":")[0].split("-")[0] for rule in rules if rule} == {"border", "padding"}
    library = PANEL.parents[2] / "MedAnomalyCLIPLib"
    told = " ".join(path.read_text(encoding="utf-8") for path in library.glob("panel_*.py"))
    assert not re.search(r"styleSheet|setPalette|<font|color:", told)
