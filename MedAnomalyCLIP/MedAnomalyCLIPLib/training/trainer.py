"""Train a detector as a recipe says: records in, a bundle out.

A run lies in one folder: its settings, its log, a checkpoint from which it goes on after an interruption at
any moment, the weights of the best epoch so far, and at its end the bundle.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..bundle import Bundle
from ..clip.towers import clip_with_state, load_clip
from ..datasets.records import ImageRecord
from ..detection import FeatureMaps
from ..detectors.support import with_fitting_memory
from ..errors import Cancelled, InvalidRequest, UnreadableImage
from ..evaluation.metrics import ranking_figures
from ..runtime import select_precision
from .batches import Batch, Batches, seeded_generator, with_views
from .checkpoint import load_checkpoint, save_checkpoint
from .images import ChosenImages, choose_images
from .learner import Learner
from .log import TrainingLog
from .prepared import PreparedImages, Progress, prepare_images
from .recipe import Recipe, bundle_named, is_bundle, with_object
from .run_folder import BUNDLE, run_folder
from .tower_cache import TowerCache

CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
CHECKPOINT_SECONDS = 300.0
_IMAGES_FOR_STATISTICS = 256
_PIXELS_APART = 2  # validation looks at every second pixel, along both sides


@dataclass(frozen=True)
class Trained:
    """What came of a run.

    Attributes:
        bundle: the detector.
        epoch: whose weights were kept, from 1; 0 for those that training started from.
        figure: validation figure of that epoch; None where the last epoch was kept without one.
    """

    bundle: Bundle
    epoch: int
    figure: float | None


def train(
    recipe: Recipe,
    records: Sequence[ImageRecord],
    folder: Path,
    *,
    device: torch.device,
    download: bool = False,
    features: FeatureMaps | None = None,
    quiet: bool = False,
    on_progress: Progress | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> Trained:
    """Train, or go on where an interrupted run of the same recipe and images stopped.

    Args:
        recipe: how.
        records: labelled images, of which it takes those that it names.
        folder: of the run.
        device: where to run.
        download: allow open_clip to fetch CLIP weights that the recipe names.
        features: gives the maps of another network, for detectors that fuse them.
        quiet: no progress bar.
        on_progress: on_progress(stage, done, all), for the stages before and after the steps.
        is_cancelled: asked after each step.

    Raises:
        Cancelled: `is_cancelled` said so; a checkpoint was written, and the same call goes on from there.
        DatasetInvalid, InvalidRequest: images and recipe do not fit; said before anything is trained.
        OutputFailed: the folder holds another run, is in use, or cannot be written.
    """
    if recipe.detector.feature_fusion is not None and features is None:
        raise InvalidRequest(
            "This detector fuses feature maps of another network; train it from Python, where "
            "train(features=...) takes a function that gives them"
        )
    chosen = choose_images(records, recipe)
    recipe = with_object(recipe, chosen.names[chosen.target])
    with run_folder(folder, recipe, chosen):
        run = _Run(recipe, chosen, folder, device, on_progress, is_cancelled)
        run.prepare()
        run.build(download, features)
        run.learn(quiet)
        return run.finish()


class _Run:
    """The steps of one training, in their order."""

    def __init__(
        self,
        recipe: Recipe,
        chosen: ChosenImages,
        folder: Path,
        device: torch.device,
        on_progress: Progress | None,
        is_cancelled: Callable[[], bool] | None,
    ) -> None:
        self.recipe, self.chosen, self.folder, self.device = recipe, chosen, folder, device
        self.on_progress, self.is_cancelled = on_progress, is_cancelled or (lambda: False)

    def prepare(self) -> None:
        """Images of both kinds as arrays."""
        training = self._prepared("prepare", self.chosen.training)
        self.training = with_views(training) if self.recipe.augmentation == "eleven_views" else training
        self.validation = (
            self._prepared("prepare for validation", self.chosen.validation)
            if self.chosen.validation
            else None
        )

    def _prepared(self, stage: str, records: Sequence[ImageRecord]) -> PreparedImages:
        return prepare_images(
            records,
            self.recipe.preprocess,
            self.chosen.objects(records),
            self.folder,
            stage=stage,
            on_progress=self.on_progress,
            is_cancelled=self.is_cancelled,
        )

    def build(self, download: bool, features: FeatureMaps | None = None) -> None:
        """The learner, its optimizer, and the batches."""
        self._size_memory()
        torch.manual_seed(self.recipe.seed)  # of new weights; everything later has generators of its own
        clip = None if self.recipe.start else frozen_clip(self.recipe, download)
        start = bundle_named(self.recipe.start).build() if self.recipe.start else None
        learner = Learner(self.recipe, clip, self.chosen.names, start, features)
        self.learner, self.features = learner.to(self.device).eval(), features
        optimisation = self.recipe.optimisation
        kind = torch.optim.AdamW if optimisation.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = kind(
            [
                {"params": parameters, "initial_lr": rate}
                for parameters, rate in zip(
                    self.learner.parameters_to_train(), optimisation.rates, strict=True
                )
                if parameters
            ],
            lr=optimisation.learning_rate,
            betas=optimisation.betas,
            weight_decay=optimisation.weight_decay,
        )
        self.precision = select_precision(optimisation.precision, self.device)
        # Gradients of half precision would vanish below 6e-8 unless they are scaled up.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.batches = Batches(self.training, self.recipe)
        unchanged = self.recipe.augmentation != "random" and self.recipe.painting.share == 0
        self.training_cache = TowerCache() if unchanged else None
        self.validation_cache = TowerCache()

    def _fit_token_statistics(self) -> None:
        """Let the denoiser see what tokens look like now; prompts that are learned move them."""
        size = self.recipe.optimisation.batch_size
        count = min(len(self.training), _IMAGES_FOR_STATISTICS)
        chosen = seeded_generator(self.recipe.seed, 3, 0)
        order = torch.randperm(len(self.training), generator=chosen)[:count]
        self.learner.fit_token_statistics(
            batch_of(self.training, some.tolist()).to(self.device) for some in order.split(size)
        )

    def _size_memory(self) -> None:
        """Give the memory no more rows than the normal images have patches."""
        if self.recipe.detector.memory is not None:
            fitting = with_fitting_memory(self.recipe.detector, int((~self.training.abnormal).sum()))
            self.recipe = replace(self.recipe, detector=fitting)

    def learn(self, quiet: bool) -> None:
        """All epochs, from the checkpoint if there is one."""
        notes = self._resume()
        first, last = int(notes["step"]), len(self.batches)
        self.best: dict[str, Any] = notes["best"]
        optimisation = self.recipe.optimisation
        with TrainingLog(self.folder, last, quiet=quiet) as log:
            if first == 0:
                self._validate(0, log)
            loader: DataLoader = DataLoader(
                self.batches,
                batch_size=None,
                sampler=range(first, last),
                num_workers=optimisation.workers,
                pin_memory=self.device.type == "cuda",
            )
            saved = time.monotonic()
            for step, batch in zip(range(first, last), loader, strict=True):
                if self.recipe.detector.denoiser is not None and step % self.batches.steps_per_epoch == 0:
                    self._fit_token_statistics()
                terms = self._step(step, batch.to(self.device))
                epoch = step // self.batches.steps_per_epoch + 1
                log.step(step + 1, terms, epoch=epoch)
                if (step + 1) % self.batches.steps_per_epoch == 0:
                    self._validate(epoch, log)
                    saved = -math.inf  # so that no epoch is measured twice
                if time.monotonic() - saved > CHECKPOINT_SECONDS or self.is_cancelled():
                    self._save(step + 1)
                    saved = time.monotonic()
                if self.is_cancelled():
                    raise Cancelled(f"Stopped after {step + 1} of {last} steps; run it again to go on")

    def _step(self, step: int, batch: Batch) -> dict[str, float]:
        """One step of the optimizer; returns the loss terms."""
        optimisation = self.recipe.optimisation
        share = step / len(self.batches)
        factor = (1 + math.cos(math.pi * share)) / 2 if optimisation.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
        generator = seeded_generator(self.recipe.seed, 2, step)
        self.learner.train_parts(True)
        terms = self.learner.losses(batch, generator, self.precision, self.training_cache)
        _check_finite(terms["loss"], f"The loss of step {step + 1}")
        self.optimizer.zero_grad(set_to_none=True)
        if terms["loss"].requires_grad:
            self.scaler.scale(terms["loss"]).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.learner.train_parts(False)
        return {name: float(value.detach()) for name, value in terms.items()}

    def _validate(self, epoch: int, log: TrainingLog) -> None:
        """Measure an epoch, and keep its weights if none was better."""
        selection, epochs = self.recipe.selection, self.recipe.optimisation.epochs
        if epoch % selection.every and epoch != epochs:
            return
        figures = self._figures()
        if figures:
            log.figures(epoch * self.batches.steps_per_epoch, figures)
        figure = figures.get(selection.criterion)
        if epoch == 0 and epochs > 0:
            return  # for comparison only: an untrained detector is not a candidate
        if figure is None or self.best["figure"] is None or figure > self.best["figure"]:
            self.best = {"epoch": epoch, "figure": figure}
            save_checkpoint(self.folder / BEST, self.learner.trained, None, self.best)

    def _figures(self) -> dict[str, float]:
        """Image AUROC and pixel AP, each the mean over sets that have it, and the mean of both."""
        if self.validation is None:
            return {}
        found: dict[str, list[float]] = {}
        sets = np.array([record.set for record in self.chosen.validation])
        maps, scores = self._detect(self.validation)
        for name in dict.fromkeys(sets):
            own = torch.from_numpy(sets == name)
            image = ranking_figures(scores[own].numpy(), self.validation.abnormal[own].numpy())
            if image:
                found.setdefault("image_auroc", []).append(image["auroc"])
            pixel = _pixel_ap(maps[own], self.validation[own])
            if pixel is not None:
                found.setdefault("pixel_ap", []).append(pixel)
        figures = {name: float(np.mean(values)) for name, values in found.items()}
        return figures | ({"mean": float(np.mean(list(figures.values())))} if figures else {})

    def _detect(self, prepared: PreparedImages) -> tuple[Tensor, Tensor]:
        """Maps (N, S, S) and scores (N,) of the detector as it stands, on the CPU."""
        self.learner.store_text(self.chosen.target)
        size = self.recipe.optimisation.batch_size
        found = []
        for at in range(0, len(prepared), size):
            batch = batch_of(prepared, range(at, min(at + size, len(prepared)))).to(self.device)
            found.append(self.learner.detect(batch, self.validation_cache))
        maps = torch.cat([detection.map for detection in found]).float().cpu()
        scores = torch.cat([detection.score for detection in found]).float().cpu()
        for part in (maps, scores):
            _check_finite(part, "What the detector says of validation images")
        return maps, scores

    def _resume(self) -> dict[str, Any]:
        file = self.folder / CHECKPOINT
        if not file.is_file():
            return {"step": 0, "best": {"epoch": 0, "figure": None}}
        best = self.folder / BEST
        try:
            notes = load_checkpoint(file, self.learner.trained, self.optimizer)
            self.scaler.load_state_dict(notes["scaler"])
            if notes["best"]["epoch"] > 0:  # it is needed at the end: better to learn now that it is gone
                load_checkpoint(best, self.learner.trained, None)
                load_checkpoint(file, self.learner.trained, None)
        except (UnreadableImage, KeyError) as error:
            raise UnreadableImage(
                f"The run in {self.folder.name} cannot go on: {error}; delete {CHECKPOINT} to train anew"
            ) from error
        return notes

    def _save(self, step: int) -> None:
        notes = {"step": step, "best": self.best, "scaler": self.scaler.state_dict()}
        save_checkpoint(self.folder / CHECKPOINT, self.learner.trained, self.optimizer, notes)

    def finish(self) -> Trained:
        """The best weights, memory, thresholds, bundle."""
        from .finishing import finish

        load_checkpoint(self.folder / BEST, self.learner.trained, None)
        self.learner.store_text(self.chosen.target)
        bundle = finish(
            self.recipe,
            self.learner.detector.to("cpu"),
            self.chosen,
            self.batches.prepared,
            self.folder / BUNDLE,
            self.best,
            device=self.device,
            features=self.features,
            on_progress=self.on_progress,
            is_cancelled=self.is_cancelled,
        )
        return Trained(bundle, self.best["epoch"], self.best["figure"])


def frozen_clip(recipe: Recipe, download: bool) -> Any:
    """The CLIP that a recipe names.

    Raises:
        InvalidRequest, UnreadableImage, BundleInvalid: it is not there, or does not fit.
    """
    if is_bundle(recipe.clip):
        donor = bundle_named(recipe.clip)
        clip = donor.build_clip()
        if recipe.detector.tower == donor.manifest.detector.tower:
            return clip
        return clip_with_state(recipe.detector.tower, clip.state_dict(), donor.folder.name)
    return load_clip(recipe.detector.tower, recipe.clip, download=download)


def batch_of(prepared: PreparedImages, indices: Sequence[int]) -> Batch:
    """Images as they are, neither moved nor painted."""
    chosen = prepared[list(indices)]
    return Batch(
        chosen.images.float() / 255,
        chosen.valid,
        chosen.masks,
        chosen.has_mask,
        chosen.abnormal,
        chosen.objects,
        torch.tensor(list(indices)),
    )


def _check_finite(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise InvalidRequest(
            f"{what} is not a number: training ran away. Train anew, in another folder, with a lower "
            "optimisation.learning_rate, or with optimisation.precision=float32"
        )


def _pixel_ap(maps: Tensor, prepared: PreparedImages) -> float | None:
    known = prepared.has_mask
    shown = prepared.valid[known][:, ::_PIXELS_APART, ::_PIXELS_APART]
    scores = maps[known][:, ::_PIXELS_APART, ::_PIXELS_APART][shown]
    labels = prepared.masks[known][:, ::_PIXELS_APART, ::_PIXELS_APART][shown]
    figures = ranking_figures(scores.numpy(), labels.numpy()) if labels.any() else {}
    return figures.get("ap")
