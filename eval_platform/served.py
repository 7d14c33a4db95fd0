"""Which models are there that only a server knows, and what can each be asked? The sections `[[served]]`.

A back end is named as lm-evaluation-harness names its models ("local-completions", "anthropic-chat", "vllm"). Of such a
model nothing can be hashed: it is what it was asked by (provider, model, endpoint) and the day it is taken to be of.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from eval_platform.identity import content_id
from eval_platform.values import Served

ROOT = "served"  # first part of every key of a served model; no root of checkpoints may be called so

# lm-evaluation-harness 0.4.13 (models/__init__.py, and azure of models/openai_completions.py): those that are given
# messages, those that are given text and yet tell no log-likelihoods, and those that tell them of an answer, but not of
# a whole text. tests/test_served.py asks its classes.
CHAT_PROVIDERS = frozenset(
    {
        *("local-chat-completions", "openai-chat-completions", "azure-openai-chat-completions"),
        *("anthropic-chat", "anthropic-chat-completions", "litellm", "litellm-chat", "litellm-chat-completions"),
    }
)
_ONLY_COMPLETES = frozenset({"anthropic-completions", "hf-audiolm-qwen", "hf-multimodal", "vllm-vlm"})
_NOT_WHOLE_TEXTS = frozenset({"ggml", "gguf", "textsynth"})
# Of OpenAI's models the only two that tell log-likelihoods of a prompt.
_OPENAI_SCORES = frozenset({"babbage-002", "davinci-002"})

# How it is asked, not what: no part of what a result is known by.
_NO_IDENTITY = frozenset({"batch_size", "ca_cert_path", "max_retries", "timeout", "verify_certificate"})
_OWN_FIELDS = {"base_url": "endpoint", "model": "model", "num_concurrent": "concurrency", "pretrained": "model"}
_SECRET_ARGUMENTS = frozenset({"api_key", "auth_token", "header", "headers", "password", "token"})
# Of a URL, without case, "-" and "_".
_SECRET_PARAMETERS = frozenset(
    {
        *("accesstoken", "apikey", "auth", "authtoken", "code", "key", "password", "secret", "sig", "signature"),
        *("subscriptionkey", "token", "xapikey"),
    }
)
_BY_ENVIRONMENT = "keys come from the environment only; key_variable names another variable than the provider's own"


class ServedModel(BaseModel):
    """A model behind a server, evaluated as a checkpoint: `[[served]]`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="its key is `served/<name>`")
    provider: str = Field(min_length=1, description="lm-evaluation-harness's name of the back end")
    model: str = Field(min_length=1, description="what the server calls it")
    endpoint: str | None = Field(default=None, description="URL of the completions; default: the provider's own")
    as_of: date = Field(description="the day that the model is taken to be of; another day is another arrival")
    run: str | None = Field(default=None, description="whose curve it stands on; default: its name")
    step: int | None = Field(default=None, ge=0)
    tokens_seen: int | None = Field(default=None, ge=0)
    arguments: dict[str, Any] = Field(default={}, description="of the back end, as `--model_args` of the harness")
    key_variable: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable that holds the key; default: as the provider has it",
    )
    concurrency: int = Field(default=1, ge=1, description="requests at a time")
    log_likelihoods: bool | None = Field(
        default=None, description="whether it tells those of a prompt; default: as the provider usually does"
    )
    price_input: float | None = Field(default=None, ge=0, description="of a million tokens of prompts")
    price_output: float | None = Field(default=None, ge=0, description="of a million tokens of completions")

    @field_validator("endpoint")
    @classmethod
    def _no_secret_in(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write the whole URL, as in http://127.0.0.1:8000/v1/completions")
        names = [name.lower().replace("-", "").replace("_", "") for name, _ in parse_qsl(parts.query)]
        secret = _SECRET_PARAMETERS.intersection(names)
        if parts.username is not None or parts.password is not None or secret:
            raise ValueError(f"leave the credentials out of the URL: {_BY_ENVIRONMENT}")
        return endpoint

    @field_validator("arguments")
    @classmethod
    def _plain(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name, value in arguments.items():
            if name in _SECRET_ARGUMENTS:
                raise ValueError(f"leave {name} out: {_BY_ENVIRONMENT}")
            if name in _OWN_FIELDS:
                raise ValueError(f"{name} is said by the field {_OWN_FIELDS[name]}")
            if not isinstance(value, str | bool | int | float) or (
                isinstance(value, float) and not math.isfinite(value)
            ):
                raise ValueError(f"{name} is neither a text, nor a number, nor true or false")
        return arguments

    @property
    def key(self) -> str:
        return f"{ROOT}/{self.name}"

    @property
    def identity(self) -> Served:
        return Served(self.provider, self.model, self.endpoint, self.as_of.isoformat())

    @property
    def is_chat(self) -> bool:
        """Whether it is given messages instead of a text."""
        return self.provider in CHAT_PROVIDERS

    @property
    def gives_log_likelihoods(self) -> bool:
        if self.log_likelihoods is not None:
            return self.log_likelihoods
        if self.provider == "openai-completions":
            return self.model in _OPENAI_SCORES
        return not self.is_chat and self.provider not in _ONLY_COMPLETES

    @property
    def has_tokenizer(self) -> bool:
        """Whether this side knows the model's tokens: where log-likelihoods are told, the harness must know them."""
        return not self.is_chat and (self.gives_log_likelihoods or "tokenizer" in self.arguments)

    @property
    def hashed_arguments(self) -> dict[str, Any]:
        """Those that may change an answer."""
        return {name: value for name, value in self.arguments.items() if name not in _NO_IDENTITY}


def without_secrets(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A back end's arguments as they may be kept: no keys, and of a URL nothing but where it leads."""
    kept = {name: value for name, value in arguments.items() if name not in _SECRET_ARGUMENTS}
    if isinstance(url := kept.get("base_url"), str):
        parts = urlsplit(url)
        kept["base_url"] = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return kept


def served_id(served: Served) -> str:
    """The checkpoint_id of a served model (contract section 1): of what it was asked by, for want of weights."""
    return content_id({"served": asdict(served)})


def why_not(entry: ServedModel, definition: Mapping[str, Any]) -> str | None:
    """Why a task, by the keys of its definition, cannot be asked of this model; None when it can."""
    kind: Literal["generate_until"] | str = definition["output_type"]
    if kind != "generate_until" and not entry.gives_log_likelihoods:
        return f"{kind} needs log-likelihoods, which {entry.provider} does not give"
    if kind == "loglikelihood_rolling" and entry.provider in _NOT_WHOLE_TEXTS:
        return f"{kind} needs log-likelihoods of whole texts, which {entry.provider} does not give"
    own = definition.get("chat") or {}
    if entry.is_chat and (own.get("gen_prefix") or definition.get("gen_prefix")):
        return f"it begins the model's answer (gen_prefix), which {entry.provider} does not go on with"
    if definition.get("max_input_tokens") is not None and not entry.has_tokenizer:
        return "its prompts are cut to fit by the model's tokenizer, which is not known here"
    return None
