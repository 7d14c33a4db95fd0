"""How is an answer written out? Rounded for people (table, markdown), exact for programs (csv, json, parquet)."""

import base64
import datetime
import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa

SIGNIFICANT_DIGITS = 6


def render(table: pa.Table, format_: str) -> str | bytes:
    """`table` in one of FORMATS: text, or bytes for parquet. Raises KeyError for another format."""
    return FORMATS[format_](table)


def _table(table: pa.Table) -> str:
    """Aligned columns, numbers to the right, null as "null"."""
    texts, right = _cells(table, lambda value: "null" if value is None else _short(value))
    header = table.column_names
    widths = [max([len(name), *(len(row[i]) for row in texts)]) for i, name in enumerate(header)]

    def line(cells: list[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(cells, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return (
        "\n".join([line(header), rule, *map(line, texts), f"({table.num_rows} row{'s' * (table.num_rows != 1)})"])
        + "\n"
    )


def _markdown(table: pa.Table) -> str:
    """A pipe table; null is an empty cell."""
    texts, right = _cells(table, lambda value: "" if value is None else _short(value))

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---:" if to_right else "---" for to_right in right) + "|"
    return "\n".join([line(table.column_names), rule, *map(line, texts)]) + "\n"


def _csv(table: pa.Table) -> str:
    """RFC 4180 with a header and "\\n"; numbers are exact.

    Null is an empty field and the empty string a quoted one, which Python's csv writer cannot tell apart. A null in
    the only column is quoted too, since readers skip empty lines.
    """
    lines = [[_csv_field(name) for name in table.column_names]]
    lines += [["" if value is None else _csv_field(_exact(value)) for value in row] for row in _rows(table)]
    return "".join((",".join(line) or '""') + "\n" for line in lines)


def _csv_field(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if not text or any(c in text for c in ',"\r\n') else text


def _json(table: pa.Table) -> str:
    """A list of one object a row. NaN and infinities, which JSON has not, are null; times are ISO 8601."""
    names = _distinct(table.column_names)
    rows = [{name: _jsonable(value) for name, value in zip(names, row, strict=True)} for row in _rows(table)]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _parquet(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table.rename_columns(_distinct(table.column_names)), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, Callable[[pa.Table], str | bytes]] = {
    "table": _table,
    "csv": _csv,
    "json": _json,
    "markdown": _markdown,
    "parquet": _parquet,
}


def _rows(table: pa.Table) -> list[tuple[Any, ...]]:
    if table.num_columns == 0:
        return []
    # Not to_pylist of the table: two columns may bear one name.
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _cells(table: pa.Table, text: Callable[[Any], str]) -> tuple[list[list[str]], list[bool]]:
    """Every cell on one line, and which columns hold numbers."""
    texts = [[" ".join(text(value).split("\n")) for value in row] for row in _rows(table)]
    types = table.schema.types
    return texts, [pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_decimal(t) for t in types]


def _distinct(names: list[str]) -> list[str]:
    """The names, a second one of a kind as name_2: objects and Parquet readers need them apart."""
    seen: set[str] = set()
    distinct = []
    for name in names:
        candidate, n = name, 1
        while candidate in seen:
            n += 1
            candidate = f"{name}_{n}"
        seen.add(candidate)
        distinct.append(candidate)
    return distinct


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.{SIGNIFICANT_DIGITS}g}" if math.isfinite(value) else _exact(value)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "; ".join(value)
    return _exact(value)


def _exact(value: Any) -> str:
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float():
            return "NaN" if math.isnan(value) else repr(value).replace("inf", "Infinity")
        case int() | Decimal():
            return format(value, "f") if isinstance(value, Decimal) else str(value)
        case _:
            plain = _jsonable(value)
            return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _jsonable(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else None
        case Decimal():
            return _decimal(value)
        case datetime.datetime():
            return value.isoformat().replace("+00:00", "Z")
        case datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta():
            return value.total_seconds()
        case bytes():
            return base64.b64encode(value).decode()
        case dict():
            return {str(name): _jsonable(part) for name, part in value.items()}
        case list() if value and all(isinstance(part, tuple) and len(part) == 2 for part in value):
            return {_exact(name): _jsonable(part) for name, part in value}  # how Arrow gives a map
        case list() | tuple():
            return [_jsonable(part) for part in value]
        case _:
            return str(value)


def _decimal(value: Decimal) -> int | float | str:
    """A number when JSON's reader gets the same one back, else its digits as text."""
    if not value.is_finite():
        return str(value)
    if value == value.to_integral_value():
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else format(value, "f")
