"""CLIP towers from open_clip: a vision transformer whose patch tokens are tapped, and its text side.

A `TowerSpec` in, modules out. No weights are fetched unless `load_clip` is told to download.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..downloads import downloads_folder
from ..errors import BundleInvalid, InvalidRequest, UnreadableImage
from .importing import import_open_clip
from .specification import TowerSpec
from .weights import read_clip_state

ARCHITECTURES = Path(__file__).parent / "architectures"

Inject = Callable[[int, Tensor], Tensor]


class TappedTokens(NamedTuple):
    """What a vision tower gives for B images.

    Attributes:
        patches: for each tap (B, N, D), N = h * w, rows first.
        classes: for each tap (B, D), the class token.
        pooled: (B, E) image features in the space shared with text, not normalised.
        grid: (h, w).
    """

    patches: tuple[Tensor, ...]
    classes: tuple[Tensor, ...]
    pooled: Tensor
    grid: tuple[int, int]


class ConvStem(nn.Sequential):
    """Stride-2 convolutions that turn an image into patch embeddings.

    Shapes:
        images: (B, 3, S, S).
        returns: (B, D, S / 2**n, S / 2**n) for n stages.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        layers: list[nn.Module] = []
        previous = 3
        for count in channels:
            layers += [
                nn.Conv2d(previous, count, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(count),
                nn.GELU(),
            ]
            previous = count
        layers.append(nn.Conv2d(previous, width, 1))
        super().__init__(*layers)


class TappedClipViT(nn.Module):
    """An open_clip vision transformer that also returns the tokens of chosen layers.

    With no injection its pooled output equals open_clip's own forward. Images of another size than the
    tower's own make another grid of patches, to which the positions are fitted.

    Shapes:
        images: (B, 3, S, S), normalised as the model expects, S a multiple of the patch size.
        returns: `TappedTokens`.
    """

    visual: Any

    def __init__(self, visual: Any, taps: Sequence[int], *, attention: bool = True) -> None:
        super().__init__()
        if not hasattr(visual, "transformer") or not hasattr(visual, "_embeds"):
            raise BundleInvalid("Only open_clip's vision transformers can be tapped, not its other towers")
        depth = len(visual.transformer.resblocks)
        if taps[-1] > depth:
            raise BundleInvalid(f"Tap {taps[-1]} lies beyond the tower's {depth} layers")
        self.visual = visual
        self.taps = tuple(taps)
        self.attention = attention

    @property
    def width(self) -> int:
        """D, the width of the tokens."""
        return int(self.visual.positional_embedding.shape[1])

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the patches."""
        height, width = self.visual.grid_size
        return int(height), int(width)

    @property
    def embed_dim(self) -> int:
        """E, the size of the space shared with text."""
        return int(self.visual.output_dim)

    def forward(self, images: Tensor, inject: Inject | None = None) -> TappedTokens:
        """Run the tower.

        Args:
            images: (B, 3, S, S).
            inject: called as inject(layer, tokens) with (B, 1 + N, D) tokens, before the first layer as layer
                0, then after every layer. What it returns goes on into the next layer, and is what a tap at
                this layer reads; tokens that it appends behind the patches are never read.
        """
        tokens, grid = self._embed(images)
        height, width = grid
        if inject is not None:
            tokens = inject(0, tokens)
        patches, classes = [], []
        for layer, block in enumerate(self.visual.transformer.resblocks, start=1):
            tokens = block(tokens) if self.attention else tokens + block.ls_2(block.mlp(block.ln_2(tokens)))
            if inject is not None:
                tokens = inject(layer, tokens)
            if layer in self.taps:
                classes.append(tokens[:, 0])
                patches.append(tokens[:, 1 : 1 + height * width])
        pooled, _ = self.visual._pool(tokens)
        if self.visual.proj is not None:
            pooled = pooled @ self.visual.proj
        return TappedTokens(tuple(patches), tuple(classes), pooled, grid)

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, 1 + N, D) tokens in front of the first layer, and their grid (h, w)."""
        visual = self.visual
        patches = visual.conv1(images)
        grid = (int(patches.shape[2]), int(patches.shape[3]))
        first = visual.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches.flatten(2).mT], dim=1)
        positions = visual.positional_embedding
        if grid != self.grid:
            positions = resize_positions(positions, grid)
        return visual.ln_pre(visual.patch_dropout(tokens + positions.to(tokens.dtype))), grid


def model_config(spec: TowerSpec) -> dict[str, Any]:
    """open_clip's configuration of a model, with the spec's input size.

    Raises:
        BundleInvalid: open_clip knows no such model.
    """
    config = _registered_config(spec.model)
    config["vision_cfg"]["image_size"] = spec.image_size
    config["quick_gelu"] = spec.activation == "quick_gelu"
    return config


def _registered_config(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model as it was trained."""
    open_clip = import_open_clip()
    if model not in open_clip.list_models():
        open_clip.add_model_config(ARCHITECTURES)
    config = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if config is None:
        raise BundleInvalid(
            f"open_clip {open_clip.__version__} knows no model named {model!r}; "
            "upgrade open_clip_torch, or correct the name"
        )
    return config


def patch_grid(spec: TowerSpec) -> tuple[int, int]:
    """(h, w) of a tower's patches, told without building it."""
    side = spec.image_size // int(model_config(spec)["vision_cfg"]["patch_size"])
    return side, side


def create_clip(spec: TowerSpec) -> nn.Module:
    """Both towers of a CLIP with random weights, as open_clip builds them.

    Raises:
        BundleInvalid: the model is unknown, or of a family other than CLIP's two plain towers.
    """
    open_clip = import_open_clip()
    config = model_config(spec)
    config.pop("custom_text", None)
    try:
        clip = open_clip.CLIP(**config)
    except TypeError as error:
        raise BundleInvalid(f"{spec.model} is not a plain CLIP with two towers ({error})") from error
    _put_stem(clip.visual, spec)
    if spec.text_activation is not None:
        quick = spec.text_activation == "quick_gelu"
        for block in clip.transformer.resblocks:
            block.mlp.gelu = open_clip.transformer.QuickGELU() if quick else nn.GELU()
    return clip.eval()


def create_text_tower(spec: TowerSpec) -> nn.Module:
    """The text tower alone, with random weights, for detectors whose text an image takes part in."""
    clip = create_clip(spec)
    del clip.visual, clip.logit_scale
    return clip


def text_side(clip: nn.Module) -> dict[str, Tensor]:
    """State of a CLIP without its vision tower."""
    return {key: value for key, value in clip.state_dict().items() if not key.startswith("visual.")}


def create_vision_tower(spec: TowerSpec) -> TappedClipViT:
    """The vision tower alone, with random weights: what inference needs."""
    config = model_config(spec)
    import_open_clip()
    from open_clip.model import _build_vision_tower  # the only way past the text tower's memory

    visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config["quick_gelu"])
    _put_stem(visual, spec)
    return TappedClipViT(visual, spec.taps, attention=spec.attention).eval()


def _put_stem(visual: Any, spec: TowerSpec) -> None:
    if spec.conv_stem:
        patch = int(visual.patch_size[0])
        if 2 ** len(spec.conv_stem) != patch:
            raise BundleInvalid(f"A stem of {len(spec.conv_stem)} stages does not make patches of {patch} px")
        visual.conv1 = ConvStem(spec.conv_stem, int(visual.positional_embedding.shape[1]))


def load_clip(spec: TowerSpec, weights: Path | str, *, download: bool = False) -> nn.Module:
    """A pretrained CLIP.

    Args:
        spec: the model; its input size may differ from the one the weights were trained at.
        weights, download: see `find_clip_file`.

    Raises:
        InvalidRequest: a tag was named without allowing the download.
        UnreadableImage, BundleInvalid: the file is missing, or does not fit the model.
    """
    path = find_clip_file(spec, weights, download=download)
    return clip_with_state(spec, read_clip_state(path), path.name)


def find_clip_file(spec: TowerSpec, weights: Path | str, *, download: bool = False) -> Path:
    """The file of a pretrained CLIP.

    Args:
        spec: the model.
        weights: a local file in any format that `weights.read_weights` knows, OpenAI's among them, or the
            name of one of open_clip's pretrained tags, for example "openai".
        download: allow open_clip to fetch the weights of a tag over the network, into a folder of our own
            (`downloads.downloads_folder`), where they are found the next time.

    Raises:
        InvalidRequest: there is no such file, and no tag may be fetched, or none of this name is known.
        UnreadableImage: fetching failed.
    """
    path = Path(weights)
    if path.is_file():
        return path
    if not download:
        raise InvalidRequest(
            f"{weights} is not a file. If it is the name of pretrained weights of {spec.model}, "
            "allow the download explicitly"
        )
    config = _pretrained_config(spec, str(weights))
    try:
        folder = downloads_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return Path(import_open_clip().download_pretrained(config, cache_dir=str(folder)))
    except (OSError, ValueError, RuntimeError) as error:  # of urllib and of Hugging Face's client
        raise UnreadableImage(
            f"The {weights} weights of {spec.model} could not be fetched: {error}"
        ) from error


def pretrained_source(spec: TowerSpec, tag: str) -> str:
    """What would be fetched for a tag, how much at most, and from where.

    Raises:
        InvalidRequest: open_clip knows no such tag of the model.
    """
    config = _pretrained_config(spec, tag)
    hub = config.get("hf_hub", "").rstrip("/")
    from_hub = hub and (importlib.util.find_spec("huggingface_hub") or not config.get("url"))
    with torch.device("meta"):
        size = sum(4 * weight.numel() for weight in create_clip(spec).parameters())
    place = f"huggingface.co/{hub}" if from_hub else config["url"]  # OpenAI's names its SHA-256
    return f"{tag} weights of {spec.model}, about {size / 1e6:.0f} MB, from {place}"


def _pretrained_config(spec: TowerSpec, tag: str) -> dict[str, Any]:
    open_clip = import_open_clip()
    config = open_clip.get_pretrained_cfg(spec.model, tag)
    if not config:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(spec.model)) or "none"
        raise InvalidRequest(f"open_clip has no weights {tag!r} for {spec.model}; it has: {known}")
    return config


def clip_with_state(spec: TowerSpec, state: dict[str, Tensor], name: str) -> nn.Module:
    """Both towers with given weights, whose grid of positions is fitted to the spec's input size.

    Args:
        spec: the model.
        state: its weights under open_clip's names.
        name: of their file, for messages.

    Raises:
        BundleInvalid: they are another model's.
    """
    clip: Any = create_clip(spec)
    state = dict(state)
    key = "visual.positional_embedding"
    if key in state:
        state[key] = resize_positions(state[key], clip.visual.grid_size)
    try:
        clip.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise BundleInvalid(f"The weights in {name} do not fit {spec.model}: {error}") from error
    return clip


def check_trained_size(spec: TowerSpec, state: Mapping[str, Tensor], name: str) -> None:
    """Refuse weights of a model that was trained at another input size, and has the same shapes in all else.

    Raises:
        BundleInvalid: the grid of positions is not the one that the spec's model was trained with.
    """
    vision = _registered_config(spec.model)["vision_cfg"]
    patches = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2
    found = len(state.get("visual.positional_embedding", ())) - 1
    if found != patches:
        raise BundleInvalid(
            f"{name} has positions for {max(found, 0)} patches, not the {patches} of {spec.model}, which was "
            f"trained at {vision['image_size']} px; choose the weights of {spec.model}"
        )


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings for another patch grid.

    Shapes:
        positions: (1 + N, D), class token first, N a square number.
        returns: (1 + h * w, D).
    """
    side = round((positions.shape[0] - 1) ** 0.5)
    if (side, side) == tuple(grid):
        return positions
    patches = positions[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", antialias=True, align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(positions.dtype)
    return torch.cat([positions[:1], patches])
