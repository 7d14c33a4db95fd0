"""Which items hang together: the one place that decides it, so that no two estimators can differ."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Groups:
    """codes: int array [n], the group of each item, 0 to count - 1. named: whether any cluster was given."""

    codes: np.ndarray
    count: int
    named: bool

    @property
    def reported(self) -> int | None:
        """What an Estimate says as n_clusters."""
        return self.count if self.named else None

    @property
    def suffix(self) -> str:
        """What an interval's method ends in: nothing when every item stands for itself."""
        return "" if self.count == len(self.codes) else "_clustered"

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of `values` [n] in each group: [count]."""
        return np.bincount(self.codes, weights=values, minlength=self.count)


def group(clusters: Sequence[Hashable | None] | None, n: int) -> Groups:
    """Groups of n items. An item without a cluster (None) stands for itself.

    Raises ValueError when `clusters` does not have one entry per item.
    """
    if clusters is None:
        return Groups(np.arange(n), n, named=False)
    if len(clusters) != n:
        raise ValueError(f"{n} items but {len(clusters)} clusters: give one cluster (or None) per item")
    seen: dict[object, int] = {}
    codes = np.empty(n, dtype=np.intp)
    for index, cluster in enumerate(clusters):
        # The key of an item on its own cannot be equal to a caller's cluster name.
        key = (cluster,) if cluster is not None else index
        codes[index] = seen.setdefault(key, len(seen))
    return Groups(codes, len(seen), named=any(cluster is not None for cluster in clusters))
