"""Slicer's own sample images that the tutorial uses, offered in the module Sample Data under our name.

Names, files and checksums are those of Slicer's SampleData.py. Nothing is fetched until the reader clicks
one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from slicer.util import TESTING_DATA_URL

from .resources import resource_path

CATEGORY = "MedAnomalyCLIP"


@dataclass(frozen=True)
class Sample:
    """An image that Slicer publishes.

    Attributes:
        name: in Slicer, and of the node it becomes.
        file: its name on disk.
        sha256: of that file, and the end of its address.
    """

    name: str
    file: str
    sha256: str

    @property
    def url(self) -> str:
        return f"{TESTING_DATA_URL}SHA256/{self.sha256}"


SAMPLES = (
    Sample("MRHead", "MR-head.nrrd", "cc211f0dfd9a05ca3841ce1141b292898b2dd2d3f08286affadf823a7e58df93"),
    Sample(
        "MRBrainTumor1",
        "RegLib_C01_1.nrrd",
        "998cb522173839c78657f4bc0ea907cea09fd04e44601f17c82ea27927937b95",
    ),
    Sample(
        "MRBrainTumor2",
        "RegLib_C01_2.nrrd",
        "1a64f3f422eb3d1c9b093d1a18da354b13bcf307907c66317e2463ee530b7a97",
    ),
    Sample("CTChest", "CT-chest.nrrd", "4507b664690840abb6cb9af2d919377ffc4ef75b167cb6fd0f747befdb12e38e"),
)


def register_samples() -> bool:
    """Offer the samples in the module Sample Data; False in a Slicer without that module."""
    try:
        logic = importlib.import_module("SampleData").SampleDataLogic
    except ImportError:
        return False
    for sample in SAMPLES:
        logic.registerCustomSampleDataSource(
            category=CATEGORY,
            sampleName=sample.name,
            uris=sample.url,
            fileNames=sample.file,
            nodeNames=sample.name,
            thumbnailFileName=str(resource_path(f"Icons/Sample{sample.name}.png")),
            checksums=f"SHA256:{sample.sha256}",
        )
    return True
