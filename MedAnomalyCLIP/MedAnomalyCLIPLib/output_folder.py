"""A folder of results that is complete when it appears, and never replaces what is not its own.

A place and the name of its manifest in; a staging folder to write into out, which takes the place at the end.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from .errors import OutputFailed


class OutputFolder:
    """Claims a place at once: work is too slow to learn at its end that nothing can be written.

    Used with `with`, the results appear when all went well, and nothing is left behind otherwise.

    Attributes:
        place: the folder as the user named it.
        staging: the folder to write into, beside it.
    """

    def __init__(self, place: Path | str, manifest: str, *, overwrite: bool) -> None:
        """Make the staging folder.

        Args:
            place: where the results appear.
            manifest: name of the JSON file among them, whose "files" lists all of them.
            overwrite: replace earlier results.

        Raises:
            OutputFailed: the place is taken, or cannot be written.
        """
        self.place = Path(place).absolute()
        self._manifest, self._overwrite = manifest, overwrite
        self._check_place()
        self.staging = self.place.with_name(f".{self.place.name}.{uuid.uuid4().hex[:8]}.partial")
        with writing(self.place):
            self.staging.mkdir(parents=True)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.appear()
        finally:
            self.discard()

    def appear(self) -> None:
        """Let the results take their place; earlier ones go only when these are there."""
        self._check_place()
        with writing(self.place):
            take_place(self.staging, self.place)

    def discard(self) -> None:
        """Remove what was staged, if it has not appeared."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _check_place(self) -> None:
        """Raise unless the place is free, or holds old results and nothing else that would be lost."""
        name = self.place.name
        with writing(self.place):
            present = sorted(p.name for p in self.place.iterdir()) if self.place.exists() else []
        if not present:
            return
        if not self._overwrite:
            raise OutputFailed(f"{name} exists already; use --overwrite, or another --output")
        try:
            manifest = json.loads((self.place / self._manifest).read_text(encoding="utf-8"))
            ours = set(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError):
            ours = set()
        foreign = [file for file in present if file not in ours]
        if foreign:
            raise OutputFailed(
                f"{name} holds {foreign[0]}, which is no result of an earlier run; "
                "move it away, or use another --output"
            )


def take_place(staging: Path, place: Path) -> None:
    """Give a finished folder its name; one that was there goes only when the new one is in its place."""
    old = staging.with_name(f"{staging.name}.old")
    if place.exists():
        place.replace(old)
    try:
        staging.replace(place)
    except OSError:
        if old.exists():
            old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputFailed(f"{path.name} could not be written: {error.strerror or error}") from error
