"""Anomalies painted into normal images, to train detectors that have never seen a real one.

>>> synthesizer = AnomalySynthesizer(SynthesisConfig())
>>> sample = synthesizer(image, foreground(image), sample_generator(seed, epoch, index), support)
"""

from .cutpaste import CutPaste
from .deformation import SourceDeformation
from .foreground import foreground
from .intensity import GaussIntensityChange
from .poisson import poisson_blend
from .synthesizer import AnomalySynthesizer, SynthesisConfig, SyntheticAnomaly, sample_generator

__all__ = [
    "AnomalySynthesizer",
    "CutPaste",
    "GaussIntensityChange",
    "SourceDeformation",
    "SynthesisConfig",
    "SyntheticAnomaly",
    "foreground",
    "poisson_blend",
    "sample_generator",
]
