"""How does a conversation become a prompt? By the checkpoint's own chat template.

A template is the checkpoint's, and so a stranger's: transformers renders it in Jinja's sandbox, and whatever it raises
is told as an error of the checkpoint. The prompt is the one that lm-evaluation-harness 0.4.13 makes
(`models/huggingface.py:apply_chat_template`), with two differences. A template that asks for the date is told
`DATE`, or the same task would be another one tomorrow. And where it refuses a system message, only a task's
description is left out, as there; a system prompt that someone asked for is an error.
"""

import logging
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from eval_platform.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What Llama 3's templates write where they are told no date.
DATE = datetime(2024, 7, 26)
_DIRECTIVES = ("%d", "%-d", "%e", "%b", "%B", "%m", "%Y", "%y", "%a", "%A", "%j", "%F", "%D", "%H", "%I", "%M", "%S")
# transformers takes no functions, so a template that calls strftime_now is given one of Jinja. The line break after it
# is left out (trim_blocks), and the template begins at the beginning of a line, as it does by itself.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{directive}', '{DATE.strftime(directive)}')" for directive in _DIRECTIVES)
    + " }}{% endmacro %}\n"
)

_log = logging.getLogger(__name__)


class ChatTemplate:
    """The chat template of the tokenizer at `path`: call it with messages (role, content) to get the prompt.

    leaves_out_system: it has refused a task's description, which its prompts then lack.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", path: Path) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self.leaves_out_system = False

    def __call__(self, messages: Sequence[dict[str, str]], *, continued: bool, needs_system: bool) -> str:
        """The prompt, ending where the model's answer begins or, with `continued`, goes on after the last message.

        needs_system: the system message may not be left out. Raises CheckpointError when the template fails, refuses
        the conversation or leaves out what may not be.
        """
        from jinja2 import TemplateError

        try:
            prompt = self._prompt(messages, continued)
        except TemplateError as error:
            if messages[0]["role"] != "system" or len(messages) == 1:
                raise self._failed(error, messages) from error
            if needs_system:
                raise self._without_system(str(error)) from error
            rest = messages[1:]
            try:
                prompt = self._prompt(rest, continued)
            except TemplateError as second:  # it was not the system message
                raise self._failed(second, rest) from second
            if not self.leaves_out_system:
                _log.warning("%s: the chat template takes no system message: descriptions are left out", self._path)
            self.leaves_out_system = True
            return prompt
        if needs_system and messages[0]["content"].strip() not in prompt:
            raise self._without_system("it says nothing and leaves it out")
        return prompt

    def _prompt(self, messages: Sequence[dict[str, str]], continued: bool) -> str:
        from jinja2 import TemplateError

        try:
            source = self._tokenizer.get_chat_template()
            prompt = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=_FIXED_DATE + source if "strftime_now" in source else source,
                tokenize=False,
                add_generation_prompt=not continued,
                continue_final_message=continued,
            )
        except (TemplateError, MemoryError):
            raise
        except Exception as error:  # a template's own operations and transformers raise whatever they like
            raise self._failed(error, messages) from error
        assert isinstance(prompt, str)
        return prompt

    def _failed(self, error: Exception, messages: Sequence[dict[str, str]]) -> CheckpointError:
        told = " ".join(str(error).split())
        roles = ", ".join(message["role"] for message in messages)
        return CheckpointError(
            f"the chat template in {self._path} fails on a conversation of {roles}: {type(error).__name__}: "
            f"{told if len(told) <= 300 else told[:297] + '...'}",
            remedy="mend the template, or ask without it: --no-chat",
        )

    def _without_system(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"the chat template in {self._path} takes no system message, and a system prompt was asked for: {why}",
            remedy='leave the system prompt out (system_prompt = "" where the task says one of its own)',
        )
