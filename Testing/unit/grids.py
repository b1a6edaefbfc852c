"""Volumes in every orientation for property tests, and where their voxels and pixels lie."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from MedAnomalyCLIPLib.geometry import SlicePlane
from MedAnomalyCLIPLib.volume import Volume

bounded = settings(max_examples=60, deadline=None, derandomize=True)

SIGNED_PERMUTATIONS = [
    np.array(signs) * np.eye(3)[list(order)]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((-1, 1), repeat=3)
]


def rotation(degrees: float, axis: int) -> np.ndarray:
    turned = np.eye(3)
    i, j = (a for a in range(3) if a != axis)
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned[[i, j, i, j], [i, j, j, i]] = cosine, cosine, -sine, sine
    return turned


# A volume turned by exactly 45°: equally near to two views, and its axial slices to two ways of reading them.
DIAGONAL = ((4, 5, 6), np.array([[1.0, -1, 0, 0], [1, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]))


@st.composite
def rotations(draw):
    """Any rotation of space."""
    quaternion = np.array(draw(st.tuples(*[st.floats(-1, 1)] * 4)))
    length = np.linalg.norm(quaternion)
    w, x, y, z = quaternion / length if length > 1e-3 else (1, 0, 0, 0)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


directions = st.one_of(st.sampled_from(SIGNED_PERMUTATIONS), rotations())
positions = st.tuples(*[st.floats(-300, 300)] * 3)


@st.composite
def grids(draw, sheared: bool = False):
    """Size (I, J, K) and ijk_to_ras of a volume: any orientation, flip, spacing and place, some sheared."""
    size = draw(st.tuples(*[st.integers(3, 9)] * 3))
    matrix = np.eye(4)
    steps = np.diag(draw(st.tuples(*[st.sampled_from([0.4, 0.75, 1.0, 2.5, 5.0])] * 3)))
    if sheared:
        steps[0, 1] = draw(st.floats(-0.4, 0.4)) * steps[1, 1]
        steps[1, 2] = draw(st.floats(-0.4, 0.4)) * steps[2, 2]
    matrix[:3, :3] = draw(directions) @ steps
    matrix[:3, 3] = draw(positions)
    return size, matrix


@st.composite
def voxels_of_grids(draw):
    """A grid and a voxel (i, j, k) in it."""
    size, matrix = draw(grids())
    return size, matrix, tuple(draw(st.integers(0, n - 1)) for n in size)


@st.composite
def planes_of_grids(draw):
    """A grid, perhaps sheared, and the SliceToRAS of a view that passes through a point inside it."""
    size, matrix = draw(grids(sheared=draw(st.booleans())))
    point = np.array([draw(st.floats(0.3, 0.7)) * (n - 1) for n in size])
    return size, matrix, view_through((matrix @ [*point, 1])[:3], draw(rotations()))


def view_through(point: np.ndarray, axes: np.ndarray, slide: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """SliceToRAS with given right, up and normal; its origin is slid along the plane away from the point."""
    view = np.eye(4)
    view[:3, :3] = axes
    view[:3, 3] = point + slide[0] * axes[:, 0] + slide[1] * axes[:, 1]
    return view


def empty(size: tuple[int, int, int], dtype=np.int16) -> np.ndarray:
    return np.zeros(size[::-1], dtype)


def numbered(size: tuple[int, int, int]) -> np.ndarray:
    """Voxels that are all different."""
    return np.arange(np.prod(size), dtype=np.int32).reshape(size[::-1])


def voxel_positions(size: tuple[int, int, int], matrix: np.ndarray) -> np.ndarray:
    """(K, J, I, 3) RAS of each voxel."""
    k, j, i = np.indices(size[::-1])
    return np.stack([i, j, k], axis=-1) @ matrix[:3, :3].T + matrix[:3, 3]


def pixel_positions(plane: SlicePlane) -> np.ndarray:
    """(H, W, 3) RAS of each pixel."""
    row, column = np.indices(plane.shape)
    return np.stack([column, row], axis=-1) @ plane.ijk_to_ras[:3, :2].T + plane.ijk_to_ras[:3, 3]


def in_voxel_centres(volume: Volume, ras: np.ndarray) -> np.ndarray:
    """Which positions lie in the box of voxel centres, where trilinear interpolation is exact on a ramp."""
    indices = (ras - volume.ijk_to_ras[:3, 3]) @ np.linalg.inv(volume.ijk_to_ras[:3, :3]).T
    return np.all((indices >= 0) & (indices <= np.array(volume.size) - 1), axis=-1)
