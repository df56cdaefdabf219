# SPDX-License-Identifier: Apache-2.0
"""The area under the ROC curve: the chance that a positive event is scored above a negative one, ties
counting half.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Exact, through ranks (Mann and Whitney): tied scores share the mean of the ranks they take up. NaN for
    a single class.
    """
    positive, scores = np.asarray(labels) > 0.5, np.asarray(scores)
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(size)
    ranks = (last - (size - 1) / 2)[group]
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_in_windows(labels: ArrayLike, scores: ArrayLike, windows: int) -> tuple[list[int], list[float]]:
    """Cut the events, as they came, into windows of equal size: where each ends, and the AUC inside it."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    edges = np.linspace(0, len(labels), windows + 1).astype(int)
    return [int(edge) for edge in edges[1:]], [auc(labels[a:b], scores[a:b]) for a, b in pairwise(edges)]
