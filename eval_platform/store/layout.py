"""Where each file of the store lies: the one place that knows key names. Pure functions, no store touched.

An arrival key holds slashes (`<root>/<path>`) and one key may lie below another (`runs/a` and `runs/a/b`), so the
files of a key are always listed with the delimiter `/`, which leaves deeper keys out.
"""

import re

LAYOUT_VERSION = 1

ROOT = "root.json"
ARRIVALS = "arrivals/"
LOG = "log/"

_ARRIVAL = re.compile(r"arrivals/(?P<key>.+)/(?P<n>[1-9][0-9]*)\.json")
_NUMBERED = re.compile(r"(?:.*/)?(?P<n>[1-9][0-9]*)(?P<rest>[.-].*)")


def numbered(key: str) -> tuple[int, str] | None:
    """(12, ".json") for ".../12.json", (1, "-3.json") for ".../1-3.json"; None for a name without a leading number."""
    match = _NUMBERED.fullmatch(key)
    return (int(match["n"]), match["rest"]) if match else None


def root_registration(name: str) -> str:
    return f"roots/{name}.json"


def arrival_folder(key: str) -> str:
    return f"{ARRIVALS}{key}/"


def arrival(key: str, n: int) -> str:
    return f"{arrival_folder(key)}{n}.json"


def arrival_identity(key: str, n: int) -> str:
    return f"{arrival_folder(key)}{n}.identity.json"


def arrival_seen(key: str, n: int, watcher: str) -> str:
    return f"{arrival_folder(key)}{n}.seen-{watcher}.json"


def parse_arrival(store_key: str) -> tuple[str, int] | None:
    """(key, n) of an arrival's own file; None for its companions."""
    match = _ARRIVAL.fullmatch(store_key)
    return (match["key"], int(match["n"])) if match else None


def try_folder(subject: tuple[str, str, int]) -> str:
    kind, name, number = subject
    return f"tries/{kind}/{name}/{number}/"


def journal_folder(answers_id: str, attempt: int) -> str:
    return f"journal/{answers_id}/{attempt}/"


def journal_segment(answers_id: str, attempt: int, try_id: str, n: int) -> str:
    # Nine digits, so that listing order is the order of writing.
    return f"{journal_folder(answers_id, attempt)}{try_id}/{n:09d}.jsonl"


def lease_folder(name: str) -> str:
    return f"leases/{name}/"


def lease(name: str, generation: int) -> str:
    return f"{lease_folder(name)}{generation}.json"


def lease_beat(name: str, generation: int) -> str:
    return f"{lease_folder(name)}{generation}.beat"


def lease_released(name: str, generation: int) -> str:
    return f"{lease_folder(name)}{generation}.released"


def samples(evaluation_id: str, try_id: str) -> str:
    return f"samples/{evaluation_id}/{try_id}.parquet"


def evaluation_folder(evaluation_id: str) -> str:
    return f"evaluations/{evaluation_id}/"


def evaluation(evaluation_id: str, attempt: int) -> str:
    return f"{evaluation_folder(evaluation_id)}{attempt}.json"


def evaluation_asked(evaluation_id: str, attempt: int) -> str:
    return f"{evaluation_folder(evaluation_id)}{attempt}.asked.json"


def answers_folder(answers_id: str) -> str:
    return f"answers/{answers_id}/"


def answers(answers_id: str, evaluation_id: str, attempt: int) -> str:
    return f"{answers_folder(answers_id)}{evaluation_id}-{attempt}.json"


def decision_folder(evaluation_id: str) -> str:
    return f"decisions/{evaluation_id}/"


def decision(evaluation_id: str, attempt: int, n: int) -> str:
    return f"{decision_folder(evaluation_id)}{attempt}-{n}.json"


def log_folder(date: str) -> str:
    return f"{LOG}{date}/"


def log_entry(date: str, time: str, entry_id: str) -> str:
    return f"{log_folder(date)}{time}-{entry_id}.json"
