"""What must be there for a task to be scored: packages, and fields of its documents."""

import importlib.util
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from eval_platform.errors import TaskError
from eval_platform.tasks.metrics import METRICS
from eval_platform.tasks.schema import TaskFile


def check_requirements(definition: TaskFile, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises TaskError for a package that is not installed, or a document without a field that a metric reads."""
    for metric in (METRICS[name] for name in definition.metrics):
        for package in metric.packages:
            if importlib.util.find_spec(package) is None:
                raise TaskError(
                    f"metric {metric.name} is computed by the package {package}, which is not installed",
                    remedy='pip install "eval-platform[metrics]"',
                )
        for position, row in enumerate(rows):
            for field in metric.fields:
                if row.get(field) is None:
                    raise TaskError(
                        f"document {position} has no field {field!r}, which the metric {metric.name} reads",
                        remedy="give every document the field, or remove the metric",
                    )


def package_versions(definition: TaskFile) -> dict[str, str]:
    """Package -> installed version, of those that compute the task's metrics."""
    packages = {"lm_eval"} if definition.harness is not None else set()
    packages |= {package for name in definition.metrics for package in METRICS[name].packages}
    return {package: version(package) for package in sorted(packages)}
