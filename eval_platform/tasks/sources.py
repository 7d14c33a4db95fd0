"""Where may documents and shots come from? The sections of a task file that say so."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from eval_platform.tasks.sections import Section

# Local formats that `dataset_path` may name; anything else is a dataset on the hub.
LOCAL_FORMATS = ("json", "csv", "parquet")


class GeneratorSource(Section):
    """Seeded documents of `eval_platform.tasks.generators`. The splits `test` and `train` share no item."""

    name: str
    n: int = Field(gt=0)
    seed: int = 0
    split: Literal["test", "train"] = "test"


class HubSource(Section):
    """A dataset on the Hugging Face hub. `config` is the hub's name for a configuration (lm-eval: dataset_name)."""

    name: str
    split: str
    config: str | None = None
    revision: str | None = None


class DatasetSource(Section):
    """A dataset of `eval_platform.tasks.catalogue`, found in $EVAL_PLATFORM_DATA or on the hub, in one form of row."""

    name: str
    split: str
    config: str | None = None


class Source(Section):
    """Where documents come from: one of file, files, generator, hub, dataset. Paths are relative to the task file."""

    file: str | None = None
    files: list[str] | None = Field(default=None, min_length=1)
    generator: GeneratorSource | None = None
    hub: HubSource | None = None
    dataset: DatasetSource | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """Which of the sources are named."""
        return tuple(key for key in ("file", "files", "generator", "hub", "dataset") if getattr(self, key) is not None)

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        if len(self.named) > 1:
            raise ValueError(f"name one source, not {' and '.join(self.named)}")
        return self


class Shots(Source):
    """Where shots are drawn from. match: a field; a document's shots are those that have its value there."""

    match: str | None = None


class Documents(Source):
    """What is asked about. `sample` documents are drawn with `seed`, keeping their order; absent: all of them.

    subset and cluster name fields: scores are also given for each subset, and items of one cluster (a shared
    passage) are not counted as independent. Of several subset fields the first is the finest; subsets by the others
    are called `<field>=<value>`. fewshot: where shots are drawn from; absent: from these documents, never the one
    that is asked.
    """

    sample: int | None = Field(default=None, gt=0)
    seed: int = 0
    subset: str | Annotated[list[str], Field(min_length=1)] | None = None
    cluster: str | None = None
    fewshot: Shots | None = None

    @property
    def subset_fields(self) -> tuple[str, ...]:
        """The fields that subset names, the finest first."""
        return (self.subset,) if isinstance(self.subset, str) else tuple(self.subset or ())

    @property
    def shots_source(self) -> Shots | None:
        """Where shots come from, None where that is these documents."""
        return self.fewshot if self.fewshot and self.fewshot.named else None


class DatasetKwargs(Section):
    """lm-eval's dataset_kwargs. data_files: split -> path or paths; without splits the split is called `train`."""

    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    revision: str | None = None
