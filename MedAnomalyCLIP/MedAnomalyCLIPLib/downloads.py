"""Model files that this software fetched, in a folder of their own, so that they can be told and deleted.

Caches that other programs share (`~/.cache/clip`, `~/.cache/huggingface`) are neither filled nor emptied.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .errors import OutputFailed

PLACE = "MEDANOMALYCLIP_DOWNLOADS"
"""Environment variable: another place for the folder, for example a larger disk."""

_NAME = "medanomalyclip-models"  # ours alone, so that deleting it takes nothing else along


def downloads_folder() -> Path:
    """Where fetched model files are; it exists once something was fetched."""
    place = os.environ.get(PLACE)
    return (Path(place) if place else Path.home() / ".cache") / _NAME


def downloaded_bytes() -> int:
    """Room that fetched model files take; a file that has several names counts once."""
    sizes = {}
    for path in downloads_folder().rglob("*"):
        if path.is_file() and not path.is_symlink():
            facts = path.stat()
            sizes[facts.st_dev, facts.st_ino or path] = facts.st_size
    return sum(sizes.values())


def delete_downloads() -> int:
    """Delete fetched model files; returns the bytes that were freed.

    Raises:
        OutputFailed: a file could not be deleted, for example because a program has it open.
    """
    freed = downloaded_bytes()
    folder = downloads_folder()
    try:
        if folder.is_symlink():
            raise OutputFailed(f"{folder} is a link; delete what it leads to yourself")
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise OutputFailed(f"{folder} could not be deleted: {error.strerror or error}") from error
    return freed
