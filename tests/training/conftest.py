from pathlib import Path

import datasets
import pytest

import improved_ldm

EMBEDDED = Path(improved_ldm.__file__).parent / "assets" / "fashion-mnist"


@pytest.fixture(scope="session")
def few_images(tmp_path_factory) -> Path:
    """A folder with a hundred real captioned images per split."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        rows = datasets.Dataset.from_parquet(str(EMBEDDED / f"{split}.parquet"), cache_dir=str(folder / "cache"))
        rows.select(range(100)).to_parquet(folder / f"{split}.parquet")
    return folder
