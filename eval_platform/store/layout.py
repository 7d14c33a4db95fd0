"""Where each file of the store lies: the one place that knows key names.

An arrival key holds slashes (`<root>/<path>`) and one key may lie below another (`runs/a` and `runs/a/b`), so the
files of a key are always listed with the delimiter `/`, which leaves deeper keys out.
"""

import re
from collections.abc import Iterator

from eval_platform.store.base import Store

LAYOUT_VERSION = 1

ROOT = "root.json"
ARRIVALS = "arrivals/"
LOG = "log/"
BUNDLES = "bundles/"

_ARRIVAL = re.compile(r"arrivals/(?P<key>.+)/(?P<n>[1-9][0-9]*)\.json")
_DECISION = re.compile(r"decisions/[^/]+/(?P<attempt>[1-9][0-9]*)-(?P<n>[1-9][0-9]*)\.json")
_NUMBERED = re.compile(r"(?:.*/)?(?P<n>[1-9][0-9]*)(?P<rest>\..*)")


def numbered(key: str) -> tuple[int, str] | None:
    """(12, ".json") for ".../12.json"; None where the name does not begin with a number and a dot."""
    match = _NUMBERED.fullmatch(key)
    return (int(match["n"]), match["rest"]) if match else None


def numbers(store: Store, folder: str, suffix: str = ".json") -> Iterator[tuple[int, str]]:
    """(n, store key) of every `<n><suffix>` directly in `folder` (which ends in a slash), in no order of n."""
    for entry in store.list(folder, delimiter="/"):
        found = numbered(entry.key)
        if found and found[1] == suffix:
            yield found[0], entry.key


def newest_numbered(store: Store, folder: str) -> tuple[int, str] | None:
    """(n, store key) of the `<n>.json` with the highest n directly in `folder`; None when there is none."""
    return max(numbers(store, folder), default=None)


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


def arrival_skipped(key: str, n: int, tier: str) -> str:
    return f"{arrival_folder(key)}{n}.skipped-{tier}.json"


def parse_skipped(rest: str) -> str | None:
    """The tier, of what stands after the number in the name of an `arrival_skipped`; None for any other file."""
    inner = rest.removeprefix(".skipped-").removesuffix(".json")
    return inner if rest == f".skipped-{inner}.json" else None


def parse_arrival(store_key: str) -> tuple[str, int] | None:
    """(key, n) of an arrival's own file; None for its companions."""
    match = _ARRIVAL.fullmatch(store_key)
    return (match["key"], int(match["n"])) if match else None


def task(task_id: str) -> str:
    return f"tasks/{task_id}.json"


def task_names(name: str) -> str:
    """Folder of `<n>.json`: which task_id the name has stood for; the highest n is current."""
    return f"tasks/by-name/{name}/"


def task_name(name: str, n: int) -> str:
    return f"{task_names(name)}{n}.json"


def dataset_documents(dataset_id: str) -> str:
    return f"datasets/{dataset_id}/documents.parquet"


def dataset_card(dataset_id: str) -> str:
    return f"datasets/{dataset_id}/dataset.json"


def dataset_checks(dataset_id: str, ask_id: str) -> str:
    """What was found when the documents were first frozen for what is asked of them."""
    return f"datasets/{dataset_id}/checks-{ask_id}.json"


def prompts(prompts_id: str) -> str:
    return f"prompts/{prompts_id}.parquet"


def try_folder(subject: tuple[str, str, int]) -> str:
    kind, name, number = subject
    return f"tries/{kind}/{name}/{number}/"


def try_start(subject: tuple[str, str, int], k: int) -> str:
    return f"{try_folder(subject)}{k}.start.json"


def try_end(subject: tuple[str, str, int], k: int) -> str:
    return f"{try_folder(subject)}{k}.end.json"


def retry(subject: tuple[str, str, int], k: int) -> str:
    return f"{try_folder(subject)}retry-{k}.json"


def journal_folder(answers_id: str, attempt: int) -> str:
    return f"journal/{answers_id}/{attempt}/"


def journal_segment(answers_id: str, attempt: int, try_id: str, n: int) -> str:
    # Nine digits, so that listing order is the order of writing.
    return f"{journal_folder(answers_id, attempt)}{try_id}/{n:09d}.jsonl"


def journal_try(segment: str) -> str:
    """The try that wrote it."""
    return segment.split("/")[3]


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


def evaluation_pruned(evaluation_id: str, attempt: int) -> str:
    """The tombstone of an attempt's samples."""
    return f"{evaluation_folder(evaluation_id)}{attempt}.pruned.json"


def answers_folder(answers_id: str) -> str:
    return f"answers/{answers_id}/"


def answers(answers_id: str, evaluation_id: str, attempt: int) -> str:
    return f"{answers_folder(answers_id)}{evaluation_id}-{attempt}.json"


def decision_folder(evaluation_id: str) -> str:
    return f"decisions/{evaluation_id}/"


def decision(evaluation_id: str, attempt: int, n: int) -> str:
    return f"{decision_folder(evaluation_id)}{attempt}-{n}.json"


def parse_decision(store_key: str) -> tuple[int, int] | None:
    """(attempt, n) of a decision's file; None for any other."""
    match = _DECISION.fullmatch(store_key)
    return (int(match["attempt"]), int(match["n"])) if match else None


def log_folder(date: str) -> str:
    return f"{LOG}{date}/"


def log_entry(date: str, time: str, entry_id: str) -> str:
    return f"{log_folder(date)}{time}-{entry_id}.json"


def bundle(bundle_id: str) -> str:
    return f"{BUNDLES}{bundle_id}.parquet"
