"""Figures of merit of a ranking, from scikit-learn, and the pixel threshold with the best F1.

Scores and labels in, figures by name out: "auroc", "ap" (average precision), "f1max" (the best F1 that any
threshold reaches), "sensitivity" (at a specificity of `SPECIFICITY`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import DependencyMissing

Figures = dict[str, float]
Curve = tuple[np.ndarray, np.ndarray]

SPECIFICITY = 0.95
_ROUNDING = 1e-9  # of rates that are quotients of counts


def scikit_learn_metrics() -> Any:
    """The module `sklearn.metrics`.

    Raises:
        DependencyMissing: scikit-learn is not installed.
    """
    try:
        from sklearn import metrics
    except ImportError as error:
        raise DependencyMissing(
            "scikit-learn is not installed; install it with: pip install medanomalyclip[evaluation]"
        ) from error
    return metrics


def ranking_figures(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Figures:
    """Figures of one ranking.

    Args:
        scores: (N,) higher is more anomalous.
        labels: (N,) bool.
        weights: (N,) how often each counts; None for once.

    Returns:
        "auroc", "ap", "f1max" and "sensitivity"; empty when only one class is there.
    """
    sk = scikit_learn_metrics()
    labels = np.asarray(labels, dtype=bool)
    if labels.all() or not labels.any():
        return {}
    precision, recall, _ = sk.precision_recall_curve(labels, scores, sample_weight=weights)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    alarms, sensitivity, _ = sk.roc_curve(labels, scores, sample_weight=weights, drop_intermediate=False)
    return {
        "auroc": float(sk.roc_auc_score(labels, scores, sample_weight=weights)),
        "ap": float(sk.average_precision_score(labels, scores, sample_weight=weights)),
        "f1max": float(f1.max()),
        "sensitivity": float(sensitivity[alarms <= 1 - SPECIFICITY + _ROUNDING].max()),
    }


def ranking_figures_of_draws(
    hits: np.ndarray, alarms: np.ndarray, positives: np.ndarray, negatives: np.ndarray
) -> dict[str, np.ndarray]:
    """The figures of `ranking_figures` for many draws at once, which scikit-learn takes one by one.

    Args:
        hits: (D, T) positives at or above each of T descending thresholds, in each of D draws.
        alarms: (D, T) likewise negatives.
        positives: (D,) all of them; negatives: (D,) likewise.

    Returns:
        (D,) values by name; not a number where a draw lacks a class.
    """
    all_hits, all_alarms = positives[:, None], negatives[:, None]
    new_hits = np.diff(hits, axis=1, prepend=0)
    new_alarms = np.diff(alarms, axis=1, prepend=0)
    specific = alarms <= (1 - SPECIFICITY + _ROUNDING) * all_alarms
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(hits > 0, hits / (hits + alarms), 0)
        return {
            "auroc": (new_alarms * (hits - new_hits / 2)).sum(axis=1) / (positives * negatives),
            "ap": (new_hits * precision).sum(axis=1) / positives,
            "f1max": (2 * hits / (hits + alarms + all_hits)).max(axis=1),
            "sensitivity": np.where(specific, hits, 0).max(axis=1) / positives,
        }


def ranking_curves(scores: np.ndarray, labels: np.ndarray) -> dict[str, Curve]:
    """(x, y) of "roc" (false alarm rate, sensitivity) and "pr" (recall, precision) of one ranking."""
    sk = scikit_learn_metrics()
    alarms, sensitivity, _ = sk.roc_curve(labels, scores)
    precision, recall, _ = sk.precision_recall_curve(labels, scores)
    return {"roc": (alarms, sensitivity), "pr": (recall[::-1], precision[::-1])}


def best_f1_threshold(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """The threshold with the highest F1 (Dice) over the pixels of all images together, in steps of 0.01."""
    scores = np.concatenate([m.ravel() for m in maps])
    labels = np.concatenate([m.ravel() for m in masks]).astype(bool)
    edges = np.linspace(0, 1, 101)
    hits = np.histogram(scores[labels], edges)[0][::-1].cumsum()[::-1]
    called = np.histogram(scores, edges)[0][::-1].cumsum()[::-1]
    f1 = 2 * hits / np.maximum(called + labels.sum(), 1)
    return float(edges[int(np.argmax(f1))])
