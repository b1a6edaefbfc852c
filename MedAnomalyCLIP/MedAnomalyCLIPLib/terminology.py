"""What a segment of ours is called: Resources/MedAnomalyCLIP.term.json in, codes, colour and name out.

The category is SNOMED CT's. No SNOMED CT type says "a program found this unusual" without claiming a lesion
or a mass, so the type has a private code, marked by the prefix 99 as DICOM PS3.16 section 8 asks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .resources import resource_path

_NO_CODE = "^^"
# Slicer names an anatomic context even when no region is given.
_ANATOMIC_CONTEXT = "Anatomic codes - DICOM master list"


@dataclass(frozen=True)
class SegmentTerms:
    """Coded meaning of a segment.

    Attributes:
        name: the type in words; also the segment's display name.
        colour: recommended display colour, RGB from 0 to 255.
        entry: Slicer's serialised terminology entry, as stored in a segment's `TerminologyEntry` tag.
    """

    name: str
    colour: tuple[int, int, int]
    entry: str


def _triplet(code: Mapping[str, str]) -> str:
    return "^".join(code[key] for key in ("CodingSchemeDesignator", "CodeValue", "CodeMeaning"))


def read_terms(path: Path) -> SegmentTerms:
    """The first category and type of a Slicer terminology file (dcmqi's segment context schema)."""
    context = json.loads(path.read_text(encoding="utf-8"))
    category = context["SegmentationCodes"]["Category"][0]
    kind = category["Type"][0]
    red, green, blue = kind["recommendedDisplayRGBValue"]
    parts = (
        context["SegmentationCategoryTypeContextName"],
        _triplet(category),
        _triplet(kind),
        _NO_CODE,
        _ANATOMIC_CONTEXT,
        _NO_CODE,
        _NO_CODE,
    )
    return SegmentTerms(name=kind["CodeMeaning"], colour=(red, green, blue), entry="~".join(parts))


TERMS = read_terms(resource_path("MedAnomalyCLIP.term.json"))
TERMINOLOGY_ENTRY = TERMS.entry
