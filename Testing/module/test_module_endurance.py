"""Many cycles of Detect and closing the scene: no memory, node, observer or thread is left behind.

MEDANOMALYCLIP_LONG=1 runs 200 of them and prints figures.
"""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

pytest.importorskip("resource", reason="this system does not tell of its processes")

from endurance import LONG, resident_bytes
from harness.phantom import add_volume, axial_matrix
from harness.phantom import head as phantom_head

CYCLES = 200 if LONG else 25
WARM_UP = 5 if not LONG else 20
GROWTH = 16 * 2**20  # bytes


def observers(scene) -> int:
    """Observers of the scene and of its nodes, of all events."""
    import vtk

    nodes = [scene.GetNthNode(index) for index in range(scene.GetNumberOfNodes())]
    events = (
        *(vtk.vtkCommand.ModifiedEvent, vtk.vtkCommand.AnyEvent, vtk.vtkCommand.DeleteEvent),
        *(scene.NodeAddedEvent, scene.NodeRemovedEvent, scene.StartCloseEvent, scene.EndCloseEvent),
    )
    return sum(bool(thing.HasObserver(event)) for thing in (scene, *nodes) for event in events)


@pytest.mark.timeout(0 if LONG else 300)
def test_detecting_and_closing_the_scene_leaves_nothing_behind(panel, slicer_scene, views, detect, wait):
    import slicer

    voxels, spot = phantom_head()
    matrix = axial_matrix(voxels.shape)
    k, j, i = np.argwhere(spot).mean(axis=0)
    seen = []
    for cycle in range(CYCLES):
        node = add_volume(voxels, matrix, "Head")
        view = views[("Red", "Yellow", "Green")[cycle % 3]]
        view.show(node)
        view.node.JumpSlice(*(matrix @ [i, j, k, 1])[:3])
        panel.ui.inputSelector.setCurrentNode(node)
        detect()
        assert panel.ui.scoreLabel.text.startswith("Score")
        assert slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
        slicer.mrmlScene.Clear(False)
        assert not panel.logic.isRunning()
        if cycle >= WARM_UP:
            gc.collect()
            state = (
                slicer.mrmlScene.GetNumberOfNodes(),
                observers(slicer.mrmlScene),
                threading.active_count(),
            )
            seen.append((state, resident_bytes()))
    states, memory = {state for state, _ in seen}, [resident for _, resident in seen]
    if LONG:
        last, most = (memory[-1] - memory[0]) / 2**20, (max(memory) - memory[0]) / 2**20
        print(f"\n{CYCLES} cycles: memory {last:+.1f} MiB, at most {most:+.1f} MiB; states {states}")
    assert len(states) == 1, "nodes, observers or threads grow in number"
    assert max(memory) - memory[0] < GROWTH


def test_created_nodes_tell_nothing_of_the_patient_that_their_volume_does_not(
    panel, head, detect, no_network
):
    import slicer

    before = {node.GetID() for node in slicer.util.getNodesByClass("vtkMRMLNode")}
    marks = {
        "DICOM.instanceUIDs": "1.2.826.77777",
        "DICOM.PatientName": "Zyxwv^Marked",
        "Origin": "/home/Zyxwv",
    }
    for name, value in marks.items():
        head.SetAttribute(name, value)
    detect()
    made = [node for node in slicer.util.getNodesByClass("vtkMRMLNode") if node.GetID() not in before]
    assert made
    for node in made:
        told = [f"{name}={node.GetAttribute(name)}" for name in node.GetAttributeNames()]
        text = " ".join([node.GetName() or "", node.GetDescription() or "", *told, str(node)])
        assert not [value for value in marks.values() if value in text]
