"""Results as DICOM objects: valid, in the patient where the plane was, about the right patient and images."""

from __future__ import annotations

import json
import logging
import subprocess
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import highdicom
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.dataelem import DataElement
from pydicom.uid import (
    ComprehensiveSRStorage,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    MRImageStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
    generate_uid,
)

from harness.fake_detector import BrightnessDetector
from MedAnomalyCLIPLib.cli import EXIT_DONE, EXIT_USER_ERROR, main
from MedAnomalyCLIPLib.components import largest_diameter
from MedAnomalyCLIPLib.dicom import frames_on_grid
from MedAnomalyCLIPLib.dicom_output import DicomSource, measurement_report, segmentations, write_dicom_results
from MedAnomalyCLIPLib.errors import (
    Cancelled,
    DependencyMissing,
    GeometryRefused,
    InvalidRequest,
    MedAnomalyCLIPError,
    NotDicom,
    OutputFailed,
)
from MedAnomalyCLIPLib.export import ResultWriter
from MedAnomalyCLIPLib.geometry import cut_plane, cut_slice
from MedAnomalyCLIPLib.terminology import TERMS
from MedAnomalyCLIPLib.volume import Volume, read_volume
from unit.dicom_objects import (
    errors_of,
    farthest,
    identity,
    needs_validator,
    positions_in,
    positions_of,
    series_orientation,
    series_positions,
    text_items,
)
from unit.grids import grids, pixel_positions, rotations, view_through
from unit.images import AXIAL, write_dicom, write_dicom_series, write_enhanced, write_volume

TILTED = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)
CAPTURE, MAP, REPORT, SEGMENTATION = "capture", "anomaly_map.dcm", "report.dcm", "segmentation.dcm"


def spots(shape=(4, 12, 10)) -> np.ndarray:
    """(K, J, I) int16, with a bright part that is alike in no two directions, and a speck beside it."""
    voxels = np.full(shape, 20, np.int16)
    voxels[1:3, 2:7, 3:6] = 900
    voxels[1, 6, 5:8] = 850
    voxels[2, 10, 8] = 800
    return voxels


def write_series(folder: Path, voxels=None, orientation=AXIAL, spacing=(0.8, 1.2), **elements) -> Path:
    voxels = spots() if voxels is None else voxels
    normal = np.cross(orientation[:3], orientation[3:])
    positions = [[-20.0, 10.0, 30.0] + 2.5 * k * normal for k in range(len(voxels))]
    write_dicom_series(
        folder,
        voxels,
        positions,
        **{
            **identity(),
            "ImageOrientationPatient": list(orientation),
            "PixelSpacing": list(spacing),
            **elements,
        },
    )
    return folder


def write_enhanced_series(folder: Path) -> Path:
    folder.mkdir()
    positions = [[-20.0, 10.0, 30.0 + 2.5 * k] for k in (2, 0, 3, 1)]  # frames need not lie in order
    return write_enhanced(
        folder / "e.dcm", spots()[[2, 0, 3, 1]], positions, spacing=(0.8, 1.2), **identity()
    )


def write_single(folder: Path, kind, modality: str, **elements) -> Path:
    """A picture without a place in the patient."""
    folder.mkdir()
    nowhere = {"ImagePositionPatient": None, "ImageOrientationPatient": None, "FrameOfReferenceUID": None}
    pixels = elements.pop("pixels", spots()[1].astype(np.uint16))
    return write_dicom(
        folder / "p.dcm",
        pixels,
        **{**identity(), **nowhere, "SOPClassUID": kind, "Modality": modality, **elements},
    )


def write_ultrasound_clip(folder: Path) -> Path:
    frames = (spots()[1:4] / 4).astype(np.uint8)  # three frames, of which the last one is dark
    return write_single(folder, UltrasoundMultiFrameImageStorage, "US", pixels=np.stack([*frames, frames[0]]))


SOURCES = {
    "ct series": write_series,
    "tilted mr series": lambda f: write_series(
        f, orientation=TILTED, SOPClassUID=MRImageStorage, Modality="MR"
    ),
    "enhanced ct": write_enhanced_series,
    "cr": lambda f: write_single(
        f,
        ComputedRadiographyImageStorage,
        "CR",
        PixelSpacing=None,
        ImagerPixelSpacing=[0.2, 0.2],
        PatientOrientation=["L", "F"],
    ),
    "dx": lambda f: write_single(f, DigitalXRayImageStorageForPresentation, "DX"),
    "us": lambda f: write_single(
        f,
        UltrasoundImageStorage,
        "US",
        PixelSpacing=None,
        pixels=np.stack([spots()[1] / 4] * 3, axis=-1).astype(np.uint8),
    ),
    "us clip": write_ultrasound_clip,
}


def detect(volume: Volume, axis: int = 2, threshold: float | None = None) -> list:
    """Results of all slices; what is bright is anomalous."""
    bright = replace(volume, voxels=volume.voxels * (1000 / max(float(volume.voxels.max()), 1)))
    planes = [cut_slice(bright, axis, index) for index in range(volume.size[axis])]
    return [BrightnessDetector().detect(plane, threshold=threshold) for plane in planes]


def write(path: Path, folder: Path, axis: int = 2, **options) -> tuple[Volume, list, dict[str, Path]]:
    """Detect on an image and write all kinds: volume, results, files by name."""
    volume = read_volume(path)
    results = detect(volume, axis)
    folder.mkdir()
    files = write_dicom_results(results, DicomSource.of_volume(volume), folder, **options)
    return volume, results, {file.name: file for file in files}


def mask_positions(results) -> np.ndarray:
    """(N, 3) RAS mm of all pixels of all masks."""
    return np.concatenate([pixel_positions(result.plane)[result.mask] for result in results])


# Valid objects


@needs_validator
@pytest.mark.parametrize("source", SOURCES)
def test_every_object_of_every_kind_of_source_is_valid(source, tmp_path):
    _, _, files = write(SOURCES[source](tmp_path / "in"), tmp_path / "out")
    assert {"report.dcm"} < set(files)
    assert {name: errors for name, file in files.items() if (errors := errors_of(file))} == {}


@needs_validator
@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "examples_ybr_color.dcm", "ExplVR_BigEnd.dcm"]
)
def test_objects_of_real_images_are_valid(name, tmp_path):
    volume = read_volume(get_testdata_file(name))
    results = detect(volume)[:2]
    files = write_dicom_results(results, DicomSource.of_volume(volume), tmp_path)
    assert {file.name: errors for file in files if (errors := errors_of(file))} == {}


@needs_validator
@pytest.mark.parametrize("axis", [0, 1])
def test_reformatted_and_oblique_planes_are_valid_too(axis, tmp_path):
    volume, _, files = write(write_series(tmp_path / "in"), tmp_path / "out", axis)
    assert [errors for file in files.values() if (errors := errors_of(file))] == []
    view = view_through(volume.ijk_to_ras[:3, 3] + [-4, -4, 3], np.array(rotation_matrix(25)))
    (tmp_path / "oblique").mkdir()
    oblique = [BrightnessDetector().detect(cut_plane(volume, view))]
    files = write_dicom_results(oblique, DicomSource.of_volume(volume), tmp_path / "oblique")
    assert [errors for file in files if (errors := errors_of(file))] == []


def rotation_matrix(degrees: float) -> np.ndarray:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])


@needs_validator
def test_a_study_in_which_nothing_is_found_is_valid_and_its_segment_empty(tmp_path):
    _, _, files = write(write_series(tmp_path / "in", np.zeros((3, 6, 5), np.int16)), tmp_path / "out")
    assert [errors for file in files.values() if (errors := errors_of(file))] == []
    assert not dcmread(files[SEGMENTATION]).pixel_array.any()
    assert "Referenced Segmentation Frame" not in str(dcmread(files[REPORT]))


# Geometry


@st.composite
def cuts(draw):
    """A grid whose slices can be files, and a view through its middle or an axis of slices."""
    size, matrix = draw(grids())
    if draw(st.booleans()):
        return size, matrix, draw(st.integers(0, 2))
    middle = (matrix @ [*((np.array(size) - 1) / 2), 1])[:3]
    return size, matrix, view_through(middle, draw(rotations()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cuts(), st.integers(0, 99))
def test_the_segment_lies_where_the_mask_was(cut, seed):
    size, matrix, way = cut
    voxels = np.random.default_rng(seed).integers(0, 1000, size[::-1]).astype(np.int16)
    drawn = Volume(voxels, matrix)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_dicom_series(
            folder / "in",
            voxels,
            series_positions(drawn),
            **identity(),
            ImageOrientationPatient=series_orientation(drawn),
            PixelSpacing=[drawn.spacing[1], drawn.spacing[0]],
        )
        volume = read_volume(folder / "in")
        detector = BrightnessDetector()
        if isinstance(way, int):
            results = [detector.detect(cut_slice(volume, way, k)) for k in range(volume.size[way])]
        else:
            results = [detector.detect(cut_plane(volume, way), threshold=0.5)]
        files = write_dicom_results(results, DicomSource.of_volume(volume), folder, ["segmentation"])
        expected = mask_positions(results)
        found = positions_of(folder / SEGMENTATION)
    assert len(found) == len(expected)
    if len(found):
        assert farthest(found, expected) <= min(results[0].plane.spacing) / 2
        assert farthest(found, expected) <= 0.01  # numbers of 16 characters are far better than half a pixel
    assert files


@pytest.mark.parametrize("source", ["ct series", "tilted mr series", "enhanced ct"])
def test_slices_of_the_source_keep_its_pixel_matrix_and_name_its_frames(source, tmp_path):
    volume, results, files = write(SOURCES[source](tmp_path / "in"), tmp_path / "out")
    segmentation = dcmread(files[SEGMENTATION])
    assert (segmentation.Rows, segmentation.Columns) == volume.voxels.shape[1:]
    for frame, item in zip(
        segmentation.pixel_array, segmentation.PerFrameFunctionalGroupsSequence, strict=True
    ):
        (image,) = item.DerivationImageSequence[0].SourceImageSequence
        assert image.SpatialLocationsPreserved == "YES"
        stored = frame_of(volume, image)
        assert np.array_equal(frame, stored >= 0.75 * 1000)
    assert len(segmentation.pixel_array) == sum(bool(result.mask.any()) for result in results)


def frame_of(volume: Volume, image) -> np.ndarray:
    """Stored pixels of the frame that a reference names, read apart from the library."""
    for path in {frame.path for frame in volume.frames}:
        dataset = dcmread(path)
        if dataset.SOPInstanceUID == image.ReferencedSOPInstanceUID:
            number = image.get("ReferencedFrameNumber")
            return dataset.pixel_array if number is None else dataset.pixel_array[int(number) - 1]
    raise AssertionError("the reference names no image of the source")


def test_frames_of_a_clip_each_have_a_segmentation_that_names_its_frame(tmp_path):
    volume, results, files = write(SOURCES["us clip"](tmp_path / "in"), tmp_path / "out")
    for number, result in enumerate(results, start=1):
        segmentation = dcmread(files[f"segmentation_{number:03d}.dcm"])
        (image,) = (
            segmentation.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence
        )
        assert image.ReferencedFrameNumber == number
        assert np.array_equal(
            segmentation.pixel_array, volume.voxels[number - 1] >= 0.75 * volume.voxels.max()
        )
        assert segmentation.pixel_array.sum() == result.mask.sum()
        assert "FrameOfReferenceUID" not in segmentation


def test_a_picture_without_a_place_refuses_planes_across_its_frames(tmp_path):
    volume = read_volume(SOURCES["us clip"](tmp_path / "in"))
    with pytest.raises(GeometryRefused, match="no place in the patient"):
        write_dicom_results(detect(volume, axis=0), DicomSource.of_volume(volume), tmp_path)


def test_a_pixel_size_at_the_detector_is_not_taken_for_one_in_the_patient(tmp_path):
    _, _, files = write(SOURCES["cr"](tmp_path / "in"), tmp_path / "out")
    assert "PixelMeasuresSequence" not in dcmread(files[SEGMENTATION]).SharedFunctionalGroupsSequence[0]


def test_the_map_is_kept_to_a_255th(tmp_path):
    volume, results, files = write(write_series(tmp_path / "in"), tmp_path / "out")
    stored = dcmread(files[MAP])
    assert (stored.SegmentationType, stored.MaximumFractionalValue) == ("FRACTIONAL", 255)
    heights = [float(i.PlanePositionSequence[0].ImagePositionPatient[2]) for i in stored[0x52009230].value]
    maps = {round(float(r.plane.ijk_to_ras[2, 3]), 3): r.map for r in results}
    for height, frame in zip(heights, stored.pixel_array, strict=True):
        assert np.abs(frame / 255 - maps[round(height, 3)]).max() <= 0.5 / 255 + 1e-6
    assert volume.size[2] == len(heights)


# Other readers


def test_highdicom_reads_the_segmentation_as_a_volume(tmp_path):
    _, results, files = write(write_series(tmp_path / "in", orientation=TILTED), tmp_path / "out")
    read = highdicom.seg.segread(files[SEGMENTATION]).get_volume(combine_segments=True)
    indices = np.argwhere(read.array)
    points = (indices @ read.affine[:3, :3].T + read.affine[:3, 3]) * [-1, -1, 1]
    assert farthest(points, mask_positions(results)) < 0.01


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_dcmqi_reads_the_segmentation_where_the_mask_was(axis, tmp_path):
    dcmqi = pytest.importorskip("dcmqi", reason="dcmqi is missing: pip install dcmqi")
    program = Path(dcmqi.__file__).parent / "bin" / "segimage2itkimage"
    _, results, files = write(write_series(tmp_path / "in", orientation=TILTED), tmp_path / "out", axis)
    words = [program, "--inputDICOM", files[SEGMENTATION], "--outputDirectory", tmp_path, "--prefix", "q"]
    subprocess.run(words, capture_output=True, check=True)
    assert farthest(positions_in(tmp_path / "q-1.nrrd"), mask_positions(results)) < 0.01
    segment = json.loads((tmp_path / "q-meta.json").read_text())["segmentAttributes"][0][0]
    assert segment["SegmentedPropertyTypeCodeSequence"]["CodeValue"] == TERMS.type.value
    assert np.abs(np.array(segment["recommendedDisplayRGBValue"]) - TERMS.colour).max() <= 1


def test_dcmqi_reads_the_report(tmp_path):
    dcmqi = pytest.importorskip("dcmqi", reason="dcmqi is missing: pip install dcmqi")
    program = Path(dcmqi.__file__).parent / "bin" / "tid1500reader"
    _, results, files = write(write_series(tmp_path / "in"), tmp_path / "out")
    words = [program, "--inputDICOM", files[REPORT], "--outputMetadata", tmp_path / "m.json"]
    subprocess.run(words, capture_output=True, check=True)
    groups = json.loads((tmp_path / "m.json").read_text())["Measurements"]
    assert len(groups) == len(results)
    scores = sorted(float(group["measurementItems"][0]["value"]) for group in groups)
    assert scores == pytest.approx(sorted(result.score for result in results), abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_itk_places_the_map_where_it_was(axis, tmp_path):
    _, results, files = write(write_series(tmp_path / "in", orientation=TILTED), tmp_path / "out", axis)
    expected = [pixel_positions(r.plane)[np.around(r.map * 255) > 0] for r in results]
    assert farthest(positions_in(files[MAP]), np.concatenate(expected)) < 0.01


# What the objects say


def test_objects_belong_to_the_patient_and_study_and_are_new(tmp_path):
    folder = write_series(
        tmp_path / "in", PatientName="Yamada^Tarou=山田^太郎", SpecificCharacterSet="ISO_IR 192"
    )
    first = dcmread(next(folder.iterdir()))
    _, _, files = write(folder, tmp_path / "out")
    objects = [dcmread(file) for file in files.values()]
    for keyword in (
        *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate"),
        *("StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
    ):
        assert {str(item.get(keyword)) for item in objects} == {str(first[keyword].value)}, keyword
    instances = [item.SOPInstanceUID for item in objects]
    assert len(set(instances)) == len(instances)
    series = {
        item.Modality: {other.SeriesInstanceUID for other in objects if other.Modality == item.Modality}
        for item in objects
    }
    assert {kind: len(uids) for kind, uids in series.items()} == {"OT": 1, "SEG": 2, "SR": 1}
    assert first.SeriesInstanceUID not in set().union(*series.values())


def test_a_segment_says_what_it_is_and_what_made_it(tmp_path):
    _, _, files = write(write_series(tmp_path / "in"), tmp_path / "out")
    for name in (SEGMENTATION, MAP):
        dataset = dcmread(files[name])
        segment, made = dataset.SegmentSequence[0], BrightnessDetector.provenance
        category, kind = (
            segment[f"SegmentedProperty{which}CodeSequence"].value[0] for which in ("Category", "Type")
        )
        assert (category.CodeValue, category.CodingSchemeDesignator) == TERMS.category[:2]
        assert (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) == TERMS.type
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (made.bundle, made.bundle_version)
        assert f"weights_sha256={made.bundle_sha256}" in algorithm.AlgorithmParameters
        assert "Research use only" in algorithm.AlgorithmParameters
        assert "Research use only" in dataset.ContentDescription
        assert dataset.ContentQualification == "RESEARCH"
        assert segment.SegmentAlgorithmType == "AUTOMATIC"


def test_the_report_gives_each_slice_its_numbers_and_its_segment(tmp_path):
    _, results, files = write(write_series(tmp_path / "in"), tmp_path / "out")
    report, segmentation = dcmread(files[REPORT]), dcmread(files[SEGMENTATION])
    assert report.SOPClassUID == ComprehensiveSRStorage
    groups = next(
        item.ContentSequence
        for item in report.ContentSequence
        if item.ConceptNameCodeSequence[0].CodeMeaning == "Imaging Measurements"
    )
    assert len(groups) == len(results) == 4
    for group, result in zip(groups, results, strict=True):
        said = text_items(group)
        assert said["Anomaly score, 0 to 1"] == [f"{round(result.score, 6):g} 1"]
        assert said["Share of the detector's normal images that score lower"] == ["97.5 %"]
        assert said["Area"] == [f"{result.mask.sum() * 0.8 * 1.2:g} mm2"]
        longest = largest_diameter(result.mask, result.plane.ijk_to_ras[:3, :2])
        assert said.get("Largest diameter of a connected part", ["0 mm"]) == [f"{round(longest, 4):g} mm"]
        assert said["Tracking Identifier"] == [result.plane.description]
        references = [i.ReferencedSOPSequence[0] for i in group.ContentSequence if i.ValueType == "IMAGE"]
        if not result.mask.any():
            assert [r.ReferencedSOPClassUID for r in references] == ["1.2.840.10008.5.1.4.1.1.2"]
            continue
        segment, image = references
        assert segment.ReferencedSOPInstanceUID == segmentation.SOPInstanceUID
        frame = segmentation.pixel_array[segment.ReferencedFrameNumber - 1]
        assert frame.sum() == result.mask.sum()
        groups_of_frame = segmentation.PerFrameFunctionalGroupsSequence[segment.ReferencedFrameNumber - 1]
        source = groups_of_frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert image.ReferencedSOPInstanceUID == source.ReferencedSOPInstanceUID
    assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")


def test_a_report_says_where_the_detector_does_not_know_the_image(tmp_path):
    volume = read_volume(write_series(tmp_path / "in"))
    for distance, answer in ((3.0, "No"), (0.5, "Yes")):
        results = [replace(r, unlikeness=distance, unlike_threshold=1.0) for r in detect(volume)]
        source = DicomSource.of_volume(volume)
        said = text_items(measurement_report(segmentations(results, source), source))
        assert set(said["Image is like those that the detector learned from"]) == {answer}


def test_an_image_without_a_pixel_size_is_measured_in_pixels(tmp_path):
    _, results, files = write(SOURCES["us"](tmp_path / "in"), tmp_path / "out")
    said = text_items(dcmread(files[REPORT]))
    assert said["Area"] == [f"{results[0].mask.sum()} {{pixels}}"]
    assert "Largest diameter of a connected part" not in said


def test_the_capture_is_the_overlay_with_the_way_its_rows_and_columns_go(tmp_path):
    volume, results, files = write(write_series(tmp_path / "in"), tmp_path / "out", kinds=["capture"])
    from MedAnomalyCLIPLib.overlay import render_overlay

    assert sorted(files) == [f"overlay_{n:03d}.dcm" for n in (1, 2, 3, 4)]
    for number, file in enumerate(sorted(files.values())):
        capture = dcmread(file)
        assert capture.PhotometricInterpretation == "RGB"
        bright = replace(volume, voxels=volume.voxels * (1000 / float(volume.voxels.max())))
        shown = replace(results[number], plane=cut_slice(bright, 2, number))
        assert np.array_equal(capture.pixel_array, np.asarray(render_overlay(shown)))
        assert list(capture.PatientOrientation) == ["L", "P"]
        assert "Research use only" in capture.ImageComments


def brute_force_diameter(mask, steps) -> float:
    """Longest distance between corners of pixels that are connected, pair by pair."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3)))
    longest = 0.0
    for part in range(1, count + 1):
        corners = [
            steps @ (column + dx, row + dy)
            for row, column in np.argwhere(labels == part)
            for dx in (-0.5, 0.5)
            for dy in (-0.5, 0.5)
        ]
        longest = max(longest, max(float(np.linalg.norm(a - b)) for a in corners for b in corners))
    return longest


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 1000), st.floats(0.05, 0.6), st.sampled_from([(1.0, 1.0), (0.4, 2.5)]))
def test_the_largest_diameter_is_that_of_the_longest_connected_part(seed, share, spacing):
    mask = np.random.default_rng(seed).random((7, 6)) < share
    steps = np.vstack([np.diag(spacing), [0, 0]])
    assert largest_diameter(mask, steps) == pytest.approx(brute_force_diameter(mask, steps))


# Refusals


def test_an_image_that_is_not_dicom_is_refused_before_anything_is_written(tmp_path):
    volume = read_volume(write_volume(tmp_path / "v.nii.gz", spots()))
    with pytest.raises(NotDicom, match="Take the DICOM files"):
        ResultWriter(tmp_path / "out", volume, dicom=["segmentation"])
    assert [path.name for path in tmp_path.iterdir()] == ["v.nii.gz"]


@pytest.mark.parametrize(
    ("elements", "words"),
    [
        ({"StudyInstanceUID": None}, "StudyInstanceUID"),
        ({"FrameOfReferenceUID": None}, "FrameOfReferenceUID"),
        ({"SOPClassUID": "1.2.3.4"}, "standard asks"),
    ],
)
def test_a_header_that_says_too_little_is_refused_before_detection(elements, words, tmp_path):
    volume = read_volume(write_series(tmp_path / "in", **elements))
    with pytest.raises(NotDicom, match=words):
        ResultWriter(tmp_path / "out", volume, dicom=["segmentation"])


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"])
def test_an_identifier_that_is_stored_as_a_name_is_refused(keyword, tmp_path):
    folder = write_series(tmp_path / "in")
    for path in folder.iterdir():
        dataset = dcmread(path)
        tag = dataset[keyword].tag
        dataset[tag] = DataElement(tag, "PN", str(dataset[keyword].value))
        dataset.save_as(path)
    with pytest.raises(MedAnomalyCLIPError):
        ResultWriter(tmp_path / "out", read_volume(folder), dicom=["segmentation"])


def moved(matrix: np.ndarray) -> np.ndarray:
    shift = np.zeros((4, 4))
    shift[0, 3] = 0.2  # mm
    return matrix + shift


def test_files_are_found_for_a_volume_that_another_program_read_and_stacked_the_other_way(tmp_path):
    volume = read_volume(write_series(tmp_path / "in", orientation=TILTED))
    paths = sorted((tmp_path / "in").iterdir())
    assert frames_on_grid(paths, volume) == volume.frames
    reverse = volume.ijk_to_ras @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 3], [0, 0, 0, 1]])
    assert frames_on_grid(paths, replace(volume, ijk_to_ras=reverse)) == volume.frames[::-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: replace(v, voxels=v.voxels[:, 1:]), "cropped"),
        (lambda v: replace(v, ijk_to_ras=v.ijk_to_ras @ np.diag([-1.0, -1, 1, 1])), "elsewhere"),
        (lambda v: replace(v, ijk_to_ras=moved(v.ijk_to_ras)), "elsewhere"),
    ],
)
def test_a_volume_that_is_not_what_its_files_hold_is_refused(change, words, tmp_path):
    volume = read_volume(write_series(tmp_path / "in"))
    with pytest.raises(GeometryRefused, match=words):
        frames_on_grid(sorted((tmp_path / "in").iterdir()), change(volume))


def test_several_frames_in_a_kind_of_one_frame_are_refused(tmp_path):
    volume = read_volume(write_single(tmp_path / "in", UltrasoundImageStorage, "US", pixels=spots()))
    with pytest.raises(NotDicom, match="several frames"):
        DicomSource.of_volume(volume)


def test_without_highdicom_the_way_to_it_is_told(tmp_path, monkeypatch):
    import sys

    volume = read_volume(write_series(tmp_path / "in"))
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(DependencyMissing, match="pip install highdicom"):
        ResultWriter(tmp_path / "out", volume, dicom=["report"])


def test_an_unknown_kind_is_refused(tmp_path):
    volume = read_volume(write_series(tmp_path / "in"))
    with pytest.raises(InvalidRequest, match="'rtstruct'"):
        write_dicom_results(detect(volume), DicomSource.of_volume(volume), tmp_path, ["rtstruct"])


@pytest.mark.parametrize("name", ["Onlyname", "Too^Many^Parts^In^This^Name", "Ä" * 70])
def test_odd_names_of_patients_are_copied_and_not_printed(name, tmp_path, capfd, recwarn):
    folder = write_series(tmp_path / "in", PatientName=name, SpecificCharacterSet="ISO_IR 192")
    logging.getLogger("highdicom").propagate = True
    _, _, files = write(folder, tmp_path / "out")
    assert {str(dcmread(file).PatientName) for file in files.values()} == {name}
    printed = capfd.readouterr()
    assert name not in printed.out + printed.err
    assert not [w for w in recwarn if name in str(w.message)]


@needs_validator
def test_dates_of_old_headers_are_mended_or_left_out(tmp_path):
    odd = {"StudyDate": "1997.04.24", "PatientBirthDate": "unknown", "PatientSex": "W"}
    folder = write_series(tmp_path / "in", **odd, LossyImageCompression="")
    _, _, files = write(folder, tmp_path / "out")
    dataset = dcmread(files[SEGMENTATION])
    assert (dataset.StudyDate, dataset.PatientBirthDate, dataset.PatientSex) == ("19970424", "", "")
    assert errors_of(files[SEGMENTATION]) == []


# In a folder of results, and from the command line


def test_a_folder_of_results_has_them_beside_the_other_files(tmp_path):
    volume = read_volume(write_series(tmp_path / "in"))
    with ResultWriter(tmp_path / "out", volume, dicom=["segmentation", "report", "capture"]) as writer:
        for result in detect(volume):
            writer.add(result)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(writer.manifest["files"])
    captures = [f"overlay_K_{index:03d}.dcm" for index in range(4)]
    assert [n for n in names if n.endswith(".dcm")] == sorted([MAP, *captures, REPORT, SEGMENTATION])
    assert writer.manifest["dicom"] == ["capture", "report", "segmentation"]


def test_a_report_brings_its_segmentation_and_nothing_else(tmp_path):
    _, _, files = write(write_series(tmp_path / "in"), tmp_path / "out", kinds=["report"])
    assert sorted(files) == [REPORT, SEGMENTATION]


def test_a_stopped_run_says_that_its_report_is_partial(tmp_path):
    volume = read_volume(write_series(tmp_path / "in"))
    with pytest.raises(Cancelled), ResultWriter(tmp_path / "out", volume, dicom=["report"]) as writer:
        writer.add(detect(volume)[1])
        raise Cancelled("stopped")
    assert dcmread(tmp_path / "out" / REPORT).CompletionFlag == "PARTIAL"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    from pydicom import Dataset

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    volume = read_volume(write_series(tmp_path / "in"))
    monkeypatch.setattr(Dataset, "save_as", full)
    with (
        pytest.raises(OutputFailed, match=r"segmentation\.dcm"),
        ResultWriter(tmp_path / "out", volume, dicom=["segmentation"]) as writer,
    ):
        writer.add(detect(volume)[1])
    assert not (tmp_path / "out").exists()


def test_the_command_writes_them_and_goes_on_only_where_they_are(tmp_path, tiny_bundle, capsys):
    folder = write_series(tmp_path / "study")
    words = [
        "detect",
        folder,
        "--all",
        "--output",
        tmp_path / "out",
        "--model",
        tiny_bundle.folder,
        "--quiet",
    ]
    words = [*map(str, words), "--device", "cpu"]
    options = ["--dicom-seg", "--dicom-sr", "--secondary-capture"]
    assert main([*words, *options]) == EXIT_DONE
    written = {path.name for path in (tmp_path / "out" / "study").glob("*.dcm")}
    assert {SEGMENTATION, MAP, REPORT, "overlay_K_000.dcm"} <= written
    assert main([*words, *reversed(options), "--resume"]) == EXIT_DONE
    assert main([*words, "--resume"]) == EXIT_USER_ERROR
    assert "another image, detector or settings" in capsys.readouterr().err


def test_a_batch_writes_them_and_tells_which_inputs_are_no_dicom(tmp_path, tiny_bundle, capsys):
    write_series(tmp_path / "studies" / "a")
    write_volume(tmp_path / "studies" / "b.nii.gz", spots())
    words = ["batch", tmp_path / "studies", "--output", tmp_path / "out", "--model", tiny_bundle.folder]
    words = [*map(str, words), "--device", "cpu", "--quiet", "--dicom-sr"]
    assert main(words) == EXIT_USER_ERROR
    states = {r["state"]: r for r in json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]}
    assert (tmp_path / "out" / states["done"]["folder"] / REPORT).is_file()
    assert states["failed"]["error"] == "NotDicom"
    assert main([word for word in words if word != "--dicom-sr"]) == EXIT_USER_ERROR
    assert "other settings" in capsys.readouterr().err


def test_an_identifier_of_the_detector_is_the_same_each_time(tmp_path):
    volume = read_volume(write_series(tmp_path / "in", SeriesInstanceUID=generate_uid()))
    source = DicomSource.of_volume(volume)
    found = segmentations(detect(volume), source)
    one, other = (text_items(measurement_report(found, source)) for _ in range(2))
    assert one["Device Observer UID"] == other["Device Observer UID"]
    assert one["Tracking Unique Identifier"] != other["Tracking Unique Identifier"]
