"""Official weights: conversion keeps the predictions, and converting back gives the same weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from improved_ldm.conditioning.guidance import combine_predictions, guidance_terms
from improved_ldm.convert import SOURCES, from_published, to_published
from tests.convert.conftest import FIXTURES, OFFICIAL

TOLERANCE = 1e-5  # relative to the largest value of the output
CASES = [
    pytest.param(name, path.stem, id=f"{name}-{path.stem}")
    for name in OFFICIAL
    for path in sorted((FIXTURES / name).glob("case_*.safetensors"))
]
NAMES = {
    "x": "hidden_states",
    "t": "timestep",
    "context": "encoder_hidden_states",
    "mask": "encoder_attention_mask",
}
Y = {"DiTDenoiser": "class_labels", "MDTDenoiser": "class_labels", "MMDiTDenoiser": "pooled_projections"}


def arguments_of(denoiser, case):
    """The recorded inputs with the names of the denoiser's arguments."""
    inputs = {name.removeprefix("input."): value for name, value in case.items() if name.startswith("input.")}
    y = inputs.pop("y")
    arguments = {NAMES.get(name, name): value for name, value in inputs.items()}
    if type(denoiser).__name__ == "PixArtDenoiser":
        return arguments | {"encoder_hidden_states": y[:, 0]}
    return arguments | {Y[type(denoiser).__name__]: y}


def guidance_of(name, case, config):
    """The guidance scale of each image (batch / 2, 1, 1, 1) in a recorded guided prediction."""
    scale = config["scalars"]["cfg_scale"]
    if name != "official_mdtv2":
        return torch.tensor(scale)
    progress = 1 - case["input.t"].chunk(2)[0] / config["scalars"]["diffusion_steps"]
    ramp = (1 - torch.cos(progress ** config["scalars"]["scale_pow"] * torch.pi)) / 2
    return ((scale - 1) * ramp + 1).view(-1, 1, 1, 1)


@pytest.mark.parametrize(("name", "case_name"), CASES)
def test_the_prediction_is_that_of_the_published_model(name, case_name, load_published):
    published = load_published(name)
    denoiser = from_published(published.source, published.state_dict, published.config)
    case = load_file(published.folder / f"{case_name}.safetensors")
    expected, arguments = case["expected.output"], arguments_of(denoiser, case)
    if case_name == "case_masked":
        draw = case["rng.rand_mask_ratio_draw"].item()
        ratio = denoiser.config.mask_ratio + 0.2 * draw
        noise = case["rng.mask_noise"]
        arguments |= {"mask_noise": noise, "num_kept": int(noise.shape[1] * (1 - ratio))}
    if case_name == "case_cfg":  # the published guidance repeats the first half of the images
        first_half = arguments["hidden_states"].chunk(2)[0]
        arguments["hidden_states"] = torch.cat([first_half, first_half])
    with torch.no_grad():
        sample = denoiser(**arguments).sample
    if case_name == "case_cfg":  # and guides three of the channels
        cases = json.loads((published.folder / "config.json").read_text(encoding="utf-8"))["cases"]
        config = next(entry for entry in cases if entry["file"] == f"{case_name}.safetensors")
        scale = guidance_of(name, case, config)
        conditional, unconditional = sample[:, :3].chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        if scale.numel() == 1:
            ours = combine_predictions(sample[:, :3], guidance_terms(scale.item(), 1.0))
            assert torch.allclose(ours, guided, rtol=0, atol=TOLERANCE)
        sample = torch.cat([torch.cat([guided, guided]), sample[:, 3:]], dim=1)
    assert sample.shape == expected.shape
    assert (sample - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_every_weight_comes_back_bit_for_bit(published):
    denoiser = from_published(published.source, published.state_dict, published.config)
    back = to_published(published.source, denoiser)
    assert back.keys() == published.state_dict.keys()
    for name, tensor in published.state_dict.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_weights_is_kept(published, dtype):
    halves = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in published.state_dict.items()
    }
    denoiser = from_published(published.source, halves, published.config)
    assert {parameter.dtype for parameter in denoiser.parameters()} == {dtype}
    back = to_published(published.source, denoiser)
    assert all(torch.equal(back[name], tensor) for name, tensor in halves.items())


def test_training_the_denoiser_leaves_the_given_weights_alone(published):
    before = {name: tensor.clone() for name, tensor in published.state_dict.items()}
    denoiser = from_published(published.source, published.state_dict, published.config)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(1)
    assert all(torch.equal(published.state_dict[name], tensor) for name, tensor in before.items())


def test_a_converted_denoiser_is_saved_and_loaded(published, tmp_path):
    denoiser = from_published(published.source, published.state_dict, published.config)
    denoiser.save_pretrained(tmp_path)
    loaded = type(denoiser).from_pretrained(tmp_path)
    back = to_published(published.source, loaded)
    assert all(torch.equal(back[name], tensor) for name, tensor in published.state_dict.items())


def test_missing_and_left_over_keys_are_listed(published):
    state_dict = dict(published.state_dict)
    state_dict["of.another.model"] = state_dict.pop("t_embedder.mlp.0.bias")
    with pytest.raises(
        ValueError, match=r"1 keys are missing \(t_embedder.mlp.0.bias\), 1 are left over \(of.another"
    ):
        from_published(published.source, state_dict, published.config)


def test_wrong_shapes_are_listed_by_their_published_names(load_published):
    published = load_published("official_dit")
    with pytest.raises(ValueError, match=r"y_embedder.embedding_table.weight gives \(11, 64\) for \(8, 64\)"):
        from_published(published.source, published.state_dict, {**published.config, "num_classes": 7})


def test_a_model_without_null_class_converts_and_comes_back(load_published):
    published = load_published("official_dit")
    table = "y_embedder.embedding_table.weight"
    state_dict = {**published.state_dict, table: published.state_dict[table][:-1]}
    denoiser = from_published(published.source, state_dict, {**published.config, "class_dropout_prob": 0.0})
    assert torch.equal(to_published(published.source, denoiser)[table], state_dict[table])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("official_dit", {"depht": 2}, "`depht` in the source's configuration is unknown"),
        ("official_pixart", {"use_rel_pos": True}, "`use_rel_pos` is True .*only False converts"),
        ("official_sd3_mmdit_pure", {"swiglu": True}, "`swiglu` is True .*only False converts"),
    ],
)
def test_arguments_that_do_not_convert_are_errors(load_published, name, change, message):
    published = load_published(name)
    with pytest.raises(ValueError, match=message):
        from_published(published.source, published.state_dict, {**published.config, **change})


def test_unknown_sources_and_modes_are_errors(load_published):
    published = load_published("official_dit")
    with pytest.raises(ValueError, match="`source` is 'DiT'; it must be diffusers, facebookresearch/DiT"):
        from_published("DiT", published.state_dict, published.config)
    with pytest.raises(ValueError, match="`conditioning` is 'both'"):
        from_published(published.source, published.state_dict, published.config, conditioning="both")


def test_a_denoiser_that_a_source_cannot_express_is_an_error(tiny_denoiser, load_published):
    with pytest.raises(ValueError, match="has the weights of a MDTDenoiser"):
        to_published("sail-sg/MDT", tiny_denoiser("dit", num_classes=3, conditioning="published"))
    with pytest.raises(ValueError, match="`conditioning` of the denoiser is 'disentangled'"):
        to_published("facebookresearch/DiT", tiny_denoiser("dit", num_classes=3))
    with pytest.raises(ValueError, match="`qk_norm` of the denoiser is True"):
        to_published(
            "facebookresearch/DiT", tiny_denoiser("dit", num_classes=3, conditioning="published", qk_norm=True)
        )
    published = load_published("official_dit")
    denoiser = from_published(published.source, published.state_dict, published.config)
    with pytest.raises(ValueError, match="`downscale_freq_shift` of the denoiser is 0"):
        to_published("diffusers", denoiser)
    with pytest.raises(ValueError, match="`num_classes` of the denoiser is None; facebookresearch/DiT needs it"):
        to_published("facebookresearch/DiT", tiny_denoiser("dit", conditioning="published"))
    with pytest.raises(ValueError, match="_class_name"):
        to_published("diffusers", tiny_denoiser("mdt", num_classes=3, conditioning="published"))


def test_every_source_has_a_fixture():
    assert set(OFFICIAL.values()) == set(SOURCES)


def test_a_model_goes_from_one_implementation_to_another(tiny_denoiser):
    """PixArt-α with sizes, in the format of diffusers and in that of its authors."""
    denoiser = tiny_denoiser(
        "pixart",
        text_dim=12,
        conditioning="published",
        published={"size_conditions": True},
        hidden_size=48,
        out_channels=8,
    )
    official = to_published("PixArt-alpha/PixArt-alpha", denoiser)
    assert {"csize_embedder.mlp.0.weight", "ar_embedder.mlp.2.bias"} <= official.keys()
    arguments = {"hidden_size": 48, "depth": 2, "num_heads": 2, "input_size": 4, "caption_channels": 12}
    through_official = from_published("PixArt-alpha/PixArt-alpha", official, {**arguments, "model_max_length": 1})
    config = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "sample_size": 4}
    config |= {"caption_channels": 12, "cross_attention_dim": 48, "use_additional_conditions": True}
    through_diffusers = from_published(
        "diffusers", to_published("diffusers", denoiser), {**config, "_class_name": "PixArtTransformer2DModel"}
    )
    latents, timestep = torch.randn(2, 4, 4, 6), torch.tensor([5, 500])
    inputs = {"encoder_hidden_states": torch.randn(2, 3, 12)}
    inputs["added_cond_kwargs"] = {"resolution": torch.full((2, 2), 1024.0), "aspect_ratio": torch.ones(2, 1)}
    with torch.no_grad():
        expected = denoiser(latents, timestep, **inputs).sample
        assert torch.equal(through_official(latents, timestep, **inputs).sample, expected)
        assert torch.equal(through_diffusers(latents, timestep, **inputs).sample, expected)
