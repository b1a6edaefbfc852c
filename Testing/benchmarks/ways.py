"""How a detector can be run on the CPU; torch is imported by those ways alone that need it."""

from __future__ import annotations

from pathlib import Path

from MedAnomalyCLIPLib.detection import SliceDetector

WAYS = {
    "int8": {"runtime": "onnx", "precision": "int8"},
    "onnx": {"runtime": "onnx", "precision": "float32"},
    "torch": {"runtime": "torch", "precision": "float32"},
    "bfloat16": {"runtime": "torch", "precision": "bfloat16"},
}


def load(way: str, folder: Path | None = None) -> SliceDetector:
    """A detector, the bundled one if no folder is named."""
    return SliceDetector.load(folder, device="cpu", **WAYS[way])
