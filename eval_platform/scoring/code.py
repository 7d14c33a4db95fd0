"""Do a model's programs do what they should? pass@k, from the verdicts of the sandbox."""

from collections.abc import Mapping, Sequence
from math import comb

from eval_platform.sandbox import Program, Verdict
from eval_platform.tasks.programs import program_text
from eval_platform.tasks.task import Task
from eval_platform.values import Item


def program_of(task: Task, item: Item, completion: str) -> Program:
    """The program of one completion, tests included, with the task's time to run."""
    assert task.definition.code is not None
    return Program(program_text(task, item.document, completion), task.definition.code.timeout)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k completions passes, where c of n did: unbiased, 1 - C(n-c, k) / C(n, k).

    Chen et al. 2021 (arXiv:2107.03374), equation 1. In whole numbers until the last division, so exactly rounded.
    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} completions, {c} of which pass, is not defined")
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def pass_columns(metrics: Sequence[str], verdicts: Sequence[Verdict]) -> list[dict[str, float]]:
    """For each completion of an item, by metric, what its sample carries; `aggregate` takes the mean of an item's.

    pass@1 is every completion's own verdict, 1 or 0, whose mean over n completions is the estimate. A pass@k with
    k > 1 belongs to all of them together: the item's estimate stands with the first.
    """
    passed = [verdict.passed for verdict in verdicts]
    columns: list[dict[str, float]] = [{} for _ in passed]
    for metric in metrics:
        k = int(metric.removeprefix("pass@"))
        if k == 1:
            for column, own in zip(columns, passed, strict=True):
                column[metric] = float(own)
        else:
            columns[0][metric] = pass_at_k(len(passed), sum(passed), k)
    return columns


def shown(verdict: Verdict) -> str:
    """The verdict as a sample carries it: the reason, and what was raised."""
    return f"{verdict.reason}: {verdict.detail}" if verdict.detail else verdict.reason


def verdict_of(verdicts: Mapping[Program, Verdict] | None, program: Program) -> Verdict:
    """Raises ValueError when the program was not run: code is scored a task at a time (`score_items`)."""
    if verdicts is None or program not in verdicts:
        raise ValueError("a task with `code` is scored by score_items, which runs its programs first")
    return verdicts[program]
