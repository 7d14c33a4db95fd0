"""A task ready to be asked: its definition, its documents, and the ids that follow from them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from eval_platform.identity import content_id
from eval_platform.tasks.metrics import SCORER_VERSION
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.scoring_keys import MACRO_MEAN
from eval_platform.values import Document

# Part of every ask_id: raise it when the same definition and documents would give other prompts.
RENDERER_VERSION = 1


@dataclass(frozen=True, slots=True)
class Task:
    """One task with its frozen documents.

    shots: what few-shot examples are drawn from, empty when none are asked for. fewshot_dataset_id: their snapshot.
    chance: the primary score of guessing, None where that has no meaning or is not known.
    """

    name: str
    definition: TaskFile
    task_id: str
    ask_id: str
    dataset_id: str
    fewshot_dataset_id: str | None
    documents: tuple[Document, ...]
    shots: tuple[Mapping[str, Any], ...]
    chance: float | None

    @property
    def repeats(self) -> int:
        return self.definition.repeats

    @property
    def metrics(self) -> tuple[str, ...]:
        return self.definition.metrics

    @property
    def primary_metric(self) -> str:
        """The score that boards show, with its filter: `acc`, or `exact_match,strict-match`."""
        return self.definition.primary_metric

    @property
    def higher_is_better(self) -> bool:
        return bool(self.definition.higher_is_better)

    @property
    def base_ask_id(self) -> str | None:
        """The ask_id of the task without what its `chat` says, under which the answers of models that are not asked
        as a chat are kept; None where it says nothing."""
        plain = ask_id(self.definition.model_copy(update={"chat": None}), self.dataset_id, self.fewshot_dataset_id)
        return None if plain == self.ask_id else plain

    @property
    def fields(self) -> frozenset[str]:
        """Every field that some document has: what a key like doc_to_text may name instead of being a template."""
        return frozenset().union(*(document.fields for document in self.documents))


def ask_id(definition: TaskFile, dataset_id: str, fewshot_dataset_id: str | None) -> str:
    """The id of what is asked (contract section 1): everything that can change a request, and nothing else."""
    return content_id(what_is_asked(definition, dataset_id, fewshot_dataset_id))


def task_id(definition: TaskFile, ask_id: str, chance: float | None) -> str:
    """The id of a task: what is asked, how often, and what is made of the answers."""
    return content_id(how_it_is_scored(definition, ask_id, chance))


def what_is_asked(definition: TaskFile, dataset_id: str, fewshot_dataset_id: str | None) -> dict[str, Any]:
    """What an ask_id is the hash of."""
    said = definition.model_dump(mode="json")
    asked: dict[str, Any] = {
        key: said[key]
        for key in (
            "output_type",
            "doc_to_text",
            "doc_to_choice",
            "doc_to_target",
            "description",
            "target_delimiter",
            "gen_prefix",
        )
    }
    # Keys that came later stand here only where they are said, so that ids from before them stay what they were.
    if definition.doc_to_text_reversed is not None:
        asked["doc_to_text_reversed"] = definition.doc_to_text_reversed
    if definition.max_input_tokens is not None:
        asked["max_input_tokens"] = definition.max_input_tokens
    # Asked or not: an ask_id does not know whether the run is a chat.
    chat = definition.chat.model_dump(mode="json", exclude_none=True) if definition.chat is not None else {}
    if chat:
        asked["chat"] = chat
    generation = definition.generation
    asked["generation"] = None if generation is None else asdict(generation)
    asked["unconditional"] = definition.wants_unconditional
    asked["dataset_id"] = dataset_id
    # Without shots it does not matter how they would be drawn.
    asked["shots"] = None
    if definition.shots:
        asked["shots"] = {
            "n": definition.shots,
            "dataset_id": fewshot_dataset_id,
            "excludes_asked": definition.excludes_asked,
            "delimiter": definition.fewshot_delimiter,
            **{key: value for key, value in said["fewshot_config"].items() if key not in ("split", "samples")},
        }
        if definition.shots_match is not None:
            asked["shots"]["match"] = definition.shots_match
    asked["renderer"] = RENDERER_VERSION
    return asked


def how_it_is_scored(definition: TaskFile, ask_id: str, chance: float | None) -> dict[str, Any]:
    """What a task_id is the hash of."""
    documents = definition.documents
    said = definition.model_dump(mode="json", by_alias=True)
    code = {} if definition.code is None else {"code": said["code"]}
    harness = {} if definition.harness is None else {"lm_eval": said["lm_eval"]}
    return {
        **code,
        **harness,
        "ask_id": ask_id,
        "repeats": definition.repeats,
        "scorer": SCORER_VERSION,
        # aggregation and higher_is_better follow from the metric, said or not.
        "metrics": [
            [entry.metric, {**entry.arguments, **({"aggregation": MACRO_MEAN} if entry.is_macro else {})}]
            for entry in definition.metric_list
        ],
        "filters": [[p.name, [[s.function, s.arguments] for s in p.filter]] for p in definition.filter_list],
        "primary_metric": definition.primary_metric,
        "chance": chance,
        "quality": said["quality"],
        "subset": documents.subset if documents else None,
        "cluster": documents.cluster if documents else None,
    }
