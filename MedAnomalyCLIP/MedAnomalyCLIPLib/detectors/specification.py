"""What a detector is made of, as data; importable without torch, so that a bundle can be checked anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..clip.phrases import ABNORMAL_PHRASES, NORMAL_PHRASES
from ..clip.specification import TowerSpec, check_sizes
from ..errors import BundleInvalid

ADAPTERS = ("linear", "two_heads")
PROMPTS = ("coop", "ensemble", "hybrid", "presets")
POSITIONS = ("before", "around", "after")
HEADS = ("segmentation", "detection")
PRECISIONS = ("float32", "float16")
FUSIONS = ("mean_then_softmax", "softmax_then_mean")
IMAGE_SCORES = ("max_map", "mean_map", "mean_patch", "class_and_clusters", "class_and_peak")
REMEMBERED = ("aligned", "tokens")
ENLARGED = ("logits", "probabilities")
RESIZES = ("grid", "line")
JOINS = ("zero", "norm")
SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class AdapterSpec:
    """How tapped tokens become features of the space shared with text.

    Attributes:
        kind: "linear", beside the stream; "two_heads", bottlenecks for map and score that also change the
            stream, see `adapters.TwoHeadAdapter`.
        residual: share of each head in the stream, for "two_heads".
        map_head: which head the map is made of; a detector that was trained on labels alone, without masks,
            has learned only "detection". Of no effect for "linear", whose heads are one.
        subdivisions: into how many rows and columns of features "linear" divides each patch.
    """

    kind: str = "linear"
    residual: float = 0.1
    map_head: str = "segmentation"
    subdivisions: int = 1

    def __post_init__(self) -> None:
        _known(self.kind, ADAPTERS)
        _known(self.map_head, HEADS)
        if not 0 <= self.residual <= 0.5:
            raise BundleInvalid(f"The residual share must lie in [0, 0.5], not at {self.residual}")
        if self.subdivisions < 1 or (self.subdivisions > 1 and self.kind != "linear"):
            raise BundleInvalid("Only linear adapters divide patches, into at least one part")


@dataclass(frozen=True)
class TextSpec:
    """Where the two text features come from.

    Attributes:
        prompts: "coop", phrases beside learnable vectors, see `clip.prompts`; "ensemble", hand-written
            sentences, see `clip.ensembles`. Both are the same for every image, and stored with the detector.
            "presets", sentences that both towers were trained with, about images of any kind and about each
            of the detector's presets; stored too. "hybrid", sentences into which deep vectors are written
            that the image takes part in, see `detectors.text`; such a detector has a text tower.
        normal, abnormal: phrases, for "coop".
        length: learnable vectors beside each phrase, for "coop".
        position: where they stand, "before", "around" or "after" the phrase.
        deep_depth: layers of the text tower that get vectors of their own, the prompt itself among them.
        deep_length: how many vectors overwrite words before each of the others.
        causal: whether a token sees only those before it, as CLIP was trained; MediCLIP's published code
            leaves the mask out.
        static, dynamic: whether vectors of "hybrid" have a part that is the same for every image, and one
            that the image's own feature gives.
        name: what the images show, as sentences of an ensemble call it.
        templates: how many of the 35 templates an ensemble uses.
    """

    prompts: str = "coop"
    normal: tuple[str, ...] = NORMAL_PHRASES
    abnormal: tuple[str, ...] = ABNORMAL_PHRASES
    length: int = 8
    position: str = "before"
    deep_depth: int = 1
    deep_length: int = 0
    causal: bool = True
    static: bool = True
    dynamic: bool = True
    name: str = ""
    templates: int = 35

    def __post_init__(self) -> None:
        _known(self.prompts, PROMPTS)
        _known(self.position, POSITIONS)
        if not self.normal or not self.abnormal or self.length < 1 or not 1 <= self.templates <= 35:
            raise BundleInvalid(
                "Prompts need phrases of both kinds and a learnable vector, an ensemble 1 to 35 templates"
            )
        if self.deep_depth < 1 or self.deep_length < 0:
            raise BundleInvalid("Deep prompts need a depth of at least 1 and no negative length")
        check_sizes(length=self.length, deep_depth=self.deep_depth, deep_length=self.deep_length)


@dataclass(frozen=True)
class VisualPromptSpec:
    """Prompts behind the patches of the vision tower's first layers, see `stream.HybridPrompts`.

    Attributes:
        length: how many.
        depth: for how many layers.
        static: whether they have a part that is learned and the same for every image.
        dynamic: whether they have a part that the image's own feature gives.
    """

    length: int = 5
    depth: int = 4
    static: bool = True
    dynamic: bool = True

    def __post_init__(self) -> None:
        if self.length < 1 or self.depth < 1 or not (self.static or self.dynamic):
            raise BundleInvalid("Visual prompts need a length, a depth, and to be static, dynamic or both")
        check_sizes(length=self.length, depth=self.depth)


@dataclass(frozen=True)
class FeatureFusionSpec:
    """Feature maps of another network that are let into the stream at the taps, see `stream.GatedFusion`.

    Attributes:
        channels: of the map for each tap.
        resize: "grid" or "line".
        join: "zero" or "norm".
    """

    channels: tuple[int, ...]
    resize: str = "grid"
    join: str = "zero"

    def __post_init__(self) -> None:
        _known(self.resize, RESIZES)
        _known(self.join, JOINS)
        check_sizes(channels=max(self.channels, default=1))
        if min(self.channels, default=1) < 1:
            raise BundleInvalid("A feature map needs at least one channel")


@dataclass(frozen=True)
class DenoiserSpec:
    """Diffusion in token space between the taps and their adapters, see `denoiser.Denoiser`.

    Attributes:
        steps: K, deterministic steps from the start level down to clean; 0 leaves tokens as they are.
        start: noise level that the tower's tokens are taken to have, of `levels`. Training covers the levels
            up to it; so `steps`, and a lower start, can be chosen afterwards.
        schedule: "linear" or "cosine".
        levels: T, noise levels of the schedule.
        width: of the network's bottleneck.
        blocks: of the network.
    """

    steps: int = 4
    start: int = 100
    schedule: str = "linear"
    levels: int = 1000
    width: int = 128
    blocks: int = 2

    def __post_init__(self) -> None:
        _known(self.schedule, SCHEDULES)
        if not 0 <= self.steps <= self.start or not 1 <= self.start <= self.levels:
            raise BundleInvalid(
                f"A denoiser starts at one of its {self.levels} levels, not at {self.start}, and takes at "
                f"most as many steps down, not {self.steps}"
            )
        if self.width < 4 or self.width % 4 or self.blocks < 1:
            raise BundleInvalid("A denoiser's width must be a multiple of 4, and it needs at least one block")
        check_sizes(levels=self.levels, width=self.width, blocks=self.blocks)


@dataclass(frozen=True)
class ClusterSpec:
    """How much of an image's feature the clusters of its most abnormal patches are, see `clusters`.

    Attributes:
        count: number of clusters.
        weight: of their mean; the class token's is 1 - weight.
    """

    count: int = 20
    weight: float = 0.2

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.weight <= 1:
            raise BundleInvalid("Clusters need a number above 0 and a weight in [0, 1]")
        check_sizes(count=self.count)


@dataclass(frozen=True)
class MemorySpec:
    """A memory of normal patches whose evidence is averaged with the text's.

    Attributes:
        rows: features kept for each tap.
        weight: of the memory's evidence; the text's is 1 - weight.
        class_token: whether class tokens are kept beside patches. MVFA's published code does so, although it
            never asks for one.
        precision: "float32", or "float16" to store the rows in half the space.
        features: what is kept: "aligned", what the map is made of (MVFA), or "tokens", what the tower gives,
            which knows more than normal and abnormal (PatchCore, Roth et al., CVPR 2022).
    """

    rows: int
    weight: float = 0.5
    class_token: bool = False
    precision: str = "float32"
    features: str = "aligned"

    def __post_init__(self) -> None:
        _known(self.precision, PRECISIONS)
        _known(self.features, REMEMBERED)
        if self.rows < 1 or not 0 <= self.weight <= 1:
            raise BundleInvalid("A memory needs at least one row and a weight in [0, 1]")
        check_sizes(rows=self.rows)


@dataclass(frozen=True)
class PresetSpec:
    """One kind of image that a detector has sentences of its own for.

    Attributes:
        name: short, as options and scripts write it, for example "brain-mr".
        title: as readers see it, for example "Brain, MR".
        modalities: families of the modality, as `records.modality_family` calls them.
        part: what the images show, as sentences call it.
        aliases: other words for the part, as headers and file names write it.
    """

    name: str
    title: str
    modalities: tuple[str, ...]
    part: str
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.name and self.title and self.part and self.modalities):
            raise BundleInvalid("A preset needs a name, a title, a modality and what the images show")


@dataclass(frozen=True)
class FamiliaritySpec:
    """What a detector remembers of the look of the images that it learned from, see `familiarity`.

    Attributes:
        rows: images kept.
    """

    rows: int

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise BundleInvalid("Familiarity needs at least one image")


@dataclass(frozen=True)
class DetectorSpec:
    """One detector as a row of configuration.

    Attributes:
        tower: the CLIP vision tower and its taps.
        scale: what cosines are multiplied with before the softmax, 1 / temperature.
        fusion: order of averaging over taps and softmax, see `scoring.anomaly_map`.
        image_score: how an image gets its score: "max_map" and "mean_map" of its map; "mean_patch", mean
            probability of its patches in the detection head; "class_and_clusters", probability of a feature
            made of its class token and of clusters of its most abnormal patches; "class_and_peak", that of
            a feature made of its class token and of the mean token of each tap, averaged with the highest
            value of the map.
        smoothing: sigma in network pixels of the Gaussian that smooths the map.
        adapter: what aligns tokens with text.
        text: what the text features are made from.
        memory: normal patches to compare with, if any.
        visual_prompts: prompts in the vision tower, if any.
        feature_fusion: feature maps from elsewhere, if any; they are handed in beside the images.
        clusters: numbers of "class_and_clusters".
        enlarged: what is brought from patches to pixels, see `scoring.anomaly_map`.
        denoiser: what tapped patch tokens pass before linear adapters, if anything.
        peak_weight: of the map's highest value in "class_and_peak"; the class token's is 1 - weight.
        presets: kinds of images with text features of their own; others are read with those for all.
        familiarity: what tells images that are unlike those it learned from, if anything.
    """

    tower: TowerSpec
    scale: float = 1 / 0.07
    fusion: str = "softmax_then_mean"
    image_score: str = "max_map"
    smoothing: float = 0.0
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    text: TextSpec = field(default_factory=TextSpec)
    memory: MemorySpec | None = None
    visual_prompts: VisualPromptSpec | None = None
    feature_fusion: FeatureFusionSpec | None = None
    clusters: ClusterSpec = field(default_factory=ClusterSpec)
    enlarged: str = "logits"
    denoiser: DenoiserSpec | None = None
    peak_weight: float = 0.5
    presets: tuple[PresetSpec, ...] = ()
    familiarity: FamiliaritySpec | None = None

    def __post_init__(self) -> None:
        _known(self.fusion, FUSIONS)
        _known(self.enlarged, ENLARGED)
        _known(self.image_score, IMAGE_SCORES)
        fused = self.feature_fusion
        if fused is not None and len(fused.channels) != len(self.tower.taps):
            raise BundleInvalid(f"There must be a feature map for each tap, not {len(fused.channels)} in all")
        if self.adapter.kind != "linear" and (fused or self.visual_prompts):
            raise BundleInvalid("Adapters in the stream go with no other change of it")
        if self.adapter.kind != "linear" and self.denoiser is not None:
            raise BundleInvalid(
                "A denoiser stands between taps and linear adapters; adapters in the stream leave it no place"
            )
        if self.memory is not None and self.memory.features == "tokens" and self.adapter.kind != "linear":
            raise BundleInvalid("Only beside linear adapters can a memory keep the tower's own tokens")
        if not 0 <= self.peak_weight <= 1:
            raise BundleInvalid(f"The weight of the peak must lie in [0, 1], not at {self.peak_weight}")
        if len({preset.name for preset in self.presets}) < len(self.presets):
            raise BundleInvalid("Two presets of the detector have the same name")
        if not self.scale > 0 or not self.smoothing >= 0:
            raise BundleInvalid("The detector's scale must be positive and its smoothing not negative")
        check_sizes(smoothing=self.smoothing)


def _known(value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise BundleInvalid(f"Unknown value {value!r} in the detector; choose one of {', '.join(known)}")
