"""What is the mean of several tasks' scores?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval_platform.tasks.lock import GroupMean
from eval_platform.tasks.scoring_keys import score_name


@dataclass(frozen=True, slots=True)
class Cell:
    """One number: what `values.Score` says of it."""

    value: float | None
    standard_error: float | None
    ci_low: float | None
    ci_high: float | None
    n: int


def mean_cell(cells: Sequence[Cell | None], sizes: Sequence[int] | None = None) -> Cell | None:
    """The mean, weighed by `sizes` (None: each counts the same); None unless all are there.

    The standard error is that of a weighted mean of independent numbers whose weights are fixed: the root of the sum
    of (w_k s_k)^2, with weights that add up to 1.
    """
    there = [cell for cell in cells if cell is not None and cell.value is not None]
    if not there or len(there) < len(cells):
        return None
    given = [1] * len(there) if sizes is None else sizes
    total = math.fsum(given)
    weights = [size / total for size in given]
    errors = [cell.standard_error for cell in there if cell.standard_error is not None]
    return Cell(
        value=math.fsum(weight * (cell.value or 0.0) for weight, cell in zip(weights, there, strict=True)),
        standard_error=math.hypot(*(weight * error for weight, error in zip(weights, errors, strict=True)))
        if len(errors) == len(there)
        else None,
        ci_low=None,
        ci_high=None,
        n=sum(cell.n for cell in there),
    )


def group_means(
    means: Sequence[GroupMean],
    names: Mapping[str, Sequence[str]],
    scores: Mapping[str, Mapping[str, Cell]],
) -> dict[str, Cell | None]:
    """Score -> the mean that a group of lm-evaluation-harness defines over its tasks.

    names: task -> the scores that it gives; scores: task -> its numbers, where there are any. As there
    (`api/group.py:Group.aggregate`), a task without the score is left out, and a task's size is the number of items
    that the fullest of its scores is of. Unlike there the mean is None while a task that gives the score has no number:
    a mean over whatever there is would compare nothing.
    """
    found: dict[str, Cell | None] = {}
    for mean in means:
        for score in _scores_of(mean, names):
            having = [task for task, given in names.items() if score in given]
            cells = [scores.get(task, {}).get(score) for task in having]
            sizes = [max((cell.n for cell in scores.get(task, {}).values()), default=0) for task in having]
            found[score] = mean_cell(cells, sizes if mean.by_size else None)
    return found


def _scores_of(mean: GroupMean, names: Mapping[str, Sequence[str]]) -> list[str]:
    """The scores that a mean is made of, by the names that they have here, and that some task gives."""
    given = sorted({score for scores in names.values() for score in scores})
    if mean.filters is None:
        return [score for score in given if score.partition(",")[0] == mean.metric]
    wanted = [score_name(mean.metric, one) for one in mean.filters]
    return [score for score in wanted if score in given]
