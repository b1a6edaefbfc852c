"""DICOM files that are deflated as a whole: how long they are is measured before a parser unpacks them."""

from __future__ import annotations

import io
import struct
import zlib

from .errors import UnsupportedImage
from .limits import VARIABLE, limits

_SYNTAX = b"1.2.840.10008.1.2.1.99"
_META_AT = 132
_LONG_VRS = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UR", b"UT", b"UN", b"SV", b"UV")
_CHUNK = 1 << 20


def check_deflated(file: io.BufferedReader, name: str) -> None:
    """Unpack what is deflated to nowhere; the file's place is left at its beginning.

    Raises:
        UnsupportedImage: it unpacks to more than `Limits.unpacked_bytes`.
        zlib.error: it is damaged.
    """
    start = _deflated_from(file.read(1 << 16))
    if start:
        largest, unpacked = limits().unpacked_bytes, 0
        file.seek(start)
        stream, pending = zlib.decompressobj(wbits=-zlib.MAX_WBITS), b""
        while not stream.eof and (pending := pending or file.read(_CHUNK)):
            unpacked += len(stream.decompress(pending, _CHUNK))
            pending = stream.unconsumed_tail
            if unpacked > largest:
                raise UnsupportedImage(
                    f"{name} unpacks to more than {largest:,} bytes: the file is damaged, or made to "
                    f"fill the memory; {VARIABLE} moves the limit"
                )
    file.seek(0)


def _deflated_from(head: bytes) -> int:
    """Where the deflated part begins, behind the elements of group 2; 0 where nothing is deflated."""
    if head[128:_META_AT] != b"DICM" or _SYNTAX not in head:
        return 0
    at = _META_AT
    while at + 8 <= len(head) and head[at : at + 2] == b"\x02\x00":
        if head[at + 4 : at + 6] in _LONG_VRS:
            if at + 12 > len(head):
                return 0
            (length,) = struct.unpack_from("<I", head, at + 8)
            at += 12 + length
        else:
            (length,) = struct.unpack_from("<H", head, at + 6)
            at += 8 + length
    return at
