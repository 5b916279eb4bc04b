import pytest

from tests.data.sets import write_parquet


@pytest.fixture
def folder(tmp_path):
    """60 rows in three files of different sizes, in row groups that do not divide into windows."""
    for shard, (start, stop) in enumerate([(0, 25), (25, 30), (30, 60)]):
        write_parquet(tmp_path / f"train-{shard:05d}-of-00003.parquet", range(start, stop))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", range(100, 104))
    (tmp_path / "README.md").write_text("A set.", encoding="utf-8")
    return tmp_path
