"""Public datasets by name: one module each, which knows where the items are and gives them one form of row.

A task file says `documents: {dataset: {name: gsm8k, split: test}}`. A module `<name>.py` here has

    CARD = Card(title=..., homepage=..., licence=..., citation=..., hub=..., revision=..., files=(...,))
    def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]: ...

`rows` takes the local file where there is one, else the hub, and makes the same rows of either; it raises
NoData(name, data.tried) when there is neither, and TaskError for a split or config that the dataset does not have.
"""

import importlib
import pkgutil
from typing import Any, Protocol, cast

from eval_platform.errors import NoData, TaskError
from eval_platform.tasks import hub
from eval_platform.tasks.catalogue.data import FOLDER_VARIABLE, Card, Data
from eval_platform.tasks.sections import did_you_mean

_NOT_DATASETS = {"data", "llm_adapters"}


class _Dataset(Protocol):
    CARD: Card

    def rows(self, data: Data, split: str, config: str | None) -> list[dict[str, Any]]: ...


def names() -> list[str]:
    """The datasets there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_DATASETS)


def card(name: str) -> Card:
    """What people must know of a dataset. Raises TaskError when there is none of this name."""
    return _dataset(name).CARD


def read(name: str, split: str, config: str | None = None, data: Data | None = None) -> list[dict[str, Any]]:
    """The rows of one split; `data` says where to look, None: where the environment says.

    Raises NoData when they cannot be had here, TaskError for a name, split or config that is not there.
    """
    dataset = _dataset(name)
    try:
        rows = dataset.rows(Data.from_environment() if data is None else data, split, config)
    except NoData as error:
        raise NoData(name, error.tried, remedy=_remedy(dataset.CARD)) from error
    if not rows:
        raise TaskError(f"dataset {name}, split {split} holds no rows", remedy="name another split")
    return rows


def _dataset(name: str) -> _Dataset:
    known = names()
    if name not in known:
        raise TaskError(
            f"there is no dataset {name!r}{did_you_mean(name, known)}",
            remedy=f"the catalogue has {', '.join(known)}; documents of your own: `documents: {{file: ...}}`",
        )
    return cast(_Dataset, importlib.import_module(f"{__name__}.{name}"))


def _remedy(card: Card) -> str:
    ways = []
    if card.files:
        ways.append(f"set {FOLDER_VARIABLE} to a folder with {', '.join(card.files)} from {card.homepage}")
    if card.hub:
        ways.append(hub.remedy(card.hub))
    return ", or ".join(ways)
