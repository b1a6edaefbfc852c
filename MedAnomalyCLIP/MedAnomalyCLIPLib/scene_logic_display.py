"""The logic's part for what is shown: views, and how the maps in them look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import slicer
from slicer.i18n import tr as _

from .scene_logic import LogicBase

if TYPE_CHECKING:
    from .scene_display import MapDisplay
    from .scene_views import Node
    from .scene_volume_map import VolumeMap


class DisplayLogic(LogicBase):
    """What there is to look at, and how all maps are shown."""

    _mapDisplay: MapDisplay | None = None

    # What there is to look at

    def viewNames(self) -> tuple[str, ...]:
        """Layout names of the slice views."""
        from . import scene_views

        return scene_views.slice_view_names()

    def volumeInViews(self) -> Node | None:
        """A volume to start with: the first in a slice view's background, None if there is none."""
        from .scene_views import slice_logic

        # Not from the view's logic, which still holds the volumes of a scene that was just closed.
        shown = (
            slice_logic(name).GetSliceCompositeNode().GetBackgroundVolumeID() for name in self.viewNames()
        )
        nodes = (slicer.mrmlScene.GetNodeByID(volumeID) for volumeID in shown if volumeID)
        return next((node for node in nodes if node is not None), None)

    def describePlane(self, volumeNode: Node, viewName: str) -> str:
        """The plane of a view in words."""
        from . import scene

        text = scene.plane_in_view(volumeNode, viewName).description
        if not scene.is_shown(volumeNode, viewName):
            text += _(" (the view does not show this volume)")
        return text

    # What is shown

    def setThreshold(self, threshold: float, *, wait: bool = True) -> None:
        """Change the threshold of all maps shown, and of their segments; nothing is detected again.

        Args:
            threshold: map value from which a pixel counts.
            wait: bring all slices of volumes up to date here; else `poll` does, some at a time.
        """
        self.threshold = threshold
        self._updateMasks(wait, threshold=threshold)

    def setSmallestArea(self, area: float, *, wait: bool = True) -> None:
        """Leave parts smaller than this, in mm², out of all maps shown and of their segments; as above."""
        self.smallestArea = area
        self._updateMasks(wait, min_area_mm2=area)

    def _updateMasks(self, wait: bool, **changes: float) -> None:
        from .scene_display import shown_maps, update_slice_map

        for mapNode in shown_maps():
            volumeMap = self._jobs().map_of(mapNode)
            if volumeMap is None:
                update_slice_map(mapNode, **changes)
            else:
                self._jobs().refresh(volumeMap, wait=wait, **changes)

    def setOpacity(self, opacity: float) -> None:
        """Change the opacity of the maps in all views; other foregrounds are left alone."""
        self._display().set_opacity(opacity)

    def setColours(self, colourNode: Node | None) -> None:
        """Show maps in the colours of a colour node from now on; None for this module's own."""
        self._display().set_colours(colourNode)

    def setLegend(self, visible: bool) -> None:
        """Show or hide the colour legend of the maps."""
        self._display().set_legend(visible)

    def setVisible(self, visible: bool, opacity: float = 0.5) -> None:
        """Show or hide maps, legends and outlines, so that the bare image can be compared."""
        self._display().set_visible(visible, opacity)

    def _showAsChosen(self, volumeMap: VolumeMap | None) -> None:
        """A map that has just come into view follows the choices for all maps."""
        if volumeMap is not None and len(volumeMap.rows) == 1:
            if volumeMap.threshold is not None:
                self.threshold = volumeMap.threshold
            self._display().apply()

    def _display(self) -> MapDisplay:
        from .scene_display import MapDisplay

        if self._mapDisplay is None:
            self._mapDisplay = MapDisplay()
        return self._mapDisplay

    def showVolumeMap(self, node: Node | None, opacity: float = 0.5) -> None:
        """Show the map of a volume in the views that show that volume."""
        from .scene_navigation import views_of

        volumeMap = self._jobs().map_of(node)
        if volumeMap is not None and volumeMap.source is not None:
            volumeMap.show(views_of(volumeMap.source), opacity)
            self.setOpacity(opacity)
            self._display().apply()

    def restoreForegrounds(self) -> None:
        """Put back what the views showed before their maps."""
        from . import scene

        for viewName in self.viewNames():
            scene.restore_foreground(viewName)

    def hasOverlay(self) -> bool:
        from .scene_display import shown_maps

        return bool(shown_maps())

    def forgetResults(self) -> None:
        """For a scene that is closed: its nodes are gone, and others may get their IDs."""
        self._mapDisplay = None
        if self._volumes is not None:
            self._volumes.forget()
