"""The vocabulary of scoring: which metrics and filters a task file may name. `scoring/` computes them.

Names, definitions and aggregations are lm-evaluation-harness's (0.4.13, `api/metrics.py` and
`api/task.py:ConfigurableTask.process_results`), `f1` aside: there it is scikit-learn's over choices, here it is
SQuAD's token overlap of a completion with its reference (Rajpurkar et al. 2016, arXiv:1606.05250).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, get_args

OutputType = Literal["multiple_choice", "generate_until", "loglikelihood", "loglikelihood_rolling"]
OUTPUT_TYPES: tuple[OutputType, ...] = get_args(OutputType)

# How the values of items become one number. mean: of the item's values. perplexity: exp(-mean log-likelihood) over
# items. weighted_perplexity: exp(-sum log-likelihood / sum words or bytes). bits_per_byte: that exponent / ln 2.
# ratio, bleu, chrf: from sums of terms that each item has (`scoring/terms.py`).
Aggregation = Literal["mean", "perplexity", "weighted_perplexity", "bits_per_byte", "ratio", "bleu", "chrf"]

# Part of every task_id: raise it when any definition below changes what it computes.
SCORER_VERSION = 1


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: what it applies to and what its aggregated value may be.

    low, high: the range of the aggregated value, both ends included. proportion: every item's value is 0 or 1.
    packages: what must be installed to compute it (extra `metrics`). fields: what every document must have for it.
    of_nothing: the value of a ratio whose items count nothing; None: it has none.
    """

    name: str
    output_types: frozenset[OutputType]
    low: float
    high: float
    higher_is_better: bool
    proportion: bool
    aggregation: Aggregation
    packages: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    of_nothing: float | None = None


def _share(name: str, *output_types: OutputType, proportion: bool = True) -> Metric:
    return Metric(name, frozenset(output_types), 0.0, 1.0, True, proportion, "mean")


def _surprise(name: str, low: float, output_type: OutputType, aggregation: Aggregation) -> Metric:
    return Metric(name, frozenset({output_type}), low, math.inf, False, False, aggregation)


_FORMS = ("max", "diff", "acc")


def _bbq(name: str, low: float, *, of_nothing: float | None = None) -> Metric:
    fields = ("context_condition", "biased", "unknown")
    kinds: frozenset[OutputType] = frozenset({"multiple_choice"})
    return Metric(name, kinds, low, 1.0, low == 0, False, "ratio", fields=fields, of_nothing=of_nothing)


def _ifeval(name: str) -> Metric:
    prompts = name.startswith("prompt")
    return replace(
        _share(name, "generate_until", proportion=prompts),
        aggregation="mean" if prompts else "ratio",
        packages=("langdetect",),
        fields=("instruction_id_list", "kwargs"),
    )


def _library(name: str, high: float, aggregation: Aggregation, package: str, *, proportion: bool = False) -> Metric:
    kinds: frozenset[OutputType] = frozenset({"generate_until"})
    return Metric(name, kinds, 0.0, high, True, proportion, aggregation, packages=(package,))


def _truthful(kind: str, form: str) -> Metric:
    metric = _library(f"{kind}_{form}", 1.0 if form == "acc" else 100.0, "mean", "sacrebleu", proportion=form == "acc")
    return replace(
        metric,
        low=-100.0 if form == "diff" else 0.0,
        packages=("sacrebleu", "rouge_score"),
        fields=("correct_answers", "incorrect_answers"),
    )


PASS_AT = (1, 2, 3, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 128, 200)

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
            # IFEval: of prompts whose instructions are all followed, and of instructions.
            *map(_ifeval, ("prompt_level_strict_acc", "inst_level_strict_acc")),
            *map(_ifeval, ("prompt_level_loose_acc", "inst_level_loose_acc")),
            # XSTest: whether a completion begins as refusals do; and whether it should.
            replace(_share("refused", "generate_until"), higher_is_better=False),
            replace(_share("refused_rightly", "generate_until"), fields=("unsafe",)),
            # TruthfulQA: the probability of the true choices.
            _share("mc2", "multiple_choice", proportion=False),
            # TruthfulQA's generated answers: how near the nearest true reference, how much nearer than the false ones.
            *(_truthful(kind, form) for kind in ("bleu", "rouge1", "rouge2", "rougeL") for form in _FORMS),
            # BBQ: right answers and leaning, in contexts that leave the answer open and in those that tell it.
            _bbq("accuracy_amb", 0.0),
            _bbq("accuracy_disamb", 0.0),
            _bbq("amb_bias_score", -1.0),
            _bbq("disamb_bias_score", -1.0, of_nothing=0.0),
            # CrowS-Pairs: whether the sentence that stereotypes more is likelier, and by how many nats they differ.
            replace(_share("pct_stereotype", "multiple_choice"), higher_is_better=False),
            Metric("likelihood_diff", frozenset({"multiple_choice"}), 0.0, math.inf, False, False, "mean"),
            # By libraries: the same mathematics; the overlap of whole corpora; the overlap of texts.
            _library("math_verify", 1.0, "mean", "math_verify", proportion=True),
            _library("bleu", 100.0, "bleu", "sacrebleu"),
            _library("chrf", 100.0, "chrf", "sacrebleu"),
            *(_library(name, 1.0, "mean", "rouge_score") for name in ("rouge1", "rouge2", "rougeL")),
            # Programs that pass their tests (`code`): the chance that one of k completions does.
            *(_share(f"pass@{k}", "generate_until", proportion=k == 1) for k in PASS_AT),
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
        "even_indents": frozenset(),
        "first_block": frozenset(),
        "code_fence": frozenset(),
    }
)

# A regex filter's answer where nothing matched: what "unparsed" means.
UNPARSED = "[invalid]"
