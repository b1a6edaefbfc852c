"""The folder of one training run: held by one process at a time, and by no other recipe or images."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..configuration import to_mapping
from ..errors import OutputFailed
from ..output_folder import held, writing
from .images import ChosenImages
from .recipe import Recipe

SETTINGS, BUNDLE, UNCALIBRATED = "settings.json", "bundle", "uncalibrated"
_LOCK = "run.lock"
# What a kill while something was written leaves behind.
_REMAINS = ("*.partial", f".{BUNDLE}-*", UNCALIBRATED, f".{UNCALIBRATED}-*")


@contextmanager
def run_folder(folder: Path, recipe: Recipe, chosen: ChosenImages) -> Iterator[None]:
    """Hold the folder of a run, new or begun by the same recipe with the same images.

    Raises:
        OutputFailed: it holds something else, is in use, or cannot be written.
    """
    settings = _settings(recipe, chosen)
    with writing(folder):
        if folder.is_dir() and not (folder / SETTINGS).is_file():
            known = {_LOCK, *(path.name for path in folder.glob("*.partial"))}
            if any(path.name not in known for path in folder.iterdir()):
                raise OutputFailed(
                    f"{folder.name} holds files that are no training run; choose another folder"
                )
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder / _LOCK, f"A training runs in {folder.name} already; wait for it, or end it"):
        _claim(folder, settings)
        yield


def _claim(folder: Path, settings: bytes) -> None:
    """Write the settings, or compare them with those of the run that is there, and clear up after a kill."""
    file = folder / SETTINGS
    with writing(file):
        if not file.is_file():
            partial = file.with_suffix(".partial")
            partial.write_bytes(settings)
            partial.replace(file)
        elif file.read_bytes() != settings:
            raise OutputFailed(
                f"{folder.name} holds a run with other settings or images; choose another folder, or "
                "delete it"
            )
        for path in (path for pattern in _REMAINS for path in folder.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _settings(recipe: Recipe, chosen: ChosenImages) -> bytes:
    images = [
        [str(record.path), str(record.mask), record.slice_at, record.abnormal]
        for part in (chosen.training, chosen.validation)
        for record in part
    ]
    digest = hashlib.sha256(json.dumps(images).encode()).hexdigest()  # names may tell who it is
    return json.dumps({"recipe": to_mapping(recipe), "images": digest}, indent=1, sort_keys=True).encode()
