"""A folder of results that is complete when it appears, and never replaces what is not its own.

A place and the name of its manifest in; a staging folder to write into out, which takes the place at the end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from .errors import OutputFailed
from .limits import limits
from .plain_files import read_small_file

_PARTIAL, _OLD, _LOCK = ".partial", ".old", ".lock"


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
        clear_remains(self.place)
        self._check_place()
        with writing(self.place):
            self._staging = Staging(self.place)
        self.staging = self._staging.folder

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
            self._staging.appear()

    def discard(self) -> None:
        """Remove what was staged, if it has not appeared."""
        self._staging.discard()

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
            ours = set(read_result_manifest(self.place / self._manifest)["files"])
        except (OutputFailed, TypeError):
            ours = set()
        foreign = [file for file in present if file not in ours]
        if foreign:
            raise OutputFailed(
                f"{name} holds {foreign[0]}, which is no result of an earlier run; "
                "move it away, or use another --output"
            )


def read_result_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an earlier run's results.

    Raises:
        OutputFailed: there is none that can be read.
    """
    try:
        manifest = json.loads(read_small_file(path, limits().text_bytes).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputFailed(f"{path.parent.name} holds no {path.name} that can be read") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        raise OutputFailed(f"{path.parent.name}/{path.name} does not say which files it comes with")
    return manifest


class Staging:
    """A folder beside a place, to write into, which takes the place at the end.

    A lock beside it is held for as long as its process lives, however that ends; so what a killed run left is
    told from what another run is writing, and cleared up by the next run for the same place.

    Attributes:
        folder: to write into.
    """

    def __init__(self, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        clear_remains(place)
        name = f"{_stem(place)}.{uuid.uuid4().hex[:8]}"
        self._place = place
        self._lock_file = place.with_name(f"{name}{_LOCK}")
        self._lock = _locked(self._lock_file)
        self.folder = place.with_name(f"{name}{_PARTIAL}")
        try:
            self.folder.mkdir()
        except OSError:
            self.discard()
            raise

    def appear(self) -> None:
        """Take the place; what was there goes only when the new is in its place."""
        old = self.folder.with_name(f"{self.folder.name}{_OLD}")
        if self._place.exists():
            self._place.replace(old)
        try:
            self.folder.replace(self._place)
        except OSError:
            if old.exists():
                old.replace(self._place)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Remove what has not appeared, and let go of the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        with suppress(OSError):
            self._lock_file.unlink(missing_ok=True)


def clear_remains(place: Path) -> None:
    """Remove what killed runs left beside a place, and put back results that one of them had moved away.

    Whatever a run that still lives is writing is left alone.
    """
    stem = f"{_stem(place)}."
    with suppress(OSError):
        beside = sorted(path for path in place.parent.iterdir() if path.name.startswith(stem))
        for lock_file in {path.with_name(f"{path.name[: len(stem) + 8]}{_LOCK}") for path in beside}:
            lock = _locked(lock_file)
            if lock is None:
                continue
            old = lock_file.with_name(lock_file.name.replace(_LOCK, f"{_PARTIAL}{_OLD}"))
            if old.exists() and not place.exists():
                old.replace(place)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(lock_file.with_name(lock_file.name.replace(_LOCK, _PARTIAL)), ignore_errors=True)
            lock.release()
            with suppress(OSError):
                lock_file.unlink(missing_ok=True)


def _stem(place: Path) -> str:
    """Beginning of the names of all that is written for a place; short, since names have a longest length."""
    return f".{place.name[:40]}-{hashlib.sha256(place.name.encode(errors='replace')).hexdigest()[:8]}"


@contextmanager
def held(lock_file: Path, in_use: str) -> Iterator[None]:
    """Hold a folder by a lock on a file in it, against every other process that does so too.

    The system lets go of it when the process ends, however it ends. On file systems that know no locks, as
    some of clusters do not, nobody can hold it, and the user has to see to it.

    Args:
        lock_file: made if need be; its folder is there.
        in_use: what to say where another process holds it.

    Raises:
        OutputFailed: another process holds it, or it cannot be written.
    """
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputFailed(in_use) from None
    except PermissionError as error:
        name = lock_file.parent.name
        raise OutputFailed(f"{name} could not be written: {error.strerror or error}") from error
    except (OSError, NotImplementedError):
        pass  # no locks here: filelock says so in either way
    try:
        yield
    finally:
        lock.release()


def _locked(path: Path) -> FileLock | None:
    """A lock on a file, None where another process has it, or the file system knows no locks."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError, NotImplementedError):
        return None
    return lock


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says into an error that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputFailed(f"{path.name} could not be written: {error.strerror or error}") from error
