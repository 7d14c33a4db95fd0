"""Plain text files as documents: one file, one text, as the how-to in docs/task_files.md has it."""

import gzip
import textwrap
from pathlib import Path

import pytest

from eval_platform.errors import TaskError
from eval_platform.scoring import aggregate, score_item
from eval_platform.tasks import build_task, render
from eval_platform.values import Response
from tests.data import REPOSITORY


def _how_to() -> str:
    text = (REPOSITORY / "docs" / "task_files.md").read_text(encoding="utf-8")
    start = text.index("    task: my_text_bits")
    return textwrap.dedent(text[start : text.index("\n\n", start)])


def test_the_how_to_scores_whole_texts(tmp_path: Path) -> None:
    texts = ["One.\n\nA line with a blank at its end \nand é.\n", "\ufeffTwo\r\nlines"]
    for n, text in enumerate(texts, start=1):
        (tmp_path / f"chapter{n}.txt").write_bytes(text.encode())
    (tmp_path / "task.yaml").write_text(_how_to())

    task = build_task(tmp_path / "task.yaml")
    items = list(render(task))

    assert [item.requests[0].context for item in items] == [texts[0], "Two\r\nlines"]
    samples = []
    for item in items:
        (request,) = item.requests
        response = Response(request.request_id, 0, log_likelihood=-10.0, n_tokens=3)
        samples += score_item(task, item, {(request.request_id, 0): response})
    bits = next(score for score in aggregate(task, samples) if score.metric == "bits_per_byte")
    assert bits.value == pytest.approx(20 / 0.6931471805599453 / (len(texts[0].encode()) + 10))
    assert bits.n == 2


def test_a_text_may_be_gzipped_and_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"Zipped."))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    head = "task: t\noutput_type: loglikelihood_rolling\ndoc_to_target: text\ndocuments: {file: %s}\n"
    for name in ("a.txt.gz", "bad.txt", "empty.txt"):
        (tmp_path / f"{name}.yaml").write_text(head % name)

    assert build_task(tmp_path / "a.txt.gz.yaml").documents[0].fields == {"text": "Zipped."}
    with pytest.raises(TaskError, match=r"bad.txt is not text: .*utf-8.*\n  remedy: mend the file"):
        build_task(tmp_path / "bad.txt.yaml")
    with pytest.raises(TaskError, match=r"empty.txt holds no documents"):
        build_task(tmp_path / "empty.txt.yaml")
