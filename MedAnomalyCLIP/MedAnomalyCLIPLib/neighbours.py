"""Which normal images may not vouch for each other.

How normal an image looks beside others is only told by others that are no near copies of it. Slices that lie
close together in a volume are, and so, a little, are all images of one patient.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .geometry import SlicePlane

NEAR_MM = 5.0
RULE = (
    f"Each without itself and without slices of its volume less than {NEAR_MM:g} mm away; without its whole "
    "volume or patient where the others hold at least as many images"
)
_PARALLEL = math.cos(math.radians(20))
_SAME_MM = 0.1
_BLOCKS = 5  # of images of one patient that nobody knows the places of


@dataclass(frozen=True)
class Origin:
    """Where an image comes from.

    Attributes:
        source: equal for images of one patient, or of one volume where patients are not known.
        volume: equal for slices of one volume, whose places can be compared.
        centre: a point of the slice, in mm; None when it is not known.
        normal: of the slice, unit length; None when it is not known.
    """

    source: Hashable
    volume: Hashable = None
    centre: tuple[float, float, float] | None = None
    normal: tuple[float, float, float] | None = None

    @classmethod
    def of_plane(cls, plane: SlicePlane, volume: Hashable) -> Origin:
        """The origin of a plane that was cut from a volume."""
        rows, columns = plane.shape
        normal = np.cross(plane.ijk_to_ras[:3, 0], plane.ijk_to_ras[:3, 1])
        return cls(
            volume,
            volume,
            tuple(plane.to_ras((columns - 1) / 2, (rows - 1) / 2).tolist()),
            tuple((normal / np.linalg.norm(normal)).tolist()),
        )


def left_out(origins: Sequence[Origin]) -> np.ndarray:
    """Which images are left out when each one is compared with the rest.

    An image is left out for itself and for its near copies: slices of the same volume, nearly parallel and
    less than `NEAR_MM` away. Where the other patients hold at least as many images, the whole patient is, as
    the next patient will be a new one. Images of one patient without known places are taken in order, in five
    blocks, each left out as a whole.

    Returns:
        (K, K) bool; [i, j] whether j is left out when i is looked at.
    """
    count = Counter(origin.source for origin in origins)
    whole = np.array([2 * count[origin.source] <= len(origins) for origin in origins])
    same_patient = _equal([origin.source for origin in origins])
    near = _equal(_blocks(origins, count))  # where places are not known
    placed = np.array([origin.centre is not None and origin.normal is not None for origin in origins])
    known = placed[:, None] & placed
    unknown = (0.0, 0.0, 0.0)
    centres = np.array([origin.centre or unknown for origin in origins])
    normals = np.array([origin.normal or unknown for origin in origins])
    along = np.einsum("ija,ia->ij", centres[None] - centres[:, None], normals)
    close = (np.abs(along) < NEAR_MM) & (np.abs(normals @ normals.T) > _PARALLEL)
    # In two volumes of one patient, places cannot be compared.
    near = np.where(known, close | ~_equal([origin.volume for origin in origins]), near)
    return np.eye(len(origins), dtype=bool) | (same_patient & (whole[:, None] | near))


def same_slice(one: Origin, other: Origin) -> bool:
    """Whether two slices of one volume show the same: nearly parallel, and no tenth of a millimetre apart."""
    if one.source != other.source or one.volume != other.volume:
        return False
    if one.centre is None or one.normal is None or other.centre is None or other.normal is None:
        return False
    normal = np.array(one.normal)
    apart = abs((np.array(other.centre) - np.array(one.centre)) @ normal)
    return bool(abs(normal @ np.array(other.normal)) > _PARALLEL and apart < _SAME_MM)


def _equal(keys: Sequence[Hashable]) -> np.ndarray:
    """(K, K) bool: which keys are equal."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    numbered = np.array([numbers[key] for key in keys], dtype=int)
    return numbered[:, None] == numbered


def _blocks(origins: Sequence[Origin], count: Counter[Hashable]) -> list[int]:
    """For each image the number of its block among the images of its source, in their order."""
    seen: Counter[Hashable] = Counter()
    blocks = []
    for origin in origins:
        blocks.append(seen[origin.source] * _BLOCKS // count[origin.source])
        seen[origin.source] += 1
    return blocks
