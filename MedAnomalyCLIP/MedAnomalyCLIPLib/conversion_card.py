"""The model card of a bundle that was converted: from what, by what, and what nobody has measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import __version__
from .bundle import BundleManifest
from .result import RESEARCH_USE_ONLY


@dataclass(frozen=True)
class SourceFile:
    """A file that a bundle was made of.

    Attributes:
        name: without its folder.
        sha256: in hexadecimal.
    """

    name: str
    sha256: str


_CARD = """\
# {name}

Weights published by the authors of {source}, converted to a bundle by MedAnomalyCLIP {version}.

**{research}** Not a medical device, not for clinical use.

## Converted from
{files}

The last file is the CLIP that the weights stand on. All weights of the others are in this bundle, in half
precision, prompts as the text features that follow from them where no image takes part. Not needed, as in the
published code: {unused}.

## What is not known
Nothing was measured here, and no threshold was calibrated: the pixel threshold {threshold:g} is a starting
point, and there is no reference of normal images, so scores come without percentile. Measure it on your own
labelled images before you look at a single result:

    medanomalyclip evaluate DATASET --model {folder} --output REPORT

What the weights were trained on is told by their authors.

## Beside the published code
Parts and numbers are those of the preset `{system}`. With small random weights it gives the maps that the
authors' code gives; with their own weights nobody has compared the two. Three things differ. Maps and scores
are means over the taps where some authors take sums, so that they lie between 0 and 1. Images keep their
shape and are padded to a square, where the authors stretch them. And pictures of 8 bits are shown as they
are, but CT in Hounsfield units through a window of {low:g} to {high:g}, and other images from their lowest to
their highest value.
{notes}
## Terms
{licence}. CLIP's weights stand under their own.
"""


def conversion_card(
    manifest: BundleManifest,
    system: str,
    source: str,
    files: Sequence[SourceFile],
    unused: Sequence[str],
    notes: Sequence[str],
    folder: str,
) -> str:
    """Markdown text of the card.

    Args:
        manifest: what the bundle says of itself.
        system: name of the preset.
        source: paper and repository of the authors.
        files: what it was made of, the CLIP last.
        unused: names in them that have no part in it.
        notes: further sentences.
        folder: name of the bundle's folder.
    """
    window = manifest.preprocess.windows["CT"]
    return _CARD.format(
        name=manifest.name,
        source=source,
        version=__version__,
        research=RESEARCH_USE_ONLY,
        files="\n".join(f"- `{file.name}`, SHA-256 `{file.sha256}`" for file in files),
        unused=", ".join(f"`{name}`" for name in unused) or "none",
        threshold=manifest.threshold,
        folder=folder,
        system=system,
        low=window.lower,
        high=window.upper,
        notes="".join(f"\n{note}\n" for note in notes),
        licence=manifest.licence,
    )
