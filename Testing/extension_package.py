"""The extension as an archive that Slicer's Extensions Manager installs ("Install from file...").

    python Testing/extension_package.py
    python Testing/extension_package.py --os win --slicer-version 5.10
    python Testing/extension_package.py --os macosx --arch arm64 --slicer-revision 34000

What CPack makes of the extension in a build tree of Slicer, without Slicer, CMake or a compiler: the module
is Python only. Name and folders follow Slicer's SlicerExtensionCPack.cmake, the description file its
extension_description.s4ext.in. Compiled .pyc files are left out; Python makes them itself. The same sources
give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from shipped_files import CMAKE, MODULE, RESOURCES, ROOT, SCRIPTS, files_listed

EXTENSION = "MedAnomalyCLIP"
SYSTEMS = {"linux": "amd64", "win": "amd64", "macosx": "arm64"}
"""Slicer's names of operating systems, each with its usual architecture."""

_EARLIEST = (1980, 1, 1, 0, 0, 0)  # zip knows no earlier time
_MODE = 0o644


@dataclass(frozen=True)
class Target:
    """The Slicer that an archive is for.

    Attributes:
        version: major and minor; Slicer looks for modules in folders that are named after it.
        system, arch: as Slicer calls them.
        revision: of that build of Slicer, from its About dialog. Part of the archive's name; on macOS also
            of a folder in it, where it has to be right. Elsewhere Slicer does not look at it.
    """

    version: str = "5.12"
    system: str = "linux"
    arch: str = "amd64"
    revision: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+\.\d+", self.version):
            raise ValueError(f"Slicer's version is two numbers, such as 5.12, not {self.version!r}")
        if self.system not in SYSTEMS:
            raise ValueError(f"{self.system!r} is no system of Slicer; choose {', '.join(SYSTEMS)}")
        if self.system == "macosx" and not self.revision:
            raise ValueError("For macOS the revision of Slicer is needed: --slicer-revision")

    @property
    def suffix(self) -> str:
        return ".zip" if self.system == "win" else ".tar.gz"

    @property
    def root(self) -> str:
        """Where lib and share lie within the archive's one folder."""
        if self.system == "macosx":
            return f"Slicer.app/Contents/Extensions-{self.revision}/{EXTENSION}/"
        return ""


@dataclass(frozen=True)
class Source:
    """The commit that is packed; empty where there is no git."""

    revision: str = ""
    date: str = ""

    @classmethod
    def of_checkout(cls, folder: Path = ROOT) -> Source:
        try:
            said = subprocess.run(
                ["git", "log", "-1", "--format=%h %cs"],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError):
            return cls()
        return cls(*said.stdout.split())


def archive_name(target: Target, source: Source) -> str:
    """The archive's name without suffix, which is also that of its one folder."""
    slicer = target.revision or f"Slicer-{target.version}"
    revision = f"git{source.revision}" if source.revision else "local"
    parts = (slicer, target.system, target.arch, EXTENSION, revision, source.date)
    return "-".join(part for part in parts if part)


def package_files(target: Target, source: Source) -> dict[str, bytes]:
    """Content of every file by its place within the archive's folder, in order."""
    listed = files_listed(CMAKE.read_text(encoding="utf-8"))
    names = [name.replace("${MODULE_NAME}", EXTENSION) for name in (*listed[SCRIPTS], *listed[RESOURCES])]
    modules = f"{target.root}lib/Slicer-{target.version}/qt-scripted-modules"
    files = {f"{modules}/{name}": (MODULE / name).read_bytes() for name in names}
    share = f"{target.root}share/Slicer-{target.version}"
    files[f"{share}/{EXTENSION}.s4ext"] = description(source).encode()
    return dict(sorted(files.items()))


def description(source: Source) -> str:
    """The description that Slicer reads when it installs the archive: keyword and value in each line."""
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    said = dict(re.findall(r'^set\(EXTENSION_(\w+) "([^"\n]*)"\)$', cmake, re.MULTILINE))
    values = {
        "scm": "git",
        "scmurl": said["HOMEPAGE"],
        "scmrevision": source.revision or "NA",
        "depends": said["DEPENDS"],
        "build_subdirectory": ".",
        "homepage": said["HOMEPAGE"],
        "contributors": said["CONTRIBUTORS"],
        "category": said["CATEGORY"],
        "iconurl": said["ICONURL"],
        "status": "",
        "tier": "1",
        "description": said["DESCRIPTION"],
        "screenshoturls": said["SCREENSHOTURLS"],
        "enabled": "1",
    }
    return "".join(f"{key} {value}\n" for key, value in values.items())


def write_package(folder: Path, target: Target, source: Source) -> Path:
    """Write the archive, which appears when it is complete; returns its path."""
    name = archive_name(target, source)
    files = {f"{name}/{place}": content for place, content in package_files(target, source).items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{target.suffix}"
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(_zip(files) if target.suffix == ".zip" else _tar_gz(files))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _tar_gz(files: dict[str, bytes]) -> bytes:
    """Always the same bytes for the same files: no times, no owners."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), _MODE
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _zip(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _EARLIEST)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, _MODE << 16
            entry.create_system = 3  # Unix, wherever it is made
            archive.writestr(entry, content)
    return packed.getvalue()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder to write to (dist)")
    parser.add_argument("--slicer-version", default=Target.version, help="5.12 if left out")
    parser.add_argument(
        "--slicer-revision", default="", help="as Slicer's About dialog says; needed for macOS"
    )
    parser.add_argument("--os", choices=SYSTEMS, default=Target.system)
    parser.add_argument("--arch", help="amd64 or arm64; the usual one of the system if left out")
    arguments = parser.parse_args(argv)
    try:
        arch = arguments.arch or SYSTEMS[arguments.os]
        target = Target(arguments.slicer_version, arguments.os, arch, arguments.slicer_revision)
    except ValueError as error:
        parser.error(str(error))
    path = write_package(arguments.output, target, Source.of_checkout())
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
