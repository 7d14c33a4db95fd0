"""Is the data of a task fit to be asked? Looked at once, when `tasks sync` freezes it, by Great Expectations.

An error makes sync refuse the task: an answer to it would mean nothing. A warning is what real data has and a reader
of its scores should know (docs/task_files.md lists both). All new tasks are looked at in one validation, since one
costs the same for any number of rows; only where that finds something is each task looked at by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from eval_platform.quality.suites import Rule, expectations, validate
from eval_platform.tasks.facts import ItemFacts
from eval_platform.values import Check

if TYPE_CHECKING:
    import pandas as pd

# Items with another number of choices than most: below this share they look like slips, above it like the design.
ODD_SHARE = 0.1
_SHOWN = ("sample_id",)


def check_items(tasks: Mapping[str, ItemFacts]) -> dict[str, list[Check]]:
    """Task name -> one Check per rule."""
    import pandas as pd

    frames = {name: items_frame(name, facts) for name, facts in tasks.items()}
    if not frames:
        return {}
    together = validate(pd.concat(frames.values(), ignore_index=True), rules())
    if all(check.passed for check in together):
        return dict.fromkeys(frames, together)
    return {name: validate(frame, rules()) for name, frame in frames.items()}


def items_frame(name: str, facts: ItemFacts) -> pd.DataFrame:
    """One row an item: task, sample_id, key, question (null where nothing is asked), choices (null where the answer is
    a text), odd_choices, gold_outside, among_shots (0 or 1 each), licence (null where it must be said and is not).
    """
    import pandas as pd

    # A question may be empty by design, when the choices are the whole texts: then it is so for all items.
    by_design = any(facts.choices) and not any(question.strip() for question in facts.questions)
    usual = Counter(facts.choices).most_common(1)
    usual_number, usual_count = usual[0] if usual else (0, 0)
    odd = len(facts.choices) - usual_count < ODD_SHARE * len(facts.choices)
    return pd.DataFrame(
        {
            "task": name,
            "sample_id": facts.sample_ids,
            "key": facts.keys,
            "question": [question if question.strip() or by_design else None for question in facts.questions],
            "choices": [float(n) if n else None for n in facts.choices],
            "odd_choices": [int(odd and n != usual_number) for n in facts.choices],
            "gold_outside": [
                int(not all(0 <= one < n for one in gold)) if n else 0
                for gold, n in zip(facts.gold, facts.choices, strict=True)
            ],
            "among_shots": [int(one) for one in facts.among_shots],
            "licence": None if facts.licence == "" else (facts.licence or "the user's own"),
        }
    )


def rules() -> list[Rule]:
    """Frame: `items_frame`, of one task or of several."""
    gxe = expectations()
    return [
        Rule(
            "empty_item",
            gxe.ExpectColumnValuesToNotBeNull(column="question"),
            "{unexpected} of {total} items ask nothing ({examples})",
            _SHOWN,
        ),
        Rule(
            "one_choice",
            gxe.ExpectColumnValuesToBeBetween(column="choices", min_value=2),
            "{unexpected} of {total} items have one choice, which is right whatever the model says ({examples})",
            _SHOWN,
        ),
        Rule(
            "gold_in_range",
            gxe.ExpectColumnValuesToBeBetween(column="gold_outside", min_value=0, max_value=0),
            "{unexpected} of {total} items name a right choice that they have not ({examples})",
            _SHOWN,
        ),
        Rule(
            "licence_present",
            gxe.ExpectColumnValuesToNotBeNull(column="licence"),
            "a shipped task does not say under which licence its items are",
        ),
        Rule(
            "unique_items",
            gxe.ExpectCompoundColumnsToBeUnique(column_list=["task", "key"], severity="warning"),
            "{unexpected} of {total} items stand more than once, question and choices the same ({examples})",
            _SHOWN,
        ),
        Rule(
            "number_of_choices",
            gxe.ExpectColumnValuesToBeBetween(column="odd_choices", min_value=0, max_value=0, severity="warning"),
            "{unexpected} of {total} items have another number of choices than the others ({examples})",
            _SHOWN,
        ),
        Rule(
            "shots_apart",
            gxe.ExpectColumnValuesToBeBetween(column="among_shots", min_value=0, max_value=0, severity="warning"),
            "{unexpected} of {total} items are among the shots: their answer may stand in a prompt ({examples})",
            _SHOWN,
        ),
    ]
