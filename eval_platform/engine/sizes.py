"""How much memory do a checkpoint's weights take, once loaded? From its files' headers, without torch."""

from pathlib import Path

from eval_platform.checkpoints import Tensor, model_tensors
from eval_platform.engine.settings import loading_dtype

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATING = ("F", "BF")  # as safetensors names them: F64, F32, F16, F8_E4M3, BF16


def loaded_bytes(folder: Path, dtype: str) -> int | None:
    """Bytes of the weights of the whole model in `folder`, loaded as `dtype` (RunSettings'); None: it cannot be told.

    Raises CheckpointError for a config.json that says nothing usable.
    """
    tensors = model_tensors(folder)
    if tensors is None:
        return None
    loaded = loading_dtype(dtype, folder)
    if loaded is None:
        return sum(tensor.bytes for tensor in tensors)
    each = _BYTES[loaded]
    return sum(tensor.elements * each if _is_floating(tensor) else tensor.bytes for tensor in tensors)


def _is_floating(tensor: Tensor) -> bool:
    return tensor.dtype.startswith(_FLOATING)
