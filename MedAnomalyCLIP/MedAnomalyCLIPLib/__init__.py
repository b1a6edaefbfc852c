"""Anomaly detection on medical image slices with CLIP: volume in, score, heat map and mask out.

Importing this package is cheap: torch, MONAI and open_clip are loaded only when a detector is.
"""

__version__ = "0.1.0"
