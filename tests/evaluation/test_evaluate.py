import math

import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from improved_ldm.evaluation.clip_score import open_clip_scorer
from improved_ldm.evaluation.evaluate import Evaluation, ScoreSettings
from improved_ldm.evaluation.features import open_features
from improved_ldm.evaluation.networks import to_bytes
from improved_ldm.evaluation.reference import open_reference
from improved_ldm.evaluation.sampling import open_samples

SETTINGS = ScoreSettings(kid_subset_size=20, kid_subsets=10, inception_splits=2, nearest_k=3)


@pytest.fixture(scope="module")
def reference():
    return open_reference("embedded:fashion-mnist", "test", (32, 32), 60, 16)


@pytest.fixture(scope="module")
def network():
    return open_features("embedded:judge")


@pytest.fixture
def scores(reference, network, tmp_path):
    """Scores images (images, 3, 32, 32) in [-1, 1] from a folder of files."""

    def measure(pixels, batch_size=16):
        for number, image in enumerate(to_bytes(pixels)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:03d}.png")
        return Evaluation(reference, network, None, SETTINGS, batch_size).scores(open_samples(tmp_path))

    return measure


def test_the_reference_itself_scores_best(scores, reference):
    found = scores(torch.cat(list(reference.batches(16))))
    assert found["fid"] == pytest.approx(0, abs=1e-6)
    assert found["kid"] < 0.1  # negative, because the sets are not independent
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert 4 < found["inception_score"] <= 10
    assert "clip_score" not in found


def test_noise_scores_worst(scores):
    found = scores(torch.rand(60, 3, 32, 32) * 2 - 1)
    assert found["fid"] > 10
    assert found["kid"] > 0.5
    assert found["coverage"] < 0.1
    assert all(math.isfinite(value) for value in found.values())


def test_scores_do_not_depend_on_the_batch(scores, reference):
    pixels = torch.cat(list(reference.batches(16))).flip(-1)
    one, other = scores(pixels, batch_size=60), scores(pixels, batch_size=7)
    assert one == pytest.approx(other, rel=1e-4)


def test_too_few_images_are_refused(network):
    SETTINGS.check_reference(20)
    SETTINGS.check_samples(20, network)
    with pytest.raises(ValueError, match="there are 19 reference images; `kid_subset_size` 20 needs at least 20"):
        SETTINGS.check_reference(19)
    with pytest.raises(ValueError, match="there are 19 samples; `kid_subset_size` 20"):
        SETTINGS.check_samples(19, network)
    with pytest.raises(ValueError, match="`nearest_k` 30 needs at least 31"):
        SETTINGS.model_copy(update={"nearest_k": 30}).check_reference(30)


def test_splits_of_the_inception_score_are_of_samples_and_of_classifiers(network, tmp_path):
    settings = SETTINGS.model_copy(update={"inception_splits": 50})
    settings.check_reference(40)
    with pytest.raises(ValueError, match="there are 40 samples; `inception_splits` 50 needs at least 50"):
        settings.check_samples(40, network)
    ViTModel(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    settings.check_samples(40, open_features(str(tmp_path)))


def test_a_judge_of_another_size_is_refused(network):
    network.check_size("features", (32, 32))
    with pytest.raises(ValueError, match=r"`features` is embedded:judge, .* 32 x 32 pixels; these have 32 x 64"):
        network.check_size("features", (32, 64))


def test_the_record_names_what_the_scores_depend_on(reference, network):
    record = Evaluation(reference, network, None, SETTINGS, 16).record()
    assert record["features"] == {"name": "embedded:judge", "sha256": network.sha256}
    assert record["reference"]["sha256"] == reference.sha256
    assert record["score_settings"]["nearest_k"] == 3
    assert record["clip"] is None


@pytest.mark.slow
def test_sfid_and_the_adm_scores_are_measured_when_asked_for(reference, inception_file, tmp_path):
    settings = ScoreSettings(kid_subset_size=4, kid_subsets=1, inception_splits=1, nearest_k=1, adm=True)
    few = open_reference("embedded:fashion-mnist", "test", (32, 32), 8, 8)
    network = open_features(f"inception:{inception_file}")
    evaluation = Evaluation(few, network, None, settings, 8)
    for number, image in enumerate(to_bytes(torch.cat(list(few.batches(8))))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:03d}.png")
    found = evaluation.scores(open_samples(tmp_path))
    assert found["fid"] == pytest.approx(0, abs=1e-4) and found["sfid"] == pytest.approx(0, abs=1e-4)
    assert (found["adm_precision"], found["adm_recall"]) == (1, 1)
    assert found["adm_inception_score"] >= 1
    assert evaluation.gaussians["sfid"].mean.shape == (2023,)


def test_cmmd_is_near_zero_for_the_reference_itself_and_large_for_noise(reference, network, tmp_path):
    evaluation = Evaluation(reference, network, None, SETTINGS, 16, cmmd=open_clip_scorer("embedded:clip"))
    found = []
    for pixels in (torch.cat(list(reference.batches(16))), torch.rand(60, 3, 32, 32) * 2 - 1):
        for number, image in enumerate(to_bytes(pixels)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:03d}.png")
        found.append(evaluation.scores(open_samples(tmp_path))["cmmd"])
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] > 0.5
    assert evaluation.record()["cmmd"]["name"] == "embedded:clip"
