"""What the panel says about a result."""

from __future__ import annotations

from slicer.i18n import tr as _

from .result import AnomalyResult


def result_words(result: AnomalyResult) -> str:
    """The lines under the score: the plane, what the score is compared with, which detector said so."""
    lines = [result.plane.description]
    if result.is_empty:
        lines.append(_("Shows nothing but background: nothing was looked for"))
    elif result.is_unlike:
        lines.append(_("Unlike what this detector was made for: its score says little"))
    if result.prompt:
        lines.append(_("Compared with: {prompt}").format(prompt=result.prompt))
    if result.percentile is not None:
        # Rounded down: "100 %" would say that no normal image scores as high.
        share = _("Higher than {share} % of the detector's normal reference images")
        lines.append(share.format(share=int(result.percentile)))
    if result.image_threshold is not None:
        reached = result.score >= result.image_threshold
        words = (
            _("Reaches its image threshold, {value}") if reached else _("Below its image threshold, {value}")
        )
        lines.append(words.format(value=f"{result.image_threshold:.2f}"))
    detector = _("Detector: {name}, version {version}")
    lines.append(detector.format(name=result.provenance.bundle, version=result.provenance.bundle_version))
    lines.append(_("A candidate, not a diagnosis"))
    return "\n".join(line for line in lines if line)


def log_words(result: AnomalyResult) -> str:
    """A line for the log; the volume's name may be a patient's, and stays out of it."""
    words = _("{plane}: score {score:.2f}, {detector} {version} on {device}, {duration}")
    return words.format(
        plane=result.plane.description,
        score=result.score,
        detector=result.provenance.bundle,
        version=result.provenance.bundle_version,
        device=result.provenance.device,
        duration=duration_words(sum(result.timings.values())),
    )


def size_words(megabytes: float) -> str:
    """Room on a disk, rounded to what matters."""
    if megabytes >= 1000:
        return _("{size} GB").format(size=f"{megabytes / 1000:.1f}")
    return _("{size} MB").format(size=f"{megabytes:.0f}" if megabytes >= 1 else "<1")


def duration_words(seconds: float) -> str:
    """How long something takes, in two digits."""
    if seconds >= 0.995:
        return _("{seconds} s").format(seconds=f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}")
    return _("{milliseconds} ms").format(milliseconds=f"{float(f'{seconds * 1000:.2g}'):g}")
