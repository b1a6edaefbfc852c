"""A run over the slices of a volume node: planes to the worker, results to the scene, one at a time.

Planes are cut and results written by the caller's thread, which has to be Slicer's main thread; each step of
it is short. The run belongs to the volume as it was at the start, wherever that is moved meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import slicer
from slicer.i18n import tr as _

from .errors import BundleInvalid, Cancelled, DependencyMissing, GeometryRefused, InvalidRequest
from .geometry import SlicePlane, acquisition_axis, cut_slice, resolve_axis, slice_count
from .result import AnomalyResult
from .scene import volume_from_node
from .scene_dicom import with_dicom_frames
from .scene_views import Node
from .scene_volume_map import VolumeMap, check_usable, empty, new_image
from .slice_stream import SliceOutcome, SliceStream
from .slice_table import SliceRow, candidates, to_pandas

if TYPE_CHECKING:
    import pandas

_FATAL = (DependencyMissing, BundleInvalid)  # the next slice would fail as this one did


@dataclass(frozen=True)
class VolumeDetection:
    """What a run over a volume left in the scene.

    Attributes:
        volumeMap: scene_volume_map.VolumeMap: the map's node, axis, rows.
        requested: indices that the run was asked for.
        failures: index of each slice that gave no result, and why.
    """

    volumeMap: VolumeMap
    requested: tuple[int, ...]
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def mapNode(self) -> Node:
        return self.volumeMap.node

    @property
    def segmentationNode(self) -> Node | None:
        return self.volumeMap.segmentation

    @property
    def tableNode(self) -> Node | None:
        return self.volumeMap.table

    @property
    def rows(self) -> list[SliceRow]:
        """What is told of each slice, in the order of slices."""
        return [self.volumeMap.rows[index] for index in sorted(self.volumeMap.rows)]

    @property
    def complete(self) -> bool:
        """Whether there is a result for each slice that was asked for."""
        return set(self.requested) <= set(self.volumeMap.rows)

    @property
    def candidates(self) -> list[int]:
        """Indices of the slices that deserve a look, see `slice_table.candidates`."""
        return candidates(self.rows, self.volumeMap.image_threshold)

    def to_pandas(self) -> pandas.DataFrame:
        """A data frame with a row for each slice, see `slice_table.to_pandas`."""
        return to_pandas(self.rows, axis=self.volumeMap.axis)


@dataclass(frozen=True)
class RunOptions:
    """Where results of a run go and how they are shown.

    Attributes:
        view_names: slice views that show the map.
        opacity: of the map there.
        colours: colour node of the map; None for our own.
        map_node, segmentation_node: nodes to write to; None for those of the volume.
    """

    view_names: tuple[str, ...] = ()
    opacity: float = 0.5
    colours: Node | None = None
    map_node: Node | None = None
    segmentation_node: Node | None = None


class VolumeRun:
    """One run, from its first slice to its last.

    Attributes:
        threshold: map value from which a pixel counts; None for the detector's own. May change meanwhile.
        min_area_mm2: smaller parts do not count. May change meanwhile.
        volumeMap: where results go; None until the first one is there.
        failures: index of each slice that gave no result, and why.
        total, done: slices of this run, and how many of them were taken.
    """

    def __init__(
        self,
        source: Node,
        submit: Callable[[SlicePlane], Future[AnomalyResult]],
        call: Callable[[Callable[[], Any]], Future[Any]],
        *,
        axis: int | str | None = None,
        indices: Iterable[int] | None = None,
        threshold: float | None = None,
        min_area_mm2: float = 0.0,
        continued: VolumeMap | None = None,
        options: RunOptions | None = None,
    ) -> None:
        """Check what is asked for, and send the first slices on their way.

        Args:
            source: scalar or colour volume node.
            submit: hands a plane to the worker.
            call: lets the worker do something else.
            axis: 0, 1 or 2 for I, J or K, or a name as for `geometry.resolve_axis`; None as acquired.
            indices: slices along that axis, from 0; None for all.
            threshold, min_area_mm2: see above.
            continued: an earlier run's map to go on with: its slices are kept and not done again.
            options: nodes and views.

        Raises:
            InvalidRequest: there is no such axis or slice, the volume is under a non-linear transform, or the
                run cannot go on with the earlier one.
            GeometryRefused: the slices of this volume have to be resampled, so they are no voxels of it.
        """
        self._source = source
        self._options = options or RunOptions()
        self.threshold = threshold
        self.min_area_mm2 = min_area_mm2
        self.volumeMap = continued
        self.failures: dict[int, str] = {}
        volume = volume_from_node(source)
        along = acquisition_axis(volume) if axis is None else axis
        self.axis: int = resolve_axis(volume, along) if isinstance(along, str) else along
        self.requested = _checked(indices, slice_count(volume, self.axis))
        # The first cut says whether slices of this volume can be used at all.
        if cut_slice(volume, self.axis, self.requested[0]).aligned is None:
            raise GeometryRefused(
                _(
                    "The voxel axes of this volume are not perpendicular, so results of its slices are no"
                    " voxels of it; detect on the planes of slice views instead"
                )
            )
        check_usable(self._options.map_node, source)
        if continued is not None:
            continued.check_grid(volume, self.axis)
            self.threshold = continued.threshold if threshold is None else threshold
            continued.show(self._options.view_names, self._options.opacity)
        wanted = [index for index in self.requested if continued is None or index not in continued.rows]
        self._volume = volume
        self._room = min(self.requested), max(self.requested)
        self._image = new_image(volume) if continued is None else None
        if self._image is not None:
            call(partial(empty, self._image))
        self._stream = SliceStream(wanted, lambda index: cut_slice(volume, self.axis, index), submit)

    @property
    def total(self) -> int:
        return self._stream.total

    @property
    def done(self) -> int:
        return self._stream.taken

    @property
    def ended(self) -> bool:
        return self._stream.ended

    @property
    def ready(self) -> bool:
        """Whether `step` returns without waiting for the worker."""
        return self._stream.ready

    @property
    def source(self) -> Node:
        return self._source

    def step(self) -> SliceOutcome:
        """Wait for the next slice and write its result.

        Raises:
            Cancelled: volume or map were deleted; what was done is kept as far as it is there.
            MedAnomalyCLIPError: no slice can be detected.
        """
        outcome = self._stream.take()
        try:
            self._check_nodes()
            if outcome.error is not None:
                self._keep_failure(outcome)
                return outcome
            result = outcome.result
            assert result is not None
            if self.volumeMap is not None:
                self.volumeMap.check_detector(result)
            if self.threshold is None:
                self.threshold = result.threshold
            result = replace(result, threshold=self.threshold, min_area_mm2=self.min_area_mm2)
            self._write(result)
            return replace(outcome, result=result)
        except BaseException:
            self._stream.cancel()
            raise

    def cancel(self) -> None:
        """Do no more slices; those that are done stay."""
        self._stream.cancel()

    def detection(self) -> VolumeDetection | None:
        """What there is so far; None before the first result."""
        if self.volumeMap is None:
            return None
        return VolumeDetection(self.volumeMap, self.requested, dict(self.failures))

    def _write(self, result: AnomalyResult) -> None:
        if self.volumeMap is None:
            options = self._options
            self.volumeMap = VolumeMap.create(
                self._source,
                self._volume,
                self.axis,
                node=options.map_node,
                segmentation=options.segmentation_node,
                colours=options.colours,
                image=self._image,
            )
            self.volumeMap.write(result, self._room)
            self.volumeMap.show(options.view_names, options.opacity)
        else:
            self.volumeMap.write(result, self._room)

    def _check_nodes(self) -> None:
        present = slicer.mrmlScene.IsNodePresent
        if not present(self._source):
            raise Cancelled(_("The volume was deleted while its slices were detected; the run was stopped."))
        if self.volumeMap is not None and not self.volumeMap.is_alive:
            raise Cancelled(_("The map was deleted while results were written to it; the run was stopped."))
        chosen = (self._options.map_node, self._options.segmentation_node)
        if any(node is not None and not present(node) for node in chosen):
            raise Cancelled(_("A node chosen for the results was deleted; the run was stopped."))

    def _keep_failure(self, outcome: SliceOutcome) -> None:
        assert outcome.error is not None
        nothing_yet = self.volumeMap is None and self._stream.taken == 1
        if isinstance(outcome.error, _FATAL) or nothing_yet:
            raise outcome.error
        self.failures[outcome.index] = str(outcome.error)


class ExportRun:
    """Writes the results of a volume as files, as the command line does: pictures are drawn by the worker.

    Attributes:
        total, done: slices to write, and how many were written.
    """

    def __init__(
        self,
        volume_map: VolumeMap,
        folder: Path | str,
        call: Callable[[Callable[[], Any]], Future[Any]],
        *,
        overwrite: bool = False,
        dicom: Collection[str] = (),
    ) -> None:
        """Claim the folder.

        Raises:
            InvalidRequest: the volume was deleted or replaced, or nothing was analysed yet.
            NotDicom, GeometryRefused: DICOM is asked for, and the volume did not come from it, or was moved.
            OutputFailed: the folder is taken, or cannot be written.
        """
        from .export import ResultWriter

        if volume_map.source is None:
            raise InvalidRequest(_("The volume of these results was deleted; pictures need it."))
        if not volume_map.rows:
            raise InvalidRequest(_("There are no results to export yet; detect first."))
        self._map = volume_map
        self._indices = sorted(volume_map.rows)
        volume = volume_from_node(volume_map.source)
        self._volume = replace(volume, ijk_to_ras=volume_map.grid, warp=None)
        volume_map.result(self._indices[0], self._volume)  # raises when they do not fit any more
        self._call = call
        if dicom:
            self._volume = with_dicom_frames(self._volume, volume_map.source)
        self._writer = ResultWriter(
            folder, self._volume, requested=volume_map.slices, overwrite=overwrite, dicom=dicom
        )
        self.total, self.done = len(self._indices), 0
        self._pending: Future[Any] | None = None
        self._finishing = self._cancelled = False

    @property
    def ready(self) -> bool:
        """Whether `step` returns without waiting for the worker."""
        return self._pending is None or self._pending.done()

    def step(self) -> bool:
        """Hand the next slice to the worker, or the end; whether there is more to do."""
        if self._pending is not None:
            try:
                self._pending.result()
            except BaseException:
                if not self._finishing:
                    self._discard()
                raise
            if self._finishing:
                return False
            self.done += 1
        if not self._map.is_alive or self._map.source is None:
            self._discard()
            raise Cancelled(_("The results were deleted while they were exported; nothing was written."))
        if self.done < self.total:
            result = self._map.result(self._indices[self.done], self._volume)
            self._pending = self._call(lambda: self._writer.add(result))
        else:
            self._finishing = True
            self._pending = self._call(lambda: self._writer.__exit__(None, None, None))
        return True

    def cancel(self) -> None:
        """Write nothing."""
        if not self._finishing and not self._cancelled:
            self._discard()

    def _discard(self) -> None:
        # After the slice that is being written; an error other than Cancelled leaves nothing behind.
        self._cancelled = True
        self._call(lambda: self._writer.__exit__(InterruptedError, InterruptedError(), None))


def _checked(indices: Iterable[int] | None, count: int) -> tuple[int, ...]:
    wanted = tuple(range(count)) if indices is None else tuple(dict.fromkeys(int(index) for index in indices))
    if not wanted:
        raise InvalidRequest(_("No slice was asked for; choose at least one."))
    for index in wanted:
        if not 0 <= index < count:
            words = _("There is no slice {index} along this axis; choose 0 to {last}.")
            raise InvalidRequest(words.format(index=index, last=count - 1))
    return wanted
