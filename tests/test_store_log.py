"""The log: a look here for every file that is about to be created."""

from datetime import date

import pytest

from eval_platform.errors import SchemaError
from eval_platform.store import LocalStore, log

pytest_plugins = ["store_roots"]


def test_an_entry_is_read_back_with_its_fields(store):
    key = log.write(store, "arrival", key="runs/a", n=3)
    [day] = log.dates(store)
    [entry] = log.read(store, [day])
    assert (entry["kind"], entry["key"], entry["n"], entry["log_key"]) == ("arrival", "runs/a", 3, key)
    assert date.fromisoformat(day).isoformat() == day
    assert day in log.recent_dates()
    assert entry["time"].startswith(day)


def test_an_entry_is_read_from_its_name_alone(store):
    fields = {"key": "runs/a+b=c/ü %20", "n": 3, "task_id": "a1", "action": "retry", "attempt": 12}
    key = log.write(store, "asked", **fields)
    store.put(key, b"not looked at")
    [entry] = log.read(store, log.dates(store))
    assert entry.pop("time").startswith(key.split("/")[1])
    assert entry == {**fields, "kind": "asked", "log_key": key}


def test_entries_are_a_set_of_their_dates(store, monkeypatch):
    times = iter(["2026-03-01T00:10:00.000000Z", "2026-02-28T23:10:00.000000Z", "2026-03-01T00:10:00.000000Z"])
    monkeypatch.setattr(log, "utc_now", lambda: next(times))  # a clock that steps back over midnight
    keys = {log.write(store, "try", n=n) for n in range(3)}
    assert log.dates(store) == ["2026-02-28", "2026-03-01"]
    assert {entry["log_key"] for entry in log.read(store, log.dates(store))} == keys
    assert {entry["n"] for entry in log.read(store, ["2026-03-01", "2026-03-01"])} == {0, 2}
    assert log.read(store, ["2026-03-02"]) == []


def test_entries_already_seen_are_not_read_again(tmp_path):
    store = LocalStore(tmp_path)
    first = log.write(store, "task", name="t" * 300)  # too long for a name: its body is what says it
    assert log.read(store, log.dates(store))[0]["name"] == "t" * 300
    (tmp_path / first).write_text("no longer readable")
    second = log.write(store, "task", task_id="u")
    assert [entry["log_key"] for entry in log.read(store, log.dates(store), seen={first})] == [second]
    with pytest.raises(SchemaError, match=first):
        log.read(store, log.dates(store))
