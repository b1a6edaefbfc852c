"""What can be read off the module's files, and what they load."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from MedAnomalyCLIPLib.errors import MedAnomalyCLIPError
from MedAnomalyCLIPLib.result import RESEARCH_USE_ONLY

ROOT = Path(__file__).parents[2]
MODULE = ROOT / "MedAnomalyCLIP" / "MedAnomalyCLIP.py"
LIBRARY = ROOT / "MedAnomalyCLIP" / "MedAnomalyCLIPLib"
HEAVY = ("torch", "torchvision", "monai", "open_clip", "SimpleITK", "skimage", "pydicom", "scipy")


def test_the_module_says_what_it_is(hosted_module):
    metadata = hosted_module.metadata
    assert metadata.title == "MedAnomalyCLIP"
    assert metadata.categories == ["Segmentation"]
    assert RESEARCH_USE_ONLY in metadata.helpText
    assert metadata.contributors
    assert re.search(r'<a href="https://[^"]+">Documentation and tutorial</a>', metadata.helpText)
    for cited in ("please cite", "MVFA", "MediCLIP", "AdaCLIP", "Learning Transferable Visual Models"):
        assert cited in metadata.acknowledgementText


@pytest.mark.parametrize(
    "path", ["MedAnomalyCLIP/Resources/Icons/MedAnomalyCLIP.png", "Resources/MedAnomalyCLIP.png"]
)
def test_icons_are_png_of_128_by_128(path):
    head = (ROOT / path).read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(head[i : i + 4], "big") for i in (16, 20)] == [128, 128]


def test_translated_strings_are_literals():
    """lupdate cannot read an f-string, and a formatted one is never found in the dictionary."""
    calls = [
        node
        for path in (MODULE, *LIBRARY.glob("panel_*.py"), *LIBRARY.glob("scene*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_"
    ]
    assert len(calls) > 20
    assert all(isinstance(call.args[0], ast.Constant) for call in calls)


def test_errors_that_scene_and_panel_tell_are_translated():
    """Those of the library below are in English, as in its other faces."""
    names = {cls.__name__ for cls in family(MedAnomalyCLIPError)}
    calls = [
        (path.name, node)
        for path in (*LIBRARY.glob("panel_*.py"), *LIBRARY.glob("scene*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    assert len(calls) > 20
    assert [
        f"{name}:{call.lineno}"
        for name, call in calls
        if isinstance(call.args[0], (ast.Constant, ast.JoinedStr))
    ] == []


def family(cls):
    return {cls, *(below for child in cls.__subclasses__() for below in family(child))}


def test_only_scene_and_panel_files_of_the_library_import_slicer():
    importing = {
        path.name
        for path in LIBRARY.rglob("*.py")
        if path.parent.name != "web"  # which makes an application of Slicer's libraries
        and re.search(
            r"^\s*(import|from) (slicer|qt|ctk|vtk)\b", path.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert {"scene.py", "panel_setup.py", "panel_views.py"} <= importing
    assert [name for name in sorted(importing) if not re.match(r"(scene|panel)[_.]", name)] == []


def test_the_names_of_requirements_are_those_that_can_be_imported(hosted_module, monkeypatch):
    from MedAnomalyCLIPLib.panel_packages import missing_requirements

    assert missing_requirements() == []
    asked = []
    monkeypatch.setattr(importlib.util, "find_spec", asked.append)
    assert len(missing_requirements()) == len(asked) == 11
    assert {"torch", "monai", "open_clip", "skimage", "SimpleITK"} <= set(asked)


def test_without_the_packages_the_module_loads_and_says_what_is_missing(slicer_application):
    """In a process of its own, in which they cannot be imported."""
    program = f"""
        import importlib.abc, sys, time
        sys.path[:0] = [{str(ROOT / "Testing")!r}, {str(ROOT / "MedAnomalyCLIP")!r}]

        class Missing(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {HEAVY[:-1]!r}:
                    raise ModuleNotFoundError(name)

        from pathlib import Path
        from harness import application
        application.start()
        before = set(sys.modules)
        from harness.scripted_module import HostedModule
        hosted = HostedModule(Path({str(MODULE)!r}))
        loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
        print("loaded", sorted(loaded & set({HEAVY!r})))

        panel = hosted.make_panel()
        import importlib.util, numpy, slicer
        importlib.util.find_spec = lambda name: None
        from harness.slice_views import slice_views
        sys.meta_path.insert(0, Missing())
        node = slicer.util.addVolumeFromArray(numpy.ones((3, 5, 4), dtype="int16"))
        slice_views()["Red"].show(node)
        panel.ui.detectButton.click()
        from harness.pythonqt import application as qt_application
        end = time.monotonic() + 20
        while panel.logic.isRunning() and time.monotonic() < end:
            qt_application.processEvents()
        print("says", panel.ui.messageLabel.text.splitlines()[0])
        panel.cleanup()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded, says = done.stdout.splitlines()[-2:]
    assert loaded == "loaded []"
    assert says.startswith("says Python packages are missing: onnxruntime")
    assert "scikit-image>=" in says
