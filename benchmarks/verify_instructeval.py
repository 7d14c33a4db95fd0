"""Are our INSTRUCTEVAL prompts what its own code would ask? Every prompt of MMLU, BBH and HHH, and DROP where it is.

    EVAL_PLATFORM_DATA=../shared/data python benchmarks/verify_instructeval.py path/to/instruct-eval

The folder is a checkout of github.com/declare-lab/instruct-eval. Of its files only the functions and classes that write
prompts are run, by name; its models and their packages are not needed. BBH with chain of thought is compared with the
prompts that BBH's authors stored beside their answers. Prints a line for every set of prompts; exits with 1 when any
differs but for the one that is known: the published file cuts snarks, position 88, at "The NBA:".
"""

import ast
import contextlib
import csv
import gzip
import io
import json
import os
import random
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pydantic

from eval_platform.errors import NoData
from eval_platform.tasks import build_task, render
from eval_platform.tasks.catalogue import read
from eval_platform.tasks.catalogue.bbh import SUBTASKS
from eval_platform.tasks.catalogue.mmlu import SUBJECTS
from eval_platform.tasks.selection import LIBRARY

Pair = tuple[Any, Any]  # what is asked and what is right, here and there
KNOWN = {"bbh_cot": 1}


def theirs(checkout: Path, file: str, *names: str, **others: Any) -> dict[str, Any]:
    """The functions and classes `names` of a file, and nothing else of it. others: what else they name."""
    tree = ast.parse((checkout / file).read_text(encoding="utf-8"))
    wanted: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names
    ]
    known: dict[str, Any] = {
        "BaseModel": pydantic.BaseModel,
        "List": typing.List,  # noqa: UP006 - as it is called there
        "Dict": typing.Dict,  # noqa: UP006
        "Path": Path,
        "json": json,
        "random": random,
        "tqdm": lambda rows, **_: rows,
        **others,
    }
    exec(compile(ast.Module(wanted, []), file, "exec"), known)
    return known


def ours(task: str) -> list[Pair]:
    return [(item.prompt, item.target) for item in render(build_task(LIBRARY / f"{task}.yaml"))]


def mmlu(checkout: Path, data: Path) -> Iterator[Pair]:
    code = theirs(checkout, "mmlu.py", "get_choices", "format_subject", "format_example", "gen_prompt")

    def frame(split: str, subject: str) -> pd.DataFrame:
        """As pandas would read their file, but every cell as the text that stands there."""
        with (data / "mmlu" / split / f"{subject}_{split}.csv").open(newline="") as file:
            _, *lines = csv.reader(file)
        return pd.DataFrame([[*line[:5], "ABCD"[int(line[5])]] for line in lines], dtype=str)

    for subject in sorted(SUBJECTS):
        shots, asked = frame("dev", subject)[:5], frame("test", subject)
        before = code["gen_prompt"](shots, subject, 5)
        for k in range(len(asked)):
            yield before + code["format_example"](asked, k, include_answer=False), asked.iloc[k, 5]


def bbh(checkout: Path, data: Path) -> Iterator[Pair]:
    code = theirs(checkout, "bbh.py", "BBHSample", "BBHData", "gen_prompt")
    for subtask in SUBTASKS:
        items = json.loads((data / "bbh" / "bbh" / f"{subtask}.json").read_text())["examples"]
        samples = [code["BBHSample"](**item) for item in items]
        before = code["gen_prompt"](code["BBHData"](samples=samples[:3]), 3)
        for sample in samples[3:]:
            yield before + sample.as_prompt(include_answer=False), sample.target


def bbh_cot(data: Path) -> Iterator[Pair]:
    folder = data / "bbh" / "code-davinci-002-outputs" / "code-davinci-002-cot"
    for subtask in SUBTASKS:
        body = gzip.decompress((folder / f"{subtask}_few_shot_template_0-255000.json.gz").read_bytes())
        for row in json.loads(body)["outputs"]:
            yield row["input"], row["target"]


def hhh(checkout: Path) -> Iterator[Pair]:
    code = theirs(checkout, "hhh.py", "HHHDataset")
    for row in read("hhh", "test"):
        first, last = code["HHHDataset"](query=row["query"], chosen=row["chosen"], reject=row["rejected"]).to_prompt()
        yield ((first, "A"), (first, "B"), (last, "B"), (last, "A")), (0, 2)


def drop(checkout: Path) -> Iterator[Pair]:
    code = theirs(checkout, "drop.py", "DropAnswer", "DropSample", "DropData", "gen_prompt", "filter_dataset")
    samples = [
        code["DropSample"](**{**row, "answers_spans": {"spans": row["spans"], "types": [""] * len(row["spans"])}})
        for row in read("drop", "validation")
        if row["spans"]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        shots, asked = code["filter_dataset"](code["DropData"](samples=samples)).train_test_split(3)
    before = code["gen_prompt"](shots, 3)
    for sample in asked.samples:
        yield before + sample.as_prompt(include_answer=False), sample.get_answers()[0]


def main(checkout: Path) -> int:
    data = Path(os.environ["EVAL_PLATFORM_DATA"])
    both_orders = [
        (tuple((request.context, request.continuation) for request in item.requests), item.target)
        for item in render(build_task(LIBRARY / "hhh_instructeval.yaml"))
    ]
    sets: dict[str, tuple[list[Pair], Iterator[Pair]]] = {
        "mmlu_instructeval": (ours("mmlu_instructeval"), mmlu(checkout, data)),
        "bbh_instructeval": (ours("bbh_instructeval"), bbh(checkout, data)),
        "bbh_cot": (ours("bbh_cot"), bbh_cot(data)),
        "hhh_instructeval": (both_orders, hhh(checkout)),
    }
    try:
        sets["drop_instructeval"] = (ours("drop_instructeval"), drop(checkout))
    except NoData as error:
        print(f"drop_instructeval: not compared: {error.name} has no data here")
    bad = False
    for task, (here, there) in sets.items():
        pairs = list(zip(here, there, strict=True))
        differ = sum(one != other for one, other in pairs)
        print(f"{task}: {len(pairs)} prompts with their answers, {differ} differ")
        bad |= differ != KNOWN.get(task, 0)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
