"""Real images and the networks that measure them."""

import pytest

from improved_ldm.data.sources import open_rows
from improved_ldm.embedded import resolve
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.obedience import RealImages, load_real_images


@pytest.fixture(scope="session")
def real() -> RealImages:
    """1000 images of the embedded test split, whole, at 32 pixels."""
    return load_real_images(open_rows("embedded:fashion-mnist", "test", label_column="label"), 32, 1000)


@pytest.fixture(scope="session")
def judge() -> Judge:
    """The judge that ships with the package."""
    return Judge.from_pretrained(resolve("embedded:judge")).eval()


@pytest.fixture
def no_downloads(monkeypatch, tmp_path):
    """Torch hub with an empty cache, `TORCH_HOME/hub/checkpoints`, and no way out; gives that folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder
