"""A prompt as turns: written one after the other for a base model, or as messages of a chat template.

What becomes a message, and where delimiters are left out, is as in lm-evaluation-harness 0.4.13
(`api/task.py:fewshot_context` and `build_qa_turn`, `api/utils.py:multiturn_to_singleturn`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Role = Literal["system", "user", "assistant"]
Message = dict[str, str]  # role and content, as chat templates take them


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. after: what separates it from the next turn where all are one text."""

    role: Role
    text: str
    after: str = ""


class Template(Protocol):
    """A checkpoint's chat template: messages to the prompt that its model reads."""

    def __call__(self, messages: Sequence[Message], *, continued: bool, needs_system: bool) -> str:
        """continued: the last message is the beginning of the answer, which the model goes on with.

        needs_system: the system message was asked for by name, so that a prompt without it would be another one.
        """
        ...


@dataclass(frozen=True, slots=True)
class Chat:
    """How tasks are asked as a conversation. None: as the task's own `chat` says."""

    template: Template
    system_prompt: str | None = None
    shots_as_turns: bool | None = None


def as_text(turns: Sequence[Turn]) -> str:
    """All turns as one text, delimiters between them."""
    return "".join(turn.text + turn.after for turn in turns)


def as_messages(turns: Sequence[Turn], *, shots_as_turns: bool) -> list[Message]:
    """A message a turn; or, without `shots_as_turns`, all that comes before the answer as one message of the user.

    Delimiters stand inside a message only. The system's message and the beginning of an answer stand apart always.
    """
    if shots_as_turns:
        return [_message(turn.role, turn.text) for turn in turns]
    system = [turn for turn in turns[:1] if turn.role == "system"]
    answer = [turn for turn in turns[-1:] if turn.role == "assistant"]
    asked = turns[len(system) : len(turns) - len(answer)]
    question = as_text(asked[:-1]) + asked[-1].text
    return [
        *(_message("system", turn.text) for turn in system),
        _message("user", question),
        *(_message("assistant", turn.text) for turn in answer),
    ]


def _message(role: Role, content: str) -> Message:
    return {"role": role, "content": content}
