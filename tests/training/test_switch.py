import json

import numpy as np
import pytest
import reproduce
from PIL import Image
from reproduction import switch

TINY = {
    "training.steps": 4,
    "training.batch_size": 8,
    "training.cpu_threads": 1,
    "denoiser.options": "{hidden_size: 24, num_layers: 1, num_attention_heads: 2}",
    "sampling.every": 2,
    "sampling.num_inference_steps": 2,
    "evaluation.num_coverage_samples": 20,
}


@pytest.fixture
def reproduce_tiny(tmp_path, few_images):
    """Runs arms of seed 0 on a few real images."""

    def run(arms, **changes):
        values = {"data.source": few_images, **TINY, **changes}
        options = [f"--{key}={value}" for key, value in values.items()]
        arguments = ["--output", str(tmp_path), "--seeds", "0", "--from-steps", "2", "--arms", *arms, *options]
        reproduce.main(["transfer", *arguments])

    return run


def test_arms_are_kept_and_drawn_together(reproduce_tiny, tmp_path, monkeypatch):
    reproduce_tiny(["default"])
    kept = (tmp_path / "arms" / "default-seed0.json").read_bytes()
    trained = []
    train = switch.train

    def record(run, *args, **kwargs):
        trained.append(run.folder.name)
        return train(run, *args, **kwargs)

    monkeypatch.setattr(switch, "train", record)
    reproduce_tiny(["default", "both"])
    assert trained == ["both-seed0"]  # neither the low-resolution stage nor the arm that is there
    assert (tmp_path / "arms" / "default-seed0.json").read_bytes() == kept

    summary = json.loads((tmp_path / "transfer.json").read_text())
    assert summary["images"] == [0, 16, 32]
    assert summary["fid"]["resolution"] == 32
    assert summary["fid"]["sampler"] == "DDIMScheduler"
    assert list(summary["arms"]) == ["default", "both"]
    for arm in summary["arms"].values():
        assert arm["fid"]["mean"] == arm["fid_of_seeds"]["0"]
        assert len(arm["fid"]["mean"]) == 3
    assert summary["arms"]["default"]["as_share_of_budget"]["0"] <= 1
    with Image.open(tmp_path / "transfer.png") as image:
        assert min(image.size) > 300

    with pytest.raises(SystemExit, match="other settings"):
        reproduce_tiny(["both"], **{"sampling.num_inference_steps": 3})


@pytest.mark.parametrize(("target", "expected"), [(9, 0), (4, 150), (1, 300), (0.5, None)])
def test_images_to_reach_a_target_lie_between_points(target, expected):
    assert switch.images_to_reach([0, 100, 200, 300], np.array([8.0, 5.0, 3.0, 1.0]), target) == expected


def test_target_is_the_last_fid_of_the_default():
    default = {0: np.array([8.0, 6.0, 4.0]), 1: np.array([8.0, 4.0, 2.0])}
    both = {0: np.array([8.0, 4.0, 1.0]), 1: np.array([8.0, 6.0, 3.0])}
    result = switch.against_default([0, 100, 200], both, default)
    assert result["images_to_last_default_fid"] == {"0": 100, "1": None, "mean": pytest.approx(166.67, abs=0.01)}
    assert result["as_share_of_budget"]["0"] == 0.5
