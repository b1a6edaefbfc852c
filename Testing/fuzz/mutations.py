"""Damage to bytes and to parsed values; every choice comes from the generator that is handed in."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rng = np.random.Generator

EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
HUGE_TEXT = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e308",
    "-1e308",
    "1e-320",
    "99999999999999999999",
    "2147483648",
)
BOMB_BYTES = 1 << 28
"""What a bomb unpacks to: more than a reader may need for any seed, from a quarter of a megabyte."""

# File names and fields that lead elsewhere, or that a file system or a terminal chokes on.
TRICKY_NAMES = (
    "../escaped",
    "../../../../../../tmp/escaped",
    "/tmp/escaped",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "..",
    ".",
    "",
    " ",
    "~/escaped",
    "a\0b",
    "a\nb\r\x1b[31m",
    "x" * 300,
    "d/" * 300 + "x",
    "CON",
    "NUL.nii",
    "LPT1.dcm",
    "C:\\Windows\\escaped",
    "\\\\server\\share\\escaped",
    "file:///etc/passwd",
    "http://127.0.0.1:9/escaped",
    "\u202egnp.exe",
    "\ud800",
    "-rf",
    "%s%n",
    "${HOME}",
    "a:b",
)


def pick(rng: Rng, choices: Sequence[Any]) -> Any:
    """One of them; `rng.choice` would turn them into an array."""
    return choices[int(rng.integers(len(choices)))]


def truncated(content: bytes, rng: Rng) -> bytes:
    return content[: int(rng.integers(0, max(len(content), 1)))]


def flipped(content: bytes, rng: Rng) -> bytes:
    """A few bits, mostly where the header is."""
    if not content:
        return content
    changed = bytearray(content)
    reach = len(changed) if rng.random() < 0.4 else min(700, len(changed))
    for _ in range(int(rng.integers(1, 9))):
        changed[int(rng.integers(reach))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def overwritten(content: bytes, rng: Rng) -> bytes:
    """A number at some place, of an edge value, in either byte order."""
    changed = bytearray(content)
    width = int(pick(rng, (1, 2, 4, 8)))
    if len(changed) <= width:
        return content
    at = int(rng.integers(min(len(changed) - width, 4096 if rng.random() < 0.7 else len(changed))))
    value = int(pick(rng, EDGES)) & (256**width - 1)
    changed[at : at + width] = value.to_bytes(width, pick(rng, ("little", "big")))
    return bytes(changed)


def inserted(content: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(len(content) + 1))
    kind = int(rng.integers(3))
    count = int(rng.integers(1, 64))
    piece = (rng.bytes(count), bytes(count), content[at : at + count] * int(rng.integers(1, 20)))[kind]
    return content[:at] + piece + content[at:]


def cut_out(content: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(len(content) + 1))
    return content[:at] + content[at + int(rng.integers(1, 200)) :]


def swapped(content: bytes, rng: Rng) -> bytes:
    """Two stretches change places."""
    if len(content) < 16:
        return content
    length = int(rng.integers(1, min(64, len(content) // 4)))
    a, b = sorted(int(x) for x in rng.integers(0, len(content) - 2 * length, 2))
    b += length
    return (
        content[:a]
        + content[b : b + length]
        + content[a + length : b]
        + content[a : a + length]
        + content[b + length :]
    )


BYTE_MUTATIONS: tuple[Callable[[bytes, Rng], bytes], ...] = (
    *(truncated, flipped, flipped, overwritten, overwritten),
    *(inserted, cut_out, swapped),
)


def damaged(content: bytes, rng: Rng) -> bytes:
    """One to three of the mutations of bytes."""
    for _ in range(int(rng.integers(1, 4))):
        content = pick(rng, BYTE_MUTATIONS)(content, rng)
    return content


def damaged_line(text: str, rng: Rng) -> str:
    """Text of lines, as headers, tables and settings are: one value, line or separator is not what it was."""
    lines = text.split("\n")
    at = int(rng.integers(len(lines)))
    kind = int(rng.integers(6))
    if kind == 0:
        lines[at] = _other_value(lines[at], rng)
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        lines.insert(at, lines[at])
    elif kind == 3:
        other = int(rng.integers(len(lines)))
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 4:
        words = lines[at].split(" ")
        words[int(rng.integers(len(words)))] = str(pick(rng, (*HUGE_TEXT, *TRICKY_NAMES)))
        lines[at] = " ".join(words)
    else:
        lines[at] = lines[at] * int(rng.integers(2, 400))
    return "\n".join(lines)


def _other_value(line: str, rng: Rng) -> str:
    for separator in (" = ", ": ", "=", ","):
        key, found, value = line.partition(separator)
        if found:
            count = max(len(value.split()), 1) + int(rng.integers(-1, 2))
            return key + found + " ".join(str(pick(rng, HUGE_TEXT)) for _ in range(count))
    return str(pick(rng, HUGE_TEXT))


def damaged_value(value: Any, rng: Rng, depth: int = 0) -> Any:
    """A parsed JSON value with something in it changed: its kind, size, sign, keys, or what lies below."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = pick(rng, list(value))
        changed = dict(value)
        if rng.random() < 0.08:
            del changed[key]
        elif rng.random() < 0.08:
            changed[str(pick(rng, (*TRICKY_NAMES, "extra", "__class__")))] = value[key]
        elif rng.random() < 0.06:
            changed[key] = value[pick(rng, list(value))]
        else:
            changed[key] = damaged_value(value[key], rng, depth + 1)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = int(rng.integers(len(value)))
        if rng.random() < 0.15:
            return value[:at]
        if rng.random() < 0.15:
            return value * int(rng.integers(2, 200))
        return [*value[:at], damaged_value(value[at], rng, depth + 1), *value[at + 1 :]]
    if isinstance(value, (int, float)) and rng.random() < 0.6:
        return pick(rng, (-value, value * 1000, value + 1, value - 1, 10**9, 2**31, 2**40, 2**62, -1, 0, 0.5))
    return pick(
        rng,
        (None, True, "", "x" * 10_000, [], {}, nested(900), *(float(t) for t in HUGE_TEXT), *TRICKY_NAMES),
    )


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def zlib_bomb(size: int = BOMB_BYTES, wbits: int = 15) -> bytes:
    """A stream of zeros that unpacks to `size` bytes; wbits 31 makes it gzip, -15 raw deflate."""
    packer = zlib.compressobj(9, wbits=wbits)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


def gzip_bomb(head: bytes, size: int = BOMB_BYTES) -> bytes:
    """A gzip file that begins with `head` and goes on for `size` zeros."""
    return gzip.compress(head + bytes(size), compresslevel=6)
