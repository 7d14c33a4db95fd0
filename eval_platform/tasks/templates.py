"""Jinja templates of task files, in a sandbox: no attribute that leads out, no change to a document, bounded work.

The environment is lm-evaluation-harness's (`utils.py:apply_template`): StrictUndefined, trailing newlines kept, the
filter `regex_replace`. Left out is what is random (the filter `random`, `lipsum`), since one template and one
document must always give one prompt. Bounds are counts, not seconds, so that a slow machine refuses nothing that a
fast one lets through. They stop loops, repetitions and paddings; a template that doubles a text over and over by `~`
or `replace` is stopped by memory alone.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import (
    StrictUndefined,
    Template,
    TemplateError,
    TemplateSyntaxError,
    UndefinedError,
    nodes,
    pass_context,
)
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eval_platform.errors import NoData, TaskError
from eval_platform.tasks.sections import did_you_mean

MAX_CHARACTERS = 1_000_000
MAX_STEPS = 100_000

_BUDGET = "_budget"  # the name under which a render's budget travels
_WIDTH = re.compile(r"\d{6,}")  # in a format string: a width or precision of 100,000 and more
_WIDTH_AMONG_VALUES = re.compile(r"%[^a-zA-Z]*\*|:[^}]*\{")  # `%*d` and `{:{}}`


class _TooMuch(Exception):
    """A template does more than any prompt needs."""


class _Budget:
    """Loop steps left to one render. Its attribute begins with an underscore, so no template can reach it."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _TooMuch(f"more than {MAX_STEPS} loop steps")


@pass_context
def _bounded(context: Context, values: Any) -> list[Any]:
    """What a `for` loop goes over, charged to the budget before its first step."""
    budget = context[_BUDGET]
    items = []
    for item in values:
        budget.spend()
        items.append(item)
    return items


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    return re.sub(pattern, repl, string, count=count)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _parts(operator, left, right) > MAX_CHARACTERS:
            raise _TooMuch(f"a text or list of more than {MAX_CHARACTERS} parts")
        if operator == "**" and isinstance(right, int | float) and abs(right) > 1000:
            raise _TooMuch("an exponent above 1000")
        if operator == "%" and isinstance(left, str):
            _bound_format(left, (right,))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        """Jinja wraps str.format so that `call` no longer sees whose method it is."""
        format_ = super().wrap_str_format(value)
        if format_ is None:
            return None
        owner = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            _bound_format(owner, (*args, *kwargs.values()))
            return format_(*args, **kwargs)

        return bounded

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(__obj, "__self__", None), str):  # ljust, zfill and the like
            _bound_widths((*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)


def _parts(operator: str, left: Any, right: Any) -> int:
    """The length of the text or list that `left operator right` would make; 0 for anything else."""
    sized = str | list | tuple
    match operator:
        case "+" if isinstance(left, sized) and isinstance(right, sized):
            return len(left) + len(right)
        case "*" if isinstance(left, sized) and isinstance(right, int):
            return len(left) * right
        case "*" if isinstance(left, int) and isinstance(right, sized):
            return left * len(right)
        case _:
            return 0


def _bound_format(text: str, values: Iterable[Any]) -> None:
    """Refuse a format string that would pad to megabytes, by a width of its own or one among the values."""
    if _WIDTH.search(text):
        raise _TooMuch("a format width above 100,000")
    if _WIDTH_AMONG_VALUES.search(text):
        _bound_widths(part for value in values for part in (value if isinstance(value, tuple) else (value,)))


def _bound_widths(arguments: Iterable[Any]) -> None:
    if any(isinstance(argument, int) and argument > MAX_CHARACTERS for argument in arguments):
        raise _TooMuch(f"a width above {MAX_CHARACTERS}")


def _bounded_filter(name: str, filter_: Any) -> Any:
    """A filter that pads or repeats, its arguments bounded."""

    def bounded(value: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "format":
            _bound_format(str(value), (*args, *kwargs.values()))
        else:
            _bound_widths((*args, *kwargs.values()))
        return filter_(value, *args, **kwargs)

    return bounded


def _environment() -> _Sandbox:
    environment = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace
    environment.filters["_bounded"] = _bounded
    for name in ("center", "format", "indent", "batch", "slice"):
        environment.filters[name] = _bounded_filter(name, environment.filters[name])
    del environment.filters["random"]
    del environment.globals["lipsum"]
    return environment


_ENVIRONMENT = _environment()


@lru_cache(maxsize=1024)
def _compiled(source: str) -> Template:
    tree = _ENVIRONMENT.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "_bounded", [], [], None, None, lineno=loop.lineno)
    return _ENVIRONMENT.from_string(tree)


def render_template(source: str, fields: Mapping[str, Any]) -> str:
    """The template filled in with a document's fields.

    Raises TaskError, saying what is wrong but not where (the caller knows key and document), when it is no template,
    names a missing field, tries to leave the sandbox, or does more work than any prompt needs.
    """
    try:
        parts, length = [], 0
        for part in _compiled(source).generate({**fields, _BUDGET: _Budget()}):
            length += len(part)
            if length > MAX_CHARACTERS:
                raise _TooMuch(f"a text of more than {MAX_CHARACTERS} characters")
            parts.append(part)
        return "".join(parts)
    except TemplateSyntaxError as error:
        raise TaskError(f"is not a Jinja template: {error.message}", remedy="mend the template") from error
    except UndefinedError as error:
        raise _undefined(error, fields) from error
    except SecurityError as error:
        raise TaskError(
            f"tries to leave its sandbox: {error}", remedy="a template may only read the document's fields"
        ) from error
    except (_TooMuch, OverflowError, MemoryError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise TaskError(f"does more than a prompt needs: {reason}", remedy="make the template simpler") from error
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, re.error) as error:
        # What Python says of an operation on the document's values: adding a number to a text, an index too large.
        raise TaskError(f"fails: {type(error).__name__}: {error}", remedy="correct template or document") from error


def _undefined(error: UndefinedError, fields: Mapping[str, Any]) -> TaskError:
    message = error.message or str(error)
    named = re.match(r"'(.+)' is undefined", message)
    near = did_you_mean(named[1], fields) if named else ""
    return TaskError(
        f"names a missing field: {message}{near}",
        remedy=f"correct the name or add the field; the document has {', '.join(fields)}",
    )


def inside(where: str, error: TaskError) -> TaskError:
    """The same error, said of `where`."""
    if isinstance(error, NoData):
        return error  # it names its dataset, and that it is one is what the caller asks
    message = str(error).partition("\n  remedy: ")[0]
    return TaskError(f"{where}{message}", remedy=error.remedy)
