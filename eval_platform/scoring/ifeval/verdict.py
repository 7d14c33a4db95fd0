"""Which of a prompt's instructions does a response follow, strictly and loosely?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval_platform.scoring.ifeval.checks import CHECKS


@dataclass(frozen=True, slots=True)
class Verdict:
    """For each instruction of a prompt, whether it was followed."""

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


def verdict(response: str | None, instruction_ids: Sequence[str], arguments: Sequence[Mapping[str, Any]]) -> Verdict:
    """The verdict on one response; `arguments` are the instructions', in their order (null ones count as absent).

    Loosely an instruction is followed when one of eight forms of the response follows it: with or without its first
    line, with or without its last, with or without stars, which models use for emphasis (section 3.2 of the paper).
    A response without text follows nothing. Raises ValueError for an instruction that IFEval does not have.
    """
    forms = _forms(response or "")
    strict, loose = [], []
    for name, said in zip(instruction_ids, arguments, strict=True):
        if name not in CHECKS:
            raise ValueError(f"IFEval has no instruction {name!r}")
        given = {key: value for key, value in said.items() if value is not None}
        # The first form is the response itself, so what is followed strictly is not asked again.
        followed = next((n for n, form in enumerate(forms) if form.strip() and CHECKS[name](form, **given)), None)
        strict.append(followed == 0)
        loose.append(followed is not None)
    return Verdict(tuple(strict), tuple(loose))


def _forms(response: str) -> list[str]:
    lines = response.split("\n")
    whole = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*whole, *(form.replace("*", "") for form in whole)]
