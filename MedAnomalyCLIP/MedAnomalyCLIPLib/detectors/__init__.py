"""Detectors: one architecture, whose parts and numbers a `DetectorSpec` names."""
