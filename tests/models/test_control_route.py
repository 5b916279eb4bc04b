"""Control as tokens that are attended to, instead of control in the adaptive norm."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.control import Control, control_tensor, null_control
from improved_ldm.conditioning.control_embedding import LevelEmbedding
from improved_ldm.models.family import DENOISERS

SEMANTIC = {"class": {"num_classes": 5, "num_class_tokens": 2}, "text": {"text_dim": 12}, "none": {}}
SIZES = st.tuples(*[st.integers(1, 4096)] * 2)
CONTROLS = st.builds(Control.of_whole_image, SIZES, SIZES, st.booleans())
SMALL = control_tensor([Control((40, 60), (0, 20), (40, 40), (32, 32))] * 2)
LARGE = control_tensor([Control.of_whole_image((80, 80), (32, 48), flip=True)] * 2)

backbones = pytest.mark.parametrize("name", DENOISERS)
cases = pytest.mark.parametrize(("name", "semantic"), list(product(DENOISERS, SEMANTIC)))


@torch.no_grad()
def run(model, inputs, **changes):
    return model(**{**inputs, **changes}).sample


def differ(first, second):
    return (first - second).abs().max() > 1e-6


def exactly(first, second):
    assert_close(first, second, rtol=0, atol=0)


@pytest.fixture
def make(tiny_denoiser):
    """Builds a denoiser with control tokens and random weights; without `trained`, the control starts at zero."""

    def build(name, semantic="class", trained=True, **config):
        model = tiny_denoiser(name, control_route="tokens", **SEMANTIC[semantic], **config)
        for module in () if trained else model.modules():
            if isinstance(module, LevelEmbedding):
                module.zero_start()
        return model

    return build


@cases
def test_the_control_reaches_the_output_by_the_tokens_alone(make, make_inputs, name, semantic):
    model = make(name, semantic)
    inputs = make_inputs(model)
    assert "control" in model.inputs and differ(run(model, inputs, control=LARGE), run(model, inputs))

    conditions = Conditioning(**{key: inputs[key] for key in model.inputs if key in inputs})
    embedding, tokens, _ = model.trunk(inputs["timestep"], conditions)
    other_embedding, other_tokens, _ = model.trunk(inputs["timestep"], conditions.with_control(LARGE))
    exactly(other_embedding, embedding)
    exactly(other_tokens[:, :-2], tokens[:, :-2])
    assert differ(other_tokens[:, -2], tokens[:, -2]) and differ(other_tokens[:, -1], tokens[:, -1])
    assert tokens.shape[1] - 2 == {"class": 2, "text": 3, "none": 0}[semantic]


@backbones
@settings(max_examples=10, deadline=None)
@given(control=CONTROLS, timestep=st.floats(0, 1000))
def test_an_untrained_control_changes_no_prediction(fresh_denoiser, tiny_denoiser, name, control, timestep):
    latents, row = torch.ones(1, 4, 4, 4), control_tensor([control])
    for build in (fresh_denoiser, tiny_denoiser):
        model = build(name, control_route="tokens", num_classes=5)
        for module in model.modules():
            if isinstance(module, LevelEmbedding):
                module.zero_start()
        inputs = {"hidden_states": latents, "timestep": timestep}
        exactly(run(model, inputs, control=row), run(model, inputs))


@pytest.mark.parametrize("name", [name for name in DENOISERS if name != "unet"])
def test_the_tokens_change_no_state_of_a_fresh_transformer(fresh_denoiser, make_inputs, name):
    norm, tokens = (fresh_denoiser(name, num_classes=5, control_route=route) for route in ("norm", "tokens"))
    shared = {key: value for key, value in norm.state_dict().items() if "control" not in key}
    tokens.load_state_dict(shared, strict=False)
    states = []
    for model in (norm, tokens):
        model.output_layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        run(model, make_inputs(model))
    exactly(states[1], states[0])


@cases
def test_a_training_step_teaches_the_control(make, make_inputs, name, semantic):
    model = make(name, semantic, trained=False)
    inputs = make_inputs(model)
    optimizer = torch.optim.Adam(model.trunk.control_embedding.parameters(), lr=0.1)
    for control in (inputs["control"], null_control(2)):
        model(**{**inputs, "control": control}).sample.square().mean().backward()
    embedding = model.trunk.control_embedding
    for part in (embedding.high_level, embedding.low_level):
        for parameter in (part.mlp.linear_2.weight, part.mlp.linear_2.bias, part.null):
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
    exactly(run(model, inputs, control=LARGE), run(model, inputs, control=SMALL))
    optimizer.step()
    assert differ(run(model, inputs, control=LARGE), run(model, inputs, control=SMALL))
    assert differ(run(model, inputs, control=null_control(2)), run(model, inputs, control=SMALL))


@cases
def test_no_control_is_the_learned_null(make, make_inputs, name, semantic):
    model = make(name, semantic)
    inputs = make_inputs(model)
    rest = {key: value for key, value in inputs.items() if key != "control"}
    null, plain = run(model, rest), run(model, inputs)
    exactly(run(model, rest, control=null_control(2)), null)
    model.trunk.control_embedding.high_level.null.data *= -1
    assert differ(run(model, rest), null)
    exactly(run(model, inputs), plain)


@backbones
def test_masked_text_is_not_read_beside_the_control(make, make_inputs, name):
    model = make(name, "text")
    inputs = make_inputs(model)
    mask, text = torch.tensor([[True, True, False]] * 2), inputs["encoder_hidden_states"].clone()
    masked = run(model, inputs, encoder_attention_mask=mask)
    text[:, 2] = 9
    assert_close(run(model, inputs, encoder_attention_mask=mask, encoder_hidden_states=text), masked)
    assert differ(run(model, inputs, encoder_attention_mask=mask, control=LARGE), masked)
    assert_close(run(model, inputs, encoder_hidden_states=inputs["encoder_hidden_states"][:, :2]), masked)


@backbones
def test_original_size_is_not_seen_in_pure_noise(make, make_inputs, name):
    model = make(name)
    inputs = make_inputs(model)
    small, large = (control_tensor([Control.of_whole_image(size, (32, 32))] * 2) for size in ((32, 32), (320, 320)))
    at_noise, at_data = torch.full((2,), 1000.0), torch.zeros(2)
    exactly(run(model, inputs, timestep=at_noise, control=small), run(model, inputs, timestep=at_noise, control=large))
    assert differ(
        run(model, inputs, timestep=at_data, control=small), run(model, inputs, timestep=at_data, control=large)
    )


@cases
def test_a_saved_model_loads_bit_for_bit(make, make_inputs, tmp_path, name, semantic):
    model = make(name, semantic)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.control_route == "tokens"
    inputs = make_inputs(model)
    exactly(run(loaded, inputs), run(model, inputs))


@backbones
def test_one_graph_is_compiled(fresh_compiler, make, make_inputs, name):
    model = make(name, "text")
    inputs = make_inputs(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(**inputs, return_dict=False)[0]
    assert_close(compiled, run(model, inputs))


@backbones
def test_a_control_in_the_norm_has_no_tensors_of_tokens(fresh_denoiser, name):
    plain, norm = (fresh_denoiser(name, num_classes=5, **config) for config in ({}, {"control_route": "norm"}))
    assert plain.config.control_route == "norm"
    assert list(plain.state_dict()) == list(norm.state_dict())
    tokens = fresh_denoiser(name, num_classes=5, control_route="tokens").state_dict()
    assert tokens.keys() - norm.state_dict().keys() == {"trunk.control_tokens.weight"}


@backbones
def test_without_parts_no_control_is_read_by_any_route(tiny_denoiser, name):
    model = tiny_denoiser(name, num_classes=5, control_route="tokens", control_parts=())
    assert model.inputs == {"class_labels"} and not model.control_inputs


@backbones
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"conditioning": "published", "control_route": "tokens"}, "it must be 'norm' in the 'published' mode"),
        ({"control_route": "film"}, "`control_route` is 'film'; it must be 'norm' or 'tokens'"),
    ],
    ids=["published", "unknown"],
)
def test_routes_that_are_not_there_are_errors(fresh_denoiser, name, config, message):
    with pytest.raises(ValueError, match=message):
        fresh_denoiser(name, num_classes=5, **config)


def test_a_trunk_per_block_has_its_control_in_the_norm(fresh_denoiser):
    with pytest.raises(ValueError, match=r"`trunk_per_block` is set with .* the `control_route` 'tokens'"):
        fresh_denoiser("dit", num_classes=5, control_route="tokens", published={"trunk_per_block": True})
