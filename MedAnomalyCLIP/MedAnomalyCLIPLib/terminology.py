"""What a segment of ours is called: Resources/MedAnomalyCLIP.term.json in, codes, colour and name out.

The category is SNOMED CT's. No SNOMED CT type says "a program found this unusual" without claiming a lesion
or a mass, so the type has a private code, marked by the prefix 99 as DICOM PS3.16 section 8 asks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .resources import resource_path

_NO_CODE = "^^"
# Slicer names an anatomic context even when no region is given.
_ANATOMIC_CONTEXT = "Anatomic codes - DICOM master list"


class CodedTerm(NamedTuple):
    """A coded meaning, as DICOM has it.

    Attributes:
        value: the code.
        scheme: coding scheme that it belongs to, for example "SCT".
        meaning: the same in words.
    """

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class SegmentTerms:
    """Coded meaning of a segment.

    Attributes:
        name: the type in words; also the segment's display name.
        colour: recommended display colour, RGB from 0 to 255.
        entry: Slicer's serialised terminology entry, as stored in a segment's `TerminologyEntry` tag.
        category: what kind of thing it is.
        type: what it is.
    """

    name: str
    colour: tuple[int, int, int]
    entry: str
    category: CodedTerm
    type: CodedTerm


def _term(code: Mapping[str, str]) -> CodedTerm:
    return CodedTerm(code["CodeValue"], code["CodingSchemeDesignator"], code["CodeMeaning"])


def _triplet(term: CodedTerm) -> str:
    return "^".join((term.scheme, term.value, term.meaning))


def read_terms(path: Path) -> SegmentTerms:
    """The first category and type of a Slicer terminology file (dcmqi's segment context schema)."""
    context = json.loads(path.read_text(encoding="utf-8"))
    category = context["SegmentationCodes"]["Category"][0]
    kind = category["Type"][0]
    red, green, blue = kind["recommendedDisplayRGBValue"]
    what, which = _term(category), _term(kind)
    parts = (
        context["SegmentationCategoryTypeContextName"],
        _triplet(what),
        _triplet(which),
        _NO_CODE,
        _ANATOMIC_CONTEXT,
        _NO_CODE,
        _NO_CODE,
    )
    return SegmentTerms(which.meaning, (red, green, blue), "~".join(parts), what, which)


TERMS = read_terms(resource_path("MedAnomalyCLIP.term.json"))
TERMINOLOGY_ENTRY = TERMS.entry
