"""Which log entry announces which file? Needed to find what no entry points at, and to announce it afterwards."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from eval_platform.store import layout, log
from eval_platform.store.base import Store
from eval_platform.store.log import Kind

# What an entry says beyond whose file it is.
_BESIDE = frozenset({"schema_version", "time", "log_key", "task_id"})


def announcement(key: str) -> tuple[Kind, dict[str, Any]] | None:
    """(kind, fields) of the entry that announces the file `key`; None for a file that none does."""
    top, _, rest = key.partition("/")
    folder, _, name = rest.rpartition("/")
    numbered = layout.numbered(key)
    match top, numbered:
        case "arrivals", (n, ".json"):
            return "arrival", {"key": folder, "n": n}
        case "arrivals", (n, ".identity.json"):
            return "identity", {"key": folder, "n": n}
        case "arrivals", (n, rest) if (tier := layout.parse_skipped(rest)) is not None:
            return "skipped", {"key": folder, "n": n, "tier": tier}
        case "evaluations", (n, ".json"):
            return "evaluation", {"evaluation_id": folder, "attempt": n}
        case "evaluations", (n, ".pruned.json"):
            return "pruned", {"evaluation_id": folder, "attempt": n}
        case "evaluations", (n, ".asked.json"):
            return "asked", {"action": "rerun", "evaluation_id": folder, "attempt": n}
        case "decisions", _ if parsed := layout.parse_decision(key):
            return "decision", {"evaluation_id": folder, "attempt": parsed[0], "n": parsed[1]}
        case "tasks", (n, ".json") if folder.startswith("by-name/"):
            return "task", {"name": folder.removeprefix("by-name/"), "n": n}
        case "tries", _ if (subject := _subject(folder)) is not None:
            return ("asked", {"action": "retry", **subject}) if name.startswith("retry-") else ("try", subject)
        case _:
            return None


def signature(kind: str, fields: Mapping[str, Any]) -> str:
    """Equal for two entries that point at the same file."""
    told = {name: value for name, value in fields.items() if name not in _BESIDE}
    return json.dumps({**told, "kind": kind}, sort_keys=True)


def unannounced(keys: Iterable[str], entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those of `keys` that no entry points at, one of each that a single entry would announce."""
    told = {signature(entry.get("kind", ""), entry) for entry in entries}
    missing = []
    for key in keys:
        found = announcement(key)
        if found is not None and (sign := signature(*found)) not in told:
            told.add(sign)
            missing.append(key)
    return missing


def unmet(entries: Mapping[str, Mapping[str, Any]], keys: Iterable[str]) -> list[str]:
    """Those of `entries` (log key -> what it says) that announce none of the files `keys`."""
    there = {signature(*found) for key in keys if (found := announcement(key)) is not None}
    return [key for key, entry in entries.items() if signature(entry.get("kind", ""), entry) not in there]


def announce(store: Store, key: str) -> None:
    """Write the entry that announces the file `key`, if any does. Raises StoreError when it cannot be written."""
    found = announcement(key)
    if found is not None:
        kind, fields = found
        log.write(store, kind, **fields)


def _subject(folder: str) -> dict[str, Any] | None:
    """Whose tries lie in `tries/<folder>/`, as the log says it."""
    kind, _, rest = folder.partition("/")
    name, _, number = rest.rpartition("/")
    if not (name and number.isdigit()):
        return None
    if kind == "evaluations":
        return {"evaluation_id": name, "attempt": int(number)}
    return {"key": name, "n": int(number)} if kind == "arrivals" else None
