"""How may a question be put? The sections of a task file about shots, completions and chats."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from eval_platform.tasks.sections import Section, is_set, json_only

DEFAULT_MAX_NEW_TOKENS = 256  # lm-evaluation-harness, `defaults.py:DEFAULT_MAX_GEN_TOKS`


class Fewshot(Section):
    """lm-eval's fewshot_config: how shots are drawn, and how they are written where that differs from the question.

    sampler: `default` draws anew for every document with one random.Random(1234) over the whole task; `first_n` takes
    the first ones, which makes the shots a prefix shared by all documents, and so cheap.
    """

    sampler: Literal["default", "first_n"] = "default"
    split: str | None = None
    samples: list[dict[str, Any]] | None = Field(default=None, min_length=1)
    doc_to_text: str | int | None = None
    doc_to_choice: str | list[str] | dict[str, str] | None = None
    doc_to_target: str | int | list[str] | list[int] | None = None
    gen_prefix: str | None = None
    fewshot_delimiter: str | None = None
    target_delimiter: str | None = None

    @field_validator("samples")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return json_only(value)


class GenerationKwargs(Section):
    """lm-eval's generation_kwargs. Greedy unless temperature is above 0."""

    until: str | list[str] | None = None
    max_gen_toks: int | None = Field(default=None, gt=0)
    max_new_tokens: int | None = Field(default=None, gt=0)
    max_tokens: int | None = Field(default=None, gt=0)
    max_completion_tokens: int | None = Field(default=None, gt=0)
    do_sample: bool | None = None
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.do_sample and self.temperature == 0:
            raise ValueError("do_sample: true needs a temperature above 0; leave it out for greedy decoding")
        lengths = [
            k for k in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens") if is_set(self, k)
        ]
        if len(lengths) > 1:
            raise ValueError(f"{' and '.join(lengths)} say the same; keep one")
        if "" in ([self.until] if isinstance(self.until, str) else self.until or []):
            raise ValueError("until: an empty stop string would stop before the first token; remove it")
        return self


class ChatSection(Section):
    """What is otherwise where the task is asked as a conversation; what is absent stays as it is for a base model.

    A run's own system_prompt and shots_as_turns go before these. system_prompt stands before the description, in the
    same message. shots_as_turns: a shot is a turn of the user and one of the assistant (default); false: all shots and
    the question are one turn.
    """

    system_prompt: str | None = None
    shots_as_turns: bool | None = None
    description: str | None = None
    doc_to_text: str | int | None = None
    gen_prefix: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    generation_kwargs: GenerationKwargs | None = None
