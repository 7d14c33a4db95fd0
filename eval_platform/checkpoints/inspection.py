"""Is this folder a whole checkpoint, as far as its files can prove, and if not, why?"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from eval_platform.checkpoints.bases import base_address
from eval_platform.checkpoints.files import MAX_JSON_BYTES, Listing, is_pickle, list_folder, role
from eval_platform.checkpoints.headers import BadHeader, read_header, tensor_names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
# Tokenizers that need no vocabulary file: they work on bytes or code points.
_NO_VOCABULARY = {"ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer"}


@dataclass(frozen=True)
class Inspection:
    """What the files prove. `reason` is "" when complete; `refused`: waiting alone will not complete it.

    kind: "transformers" or "adapter"; `base` is the address of a complete adapter's base model (`bases.base_address`).
    `listing.defining` names the model-defining files, `listing.files` their sizes.
    """

    listing: Listing
    kind: str
    reason: str = ""
    refused: bool = False
    base: str | None = None

    @property
    def complete(self) -> bool:
        return not self.reason


class _Problem(Exception):
    def __init__(self, reason: str, *, refused: bool) -> None:
        super().__init__(reason)
        self.refused = refused


def inspect(folder: Path, listing: Listing | None = None, at: str | None = None) -> Inspection:
    """Look at `folder` without reading weights: the safetensors headers, the index, the configuration.

    at: the checkpoint's own address, where `folder` is a copy or a sketch of it: what its base is named relative to. A
    base in a folder is looked at too, one in a bucket or on the hub is not (`remote.look_at_base`).

    Whether the folder is still being written cannot be seen at one glance (shards allocated ahead have their final
    size): that is the quiet period's part. Never raises for what the folder holds; raises FileNotFoundError when there
    is no folder.
    """
    listing = list_folder(folder) if listing is None else listing
    kind = "adapter" if _is_adapter(listing) else "transformers"
    try:
        base = _prove(folder, listing, kind, at or str(folder))
    except _Problem as problem:
        return Inspection(listing, kind, str(problem), problem.refused)
    except FileNotFoundError as error:
        return Inspection(listing, kind, f"{_name(error)} disappeared while it was looked at")
    except PermissionError as error:
        why = f"{_name(error)} may not be read by user {os.getuid()}, as whom this runs; give it the right"
        return Inspection(listing, kind, why, True)
    except OSError as error:
        return Inspection(listing, kind, f"{_name(error)} cannot be read: {error.strerror}; look at the disk or mount")
    return Inspection(listing, kind, base=base)


class Tensor(NamedTuple):
    """What a header says of a tensor. dtype: as safetensors calls it ("BF16")."""

    dtype: str
    elements: int
    bytes: int


def model_tensors(folder: Path) -> list[Tensor] | None:
    """The tensors of a whole model, as its files' headers tell; None where it has none, or it cannot be told."""
    try:
        if (folder / "adapter_config.json").exists():  # its base model's are elsewhere
            return None
        names = [SINGLE]
        if not (folder / SINGLE).exists():
            names = sorted(set(_read_object(folder / INDEX)["weight_map"].values()))
        entries = [entry for name in names for entry in read_header(folder / name).values()]
        return [_tensor(**entry) for entry in entries if not _is_mask(entry["shape"])] or None
    # Whoever loads it says what is wrong.
    except (_Problem, BadHeader, OSError, KeyError, TypeError, AttributeError):
        return None


def count_parameters(folder: Path) -> int | None:
    """The elements of the model's tensors; None as `model_tensors`."""
    tensors = model_tensors(folder)
    return None if tensors is None else sum(tensor.elements for tensor in tensors) or None


def _tensor(dtype: str, shape: Sequence[int], data_offsets: Sequence[int]) -> Tensor:
    return Tensor(dtype, math.prod(shape), data_offsets[1] - data_offsets[0])


def _is_mask(shape: Sequence[int]) -> bool:
    """Of attention: older exports of GPT-2 and GPT-NeoX hold one a layer, which no model counts as its parameters."""
    return len(shape) == 4 and shape[0] == shape[1] == 1 and shape[2] == shape[3]


def _name(error: OSError) -> str:
    return Path(error.filename).name if error.filename else "a file"


def _is_adapter(listing: Listing) -> bool:
    return "config.json" not in listing.files and any(
        name.startswith(("adapter_config.", "adapter_model.")) for name in listing.files
    )


def _prove(folder: Path, listing: Listing, kind: str, at: str) -> str | None:
    """The base model's address for an adapter, else None. Raises _Problem with the first thing that is missing."""
    _weights_are_there(listing, ADAPTER if kind == "adapter" else SINGLE)
    _weights_are_whole(folder, listing)
    if kind == "adapter":
        return _adapter_base(folder, at)
    _config_is_read(folder, listing)
    _tokenizer_is_there(folder, listing)
    return None


def _weights_are_there(listing: Listing, single: str) -> None:
    names = listing.files
    if single in names or (single == SINGLE and INDEX in names):
        return
    pickles = sorted(name for name in names if is_pickle(name))
    shards = [name for name in names if role(name) == "weights"]
    if shards and single == SINGLE:
        raise _Problem(f"no {SINGLE} and no {INDEX} yet, only {sorted(shards)[0]}", refused=False)
    if pickles:
        raise _Problem(
            f"pickle weights only ({pickles[0]}): reading them would run code they carry. Save as safetensors: "
            "model.save_pretrained(folder, safe_serialization=True)",
            refused=True,
        )
    raise _Problem(f"no weights yet ({single})", refused=False)


def _weights_are_whole(folder: Path, listing: Listing) -> None:
    tensors: dict[str, frozenset[str]] = {}
    for name in listing.defining:
        if role(name) != "weights":
            continue
        try:
            tensors[name] = tensor_names(folder / name)
        except BadHeader as bad:
            remedy = "; save or copy it again" if bad.final else ""
            raise _Problem(f"{name}: {bad}{remedy}", refused=bad.final) from bad
        if not tensors[name]:
            raise _Problem(f"{name} holds no tensors; save it again", refused=True)
    for name in listing.defining:
        if role(name) == "index":
            _shards_hold_what_the_index_says(name, _read_object(folder / name), tensors)


def _shards_hold_what_the_index_says(name: str, index: dict[str, Any], tensors: dict[str, frozenset[str]]) -> None:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise _Problem(f"{name}: field weight_map must map tensor names to file names; save it again", refused=True)
    for shard in sorted(set(weight_map.values())):
        if "/" in shard or not shard.endswith(".safetensors"):
            raise _Problem(f"{name} names {shard!r}, which is no safetensors file of this folder", refused=True)
        if shard not in tensors:
            raise _Problem(f"{name} names {shard}, which is missing", refused=False)
    for tensor, shard in weight_map.items():
        # transformers would fill a tensor it does not find with random numbers and only warn.
        if tensor not in tensors[shard]:
            raise _Problem(f"{name} says {tensor} is in {shard}, which does not hold it", refused=True)


def _config_is_read(folder: Path, listing: Listing) -> None:
    if "config.json" not in listing.files:
        raise _Problem("no config.json yet", refused=False)
    _read_object(folder / "config.json")


def _tokenizer_is_there(folder: Path, listing: Listing) -> None:
    if has_vocabulary(listing.files):
        return
    if "tokenizer_config.json" in listing.files:
        config = _read_object(folder / "tokenizer_config.json")
        if config.get("tokenizer_class") in _NO_VOCABULARY or "auto_map" in config:
            return
    raise _Problem(
        "no tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt). "
        "Save it beside the weights: tokenizer.save_pretrained(folder)",
        refused=True,
    )


def has_vocabulary(files: Iterable[str]) -> bool:
    """Whether one of the files, or a pair of them, is a tokenizer's vocabulary."""
    names = set(files)
    if names & {"tokenizer.json", "tekken.json", "vocab.txt"} or {"vocab.json", "merges.txt"} <= names:
        return True
    return any(name.endswith((".model", ".spm", ".tiktoken")) for name in names)


def _adapter_base(folder: Path, at: str) -> str:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise _Problem("no adapter_config.json yet", refused=False)
    try:
        address = base_address(_read_object(file), at)
    except ValueError as error:
        raise _Problem(f"adapter_config.json: {error}", refused=True) from error
    if "://" in address:
        return address
    base = Path(address)
    if not base.is_dir():
        raise _Problem(
            f"adapter_config.json: the base model's folder {base} is not there; bring it there, or name another place",
            refused=True,
        )
    if not (base / "config.json").is_file():
        raise _Problem(f"adapter_config.json: the base {base} is no full model (no config.json)", refused=True)
    below = inspect(base)
    if not below.complete:
        raise _Problem(f"adapter_config.json: the base model {base} cannot be used: {below.reason}", refused=True)
    return address


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises an error that `inspect` reports when it is none; OSError."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise _Problem(f"{path.name} has {size:,} bytes, more than {MAX_JSON_BYTES:,}; save it again", refused=True)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _Problem(f"{path.name} is not JSON ({error}); save it again", refused=True) from error
    if not isinstance(value, dict):
        raise _Problem(f"{path.name} must be a JSON object, not {type(value).__name__}; save it again", refused=True)
    return value
