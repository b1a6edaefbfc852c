"""Which CLIP a detector stands on, as data; importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BundleInvalid

ACTIVATIONS = ("gelu", "quick_gelu")
LARGEST = {
    **{"image_size": 2048, "conv_stem": 2**14, "channels": 2**14, "width": 2**14, "smoothing": 256},
    **{"length": 1024, "deep_length": 1024, "deep_depth": 256, "depth": 256, "blocks": 256},
    **{"levels": 10**5, "count": 10**4, "rows": 10**8},
}


@dataclass(frozen=True)
class TowerSpec:
    """Which CLIP, and how its vision tower is read.

    Attributes:
        model: open_clip model name, or one of this package's own `architectures`.
        image_size: side of the square input in pixels; the position grid is resized when it differs from the
            model's own.
        taps: 1-based transformer layers after which patch tokens are read, ascending.
        activation: "gelu" or "quick_gelu"; OpenAI's weights need "quick_gelu" (x · σ(1.702 x)).
        conv_stem: output channels of stride-2 3x3 convolutions that stand in place of the single patch
            projection; empty for that projection, as in the published models. A transformer trained from
            nothing on few images learns faster behind one (Xiao et al., Early Convolutions, NeurIPS 2021).
        text_activation: of the text tower; None for the same as the vision tower's.
        attention: False for a vision tower whose layers drop what attention computes and keep the rest, as
            MedVMAD's published code does.
    """

    model: str
    image_size: int
    taps: tuple[int, ...]
    activation: str = "gelu"
    conv_stem: tuple[int, ...] = ()
    text_activation: str | None = None
    attention: bool = True

    def __post_init__(self) -> None:
        for activation in (self.activation, self.text_activation or self.activation):
            if activation not in ACTIVATIONS:
                raise BundleInvalid(f"Unknown activation {activation!r}; choose one of {ACTIVATIONS}")
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 1:
            raise BundleInvalid(f"Taps must be ascending layer numbers from 1, not {self.taps}")
        if self.image_size < 1:
            raise BundleInvalid(f"The input size must be positive, not {self.image_size}")
        check_sizes(image_size=self.image_size, conv_stem=max(self.conv_stem, default=1))
        if min(self.conv_stem, default=1) < 1:
            raise BundleInvalid("Each convolution of a stem needs at least one channel")


def check_sizes(**sizes: float) -> None:
    """Refuse numbers of a detector that no network has, before anything of that size is made.

    Args:
        sizes: names of `LARGEST` and what a description says of them.

    Raises:
        BundleInvalid: one is larger.
    """
    for name, size in sizes.items():
        if size > LARGEST[name]:
            raise BundleInvalid(
                f"{name} of the detector is {size:g}; more than {LARGEST[name]:,} is not built"
            )
