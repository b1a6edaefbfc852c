"""The page: what is where, in Vuetify's components. What it shows and does is in `reader`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..result import RESEARCH_USE_ONLY

if TYPE_CHECKING:
    from trame_server import Server

    from .display_reader import DisplayReader
    from .reader import Reader
    from .views import SliceViews
    from .volume_reader import VolumeReader

TITLE = "MedAnomalyCLIP"
_STYLE = """
.view-title { position: absolute; top: 4px; left: 8px; color: #fff; font-size: 0.8rem; pointer-events: none; }
.view-slider { position: absolute; bottom: 0; left: 8px; right: 8px; }
.result-line, .told { white-space: pre-line; font-size: 0.8rem; line-height: 1.3; }
.plot svg { position: absolute; width: 100%; height: 100%; border-bottom: 1px solid #888; overflow: visible; }
.plot polyline { fill: none; stroke: #0072b2; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.plot .limit { stroke: #d55e00; stroke-dasharray: 4; vector-effect: non-scaling-stroke; }
.plot .point { position: absolute; width: 9px; height: 9px; margin: -4px; border-radius: 5px;
  background: #0072b2; cursor: pointer; }
.plot .current { outline: 3px solid #f0e442; }
html { overflow: hidden; }
"""


def build_page(server: Server, reader: Reader, volumes: VolumeReader, views: SliceViews) -> None:
    """Put the page together."""
    from trame.widgets import client, html
    from trame_vuetify.ui.vuetify3 import VAppLayout
    from trame_vuetify.widgets import vuetify3 as v

    from .volume_reader import RESULTS

    server.state.trame__title = TITLE
    with VAppLayout(server, full_height=True) as page:
        client.Style(_STYLE)
        with v.VAppBar(density="compact", flat=True, border=True):
            v.VAppBarTitle(TITLE)
            v.VChip(RESEARCH_USE_ONLY, color="warning", size="small", classes="mr-4 research-use")
        with v.VNavigationDrawer(permanent=True, width=340):
            _study(reader)
            _detection(reader)
            _display(reader.display)
            _range(volumes)
        with v.VMain(), v.VSheet(classes="d-flex flex-column fill-height", color="black"):
            with html.Div(classes="d-flex", style="flex: 1 1 0; min-height: 0"):
                views.place(page)
            _outputs(volumes)
        fetch = client.JSEval(
            exec=f"utils.download('{RESULTS}.zip', trigger('{server.trigger_name(volumes.fetch_export)}'),"
            " 'application/zip')"
        )
        volumes.deliver = fetch.exec


def _study(reader: Reader) -> None:
    from trame.widgets import html
    from trame_vuetify.widgets import vuetify3 as v

    with _section("Study"):
        with html.Div(classes="d-flex align-center"):
            _upload(reader, "mdi-file-upload", "Open a file")
            _upload(
                reader, "mdi-folder-upload", "Open a folder of DICOM files", raw_attrs=["webkitdirectory"]
            )
            html.Div(
                "{{ volume_words || 'Open a file, or a folder of DICOM files' }}", classes="told volume-words"
            )
        v.VSelect(
            v_if=("series.length",),
            label="The folder holds several series",
            items=("series",),
            update_modelValue=(reader.open_series, "[$event]"),
            **_dense("series"),
        )
        v.VProgressLinear(v_if=("busy === 'reading'",), indeterminate=True)
        v.VAlert(
            "{{ message }}",
            v_if=("message",),
            type="warning",
            density="compact",
            classes="told message",
        )


def _upload(reader: Reader, icon: str, title: str, **options: Any) -> None:
    """A button that sends files from the browser's computer, one after the other."""
    from trame_vuetify.widgets import vuetify3 as v

    begin, add, end = map(
        reader.server.trigger_name, (reader.begin_upload, reader.add_upload, reader.end_upload)
    )
    v.VFileInput(
        change=(
            "Array.from($event.target.files).reduce("
            f"(sent, file) => sent.then(() => trigger('{add}', [file])),"
            f" trigger('{begin}', [$event.target.files.length])).then(() => trigger('{end}'))"
        ),
        hide_input=True,
        prepend_icon=icon,
        title=title,
        disabled=("busy === 'reading'",),
        classes="flex-grow-0 mr-2 upload",
        **options,
    )


def _detection(reader: Reader) -> None:
    from trame.widgets import html
    from trame_vuetify.widgets import vuetify3 as v

    with _section("Detect"):
        v.VSelect(
            v_if=("detector_items.length > 1",),
            label="Detector",
            items=("detector_items",),
            v_model=("detector",),
            update_menu=(reader.list_detectors, "[]"),
            **_dense("detector"),
        )
        v.VSelect(label="Slice view", items=("view_items",), v_model=("view_name",), **_dense())
        html.Div("{{ plane_words }}", classes="told mb-2 plane-words")
        v.VSelect(
            v_if=("preset_items.length",),
            label="Compared with",
            items=("preset_items",),
            v_model=("preset",),
            **_dense(),
        )
        for name in ("normal", "abnormal"):
            v.VTextField(
                v_if=("preset === 'own'",),
                label=f"{name.capitalize()}, divided by semicolons",
                v_model=(f"{name}_phrases",),
                **_dense(),
            )
        v.VBtn(
            "{{ busy === 'slice' ? 'Cancel' : 'Detect' }}",
            click=reader.detect,
            disabled=("!volume_words || !['', 'slice'].includes(busy)",),
            color="primary",
            block=True,
            classes="detect-button my-2",
        )
        v.VProgressLinear(v_if=("busy === 'slice'",), indeterminate=True)
        html.Div("{{ score_words }}", classes="text-h6 score-words")
        html.Div("{{ line }}", v_for="line in result_lines", classes="result-line")


def _display(display: DisplayReader) -> None:
    from trame.widgets import html
    from trame_vuetify.widgets import vuetify3 as v

    with _section("Display"):
        with html.Div(classes="d-flex align-center"):
            _slider("threshold", "Threshold")
            v.VBtn("Reset", click=display.take_own_threshold, disabled=("!threshold_chosen",), **_small())
        with html.Div(classes="d-flex align-center"):
            _slider("opacity", "Opacity")
            v.VSwitch(v_model=("overlay_visible",), label="Overlay", hide_details=True, density="compact")
        with html.Div(classes="d-flex align-center"):
            _slider("smallest_area", "Smallest area, mm²", most=500, step=1)
        v.VSelect(
            label="Colours",
            items=("colour_items",),
            v_model=("colours",),
            **_dense("colours"),
        )
        with html.Div(classes="d-flex align-center"):
            v.VRangeSlider(
                v_model=("window",),
                min=("window_limits[0]",),
                max=("window_limits[1]",),
                step=("(window_limits[1] - window_limits[0]) / 500",),
                label="Window",
                strict=True,
                disabled=("!volume_words",),
                hide_details=True,
                classes="window",
            )
            v.VBtn("Auto", click=display.auto_window, disabled=("!volume_words",), **_small())


def _range(volumes: VolumeReader) -> None:
    from trame.widgets import html
    from trame_vuetify.widgets import vuetify3 as v

    with _section("Whole volume"):
        v.VSelect(label="Direction", items=("axis_items",), v_model=("axis",), **_dense())
        v.VRangeSlider(
            v_model=("slice_range",),
            min=1,
            max=("slice_limit",),
            step=1,
            label="Slices",
            strict=True,
            thumb_label="always",
            disabled=("!volume_words || !!busy",),
            hide_details=True,
            classes="slice-range mt-6",
        )
        v.VCheckbox(
            v_model=("resume",), label="Go on with an earlier run", hide_details=True, density="compact"
        )
        v.VBtn(
            "{{ busy === 'range' ? 'Cancel' : 'Detect range' }}",
            click=volumes.detect_range,
            disabled=("!volume_words || !['', 'range'].includes(busy)",),
            color="primary",
            variant="tonal",
            block=True,
            classes="range-button my-2",
        )
        with html.Div(v_if=("['range', 'export'].includes(busy)",), classes="progress"):
            v.VProgressLinear(model_value=("100 * done / Math.max(total, 1)",), height=8)
            html.Div("{{ done }} of {{ total }} slices", classes="told progress-words")


def _outputs(volumes: VolumeReader) -> None:
    """Under the views: the table of slices, and their scores along the volume."""
    from trame.widgets import html
    from trame_vuetify.widgets import vuetify3 as v

    with v.VSheet(v_if=("rows.length",), classes="d-flex outputs", height=210):
        with html.Div(style="width: 415px; overflow-y: auto"), v.VTable(density="compact", fixed_header=True):
            with html.Thead(), html.Tr():
                for title in ("Slice", "Score", "Percentile", "Area mm²", "Remark"):
                    html.Th(title)
            with (
                html.Tbody(),
                html.Tr(
                    v_for="row in rows",
                    key="row.number",
                    click=(volumes.jump, "[row.number]"),
                    classes=("{ 'bg-blue-lighten-4': row.number === current_slice }",),
                    style="cursor: pointer",
                    raw_attrs=[':data-slice="row.number"'],
                ),
            ):
                for key in ("number", "score", "percentile", "area", "remark"):
                    html.Td(f"{{{{ row.{key} }}}}")
        with html.Div(classes="d-flex flex-column pa-2", style="flex: 1; min-width: 0"):
            with html.Div(classes="d-flex align-center"):
                html.Div("Score by slice", classes="text-caption text-truncate flex-grow-1")
                for step, title in ((-1, "Previous"), (1, "Next")):
                    v.VBtn(
                        f"{title} candidate",
                        click=(volumes.next_candidate, f"[{step}]"),
                        disabled=("!candidates.length",),
                        **_small(),
                    )
                v.VBtn(
                    "{{ busy === 'export' ? 'Cancel' : 'Export…' }}",
                    click=volumes.export,
                    disabled=("!['', 'export'].includes(busy)",),
                    **{**_small(), "classes": "ml-2 export-button"},
                )
            # Points are drawn by HTML: a stretched drawing would make ellipses of circles.
            with html.Div(classes="plot", style="position: relative; flex: 1; margin: 8px 12px"):
                html.Svg(
                    '<line v-if="plot_limit >= 0" class="limit" x1="0" x2="100" :y1="plot_limit"'
                    ' :y2="plot_limit" />'
                    '<polyline :points="plot_line" />',
                    raw_attrs=['viewBox="0 0 100 100"', 'preserveAspectRatio="none"'],
                )
                html.Div(
                    v_for="row in rows",
                    key="row.number",
                    click=(volumes.jump, "[row.number]"),
                    classes=("{ point: true, current: row.number === current_slice }",),
                    style=("{ left: row.x + '%', top: row.y + '%' }",),
                    raw_attrs=[':title="`Slice ${row.number}: ${row.score}`"'],
                )


def _slider(name: str, label: str, most: float = 1, step: float = 0.01) -> Any:
    from trame_vuetify.widgets import vuetify3 as v

    return v.VSlider(
        v_model=(name,),
        label=label,
        min=0,
        max=most,
        step=step,
        thumb_label=True,
        hide_details=True,
        classes=name,
    )


def _section(title: str) -> Any:
    from trame.widgets import html

    section = html.Div(classes="px-3 py-2 border-b")
    with section:
        html.Div(title, classes="text-subtitle-2 mb-1")
    return section


def _dense(name: str = "") -> dict[str, Any]:
    return {"density": "compact", "hide_details": True, "variant": "outlined", "classes": f"my-1 {name}"}


def _small() -> dict[str, Any]:
    return {"size": "x-small", "variant": "tonal", "classes": "ml-2"}
