"""Codes, names and numbers that the DICOM objects share: what made them, from what, and for what use.

An `AnomalyResult` in; keyword arguments and sequences for highdicom out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import __version__
from ..result import RESEARCH_USE_ONLY, AnomalyResult, Provenance
from ..terminology import TERMS, CodedTerm

if TYPE_CHECKING:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.sr import CodedConcept

MANUFACTURER = "MedAnomalyCLIP"
SERIES_DESCRIPTION = "{what} (AI candidate, research use only)"
SCHEME = "99MEDANOMALYCLIP"  # a private one, as PS3.16 section 8 asks

SCORE = CodedTerm("ANOMALY-SCORE", SCHEME, "Anomaly score, 0 to 1")
PERCENTILE = CodedTerm("SCORE-PERCENTILE", SCHEME, "Share of the detector's normal images that score lower")
LIKENESS = CodedTerm("LIKENESS", SCHEME, "Image is like those that the detector learned from")
LARGEST_DIAMETER = CodedTerm("LARGEST-DIAMETER", SCHEME, "Largest diameter of a connected part")
CATEGORY, TYPE = TERMS.category, TERMS.type

_LONGEST_LO = 64  # characters of a DICOM Long String


def concept(term: CodedTerm) -> CodedConcept:
    """A code as highdicom has it; DICOM allows 64 characters of meaning."""
    from highdicom.sr import CodedConcept

    return CodedConcept(term.value, term.scheme, term.meaning[:_LONGEST_LO])


def equipment(provenance: Provenance) -> dict[str, Any]:
    """What made an object: keyword arguments of any highdicom object."""
    from highdicom import ContentQualificationValues
    from highdicom.coding_schemes import CodingSchemeIdentificationItem

    scheme = CodingSchemeIdentificationItem(SCHEME, name="Codes of MedAnomalyCLIP")
    return {
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": line(provenance.bundle),
        "software_versions": line(provenance.software_version or __version__),
        "device_serial_number": line(provenance.bundle_sha256 or "unknown"),
        "content_qualification": ContentQualificationValues.RESEARCH,
        "coding_schemes": [scheme],
    }


def algorithm(result: AnomalyResult) -> AlgorithmIdentificationSequence:
    """Which detector, on which settings."""
    from highdicom import AlgorithmIdentificationSequence
    from pydicom.sr.codedict import codes

    made = result.provenance
    return AlgorithmIdentificationSequence(
        name=line(made.bundle),
        family=codes.cid7162.ArtificialIntelligence,
        version=line(made.bundle_version),
        source=MANUFACTURER,
        parameters=dict(entry.split("=", 1) for entry in parameters(result)),
    )


def parameters(result: AnomalyResult) -> tuple[str, ...]:
    """Settings as "name=value"."""
    made = result.provenance
    found = {
        "weights_sha256": made.bundle_sha256,
        "software_version": made.software_version,
        "threshold": f"{result.threshold:.6g}",
        "smallest_area_mm2": f"{result.min_area_mm2:.6g}",
        "compared_with": result.prompt.replace(",", ";"),
        "notice": RESEARCH_USE_ONLY,
    }
    return tuple(f"{name}={value}" for name, value in found.items() if value)


def line(text: str) -> str:
    """A text as a Long String may hold it: one line, 64 characters, no backslash; never empty."""
    plain = "".join(" " if character == "\\" or ord(character) < 32 else character for character in text)
    return plain.strip()[:_LONGEST_LO] or "unknown"
