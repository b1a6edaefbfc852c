"""What holds for long: runs killed at any moment, many slices, many cycles; short forms are in the tests.

`MEDANOMALYCLIP_LONG=1` makes the tests run the long forms and print their figures.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

LONG = bool(os.environ.get("MEDANOMALYCLIP_LONG"))


def resident_bytes() -> int:
    """Memory of this process that is in use now, in bytes; Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
