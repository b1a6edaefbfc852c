"""How a detector is trained, as data: a TOML or JSON file in, a checked `Recipe` out.

One file for each system lies in `recipes/`; a file of yours can start from one of them, and the command line
can change single values. Importable without torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..bundle import Bundle, default_bundle_path
from ..configuration import from_mapping, to_mapping
from ..detectors.presets import PRESETS
from ..detectors.specification import DetectorSpec
from ..errors import InvalidRequest
from ..plain_files import read_small_file
from ..preprocess import STANDARD_WINDOWS, PreprocessSpec
from ..runtime import TORCH_PRECISIONS
from ..synthesis import SynthesisConfig

if sys.version_info >= (3, 11):
    import tomllib
else:  # the extra `train` brings it
    import tomli as tomllib

_LONGEST = 2**20  # bytes
RECIPES = Path(__file__).parent / "recipes"
BUNDLED = "bundled"

PROTOCOLS = ("all", "few_shot", "leave_one_out")
AUGMENTATIONS = ("none", "eleven_views", "random")
MAP_TERMS = ("none", "fused", "each_tap")
IMAGE_TERMS = ("none", "mean_patch", "class")
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "cosine")
CRITERIA = ("image_auroc", "pixel_ap", "mean", "last")


@dataclass(frozen=True)
class DataPlan:
    """Which images are learned from.

    Attributes:
        protocol: "all" learns from the training split; "few_shot" draws a few images; "leave_one_out" learns
            from all sets but `target`, the one that the detector is for.
        sets: names of the sets that take part; empty for all.
        target: set that is left out, for "leave_one_out".
        learn_from: splits that "all" and "leave_one_out" learn from.
        normal, abnormal: images that "few_shot" draws.
        pool: split that they are drawn from.
        shots_seed: of the draw.
        shot_list: file that names the shots instead, in the format of MVFA.
        balanced: whether normal and abnormal images of every object are drawn equally often.
        objects: what the images of a set show, as sentences of a prompt ensemble call it; by default the
            body part of each image.
    """

    protocol: str = "all"
    sets: tuple[str, ...] = ()
    target: str = ""
    learn_from: tuple[str, ...] = ("train",)
    normal: int = 0
    abnormal: int = 0
    pool: str = "train"
    shots_seed: int = 0
    shot_list: str = ""
    balanced: bool = False
    objects: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _known("data.protocol", self.protocol, PROTOCOLS)
        if self.protocol == "leave_one_out" and not self.target:
            raise InvalidRequest("data.target must name the set that leave_one_out leaves out")
        if self.protocol == "few_shot" and not self.shot_list and self.normal < 1:
            raise InvalidRequest("data.normal must be at least 1 for few_shot: it needs normal images")
        _not_negative("data", self, "normal", "abnormal", "shots_seed")
        if self.protocol != "leave_one_out" and "test" in (*self.learn_from, self.pool):
            raise InvalidRequest(
                "data.learn_from and data.pool cannot be 'test': what is learned from is no test; only "
                "leave_one_out may learn from the test images of other sets"
            )


@dataclass(frozen=True)
class Painting:
    """Anomalies painted into normal images while training.

    Attributes:
        share: of the normal images that are handed to the synthesizer, which may leave them as they are.
        on_foreground: whether lesions are kept on the body.
        synthesis: which lesions, see `synthesis.SynthesisConfig`.
    """

    share: float = 0.0
    on_foreground: bool = True
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)

    def __post_init__(self) -> None:
        _share("painting.share", self.share)


@dataclass(frozen=True)
class Objective:
    """What is made small.

    Attributes:
        maps: "fused", focal and Dice loss of the final map; "each_tap", of the map of each tap, summed;
            "none" for labels alone. Abnormal images without a mask take no part.
        dice_of_normal: whether the Dice loss of "normal" is added.
        image: "mean_patch", cross entropy of the mean patch probability of each tap, summed; "class", focal
            loss of the image score; "none".
        modulated: whether the focal loss is weighted dynamically, see `losses.OverlapWeight`.
        map_weight, image_weight, denoising_weight: of the terms.
    """

    maps: str = "fused"
    dice_of_normal: bool = False
    image: str = "none"
    modulated: bool = False
    map_weight: float = 1.0
    image_weight: float = 1.0
    denoising_weight: float = 1.0

    def __post_init__(self) -> None:
        _known("objective.maps", self.maps, MAP_TERMS)
        _known("objective.image", self.image, IMAGE_TERMS)
        _not_negative("objective", self, "map_weight", "image_weight", "denoising_weight")
        if self.maps == "none" and self.image == "none":
            raise InvalidRequest("objective: maps and image are both 'none', so there is nothing to learn")


@dataclass(frozen=True)
class Optimisation:
    """How it is made small.

    Attributes:
        optimizer: "adam" or "adamw".
        learning_rate: at the start.
        denoiser_learning_rate: that of the denoiser, where the detector has one; what suits prompts and heads
            of a few thousand weights makes its networks forget.
        betas: of the optimizer's moments.
        weight_decay: of "adamw".
        schedule: "constant", or "cosine" down to zero.
        epochs: passes over the images; 0 to leave all weights as they are.
        batch_size: images in one step.
        precision: of the tower: "float32", "bfloat16", "float16" (with scaled gradients), or "auto" for
            bfloat16 on CUDA devices that have it, float16 on others, float32 elsewhere. Heads and losses are
            always float32.
        workers: processes that prepare batches; 0 for none beside the main one.
    """

    optimizer: str = "adam"
    learning_rate: float = 1e-3
    denoiser_learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 0.0
    schedule: str = "constant"
    epochs: int = 10
    batch_size: int = 8
    precision: str = "auto"
    workers: int = 0

    def __post_init__(self) -> None:
        _known("optimisation.optimizer", self.optimizer, OPTIMIZERS)
        _known("optimisation.schedule", self.schedule, SCHEDULES)
        _known("optimisation.precision", self.precision, TORCH_PRECISIONS)
        if self.batch_size < 1 or self.epochs < 0 or self.workers < 0 or min(self.rates) <= 0:
            raise InvalidRequest(
                "optimisation: batch_size and learning rates must be above 0, epochs and workers not below"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidRequest(f"optimisation.betas are {self.betas}; give numbers from 0 to below 1")
        _not_negative("optimisation", self, "weight_decay")
        if self.weight_decay and self.optimizer != "adamw":
            raise InvalidRequest("optimisation.weight_decay belongs to the optimizer 'adamw'")

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates at the start, of everything else and of the denoiser."""
        return self.learning_rate, self.denoiser_learning_rate


@dataclass(frozen=True)
class Selection:
    """Which epoch is kept; chosen on validation images, never on test images.

    Attributes:
        criterion: "image_auroc", "pixel_ap", their "mean", or "last" for the last epoch.
        every: epochs between two measurements.
    """

    criterion: str = "mean"
    every: int = 1

    def __post_init__(self) -> None:
        _known("selection.criterion", self.criterion, CRITERIA)
        if self.every < 1:
            raise InvalidRequest("selection.every must be at least 1")


@dataclass(frozen=True)
class Recipe:
    """One training, whole.

    Attributes:
        name: of the detector that comes out.
        description: of it, one sentence.
        detector: parts and numbers; its memory keeps fewer rows where the normal images have fewer patches.
        preprocess: how an image becomes its input.
        clip: where its CLIP comes from: "bundled", the folder of a detector, a file of weights, or a name
            that open_clip knows, as "openai".
        start: "bundled" or the folder of a detector whose weights training starts from; empty for new ones.
        data: which images.
        augmentation: "none"; "eleven_views", fixed views as in MVFA; "random" placement and appearance.
        painting: anomalies painted into them.
        objective: what is made small.
        optimisation: how.
        selection: which epoch is kept.
        seed: of everything random.
    """

    name: str
    description: str
    detector: DetectorSpec
    preprocess: PreprocessSpec
    clip: str = BUNDLED
    start: str = ""
    data: DataPlan = field(default_factory=DataPlan)
    augmentation: str = "none"
    painting: Painting = field(default_factory=Painting)
    objective: Objective = field(default_factory=Objective)
    optimisation: Optimisation = field(default_factory=Optimisation)
    selection: Selection = field(default_factory=Selection)
    seed: int = 0

    def __post_init__(self) -> None:
        _known("augmentation", self.augmentation, AUGMENTATIONS)
        _not_negative("recipe", self, "seed")
        if self.detector.tower.image_size != self.preprocess.size:
            raise InvalidRequest(
                f"The detector takes {self.detector.tower.image_size} px, the preprocessing makes "
                f"{self.preprocess.size} px"
            )
        if self.objective.image == "class" and self.detector.image_score != "class_and_clusters":
            raise InvalidRequest("objective.image 'class' needs a detector that scores its class token")


def shipped_recipes() -> dict[str, str]:
    """Names of the recipes that come with the package, and what each of them makes."""
    return {path.stem: str(_read(path)["description"]) for path in sorted(RECIPES.glob("*.toml"))}


def read_recipe(config: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from the name of a shipped one or from a file, with single values changed.

    The file may name a recipe as its `base`, and a `preset` of `detectors.presets`, whose values stand where
    `[detector]` and `[preprocess]` say nothing. With a CLIP out of a detector's folder, the tower and what it
    expects of images are those of that detector. Changes have the last word.

    Args:
        config: name or path.
        changes: "key.key=value" each, the value as TOML writes it, or plain text.

    Raises:
        InvalidRequest: unknown keys, values of a wrong kind, or a file that cannot be read.
    """
    changed: dict[str, Any] = {}
    for change in changes:
        _change(changed, change)
    data = _merged(_read(config), changed)
    preset_name = data.pop("preset", None)
    changed.pop("preset", None)
    if preset_name is not None and str(preset_name) not in PRESETS:
        raise InvalidRequest(f"Unknown preset {preset_name!r}; choose one of {', '.join(PRESETS)}")
    clip, where = str(data.get("clip", BUNDLED)), Path(config).name
    base: dict[str, Any] = {}
    if preset_name is not None:
        preset = PRESETS[preset_name]
        # Volumes are learned from too, which nobody has windowed before, as the authors' pictures were.
        preprocess = replace(preset.preprocess, windows=dict(STANDARD_WINDOWS))
        base = {"detector": to_mapping(preset.detector), "preprocess": to_mapping(preprocess)}
    start = str(data.get("start", ""))
    if start:
        began = bundle_named(start)
        base = {
            "detector": to_mapping(began.manifest.detector),
            "preprocess": to_mapping(began.manifest.preprocess),
        }
    merged = _merged(base, data)
    if is_bundle(clip) and not start:
        donor = bundle_named(clip).manifest
        tower, shown = to_mapping(donor.detector.tower), to_mapping(donor.preprocess)
        merged = _merged(merged, {"detector": {"tower": tower}, "preprocess": shown})
        merged["preprocess"]["windows"] = shown["windows"]  # no others beside them
        merged = _merged(merged, changed)
    return from_mapping(Recipe, merged, where)


def is_bundle(clip: str) -> bool:
    """Whether a CLIP is to be taken out of a detector's folder."""
    try:
        return clip == BUNDLED or Path(clip).is_dir()
    except OSError:  # no name that a folder can have
        return False


def bundle_named(name: str) -> Bundle:
    """The bundled detector, or the one in a folder."""
    return Bundle.load(default_bundle_path() if name == BUNDLED else Path(name))


def with_object(recipe: Recipe, name: str) -> Recipe:
    """The recipe for a detector whose sentences call what the images show by this name."""
    if recipe.detector.text.name or recipe.detector.text.prompts == "coop":
        return recipe
    return replace(recipe, detector=replace(recipe.detector, text=replace(recipe.detector.text, name=name)))


def _read(config: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Settings of a recipe and of those below it; `above` are the files that stand on this one."""
    path = RECIPES / f"{config}.toml" if str(config) in _shipped_names() else Path(config)
    if above:
        path = above[-1].parent / path  # no more than `path` where that is absolute
    try:
        data = read_small_file(path, _LONGEST)
    except OSError as error:
        raise InvalidRequest(
            f"{config} is neither a file that can be read nor one of {', '.join(_shipped_names())}"
        ) from error
    if path.resolve() in above:
        raise InvalidRequest(f"{path.name} stands on itself; its base must be another recipe")
    kind, parse = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        settings = parse(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path.name} is not valid {kind}: {error}") from error
    if not isinstance(settings, dict):
        raise InvalidRequest(f"{path.name} holds no table of settings")
    base = settings.pop("base", None)
    return settings if base is None else _merged(_read(str(base), (*above, path.resolve())), settings)


def _shipped_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _change(data: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise InvalidRequest(f"{change!r} changes nothing; write key=value, as in optimisation.epochs=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    *tables, last = key.strip().split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise InvalidRequest(f"{change!r}: {table} is no table of settings")
    data[last] = value


def _merged(base: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `data` over those of `base`, table by table."""
    merged = dict(base)
    for key, value in data.items():
        below = merged.get(key)
        inside = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(below, value) if inside else value  # type: ignore[arg-type]
    return merged


def _known(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidRequest(f"{key} is {value!r}; choose one of {', '.join(known)}")


def _not_negative(table: str, values: object, *names: str) -> None:
    for name in names:
        if getattr(values, name) < 0:
            raise InvalidRequest(f"{table}.{name} is {getattr(values, name)}; it cannot be below 0")


def _share(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InvalidRequest(f"{key} is {value}; give a number from 0 to 1")
