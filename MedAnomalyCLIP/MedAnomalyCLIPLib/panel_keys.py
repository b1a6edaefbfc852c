"""Keys of the panel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import qt


def add_shortcut(parent: Any, keys: str, slot: Callable[[], None]) -> Any:
    """Keys that work in the whole window while a widget is visible; to be kept by the caller."""
    shortcut = qt.QShortcut(parent)
    shortcut.setKey(qt.QKeySequence(keys))
    shortcut.connect("activated()", slot)
    return shortcut
