"""Real images and measuring networks."""

import io

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from improved_ldm.data.sources import open_rows
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.obedience import RealImages, load_real_images
from improved_ldm.places import resolve


@pytest.fixture(scope="session")
def real() -> RealImages:
    """1000 uncropped images of the embedded test split at 32 pixels."""
    return load_real_images(open_rows("embedded:fashion-mnist", "test", label_column="label"), 32, 1000)


@pytest.fixture(scope="session")
def judge() -> Judge:
    """The judge that ships with the package."""
    return Judge.from_pretrained(resolve("embedded:judge")).eval()


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights of torch-fidelity's Inception, whose constructor requires a weights file."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], nothing)
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture
def no_downloads(monkeypatch, tmp_path):
    """Gives torch hub an empty cache and returns its folder, `TORCH_HOME/hub/checkpoints`. Tests have no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder
