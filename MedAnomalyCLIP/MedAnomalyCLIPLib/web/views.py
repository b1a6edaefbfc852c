"""The three slice views, drawn here by Slicer's own libraries and sent to the page as pictures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..scene_views import slice_logic
from .application import quiet_vtk

if TYPE_CHECKING:
    from trame_server import Server
    from trame_slicer.core import SlicerApp
    from trame_slicer.views import Layout, SliceView

    from ..scene_views import Node

_LAYOUT = "slices"


class SliceViews:
    """Red, Green and Yellow, as Slicer names and orients them: axial, coronal, sagittal.

    A view fits the volume when it first learns how large it is on the page, and when another study comes.

    Attributes:
        moving: surrounds what moves the views without the reader's doing.
    """

    def __init__(self, server: Server, app: SlicerApp) -> None:
        from trame_slicer.core import LayoutManager
        from trame_slicer.rca_view import register_rca_factories

        self.moving: Callable[[], AbstractContextManager[None]] = nullcontext
        self._app = app
        register_rca_factories(app.view_manager, server, slice_view_ui_f=_add_controls)
        self._manager = LayoutManager(app.scene, app.view_manager, server)
        self._to_fit: set[str] = set()
        with quiet_vtk():  # the event has another name from VTK 9.7 on
            self._manager.register_layout(_LAYOUT, _layout())
            self._manager.set_layout(_LAYOUT)
            for view in self._views():
                view.interactor().AddObserver("WindowResizeEvent", lambda *_, v=view: self._resized(v), -1.0)
        for view in self._views():
            # Else dragging over a map would change what its colours mean.
            bars = view.get_displayable_manager_by_class("vtkMRMLScalarBarDisplayableManager")
            bars.SetAdjustForegroundWindowLevelEnabled(False)
            # Displayable managers make a view draw, but do not tell of volumes that come, or of opacity.
            composite = slice_logic(view.get_singleton_tag()).GetSliceCompositeNode()
            composite.AddObserver("ModifiedEvent", view.schedule_render)
        _let_the_mouse_change_the_window(app.app_logic.GetInteractionNode())

    def place(self, page: Any) -> None:
        """Put the views where the page is being built."""
        self._manager.initialize_layout_grid(page)

    def items(self) -> list[dict[str, str]]:
        """The views to choose from."""
        titles = {view.get_singleton_tag(): view.get_orientation() for view in self._views()}
        return [{"title": title, "value": name} for name, title in titles.items()]

    def show(self, node: Node) -> None:
        """A volume in all views, through its middle and along its voxels."""
        with self.moving():
            for view in self._views():
                view.set_background_volume_id(node.GetID())
                view.set_foreground_volume_id(None)
                view.get_view_node().RotateToVolumePlane(node)
                view.fit_view_to_content()
                self._to_fit.add(view.get_singleton_tag())

    def _views(self) -> list[SliceView]:
        return self._app.view_manager.get_slice_views()

    def _resized(self, view: SliceView) -> None:
        if view.get_singleton_tag() in self._to_fit:
            self._to_fit.discard(view.get_singleton_tag())
            with self.moving():
                view.fit_view_to_content()


def _layout() -> Layout:
    from trame_slicer.views import Layout, LayoutDirection, ViewLayoutDefinition

    axial, coronal, sagittal = (
        ViewLayoutDefinition.axial_view(),
        ViewLayoutDefinition.coronal_view(),
        ViewLayoutDefinition.sagittal_view(),
    )
    others = Layout(LayoutDirection.Vertical, [coronal, sagittal])
    return Layout(LayoutDirection.Horizontal, [axial, others], ["3", "2"])


def _add_controls(server: Server, view_id: str, view: SliceView) -> None:
    """The view's name, and a slider through its slices."""
    from trame.widgets import html
    from trame_slicer.app.logic.slice_view_logic import connect_slice_view_slider_to_state
    from trame_slicer.app.ui.slider import Slider

    html.Div(view.get_orientation(), classes="view-title")
    with html.Div(classes="view-slider"):
        Slider(
            typed_state=connect_slice_view_slider_to_state(server, view),
            theme="dark",
            density="compact",
            raw_attrs=[f'aria-label="Position of the {view.get_orientation().lower()} slice"'],
        )


def _let_the_mouse_change_the_window(interaction: Any) -> None:
    """Dragging with the left button changes the window, as in Slicer's mode Window/Level."""
    interaction.SetCurrentInteractionMode(interaction.AdjustWindowLevel)
