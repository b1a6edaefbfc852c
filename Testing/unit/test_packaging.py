"""What ships: with the extension, in the wheel, and to the Extensions Index."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from MedAnomalyCLIPLib import __version__
from shipped_files import CMAKE, MODULE, RESOURCES, ROOT, SCRIPTS, files_listed, files_present, with_lists

LIBRARY = MODULE / "MedAnomalyCLIPLib"
ROOT_CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
INDEX_ENTRY = ROOT / "MedAnomalyCLIP.json"


def extension(key: str) -> str:
    """A quoted, one-line CMake setting, read the way the index reads it."""
    return re.search(rf'^set\({key} "([^"\n]*)"\)$', ROOT_CMAKE, re.MULTILINE).group(1)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.Path:
    """The wheel of a copy of the sources: building leaves folders behind, and takes in old ones."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(MODULE, folder / MODULE.name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", "."]
    done = subprocess.run([sys.executable, "-m", "pip", *build], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (folder / "dist").glob("*.whl")
    return zipfile.Path(file)


def wheel_names(wheel: zipfile.Path) -> set[str]:
    return set(wheel.root.namelist())


@pytest.mark.parametrize("kind", [SCRIPTS, RESOURCES])
def test_extension_lists_every_file(kind):
    listed = files_listed(CMAKE.read_text(encoding="utf-8"))[kind]
    assert sorted(listed) == sorted(files_present()[kind]), "python Testing/shipped_files.py --write mends it"


def test_a_file_that_is_not_listed_is_noticed():
    cmake = CMAKE.read_text(encoding="utf-8")
    short = with_lists(cmake, {SCRIPTS: files_present()[SCRIPTS][:-1]})
    assert files_listed(short)[SCRIPTS] != files_present()[SCRIPTS]


def test_lists_are_written_as_they_are_read():
    cmake = CMAKE.read_text(encoding="utf-8")
    assert with_lists(cmake, files_listed(cmake)) == cmake


def test_wheel_has_the_whole_library(wheel):
    files = [p for p in LIBRARY.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    wanted = {p.relative_to(MODULE).as_posix() for p in files}
    assert wanted - wheel_names(wheel) == set(), "see [tool.setuptools] in pyproject.toml"


def test_wheel_has_the_bundled_detector_and_the_terminology(wheel):
    models = [p for p in (MODULE / "Resources/Models").rglob("*") if p.is_file()]
    wanted = {f"MedAnomalyCLIPLib/{p.relative_to(MODULE).as_posix()}" for p in models}
    assert {*wanted, "MedAnomalyCLIPLib/Resources/MedAnomalyCLIP.term.json"} - wheel_names(wheel) == set()


def test_wheel_leaves_out_what_only_the_panel_needs(wheel):
    assert not [n for n in wheel_names(wheel) if n.endswith((".ui", "MedAnomalyCLIP.py")) or "/Icons/" in n]


def test_installed_library_finds_its_resources(wheel, tmp_path):
    wheel.root.extractall(tmp_path)
    # Somebody else's folder in site-packages must not be taken for ours.
    (tmp_path / "Resources").mkdir()
    (tmp_path / "Resources/MedAnomalyCLIP.term.json").write_text("{}")
    code = "from MedAnomalyCLIPLib.terminology import TERMS; print(TERMS.name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "Abnormality (AI candidate)\n", done.stderr


def test_wheel_has_the_version_licence_and_command(wheel):
    info = f"medanomalyclip-{__version__}.dist-info"
    metadata = (wheel / info / "METADATA").read_text()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert f"{info}/licenses/LICENSE" in wheel_names(wheel)
    assert "medanomalyclip = MedAnomalyCLIPLib.cli:main" in (wheel / info / "entry_points.txt").read_text()


def test_requirements_are_the_same_everywhere():
    root = (ROOT / "requirements.txt").read_text()
    # tomllib came with Python 3.11.
    project = (ROOT / "pyproject.toml").read_text()
    light, full = (
        re.findall(r'"(.+)"', re.search(rf"^{key} = \[\n(.*?)^\]", project, re.M | re.S).group(1))
        for key in ("dependencies", "full")
    )
    assert (MODULE / "Resources/requirements.txt").read_text() == root
    assert root.splitlines() == full + light
    assert (MODULE / "Resources/requirements-light.txt").read_text().splitlines() == light


def test_requirements_can_be_read_by_slicer():
    """Slicer's load_requirements refuses comments behind a requirement, and drops -r and -c lines."""
    assert not re.findall(r"\S\s*#|^\s*-", (ROOT / "requirements.txt").read_text(), re.MULTILINE)


def test_constraints_pin_torch_and_torchvision_together():
    pinned = re.findall(r"^(torch|torchvision)==\d", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned == ["torch", "torchvision"]


# Slicer's Schemas/slicer-extension-catalog-entry-schema-v1.0.2.json: which keys there may be, of what type.
REQUIRED = {"$schema": str, "category": str, "scm_url": str}
OPTIONAL = {
    "scm_revision": str,
    "scm_type": str,
    "build_dependencies": list,
    "dicom_support_rule": str,
    "build_subdirectory": str,
    "enabled": bool,
    "tier": int,
}


def schema_errors(entry: dict) -> list[str]:
    """What that schema would say against an entry."""
    keys = {**REQUIRED, **OPTIONAL}
    errors = [f"{key} is missing" for key in REQUIRED.keys() - entry]
    errors += [f"{key} is not known" for key in entry.keys() - keys]
    errors += [f"{key} has a wrong type" for key in entry.keys() & keys if type(entry[key]) is not keys[key]]
    errors += [
        f"dependency {n!r} is no text" for n in entry.get("build_dependencies", []) if type(n) is not str
    ]
    if entry.get("scm_type", "git") not in ("git", "local"):
        errors.append("scm_type is neither git nor local")
    if type(entry.get("tier", 1)) is int and not 1 <= entry.get("tier", 1) <= 5:
        errors.append("tier is not within 1 and 5")
    return errors


def test_index_entry_keeps_to_its_schema():
    entry = json.loads(INDEX_ENTRY.read_text())
    assert schema_errors(entry) == []
    schemas = "https://raw.githubusercontent.com/Slicer/Slicer/main/Schemas"
    assert entry["$schema"] == f"{schemas}/slicer-extension-catalog-entry-schema-v1.0.2.json#"


@pytest.mark.parametrize(
    "change",
    [
        {"scm_url": None},
        {"tier": 6},
        {"tier": "1"},
        {"description": "x"},
        {"build_dependencies": [1]},
        {"enabled": 1},
    ],
)
def test_an_entry_that_breaks_the_schema_is_noticed(change):
    assert schema_errors({**json.loads(INDEX_ENTRY.read_text()), **change})


def test_index_entry_keeps_to_the_rules_of_the_index():
    """What its scripts/check_description_files.py asks beyond the schema."""
    entry = json.loads(INDEX_ENTRY.read_text())
    assert entry["tier"] in (1, 3, 5)
    assert entry["category"] in ("Segmentation", "Analysis")  # of the index's list, those that fit
    assert re.match(r"(https|git)://", entry["scm_url"])
    assert "slicer" in entry["scm_url"].rsplit("/", 1)[1].lower()
    assert b"\r" not in INDEX_ENTRY.read_bytes()


def test_index_entry_says_what_cmake_says():
    entry = json.loads(INDEX_ENTRY.read_text())
    assert re.search(r"^project\((\w+)\)$", ROOT_CMAKE, re.MULTILINE).group(1) == INDEX_ENTRY.stem
    assert entry["category"] == extension("EXTENSION_CATEGORY")
    assert entry["build_dependencies"] == [extension("EXTENSION_DEPENDS")]
    assert entry["scm_url"] == extension("EXTENSION_HOMEPAGE")


def test_names_are_those_the_index_asks_for():
    assert not INDEX_ENTRY.stem.startswith("Slicer")
    assert extension("EXTENSION_HOMEPAGE").rsplit("/", 1)[1] == f"Slicer{INDEX_ENTRY.stem}"


@pytest.mark.parametrize("key", ["EXTENSION_ICONURL", "EXTENSION_SCREENSHOTURLS"])
def test_pictures_of_the_extension_are_in_the_repository(key):
    for url in extension(key).split():
        owner_and_name = extension("EXTENSION_HOMEPAGE").removeprefix("https://github.com/")
        start = f"https://raw.githubusercontent.com/{owner_and_name}/main/"
        assert url.startswith(start)
        assert (ROOT / url.removeprefix(start)).read_bytes().startswith(b"\x89PNG")


def test_new_modules_can_be_added_by_slicers_wizard():
    assert "\n## NEXT_MODULE\n" in ROOT_CMAKE


def test_licence_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text[:200]
    assert "END OF TERMS AND CONDITIONS" in text
