"""Whether a detector can run on this computer, what is missing, and how fast it is.

Requirements in, their state out; nothing is imported to find out, nothing is installed and nothing fetched.
Inside Slicer, `panel_install` does the installing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import MedAnomalyCLIPError
from .geometry import SlicePlane

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from .detection import SliceDetector

PROTECTED = ("numpy", "scipy", "SimpleITK", "torch", "torchvision", "pydicom", "pillow", "requests")
"""Packages whose installed version is never changed: Slicer and other extensions are built upon them."""

# How packages are called when imported, where that differs from their name.
_IMPORT_NAMES = {"open_clip_torch": "open_clip", "scikit-image": "skimage"}

# Room in MB that each package takes, as installed under Linux with Python 3.11 and torch 2.13 for the CPU,
# and which others it brings. A test compares this with the packages that are installed where it runs.
_TAKES: dict[str, tuple[float, str]] = {
    "torch": (698, "filelock fsspec jinja2 networkx setuptools sympy typing-extensions"),
    "torchvision": (21, "numpy pillow torch"),
    "monai": (7, "numpy torch"),
    "onnxruntime": (76, "flatbuffers numpy packaging protobuf"),
    "flatbuffers": (0.1, ""),
    "protobuf": (1.5, ""),
    "open-clip-torch": (2, "ftfy huggingface-hub regex safetensors timm torch torchvision tqdm"),
    "scikit-image": (30, "imageio lazy-loader networkx numpy packaging pillow scipy tifffile"),
    "numpy": (57, ""),
    "scipy": (114, "numpy"),
    "simpleitk": (274, ""),
    "pydicom": (8, ""),
    "pillow": (20, ""),
    "timm": (10, "huggingface-hub pyyaml safetensors torch torchvision"),
    "huggingface-hub": (3, "click filelock fsspec hf-xet httpx2 packaging pyyaml tqdm typing-extensions"),
    "hf-xet": (12, ""),
    "httpx2": (0.4, "anyio httpcore2 idna truststore typing-extensions"),
    "httpcore2": (0.3, "h11 truststore"),
    "anyio": (0.5, "idna typing-extensions"),
    "ftfy": (0.1, "wcwidth"),
    "imageio": (1, "numpy pillow"),
    "jinja2": (0.5, "markupsafe"),
    "lazy-loader": (0.1, "packaging"),
    "sympy": (27, "mpmath"),
    "tifffile": (1, "numpy"),
    "click": (0.4, ""),
    "filelock": (1, ""),
    "fsspec": (0.8, ""),
    "h11": (0.1, ""),
    "idna": (0.3, ""),
    "markupsafe": (0.1, ""),
    "mpmath": (2, ""),
    "networkx": (7, ""),
    "packaging": (0.5, ""),
    "pyyaml": (3, ""),
    "regex": (3, ""),
    "safetensors": (1, ""),
    "setuptools": (3, ""),
    "tqdm": (0.2, ""),
    "truststore": (0.1, ""),
    "typing-extensions": (0.2, ""),
    "wcwidth": (4, ""),
}

InstalledVersion = Callable[[str], str]


@dataclass(frozen=True)
class Package:
    """A requirement and what is there of it.

    Attributes:
        requirement: as pip has it, for example "monai>=1.4".
        name: without the version.
        installed: version that is installed; empty if none is, or if it does not say.
        satisfied: whether it can be imported and is new enough.
    """

    requirement: str
    name: str
    installed: str
    satisfied: bool


@dataclass(frozen=True)
class Speed:
    """How fast a detector was here.

    Attributes:
        device: as torch names it, for example "cuda:0".
        title: the same as a reader knows it.
        seconds: for one slice, once the detector is loaded.
    """

    device: str
    title: str
    seconds: float

    def __post_init__(self) -> None:
        if not (isinstance(self.seconds, (int, float)) and 0 < self.seconds < 1e6):
            raise ValueError(f"{self.seconds!r} s is no duration of a detection")


@dataclass(frozen=True)
class Readiness:
    """Whether a detector can run; true in a condition if it can.

    Attributes:
        packages: every requirement, in the order of the requirements file.
        reasons: what keeps a detector from running, each in a sentence; empty when it can run.
        speed: device and duration, as measured the last time; None while nothing was.
    """

    packages: tuple[Package, ...]
    reasons: tuple[str, ...] = ()
    speed: Speed | None = None

    def __bool__(self) -> bool:
        return not self.reasons

    @property
    def missing(self) -> tuple[Package, ...]:
        return tuple(package for package in self.packages if not package.satisfied)


@dataclass(frozen=True)
class InstallPlan:
    """What installing would do.

    Attributes:
        torch: the requirement that Slicer's PyTorch extension has to serve; empty if torch is there.
        packages: requirements for pip.
        takes: (name, MB) of every package that is expected to come, those that others bring included.
        blocked: requirements that only another Slicer could meet, since packages of Slicer are not replaced.
    """

    torch: str
    packages: tuple[str, ...]
    takes: tuple[tuple[str, float], ...]
    blocked: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.torch or self.packages)

    @property
    def requirements(self) -> tuple[str, ...]:
        return (*([self.torch] if self.torch else []), *self.packages)

    @property
    def megabytes(self) -> float:
        return sum(size for _, size in self.takes)


def installed_version(name: str) -> str:
    """Version of an installed package, empty if there is none."""
    try:
        return importlib.metadata.version(name) or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def check_packages(
    requirements: Path, installed: InstalledVersion = installed_version
) -> tuple[Package, ...]:
    """The state of every line of a requirements file."""
    lines = (line.strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    return tuple(_check(line, installed) for line in lines if line)


def check_readiness(
    requirements: Path, bundle: Callable[[], object], speed: Speed | None = None
) -> Readiness:
    """Look at packages and detector.

    Args:
        requirements: a requirements file.
        bundle: reads the detector's description; raises MedAnomalyCLIPError when it cannot be used.
        speed: as measured before.
    """
    packages = check_packages(requirements)
    reasons = [
        f"{package.name} {package.installed} is too old: {package.requirement} is needed"
        if package.installed
        else f"{package.requirement} is not installed"
        for package in packages
        if not package.satisfied
    ]
    try:
        bundle()
    except MedAnomalyCLIPError as error:
        reasons.append(str(error))
    return Readiness(packages, tuple(reasons), speed)


def plan_installation(
    packages: Iterable[Package], installed: InstalledVersion = installed_version
) -> InstallPlan:
    """Who has to install what, and what that takes; packages of Slicer that are too old block it."""
    missing = [package for package in packages if not package.satisfied]
    protected = {_normal(name) for name in PROTECTED}
    blocked = [p.requirement for p in missing if p.installed and _normal(p.name) in protected]
    wanted = [p.requirement for p in missing if p.requirement not in blocked]
    torch = next((line for line in wanted if _parsed(line).name == "torch"), "")
    others = tuple(line for line in wanted if line != torch)
    # PyTorch's extension installs the two together, so that they match.
    names = [*(["torch", "torchvision"] if torch else []), *(_parsed(line).name for line in others)]
    return InstallPlan(torch, others, tuple(_brought(names, installed)), tuple(blocked))


def frozen_versions(installed: InstalledVersion = installed_version) -> str:
    """A constraints file that keeps pip from changing the protected packages that are installed."""
    versions = {name: installed(name) for name in PROTECTED}
    return "".join(f"{name}=={version}\n" for name, version in versions.items() if version)


def lacking_wheels(folder: Path, requirements: Sequence[str]) -> tuple[str, ...]:
    """Requirements that no wheel in a folder serves on this computer: its Python, system and processor.

    What the wheels need themselves is left to pip, which names it.
    """
    from packaging.tags import sys_tags
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    usable = set(sys_tags())
    versions: dict[str, list[str]] = {}
    for path in folder.glob("*.whl"):
        try:
            name, version, _, tags = parse_wheel_filename(path.name)
        except InvalidWheelFilename:
            continue
        if usable & tags:
            versions.setdefault(str(name), []).append(str(version))
    return tuple(
        line
        for line in requirements
        if not any(
            _parsed(line).specifier.contains(version, prereleases=True)
            for version in versions.get(_normal(_parsed(line).name), [])
        )
    )


def measure_speed(detector: SliceDetector, *, side: int = 256, runs: int = 3) -> Speed:
    """Time a detector on made-up slices: one to warm up, then the median of some.

    Args:
        detector: loaded, on the device to be measured.
        side: rows and columns of the slices.
        runs: how many are timed.
    """
    from .runtime import device_title

    noise = np.random.default_rng(0).integers(0, 1000, (side, side)).astype(np.int16)
    plane = SlicePlane(noise, np.eye(4), np.ones(noise.shape, dtype=bool), description="made up")
    detector.detect(plane)
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        detector.detect(plane)
        seconds.append(time.perf_counter() - started)
    where = detector.provenance
    return Speed(
        where.device, device_title(where.device, where.runtime, where.precision), float(np.median(seconds))
    )


def _check(line: str, installed: InstalledVersion) -> Package:
    requirement = _parsed(line)
    version = installed(requirement.name)
    importable = importlib.util.find_spec(_IMPORT_NAMES.get(requirement.name, requirement.name)) is not None
    fits = not version or requirement.specifier.contains(version, prereleases=True)
    return Package(line, requirement.name, version if importable else "", importable and fits)


def _parsed(line: str) -> Requirement:
    from packaging.requirements import Requirement  # Slicer ships it

    return Requirement(line)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _brought(names: Sequence[str], installed: InstalledVersion) -> list[tuple[str, float]]:
    """These packages and all that they bring and that is not installed, with their room in MB."""
    takes: dict[str, float] = {}
    waiting = [_normal(name) for name in names]
    while waiting:
        name = waiting.pop(0)
        if name in takes or (installed(name) and name not in map(_normal, names)):
            continue
        takes[name], brings = _TAKES.get(name, (0.0, ""))
        waiting += brings.split()
    return list(takes.items())
