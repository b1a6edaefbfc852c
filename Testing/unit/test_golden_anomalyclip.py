"""AnomalyCLIP, as far as MedVMAD is built on it: its prompts, and how it goes from patches to pixels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from golden import CLOSE, golden, golden_clip, method_weights, tiny_spec

from MedAnomalyCLIPLib.detectors.published import NAMES, renamed
from MedAnomalyCLIPLib.detectors.scoring import anomaly_map, two_class_cosines
from MedAnomalyCLIPLib.detectors.text import create_prompts

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(scope="module")
def arrays():
    return golden("anomalyclip")


def test_text_bank_is_the_published_one(arrays):
    spec = tiny_spec("medvmad", "anomalyclip", 112, (2, 4, 6, 8))
    spec = replace(spec, tower=replace(spec.tower, activation="quick_gelu"))
    text = replace(spec.text, abnormal=("damaged object",), length=6, deep_depth=3, deep_length=3)
    clip = golden_clip(arrays, spec)
    prompts = create_prompts(text, spec.tower, clip)
    assert torch.equal(prompts.token_ids, arrays["in/token_ids"].long())
    ours = renamed(method_weights(arrays), NAMES["medvmad"])
    shapes = prompts.state_dict()
    prompts.load_state_dict({k[8:]: v.reshape(shapes[k[8:]].shape) for k, v in ours.items()})
    torch.testing.assert_close(prompts(clip), arrays["out/text_features"], **CLOSE)


def test_probabilities_brought_to_pixels_are_the_published_map(arrays):
    """The mean over taps of what is published as a sum."""
    cosines = [
        two_class_cosines(tap[:, 1:], arrays["out/text_features"])
        for tap in arrays["out/patch_features[:, 1:]"]
    ]
    maps = anomaly_map(
        cosines, (8, 8), 112, scale=1 / 0.07, fusion="softmax_then_mean", enlarged="probabilities"
    )
    torch.testing.assert_close(4 * maps[:, ::5, ::5], arrays["out/map_sum[1:, ::5, ::5]"], **CLOSE)
