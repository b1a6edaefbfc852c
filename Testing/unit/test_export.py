"""What lies in a result folder, and what is left behind when writing it fails."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
from full_disk import files_limited_to
from PIL import Image
from scipy.spatial.transform import Rotation

from MedAnomalyCLIPLib.errors import Cancelled, InvalidRequest, OutputFailed
from MedAnomalyCLIPLib.export import ResultWriter
from MedAnomalyCLIPLib.geometry import cut_plane, cut_slice
from MedAnomalyCLIPLib.result import RESEARCH_USE_ONLY, AnomalyResult, Provenance
from MedAnomalyCLIPLib.terminology import TERMINOLOGY_ENTRY
from MedAnomalyCLIPLib.volume import Volume

PROVENANCE = Provenance("a detector", "1.2.3", "ab" * 32, "0.1.0", "cpu", "float32")


def a_matrix(seed: int = 0, flip: bool = False) -> np.ndarray:
    """A rotated, anisotropic grid far from the origin; left-handed when flipped."""
    random = np.random.default_rng(seed)
    spacing = random.uniform(0.3, 5, 3) * (1, 1, -1 if flip else 1)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.random(rng=seed).as_matrix() * spacing
    matrix[:3, 3] = random.uniform(-300, 300, 3)
    return matrix


def a_volume(ijk_to_ras: np.ndarray | None = None, shape: tuple[int, ...] = (5, 6, 7)) -> Volume:
    voxels = np.random.default_rng(1).integers(0, 1000, shape).astype(np.int16)
    matrix = np.diag([-0.5, -0.8, 3.0, 1.0]) if ijk_to_ras is None else ijk_to_ras
    return Volume(voxels, matrix, modality="CT", source="a made-up volume")


def result_of(plane, threshold: float = 0.5, **fields) -> AnomalyResult:
    """A result whose map has one anomalous pixel in row 1, column 2, or the last there is."""
    anomaly = np.full(plane.shape, 0.125, dtype=np.float32)
    anomaly[min(1, plane.shape[0] - 1), min(2, plane.shape[1] - 1)] = 0.75
    return AnomalyResult(plane, 0.7, anomaly, threshold, PROVENANCE, **fields)


def write(folder, volume: Volume, indices=(2,), axis: int = 2, **options) -> dict:
    with ResultWriter(folder, volume, requested=len(indices), **options) as writer:
        for index in indices:
            writer.add(result_of(cut_slice(volume, axis, index)))
    return writer.manifest


def matrix_of(path) -> np.ndarray:
    """4x4 voxel to RAS of a file as SimpleITK reads it."""
    image = sitk.ReadImage(str(path))
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    matrix[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ matrix


def far_corner_error_mm(path, ijk_to_ras: np.ndarray, shape) -> float:
    corner = np.array([*(np.array(shape[:3][::-1]) - 1), 1])
    return max(
        np.linalg.norm((matrix_of(path) - ijk_to_ras) @ corner),
        np.linalg.norm((matrix_of(path) - ijk_to_ras)[:3, 3]),
    )


@pytest.mark.parametrize("name", ["map.nii.gz", "segmentation.seg.nrrd"])
@pytest.mark.parametrize(("seed", "flip"), [(0, False), (1, True), (2, False)])
def test_files_lie_where_the_image_lies(tmp_path, name, seed, flip):
    volume = a_volume(a_matrix(seed, flip), shape=(40, 300, 500))
    write(tmp_path / "out", volume)
    assert far_corner_error_mm(tmp_path / "out" / name, volume.ijk_to_ras, volume.voxels.shape) < 1e-3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_map_values_are_on_the_voxels_that_were_shown(tmp_path, axis):
    volume = a_volume()
    plane = cut_slice(volume, axis, 3)
    write(tmp_path / "out", volume, (3,), axis)
    anomaly = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out/map.nii.gz")))
    k, j, i = np.argwhere(anomaly == 0.75)[0]
    assert volume.ijk_to_ras @ [i, j, k, 1] == pytest.approx([*plane.to_ras(2, 1), 1])


def test_slices_not_analysed_are_zero_in_the_map(tmp_path):
    write(tmp_path / "out", a_volume(), (1, 3))
    anomaly = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out/map.nii.gz")))
    assert [bool(values.any()) for values in anomaly] == [False, True, False, True, False]


def test_segment_is_what_reaches_the_threshold(tmp_path):
    write(tmp_path / "out", a_volume(), (0, 4))
    anomaly = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out/map.nii.gz")))
    segment = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out/segmentation.seg.nrrd")))
    np.testing.assert_array_equal(segment, anomaly >= 0.5)


def test_threshold_zero_segments_only_analysed_slices(tmp_path):
    volume = a_volume()
    with ResultWriter(tmp_path / "out", volume) as writer:
        writer.add(result_of(cut_slice(volume, 2, 2), threshold=0.0))
    segment = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out/segmentation.seg.nrrd")))
    assert segment.sum(axis=(1, 2)).tolist() == [0, 0, 42, 0, 0]


def test_segment_carries_its_terminology(tmp_path):
    write(tmp_path / "out", a_volume())
    image = sitk.ReadImage(str(tmp_path / "out/segmentation.seg.nrrd"))
    assert f"TerminologyEntry:{TERMINOLOGY_ENTRY}|" in image.GetMetaData("Segment0_Tags")


def test_sheared_voxels_go_to_nrrd_which_can_hold_them(tmp_path):
    matrix = np.diag([-0.5, -0.8, 3.0, 1.0])
    matrix[1, 2] = 1.0  # a tilted gantry: slices shifted against each other
    volume = a_volume(matrix)
    manifest = write(tmp_path / "out", volume)
    assert not (tmp_path / "out/map.nii.gz").exists()
    assert far_corner_error_mm(tmp_path / "out/map.nrrd", matrix, volume.voxels.shape) < 1e-3
    assert "NIfTI" in manifest["notes"][0]


def test_oblique_plane_keeps_its_own_grid(tmp_path):
    volume = a_volume(shape=(20, 20, 20))
    tilted = np.eye(4)
    tilted[:3, :3] = Rotation.from_euler("x", 20, degrees=True).as_matrix()
    tilted[:3, 3] = volume.ijk_to_ras[:3, :3] @ [9.5, 9.5, 9.5] + volume.ijk_to_ras[:3, 3]
    plane = cut_plane(volume, tilted)
    with ResultWriter(tmp_path / "out", volume) as writer:
        writer.add(result_of(plane))
    path = tmp_path / "out/map_oblique_1.nii.gz"
    assert far_corner_error_mm(path, plane.ijk_to_ras, (1, *plane.shape)) < 1e-3
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0], result_of(plane).map)


def test_table_has_a_row_for_each_slice(tmp_path):
    volume = a_volume()
    write(tmp_path / "out", volume, (1, 2))
    with (tmp_path / "out/scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["index"], r["number"], r["view"], r["score"]) for r in rows] == [
        ("1", "2", "Axial", "0.7"),
        ("2", "3", "Axial", "0.7"),
    ]
    peak = [float(rows[0][f"peak_{axis}_mm"]) for axis in "ras"]
    assert peak == pytest.approx(cut_slice(volume, 2, 1).to_ras(2, 1))
    assert float(rows[0]["area_mm2"]) == pytest.approx(0.5 * 0.8)


def test_area_in_mm_is_left_out_when_the_pixel_size_is_unknown(tmp_path):
    volume = replace(a_volume(), spacing_known=False)
    record = write(tmp_path / "out", volume)["slices"][0]
    assert (record["area_mm2"], record["area_pixels"]) == (None, 1)


def test_manifest_tells_what_made_the_result(tmp_path):
    write(tmp_path / "out", a_volume())
    manifest = json.loads((tmp_path / "out/result.json").read_text())
    assert manifest["detector"] == {"name": "a detector", "version": "1.2.3", "sha256": "ab" * 32}
    assert (manifest["threshold"], manifest["device"], manifest["precision"]) == (0.5, "cpu", "float32")
    assert manifest["input"]["description"] == "a made-up volume"
    assert manifest["complete"] is True


def test_manifest_lists_the_files_that_are_there(tmp_path):
    manifest = write(tmp_path / "out", a_volume(), (1, 2))
    assert sorted(manifest["files"]) == sorted(p.name for p in (tmp_path / "out").iterdir())


def test_no_file_tells_where_it_was_written(tmp_path):
    write(tmp_path / "out", a_volume())
    assert not [p.name for p in (tmp_path / "out").iterdir() if str(tmp_path).encode() in p.read_bytes()]


def test_every_file_says_that_it_is_for_research(tmp_path):
    write(tmp_path / "out", a_volume())
    out = tmp_path / "out"
    assert RESEARCH_USE_ONLY in (out / "result.json").read_text()
    assert RESEARCH_USE_ONLY in (out / "scores.csv").read_text()
    assert RESEARCH_USE_ONLY.encode() in (out / "segmentation.seg.nrrd").read_bytes()
    assert Image.open(out / "overlay_K_002.png").text["Comment"] == RESEARCH_USE_ONLY
    assert RESEARCH_USE_ONLY in sitk.ReadImage(str(out / "map.nii.gz")).GetMetaData("descrip")


def test_one_voxel_is_written(tmp_path):
    manifest = write(tmp_path / "out", a_volume(shape=(1, 1, 1)), (0,))
    assert manifest["slices"][0]["area_pixels"] == 1


def test_existing_results_are_not_overwritten(tmp_path):
    write(tmp_path / "out", a_volume())
    before = (tmp_path / "out/result.json").read_bytes()
    with pytest.raises(OutputFailed, match="out exists already"):
        write(tmp_path / "out", a_volume(), (0, 1))
    assert (tmp_path / "out/result.json").read_bytes() == before


def test_overwriting_replaces_all_of_an_earlier_run(tmp_path):
    write(tmp_path / "out", a_volume(), (0, 1))
    write(tmp_path / "out", a_volume(), (4,), overwrite=True)
    assert sorted(p.name for p in (tmp_path / "out").glob("overlay*")) == ["overlay_K_004.png"]


def test_overwriting_spares_what_is_no_result(tmp_path):
    write(tmp_path / "out", a_volume())
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(OutputFailed, match=r"notes\.txt"):
        write(tmp_path / "out", a_volume(), overwrite=True)
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_nothing_is_seen_before_all_is_written(tmp_path):
    volume = a_volume()
    with ResultWriter(tmp_path / "out", volume) as writer:
        writer.add(result_of(cut_slice(volume, 2, 0)))
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out").exists()


def test_stopped_run_keeps_finished_slices_and_says_so(tmp_path):
    volume = a_volume()
    with pytest.raises(Cancelled), ResultWriter(tmp_path / "out", volume, requested=5) as writer:
        writer.add(result_of(cut_slice(volume, 2, 0)))
        writer.add(result_of(cut_slice(volume, 2, 1)))
        raise Cancelled("stopped")
    manifest = json.loads((tmp_path / "out/result.json").read_text())
    assert manifest["complete"] is False
    assert (manifest["slices_requested"], [s["index"] for s in manifest["slices"]]) == (5, [0, 1])
    anomaly = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out/map.nii.gz")))
    assert anomaly.any(axis=(1, 2)).tolist() == [True, True, False, False, False]


def test_failed_run_leaves_nothing(tmp_path):
    volume = a_volume()
    with pytest.raises(ZeroDivisionError), ResultWriter(tmp_path / "out", volume) as writer:
        writer.add(result_of(cut_slice(volume, 2, 0)))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_failed_run_spares_earlier_results(tmp_path):
    write(tmp_path / "out", a_volume())
    with (
        pytest.raises(ZeroDivisionError),
        ResultWriter(tmp_path / "out", a_volume(), overwrite=True) as writer,
    ):
        writer.add(result_of(cut_slice(a_volume(), 2, 0)))
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/overlay_K_002.png").exists()


@pytest.mark.parametrize(
    ("limit", "name"),
    [(1_000, r"overlay_K_002\.png"), (60_000, r"map\.nii\.gz")],
)
def test_full_disk_is_noticed_and_named(tmp_path, limit, name):
    volume = a_volume(shape=(3, 256, 256))
    plane = cut_slice(volume, 2, 2)
    noise = np.random.default_rng(0).random(plane.shape, dtype=np.float32)
    result = AnomalyResult(replace(plane, pixels=np.zeros(plane.shape)), 0.7, noise, 1.0, PROVENANCE)
    with (
        files_limited_to(limit),
        pytest.raises(OutputFailed, match=name),
        ResultWriter(tmp_path / "out", volume) as writer,
    ):
        writer.add(result)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_named_before_detection(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFailed, match="out could not be written"):
        ResultWriter(tmp_path / "file" / "out", a_volume())


def test_slices_along_two_axes_do_not_mix(tmp_path):
    volume = a_volume()
    with (
        pytest.raises(InvalidRequest, match="another folder"),
        ResultWriter(tmp_path / "o", volume) as writer,
    ):
        writer.add(result_of(cut_slice(volume, 2, 0)))
        writer.add(result_of(cut_slice(volume, 0, 0)))


def test_a_slice_is_written_once(tmp_path):
    volume = a_volume()
    with pytest.raises(InvalidRequest, match="twice"), ResultWriter(tmp_path / "o", volume) as writer:
        writer.add(result_of(cut_slice(volume, 2, 0)))
        writer.add(result_of(cut_slice(volume, 2, 0)))


def test_nothing_is_written_when_there_is_nothing_to_write(tmp_path):
    with ResultWriter(tmp_path / "out", a_volume()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", a_volume())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
