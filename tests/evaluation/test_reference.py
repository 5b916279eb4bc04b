import datasets
import pytest
import torch

from improved_ldm.evaluation.reference import check_reference, open_reference
from tests.conftest import ASSETS


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> datasets.Dataset:
    cache = tmp_path_factory.mktemp("cache")
    file = ASSETS / "fashion-mnist" / "test.parquet"
    return datasets.Dataset.from_parquet(str(file), cache_dir=str(cache)).select(range(20))


@pytest.fixture
def reference(rows, tmp_path):
    """Opens some of the rows as a reference set."""

    def build(places=range(20), size=(32, 32), max_images=100, batch_size=6):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        rows.select(places).to_parquet(file)
        return open_reference(str(file), "test", size, max_images, batch_size, label_column="label")

    return build


def test_a_reference_has_all_images_captions_and_labels(reference, rows):
    there = reference()
    assert (there.images, len(there.captions), there.labels) == (20, 20, rows["label"])
    pixels = torch.cat(list(there.batches(6)))
    assert pixels.shape == (20, 3, 32, 32)
    torch.testing.assert_close(pixels, torch.cat(list(there.batches(20))), rtol=0, atol=0)
    record = there.record()
    assert record["resolution"] == [32, 32]
    assert (record["transform"]["crop_position"], record["transform"]["resampling"]) == ("centre", "bicubic")
    assert record["transform"]["flip_probability"] == 0


def test_the_hash_is_of_images_order_and_size_alone(reference):
    one = reference().sha256
    assert len(one) == 64
    assert reference(batch_size=20).sha256 == one
    assert reference(max_images=20).sha256 == one
    others = [
        reference(places=range(19)),
        reference(max_images=19),
        reference(places=[1, 0, *range(2, 20)]),
        reference(size=(16, 16)),
        reference(size=(32, 16)),
    ]
    assert len({one, *(other.sha256 for other in others)}) == 5  # the first two contain the same images


def test_at_most_so_many_images_are_taken(reference):
    there = reference(max_images=7)
    assert (there.images, len(there.captions), len(there.labels)) == (7, 7, 7)
    assert [len(batch) for batch in there.batches(4)] == [4, 3]


def test_another_set_is_refused(reference):
    one, other = reference(), reference(places=range(10))
    check_reference(one, {"`reference_hash`": one.sha256})
    with pytest.raises(ValueError, match=f"`reference_hash` is for the reference set {one.sha256}"):
        check_reference(other, {"`reference_hash`": one.sha256})


def test_an_unknown_split_is_refused(tmp_path, rows):
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"`split` is 'test'.*has train"):
        open_reference(str(tmp_path), "test", (32, 32), 10, 5)
