"""What a reader does on the page, in a browser, in this order: one session."""

from __future__ import annotations

import zipfile

import numpy as np
from scipy import ndimage

from web.browsing import WAIT_MS

COUNT = 12


def grey_spot(picture: np.ndarray) -> np.ndarray:
    """(H, W) bool: the phantom's bright spot, the only thing that is nearly white; without its edge."""
    white = ndimage.binary_opening(picture.min(axis=-1) > 235, iterations=4)  # no legend's letters
    return ndimage.binary_erosion(white, iterations=3)


def is_heat(picture: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels in the colours of the map, which are far from grey; the legend at the right not."""
    heat = picture[..., 0] - picture[..., 2] > 40
    heat[:, int(0.8 * heat.shape[1]) :] = False
    return heat


def is_outline(picture: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels in the colour of the segment's outline, which is turquoise."""
    return picture[..., 1:].min(axis=-1) - picture[..., 0] > 30


def inside_outline(picture: np.ndarray) -> np.ndarray:
    """(H, W) bool: what it surrounds; JPEG leaves gaps in it."""
    line = ndimage.binary_dilation(is_outline(picture), iterations=3)
    return ndimage.binary_fill_holes(line) & ~line


def areas(reader) -> list[float]:
    """mm² in the table, slice by slice."""
    return [float(text) for text in reader.page.locator("[data-slice] td:nth-child(4)").all_text_contents()]


def wait_for_areas(reader, hold) -> list[float]:
    """Those of the table once they are what was waited for."""
    for _ in range(WAIT_MS // 100):
        if hold(found := areas(reader)):
            return found
        reader.page.wait_for_timeout(100)
    raise TimeoutError(f"the table never told what was waited for, but {found}")


def test_the_page_shows_the_study_and_says_what_it_is_for(reader):
    assert "72 × 80 × 12 voxels" in reader.text("volume-words")
    assert "Research use only" in reader.text("research-use")
    picture = reader.settled_axial(lambda p: grey_spot(p).any())
    assert grey_spot(picture).sum() > 1000
    assert not is_heat(picture).any()
    reader.wait_for_text("plane-words", "Axial 7 of 12")


def test_detect_lays_the_map_over_the_spot_and_nowhere_else(reader):
    before = reader.settled_axial()
    spot = grey_spot(before)
    reader.click("detect-button")
    reader.wait_for_text("score-words", "Score 0.9")
    reader.wait_for_text("result-line", "Higher than 97 %")
    after = reader.settled_axial(lambda p: is_heat(p).any())
    assert is_heat(after)[spot].mean() > 0.99
    around = ndimage.binary_dilation(spot, iterations=12)
    around[:, int(0.7 * spot.shape[1]) :] = True  # the legend and its letters
    assert not is_heat(after)[~around].any()
    near = ndimage.binary_dilation(around, iterations=6)
    assert not is_outline(before).any() and not is_outline(after)[~near].any()
    assert inside_outline(after)[ndimage.binary_erosion(spot, iterations=4)].all()
    assert np.quantile(np.abs(after - before)[~around], 0.999) < 20  # JPEG


def test_threshold_and_opacity_act_on_the_overlay(reader):
    spot = grey_spot(reader.settled_axial()) | ndimage.binary_erosion(is_heat(reader.axial()), iterations=3)
    slider = reader.page.locator(".opacity [role=slider]")
    slider.press("Home")
    hidden = reader.settled_axial(lambda p: not is_heat(p)[spot].any())
    assert grey_spot(hidden).any()
    slider.press("End")
    reader.settled_axial(lambda p: is_heat(p)[spot].mean() > 0.5)
    threshold = reader.page.locator(".threshold [role=slider]")
    threshold.press("End")
    reader.settled_axial(lambda p: grey_spot(p).any())
    reader.page.get_by_role("button", name="Reset").click()
    reader.settled_axial(lambda p: is_heat(p).sum() > 1000)


def test_colours_are_chosen_for_the_map_that_is_shown(reader):
    reader.choose("colours", "InvertedGrey")
    dark = reader.settled_axial(lambda p: not is_heat(p).any())
    assert dark[inside_outline(dark)].mean() < 160  # where the image is nearly white
    reader.choose("colours", "Heat")
    reader.settled_axial(lambda p: is_heat(p).sum() > 1000)


def test_the_wheel_scrolls_and_dragging_changes_the_window(reader):
    box = reader.page.locator(".layout-grid-item").first.bounding_box()
    reader.page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"])
    before = reader.settled_axial()
    reader.page.mouse.wheel(0, 100)
    reader.wait_for_text("plane-words", "Axial 6 of 12")
    assert np.abs(reader.settled_axial() - before).max() > 60
    reader.page.mouse.down()
    for step in range(1, 6):
        reader.page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.5 * box["height"] + 40 * step)
        reader.page.wait_for_timeout(30)
    reader.page.mouse.up()
    dark = before.mean()
    reader.settled_axial(lambda p: abs(p.mean() - dark) > 5)
    reader.page.get_by_role("button", name="Auto").click()


def test_a_run_over_the_volume_can_be_stopped_and_gone_on_with(reader, server):
    server.hold.write_text("3")
    reader.click("range-button")
    rows = reader.page.locator("[data-slice]")
    rows.nth(2).wait_for()
    reader.wait_for_text("progress-words", f"3 of {COUNT} slices")
    reader.click("range-button")
    reader.wait_for_text("message", "Cancelled")
    server.hold.unlink()
    assert rows.count() == 3
    reader.page.get_by_label("Go on with an earlier run").check()
    reader.click("range-button")
    reader.page.locator(f"[data-slice='{COUNT}']").wait_for()
    assert rows.count() == reader.page.locator(".plot .point").count() == COUNT
    scores = [float(text) for text in reader.page.locator("[data-slice] td:nth-child(2)").all_text_contents()]
    assert max(scores) > 0.9 > min(scores)


def test_threshold_and_smallest_area_move_the_table_too(reader):
    before = areas(reader)
    assert max(before) > 0
    area = reader.page.locator(".smallest_area [role=slider]")
    area.press("End")
    wait_for_areas(reader, lambda found: found == [value if value >= 500 else 0.0 for value in before])
    assert reader.page.get_attribute(".smallest_area [role=slider]", "aria-valuenow") == "500"
    area.press("Home")
    wait_for_areas(reader, lambda found: found == before)
    reader.page.locator(".threshold [role=slider]").press("End")
    wait_for_areas(reader, lambda found: sum(found) < sum(before))
    reader.page.get_by_role("button", name="Reset").click()
    wait_for_areas(reader, lambda found: sum(found) >= sum(before))


def test_rows_points_and_candidates_lead_to_their_slices(reader):
    reader.page.click("[data-slice='3']")
    reader.wait_for_text("plane-words", "Axial 3 of 12")
    reader.page.locator(".plot .point").nth(9).click()
    reader.wait_for_text("plane-words", "Axial 10 of 12")
    reader.page.get_by_role("button", name="Previous candidate").click()
    reader.page.locator("[data-slice].bg-blue-lighten-4:not([data-slice='10'])").wait_for()
    number = int(reader.page.get_attribute("[data-slice].bg-blue-lighten-4", "data-slice"))
    assert number < 10
    reader.wait_for_text("plane-words", f"Axial {number} of 12")


def test_export_hands_the_files_of_the_command_line_to_the_browser(reader, tmp_path):
    with reader.page.expect_download() as download:
        reader.click("export-button")
    download.value.save_as(tmp_path / "results.zip")
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(tmp_path / "results.zip").namelist()}
    assert {"map.nii.gz", "segmentation.seg.nrrd", "scores.csv", "result.json"} <= names
    assert len([name for name in names if name.startswith("overlay_")]) == COUNT


def test_a_page_that_is_loaded_again_is_the_same_session(reader):
    reader.page.reload()
    reader.wait_for_study()
    assert "secret" not in reader.page.url
    assert reader.page.locator("[data-slice]").count() == COUNT


def test_nothing_is_fetched_from_anywhere_else(reader, server):
    away = [url for url in reader.requests if not url.startswith((server.place, "data:", "blob:"))]
    assert reader.requests and not away
