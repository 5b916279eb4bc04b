"""Pipelines with quantised, cast or offloaded weights, and decoding in parts."""

import copy

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from improved_ldm.models.family import DENOISERS

NAMES = pytest.mark.parametrize("name", DENOISERS)
MODES = pytest.mark.parametrize("mode", ["disentangled", "published"])


def draw(pipe, **arguments):
    arguments = {
        "class_labels": [0, 2],
        "generator": torch.Generator().manual_seed(5),
        "output_type": "pt",
    } | arguments
    return pipe(**arguments).images


def offload_to_meta(pipe):
    """Applies sequential offloading to the components, with the CPU as the accelerator."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)


def assert_near(pictures, plain, tolerance):
    assert 0 < (pictures - plain).abs().mean() < tolerance


@NAMES
@MODES
def test_int8_weights_draw_nearly_the_same(class_pipeline, tmp_path, name, mode):
    torchao = pytest.importorskip("torchao.quantization")
    config = diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pipe = class_pipeline(name=name, conditioning=mode)
    pipe.save_pretrained(tmp_path)
    plain, component = draw(pipe), pipe.denoiser.component
    quantised = DiffusionPipeline.from_pretrained(
        tmp_path, quantization_config=PipelineQuantizationConfig(quant_mapping={component: config})
    )
    quantised.set_progress_bar_config(disable=True)
    linear = [module for module in quantised.denoiser.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(type(module.weight.data) is not torch.Tensor for module in linear) > len(linear) // 2
    assert_near(draw(quantised), plain, 0.02)
    with pytest.raises(ValueError, match="weights are quantised"):
        quantised.denoiser.fuse_qkv_projections()


@NAMES
@MODES
def test_weights_cast_layer_by_layer_draw_nearly_the_same(class_pipeline, name, mode):
    pipe = class_pipeline(name=name, conditioning=mode)
    plain = draw(pipe)
    pipe.denoiser.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in pipe.denoiser.parameters())
    assert_near(draw(pipe), plain, 0.02)


@NAMES
def test_casting_computes_in_the_dtype_of_the_model(class_pipeline, name):
    pipe = class_pipeline(name=name)
    latents = torch.randn(2, 4, 4, 4)  # random noise can differ in another dtype
    plain = draw(pipe, latents=latents)
    with pytest.raises(ValueError, match=r"`compute_dtype` is torch.bfloat16, but the \w+ is in torch.float32; call"):
        pipe.denoiser.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert torch.equal(draw(pipe, latents=latents), plain)
    pipe.denoiser.to(torch.bfloat16).enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert_near(draw(pipe, latents=latents), plain, 0.02)


@NAMES
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_groups_of_layers_may_be_offloaded(class_pipeline, name, offload_type):
    pipe = class_pipeline(name=name)
    plain = draw(pipe)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    cpu = torch.device("cpu")
    pipe.denoiser.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=offload_type, **blocks)
    assert torch.equal(draw(pipe), plain)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator to offload from")
@NAMES
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_without_an_accelerator_says_so_and_changes_nothing(class_pipeline, name, method):
    pipe = class_pipeline(name=name)
    plain = draw(pipe)
    with pytest.raises(RuntimeError, match=f"`{method}` requires accelerator"):
        getattr(pipe, method)()
    assert torch.equal(draw(pipe), plain)


@NAMES
def test_weights_may_lie_on_the_meta_device_between_calls(class_pipeline, autoencoder, name):
    pipe = class_pipeline(name=name, vae=copy.deepcopy(autoencoder))
    plain = draw(pipe)
    offload_to_meta(pipe)
    assert all(parameter.is_meta for parameter in pipe.denoiser.parameters())
    assert torch.equal(draw(pipe), plain)


def test_slices_are_decoded_alike(class_pipeline, autoencoder):
    pipe = class_pipeline(vae=copy.deepcopy(autoencoder))
    plain = draw(pipe)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(draw(pipe), plain)
    pipe.vae.disable_slicing()
    assert torch.equal(draw(pipe), plain)


def test_tiles_are_decoded_nearly_alike(class_pipeline, autoencoder):
    vae = copy.deepcopy(autoencoder)
    vae.tile_sample_min_size, vae.tile_latent_min_size = 16, 8
    pipe = class_pipeline(vae=vae)
    plain = draw(pipe, height=32, width=24)
    pipe.vae.enable_tiling()
    assert_near(draw(pipe, height=32, width=24), plain, 0.1)
    pipe.vae.disable_tiling()
    assert torch.equal(draw(pipe, height=32, width=24), plain)


def test_text_encoders_may_lie_on_the_meta_device_between_calls(text_pipeline, clip_text):
    tokenizer, text_encoder = clip_text
    pipe = text_pipeline((tokenizer, copy.deepcopy(text_encoder)), name="pixart")
    pipe.vae = copy.deepcopy(pipe.vae)  # other tests share it
    call = {"prompt": "a red boot", "output_type": "pt"}
    plain = pipe(**call, generator=torch.Generator().manual_seed(5)).images
    offload_to_meta(pipe)
    assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(5)).images, plain)
