"""Whether results that are there answer a request, so that what was ended can go on where it was.

`detect --resume` asks for every input, since the results are all that it has; `batch`, which has records, for
those whose end these do not tell.

A folder of results and what is asked for in; the manifest of the earlier run out, if it answers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .errors import OutputFailed
from .export import MANIFEST, describe_input
from .geometry import AXES
from .output_folder import clear_remains, read_result_manifest
from .result import Provenance
from .volume import Volume


def earlier_results(folder: Path) -> dict[str, Any] | None:
    """The manifest of results that lie in a folder with all of their files; None when there are none.

    Results that a killed run had moved away are put back first.
    """
    clear_remains(folder.absolute())
    try:
        manifest = read_result_manifest(folder / MANIFEST)
    except OutputFailed:
        return None
    names = [name for name in manifest["files"] if isinstance(name, str) and Path(name).name == name]
    whole = len(names) == len(manifest["files"]) and all((folder / name).is_file() for name in names)
    return manifest if whole else None


def answers(
    manifest: dict[str, Any],
    *,
    volume: Volume,
    provenance: Provenance,
    threshold: float,
    window: Sequence[float] | None,
    prompt: str,
    axis: int,
    indices: Sequence[int],
    dicom: Collection[str] = (),
) -> bool:
    """Whether a manifest is that of the same image, detector and settings; it may still be incomplete."""
    asked = {
        "detector": {
            "name": provenance.bundle,
            "version": provenance.bundle_version,
            "sha256": provenance.bundle_sha256,
        },
        "threshold": float(threshold),
        "window_requested": None if window is None else [float(edge) for edge in window],
        "input": describe_input(volume),
        "slices_requested": len(indices),
    }
    slices = manifest.get("slices")
    if manifest.get("dicom", []) != sorted(set(dicom)):
        return False
    if any(manifest.get(key) != value for key, value in asked.items()) or not isinstance(slices, list):
        return False
    told = [record for record in slices if isinstance(record, dict)]
    done = [(record.get("axis"), record.get("index")) for record in told]
    alike = len(done) == len(slices) and all(record.get("prompt") == prompt for record in told)
    return alike and set(done) <= {(AXES[axis], index) for index in indices}
