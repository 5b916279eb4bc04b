"""Adapters of random diffusers models give the same predictions on our denoisers."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.convert import disentangle, from_published
from improved_ldm.diffusion.schedules import variance_preserving_scheduler
from tests.convert.test_diffusers_classes import CLASSES, SDXL, TOLERANCE, inputs_of

CASES = [
    pytest.param(cls, *cases[name], id=f"{cls.__name__}-{name}")
    for cls, cases in CLASSES.items()
    for name in cases
    if name in ("small", "sizes", "sd3", "sd3.5-medium", "sd1.5", "sdxl")
]
KINDS = {
    "alpha": {"r": 3, "lora_alpha": 7},
    "ranks": {"r": 3, "lora_alpha": 5, "rank_pattern": {"attn1.to_q": 2, "to_k": 1}, "alpha_pattern": {"to_v": 2}},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 5, "use_dora": True},
}


@pytest.fixture
def both(autoencoder, randomize):
    """A random model of a diffusers class, and a pipeline whose denoiser has the same weights."""

    def build(cls, config):
        peer = randomize(cls(**config))
        denoiser = from_published("diffusers", peer.state_dict(), {**peer.config, "_class_name": cls.__name__})
        return peer, pipeline_of(denoiser, autoencoder)

    return build


def pipeline_of(denoiser, autoencoder):
    return ImprovedLDMPipeline(
        vae=autoencoder, **{denoiser.component: denoiser}, scheduler=variance_preserving_scheduler("epsilon")
    )


def layers_of(peer):
    """Every layer that an adapter can be on; a DiT of diffusers embeds timestep and class in every block."""
    names = [name for name, module in peer.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return [name for name in names if not (isinstance(peer, DiTTransformer2DModel) and "norm1.emb" in name)]


def adapt(peer, layers=None, **settings):
    """Adds a random adapter and returns its tensors and settings."""
    config = LoraConfig(**{"target_modules": layers or layers_of(peer), "init_lora_weights": False, **settings})
    inject_adapter_in_model(config, peer)
    for name, parameter in peer.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape)
    return get_peft_model_state_dict(peer), config.to_dict()


def save(folder, component, tensors, settings):
    """Saves the adapter of a pipeline as diffusers does."""
    if component == "unet":
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder, unet_lora_layers=tensors, unet_lora_adapter_metadata=settings
        )
    else:
        SD3LoraLoaderMixin.save_lora_weights(
            folder, transformer_lora_layers=tensors, transformer_lora_adapter_metadata=settings
        )


@torch.no_grad()
def assert_equal_predictions(peer, denoiser, size):
    theirs, ours = inputs_of(peer, size)
    expected, sample = peer(**theirs).sample, denoiser(**ours).sample
    assert expected.isfinite().all()
    assert (sample - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize(("cls", "config", "size"), CASES)
def test_an_adapter_of_diffusers_predicts_the_same_here(both, tmp_path, cls, config, size, kind):
    peer, pipe = both(cls, config)
    theirs, ours = inputs_of(peer, size)
    with torch.no_grad():
        plain, own = peer(**theirs).sample, pipe.denoiser(**ours).sample
    save(tmp_path, pipe.denoiser.component, *adapt(peer, **kind))
    pipe.load_lora_weights(tmp_path)
    assert_equal_predictions(peer, pipe.denoiser, size)
    with torch.no_grad():
        assert (peer(**theirs).sample - plain).abs().max() > 0.01 * plain.abs().max()
        pipe.unload_lora_weights()
        torch.testing.assert_close(pipe.denoiser(**ours).sample, own, rtol=0, atol=0)


@pytest.mark.parametrize(("cls", "config", "size"), CASES)
def test_without_settings_alpha_is_the_rank(both, tmp_path, cls, config, size):
    peer, pipe = both(cls, config)
    tensors, _ = adapt(peer, r=4, lora_alpha=4, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 2})
    pipe.load_lora_weights({f"{pipe.denoiser.component}.{name}": value for name, value in tensors.items()})
    assert_equal_predictions(peer, pipe.denoiser, size)


@pytest.mark.parametrize(("cls", "config", "size"), CASES)
def test_a_folder_of_peft_predicts_the_same_here(both, tmp_path, cls, config, size):
    peer, pipe = both(cls, config)
    settings = LoraConfig(r=3, lora_alpha=7, target_modules=layers_of(peer), init_lora_weights=False)
    get_peft_model(peer, settings).save_pretrained(tmp_path)
    pipe.load_lora_weights(tmp_path)
    assert_equal_predictions(peer, pipe.denoiser, size)


@pytest.mark.parametrize(("cls", "config", "size"), CASES)
def test_kohyas_names_of_diffusers_layers_predict_the_same_here(both, tmp_path, cls, config, size):
    peer, pipe = both(cls, config)
    tensors, settings = adapt(peer, r=3, lora_alpha=7)
    component = {f"{pipe.denoiser.component}_lora_layers": tensors}
    values = {f"{pipe.denoiser.component}_lora_adapter_metadata": settings}
    ImprovedLDMPipeline.save_lora_weights(tmp_path, **component, **values, format="kohya")
    pipe.load_lora_weights(tmp_path)
    assert_equal_predictions(peer, pipe.denoiser, size)


def test_names_of_older_releases_of_diffusers(both, tmp_path):
    peer, pipe = both(UNet2DConditionModel, SDXL)
    layers = [name for name in layers_of(peer) if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]
    tensors, _ = adapt(peer, layers, r=4, lora_alpha=4)
    old = convert_state_dict_to_diffusers(tensors)
    assert any(name.endswith(".to_q.lora.down.weight") for name in old)
    save_file({f"unet.{name}": value for name, value in old.items()}, tmp_path / "old.safetensors")
    pipe.load_lora_weights(tmp_path)
    assert_equal_predictions(peer, pipe.denoiser, (16, 16))


def test_a_layer_that_is_no_single_one_here_is_named(both, randomize, autoencoder):
    config = CLASSES[DiTTransformer2DModel]["small"][0]
    peer = randomize(DiTTransformer2DModel(**config))
    for block in peer.transformer_blocks:
        block.norm1.emb.load_state_dict(peer.transformer_blocks[0].norm1.emb.state_dict())
    denoiser = from_published("diffusers", peer.state_dict(), {**config, "_class_name": "DiTTransformer2DModel"})
    pipe = pipeline_of(denoiser, autoencoder)
    layer = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1"
    tensors, _ = adapt(peer, [layer], r=2)
    with pytest.raises(ValueError, match=rf"on '{layer}' of DiTTransformer2DModel, which is no single layer here"):
        pipe.load_lora_weights({f"transformer.{name}": value for name, value in tensors.items()})
    assert not pipe.get_list_adapters()


def test_a_disentangled_denoiser_has_no_layers_of_diffusers_names(both, autoencoder):
    peer, pipe = both(UNet2DConditionModel, SDXL)
    pipe = pipeline_of(disentangle(pipe.denoiser)[0], autoencoder)
    tensors, _ = adapt(peer, ["time_embedding.linear_1"], r=2)
    with pytest.raises(ValueError, match=r"2 of its 2 keys find no layer .* such as unet\.time_embedding\.linear_1"):
        pipe.load_lora_weights({f"unet.{name}": value for name, value in tensors.items()})


@pytest.mark.parametrize(("cls", "config", "size"), CASES)
def test_beside_another_adapter_and_saved_again_it_predicts_the_same(both, tmp_path, cls, config, size):
    peer, pipe = both(cls, config)
    save(tmp_path / "theirs", pipe.denoiser.component, *adapt(peer, r=3, lora_alpha=7))
    for name in ("first", "second"):
        pipe.load_lora_weights(tmp_path / "theirs", adapter_name=name)
    assert_equal_predictions(peer, pipe.denoiser, size)
    pipe.save_lora_weights(tmp_path / "ours", adapter_name="second")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path / "ours")
    assert_equal_predictions(peer, pipe.denoiser, size)
    pipe.fuse_lora()
    pipe.unload_lora_weights(keep_fused=True)
    assert_equal_predictions(peer, pipe.denoiser, size)
