"""The model card of a taught detector: what it was made from, in words that name no patient."""

from __future__ import annotations

from collections.abc import Sequence

from .bundle import BundleManifest, TrainingSource
from .configuration import to_mapping
from .geometry import SlicePlane
from .neighbours import NEAR_MM, RULE, Origin
from .taught_detector import LeaveOneOut
from .training.model_card import model_card


def own_slices(planes: Sequence[SlicePlane]) -> TrainingSource:
    """The entry of the user's slices among what the detector learned from."""
    return TrainingSource("normal slices of the user's own", _content(planes), len(planes), "the user's own")


def _content(planes: Sequence[SlicePlane]) -> str:
    """What slices show, in words that name no patient: "MR, axial, pixels of 0.8 to 1 mm"."""
    modalities = sorted({plane.modality or "modality not stated" for plane in planes})
    views = sorted({plane.description.partition(" ")[0].lower() for plane in planes} - {"", "image"})
    sides = [side for plane in planes if plane.spacing_known for side in plane.spacing]
    sizes = sorted({f"{side:.2g}" for side in (min(sides), max(sides))}, key=float) if sides else []
    words = [*modalities, *views, f"pixels of {' to '.join(sizes)} mm" if sizes else ""]
    return ", ".join(word for word in words if word)


def teaching_card(
    manifest: BundleManifest,
    start: BundleManifest,
    planes: Sequence[SlicePlane],
    origins: Sequence[Origin],
    scores: Sequence[LeaveOneOut],
) -> str:
    """Markdown text of the card.

    Args:
        manifest: of the taught detector.
        start: of the detector that it started from.
        planes, origins, scores: of each slice, in one order.
    """
    numbers = {source: place for place, source in enumerate(dict.fromkeys(o.source for o in origins), 1)}
    volumes = "1 volume" if len(numbers) == 1 else f"{len(numbers)} volumes"
    lines = [
        f"Taught with {len(planes)} slices of {volumes} that its maker called normal ({_content(planes)}).",
        "Nothing was fitted: it remembers what patches of them look like, beside what it knew before.",
        "",
        f"It started from {start.name}, version {start.version}, whose card says what that learned from and",
        "how well it does.",
        "",
        f"Leave-one-out, what it says of each slice with a memory of the others. {RULE}.",
        "",
        "| volume | slice | score | pixels at or above the pixel threshold |",
        "|---|---|---|---|",
    ]
    for plane, origin, score in zip(planes, origins, scores, strict=True):
        words = plane.description.replace("|", "/") or "a slice"
        lines.append(
            f"| {numbers[origin.source]} | {words} | {score.score:.3f} | {100 * score.marked_share:.1f} % |"
        )
    lines += [
        "",
        "Scores, thresholds and reference are those of normal slices alone; how well it finds anomalies was",
        "not measured.",
    ]
    settings = {
        "memory": to_mapping(manifest.detector)["memory"],
        "slices": len(planes),
        "volumes": len(numbers),
        "near_mm": NEAR_MM,
        "start": {"name": start.name, "version": start.version, "weights_sha256": start.weights_sha256},
    }
    return model_card(manifest, "\n".join(lines), settings)
