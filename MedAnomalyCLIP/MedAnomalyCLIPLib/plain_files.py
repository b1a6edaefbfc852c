"""Files opened without trust: ordinary ones only, and no more of them than there is or than is allowed."""

from __future__ import annotations

import io
from pathlib import Path

from .limits import VARIABLE


class BoundedFile(io.BufferedReader):
    """A file of which nobody can ask for more than there is.

    Python makes room for as much as is asked for before it reads, and the lengths in damaged headers are any.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def is_file(path: Path) -> bool:
    """Whether a file is there; not so where no file can have that name, or none may be looked for."""
    try:
        return path.is_file()
    except OSError:
        return False


def read_small_file(path: Path, largest: int) -> bytes:
    """The content of a file that is read whole.

    Raises:
        OSError: it is missing, no ordinary file (a pipe or a device may never end), or longer than `largest`.
    """
    if not path.is_file():
        try:
            path.stat()  # says that it is missing, or may not be looked at
        except ValueError as error:
            raise OSError(0, "no file can have that name") from error
        raise OSError(0, "it is a folder, a pipe or a device")
    with path.open("rb") as file:
        content = file.read(largest + 1) if path.stat().st_size <= largest else bytes(largest + 1)
    if len(content) > largest:
        raise OSError(0, f"it is longer than {largest:,} bytes; {VARIABLE} moves the limit")
    return content
