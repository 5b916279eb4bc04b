"""The contract that every denoiser keeps, in every mode."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention import AttentionModuleMixin
from peft import LoraConfig
from torch.testing import assert_close

from improved_ldm.conditioning.control import Control, control_tensor
from improved_ldm.models.presets import DENOISERS

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


def test_output_has_the_configured_channels(tiny_denoiser, make_inputs):
    model = tiny_denoiser(num_classes=5, in_channels=3, out_channels=6)
    assert run(model, make_inputs(model)).shape == (2, 6, 4, 4)


def test_a_tuple_is_returned_on_request(denoiser, make_inputs):
    inputs = make_inputs(denoiser)
    exactly(denoiser(**inputs, return_dict=False)[0], denoiser(**inputs).sample)


def test_latents_that_do_not_divide_into_patches_are_an_error(denoiser, make_inputs):
    with pytest.raises(ValueError, match=r"5x5 latent pixels.*patch size 2"):
        denoiser(**make_inputs(denoiser, size=(5, 5)))


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
        others["control"] = control_tensor([Control.of_whole_image((64, 64), (32, 32), flip=True)] * 2)
    plain = run(denoiser, inputs)
    for name, value in others.items():
        assert differ(run(denoiser, inputs, **{name: value}), plain), name


def test_conditions_that_are_not_read_are_an_error(denoiser, make_inputs):
    inputs = make_inputs(denoiser)
    for name in set(CONDITIONS) - denoiser.inputs:
        with pytest.raises(ValueError, match=name):
            denoiser(**inputs, **{name: torch.ones(2, 1, dtype=torch.long)})


def test_only_the_disentangled_mode_reads_control(denoiser):
    assert ("control" in denoiser.inputs) == (denoiser.config.conditioning == "disentangled")


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
        conditions = {name: inputs.get(name) for name in (*CONDITIONS, "encoder_attention_mask")}
        if conditions["class_labels"] is not None:
            conditions["class_labels"] = conditions["class_labels"] + seed
        return disentangled.trunk(inputs["hidden_states"], inputs["timestep"], **conditions)[0]

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


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "zero"])
def test_the_control_weight_of_the_config_is_used(tiny_denoiser, make_inputs, kind):
    model = tiny_denoiser(num_classes=5, control_weight=kind)
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


def test_a_fresh_denoiser_predicts_zero():
    for cls in DENOISERS.values():
        model = cls(sample_size=4, hidden_size=32, num_layers=1, num_attention_heads=2, num_classes=5)
        sample = model(torch.randn(2, 4, 4, 4), torch.tensor([1, 999])).sample
        exactly(sample, torch.zeros(2, 4, 4, 4))


def test_every_parameter_is_trained(denoiser, make_inputs, null_conditions):
    """Conditions and their nulls together reach every parameter, with finite gradients."""
    inputs, nulls = make_inputs(denoiser), null_conditions(denoiser)
    loss = denoiser(**inputs).sample.square().mean() + denoiser(**{**inputs, **nulls}).sample.square().mean()
    loss.backward()
    last = f"transformer_blocks.{denoiser.config.num_layers - 1}.attn."
    unread = {f"{last}{name}" for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")}
    for name, parameter in denoiser.named_parameters():
        if name in unread:  # the context that leaves the last block
            continue
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_bit(denoiser, make_inputs):
    inputs = make_inputs(denoiser)

    def loss_and_gradients():
        denoiser.zero_grad()
        loss = denoiser(**inputs).sample.square().mean()
        loss.backward()
        return loss, [parameter.grad.clone() for parameter in denoiser.parameters() if parameter.grad is not None]

    denoiser.train()
    loss, gradients = loss_and_gradients()
    denoiser.enable_gradient_checkpointing()
    assert denoiser.is_gradient_checkpointing
    checkpointed_loss, checkpointed_gradients = loss_and_gradients()
    exactly(checkpointed_loss, loss)
    exactly(checkpointed_gradients, gradients)


def test_forward_compiles_as_one_graph(disentangled, make_inputs):
    inputs = make_inputs(disentangled)
    compiled = torch.compile(disentangled, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(compiled(**inputs, return_dict=False)[0], run(disentangled, inputs))
    torch.compiler.reset()


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
    assert dict(loaded.config)["hidden_size"] == 32 and loaded.inputs == denoiser.inputs
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
    attentions = [module for module in denoiser.modules() if isinstance(module, AttentionModuleMixin)]
    assert len(denoiser.attn_processors) == len(attentions) > 0


def test_the_first_block_cache_of_diffusers_skips_blocks_that_hardly_change(denoiser, make_inputs):
    inputs, evaluations = make_inputs(denoiser), []
    denoiser.transformer_blocks[-1].ff.register_forward_hook(lambda *_: evaluations.append(1))
    plain = run(denoiser, inputs)
    denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with denoiser.cache_context("test"):
        first, second = run(denoiser, inputs), run(denoiser, inputs)
    assert_close(first, plain)
    assert_close(second, plain, rtol=1e-4, atol=1e-5)
    assert len(evaluations) == 2


def test_layerwise_casting_keeps_the_output_finite(denoiser, make_inputs):
    denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert run(denoiser, make_inputs(denoiser)).isfinite().all()


def test_a_denser_grid_keeps_the_coordinates(tiny_denoiser):
    model = tiny_denoiser(num_classes=5)
    dense = model.positions_for((4, 4)).view(4, 4, -1)
    assert_close(dense[::2, ::2].flatten(0, 1), model.positions, rtol=0, atol=1e-6)


def test_the_extent_of_the_config_sets_the_coordinates(tiny_denoiser):
    wide = tiny_denoiser(num_classes=5, position_extent=4)
    same = tiny_denoiser(num_classes=5, sample_size=8)
    exactly(wide.positions_for((4, 4)), same.positions)


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_classes": 5, "hidden_size": 32, "num_attention_heads": 3}, "32 must be divisible by.* 3"),
        ({"num_classes": 5, "hidden_size": 30, "num_attention_heads": 3}, "30 must be divisible by 4"),
        ({"num_classes": 5, "sample_size": 5}, "sample_size"),
        ({"num_classes": 5, "text_dim": 8}, "both set"),
        ({"text_dim": 8, "pooled_dim": 8}, "pooled_dim"),
        ({"num_classes": 5, "conditioning": "entangled"}, "'entangled'"),
        ({"num_classes": 5, "control_weight": "sine"}, "'sine'"),
    ],
)
def test_contradictory_configs_are_errors(tiny_denoiser, name, config, message):
    with pytest.raises(ValueError, match=message):
        tiny_denoiser(name, **config)


def test_published_dit_has_no_text_tokens(tiny_denoiser):
    with pytest.raises(ValueError, match="text_dim"):
        tiny_denoiser("dit", conditioning="published", text_dim=8)


def test_mmdit_needs_a_context(tiny_denoiser):
    with pytest.raises(ValueError, match="context"):
        tiny_denoiser("mmdit")


def test_dit_runs_without_a_semantic_condition(tiny_denoiser, make_inputs):
    model = tiny_denoiser("dit")
    assert model.inputs == {"control"}
    assert run(model, make_inputs(model)).shape == (2, 4, 4, 4)


def test_a_class_may_give_several_tokens(tiny_denoiser, make_inputs):
    for name in DENOISERS:
        model = tiny_denoiser(name, num_classes=5, num_class_tokens=3)
        assert run(model, make_inputs(model)).shape == (2, 4, 4, 4)
