"""Anomalies painted into normal images: image and random generator in, image and mask out.

MediCLIP's scheme (Zhang et al., MICCAI 2024). Where this differs from its published code: pixels are floats,
so no difference wraps around; every random number comes from the generator handed in, so no epoch or worker
replays another's lesions; labels are binary; a lesion that cannot be seen is drawn again; lesions can be kept
on the body.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..configuration import from_mapping, to_mapping
from ..errors import InvalidRequest
from .cutpaste import CutPaste
from .deformation import SourceDeformation
from .intensity import GaussIntensityChange
from .tasks import INVISIBLE, Painted, Site, Task

IDENTITY = "identity"
_TASKS: dict[str, type[Any]] = {
    "cut_paste": CutPaste,
    "gauss_intensity": GaussIntensityChange,
    "source_deformation": SourceDeformation,
}

SMALLEST_IMAGE = 32
# A lesion is drawn anew when less than this share of its pixels changed.
_VISIBLE_SHARE = 0.25
_DRAWS = 12
_CORNERS_PER_DRAW = 25
# A lesion that found no place on the body is redrawn this much smaller, so that small bodies get lesions too.
_SHRINK = 0.8


@dataclass(frozen=True)
class SynthesisConfig:
    """Which lesions are painted, and how often; one value for each thing that MediCLIP leaves to choose.

    The defaults are those of MediCLIP's published code; its paper has no identity task and pastes seamlessly:
    `SynthesisConfig(identity_share=0, cut_paste=CutPaste(blend="poisson"))`.

    Attributes:
        cut_paste: see `CutPaste`; its `share`, and those of the other tasks, are relative odds.
        gauss_intensity: see `GaussIntensityChange`.
        source_deformation: see `SourceDeformation`.
        identity_share: odds of leaving the image as it is.
        second_application: probability of painting a second lesion of the same kind.
        foreground_overlap: least share of a lesion that lies on the foreground, where one is given.
    """

    cut_paste: CutPaste = field(default_factory=CutPaste)
    gauss_intensity: GaussIntensityChange = field(default_factory=GaussIntensityChange)
    source_deformation: SourceDeformation = field(default_factory=SourceDeformation)
    identity_share: float = 1.0
    second_application: float = 0.5
    foreground_overlap: float = 0.5

    def __post_init__(self) -> None:
        for name in ("second_application", "foreground_overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidRequest(f"synthesis: {name} is {getattr(self, name)}; give a number from 0 to 1")
        if not self.identity_share >= 0:
            raise InvalidRequest(f"synthesis: identity_share is {self.identity_share}; it cannot be negative")
        if not sum(self.shares.values()) > 0:
            raise InvalidRequest("synthesis: all shares are 0; give at least one task a share above 0")

    @property
    def shares(self) -> dict[str, float]:
        """Relative odds by task name, identity included."""
        return {name: getattr(self, name).share for name in _TASKS} | {IDENTITY: self.identity_share}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SynthesisConfig:
        """Configuration from parsed JSON or TOML; missing keys keep defaults, unknown ones are refused."""
        return from_mapping(cls, data, "synthesis")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts, for JSON; `from_dict` undoes it."""
        return to_mapping(self)


@dataclass(frozen=True, eq=False)
class SyntheticAnomaly:
    """A normal image with lesions painted in.

    Attributes:
        image: (H, W) float32 in [0, 1].
        mask: (H, W) bool, the painted pixels; empty for "identity".
        kind: name of the task, "identity" if the image was left as it is.
        applications: how many lesions were painted.
    """

    image: np.ndarray
    mask: np.ndarray
    kind: str
    applications: int


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Random stream of one sample in one epoch.

    Streams are independent of each other and of how samples are shared out among workers.

    Args:
        seed: of the whole run.
        epoch: from 0.
        index: of the sample in its dataset, from 0.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, index)))


class AnomalySynthesizer:
    """Paints one kind of lesion, once or twice, into a normal image.

    It holds no state but its configuration, so it can be shared among workers.
    """

    def __init__(self, config: SynthesisConfig | None = None) -> None:
        self.config = config or SynthesisConfig()
        shares = self.config.shares
        self._names = tuple(shares)
        self._odds = np.array(list(shares.values()), float) / sum(shares.values())

    def __call__(
        self,
        image: np.ndarray,
        foreground: np.ndarray | None,
        rng: np.random.Generator,
        support: Sequence[np.ndarray] = (),
    ) -> SyntheticAnomaly:
        """Paint lesions of one randomly chosen kind.

        Args:
            image: (H, W) float in [0, 1], normal; not altered.
            foreground: (H, W) bool, where lesions may lie; None for anywhere, as in the published code.
            rng: source of all randomness, see `sample_generator`.
            support: (h, w) float images in [0, 1] that CutPaste takes patches from; if empty, it
                takes them from the image itself.

        Returns:
            The image and its mask; "identity" as well when no visible lesion could be placed, as on an
            empty foreground.
        """
        kind = self._names[int(rng.choice(len(self._names), p=self._odds))]
        return self.paint(kind, image, foreground, rng, support)

    def paint(
        self,
        kind: str,
        image: np.ndarray,
        foreground: np.ndarray | None,
        rng: np.random.Generator,
        support: Sequence[np.ndarray] = (),
    ) -> SyntheticAnomaly:
        """Paint lesions of the named kind; arguments as for calling the synthesizer."""
        if kind not in self._names:
            raise InvalidRequest(f"unknown kind of lesion {kind!r}; choose one of {', '.join(self._names)}")
        image = _checked_image(image)
        if foreground is not None:
            foreground = _checked_foreground(foreground, image.shape)
        mask = np.zeros(image.shape, bool)
        applications = 0
        if kind != IDENTITY:
            task: Task = getattr(self.config, kind)
            wanted = 2 if rng.random() < self.config.second_application else 1
            for _ in range(wanted):
                lesion = self._draw_lesion(task, image, foreground, rng, support)
                if lesion is None:
                    break
                box, painted = lesion
                image[box] = painted.patch
                mask[box] |= painted.mask
                applications += 1
        return SyntheticAnomaly(image, mask, kind if applications else IDENTITY, applications)

    def _draw_lesion(
        self,
        task: Task,
        image: np.ndarray,
        foreground: np.ndarray | None,
        rng: np.random.Generator,
        support: Sequence[np.ndarray],
    ) -> tuple[tuple[slice, slice], Painted] | None:
        """One visible lesion and its box; None when none was found within a fixed number of draws."""
        shrink = 1.0
        for _ in range(_DRAWS):
            size = (task.size[0] * shrink, task.size[1] * shrink)
            shape = task.draw_shape(image.shape, size, rng)
            corner = place(shape.mask, image.shape, foreground, self.config.foreground_overlap, rng)
            if corner is None:
                shrink *= _SHRINK
                continue
            site = Site(image, shape, corner)
            painted = task.paint(site, support, rng)
            changed = np.abs(painted.patch - image[site.box])[shape.mask] > INVISIBLE
            if changed.mean() >= _VISIBLE_SHARE:
                return site.box, painted
        return None


def place(
    mask: np.ndarray,
    dims: tuple[int, ...],
    foreground: np.ndarray | None,
    overlap: float,
    rng: np.random.Generator,
) -> tuple[int, int] | None:
    """Corner for a shape's box, uniform over the image or over the places that overlap the foreground enough.

    Args:
        mask: (h, w) bool, the shape.
        dims: (rows, columns) of the image.
        foreground: (rows, columns) bool, or None for no condition.
        overlap: least share of the shape's pixels that must lie on the foreground.
        rng: source of all randomness.

    Returns:
        Row and column, or None when no place was found in a fixed number of draws.
    """
    room = np.array(dims) - mask.shape
    if foreground is None:
        row, column = rng.integers(0, room, endpoint=True)
        return int(row), int(column)
    if not foreground.any():
        return None
    # Only boxes that meet the foreground's own box can succeed; trying no others leaves the law as it is.
    ends = [np.flatnonzero(foreground.any(axis=axis))[[0, -1]] for axis in (1, 0)]
    first = np.array([max(0, end[0] - side + 1) for end, side in zip(ends, mask.shape, strict=True)])
    last = np.minimum(room, [end[1] for end in ends])
    wanted = overlap * np.count_nonzero(mask)
    for row, column in rng.integers(np.minimum(first, last), last, (_CORNERS_PER_DRAW, 2), endpoint=True):
        under = foreground[row : row + mask.shape[0], column : column + mask.shape[1]]
        if np.count_nonzero(under & mask) >= max(wanted, 1):
            return int(row), int(column)
    return None


def _checked_image(image: np.ndarray) -> np.ndarray:
    """A float32 copy to paint on."""
    image = np.asarray(image)
    if image.ndim != 2 or min(image.shape) < SMALLEST_IMAGE:
        raise InvalidRequest(
            f"an image of shape {image.shape} cannot be painted on; give one grey plane of at least "
            f"{SMALLEST_IMAGE} x {SMALLEST_IMAGE} pixels"
        )
    if not (np.issubdtype(image.dtype, np.floating) and image.min() >= 0 and image.max() <= 1):
        raise InvalidRequest(
            f"the image holds {image.dtype} values that are not all between 0 and 1; scale it to [0, 1] first"
        )
    return np.array(image, dtype=np.float32)


def _checked_foreground(foreground: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
    if foreground.shape != dims:
        raise InvalidRequest(
            f"the foreground is {foreground.shape} pixels and the image {dims}; they must be of one size"
        )
    return foreground.astype(bool, copy=False)
