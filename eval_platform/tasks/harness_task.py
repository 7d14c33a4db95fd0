"""lm-evaluation-harness's own task object: over its data (at sync), or over frozen documents (when scoring)."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval_platform.errors import NoData, TaskError
from eval_platform.tasks import hub
from eval_platform.tasks.harness_files import Leaf, code_digest, harness_version, quiet, read_config
from eval_platform.tasks.scoring_keys import Harness

# Formats that need no hub.
_LOCAL = frozenset({"json", "csv", "parquet", "text", "arrow"})
# Keys that say where documents and shots come from: done with once these are frozen.
_OF_DATA = frozenset(
    {
        *("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "process_docs", "num_fewshot"),
        *("training_split", "validation_split", "test_split", "fewshot_split", "fewshot_config"),
    }
)
_SPLIT = "frozen"


class _Rows(list[Any]):
    """Documents as they were frozen, in the little that the harness asks of a `datasets.Dataset`."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])


def overrides_of_scoring(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a leaf's overrides that matter once its documents are frozen."""
    return {key: value for key, value in overrides.items() if key not in _OF_DATA}


def live_task(leaf: Leaf) -> Any:
    """The harness's task over the data that it names. Raises NoData when that cannot be had, TaskError otherwise."""
    config = _config(leaf.file, leaf.overrides, functions=False)  # what is refused is not imported first
    if "class" in config:
        raise TaskError(
            f"{leaf.task} of lm-eval is a Python class of its own ({leaf.file}), which is not supported",
            remedy="name a task that is a YAML file, or write a task file (docs/task_files.md)",
        )
    if config.get("unsafe_code"):
        raise TaskError(
            f"{leaf.task} of lm-eval runs what the model wrote, outside of any sandbox",
            remedy="use a task with `code` (docs/task_files.md), such as the shipped humaneval and mbpp",
        )
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise TaskError(f"{leaf.task} of lm-eval shows pictures or sound", remedy="only text is supported")
    config = _config(leaf.file, leaf.overrides)
    path = str(config.get("dataset_path"))
    needs_hub = path not in _LOCAL and not callable(config.get("custom_dataset"))
    if needs_hub and (reason := hub.out_of_reach()) is not None:
        raise NoData(path, [reason], remedy=hub.remedy(path))
    try:
        return _configurable(config)
    except TaskError:
        raise
    except Exception as error:  # its constructor loads data and runs the task's own functions
        why = hub.why_unreachable(error, f"dataset {path}") if needs_hub else None
        if why is not None:
            raise NoData(path, [why], remedy=hub.remedy(path)) from error
        raise TaskError(
            f"lm-eval cannot make its task {leaf.task}: {type(error).__name__}: {error}",
            remedy="try it with lm-eval itself; it may need a package or another version of the dataset",
        ) from error


def frozen_task(harness: Harness, documents: Sequence[Any]) -> Any:
    """The harness's task over these documents, for its functions that score; nothing is loaded from anywhere else.

    Raises TaskError when the installed lm-eval is not the one that the task was synced with.
    """
    if harness.version != harness_version() or harness.code != code_digest(harness.file):
        raise TaskError(
            f"{harness.task} is scored by lm-eval {harness.version}'s own functions, and the lm-eval that is installed "
            f"here ({harness_version()}) has others",
            remedy=f'pip install "lm-eval=={harness.version}", or run `eval-platform tasks sync` for a new task_id',
        )
    config = {key: value for key, value in _config(harness.file, harness.overrides).items() if key not in _OF_DATA}
    rows = _Rows(documents)
    return _configurable(config | {"custom_dataset": lambda **_: {_SPLIT: rows}, "test_split": _SPLIT})


def _config(file: str, overrides: Mapping[str, Any], *, functions: bool = True) -> dict[str, Any]:
    """The task's keys, as `TaskFactory._load_full_config` of lm-eval 0.4.13 merges them."""
    config = read_config(file, functions=functions) | dict(overrides)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    return config


def _configurable(config: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    quiet()
    return ConfigurableTask(config=config)
