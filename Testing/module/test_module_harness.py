"""The harness keeps PythonQt's manners, and says what it lacks."""

from __future__ import annotations

import pytest

from harness.system_libraries import (
    PACKAGES,
    SystemLibraryMissing,
    missing_libraries,
    require_system_libraries,
)

pytestmark = pytest.mark.usefixtures("slicer_application")


@pytest.fixture
def qt():
    from harness.pythonqt import qt

    return qt


def test_a_missing_library_is_named_with_its_package():
    with pytest.raises(SystemLibraryMissing, match=r"libEGL\.so\.1: package libegl1"):
        require_system_libraries(loads=lambda library: library != "libEGL.so.1")


def test_the_message_says_what_to_install():
    with pytest.raises(SystemLibraryMissing, match="apt-get install libgl1 libxkbcommon0"):
        require_system_libraries(loads=lambda library: library not in ("libxkbcommon.so.0", "libGL.so.1"))


def test_a_library_that_does_not_exist_is_missing(monkeypatch):
    monkeypatch.setitem(PACKAGES, "libNoSuchThing.so.9", "no-such-package")
    assert missing_libraries() == {"libNoSuchThing.so.9": "no-such-package"}


def test_properties_are_attributes(qt):
    label = qt.QLabel()
    label.text = "words"
    assert label.text == "words"
    with pytest.raises(TypeError):
        label.text()


def test_setters_stay(qt):
    label = qt.QLabel()
    label.setText("words")
    assert label.text == "words"


def test_a_property_without_a_setter_cannot_be_set(qt):
    with pytest.raises(AttributeError, match="read-only"):
        qt.QComboBox().count = 3


def test_a_signal_is_connected_by_its_signature(qt):
    heard = []
    button = qt.QPushButton()
    button.connect("clicked(bool)", heard.append)
    button.click()
    assert heard == [False]


def test_a_signal_that_does_not_exist_is_refused(qt):
    with pytest.raises(ValueError, match="no signal"):
        qt.QPushButton().connect("pushed(bool)", print)


def test_a_signal_with_the_wrong_arguments_is_refused(qt):
    with pytest.raises(ValueError, match="no signal"):
        qt.QPushButton().connect("clicked(QString)", print)


def test_surplus_arguments_of_a_signal_are_dropped(qt):
    heard = []
    button = qt.QPushButton()
    button.connect("clicked(bool)", lambda: heard.append("once"))
    button.click()
    assert heard == ["once"]


def test_a_disconnected_slot_is_silent(qt):
    heard = []
    button = qt.QPushButton()
    button.connect("clicked(bool)", heard.append)
    button.disconnect("clicked(bool)", heard.append)
    button.click()
    assert not heard


def test_an_exception_in_a_slot_is_kept_and_the_program_goes_on(qt, capsys):
    from harness import pythonqt

    button = qt.QPushButton()
    button.connect("clicked(bool)", lambda: 1 / 0)
    button.click()
    assert isinstance(pythonqt.slot_errors.pop(), ZeroDivisionError)


def test_widgets_made_by_qt_itself_are_instances_of_our_classes(qt):
    from PySide6 import QtWidgets

    assert isinstance(QtWidgets.QLabel(), qt.QLabel)
    assert isinstance(QtWidgets.QLabel(), qt.QWidget)
    assert not isinstance(QtWidgets.QLabel(), qt.QPushButton)


def test_an_unknown_widget_class_in_a_ui_file_is_named(qt, tmp_path):
    import slicer

    path = tmp_path / "panel.ui"
    path.write_text('<ui version="4.0"><widget class="qMRMLTeapot" name="w"/></ui>')
    with pytest.raises(RuntimeError, match="qMRMLTeapot"):
        slicer.util.loadUI(str(path))


def test_using_qt_for_long_does_not_wear_out_none(qt):
    """PySide6 6.12.0 loses a reference to None in every call that returns nothing."""
    import sys

    box = qt.QComboBox()
    before = sys.getrefcount(None)
    for _ in range(2000):
        box.clear()
    assert sys.getrefcount(None) > before - 1000


def test_a_deleted_node_selector_no_longer_listens_to_the_scene(slicer_scene):
    import slicer

    from harness.pythonqt import QtCore, application

    selector = slicer.qMRMLNodeComboBox()
    selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
    selector.setMRMLScene(slicer_scene)
    heard = []
    selector.connect("currentNodeChanged(vtkMRMLNode*)", heard.append)
    selector.delete()
    application.sendPostedEvents(None, QtCore.QEvent.Type.DeferredDelete.value)
    slicer_scene.AddNewNodeByClass("vtkMRMLScalarVolumeNode")
    assert not heard


@pytest.mark.parametrize("hint", ["plain union", "no None", "unknown type"])
def test_types_that_slicers_parameter_nodes_refuse_are_refused(hint):
    import typing

    from slicer import vtkMRMLScalarVolumeNode as Scalar
    from slicer import vtkMRMLVectorVolumeNode as Vector

    from harness.base_python import parameterNodeWrapper

    types = {"plain union": Scalar | None, "no None": typing.Union[Scalar, Vector], "unknown type": bytes}  # noqa: UP007
    with pytest.raises(TypeError):
        parameterNodeWrapper(type("Parameters", (), {"__annotations__": {"volume": types[hint]}}))


def test_a_value_outside_its_range_is_refused(hosted_module, slicer_scene):
    node = hosted_module.code.MedAnomalyCLIPLogic().getParameterNode()
    with pytest.raises(ValueError, match="within"):
        node.threshold = 1.5
