"""The detectors in a folder, to choose from: manifests are read, weights and torch are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .bundle import (
    MANIFEST,
    NETWORK,
    NETWORK_INT8,
    TEXT_TOWER,
    WEIGHTS,
    BundleManifest,
    check_size,
    read_manifest,
)
from .errors import BundleInvalid


@dataclass(frozen=True)
class BundleSummary:
    """What a list of detectors tells of one.

    Attributes:
        folder: where it lies.
        manifest: what its JSON says.
    """

    folder: Path
    manifest: BundleManifest

    @classmethod
    def read(cls, folder: Path | str) -> BundleSummary:
        """Read and check a bundle's manifest, and that its weights are there in full length.

        Raises:
            BundleInvalid: a file is missing, incomplete, or not understood.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        check_size(folder / WEIGHTS, manifest.weights_bytes)
        if manifest.text_sha256:
            check_size(folder / TEXT_TOWER, manifest.text_bytes)
        if manifest.network_sha256:
            check_size(folder / NETWORK, manifest.network_bytes)
        if manifest.int8 is not None:
            check_size(folder / NETWORK_INT8, manifest.int8.bytes)
        return cls(folder, manifest)

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def description(self) -> str:
        return self.manifest.description

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}"


def titles(bundles: Sequence[BundleSummary]) -> list[str]:
    """What to call each in a list: those that have the same name and version by their folders, too."""
    count = Counter(bundle.title for bundle in bundles)
    return [
        bundle.title if count[bundle.title] == 1 else f"{bundle.title} ({bundle.folder.name})"
        for bundle in bundles
    ]


def list_bundles(folder: Path | str) -> tuple[list[BundleSummary], dict[Path, BundleInvalid]]:
    """The detectors whose folders lie in a folder, by name and version.

    Returns:
        Those that can be used, and those that cannot with the reason. Folders without a manifest and hidden
        folders are no detectors; a folder that does not exist holds none.
    """
    folder = Path(folder)
    found: list[BundleSummary] = []
    damaged: dict[Path, BundleInvalid] = {}
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return found, damaged
    except OSError as error:
        return found, {folder: BundleInvalid(f"{folder} cannot be read ({error.strerror})")}
    for path in inside:
        if not _has_manifest(path):
            continue
        try:
            found.append(BundleSummary.read(path))
        except BundleInvalid as error:
            damaged[path] = error
    return sorted(found, key=lambda bundle: (bundle.name, bundle.version)), damaged


def _has_manifest(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).is_file()
    except OSError:
        return True  # a folder that may not be entered; reading it says why
