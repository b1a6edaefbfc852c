"""Weights under the names of the published code, into a detector; every name is accounted for.

Which names there are was read from the code that saves the checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BundleInvalid
from .detector import AnomalyDetector
from .text import create_prompts

Names = tuple[tuple[str, str], ...]

# Published name, as a pattern, and ours; "" for what the published code saves and never reads. Checkpoints of
# several state dicts are joined, the name of each in front.
_TWO_HEADS: Names = (
    (r"seg_adapters[./](\d+)\.fc1\.0\.weight", r"adapters.\1.segmentation.down.weight"),
    (r"seg_adapters[./](\d+)\.fc2\.0\.weight", r"adapters.\1.segmentation.up.weight"),
    (r"det_adapters[./](\d+)\.fc1\.0\.weight", r"adapters.\1.detection.down.weight"),
    (r"det_adapters[./](\d+)\.fc2\.0\.weight", r"adapters.\1.detection.up.weight"),
)
_MEDICLIP: Names = (
    (r"(?:adapter|adapter_state_dict)[./](\d+)_adapter\.0\.(weight|bias)", r"adapters.\1.linear.\2"),
    (r"(?:prompt_state_dict[./])?ctx[./](normal|abnormal)_end", r"prompts.\1"),
)
_PROMPT_LEARNER: Names = (
    (r"(?:prompt_learner[./])?ctx_pos", "prompts.normal"),
    (r"(?:prompt_learner[./])?ctx_neg", "prompts.abnormal"),
    (r"(?:prompt_learner[./])?compound_prompts_text\.(\d+)", r"prompts.deep.\1"),
    (r"(?:prompt_learner[./])?(?:token_(?:prefix|suffix)|tokenized_prompts)_(?:pos|neg)", ""),
    (r"(?:prompt_learner[./])?compound_prompt_projections\.\d+\.(?:weight|bias)", ""),
)
_ADACLIP: Names = (
    (r"patch_token_layer\.head\.(\d+)\.(weight|bias)", r"adapters.\1.linear.\2"),
    (r"cls_token_layer\.head\.0\.(weight|bias)", r"class_head.\1"),
    (r"visual_prompter\.static_prompts\.(\d+)", r"visual_prompts.static.\1"),
    (r"dynamic_visual_prompt_generator\.head\.(\d+)\.(weight|bias)", r"visual_prompts.dynamic.\1.\2"),
    (r"dynamic_text_prompt_generator\.head\.(\d+)\.(weight|bias)", r"text.prompts.dynamic.\1.\2"),
    (r"text_prompter\.static_prompts\.0", ""),  # for the first layer, whose words stay
    *((rf"text_prompter\.static_prompts\.{i}", f"text.prompts.static.{i - 1}") for i in range(1, 24)),
)
_FEATURE_FUSION: Names = (
    (r"sd_token_adapters\.(\d+)\.proj\.(weight|bias)", r"feature_fusion.\1.project.\2"),
    (r"sd_token_adapters\.(\d+)\.norm\.(weight|bias)", r"feature_fusion.\1.norm.\2"),
    (r"sd_fusion_blocks\.(\d+)\.gate\.(\d)\.(weight|bias)", r"feature_fusion.\1.gate.\2.\3"),
    (r"sd_fusion_blocks\.(\d+)\.out_norm\.(weight|bias)", r"feature_fusion.\1.out_norm.\2"),
)


def _of_a_trainer(names: Names) -> Names:
    """Also as AdaCLIP's trainer saves them, which has the model as a part of its own."""
    return tuple((rf"(?:clip_model\.)?{published}", ours) for published, ours in names)


NAMES: dict[str, Names] = {
    "mvfa_zero_shot": _TWO_HEADS,
    "mvfa_few_shot": _TWO_HEADS,
    "mvfa_few_shot_labels": _TWO_HEADS,
    "mediclip": _MEDICLIP,
    "mediclip_paper": _MEDICLIP,
    "medvmad": (*_TWO_HEADS, *_PROMPT_LEARNER),
    "adaclip": _of_a_trainer(_ADACLIP),
    "diffusionclip": _of_a_trainer((*_ADACLIP, *_FEATURE_FUSION)),
}
_NOT_PUBLISHED = ("text_bank", "memory.", "map_fusion.", "score_fusion.")  # made, not stored


@torch.no_grad()
def load_published(detector: AnomalyDetector, preset: str, weights: Mapping[str, Tensor], clip: Any) -> None:
    """Put published weights in place, and the text features that follow from them.

    Args:
        detector: of that preset's kind; changed in place.
        preset: name of the published system.
        weights: what its checkpoint holds beside CLIP.
        clip: both towers of its CLIP, as `clip.towers.create_clip` builds them.

    Raises:
        BundleInvalid: a name or shape does not fit, or a weight is missing; all of them are listed.
    """
    state = {f"tower.visual.{key}": value for key, value in clip.visual.state_dict().items()}
    try:
        state |= renamed(weights, NAMES[preset])
    except BundleInvalid as error:
        raise BundleInvalid(f"{error}{_hint(weights, preset)}") from error
    expected = {k: v for k, v in detector.state_dict().items() if not k.startswith(_NOT_PUBLISHED)}
    prompts = None
    if detector.spec.text.prompts == "hybrid":
        text_side = {k: v for k, v in clip.state_dict().items() if f"text.tower.{k}" in expected}
        state |= {f"text.tower.{key}": value for key, value in text_side.items()}
    else:
        prompts = create_prompts(detector.spec.text, detector.spec.tower, clip)
        expected |= {f"prompts.{key}": value for key, value in prompts.state_dict().items()}
    faults = [f"{key} is missing" for key in expected if key not in state]
    faults += [f"{key} has no place" for key in state if key not in expected]
    faults += [
        f"{key} is {tuple(value.shape)}, not {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.squeeze().shape != expected[key].squeeze().shape
    ]
    if faults:
        raise BundleInvalid(
            f"The weights do not fit {preset}: {'; '.join(sorted(faults))}{_hint(weights, preset)}"
        )
    for key, value in state.items():
        expected[key].copy_(value.reshape(expected[key].shape))  # a 1x1 convolution is a linear map
    if prompts is not None:
        detector.text_bank.copy_(prompts(clip))


def renamed(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Weights under our names, without those that the published code never reads.

    Raises:
        BundleInvalid: listing every name that no pattern fits.
    """
    ours = {key: _our_name(key, names) for key in weights}
    unknown = sorted(key for key, name in ours.items() if name is None)
    if unknown:
        raise BundleInvalid(f"Nothing is known of the published weights {', '.join(unknown)}")
    targets = [name for name in ours.values() if name]
    twice = sorted(key for key, name in ours.items() if name and targets.count(name) > 1)
    if twice:
        raise BundleInvalid(f"Several of the published weights have one place: {', '.join(twice)}")
    return {name: weights[key] for key, name in ours.items() if name}


def never_read(weights: Iterable[str], names: Names) -> list[str]:
    """Those that the published code saves and never reads."""
    return sorted(key for key in weights if _our_name(key, names) == "")


def _hint(weights: Iterable[str], preset: str) -> str:
    """The systems that weights are of by their names, if these are others than the one asked for."""
    likely = [system for system, names in NAMES.items() if _parts(weights, names) == _parts_of(names)]
    return "" if preset in likely or not likely else f". By their names they are of {', '.join(likely)}"


def _parts_of(names: Names) -> set[str]:
    """Which of our parts a table of names has weights for."""
    return {name.partition(".")[0] for _, name in names if name}


def _parts(weights: Iterable[str], names: Names) -> set[str | None]:
    """Which of our parts weights go to, None among them if one has no place."""
    ours = [_our_name(key, names) for key in weights]
    return {None if name is None else name.partition(".")[0] for name in ours if name != ""}


def _our_name(key: str, names: Names) -> str | None:
    for pattern, name in names:
        found = re.fullmatch(pattern, key)
        if found:
            return found.expand(name)
    return None
