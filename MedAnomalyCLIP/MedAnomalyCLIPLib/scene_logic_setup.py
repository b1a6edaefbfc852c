"""The logic's part for setting up: what is missing, installing it, devices, speed, what the network sees."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .scene_logic import LogicBase

if TYPE_CHECKING:
    from .geometry import SlicePlane
    from .panel_install import Tell
    from .preview import NetworkPicture
    from .readiness import Readiness, Speed
    from .runtime import Window
    from .scene_views import Node


class SetupLogic(LogicBase):
    """Whether and how fast a detector can run on this computer, and how to make it so."""

    installEnvironment: Any = None

    def isReady(self, detector: Path | str = "", device: str = "auto") -> Readiness:
        """Whether a detector can run: MedAnomalyCLIPLib.readiness.Readiness, true in a condition if it can.

        For the bundled detector on the CPU, the packages of the light installation suffice. Nothing is
        imported to find out, so the speed is known only if it was measured before.
        """
        from .bundle import default_bundle_path
        from .bundle_list import BundleSummary
        from .panel_packages import FULL, LIGHT, serves_light
        from .panel_setup import remembered_speed
        from .readiness import check_readiness
        from .resources import resource_path

        return check_readiness(
            resource_path(LIGHT if serves_light(detector, device) else FULL),
            lambda: BundleSummary.read(detector or default_bundle_path()),
            remembered_speed(str(detector), device),
        )

    def setupPythonRequirements(
        self,
        ask: bool = True,
        wheels: Path | str | None = None,
        tell: Tell | None = None,
        light: bool = False,
    ) -> Readiness:
        """Install the Python packages that are missing. On Slicer's main thread only.

        Args:
            ask: show what would be installed, and install nothing unless that is agreed to.
            wheels: folder of wheels to install from without network; None for the usual sources.
            tell: called with a line about each step.
            light: only what the bundled detector needs on the CPU, without PyTorch.

        Returns:
            Readiness, as `isReady`.

        Raises:
            Cancelled: declined, or Slicer has to be restarted first.
            DependencyMissing: something could not be installed; the message says what to do.
        """
        from .panel_install import Installer, SlicerEnvironment

        environment = self.installEnvironment or SlicerEnvironment(light=light)
        Installer(environment, tell).install(ask=ask, wheels=wheels)
        return self.isReady()

    def resumeSetup(self, tell: Tell | None = None) -> bool:
        """Go on with an installation that waited for a restart of Slicer; False if none did."""
        from .panel_install import Installer

        return Installer(self.installEnvironment, tell).resume()

    def warmUp(
        self, detector: Path | str = "", device: str = "auto", precision: str = "auto"
    ) -> Future[None]:
        """Load a detector on the worker before it is asked for, so that the first slice need not wait for it.

        What goes wrong is told by the future returned, and again by the first detection.
        """
        return self._workerThread().use(*self._detectorOf(detector, device, precision), lambda _loaded: None)

    def measureSpeed(
        self, detector: Path | str = "", device: str = "auto", precision: str = "auto"
    ) -> Future[Speed]:
        """Time a detector on made-up slices, on the worker: a Future of MedAnomalyCLIPLib.readiness.Speed."""
        from .readiness import measure_speed

        return self._workerThread().use(*self._detectorOf(detector, device, precision), measure_speed)

    def availableDevices(self) -> Future[tuple[str, ...]]:
        """Devices of this computer, as torch names them, asked on the worker: a Future of their names."""
        from .runtime import available_devices

        return self._workerThread().call(available_devices)

    def previewInput(
        self,
        volumeNode: Node,
        viewName: str = "",
        *,
        plane: SlicePlane | None = None,
        detector: Path | str = "",
        window: Window | str | None = None,
    ) -> Future[NetworkPicture]:
        """What a detector is shown of a plane: a Future of MedAnomalyCLIPLib.preview.NetworkPicture.

        Arguments as for `detect`.
        """
        from . import scene
        from .bundle import default_bundle_path
        from .bundle_list import BundleSummary
        from .panel_packages import require_packages
        from .preview import network_picture

        require_packages(light=True)
        spec = BundleSummary.read(detector or default_bundle_path()).manifest.preprocess
        if plane is None:
            plane = scene.plane_in_view(volumeNode, viewName)
        window = self._windowOf(volumeNode, window)
        return self._workerThread().call(lambda: network_picture(plane, spec, window))
