"""How much of a text is in another? BLEU and chrF by sacrebleu, ROUGE by rouge-score (extra `metrics`)."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from eval_platform.scoring.terms import Terms

# Of sacrebleu's two faces this is the one that gives what a corpus score sums up; pinned in pyproject.toml.
_CLASSES = {"bleu": "BLEU", "chrf": "CHRF"}


def overlap(metric: str, answer: str | None, references: Sequence[str]) -> Terms:
    """bleu or chrf with sacrebleu's defaults: of this text alone, and what it adds to that of a corpus. 0 to 100.

    bleu: 13a tokens, exponential smoothing; chrf: up to six letters, no words. No answer is an empty one.
    """
    scorer = _sacrebleu(metric)
    statistics = scorer._extract_corpus_statistics([answer or ""], [[reference] for reference in references])[0]
    return Terms(corpus_score(metric, statistics), tuple(float(part) for part in statistics))


def corpus_score(metric: str, sums: Sequence[float]) -> float:
    """The score of a corpus from the sums of its texts' terms; terms may be averages over repeats."""
    return min(100.0, float(_sacrebleu(metric)._compute_score_from_stats(list(sums)).score))  # 100.00000000000004


def rouge(kind: str, answer: str | None, references: Sequence[str]) -> float:
    """F1 of ROUGE (rouge1, rouge2, rougeL) from 0 to 1, the best over the references; words are not stemmed."""
    scorer = _rouge()
    return max(float(scorer.score(reference, answer or "")[kind].fmeasure) for reference in references)


@lru_cache(maxsize=2)
def _sacrebleu(metric: str) -> Any:
    import sacrebleu.metrics

    return getattr(sacrebleu.metrics, _CLASSES[metric])()


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"])
