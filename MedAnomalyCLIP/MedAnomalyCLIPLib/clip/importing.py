"""Import open_clip, also beside a torchvision whose compiled operators do not load."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from ..errors import DependencyMissing

_operator_library: object | None = None  # torch drops the declarations when this object is collected


def import_open_clip() -> ModuleType:
    """Return the `open_clip` module.

    open_clip needs torchvision for image transforms written in Python, none of which we call. A torchvision
    built for another torch (a common mismatch: a CUDA build beside a CPU torch) cannot load its compiled
    operators, and then fails at import with "operator torchvision::nms does not exist", because it attaches a
    shape function to an operator that is not there. Declaring the two operators in question, without giving
    them code, lets the import finish; calling one still fails with torch's own message.

    Raises:
        DependencyMissing: open_clip, torch or torchvision is not installed, or fails for another reason.
    """
    try:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            _declare_torchvision_operators()
        return importlib.import_module("open_clip")
    except (ImportError, RuntimeError) as error:
        raise DependencyMissing(
            f"open_clip cannot be imported ({error}). Install it with: pip install open_clip_torch, "
            "next to a torch and torchvision of matching versions"
        ) from error


def _declare_torchvision_operators() -> None:
    """Declare torchvision's operators without code, and forget the failed import so that it runs again."""
    global _operator_library
    import torch

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operator_library = library
