"""Datasets by name: found in a folder, else on the hub, else skipped with what was tried; a typo is an error."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from eval_platform.errors import TaskError
from eval_platform.tasks import build_task, catalogue, hub
from eval_platform.tasks.catalogue.data import Data, NoData
from tests.data import use_originals

ROW = {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}
TASK = """
task: sums
documents:
  dataset: {name: gsm8k, split: test}
  fewshot: {dataset: {name: gsm8k, split: train, config: main}}
num_fewshot: 1
doc_to_text: question
doc_to_target: answer
"""


def test_a_task_names_a_dataset_and_gets_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_originals(monkeypatch, "gsm8k/test.jsonl.gz", "gsm8k/train.jsonl.gz")
    (tmp_path / "sums.yaml").write_text(TASK)

    task = build_task(tmp_path / "sums.yaml")

    # The sizes that the paper states, arXiv:2110.14168, section 2.
    assert (len(task.documents), len(task.shots)) == (1319, 7473)
    assert str(task.documents[0].fields["question"]).startswith("Janet’s ducks lay 16 eggs per day.")
    assert str(task.documents[0].fields["answer"]).endswith("#### 18")


def test_rows_are_the_same_with_and_without_compression(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    body = json.dumps({**ROW, "more": "left out"}).encode()
    (tmp_path / "gsm8k" / "test.jsonl").write_bytes(body)
    (tmp_path / "gsm8k" / "train.jsonl.gz").write_bytes(gzip.compress(body))

    plain = catalogue.read("gsm8k", "test", data=Data(tmp_path))

    assert plain == catalogue.read("gsm8k", "train", data=Data(tmp_path)) == [ROW]


def test_no_data_says_what_was_tried_and_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVAL_PLATFORM_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "sums.yaml").write_text(TASK)

    with pytest.raises(NoData) as error:
        build_task(tmp_path / "sums.yaml")

    assert error.value.name == "gsm8k"
    assert "EVAL_PLATFORM_DATA has no gsm8k/test.jsonl" in error.value.tried
    assert any("HF_HUB_OFFLINE" in tried for tried in error.value.tried[1:])
    assert "EVAL_PLATFORM_DATA" in str(error.value.remedy)
    assert "openai/gsm8k" in str(error.value.remedy)

    monkeypatch.delenv("EVAL_PLATFORM_DATA")
    with pytest.raises(NoData, match="EVAL_PLATFORM_DATA is not set"):
        build_task(tmp_path / "sums.yaml")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("name: gsm9k, split: test", "no dataset 'gsm9k' .did you mean 'gsm8k'"),
        ("name: gsm8k, split: tests", "no split 'tests' .did you mean 'test'"),
        ("name: gsm8k, split: test, config: socratic", "no config 'socratic'"),
        ("name: gsm8k", "split"),
        ("name: data, split: test", "no dataset 'data'"),  # a module of the catalogue that is no dataset
    ],
)
def test_a_typo_is_an_error_and_not_missing_data(written: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "sums.yaml").write_text(TASK.replace("name: gsm8k, split: test", written))

    with pytest.raises(TaskError, match=told) as error:
        build_task(tmp_path / "sums.yaml")

    assert not isinstance(error.value, NoData)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("test.jsonl", b'{"question": '),
        ("test.jsonl", b"\xff\xfe"),
        ("test.jsonl.gz", gzip.compress(b"{}", mtime=0)[:-9]),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(name: str, body: bytes, tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / name).write_bytes(body)

    with pytest.raises(TaskError, match=r"gsm8k/test\.jsonl") as error:
        catalogue.read("gsm8k", "test", data=Data(tmp_path))

    assert not isinstance(error.value, NoData)


def test_csv_keeps_what_stands_there(tmp_path: Path) -> None:
    """pandas would make NaN of None and NA, which are answers of real questions."""
    (tmp_path / "a.csv").write_text('q,a\n"two\nlines",None\nNA,007\n')
    (tmp_path / "ragged.csv").write_text("q,a\n1\n")

    assert Data(tmp_path).csv("a.csv") == [{"q": "two\nlines", "a": "None"}, {"q": "NA", "a": "007"}]
    assert Data(tmp_path).csv("a.csv", columns="qa")[0] == {"q": "q", "a": "a"}  # type: ignore[index]
    assert Data(tmp_path).csv("b.csv") is None
    with pytest.raises(TaskError, match="record 1"):
        Data(tmp_path).csv("ragged.csv")


@pytest.mark.parametrize("name", catalogue.names())
def test_every_dataset_has_a_card(name: str) -> None:
    card = catalogue.card(name)

    assert card.title
    assert card.homepage.startswith("https://")
    assert card.licence
    assert card.citation
    assert card.hub or card.files
    assert card.revision is None or (len(card.revision) == 40 and int(card.revision, 16))


def test_rows_of_the_hub_come_through_datasets(tmp_path: Path) -> None:
    """A folder is a dataset to `datasets`, which reads it by the same way as one that it downloaded."""
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "question": "q"}) + "\n")
    data = Data(None)

    assert data.hub(str(tmp_path), None, "train") == [ROW, {**ROW, "question": "q"}]
    assert data.tried == []
    assert data.hub("no/such", None, "train") is None
    assert data.tried == ["HF_HUB_OFFLINE is set, and dataset no/such, split train was not downloaded before"]


def test_whether_the_hub_is_within_reach_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    refusal = hub._refusal.__wrapped__  # without what an earlier call found
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # which knows no method: an answer all the same
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    try:
        assert refusal() is None
    finally:
        server.shutdown()
        server.server_close()
    assert "cannot be reached" in str(refusal())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert refusal() is None  # what was downloaded before can be read
