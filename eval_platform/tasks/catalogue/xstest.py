"""XSTest: 250 safe prompts that sound unsafe, and 200 unsafe ones made to contrast with them.

A row is `prompt`, `type` (of 18, those of unsafe prompts begin with `contrast_`), and `unsafe`.
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, NoData, no_config, one_of

_FILE = "xstest/xstest_prompts.csv"

CARD = Card(
    title="XSTest",
    homepage="https://github.com/paul-rottger/xstest",
    licence="CC BY 4.0",
    citation=(
        "Röttger et al., XSTest: A Test Suite for Identifying Exaggerated Safety Behaviours in Large Language Models, "
        "NAACL 2024, arXiv:2308.01263"
    ),
    files=(_FILE,),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Split test; there are no configurations."""
    one_of("xstest", "split", split, ("test",))
    no_config("xstest", config)
    found = data.csv(_FILE)
    if found is None:
        raise NoData("xstest", data.tried)
    return [{"prompt": row["prompt"], "type": row["type"], "unsafe": row["label"] == "unsafe"} for row in found]
