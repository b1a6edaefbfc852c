"""Where a detector runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import DependencyMissing, InvalidRequest

if TYPE_CHECKING:
    import torch


def select_device(name: str = "auto") -> torch.device:
    """The device to run on.

    Args:
        name: "auto" for CUDA, else Apple's GPU, else the CPU; or a device as torch names it, e.g. "cuda:1".

    Raises:
        DependencyMissing: torch is not installed.
        InvalidRequest: the device does not exist here.
    """
    try:
        import torch
    except ImportError as error:
        raise DependencyMissing(
            "PyTorch is not installed. In Slicer, install the PyTorch extension; elsewhere: pip install torch"
        ) from error
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidRequest(f"Device {name!r} cannot be used here; choose auto, cpu, cuda or mps") from error
    return device
