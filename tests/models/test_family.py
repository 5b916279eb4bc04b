"""The named sizes have the published numbers of parameters and multiply-adds; all models are on the meta device."""

import json

import pytest
import torch

from improved_ldm.models.cost import multiply_adds
from improved_ldm.models.family import DENOISERS, PATCH_SIZES, SIZES, denoiser_class, make_denoiser, preset
from improved_ldm.models.mmdit import MMDiTDenoiser
from improved_ldm.models.unet import UNetDenoiser

IMAGENET = {
    "conditioning": "published",
    "num_classes": 1000,
    "out_channels": 8,
}  # both noise and variance are predicted
PIXART = {"conditioning": "published", "text_dim": 4096, "out_channels": 8}

# Peebles and Xie, 2023, table 4: parameters (1e6), and multiply-adds an image of 256 x 256 pixels (1e9), which are its
# "Gflops": wpeebles in facebookresearch/DiT issue 14.
DIT_PARAMETERS = {"S/2": 33, "B/2": 130, "L/2": 458, "XL/2": 675}
DIT_MULTIPLY_ADDS = {
    "S/8": 0.36,
    "S/4": 1.41,
    "S/2": 6.06,
    "B/8": 1.42,
    "B/4": 5.56,
    "B/2": 23.01,
    "L/8": 5.01,
    "L/4": 19.70,
    "L/2": 80.71,
    "XL/8": 7.39,
    "XL/4": 29.05,
    "XL/2": 118.64,
}


def on_meta(build, *args, **config):
    with torch.device("meta"):
        return build(*args, **config)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", DIT_PARAMETERS)
def test_dit_has_the_published_parameters(size):
    model = on_meta(make_denoiser, "dit", size, **IMAGENET)
    assert round(count(model) / 1e6) == DIT_PARAMETERS[size]


@pytest.mark.parametrize("size", DIT_MULTIPLY_ADDS)
def test_dit_has_the_published_multiply_adds(size):
    model = on_meta(make_denoiser, "dit", size, **IMAGENET)
    # the figures have two decimals, and count a little beside products of matrices
    assert multiply_adds(model) / 1e9 == pytest.approx(DIT_MULTIPLY_ADDS[size], rel=2.5e-4, abs=0.006)


def test_dit_has_every_parameter_of_the_official_class():
    # 675,129,632: "SiT-XL/2" and "DiT-XL/2" as their training scripts print it, which includes the frozen positions
    model = on_meta(make_denoiser, "dit", "XL/2", **IMAGENET)
    assert count(model) + model.positions.numel() == 675_129_632


def test_mdt_has_every_parameter_of_the_official_class():
    # 742,263,904 and 129.49e9: MDTv2_XL_2(decode_layer=4) of sail-sg/MDT at 7d26c21, counted
    model = on_meta(make_denoiser, "mdt", "XL/2", **IMAGENET)
    assert count(model) == 742_263_904
    assert multiply_adds(model) / 1e9 == pytest.approx(129.49, abs=0.005)
    # 676 M, which papers quote for MDTv2-XL/2, has neither the block for training alone nor the skips of version 2
    skips = sum(count(module) for name, module in model.named_modules() if name.endswith("skip_linear"))
    assert round((count(model) - count(model.side_block) - skips) / 1e6) == 676


@pytest.mark.parametrize(("size_conditions", "published"), [(False, 610_856_096), (True, 611_349_152)])
def test_pixart_has_every_parameter_of_the_official_model(size_conditions, published):
    # 0.6 B: the card of PixArt-alpha/PixArt-XL-2-1024-MS. In full: diffusers' PixArtTransformer2DModel with
    # caption_channels=4096, without and with the additional conditions of 1024 pixels
    form = {"num_null_tokens": 120, "size_conditions": size_conditions}
    model = on_meta(make_denoiser, "pixart", "XL/2", published=form, **PIXART)
    assert count(model) == published


def test_mmdit_has_every_parameter_of_stable_diffusion_3():
    # diffusers' SD3Transformer2DModel with the config of stabilityai/stable-diffusion-3-medium-diffusers, whose file
    # of 4.17 GB in half precision holds the position table as well
    model = on_meta(
        MMDiTDenoiser,
        sample_size=128,
        in_channels=16,
        out_channels=16,
        hidden_size=1536,
        num_layers=24,
        num_attention_heads=24,
        qk_norm=False,
        conditioning="published",
        text_dim=4096,
        pooled_dim=2048,
        published={"position_table_size": 192},
    )
    parameters = count(model)
    assert parameters == 2_028_328_000
    assert 2 * (parameters + model.positions.numel()) / 1e9 == pytest.approx(4.17, abs=0.005)


def test_unet_has_every_parameter_of_stable_diffusion_1():
    # 859,520,964: diffusers' documentation of `num_parameters`
    model = on_meta(
        UNetDenoiser,
        block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        transformer_layers_per_block=(1, 1, 1, 1),
        num_attention_heads=(8, 8, 8, 8),
        use_linear_projection=False,
        conditioning="published",
        text_dim=768,
        published={"size_features": 0},
    )
    assert count(model) == 859_520_964


def test_unet_has_every_parameter_of_stable_diffusion_xl():
    # 2.6 B: Podell et al., 2024, table 1. In full: diffusers' UNet2DConditionModel with its config
    model = on_meta(
        UNetDenoiser,
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        num_attention_heads=(5, 10, 20),
        conditioning="published",
        text_dim=2048,
        pooled_dim=1280,
        published={"size_features": 256},
    )
    assert count(model) == 2_567_463_684


def test_ldm_4_has_every_parameter_of_the_official_unet():
    # 400,920,579: `UNetModel` of CompVis/latent-diffusion at a506df5 with the values of `cin256-v2.yaml`, counted
    config = {"num_classes": 1000, "in_channels": 3, "out_channels": 3, "published": {"size_features": 0}}
    model = on_meta(make_denoiser, "unet", "LDM-4/2", conditioning="published", **config)
    assert count(model) - 1001 * 512 == 400_920_579  # its class embedding is another module


@pytest.mark.parametrize("size", DIT_PARAMETERS)
@pytest.mark.parametrize("name", ["unet", "mmdit"])
def test_sizes_of_our_choice_are_about_as_large_as_dit(name, size):
    model = on_meta(make_denoiser, name, size, text_dim=768)
    assert count(model) / 1e6 == pytest.approx(DIT_PARAMETERS[size], rel=0.12)


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
@pytest.mark.parametrize("name", DENOISERS)
def test_tiny_predicts_latents(name, patch_size):
    model = on_meta(make_denoiser, name, f"tiny/{patch_size}", num_classes=2)
    latents = torch.empty(1, 4, 32, 32, device="meta")
    assert model(latents, torch.empty(1, device="meta")).sample.shape == latents.shape


@pytest.mark.parametrize("patch_size", PATCH_SIZES)
@pytest.mark.parametrize("name", DENOISERS)
def test_every_size_is_a_config(name, patch_size):
    for size in SIZES[name]:
        values = preset(name, f"{size}/{patch_size}")
        assert values.keys() <= set(denoiser_class(name)._get_init_keys(denoiser_class(name)))
        assert json.loads(json.dumps(values)).keys() == values.keys()
        if name == "unet":
            assert 2 ** values["down_block_types"].index("CrossAttnDownBlock2D") == patch_size
            assert len({len(levels) for levels in values.values() if isinstance(levels, tuple)}) == 1
            assert not any(channels % 32 for channels in values["block_out_channels"])
        else:
            assert values["patch_size"] == patch_size
            assert values["hidden_size"] % values["num_attention_heads"] == 0
            assert (values["num_layers"] - values.get("num_decoder_layers", 0)) % 2 == 0 or name != "mdt"


def test_config_wins_over_the_preset():
    model = make_denoiser("dit", "tiny/2", num_layers=1, num_classes=2)
    assert model.config.num_layers == len(model.transformer_blocks) == 1
    assert model.config.hidden_size == 192


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match=r"'dat'.*dit"):
        denoiser_class("dat")
    with pytest.raises(ValueError, match="'dat'"):
        preset("dat", "S/2")


@pytest.mark.parametrize("size", ["M/2", "S/3", "S", "", "S/2/2", "s/2"])
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_unknown_sizes_are_errors(name, size):
    with pytest.raises(ValueError, match=f"'{size}'"):
        preset(name, size)
