"""The driver's half: put what a worker committed through the gate and record the decision."""

from pathlib import Path

from eval_platform import quality, warehouse
from eval_platform.quality.gate import committed
from eval_platform.store import Store, decisions
from eval_platform.values import Decision


def adopt(store: Store, catalog: Path, evaluation_id: str, attempt: int, actor: str) -> Decision:
    """The decision that stands on a committed attempt; the gate's, made now, where there is none.

    Anyone may call it at any time and as often as they like: the first decision is the only one that the gate makes.
    The catalog is brought up to date before the gate looks at it, not after: the decision comes with the next refresh
    (two for each task of an arrival took longer than the gate itself).

    Raises EvalPlatformError when that attempt is not committed, StoreError or SchemaError when its samples are not
    those that were committed.
    """
    decision = decisions.standing(store, evaluation_id, attempt)
    if decision is None:
        evaluation = committed(store, evaluation_id, attempt)
        warehouse.refresh(store, catalog)  # what the gate compares with must be there
        decision = quality.decide(store, evaluation, quality.judge(store, catalog, evaluation), actor)
    else:
        quality.hold_contradicted(store, decision)
    return decision
