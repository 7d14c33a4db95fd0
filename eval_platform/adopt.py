"""The driver's half: put what a worker committed through the gate and record the decision."""

from pathlib import Path

from eval_platform import quality
from eval_platform.quality.gate import committed
from eval_platform.store import Store, decisions
from eval_platform.values import Decision


def adopt(store: Store, catalog: Path, evaluation_id: str, attempt: int, actor: str) -> Decision:
    """The decision that stands on a committed attempt; the gate's, made now, where there is none.

    Anyone may call it at any time and as often as they like: the first decision is the only one that the gate makes.
    The catalog must have been refreshed since the commit: the gate compares with what it finds there. The decision
    itself comes into the catalog with the next refresh.

    Raises EvalPlatformError when that attempt is not committed, StoreError or SchemaError when its samples are not
    those that were committed.
    """
    decision = decisions.standing(store, evaluation_id, attempt)
    if decision is None:
        evaluation = committed(store, evaluation_id, attempt)
        decision = quality.decide(store, evaluation, quality.judge(store, catalog, evaluation), actor)
    else:
        quality.hold_contradicted(store, decision)
    return decision
