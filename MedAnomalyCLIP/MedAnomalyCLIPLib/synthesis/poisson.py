"""Seamless cloning: a region takes the source's gradients and the target's values at its rim."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csc_array
from scipy.sparse.linalg import splu


def poisson_blend(target: np.ndarray, source: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Clone `source` into `target` inside `mask` (Pérez, Gangnet and Blake, Poisson Image Editing, 2003).

    Inside the mask the result f satisfies, with the four-neighbour Laplacian, lap f = lap source, and equals
    the target around it. Writing f = source + h makes h a membrane: harmonic inside, target - source around
    it, so adding a constant to the source changes nothing. Neighbours beyond the array are left out, which
    lets the source's gradient run freely into the array's edge.

    Args:
        target: (h, w) float image to be changed.
        source: (h, w) float image on the same grid, needed inside the mask and one pixel around it.
        mask: (h, w) bool, not all of the array, whose level nothing would fix then.

    Returns:
        (h, w) float32, equal to `target` outside the mask; may leave the range of both images.
    """
    if mask.all():
        raise ValueError("the mask covers the whole target, so nothing fixes the level of the pasted region")
    result = np.array(target, dtype=np.float32)
    if mask.any():
        result[mask] = source[mask] + _membrane(np.asarray(target, float) - source, mask)
    return result


def _membrane(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(N,) values of the harmonic function inside `mask` that continues `values` around it."""
    known_pixel, beyond = -1, -2
    number = np.full(mask.shape, known_pixel)
    count = int(np.count_nonzero(mask))
    unknowns = np.arange(count)
    number[mask] = unknowns
    number = np.pad(number, 1, constant_values=beyond)
    values = np.pad(values, 1)
    rows, columns = np.nonzero(number >= 0)

    degree = np.zeros(count)
    right_side = np.zeros(count)
    links_from, links_to = [unknowns], [unknowns]
    for step in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        neighbours = (rows + step[0], columns + step[1])
        numbers = number[neighbours]
        degree += numbers != beyond
        right_side += np.where(numbers == known_pixel, values[neighbours], 0)
        linked = numbers >= 0
        links_from.append(unknowns[linked])
        links_to.append(numbers[linked])

    places = (np.concatenate(links_from), np.concatenate(links_to))
    entries = np.concatenate([degree, np.full(places[0].size - count, -1.0)])
    matrix = csc_array((entries, places), shape=(count, count))
    # Minimum degree on the symmetric pattern keeps the factors of a planar grid small.
    return splu(matrix, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).solve(right_side)
