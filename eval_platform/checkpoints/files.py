"""Which files of a folder define the model, and what they look like from outside: names, sizes, times."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

from eval_platform.identity import content_id

Role = Literal["weights", "index", "config", "tokenizer", "processor", "code"]

SUCCESS = "_SUCCESS"
TEMPLATES_FOLDER = "additional_chat_templates"  # transformers' name; the only subfolder that belongs to a model

# The one place that says what defines a model (contract section 1). An allow-list: what a trainer leaves beside the
# weights (optimizer, scheduler, logs) is nothing of the model's.
_DEFINING: tuple[tuple[Role, tuple[str, ...]], ...] = (
    ("weights", ("*.safetensors",)),
    ("index", ("*.safetensors.index.json",)),
    ("config", ("config.json", "generation_config.json", "adapter_config.json")),
    (
        "tokenizer",
        (
            *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
            *("vocab*.json", "vocab*.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken"),
            *("chat_template.json", "*.jinja", f"{TEMPLATES_FOLDER}/*.jinja"),
        ),
    ),
    (
        "processor",
        (
            *("preprocessor_config.json", "processor_config.json"),
            *("video_preprocessor_config.json", "audio_tokenizer_config.json"),
        ),
    ),
    ("code", ("*.py",)),
)
# Never the model's, whatever the suffix ("optimizer.safetensors").
_TRAINER_STATE = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "training_args*")
# Beside what defines the model, these are written in the same save: while one of them still changes, so may the rest.
_SAME_SAVE = ("*.safetensors", "*.bin", "*.pt", "*.pth", "trainer_state.json", "checkpoint.json", SUCCESS)
_PICKLE = ("pytorch_model*.bin", "pytorch_model*.bin.index.json", "adapter_model*.bin")
_ADAPTER = ("adapter_config.json", "adapter_model*.safetensors")
# Names that trainers and copying tools give a folder until it is whole.
_UNFINISHED = ("tmp-checkpoint-*", "*.tmp", "*.part", "*.partial", "*.incomplete", "*.orbax-checkpoint-tmp-*")
_DISTRIBUTED = ("*.distcp",)  # shards of torch.distributed.checkpoint: pickles of pieces, for its own reader only
# JSON that is read whole. Far above what any tool writes: a name in a bucket or on the hub may stand for anything.
MAX_JSON_BYTES = 256_000_000
CONVERTED = "hf"  # where trainers put the safetensors copy of such a checkpoint: the name of a folder below it


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@lru_cache(maxsize=4096)
def role(name: str) -> Role | None:
    """What the file `name` (relative to the checkpoint's folder) is to the model; None when it defines nothing."""
    if _matches(name, _TRAINER_STATE):
        return None
    # "*" of fnmatch spans slashes; only the templates' folder counts below the top.
    if "/" in name and not fnmatchcase(name, f"{TEMPLATES_FOLDER}/*.jinja"):
        return None
    return next((role for role, patterns in _DEFINING if _matches(name, patterns)), None)


def is_pickle(name: str) -> bool:
    """Weights that only Python's pickle can read, and that run code when read."""
    return _matches(name, _PICKLE)


def evidence(names: Iterable[str]) -> Literal["weights", "distributed", "config"] | None:
    """What in a folder says that it is, or will be, a checkpoint: something of its weights, or only a config.json.

    "distributed": weights as torch.distributed.checkpoint writes them, and no others.
    """
    found: Literal["distributed", "config"] | None = None
    for name in names:
        if role(name) in ("weights", "index") or is_pickle(name) or _matches(name, _ADAPTER):
            return "weights"
        if _matches(name, _DISTRIBUTED):
            found = "distributed"
        elif name == "config.json" and found is None:
            found = "config"
    return found


def unconverted(uri: str) -> str:
    """Why the torch distributed checkpoint at `uri` waits."""
    return (
        f"a torch distributed checkpoint without its converted copy: save it as safetensors, tokenizer beside it, in "
        f"{uri}/{CONVERTED} (docs/arrivals.md has the lines that do it)"
    )


def is_unfinished(name: str) -> bool:
    """Whether a folder's name says that who writes it will rename it once it is whole."""
    return _matches(name, _UNFINISHED)


def is_trainer_state(name: str) -> bool:
    """Whether a file or folder of this name holds what training goes on from, and nothing of the model."""
    return _matches(name, _TRAINER_STATE)


@dataclass(frozen=True, slots=True)
class FileState:
    """One file as `stat` sees it (through symbolic links). Size in bytes, times in nanoseconds."""

    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class Listing:
    """The files of one save, name -> state; names are relative to the folder, with "/"."""

    files: Mapping[str, FileState]

    @cached_property
    def defining(self) -> tuple[str, ...]:
        """Names of the files that define the model, sorted."""
        return tuple(sorted(name for name in self.files if role(name)))

    @cached_property
    def size(self) -> int:
        """Bytes of the files that define the model."""
        return sum(self.files[name].size for name in self.defining)

    @cached_property
    def fingerprint(self) -> str:
        """Id over (name, size, mtime_ns) of what defines the model (contract section 1)."""
        return content_id([[name, self.files[name].size, self.files[name].mtime_ns] for name in self.defining])

    @cached_property
    def activity(self) -> str:
        """Id that changes whenever any file of the save does: what the quiet period looks at."""
        return content_id([[name, file.size, file.mtime_ns] for name, file in sorted(self.files.items())])[:16]

    @property
    def last_change_ns(self) -> int:
        """The latest ctime (0 when empty): unlike mtime, a copying tool cannot set it back."""
        return max((file.ctime_ns for file in self.files.values()), default=0)

    @property
    def sealed(self) -> bool:
        """`_SUCCESS` is there and was the last file touched.

        One left over from an earlier upload, or copied before the weights, proves nothing about the files after it.
        """
        mark = self.files.get(SUCCESS)
        return mark is not None and mark.ctime_ns >= self.last_change_ns


def belongs(name: str) -> bool:
    """Whether a file is looked at: it defines the model or is written in the same save. Hidden ones never are.

    Nor is what no folder can hold: in a bucket a name may have a zero byte in it.
    """
    if name.rpartition("/")[2].startswith(".") or "\0" in name:
        return False
    return role(name) is not None or ("/" not in name and _matches(name, _SAME_SAVE))


def list_folder(folder: Path, *, opened: bool = False) -> Listing:
    """The save in `folder`: one listing and one `stat` a file, nothing read.

    opened: each file is opened for it. A network file system answers `stat` from what it knew up to a minute ago, and
    asks its server when a file is opened (nfs(5), close-to-open consistency).

    Regular files only; symbolic links to files are followed (the hub cache is made of them), links to folders never.
    Raises OSError when the folder cannot be listed (FileNotFoundError when it is gone).
    """
    files: dict[str, FileState] = {}
    _list(folder, "", files, opened)
    templates = folder / TEMPLATES_FOLDER
    if templates.is_dir() and not templates.is_symlink():
        _list(templates, f"{TEMPLATES_FOLDER}/", files, opened)
    return Listing(files)


def _list(folder: Path, head: str, files: dict[str, FileState], opened: bool) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{head}{entry.name}"
            if not belongs(name):
                continue
            try:
                if not entry.is_file():
                    continue
                state = _state_opened(entry) if opened else entry.stat()
            except FileNotFoundError:  # renamed or deleted since it was listed
                continue
            files[name] = FileState(state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _state_opened(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:  # inspection tells which right is missing
        return entry.stat()
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)
