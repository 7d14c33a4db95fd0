"""What does a served model answer? lm-evaluation-harness's own back ends, asked one request at a time.

Its back ends for HTTP (`TemplateAPI`) give all answers of a call at once or none, and keep to themselves what the
server says beside the text. So each request is a call of its own, as many at a time as `concurrency` allows, and
`model_call` is listened to: an answer goes to the journal as soon as it is known, with the tokens that the server
counted. Back ends that run in this process (vllm, hf) are asked in chunks. Retries and waiting are the harness's.
"""

import json
import logging
import os
import platform
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

from eval_platform.engine.lengths import PromptLengths
from eval_platform.errors import CheckpointError, ConfigError, EvalPlatformError, ServerError, TaskError
from eval_platform.identity import content_id
from eval_platform.served import ServedModel
from eval_platform.values import Generation, Request, RequestKind, Response, RunSettings, known_sum

_log = logging.getLogger(__name__)

CHUNK = 512  # requests in one call of a back end in this process: so many answers are lost with a crash at most
_EXTRA = 'install lm-evaluation-harness here: pip install "eval-platform[lm-eval]"'
_CALLS: dict[RequestKind, Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]] = {
    "choice": "loglikelihood",
    "rolling": "loglikelihood_rolling",
    "generate": "generate_until",
}
# What it takes to wait no longer: the server has too much to do, or fails for reasons of its own.
_MAY_PASS = frozenset({408, 409, 425, 429})
_NOT_ALLOWED = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class ServedInfo:
    """As `EngineInfo`, where most of it is known to the server alone. max_length: what the harness takes it to be."""

    device: str
    dtype: str
    max_length: int | None
    engine_path: str
    versions: Mapping[str, str]
    n_parameters: None = None
    numerics_version: None = None


class Messages:
    """The chat template of a server: messages as they are, in JSON; it is the server that makes a prompt of them."""

    leaves_out_system = False

    def __call__(self, messages: Sequence[dict[str, str]], *, continued: bool, needs_system: bool) -> str:
        """Raises TaskError for a conversation that the model shall go on with in the middle of its own turn."""
        if continued:
            raise TaskError(
                "the prompt begins the model's answer, which a server of chat completions does not go on with",
                remedy="leave gen_prefix out of the task, or ask it of a provider that takes plain text",
            )
        return json.dumps(list(messages), ensure_ascii=False)


class ServedEngine:
    """The model of one `[[served]]` entry; made by `load_served`.

    It has not `Engine.token_scores`: that is one forward of a model in this process, for a person who looks into it.
    """

    def __init__(self, entry: ServedModel, settings: RunSettings, model: Any, heard: "_Heard | None") -> None:
        self._entry = entry
        self._seed = settings.seed
        self._model = model
        self._heard = heard  # None: the back end runs in this process
        self._where = f"{entry.provider} model {entry.model}" + (f" at {entry.endpoint}" if entry.endpoint else "")
        self.info = ServedInfo(
            device="served" if heard else str(getattr(model, "device", "served")),
            dtype="unknown",
            max_length=getattr(model, "max_length", None) if self._tokenizer else None,
            engine_path=f"lm-eval {entry.provider}",
            versions={"python": platform.python_version(), "lm_eval": version("lm_eval")},
        )

    @property
    def _tokenizer(self) -> Any:
        return getattr(self._model, "tokenizer", None)

    def prompt_lengths(self) -> PromptLengths:
        """Raises ConfigError where the model's tokenizer is not known on this side."""
        if self._tokenizer is None or self.info.max_length is None:
            raise self._without_tokenizer("prompts are cut to fit")
        return PromptLengths(
            count=lambda texts: [len(self._model.tok_encode(text)) for text in texts],
            window=self.info.max_length,
            is_shared=True,
        )

    def answer(self, requests: Sequence[Request]) -> Iterator[Response]:
        """As `Engine.answer`; of completions n_tokens is what the server counted, None where it does not say.

        Raises ServerError for what may pass (no answer, too much to do), CheckpointError for what the server refuses,
        ConfigError for keys and tokenizers that are missing; each after the harness's own retries.
        """
        if self._heard is None:
            yield from self._in_chunks(requests)
            return
        pool = ThreadPoolExecutor(self._entry.concurrency, thread_name_prefix="served")
        failed: BaseException | None = None
        try:
            asked = [pool.submit(self._one, request) for request in requests]
            for done in as_completed(asked):
                if done.cancelled():
                    continue
                error = done.exception()
                if error is None:
                    yield done.result()
                elif failed is None:
                    failed = error
                    for one in asked:  # those under way still come, and need not be paid for again
                        one.cancel()
            if failed is not None:
                raise failed
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def remembering(self) -> AbstractContextManager[None]:
        """See `face.Engine.remembering`. What is kept of a conversation is the server's own affair."""
        return nullcontext()

    def _in_chunks(self, requests: Sequence[Request]) -> Iterator[Response]:
        for kind in _CALLS:
            of_kind = [request for request in requests if request.kind == kind]
            for start in range(0, len(of_kind), CHUNK):
                chunk = of_kind[start : start + CHUNK]
                for request, answer in zip(chunk, self._asked(kind, chunk), strict=True):
                    yield self._response(request, answer, [])

    def _one(self, request: Request) -> Response:
        assert self._heard is not None
        self._heard.said, self._heard.scored = [], []
        (answer,) = self._asked(request.kind, [request])
        self._must_have_scored(self._heard.scored, self._heard.said)
        return self._response(request, answer, self._heard.said)

    def _asked(self, kind: RequestKind, requests: Sequence[Request]) -> list[Any]:
        """What the harness's model gives for requests of one kind, in order."""
        from lm_eval.api.instance import Instance

        if kind != "generate" and hasattr(self._model, "tokenizer") and self._tokenizer is None:
            raise self._without_tokenizer("log-likelihoods are asked")
        instances = [Instance(_CALLS[kind], {}, self._arguments(request), n) for n, request in enumerate(requests)]
        try:
            answers = list(getattr(self._model, _CALLS[kind])(instances, disable_tqdm=True))
        except Exception as error:  # of requests, of a provider's own package, of the harness reading what came
            if isinstance(error, EvalPlatformError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
                raise
            _log.warning("%s", without_key(traceback.format_exc(), self._model))
            # Not chained: a try records tracebacks, and what a server says may repeat the key.
            raise self._told(kind, error) from None
        if len(answers) != len(requests):  # some back ends swallow an error and end there
            raise ServerError(
                f"{self._where}: {len(answers)} answers to {len(requests)} requests", remedy="the worker's log says why"
            )
        return answers

    def _arguments(self, request: Request) -> tuple[Any, ...]:
        if request.kind == "choice":
            return request.context, request.continuation
        if request.kind == "rolling":
            return (request.context,)
        context: Any = request.context
        if self._entry.is_chat:
            from lm_eval.models.api_models import JsonChatStr

            context = JsonChatStr(context)
        assert request.settings is not None
        return context, self._generation(request, request.settings)

    def _generation(self, request: Request, how: Generation) -> dict[str, Any]:
        said: dict[str, Any] = {
            "until": list(how.stop),
            "max_gen_toks": how.max_new_tokens,
            "do_sample": how.temperature > 0,
            "temperature": how.temperature,
        }
        if how.temperature > 0:
            said |= {"top_p": how.top_p} if how.top_p < 1 else {}
            said |= {"top_k": how.top_k} if how.top_k else {}
            if self._heard is not None and _takes_seed(self._entry.provider):
                # Or every repeat of a request would be the same draw.
                said["seed"] = int(content_id([self._seed, request.request_id, request.repeat])[:7], 16)
        return said

    def _response(self, request: Request, answer: Any, said: Sequence[Mapping[str, Any]]) -> Response:
        prompt_tokens, completion_tokens = _billed(said)
        if request.kind == "generate":
            assert request.settings is not None
            text, was_cut = _up_to_stop(str(answer), request.settings.stop)
            return Response(
                request.request_id,
                request.repeat,
                text=text,
                n_tokens=completion_tokens,
                finish_reason="stop" if was_cut else _finish_reason(said),
                truncated_left_tokens=self._cut_off(request, request.settings),
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
            )
        context, scored = self._lengths(request)
        cut = 0
        if self._heard is not None and request.kind == "choice" and scored is not None:
            cut = max(0, context + scored - sum(self._heard.scored))
        log_likelihood, is_greedy = answer if request.kind == "choice" else (answer, None)
        return Response(
            request.request_id,
            request.repeat,
            log_likelihood=float(log_likelihood),
            is_greedy=None if is_greedy is None else bool(is_greedy),
            n_tokens=scored,
            truncated_left_tokens=cut,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )

    def _lengths(self, request: Request) -> tuple[int, int | None]:
        """Tokens of what is before and of what is scored, as the harness's model counts them; None: it has none."""
        model = self._model
        if self._tokenizer is None or not hasattr(model, "tok_encode"):
            return 0, None
        if request.kind == "rolling":
            return 0, len(model.tok_encode(request.context))
        assert request.continuation is not None
        if request.context:
            before, after = model._encode_pair(request.context, request.continuation)
            return len(before), len(after)
        alone = model.tok_encode(request.continuation, add_special_tokens=False)
        return (1, len(alone) - 1) if alone[:1] == [model.prefix_token_id] else (1, len(alone))

    def _cut_off(self, request: Request, how: Generation) -> int:
        """Tokens of a prompt that the harness left out on its left; what a server leaves out itself is not told."""
        if self._heard is None or self._tokenizer is None or not self._model.tokenized_requests:
            return 0
        room = self._model.max_length - how.max_new_tokens
        return max(0, len(self._model.tok_encode(request.context)) - room)

    def _must_have_scored(self, sent: Sequence[int], said: Sequence[Mapping[str, Any]]) -> None:
        """The server scored the very tokens that the harness sent (so many a call), and one that it drew.

        The harness takes the scores by their place: with other tokens it would take others, and of a server that does
        not repeat the prompt (`echo`) none at all, whose sum is 0. Nothing was sent to be scored for a completion.
        """
        for expected, one in zip(sent, said, strict=False):
            for choice in one.get("choices") or ():
                scores = (choice.get("logprobs") or {}).get("token_logprobs")
                if scores is not None and len(scores) != expected + 1:
                    raise CheckpointError(
                        f"{self._where} gives log-likelihoods of {len(scores)} tokens where prompt and answer have "
                        f"{expected} and one is drawn",
                        remedy="name the model's own tokenizer in [served.arguments] tokenizer (add_bos_token = true "
                        "where the server adds one); or say log_likelihoods = false if it does not echo the prompt",
                    )

    def _without_tokenizer(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self._where}: {why}, for which the harness needs the model's tokenizer",
            remedy='name it in [served.arguments], as in tokenizer = "org/model" or a folder',
        )

    def _told(self, kind: str, error: Exception) -> EvalPlatformError:
        """What went wrong, in words that say who should act. Never with a key in it."""
        reply = getattr(error, "response", None)
        status = getattr(error, "status_code", None) or getattr(reply, "status_code", None)
        # Hidden first, then cut: of a key that is cut in two the first part would be left.
        said = " ".join(without_key(str(getattr(reply, "text", "") or error), self._model).split())
        said = said if len(said) <= 300 else said[:297] + "..."
        if isinstance(status, int):
            told = f"{self._where} answers with HTTP {status}: {said}"
            if status in _MAY_PASS or status >= 500:
                return ServerError(told, remedy="it is tried again; lower `concurrency` if it has too much to do")
            if status in _NOT_ALLOWED:
                return ConfigError(told, remedy=f"set {key_variable(self._entry)} where workers run to a key that may")
            return CheckpointError(
                told, remedy="see whether `model` and `endpoint` in [[served]] are what the server knows"
            )
        if isinstance(error, OSError):  # those of requests are, too: no connection, no answer in time
            return ServerError(
                f"{self._where} cannot be reached: {type(error).__name__}: {said}",
                remedy="start the server, or mend `endpoint` in [[served]]; `eval-platform doctor` says if it answers",
            )
        if kind != "generate" and isinstance(error, NotImplementedError | TypeError | KeyError | AssertionError):
            return CheckpointError(
                f"{self._where} gives no log-likelihoods that the harness can read: {type(error).__name__}: {said}",
                remedy="say log_likelihoods = false in [[served]]: tasks that need them are skipped then",
            )
        return CheckpointError(
            f"{self._where}: {type(error).__name__}: {said}", remedy="the worker's log has the whole story"
        )


class _Heard(threading.local):
    """What the server sent to this thread since these were emptied: one JSON object a call.

    scored: of each call for log-likelihoods the number of tokens that the harness sent, as it counts them.
    """

    said: list[dict[str, Any]]
    scored: list[int]


def load_served(entry: ServedModel, settings: RunSettings) -> ServedEngine:
    """The harness's model for `entry`. A server is not asked anything yet, but for the harness's look for a tokenizer.

    Raises ConfigError when lm-evaluation-harness or the back end's packages are not installed, for an unknown provider,
    a missing key and arguments that the back end does not take.
    """
    kind = _model_class(entry.provider)
    from lm_eval.models import api_models, openai_completions

    arguments = dict(entry.arguments)
    heard: _Heard | None = None
    if issubclass(kind, api_models.TemplateAPI):
        heard = _Heard()
        kind = _listening(kind, heard)
        if entry.key_variable is not None:
            kind = _with_key_of(kind, entry.key_variable)
        arguments = {"seed": settings.seed, **arguments, "model": entry.model, "num_concurrent": 1, "batch_size": 1}
        # Each request is a call, which would draw a bar and write a line of its own.
        api_models.tqdm = partial(api_models.tqdm, disable=True)
        logging.getLogger(api_models.__name__).setLevel(logging.WARNING)
        if issubclass(kind, openai_completions.LocalCompletionsAPI) and not entry.is_chat:
            # The harness would ask the server for its tokenizer; one that is named goes before, and text needs none.
            if "tokenizer" in arguments:
                arguments.setdefault("tokenizer_backend", "huggingface")
            elif not entry.gives_log_likelihoods:
                arguments.setdefault("tokenizer_backend", "none")
    else:
        arguments["model" if _takes(kind, "model") else "pretrained"] = entry.model
    if entry.endpoint is not None:
        arguments["base_url"] = entry.endpoint
    where = f"[[served]] {entry.name}"
    if entry.key_variable is not None and (heard is None or entry.provider.startswith("litellm")):
        raise ConfigError(
            f"{where}: field key_variable: {entry.provider} takes its keys from variables of its own",
            remedy="leave it out, and set the variable that the provider knows",
        )
    try:
        model = kind(**arguments)
        key = getattr(model, "api_key", None)  # reading it raises where it is needed and missing
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{where}: {entry.provider} needs a package: {error}", remedy=f"install it; or {_EXTRA}"
        ) from error
    except ValueError as error:
        if "API key" in str(error):
            variable = key_variable(entry)
            raise ConfigError(
                f"{where}: {entry.provider} needs a key, and the environment variable {variable} is not set",
                remedy=f"set {variable} where workers run, then `eval-platform retry {entry.key}`",
            ) from error
        raise _unusable(where, entry, error) from error
    except (TypeError, AssertionError, OSError) as error:  # arguments of another kind; a tokenizer that is not there
        raise _unusable(where, entry, error) from error
    if key:
        logging.getLogger(api_models.__name__).addFilter(partial(_hide, str(key)))
    return ServedEngine(entry, settings, model, heard)


def _unusable(where: str, entry: ServedModel, error: Exception) -> ConfigError:
    said = " ".join(str(error).split())
    return ConfigError(
        f"{where}: {entry.provider} cannot be made of its arguments: {type(error).__name__}: {said[:300]}",
        remedy="mend [served.arguments]; a tokenizer is the name of a folder, or of one on the hub",
    )


def _model_class(provider: str) -> Any:
    try:
        import lm_eval.models  # its registry fills itself only while it is empty
        import lm_eval.models.openai_completions  # noqa: F401 -- registers one that the others' list lacks
        from lm_eval.api.registry import get_model, model_registry
    except ImportError as error:
        raise ConfigError(f"[[served]] needs lm-evaluation-harness: {error}", remedy=_EXTRA) from error
    if provider not in model_registry:
        raise ConfigError(
            f"[[served]] field provider: lm-evaluation-harness {version('lm_eval')} has no back end {provider!r}",
            remedy=f"use one of {', '.join(sorted(model_registry.keys()))}",
        )
    try:
        return get_model(provider)
    except (ImportError, ValueError) as error:  # ValueError: two names of one class get in each other's way there
        raise ConfigError(f"the back end {provider} cannot be had: {error}", remedy="install what it needs") from error


def _with_key_of(kind: Any, variable: str) -> Any:
    """The class, with its key taken from another environment variable than the provider's."""

    class WithKey(kind):
        @property
        def api_key(self) -> str:
            if variable not in os.environ:
                raise ValueError(f"API key not found in {variable}")
            return os.environ[variable]

    return WithKey


def _listening(kind: Any, heard: _Heard) -> Any:
    """The class, with what the server sends written down."""

    class Listening(kind):
        def model_call(self, *args: Any, **keys: Any) -> Any:
            outputs = super().model_call(*args, **keys)
            heard.said += outputs if isinstance(outputs, list) else [outputs]
            if not keys.get("generate", True):
                heard.scored += [len(tokens) for tokens in keys["messages"]]
            return outputs

        def _create_payload(self, *args: Any, **keys: Any) -> Any:
            payload = super()._create_payload(*args, **keys)
            # No stop string is no field: `transformers serve` fails on an empty list.
            return {name: value for name, value in payload.items() if name != "stop" or value}

    return Listening


def _takes_seed(provider: str) -> bool:
    """Whether a request may name its seed: OpenAI's form has the field, Anthropic's refuses what it does not know."""
    return "completions" in provider and not provider.startswith(("anthropic", "litellm"))


def _takes(kind: Any, name: str) -> bool:
    import inspect

    return name in inspect.signature(kind.__init__).parameters


def key_variable(entry: ServedModel) -> str:
    """The environment variable that the key is taken from."""
    if entry.key_variable is not None:
        return entry.key_variable
    if entry.provider.startswith("anthropic"):
        return "ANTHROPIC_API_KEY"
    return "AZURE_OPENAI_API_KEY" if entry.provider.startswith("azure") else "OPENAI_API_KEY"


def without_key(text: str, model: Any) -> str:
    """`text` without the model's key, which some servers repeat when they refuse it."""
    key = getattr(model, "api_key", None)
    return text.replace(str(key), "***") if key else text


def _hide(key: str, record: logging.LogRecord) -> bool:
    if key in record.getMessage():
        record.msg, record.args = record.getMessage().replace(key, "***"), ()
    return True


def _billed(said: Sequence[Mapping[str, Any]]) -> tuple[int | None, int | None]:
    """(tokens of prompts, tokens of completions) that the server counted, in OpenAI's words or in Anthropic's."""
    if not said:
        return None, None
    usages = [one.get("usage") or {} for one in said]
    return tuple(
        known_sum(next((usage[name] for name in names if usage.get(name) is not None), None) for usage in usages)
        for names in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens"))
    )  # type: ignore[return-value]


_FINISHED = {"end_turn": "eos", "stop_sequence": "stop", "max_tokens": "length"}  # Anthropic's words


def _finish_reason(said: Sequence[Mapping[str, Any]]) -> str:
    """OpenAI says "stop" of a stop string and of the end alike; "unknown" where nothing is said."""
    if not said:
        return "unknown"
    choices = said[-1].get("choices") or [{}]
    found = said[-1].get("stop_reason") or choices[0].get("finish_reason")
    return _FINISHED.get(found, found) if isinstance(found, str) else "unknown"


def _up_to_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop strings. Servers take four at the most, and some give the string too."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
