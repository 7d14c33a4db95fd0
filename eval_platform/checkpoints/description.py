"""Which run and step is it? checkpoint.json, else trainer_state.json, else the path."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval_platform.checkpoints.files import CONVERTED, MAX_JSON_BYTES
from eval_platform.errors import CheckpointError, ConfigError

# A number that stands alone: not the 1 of "1B" nor the 3 or 2 of "v3.2".
_NUMBER = re.compile(r"(?<![\d.])\d+(?![\d.A-Za-z])")
DESCRIBING = ("checkpoint.json", "trainer_state.json")  # the files that say it
_MOST = 2**63 - 1  # what a column of the catalog holds: one number too large would keep all others out of SQL
_Count = Annotated[int, Field(ge=0, le=_MOST)]
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Description:
    """Where a checkpoint stands in its training. tokens_seen counts training tokens."""

    run: str
    step: int | None = None
    tokens_seen: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class _CheckpointFile(BaseModel):
    """checkpoint.json, as the trainer may leave it (contract section 7). Other fields are the trainer's own."""

    model_config = ConfigDict(strict=True, extra="ignore")
    run: Annotated[str, Field(min_length=1)] | None = None
    step: _Count | None = None
    tokens_seen: _Count | None = None
    time: str | None = None
    tags: dict[str, str] = {}


class _TrainerState(BaseModel):
    """The two fields of transformers' trainer_state.json that say where training stands."""

    model_config = ConfigDict(strict=True, extra="ignore")
    global_step: _Count | None = None
    num_input_tokens_seen: _Count | None = None


def describe(folder: Path, root_name: str, relative: str, pattern: str | None = None) -> Description:
    """Run, step, tokens and tags of the checkpoint at `relative` under a root; each field from the first that has it:

    checkpoint.json; trainer_state.json; `pattern` matched with the whole relative path; the path itself, where run is
    the folders above (the root's name when there are none) and step the last number that stands alone in the name.

    Raises CheckpointError naming file and field when one of the two files is malformed, ConfigError for the pattern.
    """
    own = _read(folder / "checkpoint.json", _CheckpointFile)
    if own.time is not None:
        try:
            datetime.fromisoformat(own.time)
        except ValueError as error:
            raise CheckpointError(
                f"{folder / 'checkpoint.json'}: field time is not ISO 8601: {own.time!r}",
                remedy="write it like 2026-11-21T10:00:00Z, or leave it out",
            ) from error
    state = _read(folder / "trainer_state.json", _TrainerState)
    path = describe_path(root_name, relative, pattern)
    return Description(
        run=own.run or path.run,
        step=_first(own.step, state.global_step, path.step),
        # transformers writes 0 when it was not asked to count.
        tokens_seen=_first(own.tokens_seen, state.num_input_tokens_seen or None),
        tags=own.tags,
    )


def describe_path(root_name: str, relative: str, pattern: str | None = None) -> Description:
    """What a path alone says, as `describe` has it. Raises ConfigError for the pattern.

    step_1000/hf is the converted copy of what lies in step_1000, whose name says run and step.
    """
    above, _, name = relative.rpartition("/")
    whole = relative
    if name == CONVERTED and above:
        whole = above
        above, _, name = whole.rpartition("/")
    asked = compile_pattern(pattern) if pattern else None
    match = asked and (asked.fullmatch(relative) or asked.fullmatch(whole))
    path = match.groupdict() if match else {}
    numbers = [path["step"]] if "step" in path else _NUMBER.findall(name)
    steps = [int(number) for number in numbers if len(number) < len(str(_MOST))]  # a longer one counts nothing
    return Description(run=path.get("run") or above or root_name, step=steps[-1] if steps else None)


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


@lru_cache(maxsize=64)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A root's path pattern as a regular expression: {run} is any text, {step} digits, the rest stands for itself.

    Raises ConfigError for another field or one that occurs twice.
    """
    parts = re.split(r"\{(\w*)\}", pattern)
    fields = parts[1::2]
    if any(name not in ("run", "step") for name in fields) or len(set(fields)) != len(fields):
        raise ConfigError(
            f"[[checkpoints]] field pattern {pattern!r}: fields {', '.join(fields)}",
            remedy="use {run} and {step}, each at most once, as in '{run}/step_{step}'",
        )
    expressions = {"run": "(?P<run>.+)", "step": "(?P<step>[0-9]+)"}
    return re.compile("".join(expressions[part] if i % 2 else re.escape(part) for i, part in enumerate(parts)))


def _read(path: Path, model: type[_Model]) -> _Model:
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} has {size:,} bytes, more than {MAX_JSON_BYTES:,}", remedy="remove it")
        value: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return model()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", remedy="write it again, or remove it") from error
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{path}: {f'field {name}' if name else 'the file'}: {first['msg']} (got {str(first['input'])[:60]!r})",
            remedy="mend it, or remove the field",
        ) from error
