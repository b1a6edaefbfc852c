"""What is told of each slice of a volume: results in, rows out; which rows deserve a look; pandas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import DependencyMissing, GeometryRefused
from .geometry import AXES
from .result import AnomalyResult

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class SliceRow:
    """One slice in numbers.

    Attributes:
        index: position along its axis, from 0.
        score: image-level anomaly score.
        percentile: share in % of the detector's normal reference images that score lower; None without any.
        area_mm2: area of the mask.
        peak: highest map value.
        peak_ras: (3,) where that is, RAS mm; None when the map is 0 everywhere.
        window: (darkest, brightest) pixel value that the detector told apart; None for colour.
        unlikeness, unlike_threshold: as of the result.
        empty: whether it shows nothing but noise, so that nothing was looked for.
    """

    index: int
    score: float
    percentile: float | None
    area_mm2: float
    peak: float
    peak_ras: tuple[float, float, float] | None
    window: tuple[float, float] | None = None
    unlikeness: float | None = None
    unlike_threshold: float | None = None
    empty: bool = False

    @property
    def unlike(self) -> bool | None:
        """Whether the slice is unlike what the detector was made for; None when it cannot tell."""
        if self.unlikeness is None or self.unlike_threshold is None:
            return None
        return self.unlikeness > self.unlike_threshold

    @classmethod
    def of(cls, result: AnomalyResult) -> SliceRow:
        """The row of a result.

        Raises:
            GeometryRefused: the plane was resampled, so it is no slice with a number.
        """
        if result.plane.aligned is None:
            raise GeometryRefused(f"{result.plane.description} is no slice of the volume; it has no number")
        r, a, s = (round(float(x), 3) for x in result.peak_ras)
        return cls(
            index=result.plane.aligned.index,
            score=float(result.score),
            percentile=None if result.percentile is None else float(result.percentile),
            area_mm2=round(result.area_mm2, 4),
            peak=float(result.map[result.peak]),
            peak_ras=(r, a, s) if result.map.any() else None,
            window=None if result.window is None else (float(result.window[0]), float(result.window[1])),
            unlikeness=None if result.unlikeness is None else float(result.unlikeness),
            unlike_threshold=result.unlike_threshold,
            empty=result.is_empty,
        )

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> SliceRow:
        """The row that `as_record` gave, read back from JSON."""
        pairs = {key: record[key] and tuple(record[key]) for key in ("peak_ras", "window")}
        return cls(**{**record, **pairs})

    def as_record(self) -> dict[str, Any]:
        """Plain types, ready for JSON."""
        return dict(vars(self))  # asdict copies each number of each row, at each slice of a run


def candidates(rows: Sequence[SliceRow], image_threshold: float | None) -> list[int]:
    """Indices of the slices that deserve a look, in their order.

    Those whose score reaches the detector's image threshold; where it has none, or no slice reaches it, the
    local maxima of the score: slices above both neighbours, of equal ones the first.
    """
    rows = sorted(rows, key=lambda row: row.index)
    if image_threshold is not None:
        reached = [row.index for row in rows if row.score >= image_threshold]
        if reached:
            return reached
    found = []
    for at, row in enumerate(rows):
        rises = at == 0 or row.score > rows[at - 1].score
        after = next((other.score for other in rows[at + 1 :] if other.score != row.score), -1.0)
        if rises and row.score > after:
            found.append(row.index)
    return found


def to_pandas(results: Iterable[AnomalyResult | SliceRow], *, axis: int | None = None) -> pandas.DataFrame:
    """A data frame with a row for each slice.

    Args:
        results: results of aligned slices, or their rows.
        axis: 0, 1 or 2 for I, J or K, for rows, which do not know it.

    Returns:
        Columns axis, index (from 0), number (from 1, as people count), score, percentile, area_mm2, peak,
        peak_r_mm, peak_a_mm, peak_s_mm, NaN where there is no value; unlike, None where that is not known;
        empty.

    Raises:
        DependencyMissing: pandas is not installed.
        GeometryRefused: a plane was resampled.
    """
    try:
        import pandas
    except ImportError as error:
        raise DependencyMissing(
            "pandas is not installed; install it with: pip install pandas "
            "(in Slicer: slicer.util.pip_install('pandas')), or export the results as files"
        ) from error
    records = []
    for item in results:
        along = item.plane.aligned.axis if isinstance(item, AnomalyResult) and item.plane.aligned else axis
        row = SliceRow.of(item) if isinstance(item, AnomalyResult) else item
        r, a, s = row.peak_ras or (None, None, None)
        records.append(
            {
                "axis": None if along is None else AXES[along],
                "index": row.index,
                "number": row.index + 1,
                "score": row.score,
                "percentile": row.percentile,
                "area_mm2": row.area_mm2,
                "peak": row.peak,
                "peak_r_mm": r,
                "peak_a_mm": a,
                "peak_s_mm": s,
                "unlike": row.unlike,
                "empty": row.empty,
            }
        )
    columns = ("axis", "index", "number", "score", "percentile", "area_mm2", "peak")
    frame = pandas.DataFrame(
        records, columns=[*columns, "peak_r_mm", "peak_a_mm", "peak_s_mm", "unlike", "empty"]
    )
    numbers = list(frame.columns[3:-2])
    return frame.astype(dict.fromkeys(numbers, float))
