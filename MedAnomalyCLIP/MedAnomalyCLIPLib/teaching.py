"""Teach: normal slices of one scanner and protocol in, a detector for them out.

The detector that teaching starts from gets a memory of what normal patches of these slices look like, as with
`medanomalyclip train --support`, on whose recipe and code this stands. Nothing is fitted. Slices go through
the same preprocessing as those that are detected on. Needs no more than detection does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .bundle import FORMAT, Bundle, BundleManifest, default_bundle_path
from .errors import InvalidRequest, needs_full
from .geometry import SlicePlane
from .neighbours import NEAR_MM, Origin, left_out, same_slice
from .runtime import select_device
from .steps import Step, mapped, run_steps
from .taught_detector import LeaveOneOut, TaughtDetector, checked_name

if TYPE_CHECKING:
    import torch

    from .detectors.detector import AnomalyDetector, Detection
    from .training.recipe import Recipe

LEAST_SLICES = 2
ENOUGH_SLICES = 8
"""From here on, scores of slices that were left out are spread enough to set thresholds by."""

LOAD, PREPARE, WRITE = "load", "prepare", "write"
_RECIPE = "memory"


@dataclass(frozen=True)
class TeachingProgress:
    """How far teaching has come.

    Attributes:
        stage: "load", "prepare", "compare", "choose" or "write".
        done, total: its parts.
        seconds_left: of the whole work; None until the first slice was timed.
    """

    stage: str
    done: int
    total: int
    seconds_left: float | None = None


def teach(
    planes: Sequence[SlicePlane],
    *,
    name: str,
    volumes: Sequence[Hashable] | None = None,
    start: Path | str | None = None,
    device: str = "auto",
    on_progress: Callable[[TeachingProgress], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> TaughtDetector:
    """Make a detector of normal slices, and learn how it scores each of them without having seen it.

    Args:
        planes: normal slices, cut as for detection.
        name: of the detector; shown in lists and stored, so without patients' names.
        volumes: for each plane a value that it shares with the other slices of its volume; None where all are
            of one.
        start: folder of the detector to start from; None for the one that ships with MedAnomalyCLIP.
        device: see `runtime.select_device`.
        on_progress: called after each step.
        is_cancelled: asked before each step, of a fraction of a second each.

    Raises:
        Cancelled: `is_cancelled` said so; nothing is left behind.
        InvalidRequest: the slices or the name cannot be used, the message says which and why.
        BundleInvalid, DependencyMissing: as for `SliceDetector.load`.
        OutputFailed: the detector could not be written to the temporary folder.
    """
    steps = teaching(planes, name=name, volumes=volumes, start=start, device=device)
    return run_steps(steps, on_progress, is_cancelled)


def teaching(
    planes: Sequence[SlicePlane],
    *,
    name: str,
    volumes: Sequence[Hashable] | None = None,
    start: Path | str | None = None,
    device: str = "auto",
) -> Generator[TeachingProgress, None, TaughtDetector]:
    """`teach` as a generator of its steps, for callers with other work to do between them.

    Slices and name are checked at once, all else happens in the steps.
    """
    name = checked_name(name)
    origins = origins_of(planes, volumes)
    check_slices(planes, origins)
    return _teaching(tuple(planes), origins, name, default_bundle_path() if start is None else start, device)


def _teaching(
    planes: Sequence[SlicePlane], origins: Sequence[Origin], name: str, start: Path | str, device: str
) -> Generator[TeachingProgress, None, TaughtDetector]:
    yield TeachingProgress(LOAD, 0, 1)
    try:
        import torch

        from .detectors.support import SupportSet, remembering
        from .preprocess import SlicePreprocessor
        from .teaching_card import own_slices, teaching_card
        from .training.recipe import read_recipe
        from .training.thresholds import HeldOut, with_held_out

        where = select_device(device)
        began = Bundle.load(start)
        recipe = read_recipe(_RECIPE, [f"start={json.dumps(str(began.folder))}"])
        detector = _with_memory(began, recipe, len(planes)).to(where)
        preprocessor = SlicePreprocessor(recipe.preprocess)
    except ImportError as error:
        raise needs_full("Teaching needs", error) from error
    clock = _Clock(len(planes), detector)
    prepared = []
    for plane in planes:
        prepared.append(preprocessor.prepare(plane))
        yield TeachingProgress(PREPARE, len(prepared), len(planes))
    normal = SupportSet(
        torch.stack([p.tensor for p in prepared]).to(where),
        torch.stack([p.valid for p in prepared]).to(where),
        left_out=torch.from_numpy(left_out(origins)),
    )
    found = yield from mapped(remembering(detector, normal), clock.progress)
    manifest = BundleManifest(
        format=FORMAT,
        name=name,
        version="1",
        description=f"{began.manifest.name} beside a memory of normal patches of one scanner and protocol",
        licence=began.manifest.licence,
        detector=detector.spec,
        preprocess=recipe.preprocess,
        threshold=0.5,
        training_data=(*began.manifest.training_data, own_slices(planes)),
    )
    words = f"leave-one-out scores of the {len(planes)} normal slices that it was taught with"
    manifest = with_held_out(manifest, HeldOut.of(found, normal.valid), words)
    scores = _left_one_out(manifest, found, normal.valid)
    yield clock.progress(Step(WRITE, 0, 1))
    card = teaching_card(manifest, began.manifest, planes, origins, scores)
    return TaughtDetector(manifest, detector.cpu(), card, scores)


def origins_of(planes: Sequence[SlicePlane], volumes: Sequence[Hashable] | None) -> list[Origin]:
    """Where each plane lies in its volume.

    Raises:
        InvalidRequest: there are not as many volumes as planes.
    """
    if volumes is not None and len(volumes) != len(planes):
        raise InvalidRequest(f"{len(planes)} planes and {len(volumes)} volumes; name one for each plane")
    return [Origin.of_plane(p, v) for p, v in zip(planes, volumes or [0] * len(planes), strict=True)]


def check_slices(planes: Sequence[SlicePlane], origins: Sequence[Origin]) -> None:
    """Refuse slices that no detector can be taught with.

    Raises:
        InvalidRequest: they are too few, too close together, of different kinds, or one is there twice.
    """
    if len(planes) < LEAST_SLICES:
        raise InvalidRequest(
            f"Teaching needs at least {LEAST_SLICES} different normal slices, better {ENOUGH_SLICES} or "
            f"more; there {'is' if len(planes) == 1 else 'are'} {len(planes)}"
        )
    for place, (plane, origin) in enumerate(zip(planes, origins, strict=True)):
        check_beside(plane, origin, planes[:place], origins[:place])
    alone = np.flatnonzero(left_out(origins).all(axis=1))
    if alone.size:
        words = planes[alone[0]].description or f"slice {alone[0] + 1}"
        raise InvalidRequest(
            f"{words} lies less than {NEAR_MM:g} mm from all others and cannot be compared with any; add "
            "slices that lie farther apart, or of other volumes"
        )


def check_beside(
    plane: SlicePlane, origin: Origin, others: Sequence[SlicePlane], their_origins: Sequence[Origin]
) -> None:
    """Refuse a slice that is among others already, or of another kind than they are.

    Raises:
        InvalidRequest: it is.
    """
    words = plane.description or "This slice"
    if any(same_slice(origin, other) for other in their_origins):
        raise InvalidRequest(f"{words} is among the slices already")
    if any((plane.pixels.ndim == 3) != (other.pixels.ndim == 3) for other in others):
        kind, rest = ("colour", "grey") if plane.pixels.ndim == 3 else ("grey", "colour")
        raise InvalidRequest(
            f"{words} is {kind} and the others are {rest}; teach one kind of image at a time"
        )
    known = {other.modality for other in others} - {""}
    if plane.modality and known - {plane.modality}:
        raise InvalidRequest(
            f"{words} is {plane.modality} and others are {', '.join(sorted(known))}; teach one scanner and "
            "protocol at a time"
        )


def _with_memory(began: Bundle, recipe: Recipe, slices: int) -> AnomalyDetector:
    """The detector of a bundle beside an empty memory, of no more rows than the slices have patches."""
    from .detectors.detector import AnomalyDetector
    from .detectors.support import take_over, with_fitting_memory

    if recipe.detector.feature_fusion is not None:
        raise InvalidRequest(
            f"{began.manifest.name} looks at features of another network beside the image and cannot be "
            "taught; start from another detector"
        )
    detector = AnomalyDetector(with_fitting_memory(recipe.detector, slices))
    take_over(detector, began.build())
    return detector.eval()


def _left_one_out(
    manifest: BundleManifest, found: Sequence[Detection], valid: torch.Tensor
) -> list[LeaveOneOut]:
    scores = []
    for detection, shown in zip(found, valid, strict=True):
        marked = (detection.map >= manifest.threshold)[0] & shown
        scores.append(LeaveOneOut(float(detection.score), float(marked.sum() / shown.sum().clamp(min=1))))
    return scores


class _Clock:
    """Tells how long teaching will still take, from what its first slices took.

    Writing the detector, a fraction of a second, is not counted.
    """

    def __init__(self, slices: int, detector: AnomalyDetector) -> None:
        """
        Args:
            slices: to compare.
            detector: with a memory; where it has fewer rows than the slices have patches, they are chosen.
        """
        from .detectors.support import comparison_seconds

        self._comparison = comparison_seconds(detector)
        patches, rows = math.prod(detector.tower.grid), detector.memory.rows.shape[1]
        # Each row that is chosen is compared with every patch, as two slices are with each other.
        self._choosing = self._comparison * rows / patches * slices if rows < slices * patches else 0.0
        self._began: dict[str, float] = {}
        self._now = time.perf_counter()

    def progress(self, step: Step) -> TeachingProgress:
        """A step that ends now, with the seconds that are left."""
        from .detectors.memory import CHOOSE

        began = self._began.setdefault(step.stage, self._now)  # when the step before it ended
        self._now = time.perf_counter()
        taken, rest = self._now - began, step.total - step.done
        if step.stage == WRITE:
            left = 0.0
        elif step.stage == CHOOSE:
            left = taken / step.done * rest
        else:
            pairs, all_pairs = (n * (n - 1) / 2 for n in (step.done, step.total))
            each = max(taken - pairs * self._comparison, 0.0) / step.done
            left = rest * each + (all_pairs - pairs) * self._comparison + self._choosing
        return TeachingProgress(step.stage, step.done, step.total, left)
