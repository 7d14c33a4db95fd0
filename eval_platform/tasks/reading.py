"""From a YAML file to a TaskFile, with errors that name file, line, key and remedy."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from eval_platform.errors import TaskError
from eval_platform.tasks.schema import REFUSED_KEYS, TaskFile
from eval_platform.tasks.sections import did_you_mean

# A file of a few kilobytes can stand for gigabytes through aliases of aliases.
MAX_NODES = 100_000

_REMEDY = "docs/task_files.md shows every key"
_NAME_LINE = re.compile(r"""^task:[ \t]*["']?([A-Za-z0-9_][A-Za-z0-9_.-]*)""", re.MULTILINE)


class _Place(NamedTuple):
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Path_ = tuple[str | int, ...]  # of keys and indices, from the top of the file


def read_task_file(path: Path) -> TaskFile:
    """The task that `path` defines, `include:` files merged in as lm-evaluation-harness does (own keys win).

    Raises TaskError naming file, line, key and remedy for whatever is not a task.
    """
    raw, places = _read_mapping(path, ())
    if "lm_eval" in raw:
        raise TaskError(
            f"{places[('lm_eval',)]}: a task of lm-evaluation-harness has no keys of ours",
            remedy="`eval-platform tasks validate` and `tasks show` read it through lm-eval",
        )
    for key in raw:
        if key in REFUSED_KEYS:
            raise TaskError(f"{places[(key,)]}: {key} is not supported", remedy=REFUSED_KEYS[key])
    if isinstance(raw.get("task"), list):
        raise TaskError(f"{places[('task',)]}: a list of tasks is a group", remedy=REFUSED_KEYS["group"])
    try:
        return TaskFile.model_validate(raw)
    except ValidationError as error:
        raise TaskError(_explain(error, path, places), remedy=_REMEDY) from error


def harness_keys(path: Path) -> dict[str, Any] | None:
    """The keys of a task file that names a task of lm-evaluation-harness (`lm_eval: NAME`); None for another file."""
    raw, places = _read_mapping(path, ())
    named = raw.get("lm_eval")
    if named is None:
        return None
    if not isinstance(named, str):
        raise TaskError(
            f"{places[('lm_eval',)]}: lm_eval is the name of a task of lm-evaluation-harness", remedy=_REMEDY
        )
    return raw


def task_name(path: Path) -> str | None:
    """The name a file claims, also when the rest of it is broken; None when even that cannot be read."""
    try:
        raw = _read_mapping(path, ())[0]
        name = raw.get("task", raw.get("lm_eval"))
    except TaskError:  # the caller reports it when it reads the whole file; a typo must not cost the lock its task
        try:
            line = _NAME_LINE.search(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return None
        return line[1] if line else None
    return name if isinstance(name, str) else None


def _read_mapping(path: Path, including: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Path_, _Place]]:
    """The keys of `path` and of what it includes, and where each stands."""
    path = path.resolve()
    if path in including:
        raise TaskError(f"{path} includes itself", remedy="remove one `include:`")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}", remedy="give the path of a task file") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8: {error}", remedy="save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise TaskError(f"{path} is not YAML: {error}", remedy="mend the line it names") from error
    except RecursionError as error:
        raise TaskError(f"{path} is nested too deeply", remedy=_REMEDY) from error
    if not isinstance(node, yaml.MappingNode):
        raise TaskError(f"{path} is not a mapping of keys to values", remedy=_REMEDY)
    places: dict[Path_, _Place] = {}
    _count(node, path, {})
    _check(node, (), path, places)
    try:
        raw = yaml.load(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise TaskError(f"{path} is not YAML: {error}", remedy="mend the line it names") from error
    for key in raw:
        if not isinstance(key, str):
            raise TaskError(f"{path}: the key {key!r} is not a text", remedy="put it in quotes")

    includes = raw.pop("include", [])
    merged: dict[str, Any] = {}
    merged_places: dict[Path_, _Place] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        if not isinstance(include, str):
            raise TaskError(f"{places[('include',)]}: include must be a path", remedy=_REMEDY)
        base, base_places = _read_mapping(path.parent / include, (*including, path))
        merged |= base
        merged_places |= base_places
    return merged | raw, merged_places | places


def _count(node: yaml.Node, path: Path, sizes: dict[int, int]) -> int:
    """How many nodes `node` stands for once its aliases are written out. 0 in `sizes` marks a node being counted."""
    known = sizes.get(id(node))
    if known == 0:
        raise TaskError(f"{_place(node, path)}: an alias contains itself", remedy="write the values out")
    if known is None:
        sizes[id(node)] = 0
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known = sizes[id(node)] = 1 + sum(_count(child, path, sizes) for child in children)
    if known > MAX_NODES:
        raise TaskError(f"{path} has more than {MAX_NODES} values", remedy="move the data to a file of documents")
    return known


def _check(node: yaml.Node, at: Path_, path: Path, places: dict[Path_, _Place]) -> None:
    """Refuse Python and doubled keys, and note where every value stands."""
    places.setdefault(at, _place(node, path))
    key = ".".join(str(part) for part in at)
    if node.tag.startswith("!function"):
        raise TaskError(
            f"{_place(node, path)}: {key}: `!function` is refused: a task file is data, and whoever evaluates with it "
            "must not run its code",
            remedy="write a Jinja template, or apply the function once and keep the resulting documents in a file",
        )
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        raise TaskError(f"{_place(node, path)}: {key}: the tag {node.tag} is refused", remedy="use plain YAML values")
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise TaskError(f"{_place(name, path)}: a key must be a text", remedy=_REMEDY)
            if name.value in seen and name.value != "<<":
                raise TaskError(
                    f"{_place(name, path)}: the key {name.value} stands twice", remedy="remove one of the two"
                )
            seen.add(name.value)
            places[(*at, name.value)] = _place(name, path)
            _check(value, (*at, name.value), path, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _check(value, (*at, index), path, places)


def _place(node: yaml.Node, path: Path) -> _Place:
    return _Place(path, node.start_mark.line + 1)


def _explain(error: ValidationError, path: Path, places: Mapping[Path_, _Place]) -> str:
    lines = []
    for problem in error.errors():
        at = tuple(part for part in problem["loc"])
        # Of a union pydantic reports every branch, the branch's name as the last part: keep what stands in the file.
        while at and at not in places and not (problem["type"] == "missing" and at[:-1] in places):
            at = at[:-1]
        place = places.get(at) or places.get(at[:-1]) or path
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            name = str(problem["loc"][-1])
            message = f"there is no such key{did_you_mean(name, _known_keys(problem['loc'][:-1]))}"
        elif problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float):
            message += f", not {problem['input']!r}; put it in quotes"
        lines.append(f"{place}: {key}: {message}" if key else f"{place}: {message}")
    return "\n".join(dict.fromkeys(lines))


def _known_keys(at: Path_) -> list[str]:
    """The keys of the section at `at`."""
    model: Any = TaskFile
    for part in at:
        if isinstance(part, int) or part not in model.model_fields:
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next((c for c in candidates if hasattr(c, "model_fields")), model)
    return [field.alias or name for name, field in model.model_fields.items()]
