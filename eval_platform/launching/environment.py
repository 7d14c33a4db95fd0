"""Which environment variables does a worker get that runs on another machine?

Slurm passes them on unseen; Ray shows them to everybody who can open its dashboard.
"""

import re
from collections.abc import Mapping, Sequence

from eval_platform.launching.local import NEVER_SENT, WORKER_ENV
from eval_platform.plan import Plan

# What a worker may need of its driver's environment; the rest stays here. Never CUDA_VISIBLE_DEVICES: clusters set it.
_LIKE = (
    *("PYTHON", "EVAL_PLATFORM_", "AWS_", "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_"),
    *("OMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "TORCH_", "PYTORCH_", "TRITON_", "NCCL_"),
)
# What makes the node's shell the driver's own: of use where both are one user on one file system, as Slurm has it.
_OF_THE_USER = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "XDG_CACHE_HOME"),
        *("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "GLIBC_TUNABLES"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    )
)
_LIKE_OF_THE_USER = ("LC_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_LIKE_OF_PROVIDERS = ("OPENAI_", "ANTHROPIC_", "AZURE_")  # where a served model is asked
_SECRET = re.compile(
    r"(^|_)(KEYS?|TOKENS?|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|PASS|CREDENTIALS?|AUTH|PAT)(_|$)", re.IGNORECASE
)
_HAS_PASSWORD = re.compile(r"://[^/\s]*@")  # an address with its user's name


def hidden_environment(
    plan: Plan, mine: Mapping[str, str], named: Sequence[str], like: Sequence[str] = ()
) -> dict[str, str]:
    """What goes over where nobody else can read it: credentials of S3 and of the hub too, and the keys of a served
    model's provider. named, like: further variables, and beginnings of their names."""
    entry = plan.served_model()
    keys = [entry.key_variable] if entry is not None and entry.key_variable else []
    providers = _LIKE_OF_PROVIDERS if entry is not None else ()
    return _chosen(mine, {*_OF_THE_USER, *named, *keys}, (*_LIKE, *_LIKE_OF_THE_USER, *providers, *like))


def open_environment(mine: Mapping[str, str], named: Sequence[str]) -> dict[str, str]:
    """What goes over where others can read it: nothing whose name says that it is a secret, and no address with a
    password, save what `named` has."""
    without_secrets = {
        name: value
        for name, value in mine.items()
        if name in named or not (_SECRET.search(name) or _HAS_PASSWORD.search(value))
    }
    return _chosen(without_secrets, set(named), _LIKE)


def _chosen(mine: Mapping[str, str], named: set[str], like: tuple[str, ...]) -> dict[str, str]:
    kept = {name: value for name, value in mine.items() if name in named or name.startswith(like)}
    return {**WORKER_ENV, **{name: value for name, value in kept.items() if name not in NEVER_SENT}}
