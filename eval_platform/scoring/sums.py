"""Scores of many items that are no mean over them: made of sums of the items' terms (`terms`)."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from eval_platform.scoring.overlap import corpus_score
from eval_platform.scoring.terms import terms_of
from eval_platform.statistics import Estimate, bootstrap_estimate, ratio_estimate
from eval_platform.statistics import estimate as why
from eval_platform.statistics.estimate import without_interval
from eval_platform.tasks.metrics import METRICS

_NOBODY = "no item counts"


def terms_estimate(metric: str, score: str, items: Sequence[Sequence[Mapping[str, Any]]]) -> Estimate:
    """The score of `items`, each the rows of its repeats (their terms are averaged).

    A sum over a sum has the interval of `ratio_estimate`; BLEU and chrF a bootstrap's, over items or clusters. n
    counts the items that have terms. The value is None when an item's is missing, or no item has terms.
    """
    of_items = [(rows[0]["cluster"], terms_of(score, rows)) for rows in items]
    counted = [(cluster, terms) for cluster, terms in of_items if terms is not None]
    clusters: list[Hashable | None] = [cluster for cluster, _ in counted]
    terms = [found for _, found in counted]
    if not terms or any(not found for found in terms):
        return without_interval(_NOBODY if not terms else why.MISSING, len(terms), None)
    if METRICS[metric].aggregation == "ratio":
        estimate = ratio_estimate([t[0] for t in terms], [t[1] for t in terms], clusters)
        of_nothing = METRICS[metric].of_nothing
        if estimate.value is None and of_nothing is not None and not any(t[1] for t in terms):
            return without_interval(_NOBODY, len(terms), estimate.n_clusters, value=of_nothing, standard_error=0.0)
        return estimate
    return bootstrap_estimate(_corpus_statistic(metric, np.array(terms)), len(terms), clusters)


def _corpus_statistic(metric: str, terms: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """terms: [items, k]. From counts of items, [replicates, items], to the score of each resample."""

    def statistic(counts: np.ndarray) -> np.ndarray:
        return np.array([corpus_score(metric, sums) for sums in (counts @ terms).tolist()])

    return statistic
