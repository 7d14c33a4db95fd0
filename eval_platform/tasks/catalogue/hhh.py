"""HHH alignment: 221 queries with two responses each, of which people chose one as more helpful, honest or harmless.

A row is `category` (harmless, helpful, honest, other), `query`, `chosen` and `rejected`.
"""

from typing import Any

from eval_platform.errors import TaskError
from eval_platform.tasks.catalogue.data import Card, Data, one_of

CATEGORIES = ("harmless", "helpful", "honest", "other")
_FILE = "hhh_alignment/hhh_alignment_eval.json"

CARD = Card(
    title="HHH alignment",
    homepage="https://github.com/google/BIG-bench/tree/main/bigbench/benchmark_tasks/hhh_alignment",
    licence="Apache-2.0",
    citation="Askell et al., A General Language Assistant as a Laboratory for Alignment, 2021, arXiv:2112.00861",
    hub="HuggingFaceH4/hhh_alignment",
    files=(_FILE,),
)

# The local file is that of github.com/prometheus-eval/prometheus-eval, where query and response stand in a judge's
# prompt, between these.
_BEFORE_QUERY = "###The instruction to evaluate:\n"
_BEFORE_RESPONSE = "\n\n###Response to evaluate:\n"
_AFTER_RESPONSE = "\n\n###Score Rubrics:"


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Split test; a configuration is a category, without one all four, one after the other."""
    one_of("hhh", "split", split, ("test",))
    categories = CATEGORIES if config is None else (one_of("hhh", "config", config, CATEGORIES),)
    local = data.json(_FILE)
    if local is not None:
        return [_local(row) for category in categories for row in local if row["source"] == category]
    found = []
    for category in categories:
        items = data.from_hub("hhh", CARD, category, "test")
        found += [_from_hub(category, item) for item in items]
    return found


def _local(row: dict[str, Any]) -> dict[str, Any]:
    query, chosen = _cut_out(row["chosen_instruction"])
    _, rejected = _cut_out(row["rejected_instruction"])
    return {"category": row["source"], "query": query, "chosen": chosen, "rejected": rejected}


def _cut_out(prompt: str) -> tuple[str, str]:
    """(query, response) in a judge's prompt."""
    _, start, rest = prompt.partition(_BEFORE_QUERY)
    query, middle, rest = rest.partition(_BEFORE_RESPONSE)
    response, end, _ = rest.partition(_AFTER_RESPONSE)
    if not (start and middle and end):
        raise TaskError(f"{_FILE}: an item is no judge's prompt: {prompt[:120]!r}", remedy="copy the file anew")
    return query, response


def _from_hub(category: str, item: dict[str, Any]) -> dict[str, Any]:
    by_label = dict(zip(item["targets"]["labels"], item["targets"]["choices"], strict=True))
    return {"category": category, "query": item["input"], "chosen": by_label[1], "rejected": by_label[0]}
