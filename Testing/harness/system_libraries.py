"""Which of the machine's shared libraries offscreen Qt and VTK need, and which Debian package brings each."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

# Library as the loader knows it: Debian and Ubuntu package.
PACKAGES = {
    "libEGL.so.1": "libegl1",
    "libEGL_mesa.so.0": "libegl-mesa0",
    "libGL.so.1": "libgl1",
    "libX11.so.6": "libx11-6",
    "libdbus-1.so.3": "libdbus-1-3",
    "libfontconfig.so.1": "libfontconfig1",
    "libfreetype.so.6": "libfreetype6",
    "libglib-2.0.so.0": "libglib2.0-0",
    "libxkbcommon.so.0": "libxkbcommon0",
}


class SystemLibraryMissing(RuntimeError):
    """Offscreen rendering cannot start on this machine."""


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def missing_libraries(loads: Callable[[str], bool] = _loads) -> dict[str, str]:
    """Libraries that cannot be loaded, each with the package that brings it; `loads` tries one by name."""
    if not sys.platform.startswith("linux"):
        return {}
    return {library: package for library, package in PACKAGES.items() if not loads(library)}


def require_system_libraries(loads: Callable[[str], bool] = _loads) -> None:
    """Refuse in words: without this, Qt and VTK end the process with no Python error."""
    missing = missing_libraries(loads)
    if missing:
        lines = "\n".join(f"  {library}: package {package}" for library, package in missing.items())
        raise SystemLibraryMissing(
            f"The scene and module tests draw offscreen; this machine lacks libraries for it:\n{lines}\n"
            f"On Debian or Ubuntu: apt-get install {' '.join(sorted(missing.values()))}"
        )
