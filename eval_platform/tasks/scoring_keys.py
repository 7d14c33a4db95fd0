"""How may an answer be scored? The sections of a task file about metrics, filters, programs and the gate."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from eval_platform.tasks.metrics import FILTERS, METRIC_ARGUMENTS, METRICS
from eval_platform.tasks.sections import Section, did_you_mean, listed, must_compile

MACRO_MEAN = "macro_mean"
_ARGUMENTS = sorted(set().union(*METRIC_ARGUMENTS.values()))


class MetricEntry(Section):
    """One entry of metric_list. aggregation and higher_is_better follow from the metric; said, they must agree.

    aggregation: macro_mean is the one choice there is: the mean of the subsets' means, instead of that of all items.
    """

    metric: str
    aggregation: str | None = None
    higher_is_better: bool | None = None
    hf_evaluate: Literal[False] | None = None
    ignore_case: bool | None = None
    ignore_punctuation: bool | None = None
    ignore_numbers: bool | None = None
    regexes_to_ignore: list[str] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the metric's function that are set."""
        return {key: getattr(self, key) for key in _ARGUMENTS if getattr(self, key) is not None}

    @property
    def is_macro(self) -> bool:
        """Whether every subset counts the same, however many items it has."""
        return self.aggregation == MACRO_MEAN

    @field_validator("metric")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METRICS:
            raise ValueError(f"no metric is called {name!r}{did_you_mean(name, METRICS)}; there are {listed(METRICS)}")
        return name

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        metric = METRICS[self.metric]
        if self.is_macro and metric.aggregation != "mean":
            raise ValueError(f"{metric.name} is no mean over items, so it has no {MACRO_MEAN}; remove aggregation")
        if self.aggregation not in (None, metric.aggregation, MACRO_MEAN):
            raise ValueError(f"{metric.name} is aggregated by {metric.aggregation}, not by {self.aggregation}")
        if self.higher_is_better not in (None, metric.higher_is_better):
            better = "higher" if metric.higher_is_better else "lower"
            raise ValueError(f"of {metric.name} {better} is better; remove higher_is_better")
        for argument in self.arguments:
            if argument not in METRIC_ARGUMENTS.get(metric.name, ()):
                raise ValueError(f"{metric.name} takes no {argument}")
        for pattern in self.regexes_to_ignore or ():
            must_compile(pattern)
        return self


class FilterStep(Section):
    """One function of a filter pipeline, with its arguments."""

    function: str
    regex_pattern: str | None = None
    group_select: int | None = None
    fallback: str | None = None
    mapping_dict: dict[str, str] | None = None
    default_value: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that are set."""
        return {
            key: value
            for key in type(self).model_fields
            if (value := getattr(self, key)) is not None and key != "function"
        }

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.function not in FILTERS:
            near = did_you_mean(self.function, FILTERS)
            raise ValueError(f"no filter is called {self.function!r}{near}; there are {listed(FILTERS)}")
        for argument in self.arguments:
            if argument not in FILTERS[self.function]:
                raise ValueError(f"the filter {self.function} takes no {argument}")
        if self.regex_pattern is not None:
            must_compile(self.regex_pattern)
        return self


class FilterPipeline(Section):
    """A named way from a completion to what is scored. Several give several scores, `<metric>,<name>` each."""

    name: str = Field(min_length=1)
    filter: list[FilterStep] = Field(min_length=1)


class Code(Section):
    """How a completion becomes a program that passes or fails: a template over the document and `completion`.

    program: ends with the tests; what runs to its end has passed. timeout: seconds it may take, from its first
    statement on.
    """

    program: str
    timeout: float = Field(default=3.0, gt=0, le=60)


class HarnessMetric(Section):
    """A metric that lm-evaluation-harness computes. own: its values become one number by a function of its own."""

    name: str
    aggregation: Literal["mean", "own"]
    higher_is_better: bool


class Harness(Section):
    """Which task of lm-evaluation-harness this is; made at sync of a task file's `lm_eval: NAME`, never written.

    metrics: scored by its own functions; empty: metric_list and filter_list say all. The rest matters only then: its
    filters by name, the YAML file below lm_eval/tasks with what overrides it, the release, and a digest of the code.
    """

    task: str
    num_fewshot: int
    metrics: list[HarnessMetric] = Field(default=[])
    filters: list[str] = Field(default=[])
    file: str = ""
    overrides: dict[str, Any] = Field(default={})
    version: str = ""
    code: str = ""

    @property
    def better(self) -> Mapping[str, bool]:
        """Metric -> whether a higher value is better."""
        return {metric.name: metric.higher_is_better for metric in self.metrics}


class Quality(Section):
    """What the gate shall make of this task's answers. Shares are of all samples, from 0 to 1.

    raise_: names of warnings that hold the result here. empty, truncated and unparsed: the share above which the gate
    warns; absent, its own.
    """

    raise_: list[str] = Field(default=[], alias="raise")
    empty_share: float | None = Field(default=None, ge=0, le=1)
    truncated_share: float | None = Field(default=None, ge=0, le=1)
    unparsed_share: float | None = Field(default=None, ge=0, le=1)


def score_name(metric: str, filter_name: str) -> str:
    """How a score is called: the metric, and the filter where it has a name of its own (lm-eval's `metric,filter`)."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"
