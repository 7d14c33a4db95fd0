"""What lm-evaluation-harness itself asks: the oracle for prompts. Needs the extra `lm-eval`."""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from eval_platform.values import Item

# One request as text: (context, continuation), (context, stop strings) or (text,).
Asked = tuple[Any, ...]

FEWSHOT_SEED = 1234  # lm-eval's own default of --fewshot_seed, which its evaluator sets

# The start of a task file of lm-eval's over test.jsonl and dev.jsonl in `folder`.
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, dev: {folder}/dev.jsonl}}}}
test_split: test
fewshot_split: dev
"""


def asked_by_lm_eval(folder: Path, name: str, **chat: Any) -> list[list[Asked]]:
    """Every document's requests, for the task file `name` in `folder`, loaded as `lm_eval --include_path` does.

    chat: what `Task.build_all_requests` takes of one.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    loaded = manager.load([name])
    return _requests(loaded["tasks"][name], **chat)


def asked_by_config(
    config: Mapping[str, Any], splits: Mapping[str, Sequence[Mapping[str, Any]]], **chat: Any
) -> list[list[Asked]]:
    """The same for a configuration and its documents, without files."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tables = {split: datasets.Dataset.from_list([dict(row) for row in rows]) for split, rows in splits.items()}
    return _requests(ConfigurableTask(config={**config, "custom_dataset": lambda **_: tables}), **chat)


def lm_eval_task(path: str, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """The harness's own task of the file `path` below lm_eval/tasks, its functions included, over these rows.

    IFEval's functions are left out: they need NLTK's data. Its requests are built.
    """
    import datasets
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = path != "ifeval/ifeval.yaml"
    config = dict(load_yaml(Path(lm_eval.tasks.__file__).parent / path, resolve_func=own))
    tables = {split: datasets.Dataset.from_list([dict(row) for row in rows]) for split, rows in splits.items()}
    for key in ("dataset_path", "dataset_name", "metadata", *(() if own else ("process_results", "metric_list"))):
        config.pop(key, None)
    # A split that is not there is not asked for rows; training rows are no one's shots here.
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in tables:
            config.pop(key, None)
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **_: tables})
    _build(task)
    return task


def lm_eval_function(path: str, name: str) -> Any:
    """A function of a Python file below lm_eval/tasks."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import _import_func_in_yml

    file = Path(lm_eval.tasks.__file__).parent / path
    return _import_func_in_yml(f"{file.stem}.{name}", file.parent)


def asked_by_us(items: Sequence[Item]) -> list[list[Asked]]:
    """Our items in the same form."""
    return [[_ours(request) for request in item.requests] for item in items]


def _ours(request: Any) -> Asked:
    if request.kind == "rolling":
        return (request.context,)
    if request.kind == "generate":
        s = request.settings
        return (request.context, list(s.stop), s.max_new_tokens, s.temperature)
    return (request.context, request.continuation)


def _requests(task: Any, **chat: Any) -> list[list[Asked]]:
    _build(task, **chat)
    return requests_of(task)


def _build(task: Any, **chat: Any) -> None:
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)  # as evaluator.py does
    task.set_fewshot_seed(FEWSHOT_SEED)
    task.build_all_requests(**chat)


def requests_of(task: Any) -> list[list[Asked]]:
    """Every document's requests of a task whose requests are built."""
    by_document: dict[int, list[Asked]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(_theirs(instance))
    return [by_document[document] for document in sorted(by_document)]


def _theirs(instance: Any) -> Asked:
    if instance.request_type != "generate_until":
        return tuple(instance.args)
    context, kwargs = instance.args
    normal = _normalize()(kwargs)
    return (context, list(normal["until"]), normal["max_gen_toks"], normal.get("temperature", 0.0))


@lru_cache(maxsize=1)
def _normalize() -> Any:
    from lm_eval.models.utils import normalize_gen_kwargs

    return normalize_gen_kwargs
