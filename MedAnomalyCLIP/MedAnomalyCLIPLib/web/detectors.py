"""The detectors that a page offers: the one that it was started with, the bundled one, those in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bundle import default_bundle_path
from ..bundle_list import BundleSummary, list_bundles, titles
from ..errors import InvalidRequest


class DetectorList:
    """Detectors by number: the page is told no folder, and can name none that it was not offered."""

    def __init__(self, model: Path | None = None, folder: Path | None = None) -> None:
        """
        Args:
            model: the folder of the one to begin with, which has number 0; None for the bundled one.
            folder: holds the folders of others; None if there are none.

        Raises:
            BundleInvalid: the one to begin with cannot be used.
        """
        self._folder = None if folder is None else folder.absolute()
        self._first = [] if model is None else [BundleSummary.read(model.absolute())]
        self._known = [*(str(bundle.folder) for bundle in self._first), ""]

    def items(self) -> list[dict[str, Any]]:
        """Title and number of the detectors that there are now, as Vuetify's selectors take them."""
        own, damaged = ([], {}) if self._folder is None else list_bundles(self._folder)
        found = [*self._first, *(bundle for bundle in own if str(bundle.folder) != self._known[0])]
        offered = {bundle.folder: title for bundle, title in zip(found, titles(found), strict=True)}
        offered |= {path: f"{path.name} (cannot be used)" for path in damaged}
        named = [("", "Bundled detector"), *((str(path), title) for path, title in offered.items())]
        return [{"title": title, "value": self._number(folder)} for folder, title in named]

    def folder(self, number: Any) -> str:
        """Where a detector lies that was offered; empty for the bundled one.

        Raises:
            InvalidRequest: it was not.
        """
        if not isinstance(number, int) or not 0 <= number < len(self._known):
            raise InvalidRequest("There is no such detector")
        return self._known[number]

    def read(self, number: Any) -> BundleSummary:
        """What one says of itself.

        Raises:
            BundleInvalid: it cannot be used.
            InvalidRequest: as `folder`.
        """
        return BundleSummary.read(self.folder(number) or default_bundle_path())

    def _number(self, folder: str) -> int:
        """The same whenever they are listed."""
        if folder not in self._known:
            self._known.append(folder)
        return self._known.index(folder)
