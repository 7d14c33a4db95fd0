"""What a task file may say. Keys are lm-evaluation-harness's (0.4.13, `config/task.py`) where the meaning is the same.

`reading.read_task_file` makes a TaskFile out of YAML; defaults are filled in here, so that two files that mean the
same have equal definitions, and so equal ids. What cannot be meant (a metric of another output type, a regex that
does not compile, shots that would show the answer) is refused here, before any document is read.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from eval_platform.tasks.asking import DEFAULT_MAX_NEW_TOKENS, ChatSection, Fewshot, GenerationKwargs
from eval_platform.tasks.metrics import DEFAULT_METRICS, METRICS, OUTPUT_TYPES, OutputType
from eval_platform.tasks.scoring_keys import MACRO_MEAN, Code, FilterPipeline, Harness, MetricEntry, Quality, score_name
from eval_platform.tasks.sections import Section, did_you_mean, is_set, json_only, listed
from eval_platform.tasks.sources import LOCAL_FORMATS, DatasetKwargs, Documents
from eval_platform.values import Generation

_MUTUAL = "acc_mutual_info"

# Keys of lm-evaluation-harness that are refused, and why.
REFUSED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "process_docs": "it is a Python function, and task files run no code; write the processed documents to a file",
        "process_results": "it is a Python function, and task files run no code; use filter_list and metric_list",
        "custom_dataset": "it is a Python function, and task files run no code; write the documents to a file",
        "unsafe_code": "a model's programs run in a sandbox; say `code: {program: ...}` and metrics pass@k",
        "use_prompt": "promptsource templates are not supported; write the template in doc_to_text",
        "doc_to_image": "only text is supported",
        "doc_to_audio": "only text is supported",
        "group": "a group is no task here; make it one task with `documents: {subset: <field>}`",
        "task_list": "one file is one task here; write a file for each",
        "aggregate_metric_list": "a group is no task here; make it one task with `documents: {subset: <field>}`",
    }
)


class TaskFile(Section):
    """One task. See `docs/task_files.md` for each key with an example.

    After validation metric_list, filter_list, primary_metric and higher_is_better are always filled in.
    """

    task: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)
    # For people; part of no id.
    task_alias: str | None = None
    tag: str | list[str] | None = None
    title: str = ""
    about: str = ""
    source: str = ""
    licence: str = ""
    citation: str = ""
    metadata: dict[str, Any] | None = None

    # Documents: ours, or lm-eval's.
    documents: Documents | None = None
    dataset_path: str | None = None
    dataset_name: str | None = None
    dataset_kwargs: DatasetKwargs | None = None
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None

    # What is asked.
    output_type: OutputType = "generate_until"
    doc_to_text: str | int | None = None
    # The question once more, its choices in the opposite order: both are asked, for acc_both_orders.
    doc_to_text_reversed: str | None = None
    doc_to_choice: str | list[str] | dict[str, str] | None = None
    doc_to_target: str | int | list[str] | list[int] | None = None
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    gen_prefix: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    # A prompt to be completed that has more tokens loses shots, the last first, until it fits or has none.
    max_input_tokens: int | None = Field(default=None, gt=0)
    fewshot_config: Fewshot = Fewshot()
    generation_kwargs: GenerationKwargs | None = None
    chat: ChatSection | None = None
    repeats: int = Field(default=1, ge=1)

    # How it is scored.
    metric_list: list[MetricEntry] = Field(default=[], validate_default=True)
    filter_list: list[FilterPipeline] = Field(default=[], validate_default=True)
    code: Code | None = None
    lm_eval: Harness | None = None
    primary_metric: str = ""
    higher_is_better: bool | None = None
    chance: float | None = None
    quality: Quality = Quality()

    # Read by lm-eval 0.4 and used for nothing there; accepted so that its files load unchanged.
    should_decontaminate: bool | None = None
    doc_to_decontamination_query: str | None = None

    @property
    def in_chat(self) -> "TaskFile":
        """The task as it is asked in a conversation: what `chat` says in place of what is said for a base model."""
        if self.chat is None:
            return self
        said = {key: getattr(self.chat, key) for key in type(self.chat).model_fields if is_set(self.chat, key)}
        return self.model_copy(update={key: value for key, value in said.items() if key in type(self).model_fields})

    @property
    def shots(self) -> int:
        """Shots asked for. Rolling log-likelihoods have no prompt to put them in (lm-eval drops them too)."""
        return 0 if self.output_type == "loglikelihood_rolling" else self.num_fewshot or 0

    @property
    def shots_match(self) -> str | None:
        """The field in which shots must agree with the asked document."""
        fewshot = self.documents.fewshot if self.documents else None
        return fewshot.match if fewshot and self.shots else None

    @property
    def harness(self) -> Harness | None:
        """The lm-evaluation-harness task whose own functions score this one; None: we do."""
        return self.lm_eval if self.lm_eval is not None and self.lm_eval.metrics else None

    @property
    def shots_shown(self) -> int:
        """Shots in a prompt, also where lm-evaluation-harness has written them."""
        return self.shots if self.lm_eval is None else self.lm_eval.num_fewshot

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(entry.metric for entry in self.metric_list)

    @property
    def score_names(self) -> tuple[str, ...]:
        """Every score this task gives, primary or not: `<metric>`, or `<metric>,<filter>` for a named filter."""
        if self.harness is not None:
            return tuple(
                score_name(one.name, filter_) for filter_ in self.harness.filters for one in self.harness.metrics
            )
        return tuple(score_name(metric, pipeline.name) for pipeline in self.filter_list for metric in self.metrics)

    @property
    def wants_unconditional(self) -> bool:
        """Whether each choice is also asked after nothing at all."""
        return _MUTUAL in self.metrics or (self.harness is not None and _MUTUAL in self.harness.better)

    @property
    def generation(self) -> Generation | None:
        """How completions are drawn, as lm-eval 0.4.13 resolves it (`config/task.py`, `normalize_gen_kwargs`)."""
        if self.output_type != "generate_until":
            return None
        said = self.generation_kwargs or GenerationKwargs()
        until = said.until if said.until is not None else [self.fewshot_delimiter]
        length = said.max_gen_toks or said.max_new_tokens or said.max_tokens or said.max_completion_tokens
        return Generation(
            max_new_tokens=length or DEFAULT_MAX_NEW_TOKENS,
            stop=(until,) if isinstance(until, str) else tuple(until),
            temperature=0.0 if said.do_sample is False else said.temperature,
            top_p=said.top_p,
            top_k=said.top_k,
        )

    @property
    def evaluated_split(self) -> str | None:
        """The split of `dataset_path` that is asked: lm-eval takes test before validation."""
        return self.test_split or self.validation_split

    @property
    def shots_split(self) -> str | None:
        """The split of `dataset_path` that shots come from; None where they come from elsewhere, or there are none."""
        if self.dataset_path is None or not self.shots:
            return None
        named = self.fewshot_config.split or self.fewshot_split
        if named is None and self.fewshot_config.samples is not None:
            return None
        return named or self.training_split or self.validation_split or self.test_split

    @property
    def excludes_asked(self) -> bool:
        """Whether a shot may not be the asked document.

        lm-eval's rule is whether the shots' split *as written* is `test_split` (`api/task.py:fewshot_context`), both
        absent included; it also decides how many random numbers the default sampler draws. Ours: where the shots
        have no source of their own.
        """
        if self.dataset_path is None:
            ours = self.documents
            return ours is not None and ours.shots_source is None and self.fewshot_config.samples is None
        return (self.fewshot_config.split or self.fewshot_split) == self.test_split

    @field_validator("metadata")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return json_only(value)

    @field_validator("fewshot_config", mode="before")
    @classmethod
    def _no_dead_key(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("fewshot_indices") is not None:
            raise ValueError("fewshot_indices has no effect in lm-eval 0.4.13; list the documents in `samples`")
        if isinstance(value, dict) and value.get("process_docs") is not None:
            raise ValueError(f"process_docs is refused: {REFUSED_KEYS['process_docs']}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """Defaults that depend on other keys. A key without a value is an absent key, as in lm-eval."""
        if not isinstance(raw, dict):
            return raw
        filled = {key: value for key, value in raw.items() if value is not None}
        output_type = filled.get("output_type", "generate_until")
        if isinstance(filled.get("lm_eval"), dict) and filled["lm_eval"].get("metrics"):
            filled["metric_list"] = []
        elif not filled.get("metric_list") and output_type in OUTPUT_TYPES:
            filled["metric_list"] = [{"metric": name} for name in DEFAULT_METRICS[output_type]]
        if not filled.get("filter_list"):
            filled["filter_list"] = [{"name": "none", "filter": [{"function": "take_first"}]}]
        return filled

    @model_validator(mode="after")
    def _documents_once(self) -> Self:
        if self.lm_eval is not None:  # its documents were made by lm-evaluation-harness
            return self
        ours = self.documents is not None and bool(self.documents.named)
        if ours == (self.dataset_path is not None):
            raise ValueError("say where the documents are, once: `documents: {file: ...}` or `dataset_path`")
        if ours:
            for key in ("dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} belongs to `dataset_path`; with `documents` remove it")
            if self.fewshot_split or self.fewshot_config.split:
                raise ValueError("a few-shot split belongs to `dataset_path`; name `documents: {fewshot: ...}` instead")
            return self
        if self.documents is not None and self.documents.fewshot is not None:
            raise ValueError("documents.fewshot goes with our own `documents`; with `dataset_path` say `fewshot_split`")
        if self.evaluated_split is None:
            raise ValueError("say which split is asked: `test_split` (or `validation_split`)")
        if self.dataset_path in LOCAL_FORMATS and (self.dataset_kwargs is None or not self.dataset_kwargs.data_files):
            raise ValueError(f"dataset_path: {self.dataset_path} needs `dataset_kwargs: {{data_files: ...}}`")
        if self.shots_split == self.evaluated_split and not self.excludes_asked:
            raise ValueError(
                f"shots would be drawn from the split that is asked ({self.shots_split}) without leaving out the asked "
                f"document, so that its answer may stand in its own prompt (as it does in lm-eval); say `test_split: "
                f"{self.shots_split}` and `fewshot_split: {self.shots_split}`, or name another fewshot_split"
            )
        return self

    @model_validator(mode="after")
    def _templates_there(self) -> Self:
        if self.doc_to_target is None and self.metrics != ("answered",):
            raise ValueError("doc_to_target is missing: say which field or template is the right answer")
        if self.doc_to_text is None and self.output_type != "loglikelihood_rolling":
            raise ValueError("doc_to_text is missing: say which field or template is the question")
        if self.output_type == "multiple_choice" and self.doc_to_choice is None:
            raise ValueError("doc_to_choice is missing: a multiple_choice task needs a list, a field or a template")
        if self.max_input_tokens is not None and not (self.shots and self.output_type == "generate_until"):
            raise ValueError(
                "max_input_tokens drops shots of prompts that are to be completed; there are none: remove it"
            )
        if self.generation_kwargs is not None and self.output_type != "generate_until":
            raise ValueError(f"generation_kwargs has no meaning for output_type {self.output_type}; remove it")
        return self

    @model_validator(mode="after")
    def _chat_fits(self) -> Self:
        if self.chat is None:
            return self
        if self.output_type == "loglikelihood_rolling":
            raise ValueError("chat: a whole text that is scored is no conversation; remove it")
        if (self.chat.num_fewshot or 0) > self.shots:
            raise ValueError(
                f"chat: num_fewshot {self.chat.num_fewshot} is more than the task's own {self.shots}, so there are no "
                "shots frozen for it; raise num_fewshot of the task, or lower that of chat"
            )
        if self.chat.generation_kwargs is not None and self.output_type != "generate_until":
            raise ValueError(f"chat: generation_kwargs has no meaning for output_type {self.output_type}; remove it")
        if self.chat.doc_to_text is not None and self.doc_to_text_reversed is not None:
            raise ValueError("chat: doc_to_text would be asked in one order only; remove it, or doc_to_text_reversed")
        return self

    @model_validator(mode="after")
    def _scoring_fits(self) -> Self:
        for name in self.metrics:
            if self.output_type not in METRICS[name].output_types:
                fitting = [metric.name for metric in METRICS.values() if self.output_type in metric.output_types]
                raise ValueError(f"metric_list: {name} does not apply to {self.output_type}; use {listed(fitting)}")
        if len(set(self.metrics)) != len(self.metrics):
            raise ValueError("metric_list names a metric twice; keep one")
        if (self.metrics == ("acc_both_orders",)) != (self.doc_to_text_reversed is not None):
            raise ValueError(
                "doc_to_text_reversed and the metric acc_both_orders go together, and with no other metric: say both, "
                "or neither"
            )
        if any(entry.is_macro for entry in self.metric_list) and not (self.documents and self.documents.subset):
            raise ValueError(f"aggregation: {MACRO_MEAN} is over subsets; name their field in `documents: {{subset}}`")
        names = [pipeline.name for pipeline in self.filter_list]
        if len(set(names)) != len(names):
            raise ValueError("filter_list has two filters of one name; rename one")
        if names != ["none"] and self.output_type != "generate_until":
            raise ValueError(f"filter_list applies to completions, and {self.output_type} has none; remove it")
        return self

    @model_validator(mode="after")
    def _code_fits(self) -> Self:
        drawn = [int(name.removeprefix("pass@")) for name in self.metrics if name.startswith("pass@")]
        if bool(drawn) != (self.code is not None):
            raise ValueError("pass@k and `code: {program: ...}` belong together: the one says what the other runs")
        if drawn and len(drawn) != len(self.metrics):
            raise ValueError("metric_list: pass@k is scored by running programs; put the other metrics in another task")
        if drawn and max(drawn) > self.repeats:
            raise ValueError(f"pass@{max(drawn)} needs `repeats: {max(drawn)}` or more, not {self.repeats}")
        for pipeline in self.filter_list if drawn else ():
            if pipeline.name == "verdict" or pipeline.name.startswith("verdict,"):
                raise ValueError(f"filter_list: {pipeline.name!r} is where a program's verdict is kept; rename it")
            if pipeline.name != "none" and any(s.function in ("take_first", "majority_vote") for s in pipeline.filter):
                raise ValueError(f"filter {pipeline.name}: pass@k is of all completions; remove what takes one of them")
        return self

    @model_validator(mode="after")
    def _primary(self) -> Self:
        primary = self.primary_metric or self.score_names[0]
        if primary not in self.score_names:
            raise ValueError(
                f"primary_metric: this task has no score {primary!r}{did_you_mean(primary, self.score_names)}; it has "
                f"{listed(self.score_names)}"
            )
        if self.harness is not None:
            object.__setattr__(self, "primary_metric", primary)
            object.__setattr__(self, "higher_is_better", self.harness.better[primary.partition(",")[0]])
            return self
        metric = METRICS[primary.partition(",")[0]]
        if self.higher_is_better not in (None, metric.higher_is_better):
            better = "higher" if metric.higher_is_better else "lower"
            raise ValueError(f"higher_is_better: of {metric.name} {better} is better; correct it or leave it out")
        if self.chance is not None and not metric.low <= self.chance <= metric.high:
            raise ValueError(f"chance: {self.chance} is outside the range of {metric.name}")
        object.__setattr__(self, "primary_metric", primary)
        object.__setattr__(self, "higher_is_better", metric.higher_is_better)
        return self
