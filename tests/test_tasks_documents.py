"""Documents: the same rows from every kind of file, ids that are content, and errors for what is no document."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_platform.errors import NoData, TaskError
from eval_platform.tasks.documents import as_documents, read_documents
from eval_platform.tasks.generators import generate
from eval_platform.tasks.schema import TaskFile

ROWS = [
    {"q": "one", "n": 1, "x": 0.5},
    {"q": "zwei é\u2028日", "n": 2, "x": 1.5},
    {"q": 'a "b",\nc', "n": 3, "x": -2.0},
]


def _task(**documents: Any) -> TaskFile:
    keys = {"doc_to_text": "q", "doc_to_target": "q", "task": "t"}
    return TaskFile.model_validate({**keys, "documents": documents})


def _asked(folder: Path, **documents: Any) -> list[Any]:
    return [dict(row) for row in read_documents(_task(**documents), folder)[0]]


def _write(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> None:
    path = folder / name
    bare = folder / name.removesuffix(".gz")
    match bare.suffix:
        case ".jsonl":
            bare.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        case ".json":
            bare.write_text(json.dumps(rows), encoding="utf-8")
        case ".csv":
            pandas.DataFrame(rows).to_csv(bare, index=False)
        case ".parquet":
            pandas.DataFrame(rows).to_parquet(bare, index=False)
    if path != bare:
        path.write_bytes(gzip.compress(bare.read_bytes()))
        bare.unlink()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.parquet.gz"]
)
def test_every_kind_of_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    _write(tmp_path, name)

    assert _asked(tmp_path, file=name) == ROWS


def test_several_files_are_one_dataset_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    _write(tmp_path, "sub/b.jsonl", ROWS[1:])
    _write(tmp_path, "a.csv", ROWS[:1])

    assert _asked(tmp_path, files=["a.csv", "sub/b.jsonl"]) == ROWS


def test_a_sample_is_seeded_and_keeps_the_order(tmp_path: Path) -> None:
    rows = [{"q": str(n)} for n in range(50)]
    _write(tmp_path, "a.jsonl", rows)

    one = _asked(tmp_path, file="a.jsonl", sample=10, seed=1)

    assert one == _asked(tmp_path, file="a.jsonl", sample=10, seed=1)
    assert one != _asked(tmp_path, file="a.jsonl", sample=10, seed=2)
    assert len(one) == 10
    assert [int(row["q"]) for row in one] == sorted(int(row["q"]) for row in one)
    assert _asked(tmp_path, file="a.jsonl", sample=99) == rows


def test_generated_documents(tmp_path: Path) -> None:
    test, shots = read_documents(
        TaskFile.model_validate(
            {
                "task": "t",
                "documents": {
                    "generator": {"name": "addition", "n": 20, "seed": 3},
                    "fewshot": {"generator": {"name": "addition", "n": 5, "seed": 3, "split": "train"}},
                },
                "num_fewshot": 2,
                "doc_to_text": "question",
                "doc_to_target": "answer",
            }
        ),
        tmp_path,
    )

    assert test == generate("addition", 20, 3)
    assert shots == generate("addition", 5, 3, "train")


def test_shots_are_read_only_when_asked_for(tmp_path: Path) -> None:
    _write(tmp_path, "a.jsonl")

    assert read_documents(_task(file="a.jsonl", fewshot={"file": "absent.jsonl"}), tmp_path)[1] == []


WRONG_FILES = {
    "a.jsonl": [
        (b"", "holds no documents"),
        (b"\n\n", "holds no documents"),
        (b'{"q": 1}\n{"q": ', "is not json: line 2"),
        (b'{"q": 1}\n3\n', "document 1 is not an object"),
        (b'{"q": NaN}', "field 'q' is nan"),
        (b"\xff\xfe", "is not json"),
    ],
    "a.json": [(b"[]", "holds no documents"), (b"[1]", "document 0 is not an object"), (b"[{]", "is not json")],
    "a.csv": [(b"", "holds no documents"), (b"q,n\n", "holds no documents"), (b'q\n"a\n', "is not csv")],
    "a.parquet": [(b"PAR1", "is not parquet")],
    "a.jsonl.gz": [(b"{}", "cannot be read"), (gzip.compress(b"{}" * 99, mtime=0)[:20], "is not json")],
    "a.xml": [(b"text", "unknown kind of file")],
}


@pytest.mark.parametrize(("name", "body", "said"), [(n, b, s) for n, cases in WRONG_FILES.items() for b, s in cases])
def test_a_file_that_holds_no_documents_is_named(name: str, body: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(body)

    with pytest.raises(TaskError, match=said) as caught:
        _asked(tmp_path, file=name)

    assert str(tmp_path / name) in str(caught.value)
    assert caught.value.remedy


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"no file of documents at .*absent.jsonl") as caught:
        _asked(tmp_path, file="absent.jsonl")

    assert "relative to the task file" in str(caught.value)


def test_an_unknown_split_names_those_there_are(tmp_path: Path) -> None:
    keys = {"task": "t", "doc_to_text": "q", "doc_to_target": "q", "test_split": "tset", "dataset_path": "json"}
    task = TaskFile.model_validate({**keys, "dataset_kwargs": {"data_files": {"test": "a.jsonl"}}})

    with pytest.raises(TaskError, match="has no split 'tset'; it has test"):
        read_documents(task, tmp_path)


def test_a_hub_dataset_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    with pytest.raises(NoData, match="dataset no/such, split test was not downloaded before") as caught:
        _asked(tmp_path, hub={"name": "no/such", "split": "test"})

    assert "local file" in str(caught.value)


def test_binary_columns_are_refused(tmp_path: Path) -> None:
    pandas.DataFrame({"q": [b"\x00"]}).to_parquet(tmp_path / "a.parquet")

    with pytest.raises(TaskError, match="field 'q' is a bytes"):
        _asked(tmp_path, file="a.parquet")


def test_subset_and_cluster_come_from_fields() -> None:
    one, two = as_documents(
        [{"q": "a", "subject": "x", "p": 3}, {"q": "b", "subject": "y", "p": 3}], subset=["subject"], cluster="p"
    )

    assert (one.subset, two.subset) == ("x", "y")
    assert one.cluster == two.cluster == "3"
    with pytest.raises(TaskError, match="document 0 has no field 'topic'"):
        as_documents([{"q": "a"}], subset=["topic"])


_rows = st.lists(
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 2) | st.text(max_size=1), max_size=2), max_size=8
)


@given(_rows, st.randoms())
def test_a_sample_id_is_the_row_and_its_number_among_equals(rows: list[dict[str, Any]], random: Any) -> None:
    def ids(of: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
        return Counter((d.sample_id, json.dumps(d.fields, sort_keys=True)) for d in as_documents(of))

    shuffled = random.sample(rows, len(rows))
    reordered = [dict(reversed(row.items())) for row in rows]

    assert len({document.sample_id for document in as_documents(rows)}) == len(rows)
    # Neither the order of the rows nor that of the fields in a row is part of it.
    assert ids(shuffled) == ids(rows) == ids(reordered)
    # More rows behind change nothing.
    assert [d.sample_id for d in as_documents([*rows, {"new": 1}])][:-1] == [d.sample_id for d in as_documents(rows)]


def test_a_file_on_s3_gives_the_same_rows_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a real HTTP server that speaks S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("ACCESS_KEY_ID", "id"), ("SECRET_ACCESS_KEY", "key"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        _write(tmp_path, "a.jsonl.gz")
        client.put_object(Bucket="bucket", Key="deep/a.jsonl.gz", Body=(tmp_path / "a.jsonl.gz").read_bytes())
        client.put_object(Bucket="bucket", Key="b.jsonl", Body=b"")

        assert _asked(tmp_path, file="s3://bucket/deep/a.jsonl.gz") == ROWS
        assert _asked(tmp_path, files=["a.jsonl.gz", "s3://bucket/deep/a.jsonl.gz"]) == ROWS * 2
        for url, said in (
            ("s3://bucket/none.jsonl", "there is no s3://bucket/none.jsonl"),
            ("s3://none/a.jsonl", "NoSuchBucket"),
            ("s3://bucket", "names no object"),
            ("s3://bucket/b.jsonl", "holds no documents"),
        ):
            with pytest.raises(TaskError, match=said) as caught:
                _asked(tmp_path, file=url)
            assert not isinstance(caught.value, NoData)
    finally:
        server.stop()
    with pytest.raises(NoData, match="S3 cannot be asked"):  # out of reach is no typo: the task is skipped
        _asked(tmp_path, file="s3://bucket/deep/a.jsonl.gz")
