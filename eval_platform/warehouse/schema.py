"""Which tables and views does the catalog have? The one place that names their columns.

Tables hold one row per record of the store; views say what people ask. Times are UTC; values are in the metric's own
unit; `settings`, `versions` and `observed` are JSON text (`settings ->> 'dtype'`).
"""

import pyarrow as pa

from eval_platform import __version__
from eval_platform.identity import content_id

_TEXT = pa.string()
_TEXTS = pa.list_(pa.string())
_TIME = pa.timestamp("us", tz="UTC")

TABLES: dict[str, pa.Schema] = {
    "arrivals": pa.schema(
        {
            "key": _TEXT,
            "n": pa.int32(),
            "fingerprint": _TEXT,
            "checkpoint_id": _TEXT,  # null until the checkpoint was staged
            "weights_id": _TEXT,
            "kind": _TEXT,  # transformers | adapter | served; null until it was staged
            "uri": _TEXT,
            "run": _TEXT,
            "step": pa.int64(),
            "tokens_seen": pa.int64(),
            "tags": pa.map_(_TEXT, _TEXT),
            "arrived_at": _TIME,
            "watcher": _TEXT,
            "newest": pa.bool_(),  # the key's highest n that is known by content: what boards show of the key
            "failed": pa.bool_(),  # it failed for good before it could be asked anything
            "failure_class": _TEXT,  # deterministic | infrastructure | gone
            "failure_reason": _TEXT,
        }
    ),
    # What the queue passed over, and why: nobody has judged it, it was only not asked in its turn.
    "skips": pa.schema({"key": _TEXT, "n": pa.int32(), "tier": _TEXT, "tasks": _TEXTS, "reason": _TEXT, "time": _TIME}),
    "evaluations": pa.schema(
        {
            "evaluation_id": _TEXT,
            "attempt": pa.int32(),
            "status": _TEXT,  # published | held | failed
            "stale": pa.bool_(),  # its task's current task_id is another
            "shown": pa.bool_(),  # its evaluation's lowest attempt that stands published, and no trial with `limit`
            "reasons": _TEXTS,  # why it is held or failed
            "warnings": _TEXTS,  # what the standing decision warned of
            "task": _TEXT,
            "task_id": _TEXT,
            "ask_id": _TEXT,
            "answers_id": _TEXT,
            "dataset_id": _TEXT,
            "prompts_id": _TEXT,
            "answers_digest": _TEXT,
            "checkpoint_id": _TEXT,
            "weights_id": _TEXT,  # null: a served model's are not seen
            "kind": _TEXT,  # of its checkpoint, as in `arrivals`
            "tokenizer_id": _TEXT,
            "settings_id": _TEXT,
            "settings": _TEXT,
            "chat": pa.bool_(),  # asked through the checkpoint's chat template
            "item_limit": pa.int64(),  # `--limit`: for trying out, never on a board
            "key": _TEXT,  # the arrival that it was first asked for
            "arrival": pa.int32(),
            "primary_metric": _TEXT,
            "primary_value": pa.float64(),
            "higher_is_better": pa.bool_(),
            "chance": pa.float64(),
            "origin": _TEXT,  # asked | rescored | imported
            "dtype": _TEXT,
            "devices": _TEXTS,
            "engine_path": _TEXT,
            "n_parameters": pa.int64(),  # null where the model was not loaded: scored from stored answers
            "numerics_version": _TEXT,
            "versions": _TEXT,
            "trust_remote_code": pa.bool_(),
            "started_at": _TIME,
            "finished_at": _TIME,
            "seconds": pa.float64(),
            "answer_seconds": pa.float64(),
            "load_seconds": pa.float64(),  # of `seconds`, the model's loading: 0 with all but the first task
            "expected_seconds": pa.float64(),  # of `seconds` without loading, when it was planned; null: nobody knew
            "device_seconds": pa.float64(),  # `seconds` times the devices that its worker held; null in older records
            "tokens_per_second": pa.float64(),  # of `n_tokens`, those asked in this try, by `answer_seconds`
            "peak_memory_bytes": pa.int64(),  # of its worker up to then: on its GPUs, else in main memory
            "n_requests": pa.int64(),
            "asked_requests": pa.int64(),  # of these, those asked in this try; null in older records
            "characters": pa.int64(),  # of what was asked (`tasks.characters`); null in older records
            "n_tokens": pa.int64(),
            "computed_tokens": pa.int64(),  # positions that went through the model in this try; null: not counted
            "generated_tokens": pa.int64(),  # of these, drawn one after another
            "truncated": pa.int64(),
            "prompt_tokens": pa.int64(),  # what a served model's server counted
            "completion_tokens": pa.int64(),
            "cost": pa.float64(),  # by the prices of [[served]], in their currency
            "planned_items": pa.int64(),
            "planned_samples": pa.int64(),
            "planned_sample_ids": _TEXT,
            "samples_key": _TEXT,
            "samples_rows": pa.int64(),
            "samples_pruned_at": _TIME,  # null while they are kept
            "samples_pruned_by": _TEXT,  # who, and by which rule
            "failure_class": _TEXT,  # deterministic | infrastructure | gone, of a failed one
        }
    ),
    # The last eight say again what the evaluation says, so that boards need no join with it.
    "scores": pa.schema(
        {
            "evaluation_id": _TEXT,
            "attempt": pa.int32(),
            "task": _TEXT,
            "subset": _TEXT,  # '' is the whole task
            "metric": _TEXT,
            "subject": _TEXT,
            "value": pa.float64(),
            "standard_error": pa.float64(),
            "ci_low": pa.float64(),
            "ci_high": pa.float64(),
            "interval_method": _TEXT,
            "n": pa.int64(),
            "n_clusters": pa.int64(),
            "is_primary": pa.bool_(),  # the primary metric on the whole task, when it was evaluated
            "status": _TEXT,
            "shown": pa.bool_(),
            "warnings": _TEXTS,
            "task_id": _TEXT,
            "checkpoint_id": _TEXT,
            "settings_id": _TEXT,
            "chat": pa.bool_(),
        }
    ),
    "decisions": pa.schema(
        {
            "evaluation_id": _TEXT,
            "attempt": pa.int32(),
            "n": pa.int32(),
            "stands": pa.bool_(),  # the highest n of the attempt
            "status": _TEXT,
            "action": _TEXT,
            "actor": _TEXT,
            "reasons": _TEXTS,
            "gate_version": _TEXT,
            "time": _TIME,
        }
    ),
    "checks": pa.schema(
        {
            "evaluation_id": _TEXT,
            "attempt": pa.int32(),
            "n": pa.int32(),  # the decision's
            "name": _TEXT,
            "passed": pa.bool_(),
            "severity": _TEXT,
            "reason": _TEXT,
            "observed": _TEXT,
        }
    ),
    # One row per definition that a name has had; `current` is the one that boards show.
    "tasks": pa.schema(
        {
            "name": _TEXT,
            "n": pa.int32(),
            "task_id": _TEXT,
            "current": pa.bool_(),
            "primary_metric": _TEXT,
            "higher_is_better": pa.bool_(),
            "chance": pa.float64(),
        }
    ),
    "datasets": pa.schema({"dataset_id": _TEXT, "source": _TEXT, "licence": _TEXT, "n": pa.int64(), "record": _TEXT}),
    # Records that could not be read (damaged, or from a newer version): the rest of the catalog stands without them.
    "problems": pa.schema({"subject": _TEXT, "reason": _TEXT}),
}

# The catalog's own memory, in a schema of its own so that SHOW TABLES leaves it out.
INTERNAL: dict[str, pa.Schema] = {
    "bookkeeping.meta": pa.schema({"version": _TEXT, "root": _TEXT, "refreshed_on": _TEXT}),
    # Log entries seen. `expects` is the store key that an entry announced, null once it was found there.
    "bookkeeping.log": pa.schema({"log_key": _TEXT, "date": _TEXT, "subject": _TEXT, "expects": _TEXT}),
    # Subjects that may change without a log entry; `digest` is of the rows that they made when last read.
    "bookkeeping.watched": pa.schema({"subject": _TEXT, "digest": _TEXT, "until": _TEXT}),
}

VIEWS: dict[str, str] = {
    "newest_arrivals": "select * from arrivals where newest",
    # An evaluation is found by checkpoint_id alone, so a copy under another key (linked) stands on its own run's curve.
    "leaderboard": """
        select a.key, a.run, a.step, a.tokens_seen, t.name as task, s.subset, s.metric, s.value, s.standard_error,
            s.ci_low, s.ci_high, s.interval_method, s.n, t.higher_is_better, t.chance, s.warnings, a.arrived_at,
            s.checkpoint_id, s.task_id, s.settings_id, s.evaluation_id, s.attempt, s.chat, a.kind
        from scores s
        join tasks t on t.task_id = s.task_id and t.primary_metric = s.metric and t.current
        join arrivals a on a.checkpoint_id = s.checkpoint_id and a.newest
        where s.shown and s.subset = '' and s.subject is null
    """,
    # A definition that came back under its name has two rows in `tasks` and is one curve all the same.
    "learning_curves": """
        with names as (
            select name, task_id, bool_or(current) as current, arg_max(higher_is_better, n) as higher_is_better,
                arg_max(chance, n) as chance
            from tasks group by name, task_id
        )
        select a.key, a.run, a.step, a.tokens_seen, coalesce(t.name, s.task) as task, s.subset, s.metric, s.subject,
            s.value, s.standard_error, s.ci_low, s.ci_high, s.interval_method, s.n, s.is_primary, t.higher_is_better,
            t.chance, coalesce(not t.current, false) as stale, s.warnings, a.arrived_at,
            s.checkpoint_id, s.task_id, s.settings_id, s.evaluation_id, s.attempt, s.chat, a.kind
        from scores s
        join arrivals a on a.checkpoint_id = s.checkpoint_id and a.newest
        left join names t on t.task_id = s.task_id
        where s.shown
    """,
    "failed_arrivals": """
        select key, n, run, step, failure_class, failure_reason as reason from arrivals where failed
    """,
    # Of newest arrivals, while one of the tasks has no result.
    "skipped": """
        with asked as (select key, n, tier, unnest(tasks) as task from skips),
        open as (
            select distinct q.key, q.n, q.tier from asked q
            join arrivals a using (key, n)
            left join evaluations e
              on e.checkpoint_id = a.checkpoint_id and e.task = q.task and not e.stale and e.item_limit is null
            where e.task is null and not a.failed and q.n = (select max(b.n) from arrivals b where b.key = q.key)
        )
        select key, n, a.run, a.step, tier, s.tasks, s.reason, s.time, a.arrived_at
        from skips s join open using (key, n, tier) join arrivals a using (key, n)
    """,
    "held": """
        select a.key, a.run, a.step, e.task, e.reasons, e.warnings, e.primary_metric, e.primary_value, e.finished_at,
            e.evaluation_id, e.attempt
        from evaluations e left join arrivals a on a.key = e.key and a.n = e.arrival
        where e.status = 'held'
    """,
    "failed": """
        select a.key, a.run, a.step, e.task, e.failure_class, array_to_string(e.reasons, '; ') as reason,
            e.evaluation_id, e.attempt
        from evaluations e left join arrivals a on a.key = e.key and a.n = e.arrival
        where e.status = 'failed'
        union all by name
        select key, run, step, failure_class, reason from failed_arrivals
    """,
}

# A catalog made by another release or with other columns is built anew: it is only a mirror.
CATALOG_VERSION = content_id(
    [__version__, VIEWS, {name: str(schema) for name, schema in {**TABLES, **INTERNAL}.items()}]
)
