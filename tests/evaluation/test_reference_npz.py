"""Reference statistics and batch files: reading, writing, and what is refused."""

import numpy as np
import pytest
import torch

from improved_ldm.evaluation.features import open_features
from improved_ldm.evaluation.gaussian import Gaussian
from improved_ldm.evaluation.reference_npz import open_batch_images, open_statistics, write_statistics
from improved_ldm.evaluation.scores import frechet_distance

DIM = 128  # features of the embedded judge
RECORD = {"images": 300, "sha256": "ab" * 32}


@pytest.fixture(scope="module")
def network():
    return open_features("embedded:judge")


@pytest.fixture
def file(tmp_path):
    """Writes arrays to a file as the ADM suite does."""

    def write(**arrays):
        np.savez(tmp_path / "reference.npz", **arrays)
        return tmp_path / "reference.npz"

    return write


def moments(dim=DIM, dtype=np.float64):
    features = np.random.RandomState(0).randn(300, dim)
    return {"mu": features.mean(0).astype(dtype), "sigma": np.cov(features, rowvar=False).astype(dtype)}


def test_written_statistics_give_the_distance_of_the_features(network, tmp_path):
    real, fake = torch.randn(300, DIM), torch.randn(200, DIM) + 0.1
    gaussians = {"fid": Gaussian.of(real), "sfid": Gaussian.of(real[:, :20])}
    write_statistics(tmp_path / "a" / "own.npz", gaussians, network, RECORD)
    with np.load(tmp_path / "a" / "own.npz", allow_pickle=False) as arrays:
        assert {"mu", "sigma", "mu_s", "sigma_s"} < set(arrays)
        np.testing.assert_allclose(arrays["sigma"], np.cov(real.numpy(), rowvar=False), rtol=1e-4, atol=1e-6)
    there = open_statistics(tmp_path / "a" / "own.npz")
    there.check(network)
    found = there.gaussians["fid"].distance(Gaussian.of(fake))
    assert found == pytest.approx(frechet_distance(real, fake), rel=1e-6)
    assert there.gaussians["sfid"].mean.shape == (20,)
    assert there.record()["images"] == 300 and there.record()["reference"] == RECORD["sha256"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_file_of_the_adm_suite_is_read(file, network, dtype):
    spatial = {f"{name}_s": array for name, array in moments(7, dtype).items()}
    there = open_statistics(file(**moments(dtype=dtype), **spatial))
    there.check(network)
    assert there.gaussians.keys() == {"fid", "sfid"}
    assert there.record()["images"] is None
    assert open_batch_images(file(**moments())) is None


def test_the_hash_is_of_the_statistics_alone(file):
    one = open_statistics(file(**moments())).sha256
    assert open_statistics(file(**moments(), arr_0=np.zeros((1, 2, 2, 3), np.uint8))).sha256 == one
    other = moments()
    other["mu"][0] += 1e-6
    assert open_statistics(file(**other)).sha256 != one


def test_images_of_a_batch_file_are_read_in_batches(file):
    images = np.random.RandomState(0).randint(0, 256, (10, 6, 5, 3)).astype(np.uint8)
    there = open_batch_images(file(arr_0=images, **moments()))
    assert (there.images, there.record()["resolution"], there.record()["split"]) == (10, [6, 5], "arr_0")
    batches = list(there.batches(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    pixels = torch.cat(batches)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(((pixels + 1) * 127.5).round().byte(), expected)
    assert there.sha256 != open_batch_images(file(arr_0=images[::-1].copy(), **moments())).sha256


def test_statistics_of_other_features_are_refused(file, network, inception_file, tmp_path):
    with pytest.raises(ValueError, match=r"its `mu` has 64 features, but embedded:judge has 128"):
        open_statistics(file(**moments(64))).check(network)
    spatial = {f"{name}_s": array for name, array in moments(7).items()}
    inception = open_features(f"inception:{inception_file}")
    with pytest.raises(ValueError, match=r"its `mu_s` has 7 features, but inception:.* has 2023"):
        open_statistics(file(**moments(2048), **spatial)).check(inception)
    write_statistics(tmp_path / "own.npz", {"fid": Gaussian.of(torch.randn(9, 2048))}, inception, RECORD)
    clean = open_features(f"inception:{inception_file}", resizing="clean")
    with pytest.raises(ValueError, match="it was measured with `resizing` network, not clean"):
        open_statistics(tmp_path / "own.npz").check(clean)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "it has the arrays mu; `mu` and `sigma` are needed"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"`mu` is \(3,\) and `sigma` \(2, 2\)"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "`sigma` is not symmetric"),
        ({"mu": np.array([0.0, np.nan]), "sigma": np.eye(2)}, "`mu` is not finite; it must hold finite floats"),
        ({"mu": np.zeros(2), "sigma": -np.eye(2)}, "`sigma` has the eigenvalue -1; a covariance has none below 0"),
        ({"mu": np.array([1, 2]), "sigma": np.eye(2)}, "`mu` is int64; it must hold finite floats"),
        ({"mu": np.array([{}, {}]), "sigma": np.eye(2)}, "cannot be used: .*allow_pickle=False"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "improved_ldm": np.array("{")}, "cannot be used: "),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "improved_ldm": np.array('{"a": 1}')}, "cannot be used: "),
    ],
)
def test_what_is_no_statistics_is_refused(file, arrays, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_statistics(file(**arrays))
    assert "\n" not in str(caught.value) and "`reference_statistics` is " in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"`reference_statistics` is .*bad\.npz; it cannot be used"):
        open_statistics(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        open_statistics(tmp_path / "none.npz")


def test_a_single_array_is_refused(tmp_path):
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="it holds a single array"):
        open_statistics(tmp_path / "one.npz")


@pytest.mark.parametrize(
    "images", [np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), "u1")]
)
def test_images_that_are_no_bytes_are_refused(file, images):
    with pytest.raises(ValueError, match=r"`arr_0` is .*; it must be \(images, height, width, 3\) bytes"):
        open_batch_images(file(arr_0=images, **moments()))
