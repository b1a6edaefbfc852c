"""How large an input may be. Whatever claims more is refused from its header, before memory is taken for it.

The defaults let pass what an ordinary computer holds, and can be changed in one place: the environment
variable MEDANOMALYCLIP_LIMITS, as in "image_voxels=4e9, folder_files=50000".
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from .errors import InvalidRequest

VARIABLE = "MEDANOMALYCLIP_LIMITS"


@dataclass(frozen=True)
class Limits:
    """Numbers above which an input is refused.

    Attributes:
        image_voxels: values in one image, channels of colour counted apart.
        unpacked_bytes: what a DICOM file that is compressed as a whole may unpack to.
        fetched_bytes: what an archive may send as one series.
        folder_files: files in a folder that is searched for a DICOM series; beyond it the user has pointed at
            an archive, not at a study.
        text_bytes: a manifest, table, recipe or list, an archive's answer to a query, and voxels that are
            written out as text.
        weights_bytes: a file of weights, and a network as a detector describes it.
        weights_names: named tensors in a file of weights.
    """

    image_voxels: int = 2**31
    unpacked_bytes: int = 2**32
    fetched_bytes: int = 2**33
    folder_files: int = 20_000
    text_bytes: int = 2**28
    weights_bytes: int = 2**35
    weights_names: int = 100_000


def limits() -> Limits:
    """The limits in force.

    Raises:
        InvalidRequest: the environment variable is not understood.
    """
    return _parsed(os.environ.get(VARIABLE, ""))


@lru_cache(maxsize=8)
def _parsed(text: str) -> Limits:
    known = {entry.name for entry in fields(Limits)}
    changes = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            changes[name] = int(float(value))
        except (ValueError, OverflowError):
            changes[name] = 0
        if name not in known or changes[name] < 1:
            raise InvalidRequest(
                f"{VARIABLE} holds {part!r}; write name=number, at least 1, with one of the names "
                f"{', '.join(sorted(known))}"
            )
    return replace(Limits(), **changes)
