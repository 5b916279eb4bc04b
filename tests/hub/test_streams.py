"""Datasets on the Hub in which one row, or a column that is not read, differs from the others."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq

from tests.data.sets import picture


def read(clients, tmp_path, name):
    clients.call("read", name=name, file=str(tmp_path / "read.json"))
    return json.loads((tmp_path / "read.json").read_text(encoding="utf-8"))


def test_a_bad_sample_of_a_shard_costs_itself_only(hub, clients, tmp_path):
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "train-000.tar", "w") as tar:
        for i in range(60):
            text = b"caf\xe9" if i == 2 else f"row {i}".encode()
            for name, content in (("png", picture(i)), ("txt", text))[: 1 if i == 1 else 2]:
                member = tarfile.TarInfo(f"{i:03}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    clients.call("push_folder", folder=str(tmp_path / "set"), name="user/shards")
    found = read(clients, tmp_path, "user/shards")
    assert found["captions"] == [f"row {i}" for i in range(60) if i not in (1, 2)]
    assert found["skipped"] == {"caption is missing": 1, "caption is not UTF-8": 1}
    assert found["description"] == "streaming 1 file of user/shards from the Hub, split 'train'"


def test_columns_that_nobody_reads_may_differ(hub, clients, tmp_path):
    (tmp_path / "set").mkdir()
    for number, score in enumerate([[1, 2], ["a", "b"]]):
        images = pa.array([{"bytes": picture(i), "path": None} for i in range(2)])
        columns = {"image": images, "text": [f"row {number}"] * 2, "score": score}
        pq.write_table(
            pa.table(columns | ({"more": [1, 2]} if number else {})), tmp_path / "set" / f"{number}.parquet"
        )
    clients.call("push_folder", folder=str(tmp_path / "set"), name="user/files")
    assert read(clients, tmp_path, "user/files")["captions"] == ["row 0", "row 0", "row 1", "row 1"]
