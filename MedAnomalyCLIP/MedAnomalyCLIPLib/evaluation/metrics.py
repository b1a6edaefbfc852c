"""Figures of merit, from scikit-learn, at image and at pixel level."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import DependencyMissing


def ranking_figures(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve and average precision.

    Args:
        scores: (N,) higher is more anomalous.
        labels: (N,) bool.

    Returns:
        {"auroc": ..., "ap": ...}; empty when only one class is there.
    """
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError as error:
        raise DependencyMissing(
            "scikit-learn is not installed; install it with: pip install medanomalyclip[evaluation]"
        ) from error
    labels = np.asarray(labels, dtype=bool)
    if labels.all() or not labels.any():
        return {}
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "ap": float(average_precision_score(labels, scores)),
    }


def pixel_figures(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> dict[str, float]:
    """The same over the pixels of all images together; maps and masks (H, W), each pair of one size."""
    scores = np.concatenate([m.ravel() for m in maps])
    return ranking_figures(scores, np.concatenate([m.ravel() for m in masks]))


def best_f1_threshold(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """The threshold with the highest F1 (Dice) over the pixels of all images together, in steps of 0.01."""
    scores = np.concatenate([m.ravel() for m in maps])
    labels = np.concatenate([m.ravel() for m in masks]).astype(bool)
    edges = np.linspace(0, 1, 101)
    hits = np.histogram(scores[labels], edges)[0][::-1].cumsum()[::-1]
    called = np.histogram(scores, edges)[0][::-1].cumsum()[::-1]
    f1 = 2 * hits / np.maximum(called + labels.sum(), 1)
    return float(edges[int(np.argmax(f1))])
