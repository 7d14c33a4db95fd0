"""Brings a checkpoint into memory, and refuses one whose weights are not all there."""

import logging
import platform
import string
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_platform.engine import placement
from eval_platform.engine.adapters import merge
from eval_platform.engine.chat import ChatTemplate
from eval_platform.engine.encoding import encode_prompts, encode_prompts_apart
from eval_platform.engine.face import Engine, EngineInfo
from eval_platform.engine.lengths import PromptLengths
from eval_platform.engine.settings import read_json_object, resolve_settings
from eval_platform.errors import CheckpointError, ConfigError, as_device_error
from eval_platform.importing import collector_paused
from eval_platform.values import ADAPTER_FOLDER, RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

NUMERICS_VERSION = 2


def load(path: Path, settings: RunSettings) -> Engine:
    """Load the checkpoint in the folder `path`, from its files alone: nothing is fetched, no pickle is opened.

    `settings` need not be resolved. Raises CheckpointError for a model class transformers does not know, a tokenizer
    that does not load, and weights that are missing, left over, of another shape or unreadable; ConfigError for a
    device this machine does not have, or a model that its devices cannot hold. Memory and I/O errors pass through:
    they may pass by themselves.
    """
    settings = resolve_settings(settings, path)
    with collector_paused():
        import safetensors
        import tokenizers
        import torch
        import transformers
        import transformers.modeling_utils  # most of what transformers is, and only imported on first use

        from eval_platform.engine.plain import PlainEngine
        from eval_platform.engine.seq2seq import Seq2SeqEngine

    settings = replace(settings, device=placement.choose_device(settings, path))
    placement.keep_to_share(settings)
    places = placement.device_map(settings)
    config = _load_config(path, settings)
    tokenizer = _load_tokenizer(path, settings, config)
    model = _load_model(path, settings, config, places)
    device = placement.where(model, path, settings)
    model.eval()
    plain_engine = Seq2SeqEngine if config.is_encoder_decoder else PlainEngine
    finite = _make_nan_visible(model, path)
    if settings.max_length is None:
        raise ValueError("resolved settings have a max_length")
    info = EngineInfo(
        device=device,
        dtype=str(model.dtype).removeprefix("torch."),
        max_length=settings.max_length,
        engine_path="plain",
        n_parameters=model.num_parameters(),
        numerics_version=NUMERICS_VERSION,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
        architecture=type(model).__name__,
        vocab_size=int(model.config.get_text_config().vocab_size),
    )
    wanted = settings.engine_path
    if wanted == "plain" or (wanted == "auto" and (not finite or settings.device == placement.MAP)):
        # Where a weight is NaN there is nothing to be fast for; packed attention wants all of a model on one device.
        return plain_engine(model, tokenizer, settings, info)
    from eval_platform.engine.attention import Unsupported
    from eval_platform.engine.support import WrongProducts

    try:
        return _tree_engine(model, tokenizer, settings, info)
    except Unsupported as error:
        if wanted == "tree":
            raise ConfigError(
                f'[engine] path = "tree", but {path} cannot run so: {error}', remedy='set [engine] path = "auto"'
            ) from error
        _log.warning("%s takes the plain path: %s", path, error)
        info = replace(info, versions={**info.versions, "why_plain": str(error)})
        is_changed = isinstance(error, WrongProducts)
    if is_changed:
        del model  # before another is loaded beside it
        model = _load_model(path, settings, config, places).eval()
    return plain_engine(model, tokenizer, settings, info)


def _tree_engine(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", settings: RunSettings, info: EngineInfo
) -> Engine:
    """Raises Unsupported, with the model as it was but for WrongProducts."""
    from eval_platform.engine import kernels, support
    from eval_platform.engine.attention import Unsupported
    from eval_platform.engine.head import Head
    from eval_platform.engine.memory import token_budget
    from eval_platform.engine.narrowing import narrow
    from eval_platform.engine.pages import settle_allocator
    from eval_platform.engine.tree import TreeEngine

    expected = support.reference(model)
    packed = support.packed_model(model, expected)
    budget = settings.batch_tokens or token_budget(model)
    tokens = expected.sequences[0][0]
    chosen = kernels.install(model, lambda: packed.find_reaches(tokens), deterministic=settings.deterministic)
    head = Head(model, chosen.head, chosen.head_few)
    settle_allocator()
    try:
        if not chosen.are_torchs:  # else nothing has changed since the model was set to packed attention
            support.check(packed, head, expected)
    except Unsupported as error:
        raise support.WrongProducts(f"with {chosen.describe()}, {error}") from error
    narrow(model, packed, tokens, expected.hidden)
    return TreeEngine(model, tokenizer, settings, info, packed=packed, head=head, budget=budget, kernels=chosen)


def _load_config(path: Path, settings: RunSettings) -> "PreTrainedConfig":
    from transformers import AutoConfig

    file = path / "config.json"
    model_type = read_json_object(file).get("model_type")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=settings.trust_remote_code)
    except Exception as error:
        # transformers and a checkpoint's own code raise whatever they like for a bad file, here and below.
        if _may_pass(error):
            raise
        _refuse_own_code(error, f"{file}: field model_type: {model_type!r}")
        text = str(error)
        if "does not recognize this architecture" in text or "Unrecognized model" in text:
            raise _unknown_class(path, model_type) from error
        raise CheckpointError(f"{file}: {_start(error)}", remedy="mend the field, or write it again") from error


def _refuse_own_code(error: Exception, what: str) -> None:
    if "custom code" in str(error):
        raise CheckpointError(
            f"{what} needs the checkpoint's own Python code",
            remedy="read that code; then set trust_remote_code = true under [engine], or give --trust-remote-code",
        ) from error


def _unknown_class(path: Path, model_type: str | None) -> CheckpointError:
    return CheckpointError(
        f"{path / 'config.json'}: field model_type: {model_type!r} is no language model that "
        "this version of transformers knows",
        remedy="correct model_type, or install a version of transformers that has the model",
    )


def prompt_lengths(path: Path, settings: RunSettings) -> PromptLengths:
    """How long prompts are for the checkpoint at `path`, without loading its weights. Raises CheckpointError."""
    config = _load_config(path, settings)
    tokenizer = _load_tokenizer(path, settings, config)
    encode = encode_prompts_apart if config.is_encoder_decoder else encode_prompts
    if settings.max_length is None:
        raise ValueError("the model's window is not resolved yet: resolve_settings does it")
    return PromptLengths(
        count=lambda texts: [len(tokens) for tokens in encode(tokenizer, texts)],
        window=settings.max_length,
        is_shared=not config.is_encoder_decoder,
    )


def chat_template(path: Path, settings: RunSettings) -> ChatTemplate:
    """The chat template of the checkpoint at `path`, without loading its weights. Raises CheckpointError."""
    return ChatTemplate(_load_tokenizer(path, settings, _load_config(path, settings)), path)


def _load_tokenizer(path: Path, settings: RunSettings, config: "PreTrainedConfig") -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    remedy = "save the tokenizer beside the weights (tokenizer.save_pretrained)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, config=config, local_files_only=True, trust_remote_code=settings.trust_remote_code
        )
    except Exception as error:
        if _may_pass(error):
            raise
        _refuse_own_code(error, f"{path / 'tokenizer_config.json'}: field auto_map: the tokenizer")
        raise CheckpointError(f"no tokenizer could be loaded from {path}: {_start(error)}", remedy=remedy) from error
    # For some model types transformers makes an empty tokenizer when the files are not there, without a word.
    if len({tuple(tokenizer.encode(text, add_special_tokens=False)) for text in string.ascii_letters}) < 2:
        raise CheckpointError(
            f"the tokenizer in {path} tells no two letters apart: its files are missing", remedy=remedy
        )
    return tokenizer


def _load_model(path: Path, settings: RunSettings, config: "PreTrainedConfig", places: Any) -> "PreTrainedModel":
    """The model with each weight read from the file's memory map straight to its device, in the dtype it runs in."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    model_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        loaded: Any = model_class.from_pretrained(
            path,
            config=config,
            dtype=getattr(torch, settings.dtype),
            device_map=places,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            # Not to load them: so that the report names them, and _refuse_partial refuses.
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        if _may_pass(error):
            raise
        _refuse_own_code(error, f"{path / 'config.json'}: field auto_map: the model")
        if "Unrecognized configuration class" in str(error):
            raise _unknown_class(path, config.model_type) from error
        raise CheckpointError(
            f"no model could be loaded from {path} (model type {config.model_type!r}): {_start(error)}",
            remedy="write the checkpoint again with save_pretrained (safetensors)",
        ) from error
    model, report = loaded
    _refuse_partial(path, report)
    if (path / ADAPTER_FOLDER).is_dir():
        merge(model, path / ADAPTER_FOLDER)
    return model


def _refuse_partial(path: Path, report: Mapping[str, Any]) -> None:
    """transformers fills missing weights with random numbers and goes on; a number from such a model is worthless.

    Tied weights (a head that is the embedding) are not in its report of missing keys.
    """
    problems = []
    for kind, words in (
        ("missing_keys", "weights missing"),
        ("unexpected_keys", "weights the model has no place for"),
        ("mismatched_keys", "weights of another shape"),
        ("error_msgs", "errors"),
    ):
        found = sorted(str(name) for name in report.get(kind) or ())
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            problems.append(f"{len(found)} {words}: {', '.join(found[:3])}{more}")
    if problems:
        raise CheckpointError(
            f"{path}: its weights do not fit its config.json; " + "; ".join(problems),
            remedy="write the checkpoint again with the config of the model that was trained",
        )


def _make_nan_visible(model: "PreTrainedModel", path: Path) -> bool:
    """Where a weight is not finite, compute attention step by step, so that its NaN reaches the output.

    torch 2.13's fused attention on CPU gives zeros, not NaN, for NaN queries over fewer than 16 keys, so a model
    with a ruined query projection would answer short prompts with plausible numbers. Returns whether all are finite.
    """
    import torch

    for name, weight in model.named_parameters():
        if weight.is_meta:  # device = "map" brings it to a GPU when it is needed: no attention of the CPU's
            continue
        # aminmax passes a NaN on and needs no second tensor of the weight's size.
        if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and weight.numel():
            low, high = torch.aminmax(weight.detach())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                _log.warning("%s: weight %s is not finite (NaN or infinity)", path, name)
                model.set_attn_implementation("eager")
                return False
    return True


def _may_pass(error: Exception) -> bool:
    """Whether another try could succeed: memory, a GPU, the file system (transformers' own OSErrors have no errno)."""
    from torch import OutOfMemoryError

    if as_device_error(error) is not None:
        return True
    if isinstance(error, MemoryError | OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return True
    return isinstance(error, OSError) and error.errno is not None


def _start(error: Exception) -> str:
    """The error's type and the start of its text, in one line: some of transformers' run to pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"
