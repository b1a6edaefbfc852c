"""Volumes of known content and place, drawn by formula; none of them is a patient."""

from __future__ import annotations

import numpy as np
import slicer
import vtk

# Centre and half-axes of the bright spot, in units of half the head.
LESION_CENTRE = (0.38, -0.25, 0.15)
LESION_AXES = (0.17, 0.15, 0.25)


def head(shape: tuple[int, int, int] = (24, 80, 72), *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A head-like phantom with a bright spot: (K, J, I) int16 voxels and (K, J, I) bool spot.

    I runs to the patient's left, J to the back, K to the top, as in most axial series.
    """
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")

    def inside(centre: tuple[float, float, float], axes: tuple[float, float, float]) -> np.ndarray:
        terms = ((u - c) / a for u, c, a in zip((x, y, z), centre, axes, strict=True))
        return sum(term**2 for term in terms) < 1

    voxels = np.zeros(shape)
    voxels[inside((0, 0, 0), (0.86, 0.93, 0.95))] = 620  # scalp
    voxels[inside((0, 0, 0), (0.80, 0.87, 0.90))] = 90  # skull
    voxels[inside((0, 0, 0), (0.76, 0.83, 0.86))] = 420  # grey matter
    voxels[inside((0, 0, 0), (0.62, 0.70, 0.70))] = 560  # white matter
    for side in (-1, 1):
        voxels[inside((side * 0.16, -0.05, 0.05), (0.09, 0.32, 0.30))] = 110  # ventricle
    spot = inside(LESION_CENTRE, LESION_AXES)
    voxels[spot] = 880
    noise = np.random.default_rng(seed).normal(0, 18, shape)
    return np.clip(voxels + noise, 0, None).astype(np.int16), spot


def axial_matrix(
    shape: tuple[int, int, int], spacing: tuple[float, float, float] = (2.0, 2.0, 5.0)
) -> np.ndarray:
    """4x4 IJK to RAS of an axial series centred on the origin; `spacing` along I, J, K."""
    k, j, i = shape
    matrix = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    matrix[:3, 3] = -matrix[:3, :3] @ (np.array([i, j, k]) - 1) / 2
    return matrix


def rotation(about: str, degrees: float) -> np.ndarray:
    """4x4 rotation about the R, A or S axis."""
    one, two = {"R": (1, 2), "A": (2, 0), "S": (0, 1)}[about]
    angle = np.deg2rad(degrees)
    matrix = np.eye(4)
    matrix[one, one] = matrix[two, two] = np.cos(angle)
    matrix[two, one] = np.sin(angle)
    matrix[one, two] = -np.sin(angle)
    return matrix


def translation(r: float, a: float, s: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = r, a, s
    return matrix


def add_volume(voxels: np.ndarray, ijk_to_ras: np.ndarray, name: str = "Phantom") -> vtk.vtkObject:
    """A scalar or, with a fourth axis, a vector volume node in the scene, shown with a fixed window."""
    class_name = "vtkMRMLVectorVolumeNode" if voxels.ndim == 4 else None
    node = slicer.util.addVolumeFromArray(voxels, ijk_to_ras, name, class_name)
    if voxels.ndim == 3:
        node.GetDisplayNode().AutoWindowLevelOff()
        node.GetDisplayNode().SetWindowLevelMinMax(0, 1000)
    return node


def add_linear_transform(matrix: np.ndarray) -> vtk.vtkObject:
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    node.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(matrix))
    return node


def add_bending_transform(bend_mm: float = 12.0) -> vtk.vtkObject:
    """A non-linear transform that moves the middle of the head toward anterior and leaves its edges."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTransformNode")
    spline = vtk.vtkThinPlateSplineTransform()
    spline.SetBasisToR()
    source, target = vtk.vtkPoints(), vtk.vtkPoints()
    corners = [(r, a, s) for r in (-80, 80) for a in (-90, 90) for s in (-70, 70)]
    for point in [*corners, (0, 0, 0)]:
        source.InsertNextPoint(point)
        target.InsertNextPoint(point[0], point[1] + (bend_mm if point == (0, 0, 0) else 0), point[2])
    spline.SetSourceLandmarks(source)
    spline.SetTargetLandmarks(target)
    node.SetAndObserveTransformToParent(spline)
    return node
