"""One reader's session: what the page shows on one side, the module's logic and the scene on the other.

The page's state is plain values; `STATE` lists them. Everything here runs on the event loop's thread, which
is the scene's main thread; the detector has the logic's worker, and a task does what the panel's timer does.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MedAnomalyCLIPError, SeriesAmbiguous
from ..panel_prompt import AUTOMATIC, OWN, prompt_wanted
from ..prompt import guess_preset
from ..scene import words_of
from ..scene_logic_detection import Detection
from ..scene_logic_volumes import VolumeLogic
from ..scene_views import Node, ViewWatcher
from .detectors import DetectorList
from .display_reader import DisplayReader
from .study import Uploads, add_volume, volume_words

if TYPE_CHECKING:
    from trame_server import Server

    from ..detection import SliceDetector
    from .views import SliceViews

POLL_SECONDS = 0.015
_SETTLED_SECONDS = 0.15  # after a movement, until the plane is told in words

STATE: dict[str, Any] = {
    "busy": "",  # "reading", "slice", "range" or "export": what is on its way
    "message": "",  # what went wrong, in words for the reader
    "volume_words": "",  # about the image; empty when there is none
    "series": [],  # one line for each series of a folder that holds several
    "plane_words": "",
    "view_items": [],  # slice views to choose from, "" for the one last touched
    "view_name": "",
    "detector_items": [],
    "detector": 0,  # its number in the list
    "preset_items": [],
    "preset": AUTOMATIC,
    "normal_phrases": "",
    "abnormal_phrases": "",
    "score_words": "",
    "result_lines": [],
}


class ReaderLogic(VolumeLogic):
    """The module's logic as a page needs it."""

    def __init__(self, load: Callable[[Path | str | None, str], SliceDetector]) -> None:
        """`load` makes the detector of a folder, None for the bundled one, on a device."""
        self.detectorFactory = lambda folder="", device="auto": load(folder or None, device)

    def close(self) -> None:
        """Let go of worker and detector."""
        self.cancel()
        if self._worker is not None:
            self._worker.close()
        self._worker = None


class Reader:
    """Answers what the reader does on the page.

    Attributes:
        node: the volume node; None before there is one.
        display: how images and maps are shown.
        on_study: called when another study has taken the place of the last one.
        on_idle: called when nothing is on its way any more.
    """

    def __init__(
        self,
        server: Server,
        logic: ReaderLogic,
        views: SliceViews,
        detectors: DetectorList,
        device: str = "auto",
    ) -> None:
        self.node: Node | None = None
        self.server, self.logic, self.state = server, logic, server.state
        self.on_study: list[Callable[[], None]] = []
        self.on_idle: list[Callable[[], None]] = []
        self._views, self._detectors, self._device = views, detectors, device
        self._uploads = Uploads()
        self._chosen_path: Path | None = None
        self._opening = asyncio.Lock()
        self._polling: asyncio.Task[None] | None = None
        self._settling: asyncio.TimerHandle | None = None
        self.state.update(STATE)
        self.display = DisplayReader(self.state, logic, self.start_polling)
        self._take_detector(0)
        self.list_detectors()
        self.state.view_items = [{"title": "Last touched", "value": ""}, *views.items()]
        self._watcher = ViewWatcher(self._plane_moved)
        self._watcher.start()
        views.moving = self.moving_views
        self.state.change("view_name")(self._plane_moved)
        self.state.change("detector")(self._detector_chosen)

    def close(self) -> None:
        """Forget the study: nothing of it stays on this computer."""
        if self._polling is not None:
            self._polling.cancel()
        self._watcher.stop()
        self.logic.close()
        self._uploads.close()

    # Studies

    def begin_upload(self, count: int) -> None:
        """The browser is going to send so many files, of another study."""
        self.stop()
        with self.telling():
            self._uploads.begin(count)
            self.state.busy = "reading"

    def add_upload(self, file: dict[str, Any]) -> None:
        """One of them is there; after a failure the others are let pass."""
        if self.state.busy == "reading":
            self.state.busy = ""
            with self.telling():
                self._uploads.add(file)
                self.state.busy = "reading"

    async def end_upload(self) -> None:
        """All of them are there: read them."""
        if self.state.busy == "reading":
            self.state.busy = ""
            with self.telling():
                await self.open(self._uploads.path)

    async def open(self, path: Path, series: str | None = None) -> None:
        """Read a file or folder and show it in place of what was there."""
        async with self._opening:
            await self._open(path, series)

    async def _open(self, path: Path, series: str | None) -> None:
        from ..volume import read_volume

        self.stop()
        self._chosen_path = path
        self.state.update({"busy": "reading", "message": "", "series": []})
        self.state.flush()
        try:
            with self.telling():
                volume = await asyncio.to_thread(read_volume, path, series=series)
                self._forget_study()
                self.node = add_volume(volume)
                self.state.volume_words = volume_words(volume)
                self._views.show(self.node)
                self.display.watch(self.node)
                self._offer_presets()
                for answer in self.on_study:
                    answer()
                self._plane_moved()
        except SeriesAmbiguous as ambiguous:
            self.state.series = list(ambiguous.choices)
        finally:
            self.state.busy = ""
            self.state.flush()

    async def open_series(self, choice: str) -> None:
        """Read one series of the folder that holds several; its line starts with its identifier."""
        if self._chosen_path is not None:
            await self.open(self._chosen_path, choice.split("  ")[0])

    def _forget_study(self) -> None:
        import slicer

        self.logic.forgetResults()
        for kind in (
            "vtkMRMLVolumeNode",
            "vtkMRMLSegmentationNode",
            "vtkMRMLTableNode",
            "vtkMRMLPlotChartNode",
        ):
            for node in slicer.util.getNodesByClass(kind):
                slicer.mrmlScene.RemoveNode(node)
        self.state.update({"score_words": "", "result_lines": [], "volume_words": ""})
        self.display.expect_own_threshold()

    # Detectors

    def list_detectors(self) -> None:
        """Offer those that there are now."""
        self.state.detector_items = self._detectors.items()

    def _detector_chosen(self, detector: int, **_: Any) -> None:
        if detector != self._detector:
            with self.telling():
                self._take_detector(detector)
            self.state.detector = self._detector

    def _take_detector(self, number: int) -> None:
        """Select a detector; one that cannot be used leaves that which was."""
        self._manifest = self._detectors.read(number).manifest
        self._detector = number
        self.display.own = self._manifest.threshold
        # The slider belongs to the maps that are shown; without any, it shows what the next one starts with.
        if not self.logic.hasOverlay():
            self.display.expect_own_threshold()
        if self.node is not None:
            self._offer_presets()

    def _offer_presets(self) -> None:
        modality, words = words_of(self.node)
        presets = self._manifest.presets
        titles = {preset.name: preset.title for preset in presets}
        guess = titles.get(guess_preset(presets, modality, words), "images of any kind")
        items = {AUTOMATIC: f"Automatic ({guess})", "": "Images of any kind", **titles}
        if presets and self._manifest.text_sha256:
            items[OWN] = "Own phrases"
        self.state.preset_items = [{"title": title, "value": value} for value, title in items.items()]
        if self.state.preset not in items:
            self.state.preset = AUTOMATIC

    # Detection

    def detect(self) -> None:
        """Detect on the plane that the chosen view shows now, or stop the detection that is on its way."""
        if self.state.busy:
            self.stop("Cancelled.")
            return
        with self.telling():
            self.logic.startDetection(
                self.node,
                self.view_name,
                opacity=self.state.opacity,
                onDone=self._detected,
                **self.choice(),
            )
            self.state.update({"busy": "slice", "score_words": "Detecting…", "result_lines": []})
            self.start_polling()

    def choice(self) -> dict[str, Any]:
        """What the reader chose of a detection, as keyword arguments of the logic."""
        state = self.state
        return {
            "detector": self._detectors.folder(self._detector),
            "device": self._device,
            "threshold": state.threshold if state.threshold_chosen else None,
            "prompt": prompt_wanted(state.preset, state.normal_phrases, state.abnormal_phrases),
        }

    @property
    def view_name(self) -> str:
        """Layout name of the chosen view, or of the one last touched."""
        return self.state.view_name or self._watcher.touched

    @contextmanager
    def moving_views(self) -> Iterator[None]:
        """The program moves the views: which one the reader touched last stays."""
        touched = self._watcher.touched
        yield
        self._watcher.touched = touched

    def stop(self, words: str = "") -> None:
        """End what is on its way. Slices of a range that are done stay."""
        self.logic.cancel()
        if self.state.busy:
            self.state.update({"busy": "", "message": words})
            if self.state.score_words == "Detecting…":
                self.state.score_words = ""
            self._idle()

    def _detected(self, detection: Detection | None, error: MedAnomalyCLIPError | None) -> None:
        from ..panel_words import result_words

        if detection is None:
            self.state.update({"message": str(error), "score_words": ""})
            return
        result = detection.result
        self.state.score_words = f"Score {result.score:.2f}"
        self.state.result_lines = result_words(result).split("\n")
        self.display.follow_threshold(result.threshold)
        self.display.show_as_chosen()

    # What the reader moves

    def _plane_moved(self, *_: Any, **__: Any) -> None:
        if self._settling is not None:
            self._settling.cancel()
        self._settling = _loop().call_later(_SETTLED_SECONDS, self._tell_plane)

    def _tell_plane(self) -> None:
        if self.node is None:
            return
        with self.state:
            try:
                self.state.plane_words = self.logic.describePlane(self.node, self.view_name)
            except MedAnomalyCLIPError as error:
                self.state.plane_words = str(error)

    # In the background

    def start_polling(self) -> None:
        """Carry on what the logic has begun, until it is done."""
        if self._polling is None or self._polling.done():
            self._polling = _loop().create_task(self._poll())

    async def _poll(self) -> None:
        running = True
        while running:
            await asyncio.sleep(POLL_SECONDS)
            try:
                with self.state:
                    running = self.logic.poll()
                    if not self.logic.isRunning() and self.state.busy not in ("", "reading"):
                        self.state.busy = ""
                        self._idle()
                    elif not running:  # masks follow another threshold or smallest area
                        self._idle()
            except Exception:
                logging.getLogger(__name__).exception("The detection was stopped by a fault in the program")
                with self.state:
                    self.stop("A fault in the program stopped this; its log tells more.")

    def _idle(self) -> None:
        for answer in self.on_idle:
            answer()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """What the reader can mend is told on the page."""
        self.state.message = ""
        try:
            yield
        except SeriesAmbiguous:
            raise
        except MedAnomalyCLIPError as error:
            self.state.message = str(error)


def _loop() -> asyncio.AbstractEventLoop:
    from trame_server.utils.asynchronous import get_event_loop

    return get_event_loop()
