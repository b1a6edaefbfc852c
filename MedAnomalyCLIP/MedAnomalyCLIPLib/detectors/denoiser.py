"""Diffusion in token space: tapped patch tokens, taken as slightly noisy, are denoised in a few steps.

One small network for each tap learns, from the tokens of training images, to tell noise from token. It is
DiffusionCLIP's abstract made real (EAAI 161, 112181, 2025: CLIP features of several levels, progressively
denoised); the code released with that paper adds no noise and removes none, see `stream.GatedFusion`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip.towers import TappedTokens
from ..errors import InvalidRequest
from .specification import DenoiserSpec

HEADS = 4
SMALLEST_SPREAD = 1e-3  # of a channel; smaller ones are rounded to nothing in a stored detector


class NoiseSchedule(nn.Module):
    """How much of a token each noise level leaves, x_t = signal_t x_0 + noise_t ε (Ho et al., DDPM, 2020).

    The square of `signal` is the ᾱ_t of the literature, the product of 1 - β up to level t; level 0 is clean.

    Args:
        kind: "linear", β from 1e-4 to 0.02 over 1000 levels, scaled for other numbers (Ho et al.); "cosine",
            ᾱ falls like a squared cosine (Nichol & Dhariwal, ICML 2021).
        levels: T.

    Attributes:
        signal, noise: (T + 1,); made from the arguments, never stored, since half precision would ruin them.
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, kind: str, levels: int) -> None:
        super().__init__()
        if kind == "linear":
            beta = torch.linspace(1e-4, 0.02, levels, dtype=torch.float64) * (1000 / levels)
        else:
            angle = (torch.linspace(0, 1, levels + 1, dtype=torch.float64) + 0.008) / 1.008 * (math.pi / 2)
            kept = angle.cos() ** 2
            beta = 1 - kept[1:] / kept[:-1]
        kept = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta.clamp(max=0.999)).cumprod(0)])
        self.register_buffer("signal", kept.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - kept).sqrt().float(), persistent=False)

    def noised(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Tokens (B, N, D) with noise of the same shape mixed in, each image at its level (B,)."""
        return self.signal[level, None, None] * clean + self.noise[level, None, None] * noise

    def step(self, tokens: Tensor, noise: Tensor, level: int, lower: int) -> Tensor:
        """One deterministic step of DDIM (Song et al., ICLR 2021, eq. 12 with σ = 0).

        Args:
            tokens: (B, N, D) at `level`.
            noise: (B, N, D), what is believed to be the noise in them.
            level, lower: where from and where to.
        """
        clean = (tokens - self.noise[level] * noise) / self.signal[level]
        return self.signal[lower] * clean + self.noise[lower] * noise


class NoiseBlock(nn.Module):
    """Neighbours, text and channels mixed, one after the other, each added to what came in.

    A 3 x 3 depthwise convolution lets a token see its eight neighbours, whose noise is not its own. Reach is
    kept that short on purpose: with the whole image in view, a network that learned mostly from healthy
    tissue could explain a small lesion away.

    Shapes:
        hidden: (B, N, W), N = h * w; condition: (B, W); text: (B, 2, W).
        returns: (B, N, W).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.modulation = nn.Linear(width, 4 * width)
        self.neighbours = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, condition: Tensor, text: Tensor, grid: tuple[int, int]) -> Tensor:
        scale_near, shift_near, scale, shift = self.modulation(condition)[:, None].chunk(4, dim=-1)
        near = self.norms[0](hidden) * (1 + scale_near) + shift_near
        hidden = hidden + self.neighbours(near.mT.unflatten(2, grid)).flatten(2).mT
        hidden = hidden + self._read(self.norms[1](hidden), text)
        return hidden + self.channels(self.norms[2](hidden) * (1 + scale) + shift)

    def _read(self, hidden: Tensor, text: Tensor) -> Tensor:
        """Cross-attention: each token takes from the normal and the abnormal text what is like it."""
        query, key, value = (
            t.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for t in (self.query(hidden), self.key(text), self.value(text))
        )
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class NoisePredictor(nn.Module):
    """The ε-network of one tap: the noise in standardised tokens, from a bottleneck and a gain per channel.

    Noise fills all D channels, and the bottleneck has room for W; so a gain on each channel, which depends on
    level and image, goes past it, and the bottleneck adds what channels hold together. Both start at zero:
    an untrained network sees no noise.

    Shapes:
        tokens: (B, N, D), noisy, N = h * w; level: (B,); pooled: (B, E); text: (B, 2, E).
        returns: (B, N, D).
    """

    def __init__(self, width: int, embed_dim: int, bottleneck: int, blocks: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        self.level = nn.Sequential(
            nn.Linear(bottleneck, bottleneck), nn.SiLU(), nn.Linear(bottleneck, bottleneck)
        )
        self.image = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, bottleneck))
        self.text = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, bottleneck))
        self.classes = nn.Parameter(0.02 * torch.randn(2, bottleneck))  # attention alone knows no order
        self.blocks = nn.ModuleList(NoiseBlock(bottleneck) for _ in range(blocks))
        self.norm = nn.LayerNorm(bottleneck)
        self.gain = nn.Linear(bottleneck, width)
        for last in (self.up, self.gain):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, tokens: Tensor, level: Tensor, pooled: Tensor, text: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        hidden = self.down(tokens)
        condition = F.silu(self.level(sinusoids(level, hidden.shape[-1])) + self.image(pooled))
        hidden = hidden + grid_positions(grid, hidden.shape[-1], hidden.device)
        words = self.text(text) + self.classes
        for block in self.blocks:
            hidden = block(hidden, condition, words, grid)
        return self.gain(condition)[:, None] * tokens + self.up(self.norm(hidden))


class Denoiser(nn.Module):
    """A diffusion model for each tap, on the tokens that the tower gives.

    Standardised tokens z are taken as clean ones plus noise of the start level: signal · z is what the
    forward process makes of a clean token at that level, in mean. From there K deterministic DDIM steps lead
    down to level 0. With K = 0, tokens are handed back as they came; an untrained denoiser changes them only
    in the rounding, since where no noise is seen, every step keeps z.

    What the maps lose sends no gradient into the networks: they learn from `loss` alone. Trained by both,
    they stopped telling noise from token (their loss stayed at 1) and became layers like any other. For the
    gradient of tokens, noise is a constant.

    Attributes:
        mean, spread: (L, D) of the training tokens, by which channels are brought to one scale.

    Shapes:
        tokens: `TappedTokens`; text: (2, E) or (B, 2, E).
        returns: `TappedTokens` with other patches.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, spec: DenoiserSpec, taps: int, width: int, embed_dim: int) -> None:
        super().__init__()
        self.start = spec.start
        self.path = [round(spec.start * left / max(spec.steps, 1)) for left in range(spec.steps, -1, -1)]
        self.schedule = NoiseSchedule(spec.schedule, spec.levels)
        self.predictors = nn.ModuleList(
            NoisePredictor(width, embed_dim, spec.width, spec.blocks) for _ in range(taps)
        )
        self.register_buffer("mean", torch.zeros(taps, width))
        self.register_buffer("spread", torch.ones(taps, width))

    def forward(self, tokens: TappedTokens, text: Tensor) -> TappedTokens:
        if len(self.path) == 1:
            return tokens
        pooled, text = _conditions(tokens, text)
        patches = []
        for predict, z, mean, spread in self._standardised(tokens.patches):
            x = self.schedule.signal[self.start] * z
            for level, lower in itertools.pairwise(self.path):
                levels = torch.full((len(x),), level, device=x.device)
                with torch.no_grad():
                    noise = predict(x, levels, pooled, text, tokens.grid)
                x = self.schedule.step(x, noise, level, lower)
            patches.append(x * spread + mean)
        return tokens._replace(patches=tuple(patches))

    def loss(self, tokens: TappedTokens, text: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared error of the predicted noise over taps: about 1 for a network that sees none.

        Levels are drawn from those up to the start, the only ones that are ever used. Tokens and text get no
        gradient: they would learn to be easily denoised.

        Args:
            tokens: as the tower gave them.
            text: (2, E) or (B, 2, E).
            generator: of levels and noise; one on the CPU gives the same on every device.
        """
        pooled, text = (condition.detach() for condition in _conditions(tokens, text))
        terms = []
        for predict, z, _, _ in self._standardised([own.detach() for own in tokens.patches]):
            level, noise = (drawn.to(z.device) for drawn in self._draw(z.shape, generator))
            noisy = self.schedule.noised(z, noise, level)
            terms.append(F.mse_loss(predict(noisy, level, pooled, text, tokens.grid), noise))
        return torch.stack(terms).mean()

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[TappedTokens]) -> None:
        """Take each channel's mean and spread from training tokens, in place of those before.

        Args:
            batches: read once; the same batches give the same numbers.

        Raises:
            InvalidRequest: there are no tokens.
        """
        count = 0
        total = torch.zeros(2, *self.mean.shape, dtype=torch.float64)
        for tokens in batches:
            flat = torch.stack([own.detach().flatten(0, 1) for own in tokens.patches]).cpu().double()
            total += torch.stack([flat.sum(1), flat.square().sum(1)])
            count += flat.shape[1]
        if not count:
            raise InvalidRequest("Tokens of at least one image are needed to learn their mean and spread")
        mean, square = total / count
        self.mean.copy_(mean)
        self.spread.copy_((square - mean.square()).clamp(min=SMALLEST_SPREAD**2).sqrt())

    def _draw(self, shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A level for each image, (B,), and noise (B, N, D), where the generator lives."""
        device = generator.device
        level = torch.randint(1, self.start + 1, shape[:1], generator=generator, device=device)
        return level, torch.randn(shape, generator=generator, device=device)

    def _standardised(self, patches: Sequence[Tensor]) -> Iterator[tuple[nn.Module, Tensor, Tensor, Tensor]]:
        """For each tap its network, tokens on one scale (B, N, D), and the mean and spread they had."""
        for predict, own, mean, spread in zip(self.predictors, patches, self.mean, self.spread, strict=True):
            yield predict, (own.float() - mean) / spread, mean, spread


def sinusoids(values: Tensor, width: int) -> Tensor:
    """(n,) numbers as (n, width) sines and cosines of falling frequency (Vaswani et al., 2017)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=values.device) * (-math.log(10_000) / half))
    angles = values[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def grid_positions(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(h * w, width) encoding of row and column, half of the width each; rows first."""
    rows, columns = (sinusoids(torch.arange(side, device=device), width // 2) for side in grid)
    return torch.cat([rows.repeat_interleave(grid[1], dim=0), columns.repeat(grid[0], 1)], dim=1)


def _conditions(tokens: TappedTokens, text: Tensor) -> tuple[Tensor, Tensor]:
    """Image feature (B, E) and text (B, 2, E) of each image."""
    pooled = tokens.pooled.float()
    return pooled, text.float().expand(len(pooled), -1, -1)
