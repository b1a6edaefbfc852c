"""What the fuzzer knows how to break: for each target, how a mutant is made, and how the product reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from .mutations import Rng

SECRET = "Invented^Patience"
"""A patient's name in the seeds and in the folder that mutants lie in; no message may tell it."""


class Target(ABC):
    """One thing that reads files.

    Attributes:
        name: on the command line.
        memory: bytes that a mutant may take beyond what the process has when it starts.
        seconds: that it may take.
        names_files: whether its messages tell names of files and sets with the folders that they lie in, as
            the user needs them to mend a data set.
    """

    name: str
    memory: int = 3 << 29
    seconds: float = 20.0
    names_files: bool = False

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Make what all mutants share: valid files, loaded libraries. Once in each process."""

    @abstractmethod
    def mutant(self, folder: Path, rng: Rng) -> Path:
        """Write a mutant into an empty folder; returns what to read."""

    @abstractmethod
    def look(self, path: Path, output: Path) -> None:
        """Hand it to the product, which may write below `output` and nowhere else."""


def targets() -> dict[str, Target]:
    """Every target by name."""
    from . import bundles, datasets, dicom_files, graphs, image_files, recipes, weight_files

    modules = (dicom_files, image_files, bundles, graphs, datasets, recipes, weight_files)
    return {target.name: target for module in modules for target in module.TARGETS}
