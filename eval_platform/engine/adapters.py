"""How does a LoRA adapter change its base model? Merged into the weights when they are loaded, so that the engine runs
one plain model, as fast as any.

    W' = W + s * B A        s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (arXiv 2106.09685, 2312.03732)

The sum is taken in float32 and rounded to the model's dtype once. Whatever the adapter holds must find its place: a
tensor or a setting whose effect is not known here is refused by name, since a model without it would be another one.
File format: peft's `save_pretrained` (adapter_config.json, adapter_model.safetensors).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_platform.engine.settings import read_json_object
from eval_platform.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter
    from transformers import PreTrainedModel

_REMEDY = "merge it with peft (merge_and_unload), and save the whole model with save_pretrained"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
# What of adapter_config.json is read here, and what says how it was trained and changes nothing of what it is.
_READ = frozenset({"alpha_pattern", "lora_alpha", "peft_type", "r", "rank_pattern", "use_rslora"})
_NO_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config", "exclude_modules"),
        *("fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_dropout", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size"),
        *("revision", "runtime_config", "target_modules", "task_type"),
    }
)
# How the factors began. With others (pissa, olora, corda, loftq) peft changes the base's weights too, before it trains:
# such an adapter belongs to another base.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def merge(model: "PreTrainedModel", folder: Path) -> None:
    """Change the weights of `model` by the adapter in `folder`. Raises CheckpointError for what has no exact sum."""
    import torch
    from safetensors import safe_open

    config = read_json_object(folder / "adapter_config.json")
    _refuse_unknown(config, folder)
    _refuse_patterns(config, folder)
    factors: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 -- no dictionary
            if (match := _FACTOR.fullmatch(name)) is not None:
                pair = factors.setdefault(match["module"].removeprefix(_PREFIX), {})
                if match["side"] in pair:
                    raise _misfit(folder, name, "the same factor is there twice")
                pair[match["side"]] = file.get_tensor(name)
            else:
                _replace(model, name, file.get_tensor(name), folder)
        for name, pair in factors.items():
            _add(model, name, pair, config, folder)


def _refuse_unknown(config: Mapping[str, Any], folder: Path) -> None:
    where = f"{folder.parent}: adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: field peft_type: {config.get('peft_type')!r} is no LORA", remedy=_REMEDY)
    begun = config.get("init_lora_weights")
    if begun not in _BEGINNINGS:
        raise CheckpointError(
            f"{where}: field init_lora_weights: {begun!r} may have changed the base model's weights too", remedy=_REMEDY
        )
    for field in sorted(set(config) - _READ - _NO_EFFECT):
        if config[field]:
            raise CheckpointError(
                f"{where}: field {field}: what {str(config[field])[:60]!r} does is not known here", remedy=_REMEDY
            )


def _refuse_patterns(config: Mapping[str, Any], folder: Path) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        try:
            wrong = "" if isinstance(pattern, dict) and all(re.compile(key) for key in pattern) else "no JSON object"
        except re.error as error:
            wrong = str(error)
        if wrong:
            raise CheckpointError(
                f"{folder.parent}: adapter_config.json: field {field} must map regular expressions to numbers: {wrong}",
                remedy=_REMEDY,
            )


def _add(
    model: "PreTrainedModel", path: str, pair: Mapping[str, "Tensor"], config: Mapping[str, Any], folder: Path
) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    name = f"{_PREFIX}{path}"
    module = _module(model, path, folder)
    if set(pair) != {"A", "B"}:
        raise _misfit(folder, name, "only one of lora_A and lora_B is there")
    if type(module) not in (torch.nn.Linear, Conv1D, torch.nn.Embedding):
        raise _misfit(folder, name, f"the base has a {type(module).__name__} there, not a plain layer")
    weight: Parameter = module.weight  # pyright: ignore[reportAssignmentType]
    _must_stand_alone(model, weight, folder, name)
    a, b = (pair[side].to(weight.device, torch.float32) for side in "AB")
    if b.dim() != 2 or a.dim() != 2 or not 0 < a.shape[0] == b.shape[1]:
        raise _misfit(folder, name, f"lora_B {tuple(b.shape)} and lora_A {tuple(a.shape)} do not multiply")
    rank = a.shape[0]
    if _of_pattern(config, "rank_pattern", path, config.get("r")) != rank:
        raise _misfit(folder, name, f"its rank is {rank}, and adapter_config.json says another")
    alpha = _of_pattern(config, "alpha_pattern", path, config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _misfit(folder, name, f"field lora_alpha is {alpha!r}")
    product = b @ a
    # A Linear's weight is [out, in], as B A is; GPT-2's Conv1D has [in, out], an embedding [tokens, size].
    product = product if type(module) is torch.nn.Linear else product.T
    if product.shape != weight.shape:
        raise _misfit(folder, name, f"it is for weights {tuple(product.shape)}, the base's are {tuple(weight.shape)}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    weight.data = (weight.data.float() + scale * product).to(weight.dtype)


def _replace(model: "PreTrainedModel", name: str, value: "Tensor", folder: Path) -> None:
    """What was trained whole beside the factors: biases, modules_to_save, a copy of embeddings that have factors."""
    import torch

    path, _, last = name.removeprefix(_PREFIX).rpartition(".")
    # What peft calls the layer that factors are added to.
    weight = getattr(_module(model, path.removesuffix(".base_layer"), folder), last, None)
    if not isinstance(weight, torch.Tensor):
        raise _misfit(folder, name, f"{tuple(value.shape)}, and the base has nothing there")
    if weight.shape != value.shape:
        raise _misfit(folder, name, f"{tuple(value.shape)}, and the base's is {tuple(weight.shape)}")
    _must_stand_alone(model, weight, folder, name)
    weight.data = value.to(weight.device, weight.dtype)


def _module(model: "PreTrainedModel", path: str, folder: Path) -> "Module":
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise _misfit(folder, path, "the base model has no such module") from error


def _must_stand_alone(model: "PreTrainedModel", weight: "Tensor", folder: Path, name: str) -> None:
    if weight.is_meta:
        raise ConfigError(
            '[engine] device = "map" keeps weights where an adapter cannot be merged into them', remedy=_REMEDY
        )
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise _misfit(folder, name, f"the base's weight is quantized ({weight.dtype})")
    # Trained on one of them, it would change both here.
    if sum(one is weight for _, one in model.named_parameters(remove_duplicate=False)) > 1:
        raise _misfit(folder, name, "the base uses this weight twice (tied embeddings)")


def _of_pattern(config: Mapping[str, Any], field: str, path: str, otherwise: Any) -> Any:
    """peft's rule: the first key of the pattern that is the end of the module's path, as a regular expression."""
    for key, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return otherwise


def _misfit(folder: Path, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{folder.parent}: adapter_model.safetensors: {name}: {why}",
        remedy=f"look whether base_model_name_or_path is the base it was trained on; if it is, {_REMEDY}",
    )
