"""Random diffusers models: conversion keeps the predictions, and converting back gives the same weights."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from improved_ldm.convert import from_published, to_published

TOLERANCE = 1e-5  # relative to the largest value of the output
SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2}
LARGER = {"num_attention_heads": 6, "attention_head_dim": 32, "num_layers": 3, "in_channels": 3, "out_channels": 6}
DIT = {
    "small": ({**SMALL, "sample_size": 8, "num_embeds_ada_norm": 5}, (8, 8)),
    "larger": ({**LARGER, "sample_size": 16, "patch_size": 4, "num_embeds_ada_norm": 20, "norm_eps": 1e-6}, (16, 16)),
    "other-size": ({**SMALL, "sample_size": 8, "num_embeds_ada_norm": 5}, (12, 12)),
}
PIXART_SMALL = {**SMALL, "cross_attention_dim": 48, "caption_channels": 20}
PIXART = {
    "small": ({**PIXART_SMALL, "sample_size": 8}, (8, 8)),
    "larger": ({**LARGER, "cross_attention_dim": 192, "caption_channels": 20, "sample_size": 16}, (16, 16)),
    "not-square": ({**PIXART_SMALL, "sample_size": 8}, (8, 14)),
    "sizes": ({**PIXART_SMALL, "sample_size": 8, "use_additional_conditions": True}, (8, 6)),
    "1024-pixels": ({**PIXART_SMALL, "num_layers": 1, "sample_size": 128}, (24, 32)),
    "interpolated": ({**PIXART_SMALL, "sample_size": 16, "interpolation_scale": 2}, (16, 16)),
}
SD3_SMALL = {
    **SMALL,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 20,
    "caption_projection_dim": 48,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 10,
    "sample_size": 8,
}
SD35 = {**SD3_SMALL, "num_layers": 3, "qk_norm": "rms_norm"}
SD3 = {
    "sd3": (SD3_SMALL, (8, 8)),
    "not-square": (SD3_SMALL, (6, 18)),
    "patch-1": ({**SD3_SMALL, "patch_size": 1}, (7, 8)),
    "sd3.5-large": (SD35, (8, 8)),
    "sd3.5-medium": ({**SD35, "dual_attention_layers": (0, 1)}, (8, 12)),
    "all-dual": ({**SD35, "dual_attention_layers": (0, 1, 2)}, (8, 12)),
}
SD15 = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 20,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
SDXL = {
    **SD15,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
}
UNET = {
    "sd1.5": (SD15, (16, 16)),
    "sd2": ({**SD15, "attention_head_dim": (1, 2, 2), "use_linear_projection": True}, (16, 16)),
    "sdxl": (SDXL, (16, 16)),
    "odd-sides": (SDXL, (9, 14)),
    "two-layers": ({**SDXL, "layers_per_block": 2, "sample_size": 24, "in_channels": 3, "out_channels": 5}, (12, 8)),
}
CLASSES = {
    DiTTransformer2DModel: DIT,
    PixArtTransformer2DModel: PIXART,
    SD3Transformer2DModel: SD3,
    UNet2DConditionModel: UNET,
}
CASES = [
    pytest.param(cls, *case, id=f"{cls.__name__}-{name}")
    for cls, cases in CLASSES.items()
    for name, case in cases.items()
]


@pytest.fixture
def converted(randomize):
    """A random model of a diffusers class, and the denoiser with the same weights."""

    def build(cls, config):
        peer = randomize(cls(**config))
        return peer, from_published("diffusers", peer.state_dict(), {**peer.config, "_class_name": cls.__name__})

    return build


def inputs_of(peer, size, batch_size=2):
    """Arguments of both forward methods: the one of diffusers and the one of our denoiser."""
    config, generator = peer.config, torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(batch_size, *shape, generator=generator)

    hidden_states, timestep = randn(config.in_channels, *size), torch.tensor([3, 911])
    text = randn(
        7,
        config.get("caption_channels") or config.get("joint_attention_dim") or config.get("cross_attention_dim") or 1,
    )
    theirs = {"hidden_states": hidden_states, "timestep": timestep}
    if isinstance(peer, DiTTransformer2DModel):
        theirs["class_labels"] = torch.tensor([1, config.num_embeds_ada_norm])
        return theirs, theirs
    theirs["encoder_hidden_states"] = text
    if isinstance(peer, SD3Transformer2DModel):
        theirs["pooled_projections"] = randn(config.pooled_projection_dim)
        return theirs, theirs
    theirs["encoder_attention_mask"] = torch.arange(7) < torch.tensor([[7], [3]])
    if isinstance(peer, PixArtTransformer2DModel):
        if peer.use_additional_conditions:
            sizes = {"resolution": 512 + randn(2), "aspect_ratio": 1 + 0.1 * randn(1)}
            theirs["added_cond_kwargs"] = sizes
        return theirs, theirs
    if config.addition_embed_type == "text_time":
        theirs["added_cond_kwargs"] = {"text_embeds": randn(10), "time_ids": 100 + 9 * randn(6)}
    return {"sample": theirs.pop("hidden_states"), **theirs}, {"hidden_states": hidden_states, **theirs}


@pytest.mark.parametrize(("cls", "config", "size"), CASES)
@torch.no_grad()
def test_the_prediction_is_that_of_diffusers(converted, cls, config, size):
    peer, denoiser = converted(cls, config)
    theirs, ours = inputs_of(peer, size)
    expected, sample = peer(**theirs).sample, denoiser(**ours).sample
    assert sample.shape == expected.shape and expected.isfinite().all()
    assert (sample - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(("cls", "config", "size"), CASES)
def test_every_weight_comes_back_bit_for_bit(converted, cls, config, size):
    peer, denoiser = converted(cls, config)
    back, weights = to_published("diffusers", denoiser), peer.state_dict()
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    peer.load_state_dict(back, strict=True)


def test_equal_embedders_of_the_blocks_become_one_trunk(converted, randomize):
    peer, _ = converted(DiTTransformer2DModel, DIT["small"][0])
    for block in peer.transformer_blocks:
        block.norm1.emb.load_state_dict(peer.transformer_blocks[0].norm1.emb.state_dict())
    denoiser = from_published("diffusers", peer.state_dict(), {**peer.config, "_class_name": "DiTTransformer2DModel"})
    assert len(denoiser.later_trunks) == 0
    back = to_published("diffusers", denoiser)
    assert back.keys() == peer.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in peer.state_dict().items())


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        (DiTTransformer2DModel, {**DIT["small"][0], "activation_fn": "geglu"}, "`activation_fn` is 'geglu'"),
        (DiTTransformer2DModel, {**DIT["small"][0], "attention_bias": False}, "`attention_bias` is False"),
        (UNet2DConditionModel, {**SD15, "flip_sin_to_cos": False}, "`flip_sin_to_cos` is False"),
        (UNet2DConditionModel, {**SD15, "num_class_embeds": 4}, "`num_class_embeds` is 4"),
        (UNet2DConditionModel, {**SD15, "layers_per_block": (1, 2, 1)}, "`layers_per_block`"),
    ],
)
def test_configurations_that_do_not_convert_are_errors(converted, cls, config, message):
    with pytest.raises(ValueError, match=message):
        converted(cls, config)


def test_the_class_is_read_from_the_configuration():
    with pytest.raises(ValueError, match="`_class_name` is None; diffusers' classes are DiTTransformer2DModel"):
        from_published("diffusers", {}, {})


LEGACY = {  # as in the published folders of DiT and PixArt-α
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": False,
    "upcast_attention": False,
    "norm_num_groups": 32,
}


@pytest.mark.parametrize(
    ("cls", "config", "legacy"),
    [
        (DiTTransformer2DModel, DIT["small"][0], {**LEGACY, "norm_type": "ada_norm_zero"}),
        (
            PixArtTransformer2DModel,
            PIXART["small"][0],
            {**LEGACY, "norm_type": "ada_norm_single", "cross_attention_dim": 48, "double_self_attention": False},
        ),
        (UNet2DConditionModel, SDXL, {"_class_name": "UNet2DConditionModel", "upcast_attention": None}),
    ],
    ids=["dit", "pixart", "sdxl"],
)
def test_configurations_of_published_folders_convert(randomize, cls, config, legacy):
    peer = randomize(cls(**config))
    denoiser = from_published("diffusers", peer.state_dict(), {**config, **legacy})
    back = to_published("diffusers", denoiser)
    assert all(torch.equal(back[name], tensor) for name, tensor in peer.state_dict().items())
