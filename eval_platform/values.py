"""The values that travel the road, each a small frozen record with the field's names."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from eval_platform.errors import ErrorClass
from eval_platform.identity import content_id

Prompt = str
RequestKind = Literal["choice", "rolling", "generate"]
Severity = Literal["error", "warning"]
TRANSFORMERS = "transformers"
# Origin of results that another program computed, kind of what it asked, and the first part of its key.
IMPORTED = "imported"
# Of a staged adapter: the folder in it that holds the adapter itself, beside the files of its base model. Hidden, since
# a model's own folder may have an `adapter` in it that is none of the model's.
ADAPTER_FOLDER = ".adapter"


@dataclass(frozen=True, slots=True)
class Served:
    """A model that only a server knows, by what it is asked through.

    provider: lm-evaluation-harness's name of the back end. endpoint: URL without credentials, None where the provider
    has its own. as_of: the day (ISO 8601) that the model is taken to be of, for nobody sees its weights change.
    """

    provider: str
    model: str
    endpoint: str | None
    as_of: str


@dataclass(frozen=True, slots=True)
class Arrival:
    """The n-th time that a key's files were seen to differ from before."""

    key: str
    n: int
    fingerprint: str
    uri: str
    run: str
    step: int | None = None
    tokens_seen: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    arrived_at: str | None = None  # ISO 8601, UTC; for people, never compared
    watcher: str | None = None
    served: Served | None = None  # a model without files


@dataclass(frozen=True, slots=True)
class Incomplete:
    """A folder that looks like a checkpoint but may not be evaluated yet, or ever; `reason` says what is missing.

    `refused` is True when waiting will not help (pickle only, broken config): the remedy is in the reason.
    """

    key: str
    uri: str
    reason: str
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A staged model: its content identity and where it lies on local disk. Of a served one neither is seen."""

    checkpoint_id: str
    weights_id: str | None
    path: Path | None
    kind: str  # "transformers" | "adapter" | "served" | "imported"


@dataclass(frozen=True, slots=True)
class Generation:
    """How a completion is drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the model. Its id is its content, so equal requests are the same request.

    choice: log-likelihood of `continuation` after `context`. rolling: log-likelihood of all of `context`.
    generate: a completion of `context` under `settings`. `repeat` counts samples of one request.
    """

    request_id: str
    kind: RequestKind
    context: Prompt
    continuation: str | None = None
    settings: Generation | None = None
    repeat: int = 0


def make_request(
    kind: RequestKind,
    context: Prompt,
    continuation: str | None = None,
    settings: Generation | None = None,
    repeat: int = 0,
) -> Request:
    """A request with its content id, which `repeat` is no part of."""
    body = [kind, context, continuation, asdict(settings) if settings else None]
    return Request(content_id(body), kind, context, continuation, settings, repeat)


@dataclass(frozen=True, slots=True)
class Response:
    """What the model answered. log_likelihood in nats; n_tokens counts continuation or completion tokens.

    finish_reason: "scored" for log-likelihoods; "stop", "length" or "eos" for completions, "non_finite" for one whose
    logits were not numbers (its log_likelihood is NaN then, so that the gate sees it; else a completion has none).
    truncated_left_tokens: context tokens cut off on the left to fit the model's window.
    Of a served model finish_reason is what the server says or "unknown", n_tokens None where it does not say, and
    prompt_tokens and completion_tokens what it counted for its bill.
    """

    request_id: str
    repeat: int
    log_likelihood: float | None = None
    is_greedy: bool | None = None
    text: str | None = None
    n_tokens: int | None = 0
    finish_reason: str = "scored"
    truncated_left_tokens: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


@overload
def known_sum(counts: Iterable[int | None]) -> int | None: ...
@overload
def known_sum(counts: Iterable[float | None]) -> float | None: ...
def known_sum(counts: Iterable[float | None]) -> float | None:
    """The sum; None where one of them is not known, for the rest would pass for the whole."""
    found = list(counts)
    return None if None in found else sum(count for count in found if count is not None)


@dataclass(frozen=True, slots=True)
class Document:
    """One item of a frozen dataset snapshot. `sample_id` is its content; `position` its place in the snapshot."""

    sample_id: str
    position: int
    fields: Mapping[str, Any]
    subset: str = ""
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One document as it is asked: its requests (repeat 0) and what is right.

    requests: one per choice, then one unconditional request per choice if the task wants them; else exactly one.
    target: index (or indices) of the right choice for choices, else the reference text (or texts).
    """

    document: Document
    requests: tuple[Request, ...]
    choices: tuple[str, ...]
    target: int | str | tuple[int, ...] | tuple[str, ...]
    prompt: str
    shots_used: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """One number with its uncertainty. subset "" is the whole task. None where it cannot be computed."""

    task: str
    metric: str
    value: float | None
    standard_error: float | None
    ci_low: float | None
    ci_high: float | None
    interval_method: str
    n: int
    n_clusters: int | None = None
    subset: str = ""
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How the model runs, as configured. "auto" is resolved after staging, before anything is hashed."""

    dtype: str = "auto"
    device: str = "auto"  # recorded, not part of identity
    backend: str = TRANSFORMERS  # or lm-evaluation-harness's name of a served model's back end
    quantization: str | None = None
    chat: bool | Literal["auto"] = False  # prompts go through the checkpoint's chat template
    system_prompt: str | None = None  # in place of the task's own, as shots_as_turns is
    max_length: int | None = None
    seed: int = 0
    limit: int | None = None
    trust_remote_code: bool = False
    shots_as_turns: bool | None = None
    rolling_stride: int | None = None  # new tokens scored in each later window; None: windows are disjoint
    arguments: Mapping[str, Any] | None = None  # of a served model's back end, those that may change an answer
    # Recorded, not part of identity: by any path, in any batch, the answers are the same but for rounding.
    batch_tokens: int | None = None
    engine_path: str = "auto"  # "auto" | "tree" | "plain"
    deterministic: bool = False  # fixed kernels and threads: runs repeat to the last digit

    def identity(self) -> dict[str, Any]:
        """The part that is hashed into settings_id. Raises ValueError while something is still "auto"."""
        # Nobody but its server knows a served model's window.
        has_window = self.max_length is not None or self.backend != TRANSFORMERS
        if self.dtype == "auto" or self.chat == "auto" or not has_window:
            raise ValueError("settings must be resolved (dtype, chat, max_length) before they have an identity")
        recorded_only = {"device", "batch_tokens", "engine_path", "deterministic"}
        fields = {k: v for k, v in asdict(self).items() if k not in recorded_only}
        for key in (
            "rolling_stride",
            "shots_as_turns",
            "arguments",
        ):  # settings from before these existed keep their id
            if fields[key] is None:
                del fields[key]
        return fields


@dataclass(frozen=True, slots=True)
class Check:
    """One quality rule's outcome. An error holds the evaluation, a warning is shown beside it."""

    name: str
    passed: bool
    severity: Severity
    reason: str = ""
    observed: Any = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether an evaluation may be believed: the highest n stands."""

    evaluation_id: str
    attempt: int
    n: int
    status: Literal["published", "held"]
    checks: tuple[Check, ...]
    reasons: tuple[str, ...]
    gate_version: str
    actor: str
    time: str
    action: str = "gate"  # gate | release | retract | recheck


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a try ended without a commit."""

    class_: ErrorClass
    reason: str
