"""What do all sections of a task file have in common? Nothing unknown is let through, and errors name what is near."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from eval_platform.identity import canonical_json


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def is_set(model: BaseModel, key: str) -> bool:
    """Whether the file says the key."""
    return getattr(model, key) is not None


def listed(names: Iterable[str]) -> str:
    """The names in a row, for an error."""
    return ", ".join(names)


def json_only(value: Any) -> Any:
    """YAML makes dates, sets and infinities out of unquoted text; none of them is a JSON value."""
    try:
        canonical_json(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}; put the value in quotes") from error
    return value


def must_compile(pattern: str) -> None:
    """Raises ValueError when it is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
