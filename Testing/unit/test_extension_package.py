"""The archive for Slicer's Extensions Manager: what is in it, where, and that it works from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import pytest

import extension_package
from extension_package import Source, Target, archive_name, package_files, write_package
from shipped_files import CMAKE, MODULE, RESOURCES, ROOT, SCRIPTS, files_listed

SOURCE = Source("1a2b3c4", "2026-11-26")
MODULES = "lib/Slicer-5.12/qt-scripted-modules"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_package(tmp_path_factory.mktemp("dist"), Target(), SOURCE)


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory):
    """As Slicer leaves it: the archive's one folder under the extension's name."""
    place = tmp_path_factory.mktemp("Extensions-33000")
    with tarfile.open(archive) as packed:
        packed.extractall(place, filter="data")
    (folder,) = place.iterdir()
    return folder.rename(place / "MedAnomalyCLIP")


def listed_files() -> set[str]:
    lists = files_listed(CMAKE.read_text(encoding="utf-8"))
    return {name.replace("${MODULE_NAME}", "MedAnomalyCLIP") for name in lists[SCRIPTS] + lists[RESOURCES]}


def test_name_is_the_one_that_slicers_cpack_gives():
    assert archive_name(Target(revision="33241"), SOURCE) == (
        "33241-linux-amd64-MedAnomalyCLIP-git1a2b3c4-2026-11-26"
    )
    assert archive_name(Target(), Source()) == "Slicer-5.12-linux-amd64-MedAnomalyCLIP-local"


def test_archive_holds_the_listed_files_and_the_description_and_nothing_else(unpacked):
    files = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    assert files == {f"{MODULES}/{name}" for name in listed_files()} | {
        "share/Slicer-5.12/MedAnomalyCLIP.s4ext"
    }


def test_every_file_is_packed_byte_by_byte(unpacked):
    differing = [
        name
        for name in listed_files()
        if (unpacked / MODULES / name).read_bytes() != (MODULE / name).read_bytes()
    ]
    assert differing == []


def test_all_files_lie_in_one_folder_that_is_named_as_the_archive(archive):
    """Slicer takes the first file's topmost folder for the whole extension."""
    with tarfile.open(archive) as packed:
        folders = {name.split("/")[0] for name in packed.getnames()}
    assert folders == {archive.name.removesuffix(".tar.gz")}


def test_the_same_sources_give_the_same_bytes(archive, tmp_path):
    for file in (MODULE / "Resources").iterdir():
        if file.is_file():
            os.utime(file)  # another time of change
    assert write_package(tmp_path, Target(), SOURCE).read_bytes() == archive.read_bytes()


def test_on_windows_it_is_a_zip_of_the_same_files(archive, tmp_path):
    path = write_package(tmp_path, Target(system="win"), SOURCE)
    assert path.suffix == ".zip"
    with zipfile.ZipFile(path) as packed, tarfile.open(archive) as other:
        assert packed.testzip() is None
        assert [n.split("/", 1)[1] for n in packed.namelist()] == [
            n.split("/", 1)[1] for n in other.getnames()
        ]
    assert path.read_bytes() == write_package(tmp_path, Target(system="win"), SOURCE).read_bytes()


def test_on_macos_it_lies_in_the_application_bundle():
    target = Target(system="macosx", arch="arm64", revision="33241")
    root = "Slicer.app/Contents/Extensions-33241/MedAnomalyCLIP/"
    names = list(package_files(target, SOURCE))
    assert all(name.startswith(root) for name in names)
    assert {n.removeprefix(root) for n in names} == set(package_files(Target(), SOURCE))


@pytest.mark.parametrize("wrong", [{"version": "5.12.1"}, {"system": "beos"}, {"system": "macosx"}])
def test_a_slicer_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="Slicer"):
        Target(**wrong)


def test_another_version_of_slicer_has_its_own_folders(tmp_path):
    names = list(package_files(Target("5.10"), SOURCE))
    assert f"{MODULES.replace('5.12', '5.10')}/MedAnomalyCLIP.py" in names
    assert not [name for name in names if "5.12" in name]


def test_description_says_what_cmake_says(unpacked):
    lines = (unpacked / "share/Slicer-5.12/MedAnomalyCLIP.s4ext").read_text().splitlines()
    said = dict(line.partition(" ")[::2] for line in lines)
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for key in (
        "homepage",
        "category",
        "contributors",
        "description",
        "iconurl",
        "screenshoturls",
        "depends",
    ):
        assert f'set(EXTENSION_{key.upper()} "{said[key]}")' in cmake
    assert said["scmrevision"] == "1a2b3c4"
    assert said["enabled"] == "1"


def test_nothing_in_it_tells_who_made_it(archive):
    with tarfile.open(archive) as packed:
        owners = {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in packed.getmembers()}
    assert owners == {(0, 0, "", "", 0, 0o644)}


def test_a_failure_leaves_no_half_archive(tmp_path, monkeypatch):
    def fail(files):
        raise OSError("disk full")

    monkeypatch.setattr(extension_package, "_tar_gz", fail)
    with pytest.raises(OSError, match="disk full"):
        write_package(tmp_path, Target(), SOURCE)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_it(tmp_path, capsys):
    assert extension_package.main(["--output", str(tmp_path), "--os", "win"]) == 0
    (path,) = tmp_path.iterdir()
    assert str(path) in capsys.readouterr().out
    assert re.match(r"Slicer-5\.12-win-amd64-MedAnomalyCLIP-", path.name)


def test_the_packed_module_loads_and_detects_from_where_it_lies(unpacked, slicer_application):
    """In a process of its own that knows the harness but not the checkout's module."""
    program = f"""
        import sys
        sys.path[:] = [p for p in sys.path if p != {str(MODULE)!r}]
        sys.path.insert(0, {str(ROOT / "Testing")!r})
        from pathlib import Path
        from harness.scripted_module import HostedModule
        hosted = HostedModule(Path({str(unpacked / MODULES / "MedAnomalyCLIP.py")!r}))
        panel = hosted.make_panel()
        import numpy, slicer
        from harness.slice_views import slice_views
        node = slicer.util.addVolumeFromArray(numpy.arange(48 * 64 * 3, dtype="int16").reshape(3, 48, 64))
        slice_views()["Red"].show(node)
        slice_views()["Red"].node.JumpSlice(0, 0, 1)
        print(round(panel.logic.detect(node, "Red").result.score, 3))
        panel.cleanup()
        import MedAnomalyCLIPLib
        print(MedAnomalyCLIPLib.__file__)
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=unpacked,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    score, library = done.stdout.splitlines()[-2:]
    assert 0 <= float(score) <= 1
    assert library == str(unpacked / MODULES / "MedAnomalyCLIPLib" / "__init__.py")
