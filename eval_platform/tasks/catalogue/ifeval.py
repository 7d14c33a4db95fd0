"""IFEval: 541 prompts with 834 instructions that a program can check, such as "in at least 300 words".

A row is `key`, `prompt`, `instruction_id_list` and `kwargs` (the instructions' arguments, null ones left out).
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, no_config, one_of

CARD = Card(
    title="IFEval",
    homepage="https://github.com/google-research/google-research/tree/master/instruction_following_eval",
    licence="Apache-2.0",
    citation="Zhou et al., Instruction-Following Evaluation for Large Language Models, 2023, arXiv:2311.07911",
    hub="google/IFEval",
    files=("ifeval/input_data.jsonl",),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """The one split is called train on the hub; there are no configurations."""
    one_of("ifeval", "split", split, ("train",))
    no_config("ifeval", config)
    found = data.jsonl("ifeval/input_data.jsonl")
    if found is None:
        found = data.from_hub("ifeval", CARD, None, "train")
    return [
        {
            "key": int(row["key"]),
            "prompt": row["prompt"],
            "instruction_id_list": list(row["instruction_id_list"]),
            # The hub's table gives every instruction the arguments of all, those that it has not as null.
            "kwargs": [{k: v for k, v in said.items() if v is not None} for said in row["kwargs"]],
        }
        for row in found
    ]
