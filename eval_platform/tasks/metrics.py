"""The vocabulary of scoring: which metrics and filters a task file may name. `scoring/` computes them.

Names, definitions and aggregations are lm-evaluation-harness's (0.4.13, `api/metrics.py` and
`api/task.py:ConfigurableTask.process_results`), `f1` aside: there it is scikit-learn's over choices, here it is
SQuAD's token overlap of a completion with its reference (Rajpurkar et al. 2016, arXiv:1606.05250).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

OutputType = Literal["multiple_choice", "generate_until", "loglikelihood", "loglikelihood_rolling"]
OUTPUT_TYPES: tuple[OutputType, ...] = get_args(OutputType)

# How the values of items become one number. mean: of the item's values. perplexity: exp(-mean log-likelihood) over
# items. weighted_perplexity: exp(-sum log-likelihood / sum words or bytes). bits_per_byte: that exponent / ln 2.
Aggregation = Literal["mean", "perplexity", "weighted_perplexity", "bits_per_byte"]

# Part of every task_id: raise it when any definition below changes what it computes.
SCORER_VERSION = 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: what it applies to and what its aggregated value may be.

    low, high: the range of the aggregated value, both ends included. proportion: every item's value is 0 or 1.
    """

    name: str
    output_types: frozenset[OutputType]
    low: float
    high: float
    higher_is_better: bool
    proportion: bool
    aggregation: Aggregation


def _share(name: str, *output_types: OutputType, proportion: bool = True) -> Metric:
    return Metric(name, frozenset(output_types), 0.0, 1.0, True, proportion, "mean")


def _surprise(name: str, low: float, output_type: OutputType, aggregation: Aggregation) -> Metric:
    return Metric(name, frozenset({output_type}), low, math.inf, False, False, aggregation)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            # loglikelihood: whether the target is what greedy decoding would say.
            _share("acc", "multiple_choice", "loglikelihood"),
            # Log-likelihood per character (acc_norm) or per UTF-8 byte (acc_bytes) of the choice, delimiter left out.
            _share("acc_norm", "multiple_choice"),
            _share("acc_bytes", "multiple_choice"),
            # Log-likelihood less that of the choice after nothing at all: asks twice as much of the model.
            _share("acc_mutual_info", "multiple_choice"),
            # Asked in both orders of the choices; the right one has the larger sum of log-likelihoods.
            _share("acc_both_orders", "multiple_choice"),
            _share("exact_match", "generate_until"),
            _share("f1", "generate_until", proportion=False),
            # INSTRUCTEVAL's rule: whether the completion begins with the reference.
            _share("prefix_match", "generate_until"),
            # DROP's own scorer: spans in any order, numbers by value.
            _share("drop_em", "generate_until"),
            _share("drop_f1", "generate_until", proportion=False),
            # Whether anything was said: for answers that are stored now and judged later. No measure of quality.
            _share("answered", "generate_until"),
            _surprise("perplexity", 1.0, "loglikelihood", "perplexity"),
            _surprise("word_perplexity", 1.0, "loglikelihood_rolling", "weighted_perplexity"),
            _surprise("byte_perplexity", 1.0, "loglikelihood_rolling", "weighted_perplexity"),
            _surprise("bits_per_byte", 0.0, "loglikelihood_rolling", "bits_per_byte"),
        )
    }
)

DEFAULT_METRICS: Mapping[OutputType, tuple[str, ...]] = MappingProxyType(
    {
        "multiple_choice": ("acc", "acc_norm"),
        "generate_until": ("exact_match",),
        "loglikelihood": ("perplexity", "acc"),
        "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    }
)

# metric -> the keyword arguments that a `metric_list` entry may carry (beside aggregation and higher_is_better).
METRIC_ARGUMENTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {"exact_match": frozenset({"ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore"})}
)

# filter -> the arguments it takes; applied to completions in the order in which a task lists them.
FILTERS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "regex": frozenset({"regex_pattern", "group_select", "fallback"}),
        "remove_whitespace": frozenset(),
        "lowercase": frozenset(),
        "uppercase": frozenset(),
        "map": frozenset({"mapping_dict", "default_value"}),
        "take_first": frozenset(),
        "majority_vote": frozenset(),
    }
)

# A regex filter's answer where nothing matched: what "unparsed" means.
UNPARSED = "[invalid]"
