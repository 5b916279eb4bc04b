"""Start a disentangled denoiser from published weights."""

import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.testing import assert_close

from improved_ldm.conditioning.control import Control, control_tensor
from improved_ldm.convert import disentangle, from_published
from improved_ldm.models.family import DENOISERS
from tests.convert.test_diffusers_classes import SD15, SDXL

CONTROL = control_tensor([Control((64, 96), (0, 10), (60, 60), (32, 32), flip=True)] * 2)


def semantic_inputs(denoiser):
    """Text tokens, if the denoiser reads them."""
    if denoiser.config.text_dim is None or "encoder_hidden_states" not in denoiser.inputs:
        return {}
    return {"encoder_hidden_states": torch.randn(2, 6, denoiser.config.text_dim)}


def predictions(published, disentangled, **inputs):
    """Both predictions for the same latents, text and timestep; a control and a class for the disentangled one."""
    latents, timestep = torch.randn(2, published.config.in_channels, 16, 16), torch.tensor([20, 900])
    further = {"control": CONTROL}
    if "class_labels" in disentangled.inputs:
        further["class_labels"] = torch.tensor([0, 3])
    with torch.no_grad():
        return published(latents, timestep, **inputs).sample, disentangled(
            latents, timestep, **inputs, **further
        ).sample


def test_the_first_prediction_is_the_published_one_for_the_null_embedding(published):
    before = from_published(published.source, published.state_dict, published.config)
    after = from_published(published.source, published.state_dict, published.config, conditioning="disentangled")
    assert after.config.conditioning == "disentangled" and "control" in after.inputs
    expected, sample = predictions(before, after, **semantic_inputs(before))
    assert_close(sample, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd1.5", "sdxl"])
def test_the_unet_starts_as_published(randomize, config):
    peer = randomize(UNet2DConditionModel(**config))
    config = {**peer.config, "_class_name": "UNet2DConditionModel"}
    before, after = (
        from_published("diffusers", peer.state_dict(), config, conditioning=mode)
        for mode in ("published", "disentangled")
    )
    expected, sample = predictions(before, after, **semantic_inputs(before))
    assert_close(sample, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_every_weight_that_has_a_place_is_carried(published):
    before = from_published(published.source, published.state_dict, published.config)
    after, report = disentangle(before)
    old, new = before.state_dict(), after.state_dict()
    folded = "trunk.time_embedding.linear_2.bias"
    for name in (old.keys() & new.keys()) - {folded}:
        assert torch.equal(old[name], new[name]), name
    for name, as_name in report.moved.items():
        assert torch.equal(old[name], new[as_name]), name
    assert set(report.new) == new.keys() - old.keys() - set(report.moved.values())
    assert set(report.dropped) == old.keys() - new.keys() - report.moved.keys()


def test_what_is_new_and_dropped_is_logged_by_name(load_published, caplog):
    published = load_published("official_sd3_mmdit_pure")
    with caplog.at_level(logging.WARNING):
        from_published(published.source, published.state_dict, published.config, conditioning="disentangled")
    assert "new: trunk.control_embedding.high_level.null" in caplog.text
    assert "dropped: trunk.added_embedding.mlp.linear_1.weight" in caplog.text


def test_class_embeddings_go_on_as_class_tokens(load_published):
    published = load_published("official_dit")
    after = from_published(published.source, published.state_dict, published.config, conditioning="disentangled")
    table = published.state_dict["y_embedder.embedding_table.weight"]
    assert torch.equal(after.trunk.class_tokens.weight, table)


def test_a_step_of_training_reaches_the_new_parts(published):
    """Gradients reach the new parts although some weights start at zero."""
    after = from_published(published.source, published.state_dict, published.config, conditioning="disentangled")
    inputs = semantic_inputs(after)
    sample = after(
        torch.randn(2, after.config.in_channels, 16, 16), torch.tensor([20, 900]), control=CONTROL, **inputs
    ).sample
    sample.square().mean().backward()
    embedding = after.trunk.control_embedding
    for level in (embedding.high_level, embedding.low_level):
        assert level.mlp.linear_2.weight.grad.abs().max() > 0


@pytest.mark.parametrize("num_class_tokens", [1, 2])
@pytest.mark.parametrize("name", DENOISERS)
def test_every_backbone_with_classes_starts_at_its_null_class(tiny_denoiser, name, num_class_tokens):
    before = tiny_denoiser(name, num_classes=5, num_class_tokens=num_class_tokens, conditioning="published")
    after, _ = disentangle(before)
    expected, sample = (
        model(torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])).sample
        for model in (before, after)
    )
    assert_close(sample, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_pooled_text_alone_has_no_place(tiny_denoiser):
    with pytest.raises(ValueError, match="pooled text alone"):
        disentangle(tiny_denoiser("dit", pooled_dim=8, conditioning="published"))


def test_a_disentangled_denoiser_is_not_disentangled_again(tiny_denoiser):
    with pytest.raises(ValueError, match="`conditioning` of the denoiser is 'disentangled'"):
        disentangle(tiny_denoiser("dit", num_classes=3))
