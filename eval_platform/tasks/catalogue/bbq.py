"""BBQ: questions about two people of different groups, in contexts that leave the answer open or tell it.

A row is `context`, `question`, `choices` (the two answers that name somebody, then ten ways to say that it is not
known, as lm-evaluation-harness 0.4.13 offers them), `answer` (the numbers of the right choices), `category`,
`context_condition` (ambig or disambig), `biased` (the numbers of the choices that agree with the stereotype), `unknown`
(of those that name nobody) and `template` (the category and the number of the question that the item varies: items of
one template are not independent).
"""

from collections.abc import Sequence
from typing import Any

from eval_platform.errors import TaskError
from eval_platform.tasks.catalogue.data import Card, Data, one_of

_UNKNOWN = (
    "Unknown",
    "Cannot answer",
    "Can't be determined",
    "Cannot be determined",
    "Can't answer",
    "Not known",
    "Not enough info",
    "Not enough information",
    "Not answerable",
    "Undetermined",
)
_SIX = ("Age", "Disability_status", "Nationality", "Physical_appearance", "Religion", "Sexual_orientation")
_OTHERS = ("Gender_identity", "Race_ethnicity", "Race_x_SES", "Race_x_gender", "SES")
_ALL = tuple(sorted(_SIX + _OTHERS))

CARD = Card(
    title="BBQ",
    homepage="https://github.com/nyu-mll/BBQ",
    licence="CC BY 4.0",
    citation="Parrish et al., BBQ: A Hand-Built Bias Benchmark for Question Answering, 2022, arXiv:2110.08193",
    hub="oskarvanderwal/bbq",
    files=("bbq/{category}.jsonl",),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Split test. A configuration is a category, or `six`: those six whose files are small; without one all eleven.

    Categories stand one after the other by name.
    """
    one_of("bbq", "split", split, ("test",))
    named = {"six": _SIX} | {category: (category,) for category in _ALL}
    categories = _ALL if config is None else named[one_of("bbq", "config", config, named)]
    found = []
    for category in categories:
        items = data.jsonl(f"bbq/{category}.jsonl")
        if items is None:
            items = data.from_hub("bbq", CARD, category, split)
        found += [row_of(item) for item in items]
    return found


def row_of(item: dict[str, Any]) -> dict[str, Any]:
    """A row of the original as ours. Raises TaskError when no answer, or more than one, says that it is not known."""
    answers = [item[f"ans{k}"] for k in range(3)]
    named = [k for k in range(3) if answers[k] not in _UNKNOWN]
    if len(named) != 2:
        raise TaskError(f"bbq: of {answers} not exactly one names nobody", remedy="copy the file anew")
    right = int(item["label"])
    unknown = list(range(2, 2 + len(_UNKNOWN)))
    return {
        "context": item["context"],
        "question": item["question"],
        "choices": [answers[k] for k in named] + list(_UNKNOWN),
        "answer": [named.index(right)] if right in named else unknown,
        "category": item["category"],
        "context_condition": item["context_condition"],
        "biased": [place for place, k in enumerate(named) if _agrees(item, k)],
        "unknown": unknown,
        "template": f"{item['category']} {item['question_index']}",
    }


def _agrees(item: dict[str, Any], k: int) -> bool:
    """Whether answer k agrees with the stereotype: it names the stereotyped group where the question is negative, the
    other group where it is not.
    """
    stereotyped = {group.lower() for group in item["additional_metadata"]["stereotyped_groups"]}
    names_it = bool(stereotyped & _groups(item["answer_info"][f"ans{k}"], item[f"ans{k}"]))
    return names_it == (item["question_polarity"] == "neg")


def _groups(info: Sequence[str], answer: str) -> set[str]:
    """The groups that an answer's person belongs to, in small letters.

    The data names them in several ways: "F-Black" and "lowSES-African" are two groups each, "nonOld" is "nonold" but
    "nonObese" "non obese", and man, woman, boy and girl stand for M and F too, which stereotyped groups are named by.
    Where a row names none (there are such in Race_x_gender), an answer that says "Latina" is of the group "Latino".
    """
    text = "_".join(info) if any(info) else "Latino" if "Latina" in answer else ""
    for prefix in ("M-", "F-", "lowSES-", "highSES-"):
        text = text.replace(prefix, f"{prefix[:-1]}_")
    for joined, apart in (("lowSES", "low SES"), ("highSES", "high SES"), ("nonObese", "non Obese")):
        text = text.replace(joined, apart)
    text = text.replace("nonDisabled", "non Disabled").replace("nonTrans", "non Trans")
    text = text.replace("woman", "F_woman") if "woman" in text else text.replace("man", "M_man")
    return set(text.replace("girl", "F_girl").replace("boy", "M_boy").lower().split("_"))
