"""Voxels as volume files store them: where they lie, how they are packed; a numpy array out.

Used by the readers of NIfTI, NRRD and MetaImage. ITK is not asked for voxels: it fills files that are cut
short with zeros, damaged ones with what was in memory, puts zeros in the place of NaN, all without a word.
Damaged headers of NRRD and MetaImage even end its process.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import UnreadableImage, UnsupportedImage
from .limits import limits
from .volume import shown_name

_CHUNK = 1 << 20
_CHUNKS_TO_THE_END = 64  # more than any trailer, less than a file made to unpack without end
_LARGEST_RATIO = 1040  # deflate makes a byte of at most 1032
_LARGEST_SKIP = 1 << 26  # bytes of a header with its extensions


@dataclass(frozen=True)
class StoredVoxels:
    """Where the voxels of an image lie.

    Attributes:
        files: that hold them, one after the other in equal parts.
        dtype: of one value, with its byte order.
        shape: (K, J, I) or (K, J, I, 3).
        packing: "" as they are, "zlib" (gzip too), or "text".
        start: bytes before them in each file, as it lies on the disk; -1 when they are the end of the file.
        skip: bytes before them once they are unpacked.
    """

    files: tuple[Path, ...]
    dtype: np.dtype
    shape: tuple[int, ...]
    packing: str = ""
    start: int = 0
    skip: int = 0

    def read(self) -> np.ndarray:
        """The voxels.

        Raises:
            UnreadableImage: a file is missing, damaged or cut short; said before memory is taken where its
                length tells.
        """
        self._check_lengths()
        voxels = np.empty(self.shape, self.dtype)
        space = memoryview(voxels.reshape(-1).view(np.uint8))
        part = len(space) // len(self.files)
        for number, path in enumerate(self.files):
            own = space[number * part : (number + 1) * part]
            if self.packing == "text":
                _fill_from_text(own, path, self.start, self.dtype)
            elif self.packing == "zlib":
                _fill(own, _unpacked(path, self.start), self.skip, path)
            else:
                start = path.stat().st_size - part if self.start < 0 else self.start
                _fill(own, _as_it_is(path, start + self.skip, part), 0, path)
        return voxels

    def _check_lengths(self) -> None:
        """Hold what the header claims against how long the files are."""
        values = int(np.prod(self.shape, dtype=object))
        part, rest = divmod(values * self.dtype.itemsize, len(self.files))
        if rest or not 0 <= self.skip <= _LARGEST_SKIP:
            raise UnreadableImage(f"{shown_name(self.files[0])} has a header that contradicts itself")
        for path in self.files:
            there = path.stat().st_size - max(self.start, 0)
            if self.packing == "zlib":
                enough = there * _LARGEST_RATIO >= part
            elif self.packing == "text":
                enough = there >= 2 * (part // self.dtype.itemsize) - 1
            else:
                there -= self.skip
                enough = there >= part
            if not enough:
                raise UnreadableImage(
                    f"{shown_name(path)} is cut short: it holds {max(there, 0):,} of {part:,} bytes of voxels"
                )


def data_file(header: Path, name: str) -> Path:
    """The file beside a header that holds its data.

    Raises:
        UnreadableImage: it is missing, lies in another folder, or is no ordinary file: a pipe or a device
            never ends.
    """
    place = header.parent
    try:
        path = (place / name).resolve()
        inside = path.is_relative_to(place.resolve()) and not Path(name).is_absolute()
        usable = inside and path.is_file()
    except (ValueError, OSError, RuntimeError):
        usable = inside = False
    if not usable:
        fault = "is not there" if inside else "must lie in the header's own folder"
        raise UnreadableImage(
            f"{shown_name(header)} has its data in a file beside it that {fault}: keep both together"
        )
    return path


def _as_it_is(path: Path, start: int, count: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while count > 0 and (chunk := file.read(min(_CHUNK, count))):
            count -= len(chunk)
            yield chunk


def _unpacked(path: Path, start: int) -> Iterator[bytes]:
    """Chunks of a zlib or gzip stream, of several members too; its checksum is held against them."""
    with path.open("rb") as file:
        file.seek(start)
        yield from _members(file, shown_name(path))


def _members(file: BinaryIO, name: str) -> Iterator[bytes]:
    unpacker, pending, full = zlib.decompressobj(wbits=47), b"", False
    while True:
        if unpacker.eof:
            pending = unpacker.unused_data or file.read(_CHUNK)
            if pending[:2] != b"\x1f\x8b":  # no further member
                return
            unpacker = zlib.decompressobj(wbits=47)
        elif not pending and not full:
            pending = file.read(_CHUNK)
            if not pending:
                raise UnreadableImage(f"{name} is cut short: its compressed data ends too early")
        chunk = unpacker.decompress(pending, _CHUNK)
        pending, full = unpacker.unconsumed_tail, len(chunk) == _CHUNK
        if chunk:
            yield chunk


def _fill(space: memoryview, chunks: Iterator[bytes], skip: int, path: Path) -> None:
    """Put the chunks, without the first `skip` bytes, into `space`, and read on to their end."""
    filled, beyond = 0, 0
    for chunk in chunks:
        usable = chunk[skip:]
        skip -= len(chunk) - len(usable)
        piece = usable[: len(space) - filled]
        space[filled : filled + len(piece)] = piece
        filled += len(piece)
        beyond += filled == len(space)
        if beyond > _CHUNKS_TO_THE_END:
            break
    if filled < len(space):
        raise UnreadableImage(
            f"{shown_name(path)} is cut short: it holds {filled:,} of {len(space):,} bytes of voxels"
        )


def _fill_from_text(space: memoryview, path: Path, start: int, dtype: np.dtype) -> None:
    name, largest = shown_name(path), limits().text_bytes
    if path.stat().st_size > largest:
        raise UnsupportedImage(
            f"{name} holds its voxels as text, of more than {largest:,} bytes: save it binary"
        )
    with path.open("rb") as file:
        file.seek(max(start, 0))
        words = file.read().split()
    count = len(space) // dtype.itemsize
    if len(words) < count:
        raise UnreadableImage(f"{name} is cut short: it holds {len(words):,} of {count:,} voxels")
    values = np.array(words[:count], dtype=np.float64)
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        if not ((values >= bounds.min) & (values <= bounds.max)).all():
            raise UnreadableImage(f"{name} holds values that are beyond its own type")
    space[:] = memoryview(values.astype(dtype)).cast("B")
