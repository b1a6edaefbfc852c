"""Weights under the names of the published code, into a detector; every name is accounted for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..errors import BundleInvalid
from .detector import AnomalyDetector

Names = tuple[tuple[str, str], ...]

# Published name, as a pattern, and ours. MVFA's checkpoint holds two state dicts, joined here by their key.
TWO_HEADS: Names = (
    (r"seg_adapters[./](\d+)\.fc1\.0\.weight", r"adapters.\1.segmentation.down.weight"),
    (r"seg_adapters[./](\d+)\.fc2\.0\.weight", r"adapters.\1.segmentation.up.weight"),
    (r"det_adapters[./](\d+)\.fc1\.0\.weight", r"adapters.\1.detection.down.weight"),
    (r"det_adapters[./](\d+)\.fc2\.0\.weight", r"adapters.\1.detection.up.weight"),
)
NAMES: dict[str, Names] = {
    "mvfa_zero_shot": TWO_HEADS,
    "mvfa_few_shot": TWO_HEADS,
    "mvfa_few_shot_labels": TWO_HEADS,
}


def load_published(
    detector: AnomalyDetector, preset: str, weights: Mapping[str, Tensor], clip: Mapping[str, Tensor]
) -> None:
    """Put published weights in place.

    Args:
        detector: of that preset's kind; changed in place.
        preset: name of the published system.
        weights: what its checkpoint holds beside CLIP.
        clip: state dict of its CLIP, as open_clip names it; the text side is not needed.

    Raises:
        BundleInvalid: a name or shape does not fit, or a weight is missing; all of them are listed.
    """
    state = {f"tower.{key}": value for key, value in clip.items() if key.startswith("visual.")}
    state |= renamed(weights, NAMES[preset])
    expected = {
        key: value for key, value in detector.state_dict().items() if key.startswith(("tower.", "adapters."))
    }
    faults = [f"{key} is missing" for key in expected if key not in state]
    faults += [f"{key} has no place" for key in state if key not in expected]
    faults += [
        f"{key} is {tuple(value.shape)}, not {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if faults:
        raise BundleInvalid(f"The weights do not fit {preset}: {'; '.join(sorted(faults))}")
    detector.load_state_dict(state, strict=False)


def renamed(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Weights under our names.

    Raises:
        BundleInvalid: listing every name that no pattern fits.
    """
    ours = {key: _our_name(key, names) for key in weights}
    unknown = sorted(key for key, name in ours.items() if name is None)
    if unknown:
        raise BundleInvalid(f"Nothing is known of the published weights {', '.join(unknown)}")
    return {name: weights[key] for key, name in ours.items() if name is not None}


def _our_name(key: str, names: Iterable[tuple[str, str]]) -> str | None:
    for pattern, name in names:
        found = re.fullmatch(pattern, key)
        if found:
            return found.expand(name)
    return None
