"""How do lm-evaluation-harness's own tasks run on our engine? Its model `eval-platform` (needs the extra `lm-eval`).

Importing this module registers the name, so that `simple_evaluate(model="eval-platform", ...)` finds it.
lm-evaluation-harness 0.4.13 has no plug-in mechanism for models (its registry takes names from whoever is imported),
so its command line runs through this module: `python -m eval_platform.lm_eval_model run --model eval-platform ...`.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import jinja2

# Imported for what it does: the registry fills itself with lm-eval's own models only while it is empty.
import lm_eval.models  # noqa: F401
import torch
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from eval_platform.engine import load
from eval_platform.engine.settings import read_json_object
from eval_platform.errors import CheckpointError, ConfigError, TaskError
from eval_platform.values import Generation, Request, Response, RunSettings, make_request

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

NAME = "eval-platform"

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

# As a path, not as the class: under `python -m` this file is loaded twice, and both times say the same.
model_registry.register(NAME, target="eval_platform.lm_eval_model:EvalPlatformLM")

_DEFAULT_MAX_GEN_TOKS = 256  # HFLM.max_gen_toks
_GEN_KWARGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")
# What transformers 5 draws with where neither the task nor the checkpoint says (GenerationConfig's global defaults).
_DEFAULT_TOP_P, _DEFAULT_TOP_K = 1.0, 50


class EvalPlatformLM(LM):
    """A checkpoint folder as lm-evaluation-harness's model: its requests, our engine, its answers.

    `LM` and not `TemplateLM`: the engine encodes, so that nothing is encoded twice. All requests of a kind, whatever
    their task, go to the engine in one call; equal ones are asked once.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        dtype: str = "auto",
        max_length: int | None = None,
        device: str = "auto",
        path: str = "auto",
        trust_remote_code: bool = False,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        """Load the checkpoint in the local folder `pretrained`.

        max_length in tokens (None: the model's window), path the engine's ("auto", "tree" or "plain"). batch_size and
        max_batch_size mean nothing: the engine batches by tokens. Draws are seeded with torch's seed, which
        lm-evaluation-harness's `--seed` sets. Raises ConfigError for an argument that is not known or not usable
        here, and what `engine.load` raises.
        """
        super().__init__()
        if unknown:
            raise ConfigError(
                f"model {NAME!r} has no argument {', '.join(map(repr, sorted(unknown)))}",
                remedy="use pretrained, dtype, max_length, device, path, trust_remote_code, batch_size",
            )
        folder = Path(str(pretrained))
        if not folder.is_dir():
            raise ConfigError(
                f"model {NAME!r}: pretrained={pretrained!r} is no folder",
                remedy="download the checkpoint and name the folder that holds its config.json",
            )
        # 1 is what lm-eval's command line says where nobody said anything, and it shows our warnings only.
        if batch_size not in (None, 1, "1") or max_batch_size is not None:
            _log.warning("batch_size means nothing to model %r: the engine batches by tokens", NAME)
        self._folder = folder
        self._trust_remote_code = trust_remote_code
        settings = RunSettings(
            dtype=dtype,
            device=device,
            max_length=max_length,
            seed=torch.initial_seed(),
            engine_path=path,
            trust_remote_code=trust_remote_code,
        )
        self._engine = load(folder, settings)
        # Of a model on several devices ("map(cuda:0,cpu)") the first, where its inputs go.
        self._device = torch.device(self._engine.info.device.removeprefix("map(").rstrip(")").split(",")[0])

    # -- what is asked

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, greedy) of every (context, continuation)."""
        asked = [make_request("choice", *instance.args) for instance in requests]
        return self._answer("loglikelihood", requests, asked, _choice, disable_tqdm)

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of every (text,), in disjoint windows."""
        asked = [make_request("rolling", instance.args[0]) for instance in requests]
        return self._answer("loglikelihood_rolling", requests, asked, _log_likelihood, disable_tqdm)

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """The completion of every (context, generation arguments), up to its first stop string.

        Raises TaskError for generation arguments that the engine does not have.
        """
        asked = []
        drawn: Counter[str] = Counter()
        for instance in requests:
            context, arguments = cast("tuple[str, dict[str, Any]]", instance.args)
            request = make_request("generate", context, settings=self._generation(instance.task_name, arguments))
            if request.settings is not None and request.settings.temperature > 0:
                # Asked again, a draw is another draw.
                repeat = drawn[request.request_id]
                drawn[request.request_id] += 1
                request = make_request("generate", context, settings=request.settings, repeat=repeat)
            asked.append(request)
        return self._answer("generate_until", requests, asked, _text, disable_tqdm)

    def _answer(
        self,
        kind: str,
        instances: Sequence["Instance"],
        asked: Sequence[Request],
        value: Callable[[Response], _Answer],
        disable_tqdm: bool,
    ) -> list[_Answer]:
        """The engine's answers in the order of `asked`, each handed to lm-eval's cache as soon as it is known."""
        places: dict[tuple[str, int], list[int]] = {}
        for i, request in enumerate(asked):
            places.setdefault((request.request_id, request.repeat), []).append(i)
        answers: dict[int, _Answer] = {}
        with tqdm(total=len(asked), desc=f"Running {kind} requests", disable=disable_tqdm) as bar:
            for response in self._engine.answer([asked[where[0]] for where in places.values()]):
                answer = value(response)
                for i in places[response.request_id, response.repeat]:
                    answers[i] = answer
                    self.cache_hook.add_partial(kind, instances[i].args, answer)
                    bar.update()
        return [answers[i] for i in range(len(asked))]

    def _generation(self, task: str | None, arguments: dict[str, Any]) -> Generation:
        """`generation_kwargs` as HFLM understands them (models/huggingface.py:generate_until, _model_generate)."""
        where = f"task {task}, generation_kwargs"
        said: dict[str, Any] = dict(normalize_gen_kwargs(arguments, _DEFAULT_MAX_GEN_TOKS))
        # Some shipped tasks say what is so anyway.
        if said.get("num_beams") == 1:
            del said["num_beams"]
        unknown = sorted(set(said) - set(_GEN_KWARGS))
        if unknown:
            raise TaskError(
                f"{where}: the engine does not know {', '.join(f'{key}={said[key]!r}' for key in unknown)}",
                remedy=f"use {', '.join(_GEN_KWARGS)} only (in the task file, or with --gen_kwargs), or run model hf",
            )
        stops = [stop for stop in said["until"] if stop is not None]
        wrong = [stop for stop in stops if not isinstance(stop, str)]
        if wrong:
            raise TaskError(f"{where}: until: {wrong[0]!r} is no text", remedy="write every stop string in quotes")
        if not said["do_sample"]:
            return Generation(said["max_gen_toks"], tuple(stops))
        temperature = float(said.get("temperature", 0.0))
        if not temperature > 0:
            raise TaskError(
                f"{where}: do_sample is true, but temperature is {temperature:g}",
                remedy="set temperature above 0, or do_sample to false",
            )
        top_p = said.get("top_p", self._checkpoint_draws.get("top_p", _DEFAULT_TOP_P))
        top_k = said.get("top_k", self._checkpoint_draws.get("top_k", _DEFAULT_TOP_K))
        # None given by name turns either off, as in transformers.
        return Generation(
            said["max_gen_toks"], tuple(stops), temperature, 1.0 if top_p is None else float(top_p), int(top_k or 0)
        )

    @cached_property
    def _checkpoint_draws(self) -> dict[str, Any]:
        """What the checkpoint's generation_config.json says about drawing, which a task's silence leaves standing."""
        file = self._folder / "generation_config.json"
        stored = read_json_object(file) if file.is_file() else {}
        return {key: stored[key] for key in ("top_p", "top_k") if stored.get(key) is not None}

    # -- chat templates

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """For chat templates and lm-eval's record of what ran; the engine has its own."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            self._folder, local_files_only=True, trust_remote_code=self._trust_remote_code
        )

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template's source, chosen as HFLM chooses it; None where there is none or none is wanted."""
        # Theirs asks nothing of a TemplateLM but its tokenizer.
        return TemplateLM.chat_template(cast(Any, self), chat_template)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without its system message where the template refuses one, as in HFLM.

        Raises CheckpointError when the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise CheckpointError(
                f"the tokenizer in {self._folder} has no chat template",
                remedy="leave out --apply_chat_template, or save a chat_template with the tokenizer",
            )
        try:
            return self._chat_prompt(chat_history, add_generation_prompt)
        except jinja2.exceptions.TemplateError:
            _log.warning(
                "the chat template in %s refused the conversation; its system message is left out", self._folder
            )
            rest = [message for message in chat_history if message["role"] != "system"]
            return self._chat_prompt(rest, add_generation_prompt)

    def _chat_prompt(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        prompt = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return cast(str, prompt)

    # -- what lm-eval writes beside its results

    @property
    def eot_token_id(self) -> int | None:
        return cast("int | None", self.tokenizer.eos_token_id)

    @property
    def max_length(self) -> int:
        """The window in tokens."""
        return self._engine.info.max_length

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to the `config` of its results; the first two under HFLM's names."""
        info = self._engine.info
        return {
            "model_num_parameters": info.n_parameters,
            "model_dtype": info.dtype,
            "engine_path": info.engine_path,
            "engine_numerics_version": info.numerics_version,
        }


def _log_likelihood(response: Response) -> float:
    assert response.log_likelihood is not None
    return response.log_likelihood


def _choice(response: Response) -> tuple[float, bool]:
    return _log_likelihood(response), bool(response.is_greedy)


def _text(response: Response) -> str:
    assert response.text is not None
    return response.text


def main() -> None:
    """lm-evaluation-harness's own command line, with model `eval-platform` among its models."""
    from lm_eval.__main__ import cli_evaluate

    # Its bootstrap forks this process, which has computed on several threads: seen to hang for ever.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    cli_evaluate()


if __name__ == "__main__":
    main()
