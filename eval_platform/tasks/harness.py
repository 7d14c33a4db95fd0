"""A task of lm-evaluation-harness as a task of ours: its prompts frozen as documents, its scoring ours or its own.

The harness builds every request itself (shots, templates, its functions); what is frozen is a document of the
rendered prompt, the choices or the right text, and the document it was made of. The definition over these is a plain
one, so that rendering, engine, store, gate and SQL know nothing of the harness.

Scores are computed by us where the harness's metric is one of ours under the same conditions (`_ours`), else by its
own functions (`scoring/harness.py`), which then is part of the task's identity: release and a digest of the code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from eval_platform.errors import TaskError
from eval_platform.tasks.documents import Row, plain_row
from eval_platform.tasks.harness_files import Leaf, code_digest, harness_version, leaves
from eval_platform.tasks.harness_task import live_task, overrides_of_scoring
from eval_platform.tasks.schema import TaskFile
from eval_platform.values import Item

FEWSHOT_SEED = 1234  # of the harness's evaluator
# Its metrics that are ours, by output type; of completions all others differ where there are several references.
_OURS: Mapping[str, frozenset[str]] = {
    "multiple_choice": frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info"}),
    "loglikelihood": frozenset({"acc", "perplexity"}),
    "loglikelihood_rolling": frozenset({"word_perplexity", "byte_perplexity", "bits_per_byte"}),
    "generate_until": frozenset({"exact_match"}),
}
_SIMPLE_FILTERS = frozenset({"regex", "remove_whitespace", "lowercase", "uppercase", "map"})
_HF_TOP_K = 50  # what transformers draws from where nobody says
_PEOPLES = ("title", "about", "source", "licence", "citation", "quality", "primary_metric")


@dataclass(frozen=True, slots=True)
class Asked:
    """One document of the harness: itself and the arguments of its requests."""

    doc: Any
    arguments: Sequence[tuple[Any, ...]]


def read_harness(leaf: Leaf, own: Mapping[str, Any]) -> tuple[TaskFile, list[Row], list[Asked]]:
    """(definition, documents, what it asks) of a task of the harness; own: keys of ours that the user's file says.

    Raises NoData when its dataset cannot be had, TaskError when it is not supported or broken.
    """
    theirs = live_task(leaf)
    asked = _requests(theirs, leaf)
    return *_as_ours(theirs, leaf, own, asked), asked


def leaf_of_file(raw: Mapping[str, Any]) -> tuple[Leaf, dict[str, Any]]:
    """The task that a task file with `lm_eval: NAME` stands for, and those of its keys that are ours.

    All other keys override the harness's. Raises TaskError when the name is that of a group.
    """
    name = raw["lm_eval"]
    own = {key: raw[key] for key in _PEOPLES if key in raw}
    overrides = {key: value for key, value in raw.items() if key not in (*_PEOPLES, "lm_eval")}
    found = leaves(name, overrides)
    if len(found) != 1 or found[0].groups:
        raise TaskError(
            f"{name} is a group of {len(found)} tasks of lm-eval", remedy=f'say `[tasks] lm_eval = ["{name}"]` instead'
        )
    return found[0], own


def check_requests(items: Sequence[Item], asked: Sequence[Asked]) -> None:
    """Raises TaskError unless our items ask, character for character, what the harness asks."""
    for n, (item, one) in enumerate(zip(items, asked, strict=True)):
        ours = [(r.context,) if r.kind == "rolling" else (r.context, r.continuation) for r in item.requests]
        theirs = [(said[0], None) if item.requests[0].kind == "generate" else tuple(said) for said in one.arguments]
        if ours != theirs:
            raise TaskError(
                f"document {n} would not be asked as lm-eval asks it", remedy="this kind of task is not supported"
            )


def _requests(theirs: Any, leaf: Leaf) -> list[Asked]:
    """What the harness asks of every document, in order; as its evaluator does it, without a limit."""
    if theirs.config.num_fewshot is None:
        theirs.set_config("num_fewshot", 0)
    theirs.set_fewshot_seed(FEWSHOT_SEED)
    try:
        theirs.build_all_requests()
    except Exception as error:  # the task's own functions
        raise TaskError(
            f"lm-eval cannot write its prompts: {type(error).__name__}: {error}",
            remedy=f"look at {leaf.file} and at what you override",
        ) from error
    by_document: dict[int, list[Any]] = {}
    for instance in theirs.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    return [
        Asked(instances[0].doc, [one.args for one in sorted(instances, key=lambda one: one.idx)])
        for _, instances in sorted(by_document.items())
    ]


def _as_ours(theirs: Any, leaf: Leaf, own: Mapping[str, Any], asked: Sequence[Asked]) -> tuple[TaskFile, list[Row]]:
    kind = theirs.OUTPUT_TYPE
    targets = [_target(theirs, one.doc) for one in asked]
    rows = [_row(theirs, one, target, n) for n, (one, target) in enumerate(zip(asked, targets, strict=True))]
    config = theirs.config
    said: dict[str, Any] = {
        "task": leaf.name,
        "title": config.task_alias or leaf.name,
        "about": f"{leaf.task} of lm-evaluation-harness, as it asks it.",
        "source": " ".join(str(part) for part in (config.dataset_path, config.dataset_name) if part),
        "output_type": kind,
        "repeats": config.repeats,
        "doc_to_text": "label" if theirs.multiple_input else "prompt",
        "doc_to_target": "target",
        **({"tag": list(leaf.groups)} if leaf.groups else {}),
        **own,
    }
    if kind == "multiple_choice":
        said |= {"doc_to_choice": "choices", "target_delimiter": config.target_delimiter}
    if kind == "generate_until":
        said["generation_kwargs"] = _generation(asked)
    facts = {"task": leaf.task, "num_fewshot": config.num_fewshot}
    definition = _ours(theirs, said | {"lm_eval": facts}, targets)
    if definition is None:
        definition = _theirs(theirs, leaf, said, facts)
    return definition, rows


def _ours(theirs: Any, said: Mapping[str, Any], targets: Sequence[Any]) -> TaskFile | None:
    """The definition with metrics and filters of ours; None where one of the harness's is not the same as ours."""
    config, kind = theirs.config, theirs.OUTPUT_TYPE
    metrics = list(theirs._metric_fn_list)
    if callable(config.process_results) or not _OURS[kind].issuperset(metrics) or config.repeats != 1:
        return None
    # The first document decides there whether all have several right answers; mixed, it compares lists with numbers.
    if len({isinstance(target, list) for target in targets}) > 1:
        return None
    several = bool(targets) and isinstance(targets[0], list)
    if several and ("acc_mutual_info" in metrics or not _same_kind(targets, kind)):
        return None
    # Each choice's length counts there, without the shots that stand before choices that are contexts.
    if theirs.multiple_input and not {"acc"}.issuperset(metrics):
        return None
    filters = config.filter_list
    if filters is not None and not (kind == "generate_until" and all(_is_simple(one) for one in filters)):
        return None
    scoring = {"metric_list": config.metric_list} if config.metric_list else {}
    if filters is not None:
        scoring["filter_list"] = filters
    try:
        return TaskFile.model_validate({**said, **scoring})
    except ValidationError:
        _check({**said, "metric_list": [], "filter_list": []})  # what is not about scoring is an error
        return None


def _theirs(theirs: Any, leaf: Leaf, said: Mapping[str, Any], facts: Mapping[str, Any]) -> TaskFile:
    """The definition with the harness's own metrics and filters."""
    from lm_eval.api.metrics import mean

    better, aggregations = theirs.higher_is_better(), theirs.aggregation()
    metrics = [
        {
            "name": str(name),
            "aggregation": "mean" if aggregations.get(name, mean) is mean else "own",
            "higher_is_better": bool(better.get(name, True)),
        }
        for name in theirs._metric_fn_list
    ]
    own = {
        "metrics": metrics,
        "filters": [one.name for one in theirs._filters],
        "file": leaf.file,
        "overrides": overrides_of_scoring(leaf.overrides),
        "version": harness_version(),
        "code": code_digest(leaf.file),
    }
    return _check({**said, "lm_eval": {**facts, **own}})


def _check(said: Mapping[str, Any]) -> TaskFile:
    try:
        return TaskFile.model_validate(said)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise TaskError(f"it cannot be asked here: {told}", remedy="override the key, or use another task") from error


def _target(theirs: Any, doc: Any) -> Any:
    """What is right: a number or text, or a list of them."""
    target = theirs.doc_to_text(doc) if theirs.multiple_input else theirs.doc_to_target(doc)
    if theirs.OUTPUT_TYPE == "generate_until" and theirs.config.doc_to_choice is not None and isinstance(target, int):
        return theirs.doc_to_choice(doc)[target]
    return list(target) if isinstance(target, tuple) else target


def _row(theirs: Any, one: Asked, target: Any, n: int) -> Row:
    kind = theirs.OUTPUT_TYPE
    row: dict[str, Any] = {"doc": one.doc if isinstance(one.doc, Mapping) else {"text": one.doc}}
    first = one.arguments[0]
    if kind == "loglikelihood_rolling":
        row["target"] = first[0]
    elif kind == "loglikelihood":
        row |= {"prompt": first[0], "target": first[1]}
    elif kind == "generate_until":
        # No right answer at all is for its own functions to score; for people it is an empty one.
        texts = ([str(x) for x in target] or "") if isinstance(target, list) else str(target)
        row |= {"prompt": first[0], "target": texts}
    elif theirs.multiple_input:
        delimiter = theirs.config.target_delimiter
        row |= {"choices": [context for context, _ in one.arguments], "label": target}
        row["target"] = first[1].removeprefix(delimiter)
    else:
        row |= {"prompt": first[0], "choices": list(theirs.doc_to_choice(one.doc)), "target": target}
    return plain_row(row, f"document {n}")


def _generation(asked: Sequence[Asked]) -> dict[str, Any]:
    """The arguments of every completion, as the harness's own models understand them."""
    from lm_eval.models.utils import normalize_gen_kwargs

    arguments = [dict(one.arguments[0][1]) for one in asked]
    if any(other != arguments[0] for other in arguments):
        raise TaskError("its documents have other generation arguments each", remedy="this is not supported")
    said: dict[str, Any] = dict(normalize_gen_kwargs(arguments[0]))
    unknown = {
        key: value
        for key, value in said.items()
        if key not in ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")
        and (key, value) != ("num_beams", 1)
    }
    if unknown:
        raise TaskError(
            f"generation_kwargs: {', '.join(unknown)} cannot be had from this engine",
            remedy="override generation_kwargs in a task file with `lm_eval:`",
        )
    kwargs = {"until": [stop for stop in said["until"] if stop], "max_gen_toks": said["max_gen_toks"]}
    if not said.get("do_sample") or not said.get("temperature"):
        return kwargs
    drawn = {"temperature": said["temperature"], "top_p": float(said.get("top_p", 1.0))}
    return kwargs | drawn | {"top_k": int(said.get("top_k", _HF_TOP_K))}


def _same_kind(targets: Sequence[Sequence[Any]], kind: str) -> bool:
    """Whether right answers compare here as there: numbers of choices, or texts."""
    wanted = str if kind == "generate_until" else int
    return all(target and all(isinstance(one, wanted) for one in target) for target in targets)


def _is_simple(pipeline: Any) -> bool:
    """Whether a filter pipeline ends by taking the first completion and does only what ours do alike before."""
    steps = [step["function"] for step in pipeline["filter"]]
    return steps[-1:] == ["take_first"] and all(step in _SIMPLE_FILTERS for step in steps[:-1])
