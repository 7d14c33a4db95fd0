"""Which model does an adapter change? What adapter_config.json says of it, as an address that can be looked at.

    /models/base, s3://bucket/base, hf://org/model@revision   as they are
    ./base, ../base                                           seen from where the adapter lies, in a folder or a bucket
    org/model, org/model@revision, or with peft's `revision`  on the Hugging Face hub

Whatever it is called: the base's content is part of the adapter's checkpoint_id (contract section 1).
"""

import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval_platform.config import hub_address

FIELD = "base_model_name_or_path"
_HOW = "give an absolute path, ./ or ../ from here, s3://bucket/path, or org/model@revision of the Hugging Face hub"


def base_address(config: Mapping[str, Any], adapter: str) -> str:
    """The address of the base model that `config` (adapter_config.json) names, of the adapter at the address `adapter`.

    An absolute path, s3://..., or hf://... Raises ValueError, with a remedy, for what names no model.
    """
    named, revision = config.get(FIELD), config.get("revision")
    if not isinstance(named, str) or not named:
        raise ValueError(f"field {FIELD} is {named!r}; {_HOW}")
    if named.startswith(("./", "../")) or named in (".", ".."):
        return _beside(named, adapter)
    if named.startswith("s3://"):
        return named.rstrip("/")
    if Path(named).is_absolute():
        return posixpath.normpath(named)
    address = named if named.startswith("hf://") else f"hf://{named}"
    if hub_address(address) is None:
        raise ValueError(f"field {FIELD} is {named!r}, which is no name of a model; {_HOW}")
    if revision is not None and "@" not in address:
        if not isinstance(revision, str) or hub_address(f"{address}@{revision}") is None:
            raise ValueError(f"field revision is {revision!r}, which is no revision of {named}")
        address = f"{address}@{revision}"
    return address


def _beside(named: str, adapter: str) -> str:
    scheme, mark, path = adapter.rpartition("://")
    if scheme == "hf":
        raise ValueError(f"field {FIELD} is {named!r}, and nothing lies beside a repository of the hub; {_HOW}")
    found = posixpath.normpath(posixpath.join(path, named))
    if mark and found.split("/")[0] != path.split("/")[0]:
        raise ValueError(f"field {FIELD} is {named!r}, which leads out of the bucket; {_HOW}")
    return f"{scheme}{mark}{found}"
