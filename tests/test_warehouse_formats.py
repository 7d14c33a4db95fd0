"""The five formats: what a program reads back is what was there, what a person reads is short."""

import csv
import io
import json
import math
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_platform.warehouse import FORMATS, render

TABLE = pa.table(
    {
        "task": pa.array(["add", "a|b", None]),
        "value": pa.array([0.123456789, float("nan"), None]),
        "n": pa.array([100, -5, None], pa.int64()),
        "share": pa.array([Decimal("0.50"), Decimal("12.25"), None], pa.decimal128(10, 2)),
        "at": pa.array([datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), None, None], pa.timestamp("us", tz="UTC")),
    }
)


def test_table():
    assert render(TABLE, "table") == (
        "task     value     n  share  at\n"
        "----  --------  ----  -----  --------------------\n"
        "add   0.123457   100   0.50  2026-01-02T03:04:05Z\n"
        "a|b        NaN    -5  12.25  null\n"
        "null      null  null   null  null\n"
        "(3 rows)\n"
    )


def test_markdown():
    assert render(TABLE, "markdown") == (
        "| task | value | n | share | at |\n"
        "|---|---:|---:|---:|---|\n"
        "| add | 0.123457 | 100 | 0.50 | 2026-01-02T03:04:05Z |\n"
        "| a\\|b | NaN | -5 | 12.25 |  |\n"
        "|  |  |  |  |  |\n"
    )


def test_csv():
    assert render(TABLE, "csv") == (
        "task,value,n,share,at\nadd,0.123456789,100,0.50,2026-01-02T03:04:05Z\na|b,NaN,-5,12.25,\n,,,,\n"
    )


def test_json():
    assert json.loads(render(TABLE, "json")) == [
        {"task": "add", "value": 0.123456789, "n": 100, "share": 0.5, "at": "2026-01-02T03:04:05Z"},
        {"task": "a|b", "value": None, "n": -5, "share": 12.25, "at": None},
        {"task": None, "value": None, "n": None, "share": None, "at": None},
    ]


def test_parquet():
    body = render(TABLE, "parquet")
    assert isinstance(body, bytes)
    back = pq.read_table(io.BytesIO(body))
    assert back.schema == TABLE.schema
    assert back.drop_columns(["value"]) == TABLE.drop_columns(["value"])
    assert math.isnan(back["value"][1].as_py())


def test_nested_values():
    table = pa.table(
        {
            "reasons": pa.array([["a", "b"], []], pa.list_(pa.string())),
            "tags": pa.array([[("lr", "0.1")], None], pa.map_(pa.string(), pa.string())),
            "choice": pa.array([{"text": "x", "ll": float("-inf")}, None]),
            "pairs": pa.array([[[1, 2], [3, 4]], None], pa.list_(pa.list_(pa.int64()))),
        }
    )
    assert json.loads(render(table, "json"))[0] == {
        "reasons": ["a", "b"],
        "tags": {"lr": "0.1"},
        "choice": {"text": "x", "ll": None},
        "pairs": [[1, 2], [3, 4]],
    }
    [_, first, _] = csv.reader(io.StringIO(str(render(table, "csv"))))
    assert first == ['["a", "b"]', '{"lr": "0.1"}', '{"text": "x", "ll": null}', "[[1, 2], [3, 4]]"]


def test_other_types():
    table = pa.table(
        {
            "day": pa.array([date(2026, 1, 2)]),
            "span": pa.array([timedelta(seconds=90)]),
            "raw": pa.array([b"\x00\xff"]),
            "yes": pa.array([True]),
            "huge": pa.array([Decimal("123456789012345678901234567890")], pa.decimal128(38, 0)),
            "fine": pa.array([Decimal("0.1234567890123456789")], pa.decimal128(38, 19)),
            "up": pa.array([float("inf")]),
        }
    )
    assert json.loads(render(table, "json")) == [
        {
            "day": "2026-01-02",
            "span": 90.0,
            "raw": "AP8=",
            "yes": True,
            "huge": 123456789012345678901234567890,
            "fine": "0.1234567890123456789",  # a float would lose digits
            "up": None,
        }
    ]
    [_, row] = csv.reader(io.StringIO(str(render(table, "csv"))))
    assert row[3:] == ["true", "123456789012345678901234567890", "0.1234567890123456789", "Infinity"]


def test_lines_stay_lines():
    table = pa.table({"text": ["one\ntwo\r\nthree"]})
    assert str(render(table, "markdown")).count("\n") == 3
    assert str(render(table, "table")).count("\n") == 4


def test_no_rows_and_columns_of_one_name():
    empty = TABLE.slice(0, 0)
    for name in FORMATS:
        assert render(empty, name)
    assert json.loads(render(empty, "json")) == []
    twice = pa.table([pa.array([1]), pa.array([2])], names=["n", "n"])
    assert json.loads(render(twice, "json")) == [{"n": 1, "n_2": 2}]
    assert render(twice, "csv") == "n,n\n1,2\n"


TEXTS = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(st.tuples(TEXTS, st.none() | st.floats(), TEXTS), min_size=1, max_size=5))
def test_csv_tells_null_from_empty_and_keeps_every_float(rows):
    """Read back by Arrow, which knows a quoted empty field from a bare one."""
    table = pa.table(
        {
            "a": pa.array([row[0] for row in rows], pa.string()),
            "x": pa.array([row[1] for row in rows], pa.float64()),
            "b": pa.array([row[2] for row in rows], pa.string()),
        }
    )
    back = pacsv.read_csv(
        io.BytesIO(str(render(table, "csv")).encode()),
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(
            column_types=dict.fromkeys("axb", pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    assert (back["a"].to_pylist(), back["b"].to_pylist()) == ([row[0] for row in rows], [row[2] for row in rows])
    for text, (_, value, _) in zip(back["x"].to_pylist(), rows, strict=True):
        assert (text is None) == (value is None)
        if value is not None:
            assert float(text) == value or (math.isnan(value) and text == "NaN")


def test_a_null_in_the_only_column_is_a_row_still():
    assert render(pa.table({"a": pa.array(["x", None, ""])}), "csv") == 'a\nx\n""\n""\n'


def test_an_unknown_format_is_refused():
    with pytest.raises(KeyError):
        render(TABLE, "xml")
