"""Options of single published models beyond the contract: other names of sizes, tables, and additional layers."""

import json
from dataclasses import asdict

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from torch.testing import assert_close

from improved_ldm.conditioning.control import Control, control_tensor, null_control
from improved_ldm.conditioning.control_embedding import pixart_sizes, sdxl_sizes
from improved_ldm.models.dit import DiTDenoiser
from improved_ldm.models.published import PublishedDiT

CONTROLS = [Control((40, 60), (0, 20), (40, 40), (32, 32)), Control((64, 64), (8, 4), (32, 16), (48, 24))]
SIZED = {
    "unet": {"text_dim": 12, "pooled_dim": 10},
    "pixart": {"text_dim": 12, "published": {"size_conditions": True}, "hidden_size": 48},
}


@torch.no_grad()
def run(model, inputs, **changes):
    return model(**{**inputs, **changes}).sample


def differ(first, second):
    return (first - second).abs().max() > 1e-4


def exactly(first, second):
    assert_close(first, second, rtol=0, atol=0)


@pytest.fixture
def sized(tiny_denoiser, make_inputs):
    """A published model that reads sizes, and its inputs without them."""

    def build(name):
        model = tiny_denoiser(name, conditioning="published", **SIZED[name])
        inputs = make_inputs(model)
        del inputs["control"]
        return model, inputs

    return build


def pixart_kwargs(control):
    sizes = pixart_sizes(control)
    return {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}


def test_a_unet_takes_pooled_text_and_sizes_under_the_names_of_diffusers(sized):
    model, inputs = sized("unet")
    control, pooled = control_tensor(CONTROLS), inputs.pop("pooled_projections")
    ours = run(model, inputs, pooled_projections=pooled, control=control)
    added = {"text_embeds": pooled, "time_ids": sdxl_sizes(control)}
    exactly(run(model, inputs, added_cond_kwargs=added), ours)
    assert set(added) == {"text_embeds", "time_ids"}  # belongs to the caller
    exactly(run(model, inputs, pooled_projections=pooled, added_cond_kwargs={"time_ids": sdxl_sizes(control)}), ours)
    assert differ(run(model, inputs, added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.zeros(2, 6)}), ours)


def test_a_pixart_takes_sizes_under_the_names_of_diffusers(sized):
    model, inputs = sized("pixart")
    control = control_tensor(CONTROLS)
    ours = run(model, inputs, control=control)
    exactly(run(model, inputs, added_cond_kwargs=pixart_kwargs(control)), ours)
    assert differ(run(model, inputs, added_cond_kwargs=pixart_kwargs(control_tensor(CONTROLS[::-1]))), ours)


@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_are_not_known_are_zeros(sized, name):
    model, inputs = sized(name)
    zeros = {
        "unet": {"time_ids": torch.zeros(2, 6)},
        "pixart": {"resolution": torch.zeros(2, 2), "aspect_ratio": torch.zeros(2, 1)},
    }
    unknown = run(model, inputs)
    exactly(run(model, inputs, control=null_control(2)), unknown)
    exactly(run(model, inputs, added_cond_kwargs=zeros[name]), unknown)
    assert differ(run(model, inputs, control=control_tensor(CONTROLS)), unknown)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("unet", ("sizes",)),
        ("unet", ("time_ids", "resolution")),
        ("pixart", ("time_ids",)),
        ("pixart", ("resolution",)),
        ("pixart", ("resolution", "aspect_ratio", "text_embeds")),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "none",
)
def test_other_names_are_an_error(sized, name, names):
    model, inputs = sized(name)
    added = {each: torch.zeros(2, 10 if each == "text_embeds" else 6) for each in names}
    with pytest.raises(ValueError, match=r"`added_cond_kwargs` has .*it must have"):
        model(**inputs, added_cond_kwargs=added)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("unet", {"conditioning": "disentangled"}),
        ("unet", {"conditioning": "published", "published": {"size_features": 0}}),
        ("pixart", {"conditioning": "disentangled"}),
        ("pixart", {"conditioning": "published"}),
    ],
    ids=["unet-disentangled", "unet-without_sizes", "pixart-disentangled", "pixart-without_sizes"],
)
def test_sizes_that_are_not_read_are_an_error(tiny_denoiser, make_inputs, name, config):
    model = tiny_denoiser(name, num_classes=5, **config)
    added = {"time_ids": torch.zeros(2, 6)} if name == "unet" else pixart_kwargs(control_tensor(CONTROLS))
    with pytest.raises(ValueError, match="reads no published sizes"):
        model(**make_inputs(model), added_cond_kwargs=added)


def test_pooled_text_that_is_not_read_is_an_error_under_any_name(tiny_denoiser, make_inputs):
    model = tiny_denoiser("unet", conditioning="published", num_classes=5)
    added = {"text_embeds": torch.zeros(2, 10), "time_ids": torch.zeros(2, 6)}
    with pytest.raises(ValueError, match="pooled_projections"):
        model(**make_inputs(model), added_cond_kwargs=added)


def test_a_null_text_may_have_a_vector_a_position(tiny_denoiser, make_inputs):
    model = tiny_denoiser("pixart", text_dim=12, conditioning="published", published={"num_null_tokens": 3})
    model.trunk.null_text.normal_()  # a buffer, zeros unless it is published with the weights
    inputs = make_inputs(model)
    nulls = {tokens: torch.full((2, tokens, 12), torch.nan) for tokens in (2, 3, 4)}
    null = run(model, inputs, encoder_hidden_states=None)
    exactly(run(model, inputs, encoder_hidden_states=nulls[3]), null)
    assert differ(run(model, inputs, encoder_hidden_states=nulls[2]), null)
    with pytest.raises(ValueError, match="has 4 tokens; the null text has only 3"):
        model(**{**inputs, "encoder_hidden_states": nulls[4]})


def test_a_null_text_may_have_one_vector_for_any_position(tiny_denoiser, make_inputs):
    model = tiny_denoiser("pixart", text_dim=12)
    inputs = make_inputs(model)
    one, five = (run(model, inputs, encoder_hidden_states=torch.full((2, n, 12), torch.nan)) for n in (1, 5))
    assert_close(five, one)  # attention to equal tokens


def test_a_table_of_positions_is_cropped_at_its_centre(tiny_denoiser, make_inputs):
    model = tiny_denoiser("mmdit", num_classes=5, published={"position_table_size": 6})
    table = model.positions.view(6, 6, -1)
    exactly(model.positions_for((2, 4)), table[2:4, 1:5].flatten(0, 1))
    assert run(model, make_inputs(model, size=(12, 12))).shape == (2, 4, 12, 12)
    with pytest.raises(ValueError, match=r"7x2 patches.*6x6"):
        model(**make_inputs(model, size=(14, 4)))


def test_a_table_of_positions_spans_the_extent(tiny_denoiser):
    model = tiny_denoiser("mmdit", num_classes=5, published={"position_table_size": 6})
    fastest_sine_of_the_column = model.positions.view(6, 6, -1)[0, :, 0]
    assert_close(fastest_sine_of_the_column, (torch.arange(6) * 2 / 6).sin())


def test_dual_attention_is_in_the_layers_that_have_it(tiny_denoiser, make_inputs):
    model = tiny_denoiser("mmdit", num_classes=5, dual_attention_layers=(1,))
    inputs = make_inputs(model)
    first, second = model.transformer_blocks
    assert first.attn2 is None
    plain = run(model, inputs)
    for parameter in second.attn2.to_out[0].parameters():
        parameter.data.zero_()
    assert differ(run(model, inputs), plain)


def test_every_block_may_have_a_trunk_of_its_own(tiny_denoiser, make_inputs):
    model = tiny_denoiser("dit", conditioning="published", num_classes=5, published={"trunk_per_block": True})
    inputs = make_inputs(model)
    assert len(model.later_trunks) == len(model.transformer_blocks) - 1
    plain = run(model, inputs)
    for parameter in model.later_trunks.parameters():
        parameter.data += 0.1
    assert differ(run(model, inputs), plain)


@pytest.mark.parametrize("option", [{"norm_eps": 1e-1}, {"downscale_freq_shift": 1.0}], ids=["norm", "frequencies"])
def test_the_options_of_a_published_dit_are_used(tiny_denoiser, make_inputs, option):
    plain = tiny_denoiser("dit", conditioning="published", num_classes=5)
    other = tiny_denoiser("dit", conditioning="published", num_classes=5, published=option)
    exactly(other.state_dict(), plain.state_dict())
    inputs = make_inputs(plain)
    assert differ(run(other, inputs), run(plain, inputs))


def test_what_is_given_twice_is_an_error(sized):
    model, inputs = sized("unet")
    with pytest.raises(ValueError, match="`pooled_projections` and `text_embeds` are both given"):
        model(**inputs, added_cond_kwargs={"text_embeds": torch.zeros(2, 10), "time_ids": torch.zeros(2, 6)})
    control = null_control(2)
    inputs.pop("pooled_projections")
    with pytest.raises(ValueError, match="`control` and `added_cond_kwargs` are both given"):
        model(**{**inputs, "control": control}, added_cond_kwargs={"time_ids": torch.zeros(2, 6)})


@pytest.mark.parametrize("name", ["unet", "mdt"])
def test_caches_that_skip_blocks_are_refused_where_blocks_are_joined(tiny_denoiser, name):
    with pytest.raises(ValueError, match="joined by skip connections"):
        tiny_denoiser(name, num_classes=5).enable_cache(FirstBlockCacheConfig(threshold=0.5))


def test_an_unknown_option_is_named(fresh_denoiser):
    with pytest.raises(ValueError, match="`published` has 'eps'; it may have norm_eps, downscale_freq_shift, trunk"):
        fresh_denoiser("dit", num_classes=5, published={"eps": 1e-5})


def test_configs_with_the_options_beside_the_others_load(denoiser, make_inputs, tmp_path):
    """As written by the first version, without `control_route`."""
    denoiser.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["control_route"]
    config.pop("published", None)
    file.write_text(json.dumps(config | asdict(denoiser.published)), encoding="utf-8")
    loaded = type(denoiser).from_pretrained(tmp_path)
    assert loaded.published == denoiser.published
    inputs = make_inputs(denoiser)
    exactly(run(loaded, inputs), run(denoiser, inputs))
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert not again.keys() & asdict(denoiser.published).keys() and again["control_route"] == "norm"


WRITTEN = {  # the whole config.json of a DiT from diffusers
    "_class_name": "DiTDenoiser",
    "_diffusers_version": "0.42.1",
    "_improved_ldm_version": "0.1.0",
    "conditioning": "published",
    "control_parts": ["size", "crop", "flip"],
    "control_power": 1.0,
    "control_weight": "cosine",
    "downscale_freq_shift": 1.0,
    "hidden_size": 48,
    "in_channels": 4,
    "mlp_ratio": 4.0,
    "norm_eps": 1e-05,
    "num_attention_heads": 2,
    "num_class_tokens": 1,
    "num_classes": 5,
    "num_layers": 2,
    "num_train_timesteps": 1000,
    "out_channels": 4,
    "patch_size": 2,
    "pooled_dim": None,
    "position_extent": None,
    "qk_norm": False,
    "sample_size": 4,
    "text_dim": None,
    "trunk_per_block": True,
}


def test_a_config_of_the_first_version_loads():
    model = DiTDenoiser.from_config(WRITTEN)
    assert model.published == PublishedDiT(norm_eps=1e-5, downscale_freq_shift=1.0, trunk_per_block=True)
    assert len(model.later_trunks) == 1 and model.transformer_blocks[0].norm2.eps == 1e-5
    plain = WRITTEN | {"norm_eps": 1e-6, "downscale_freq_shift": 0.0, "trunk_per_block": False}
    assert DiTDenoiser.from_config(plain).config.published is None
