"""What does a results file of lm-evaluation-harness say? `results_<time>.json` of 0.4.x, as plain values.

Nothing is computed: a number that is here is the file's. Layout: `lm_eval/evaluator.py` and
`lm_eval/loggers/evaluation_tracker.py` of 0.4.13; what older releases left out is None here.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval_platform.errors import SchemaError
from eval_platform.served import without_secrets
from eval_platform.tasks.metrics import METRICS
from eval_platform.tasks.scoring_keys import score_name

SOURCE = "lm-evaluation-harness"

# Arguments of a model that name it, the first that is there first (evaluation_tracker.py: `_get_model_name`); and
# those that say which of its weights.
_NAMES = ("peft", "delta", "pretrained", "model", "path", "engine")
_WHICH = ("revision", "subfolder", "gguf_file", "base_url")
# Arguments that make a run faster or possible, and change no answer but by rounding.
_ONLY_HOW = frozenset(
    {
        *("batch_size", "max_batch_size", "device", "device_map", "parallelize", "device_map_option", "max_memory"),
        *("max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tensor_parallel_size", "data_parallel_size"),
        *("gpu_memory_utilization", "swap_space", "num_concurrent", "max_retries", "timeout", "logits_cache"),
    }
)
_SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
_TIME = re.compile(r"_(\d{4}-\d\d-\d\dT[\d.-]+)$")
_STANDARD_ERROR = "_stderr"
_NO_METRIC = "bypass"  # what --predict_only reports as a score: 999


@dataclass(frozen=True, slots=True)
class HarnessModel:
    """What the file says was asked. name: path, or name on the hub or of a server. which: all that tells it apart."""

    name: str
    which: Mapping[str, str]
    arguments: Mapping[str, Any]  # that may change an answer, and no secret


@dataclass(frozen=True, slots=True)
class HarnessScore:
    """metric: with its filter, as we write it. value: None where the file has NaN or an infinity."""

    metric: str
    value: float | None
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """One task's part of the file. n: items that were asked; of: that there are. better: metric -> higher is better.

    samples: the log of its samples, if one lies beside the file.
    """

    name: str
    version: str | None
    num_fewshot: int
    config: Mapping[str, Any]
    scores: tuple[HarnessScore, ...]
    better: Mapping[str, bool]
    n: int | None
    of: int | None
    task_hash: str | None
    samples: Path | None


@dataclass(frozen=True, slots=True)
class HarnessRun:
    """One file. faults: what of it could not be read, each naming the field; left_out: what is no task's result."""

    file: Path
    sha256: str
    model: HarnessModel
    about: Mapping[str, Any]  # the file's other keys, as they are
    tasks: tuple[HarnessTask, ...]
    faults: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def started(self) -> float | None:
        """Seconds since 1970."""
        return _finite(self.about.get("date"))

    @property
    def config(self) -> Mapping[str, Any]:
        return _section(self.about, "config")


@dataclass(slots=True)
class _Reading:
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def results_files(source: Path) -> list[Path]:
    """The file itself, or every `results*.json` below a folder; sorted."""
    return [source] if source.is_file() else sorted(path for path in source.rglob("results*.json") if path.is_file())


def read_results(file: Path) -> HarnessRun:
    """Raises SchemaError, naming file and field, when it is no results file or does not say which model was asked.

    What is wrong with one task is a fault of the answer, and the others are in it.
    """
    try:
        body = file.read_bytes()
        said = json.loads(body)
    except (OSError, ValueError, RecursionError) as error:
        raise SchemaError(f"{file} cannot be read: {error}", remedy="give the file as lm-eval wrote it") from error
    if not isinstance(said, dict) or not isinstance(said.get("results"), dict) or "config" not in said:
        raise SchemaError(
            f"{file} is no results file of {SOURCE}: it has no objects `results` and `config`",
            remedy="name what `lm_eval run --output_path` wrote: a folder, or a results_<time>.json in it",
        )
    about = {key: value for key, value in said.items() if key not in ("results", "configs")}
    told = _Reading()
    groups = {name for name, members in _section(said, "group_subtasks").items() if members} | {
        *_section(said, "groups")
    }
    tasks = []
    for name, reported in said["results"].items():
        if name in groups:
            told.left_out.append(f"{name}: a group, which is a mean over tasks; its tasks are taken over")
            continue
        try:
            tasks.append(_task(file, said, name, reported))
        except SchemaError as error:
            told.faults.append(str(error))
        except _Nothing as nothing:
            told.left_out.append(f"{name}: {nothing}")
    return HarnessRun(
        file,
        hashlib.sha256(body).hexdigest(),
        _model(file, said),
        about,
        tuple(tasks),
        tuple(told.faults),
        tuple(told.left_out),
    )


class _Nothing(Exception):
    """There is nothing to take over of a task, and nothing wrong with it."""


def _task(file: Path, said: Mapping[str, Any], name: str, reported: Any) -> HarnessTask:
    if not isinstance(reported, dict):
        raise SchemaError(f"{file}: results.{name} is no object", remedy="give the file as lm-eval wrote it")
    scores = tuple(_scores(file, name, reported))
    if not scores:
        if any(key.startswith(f"{_NO_METRIC},") for key in reported):
            raise _Nothing("it was asked with --predict_only and not scored")
        raise SchemaError(
            f"{file}: results.{name} has no score (`<metric>,<filter>`)", remedy="give the file as lm-eval wrote it"
        )
    config = _section(_section(said, "configs"), name)
    counted = _section(_section(said, "n-samples"), name)
    n = counted.get("effective", reported.get("sample_len"))
    shots = _section(said, "n-shot").get(name, config.get("num_fewshot"))
    version = _section(said, "versions").get(name)
    return HarnessTask(
        name=name,
        version=None if version is None else str(version),
        num_fewshot=shots if isinstance(shots, int) else 0,
        config=config,
        scores=_primary_first(scores, config),
        better=_better(said, name, config, scores),
        n=n if isinstance(n, int) else None,
        of=counted.get("original"),
        task_hash=_section(said, "task_hashes").get(name),
        samples=_samples_file(file, name),
    )


def _scores(file: Path, task: str, reported: Mapping[str, Any]) -> Iterator[HarnessScore]:
    for key, value in reported.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric == _NO_METRIC or metric.startswith(f"{_NO_METRIC}_"):
            continue  # its name, its alias, its number of items
        of = metric.removesuffix(_STANDARD_ERROR)
        if of != metric and f"{of},{filter_name}" in reported:
            continue  # read with its metric
        error_key = f"{metric}{_STANDARD_ERROR},{filter_name}"
        error = reported.get(error_key)
        if not _is_number(value):
            raise _no_number(file, task, key, value)
        if not (_is_number(error) or error in (None, "N/A")):
            raise _no_number(file, task, error_key, error)
        yield HarnessScore(score_name(metric, filter_name), _finite(value), _finite(error))


def _no_number(file: Path, task: str, key: str, value: Any) -> SchemaError:
    shown = json.dumps(value)[:40]
    return SchemaError(
        f"{file}: field results.{task}.{key} is {shown}, not a number; nothing of {task} is taken over",
        remedy="run the task again, or remove the field if it is no score",
    )


def _primary_first(scores: tuple[HarnessScore, ...], config: Mapping[str, Any]) -> tuple[HarnessScore, ...]:
    """The order of the task's own metric_list, then as the file has them; the first is what boards show."""
    listed = [str(one.get("metric")) for one in config.get("metric_list") or () if isinstance(one, dict)]

    def place(score: HarnessScore) -> int:
        metric = score.metric.partition(",")[0]
        return listed.index(metric) if metric in listed else len(listed)

    return tuple(sorted(scores, key=place))


def _better(
    said: Mapping[str, Any], name: str, config: Mapping[str, Any], scores: tuple[HarnessScore, ...]
) -> dict[str, bool]:
    """Of each metric that is known of: the file's word, the task's own, that of our metric of the name."""
    listed = {str(one.get("metric")): one for one in config.get("metric_list") or () if isinstance(one, dict)}
    told = _section(_section(said, "higher_is_better"), name)
    found: dict[str, bool] = {}
    for metric in {score.metric.partition(",")[0] for score in scores}:
        known = METRICS.get(metric)
        for word in (told.get(metric), listed.get(metric, {}).get("higher_is_better")):
            if isinstance(word, bool):
                found.setdefault(metric, word)
        if known is not None:
            found.setdefault(metric, known.higher_is_better)
    return found


def _samples_file(file: Path, task: str) -> Path | None:
    time = _TIME.search(file.stem)
    if time is None:
        return None
    beside = file.with_name(f"samples_{task}_{time[1]}.jsonl")
    return beside if beside.is_file() else None


def _model(file: Path, said: Mapping[str, Any]) -> HarnessModel:
    config = _section(said, "config")
    arguments = _arguments(config.get("model_args"))
    name = next((str(arguments[key]) for key in _NAMES if arguments.get(key)), None)
    # A model that was handed over as an object has no arguments; 0.4.3 and later may still name it.
    own = str(config.get("model") or "")
    name = name or said.get("model_name") or (own if "/" in own else None)
    if not isinstance(name, str) or not name.strip("/. "):
        raise SchemaError(
            f"{file}: field config.model_args does not say which model was asked",
            remedy='write it into a copy of the file, as "model_args": "pretrained=<path or name>"',
        )
    which = {key: str(arguments[key]) for key in (*_NAMES, *_WHICH) if arguments.get(key)} or {"model": name}
    if which.get("revision") == "main":
        del which["revision"]
    for key in ("model_sha", "peft_sha", "delta_sha"):  # the hub's commit; empty for what lies in a folder
        if config.get(key):
            which[key] = str(config[key])
    rest = {key: value for key, value in arguments.items() if key not in which and key not in _ONLY_HOW}
    rest.pop("revision", None)
    return HarnessModel(name, which, rest)


def _arguments(said: Any) -> dict[str, Any]:
    """model_args, which is an object or `a=1,b=2`; without what is secret."""
    if isinstance(said, str):
        parts = (part.partition("=") for part in said.split(",") if "=" in part)
        said = {key.strip(): value for key, _, value in parts}
    return without_secrets(said) if isinstance(said, dict) else {}


def settings_of(run: HarnessRun, task: HarnessTask) -> dict[str, Any]:
    """How the model ran, as far as the file says: what goes into the settings_id. `limit` keeps trials off boards."""
    config, about = run.config, run.about
    dtype = str(config.get("model_dtype") or run.model.arguments.get("dtype") or "unknown").removeprefix("torch.")
    arguments = {key: value for key, value in run.model.arguments.items() if key != "dtype"}
    said = {
        "backend": config.get("model"),
        "arguments": arguments,
        "generation": config.get("gen_kwargs"),
        "max_length": about.get("max_length"),
        "system_prompt": about.get("system_instruction"),
        "shots_as_turns": about.get("fewshot_as_multiturn"),
        "chat_template_sha": about.get("chat_template_sha"),
        "seeds": {key: config[key] for key in _SEEDS if config.get(key) is not None},
    }
    return {
        **{key: value for key, value in said.items() if value not in (None, {}, "")},
        "source": SOURCE,
        "dtype": dtype,
        "chat": bool(about.get("chat_template")),
        "limit": _limit(run, task),
    }


def _limit(run: HarnessRun, task: HarnessTask) -> int | None:
    """Items asked where --limit left some out. Raises SchemaError where it did and the file does not say how many."""
    limit = run.config.get("limit")
    if limit is None or (task.of is not None and task.n == task.of):
        return None
    if task.n is not None:
        return task.n
    if _is_number(limit) and limit >= 1:
        return int(limit)
    raise SchemaError(
        f"{run.file}: field config.limit is {limit}, a share, and no field says of how many items of {task.name}",
        remedy="write n-samples into a copy of the file",
    )


def _section(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = said.get(name)
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None
