"""The model card of a bundle: what it is, what it was made from, what it reaches, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..bundle import BundleManifest, NormalReference
from ..result import RESEARCH_USE_ONLY

_INTRODUCTION = """\
# {name}, version {version}

{description}.

**{research}** Not a medical device, not for clinical or commercial use.

## Intended use
Pointing a researcher's eye at places of a slice that look unlike normal anatomy, in kinds of images like
those below. It does not name what it sees, and a low score does not mean that an image is normal.

## Out of scope
Diagnosis, screening, triage, measurement of treatment. Kinds of images that are not in the training data.

## How it was made
{how_made}

Settings:

```json
{settings}
```
"""

_NOT_MEASURED = [
    "## Measured",
    "",
    "Not yet. `medanomalyclip evaluate` measures it on labelled images of yours, beside trivial baselines.",
]

_IMAGE_THRESHOLD = """\
An image threshold is meant to be the score that 95 % of normal images do not exceed: the upper 80 %
confidence bound of that quantile, or, where the reference has fewer than 32 images, its highest score."""


def model_card(manifest: BundleManifest, how_made: str, settings: Mapping[str, Any]) -> str:
    """Markdown text of the card.

    Args:
        manifest: of the bundle.
        how_made: what was trained on what, in words.
        settings: every number of the training, for JSON.
    """
    parts = [
        _INTRODUCTION.format(
            name=manifest.name,
            version=manifest.version,
            description=manifest.description,
            research=RESEARCH_USE_ONLY,
            how_made=how_made,
            settings=json.dumps(settings, indent=2),
        ),
        _figures(manifest),
        _training_data(manifest),
    ]
    return "\n".join(parts)


def _figures(manifest: BundleManifest) -> str:
    """The measured figures, each beside the best trivial baseline; then the thresholds."""
    return "\n".join(
        [*(_table(manifest) if manifest.quality else _NOT_MEASURED), "", *_thresholds(manifest), ""]
    )


def _table(manifest: BundleManifest) -> list[str]:
    lines = [
        "## Measured on held-back test images",
        "",
        "Area under the ROC curve (AUROC), average precision (AP) and per-region overlap (PRO, up to 30 % "
        "false positives). In square brackets what is reached without any detector: for images the best of "
        "mean intensity, contrast, dark share, shape and size of the picture (direction chosen with labels, "
        "so an upper value), for pixels the best of brightness, darkness and nearness to the centre. What "
        "is not clearly above its bracket is no result. In round brackets 95 % intervals of the bootstrap "
        "over patients, where they were measured.",
        "",
        "| set | images (abnormal) | image AUROC | image AP | pixel AUROC | pixel AP | PRO |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in (manifest.quality or {}).items():
        trivial_image = _best(figures, "image auroc of ")
        cells = [
            name,
            f"{figures['images']:.0f} ({figures['abnormal']:.0f})",
            f"{_number(figures, 'image auroc')} [{trivial_image}]",
            _number(figures, "image ap"),
            f"{_number(figures, 'pixel auroc')} [{_best(figures, 'pixel auroc of ')}]",
            f"{_number(figures, 'pixel ap')} [{_best(figures, 'pixel ap of ')}]",
            f"{_number(figures, 'pixel pro')} [{_best(figures, 'pixel pro of ')}]",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _thresholds(manifest: BundleManifest) -> list[str]:
    lines = [
        f"Pixel threshold {manifest.threshold:.2f}.",
        *_reference("", manifest.image_threshold, manifest.reference),
    ]
    titles = {preset.name: preset.title for preset in manifest.detector.presets}
    for own in manifest.calibrations:
        start = f"{titles[own.preset]}: pixel threshold {own.threshold:.2f}. "
        lines += ["", *_reference(start, own.image_threshold, own.reference)]
    if manifest.reference is not None:
        lines += ["", _IMAGE_THRESHOLD]
    if manifest.unlike_threshold is not None:
        lines += [
            "",
            "An image is called unlike those of training from a distance of "
            f"{manifest.unlike_threshold:.2f}, which 1 % of the validation images reach.",
        ]
    return lines


def _reference(start: str, threshold: float | None, reference: NormalReference | None) -> list[str]:
    if reference is None or threshold is None:
        return [start] if start else []
    return [f"{start}Image threshold {threshold:.2f}; reference: {reference.description}."]


def _training_data(manifest: BundleManifest) -> str:
    lines = [
        "## Training data",
        "",
        "Terms as the sources state them; several are unstated or restricted to research, so these weights "
        f"are offered for research. Licence of the weights: {manifest.licence}.",
        "",
        "| collection | content | images | terms |",
        "|---|---|---|---|",
    ]
    for source in manifest.training_data:
        cells = (source.name, source.content, str(source.images), source.licence)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _number(figures: Mapping[str, float], name: str) -> str:
    """A figure, and its interval where there is one."""
    if name not in figures:
        return "–"
    told = f"{figures[name]:.2f}"
    if f"{name} low" in figures:
        told += f" ({figures[f'{name} low']:.2f} to {figures[f'{name} high']:.2f})"
    return told


def _best(figures: Mapping[str, float], prefix: str) -> str:
    values = [value for name, value in figures.items() if name.startswith(prefix)]
    return f"{max(values):.2f}" if values else "–"
