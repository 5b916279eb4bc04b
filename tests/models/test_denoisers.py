"""The contract of every denoiser, in every mode."""

import json
from dataclasses import asdict

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention as UNetAttention
from peft import LoraConfig
from torch.testing import assert_close

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.control import COLUMNS, Control, control_tensor
from improved_ldm.models.family import DENOISERS
from improved_ldm.models.unet import UNetDenoiser
from improved_ldm.seeds import uniform

LORA = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
CONDITIONS = ("encoder_hidden_states", "pooled_projections", "class_labels", "control")


@torch.no_grad()
def run(model, inputs, **changes):
    return model(**{**inputs, **changes}).sample


def differ(first, second):
    return (first - second).abs().max() > 1e-4


def exactly(first, second):
    assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(4, 4), (2, 8), (6, 4), (10, 10)])
def test_output_has_the_size_of_the_latents(denoiser, make_inputs, size):
    sample = run(denoiser, make_inputs(denoiser, size=size))
    assert sample.shape == (2, 4, *size)
    assert sample.isfinite().all()


@pytest.mark.parametrize("name", DENOISERS)
def test_output_has_the_configured_channels(tiny_denoiser, make_inputs, name):
    model = tiny_denoiser(name, num_classes=5, in_channels=3, out_channels=6)
    assert run(model, make_inputs(model)).shape == (2, 6, 4, 4)


def test_a_tuple_is_returned_on_request(denoiser, make_inputs):
    inputs = make_inputs(denoiser)
    exactly(denoiser(**inputs, return_dict=False)[0], denoiser(**inputs).sample)


@pytest.mark.parametrize("size", [(5, 7), (1, 6), (3, 3), (9, 2)])
@pytest.mark.parametrize("conditioning", ["disentangled", "published"])
def test_a_unet_takes_every_size(tiny_denoiser, make_inputs, conditioning, size):
    model = tiny_denoiser("unet", conditioning=conditioning, num_classes=5)
    assert model.patch_size == 1
    sample = run(model, make_inputs(model, size=size))
    assert sample.shape == (2, 4, *size)
    assert sample.isfinite().all()


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_reads_the_parts_of_the_control_that_it_is_made_for(tiny_denoiser, make_inputs, name):
    flips = tiny_denoiser(name, num_classes=5, control_parts=("flip",))
    assert flips.control_inputs == {"flip"}
    inputs = make_inputs(flips)
    mirrored = inputs["control"].clone()
    flip = COLUMNS.index("flip")
    mirrored[:, flip] = 1 - mirrored[:, flip]
    assert differ(run(flips, inputs, control=mirrored), run(flips, inputs))
    blind = tiny_denoiser(name, num_classes=5, control_parts=())
    assert not blind.control_inputs and "control" not in blind.inputs
    with pytest.raises(ValueError, match="`control` is given"):
        run(blind, inputs)


def test_latents_that_do_not_divide_into_patches_are_an_error(patch_denoiser, make_inputs):
    with pytest.raises(ValueError, match=r"5x5 latent pixels.*patch size 2"):
        patch_denoiser(**make_inputs(patch_denoiser, size=(5, 5)))


def test_rows_of_a_batch_do_not_mix(denoiser, make_inputs):
    inputs = make_inputs(denoiser, batch_size=3)
    batch = run(denoiser, inputs)
    for row in range(3):
        alone = run(denoiser, {name: value[row : row + 1] for name, value in inputs.items()})
        assert_close(batch[row], alone[0])


def test_a_scalar_timestep_serves_the_batch(denoiser, make_inputs):
    inputs = make_inputs(denoiser)
    each = run(denoiser, inputs, timestep=torch.tensor([300, 300]))
    exactly(run(denoiser, inputs, timestep=torch.tensor(300)), each)
    exactly(run(denoiser, inputs, timestep=300), each)


def test_every_input_that_is_read_reaches_the_output(denoiser, make_inputs):
    inputs, others = make_inputs(denoiser), make_inputs(denoiser, seed=2)
    others["timestep"] = inputs["timestep"] + 50
    if "class_labels" in inputs:
        others["class_labels"] = inputs["class_labels"] + 1
    if "control" in inputs:
        others["control"] = control_tensor([Control.of_whole_image((64, 64), (48, 32), flip=True)] * 2)
    plain = run(denoiser, inputs)
    for name, value in others.items():
        assert differ(run(denoiser, inputs, **{name: value}), plain), name


def test_conditions_that_are_not_read_are_an_error(denoiser, make_inputs):
    inputs = make_inputs(denoiser)
    for name in set(CONDITIONS) - denoiser.inputs:
        with pytest.raises(ValueError, match=name):
            denoiser(**inputs, **{name: torch.ones(2, 1, dtype=torch.long)})


def test_control_is_read_when_disentangled_and_by_published_models_with_sizes(denoiser):
    form = asdict(denoiser.published)
    sizes = form.get("size_features", 0) > 0 or form.get("size_conditions", False)
    assert ("control" in denoiser.inputs) == (denoiser.config.conditioning == "disentangled" or sizes)


def test_conditions_that_are_missing_are_null(denoiser, make_inputs, null_conditions):
    inputs = make_inputs(denoiser)
    latents = {name: inputs[name] for name in ("hidden_states", "timestep")}
    explicit = run(denoiser, {**latents, **null_conditions(denoiser)})
    assert_close(run(denoiser, latents), explicit)
    assert differ(run(denoiser, inputs), explicit)


def test_each_null_is_a_choice_of_its_row(denoiser, make_inputs, null_conditions):
    inputs, nulls = make_inputs(denoiser), null_conditions(denoiser)
    for name, null in nulls.items():
        value = inputs[name].clone()
        value[1] = null[1]
        mixed = run(denoiser, inputs, **{name: value})
        assert_close(mixed[0], run(denoiser, inputs)[0])
        assert_close(mixed[1], run(denoiser, inputs, **{name: null.expand_as(value)})[1])
        assert differ(mixed[1], run(denoiser, inputs)[1]), name


def test_semantics_stay_out_of_the_embedding_when_disentangled(disentangled, make_inputs):
    def embedding(seed):
        inputs = make_inputs(disentangled, seed=seed)
        conditions = {name: inputs[name] for name in CONDITIONS if name in inputs}
        if "class_labels" in conditions:
            conditions["class_labels"] = conditions["class_labels"] + seed
        return disentangled.trunk(inputs["timestep"], Conditioning(**conditions))[0]

    exactly(embedding(1), embedding(2))


def test_original_size_is_not_seen_in_pure_noise(disentangled, make_inputs):
    inputs = make_inputs(disentangled)
    small, large = (control_tensor([Control.of_whole_image(size, (32, 32))] * 2) for size in ((32, 32), (320, 320)))
    at_noise, at_data = torch.full((2,), 1000.0), torch.zeros(2)
    exactly(
        run(disentangled, inputs, timestep=at_noise, control=small),
        run(disentangled, inputs, timestep=at_noise, control=large),
    )
    assert differ(
        run(disentangled, inputs, timestep=at_data, control=small),
        run(disentangled, inputs, timestep=at_data, control=large),
    )


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "zero"])
def test_the_control_weight_of_the_config_is_used(tiny_denoiser, make_inputs, name, kind):
    model = tiny_denoiser(name, num_classes=5, control_weight=kind)
    inputs = {**make_inputs(model), "timestep": torch.full((2,), 500.0)}
    change = run(model, inputs, control=control_tensor([Control((80, 120), (0, 40), (80, 80), (32, 32))] * 2))
    assert differ(change, run(model, inputs)) == (kind != "zero")


def test_masked_text_is_not_read(text_denoiser, make_inputs):
    inputs = make_inputs(text_denoiser)
    inputs["encoder_attention_mask"] = torch.tensor([[True, True, False]] * 2)
    text = inputs["encoder_hidden_states"]
    masked, unmasked = text.clone(), text.clone()
    masked[:, 2], unmasked[:, 1] = 9, 9
    plain = run(text_denoiser, inputs)
    assert_close(run(text_denoiser, inputs, encoder_hidden_states=masked), plain)
    assert differ(run(text_denoiser, inputs, encoder_hidden_states=unmasked), plain)


def test_masked_text_equals_shorter_text(text_denoiser, make_inputs):
    inputs = make_inputs(text_denoiser)
    mask = torch.tensor([[True, True, False]] * 2)
    shorter = inputs["encoder_hidden_states"][:, :2]
    assert_close(
        run(text_denoiser, inputs, encoder_attention_mask=mask),
        run(text_denoiser, inputs, encoder_hidden_states=shorter),
    )


def test_a_full_mask_is_no_mask(text_denoiser, make_inputs):
    inputs = make_inputs(text_denoiser)
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert_close(run(text_denoiser, inputs, encoder_attention_mask=mask), run(text_denoiser, inputs))


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("conditioning", ["disentangled", "published"])
def test_a_fresh_denoiser_predicts_zero(fresh_denoiser, make_inputs, name, conditioning):
    model = fresh_denoiser(name, num_classes=5, conditioning=conditioning)
    exactly(run(model, make_inputs(model)), torch.zeros(2, 4, 4, 4))


def passes(model, inputs, level=0.5):
    """The arguments of the forward passes of a training step."""
    seeds = torch.arange(len(inputs["hidden_states"]))
    further = model.training_passes(inputs["hidden_states"], level, lambda count: uniform(seeds, (count,)))
    return [{**inputs, **arguments} for arguments in further]


def test_every_parameter_is_trained(denoiser, make_inputs, null_conditions):
    """Conditions and their nulls together reach every parameter, with finite gradients."""
    inputs, nulls = make_inputs(denoiser), null_conditions(denoiser)
    for given in (inputs, {**inputs, **nulls}):
        for arguments in passes(denoiser, given):
            denoiser(**arguments).sample.square().mean().backward()
    depth = len(getattr(denoiser, "transformer_blocks", ()))
    last = f"transformer_blocks.{depth - 1}.attn."
    unread = {f"{last}{name}" for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")}
    for name, parameter in denoiser.named_parameters():
        if name in unread:  # the context output of the last block
            continue
        assert parameter.grad.isfinite().all(), name
        # an equal bias of all keys does not change attention, unless keys are normalised
        assert parameter.grad.abs().max() > 0 or name.endswith(".to_k.bias"), name


def test_gradient_checkpointing_changes_no_bit(denoiser, make_inputs):
    inputs = make_inputs(denoiser)

    def loss_and_gradients():
        denoiser.zero_grad()
        loss = sum(denoiser(**arguments).sample.square().mean() for arguments in passes(denoiser, inputs))
        loss.backward()
        return loss, [parameter.grad.clone() for parameter in denoiser.parameters() if parameter.grad is not None]

    denoiser.train()
    loss, gradients = loss_and_gradients()
    denoiser.enable_gradient_checkpointing()
    assert denoiser.is_gradient_checkpointing
    checkpointed_loss, checkpointed_gradients = loss_and_gradients()
    exactly(checkpointed_loss, loss)
    exactly(checkpointed_gradients, gradients)


@pytest.mark.parametrize("conditioning", ["disentangled", "published"])
@pytest.mark.parametrize("name", DENOISERS)
def test_forward_compiles_as_one_graph(fresh_compiler, tiny_denoiser, make_inputs, name, conditioning):
    model = tiny_denoiser(name, conditioning=conditioning, num_classes=5)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = make_inputs(model)
    with torch.no_grad():
        assert_close(compiled(**inputs, return_dict=False)[0], run(model, inputs))


@pytest.mark.parametrize("name", DENOISERS)
def test_blocks_compile_as_one_graph_each(fresh_compiler, tiny_denoiser, make_inputs, name):
    model = tiny_denoiser(name, text_dim=12)
    inputs = make_inputs(model)
    inputs["encoder_attention_mask"] = torch.tensor([[True, True, False]] * 2)
    plain = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert_close(run(model, inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_close(denoiser, make_inputs, dtype):
    inputs = make_inputs(denoiser)
    single = run(denoiser, inputs)
    halves = {
        name: value.to(dtype) if name in ("hidden_states", "encoder_hidden_states", "pooled_projections") else value
        for name, value in inputs.items()
    }
    half = run(denoiser.to(dtype), halves)
    assert half.dtype == dtype
    assert_close(half.float(), single, rtol=0, atol=0.1 * single.abs().max().item())


def test_saved_weights_load_bit_for_bit(denoiser, make_inputs, tmp_path):
    denoiser.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = type(denoiser).from_pretrained(tmp_path)
    assert loaded.inputs == denoiser.inputs
    assert json.loads(loaded.to_json_string()) == json.loads(denoiser.to_json_string()) | {
        "_name_or_path": str(tmp_path)
    }
    inputs = make_inputs(denoiser)
    exactly(run(loaded, inputs), run(denoiser, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loading_in_half_precision_is_casting(denoiser, make_inputs, tmp_path, dtype):
    denoiser.save_pretrained(tmp_path)
    loaded = type(denoiser).from_pretrained(tmp_path, torch_dtype=dtype)
    inputs = {**make_inputs(denoiser), "hidden_states": torch.randn(2, 4, 4, 4, dtype=dtype)}
    exactly(run(loaded, inputs), run(denoiser.to(dtype), inputs))
    assert run(loaded, inputs).dtype == loaded.dtype == dtype


def test_lora_changes_the_output_and_round_trips(denoiser, make_inputs, tmp_path):
    inputs = make_inputs(denoiser)
    plain = run(denoiser, inputs)
    denoiser.save_pretrained(tmp_path / "base")
    denoiser.add_adapter(LORA)
    adapted = run(denoiser, inputs)
    assert differ(adapted, plain)
    denoiser.save_lora_adapter(tmp_path / "lora")
    loaded = type(denoiser).from_pretrained(tmp_path / "base")
    loaded.load_lora_adapter(tmp_path / "lora", prefix=None, use_safetensors=True)
    exactly(run(loaded, inputs), adapted)
    denoiser.disable_adapters()
    assert_close(run(denoiser, inputs), plain)


def test_lora_scale_of_the_call_is_used(denoiser, make_inputs):
    inputs = make_inputs(denoiser)
    plain = run(denoiser, inputs)
    denoiser.add_adapter(LORA)
    assert_close(run(denoiser, inputs, attention_kwargs={"scale": 0.0}), plain)
    assert differ(run(denoiser, inputs, attention_kwargs={"scale": 0.5}), run(denoiser, inputs))


def test_attention_backends_of_diffusers_are_taken(denoiser, make_inputs):
    inputs = make_inputs(denoiser)
    plain = run(denoiser, inputs)
    denoiser.set_attention_backend("_native_math")
    assert_close(run(denoiser, inputs), plain)
    denoiser.set_attention_backend("native")
    exactly(run(denoiser, inputs), plain)


def test_attention_processors_are_listed(denoiser):
    kind = UNetAttention if isinstance(denoiser, UNetDenoiser) else AttentionModuleMixin
    attentions = [module for module in denoiser.modules() if isinstance(module, kind)]
    assert len(denoiser.attn_processors) == len(attentions) > 0


def test_the_first_block_cache_of_diffusers_skips_blocks_that_hardly_change(plain_stack, make_inputs):
    inputs, evaluations = make_inputs(plain_stack), []
    plain_stack.transformer_blocks[-1].ff.register_forward_hook(lambda *_: evaluations.append(1))
    plain = run(plain_stack, inputs)
    plain_stack.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with plain_stack.cache_context("test"):
        first, second = run(plain_stack, inputs), run(plain_stack, inputs)
    assert_close(first, plain)
    assert_close(second, plain, rtol=1e-4, atol=1e-5)
    assert len(evaluations) == 2


def test_layerwise_casting_keeps_the_output_finite(denoiser, make_inputs):
    denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert run(denoiser, make_inputs(denoiser)).isfinite().all()


FIXED_POSITIONS = pytest.mark.parametrize("name", ["dit", "pixart", "mmdit"])  # mDT learns them, a UNet has none


@FIXED_POSITIONS
@pytest.mark.parametrize("factor", [2, 3])
def test_a_denser_grid_keeps_the_coordinates(tiny_denoiser, name, factor):
    model = tiny_denoiser(name, num_classes=5)
    dense = model.positions_for((2 * factor, 2 * factor)).view(2 * factor, 2 * factor, -1)
    assert_close(dense[::factor, ::factor].flatten(0, 1), model.positions, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["dit", "pixart"])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 6), (8, 2)])
def test_a_published_grid_spans_the_coordinates_on_both_sides(tiny_denoiser, name, rows, columns):
    model = tiny_denoiser(name, num_classes=5, conditioning="published")
    dense = model.positions_for((rows, columns)).view(rows, columns, -1)
    assert_close(dense[:: rows // 2, :: columns // 2].flatten(0, 1), model.positions, rtol=0, atol=1e-6)


@FIXED_POSITIONS
def test_the_extent_of_the_config_sets_the_coordinates(tiny_denoiser, name):
    wide = tiny_denoiser(name, num_classes=5, position_extent=4)
    same = tiny_denoiser(name, num_classes=5, sample_size=8)
    exactly(wide.positions_for((4, 4)), same.positions)


@FIXED_POSITIONS
def test_positions_travel_with_the_weights(tiny_denoiser, make_inputs, tmp_path, name):
    model = tiny_denoiser(name, num_classes=5)
    model.positions += 1
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    exactly(loaded.positions, model.positions)
    exactly(run(loaded, make_inputs(model)), run(model, make_inputs(model)))


CONTRADICTIONS = {
    "both_semantics": ({"num_classes": 5, "text_dim": 8}, "both set"),
    "unknown_mode": ({"num_classes": 5, "conditioning": "entangled"}, "'entangled'"),
    "unknown_weight": ({"num_classes": 5, "control_weight": "sine"}, "'sine'"),
}
PATCH_CONTRADICTIONS = {
    "heads": ({"num_classes": 5, "hidden_size": 32, "num_attention_heads": 3}, "32 must be divisible by.* 3"),
    "positions": ({"num_classes": 5, "hidden_size": 30, "num_attention_heads": 3}, "30 must be divisible by 4"),
    "patches": ({"num_classes": 5, "sample_size": 5}, "`sample_size` 5"),
}
POOLED = {"pooled_when_disentangled": ({"text_dim": 8, "pooled_dim": 8}, "pooled_dim")}
WITHOUT_TOKENS = {"text_in_no_tokens": ({"conditioning": "published", "text_dim": 8}, "`text_dim`")}
NO_SEMANTICS = {"no_semantics": ({}, "set `num_classes`, `text_dim`, or `control_route`")}
BAD_CONFIGS = {
    "unet": CONTRADICTIONS | POOLED | NO_SEMANTICS,
    "dit": CONTRADICTIONS | PATCH_CONTRADICTIONS | POOLED | WITHOUT_TOKENS,
    "mdt": CONTRADICTIONS
    | PATCH_CONTRADICTIONS
    | POOLED
    | WITHOUT_TOKENS
    | {
        "odd_encoder": ({"num_layers": 5, "num_decoder_layers": 2}, "5 - `num_decoder_layers` 2"),
        "large_decoder": ({"num_layers": 2, "num_decoder_layers": 4}, "2 - `num_decoder_layers` 4"),
        "negative_mask": ({"mask_ratio": -0.1}, "`mask_ratio` is -0.1"),
        "large_mask": ({"mask_ratio": 0.8}, "`mask_ratio` is 0.8"),
    },
    "pixart": CONTRADICTIONS
    | PATCH_CONTRADICTIONS
    | NO_SEMANTICS
    | {
        "sizes_when_disentangled": (
            {"num_classes": 5, "published": {"size_conditions": True}, "hidden_size": 48},
            "'published' mode",
        ),
        "three_sizes": (
            {"num_classes": 5, "conditioning": "published", "published": {"size_conditions": True}},
            "32.*divisible by 3",
        ),
    },
    "mmdit": CONTRADICTIONS | PATCH_CONTRADICTIONS | POOLED | NO_SEMANTICS,
}


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in DENOISERS for fault in BAD_CONFIGS[name]])
def test_contradictory_configs_are_errors(fresh_denoiser, name, fault):
    config, message = BAD_CONFIGS[name][fault]
    with pytest.raises(ValueError, match=message):
        fresh_denoiser(name, **config)


@pytest.mark.parametrize("name", ["dit", "mdt"])
def test_a_semantic_condition_is_not_needed_where_nothing_attends_to_it(tiny_denoiser, make_inputs, name):
    model = tiny_denoiser(name)
    assert model.inputs == {"control"}
    assert run(model, make_inputs(model)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("num_class_tokens", [1, 3])
def test_a_class_may_give_several_tokens(tiny_denoiser, make_inputs, name, num_class_tokens):
    model = tiny_denoiser(name, num_classes=5, num_class_tokens=num_class_tokens)
    inputs = make_inputs(model)
    assert run(model, inputs).shape == (2, 4, 4, 4)
    tokens = model.trunk(inputs["timestep"], Conditioning(class_labels=inputs["class_labels"]))[1]
    assert tokens.shape[:2] == (2, num_class_tokens)


@pytest.mark.parametrize("name", [name for name in DENOISERS if name != "mdt"])
def test_a_training_step_is_one_plain_pass(tiny_denoiser, name):
    model = tiny_denoiser(name, num_classes=5)
    assert model.training_passes(torch.zeros(2, 4, 4, 4), 0.5, lambda count: torch.rand(2, count)) == [{}]
