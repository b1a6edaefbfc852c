"""A detector while it learns: what of it is trained, where its text comes from, and its loss terms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..clip.towers import TappedTokens, text_side
from ..detection import FeatureMaps
from ..detectors.detector import Aligned, AnomalyDetector, Detection
from ..detectors.scoring import anomaly_map, mean_patch_score, shown_share, two_class_cosines
from ..detectors.support import FILLED, take_over
from ..detectors.text import create_prompts, sentence_ensemble
from ..errors import InvalidRequest
from .batches import Batch
from .losses import OverlapWeight, dice_loss, focal_loss, image_loss
from .prepared import network_input
from .recipe import Recipe
from .tower_cache import TowerCache

# All but the first are filled from images, when everything else is learned.
FROZEN = ("tower", *FILLED, "familiarity")


class Learner(nn.Module):
    """A detector, the prompts that make its text, and the frozen CLIP that both stand on.

    Args:
        recipe: how it is trained.
        clip: both towers of its CLIP; None where weights and text are those of `start`.
        names: what the images show, as sentences call it; batches refer to them by number.
        start: a detector to start from; None for new weights.
        features: gives the maps of another network, for detectors that fuse them.
    """

    banks: Tensor | None  # (O, 2, E), of each object that images show
    sentences: Tensor  # (O, T, C) token ids, likewise

    def __init__(
        self,
        recipe: Recipe,
        clip: Any,
        names: Sequence[str],
        start: AnomalyDetector | None = None,
        features: FeatureMaps | None = None,
    ) -> None:
        super().__init__()
        self.recipe, spec = recipe, recipe.detector
        self.features = features
        self.detector = AnomalyDetector(spec)
        if start is not None:
            take_over(self.detector, start)
        self.clip = clip
        self.prompts: nn.Module | None = None
        self.register_buffer("banks", None, persistent=False)
        self.register_buffer("sentences", None, persistent=False)
        if clip is not None:
            clip.requires_grad_(False)
            self.detector.tower.visual.load_state_dict(clip.visual.state_dict())
            self._make_text(names)
        self.detector.tower.requires_grad_(False)
        self.overlap_weight = OverlapWeight() if recipe.objective.modulated else None

    @torch.no_grad()
    def _make_text(self, names: Sequence[str]) -> None:
        text, tower = self.recipe.detector.text, self.recipe.detector.tower
        if text.prompts == "coop":
            self.prompts = create_prompts(text, tower, self.clip)
            return
        if text.prompts == "presets":
            raise InvalidRequest(
                "Text about presets is learned together with the towers; start from a detector that has it"
            )
        ensembles = [sentence_ensemble(replace(text, name=name), tower) for name in names]
        if text.prompts == "ensemble":
            self.banks = torch.stack([ensemble(self.clip) for ensemble in ensembles])
            return
        self.sentences = torch.stack([ensemble.token_ids for ensemble in ensembles])
        words = self.detector.text.tower
        words.load_state_dict({k: v for k, v in text_side(self.clip).items() if k in words.state_dict()})
        words.requires_grad_(False)

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The parts that learn, by name; their state is all that a checkpoint has to hold."""
        parts = {name: part for name, part in self.detector.named_children() if name not in FROZEN}
        if "text" in parts:
            parts["text"] = self.detector.text.prompts
        if self.prompts is not None:
            parts["prompts"] = self.prompts
        if self.overlap_weight is not None:
            parts["overlap_weight"] = self.overlap_weight
        return parts

    def train_parts(self, mode: bool) -> None:
        """Switch what learns, and nothing of the frozen tower, whose statistics stay as they are."""
        for part in self.trained.values():
            part.train(mode)

    def parameters_to_train(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """All but the denoiser's, and those; without the heads that no loss term reaches."""
        labels_alone = self.recipe.objective.maps == "none"
        groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for part_name, part in self.trained.items():
            for name, parameter in part.named_parameters():
                if not (labels_alone and "segmentation" in name):
                    groups[part_name == "denoiser"].append(parameter)
        return groups

    def losses(
        self,
        batch: Batch,
        generator: torch.Generator,
        precision: torch.dtype,
        cache: TowerCache | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms by name, "loss" their weighted sum.

        Args:
            batch: on the device of the weights.
            generator: source of the denoiser's noise, on the CPU.
            precision: of the tower.
            cache: see `align`.
        """
        objective = self.recipe.objective
        aligned, text = self.align(batch, precision, cache)
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=batch.images.device)
        if objective.maps != "none":
            for name, value in self._map_terms(aligned, text, batch).items():
                terms[name] = value
                total = total + objective.map_weight * value
        if objective.image != "none":
            terms["image"] = self._image_term(aligned, text, batch)
            total = total + objective.image_weight * terms["image"]
        if self.recipe.detector.denoiser is not None and objective.denoising_weight > 0:
            terms["denoising"] = self.detector.denoising_loss(_own_tokens(aligned), text, generator)
            total = total + objective.denoising_weight * terms["denoising"]
        return {"loss": total, **terms}

    def align(
        self,
        batch: Batch,
        precision: torch.dtype = torch.float32,
        cache: TowerCache | None = None,
        text: Tensor | None = None,
    ) -> tuple[Aligned, Tensor]:
        """Features of a batch, and the text that they are compared with.

        Args:
            batch: on the device of the weights.
            precision: of the tower.
            cache: of the images that the batch's indices tell, if these always come unchanged.
            text: (2, E), where it is at hand.
        """
        images = network_input(batch.images, self.recipe.preprocess)
        plain = self._plain(images, batch.indices, precision, cache)
        text = self._text(batch, plain) if text is None else text
        if self.recipe.detector.adapter.kind == "linear":
            aligned = self.detector.align_tokens(
                self._tokens(images, plain, batch.indices, precision, cache), text
            )
        else:  # adapters in the stream share its precision
            with autocast(images.device, precision):
                aligned = self.detector.align(images, text=text)
        return aligned, self.detector.text_features(aligned)

    def _plain(
        self, images: Tensor, indices: Tensor, precision: torch.dtype, cache: TowerCache | None
    ) -> Tensor | None:
        """(B, E) features of a pass without prompts, where prompts ask for them."""
        spec = self.recipe.detector
        if spec.text.prompts != "hybrid" and spec.visual_prompts is None:
            return None

        def compute(part: slice) -> tuple[Tensor, ...]:
            with autocast(images.device, precision):
                plain = self.detector.plain_features(images[part])
            return () if plain is None else (plain.float(),)

        return (compute(slice(None)) if cache is None else cache.through("plain", indices, compute))[0]

    def _tokens(
        self,
        images: Tensor,
        plain: Tensor | None,
        indices: Tensor,
        precision: torch.dtype,
        cache: TowerCache | None,
    ) -> TappedTokens:
        """The tower's tokens; kept where nothing that is learned is in its stream."""
        fused = self.recipe.detector.feature_fusion is not None
        if fused or self.recipe.detector.visual_prompts is not None:
            maps = self.features(images) if fused and self.features is not None else None
            with autocast(images.device, precision):
                return self.detector.tap(images, maps, plain)

        def compute(part: slice) -> tuple[Tensor, ...]:
            with torch.no_grad(), autocast(images.device, precision):
                tokens = self.detector.tap(images[part])
            return (*tokens.patches, *tokens.classes, tokens.pooled)

        found = compute(slice(None)) if cache is None else cache.through("tokens", indices, compute)
        taps = len(self.recipe.detector.tower.taps)
        return TappedTokens(found[:taps], found[taps:-1], found[-1], self.detector.tower.grid)

    def _text(self, batch: Batch, plain: Tensor | None) -> Tensor | None:
        """(2, E), or (B, 2, E) where images differ in what they show; None for what is stored."""
        if plain is not None and self.recipe.detector.text.prompts == "hybrid":
            return self.detector.text(plain.float(), self.sentences[batch.objects])
        if self.prompts is not None:
            return self.prompts(self.clip)
        return None if self.banks is None else self.banks[batch.objects]

    @torch.no_grad()
    def fit_token_statistics(self, batches: Iterable[Batch]) -> None:
        """Mean and spread of the tower's tokens, for the denoiser."""
        self.detector.fit_token_statistics(self._seen(batch) for batch in batches)

    def _seen(self, batch: Batch) -> TappedTokens:
        """The tower's tokens of a batch, without encoding text, which has no part in them."""
        images = network_input(batch.images, self.recipe.preprocess)
        plain = self._plain(images, batch.indices, torch.float32, None)
        return self._tokens(images, plain, batch.indices, torch.float32, None)

    def _map_terms(self, aligned: Aligned, text: Tensor, batch: Batch) -> dict[str, Tensor]:
        outlined = batch.has_mask
        if not outlined.any():
            terms = ("focal", "dice", *(["dice_normal"] if self.recipe.objective.dice_of_normal else []))
            return dict.fromkeys(terms, torch.zeros((), device=batch.images.device))
        masks, valid = batch.masks[outlined].float(), batch.valid[outlined]
        maps = [m[outlined] for m in self._maps(aligned, text)]
        if self.overlap_weight is not None:
            self.overlap_weight.observe(torch.stack(maps).mean(0), masks, valid)
        found = {
            "focal": _sum(focal_loss(m, masks, valid=valid, weight=self.overlap_weight) for m in maps),
            "dice": _sum(dice_loss(m, masks, valid=valid) for m in maps),
        }
        if self.recipe.objective.dice_of_normal:
            found["dice_normal"] = _sum(dice_loss(1 - m, 1 - masks, valid=valid) for m in maps)
        return found

    def _maps(self, aligned: Aligned, text: Tensor) -> list[Tensor]:
        """The fused map, or one of each tap; (B, S, S) each."""
        if self.recipe.objective.maps == "fused":
            return [self.detector.map_features(aligned, text)]
        spec = self.recipe.detector
        return [
            anomaly_map(
                [two_class_cosines(patches, text.float())],
                aligned.grid,
                spec.tower.image_size,
                scale=spec.scale,
                fusion=spec.fusion,
                enlarged=spec.enlarged,
            )
            for patches in self.detector.map_head(aligned).patches
        ]

    def _image_term(self, aligned: Aligned, text: Tensor, batch: Batch) -> Tensor:
        label = batch.abnormal.float()
        if self.recipe.objective.image == "class":
            score = self.detector.class_score(aligned, text, batch.valid)
            return focal_loss(score[:, None, None], label[:, None, None])
        shown = shown_share(batch.valid, aligned.grid)
        scale = self.recipe.detector.scale
        return _sum(
            image_loss(mean_patch_score([two_class_cosines(patches, text.float())], shown, scale), label)
            for patches in aligned.detection.patches
        )

    @torch.no_grad()
    def detect(self, batch: Batch, cache: TowerCache | None = None) -> Detection:
        """What the detector says of a batch, without the memory, which is filled at the end.

        Learned prompts speak as `store_text` last stored them: encoded once, not for each batch.
        """
        stored = None if self.prompts is None else self.detector.text_bank
        aligned, text = self.align(batch, cache=cache, text=stored)
        return self.detector.decide(aligned, text, batch.valid)

    @torch.no_grad()
    def store_text(self, target: int) -> None:
        """Put the text features into the detector; of several objects those of the one it is for."""
        if self.prompts is not None:
            self.detector.text_bank.copy_(self.prompts(self.clip))
        elif self.banks is not None:
            self.detector.text_bank.copy_(self.banks[target])


def _own_tokens(aligned: Aligned) -> TappedTokens:
    """What the tower gave; a denoiser always stands beside adapters that keep it."""
    assert aligned.tokens is not None
    return aligned.tokens


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def autocast(device: torch.device, precision: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Lower precision where it is asked for."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=precision)
