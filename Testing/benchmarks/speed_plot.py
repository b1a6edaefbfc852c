"""Draw what `speed.py` measured: `python Testing/benchmarks/speed_plot.py speed.json speed.svg`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
mpl.rcParams.update({"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "speed", "axes.grid": True})
mpl.rcParams.update({"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})

from matplotlib import pyplot as plt  # noqa: E402

OURS, OTHERS = "#1f6f8b", "#9a9a9a"
COLOURS = {"int8": "#1f6f8b", "onnx": "#e07a2f", "torch": "#6a4c93", "bfloat16": "#5b8c3a"}


def main(source: str, target: str) -> None:
    figures = json.loads(Path(source).read_text())
    picture, ((peers, slices), (sides, memory)) = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    _peers(peers, figures["peers"])
    for way, found in figures["slices"].items():
        counts = [int(count) for count in found]
        style = {"marker": "o", "markersize": 3, "color": COLOURS[way], "label": way}
        slices.plot(counts, [one["seconds"] for one in found.values()], **style)
        memory.plot(counts, [one["growth MiB"] for one in found.values()], **style)
        of_side = figures["sides"][way]
        sides.plot([int(side) for side in of_side], list(of_side.values()), **style)
    slices.set(title="Volumes of 256 x 256", xlabel="slices", ylabel="s", xscale="log", yscale="log")
    sides.set(title="One slice", xlabel="pixels of a side", ylabel="ms", xscale="log")
    memory.set(title="Memory beside detector and volume", xlabel="slices", ylabel="MiB", xscale="log")
    sides.set_ylim(bottom=0)
    memory.set_ylim(bottom=0)
    for axes in (slices, sides, memory):
        axes.legend(frameon=False)
    for axes, places in ((slices, counts), (memory, counts), (sides, [int(side) for side in of_side])):
        axes.set_xticks(places, [str(place) for place in places])
        axes.minorticks_off()
    told = figures["machine"]
    picture.suptitle(f"{told['processor']}, {told['threads']} threads", fontsize=8, color="#555555")
    plt.savefig(target, metadata={"Date": None} if target.endswith(".svg") else None)


def _peers(axes: Any, found: dict[str, Any]) -> None:
    """Times of everything, the fastest at the top, on a scale of powers."""
    names = sorted(found, key=lambda name: -found[name]["ms"])
    times = [found[name]["ms"] for name in names]
    ours = ["bundled" in name or "ours" in name or "its tower" in name for name in names]
    axes.barh(names, times, color=[OURS if mine else OTHERS for mine in ours], log=True)
    for place, milliseconds in enumerate(times):
        axes.text(milliseconds * 1.08, place, f"{milliseconds:,.0f}", va="center")
    axes.set(title="One image of 256 x 256, ms", xlim=(10, max(times) * 4))
    axes.grid(axis="y", visible=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
