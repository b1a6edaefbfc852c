"""A full disk without filling one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """As on a full disk, writes beyond this many bytes of a file fail.

    No longer than `with` lasts: the tests' own log may be a longer file.
    """
    resource = pytest.importorskip("resource", reason="this system sets no limits for processes")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
