"""How far figures would move with other images of the same kind: a seeded, stratified bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

LEVEL = 0.95
_FEWEST_UNITS = 10

_TOGETHER = 100

Interval = tuple[float, float]
FiguresOfDraws = Callable[[np.ndarray], dict[str, np.ndarray]]


def resampling_weights(
    labels: np.ndarray,
    clusters: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    *,
    draws: int,
    seed: int,
) -> np.ndarray | None:
    """How often each image is taken in each draw.

    Whole clusters are drawn where images have one, single images where they have none, with replacement, as
    many as there are; normal, abnormal and mixed ones apart, so that every draw has both classes.

    Args:
        labels: (N,) bool.
        clusters: patient or group of each image, empty where there is none.
        groups: images of different groups are drawn apart too, for example those of different sets.
        draws: D.
        seed: of the draws.

    Returns:
        (D, N) whole numbers; None when there are fewer than ten units to draw from, as with a single patient:
        an interval would mean nothing.
    """
    count = len(labels)
    names = [
        (group, cluster or index)
        for index, cluster, group in zip(
            range(count), clusters or [""] * count, groups or [""] * count, strict=True
        )
    ]
    units = {name: number for number, name in enumerate(dict.fromkeys(names))}
    unit_of = np.array([units[name] for name in names])
    sick, well = (np.bincount(unit_of, weights=part) > 0 for part in (labels, ~np.asarray(labels, bool)))
    kinds = [(group, bool(s), bool(w)) for (group, _), s, w in zip(units, sick, well, strict=True)]
    rng = np.random.default_rng(seed)
    taken = np.ones((draws, len(units)))
    varying = 0
    for kind in dict.fromkeys(kinds):
        members = np.flatnonzero([k == kind for k in kinds])
        varying += len(members) if len(members) > 1 else 0
        taken[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), draws)
    return taken[:, unit_of] if draws and varying >= _FEWEST_UNITS else None


def figures_in_parts(figures: FiguresOfDraws, weights: np.ndarray) -> dict[str, np.ndarray]:
    """(D,) figures of (D, N) draws, computed for a few draws at a time to bound memory."""
    parts = [figures(weights[start : start + _TOGETHER]) for start in range(0, len(weights), _TOGETHER)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def intervals(figures: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """Percentile interval of each figure over its draws; draws where it is not defined are left out."""
    tails = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)
    found = {}
    for name, values in figures.items():
        defined = values[np.isfinite(values)]
        if defined.size:
            low, high = np.percentile(defined, tails)
            found[name] = (float(low), float(high))
    return found
