"""Adapters of a pipeline with tiny real components."""

import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.lora import attention_projections
from improved_ldm.models.adapters import add_text_adapter
from improved_ldm.models.family import DENOISERS

FILE = "pytorch_lora_weights.safetensors"
KINDS = {
    "alpha": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 5, "use_dora": True},
}


def draw(pipe, **arguments):
    semantic = {"prompt": "a red boot"} if pipe.takes_text else {"class_labels": 1}
    generator = torch.Generator().manual_seed(3)
    images = pipe(**semantic, **arguments, generator=generator, output_type="pt").images
    assert images.isfinite().all()
    return images


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_drawn_alike(one, other):
    """Compare images of two models with equal weights. MKL chooses the order of sums by the weights' memory addresses.

    The images are equal bit for bit if MKL_CBWR forbids this, or else up to rounding of values in [0, 1].
    """
    torch.testing.assert_close(one, other, rtol=0, atol=0 if "MKL_CBWR" in os.environ else 2e-6)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def adapt(model, adapter_name="default", **settings):
    """Adds an untrained adapter."""
    config = LoraConfig(**{"r": 4, "target_modules": attention_projections(model), **settings})
    if isinstance(model, PreTrainedModel):
        add_text_adapter(model, config, adapter_name)
    else:
        model.add_adapter(config, adapter_name)


def train(pipe, steps=2):
    """Trains the adapter of the denoiser, and of the text encoder if it has one, on noise."""
    denoiser = pipe.denoiser.train()
    trained = [p for model in (denoiser, pipe.text_encoder) if model for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.3)
    for seed in range(steps):
        noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
        conditions = {"class_labels": torch.tensor([0, 2])}
        if pipe.takes_text:
            inputs = pipe.tokenizer(["a coat", "the bag"], padding="max_length", max_length=16, return_tensors="pt")
            conditions = {"encoder_hidden_states": pipe.text_encoder(inputs.input_ids).last_hidden_state}
        prediction = denoiser(noise, torch.tensor([300, 700]), **conditions).sample
        (prediction - noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    denoiser.eval()


@pytest.fixture
def trained(class_pipeline):
    """A pipeline with one adapter, trained for two steps."""

    def make(name="dit", **settings):
        pipe = class_pipeline(name=name)
        adapt(pipe.denoiser, **settings)
        train(pipe)
        return pipe

    return make


@pytest.fixture
def saved(trained, tmp_path):
    """Folders of trained adapters."""

    def make(folder, name="dit", **settings):
        pipe = trained(name, **settings)
        pipe.save_lora_weights(tmp_path / folder, **pipe.lora_layers())
        return tmp_path / folder

    return make


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("name", DENOISERS)
def test_a_trained_adapter_loads_into_a_fresh_pipeline(class_pipeline, trained, tmp_path, name, kind):
    pipe, base = trained(name, **kind), class_pipeline(name=name)
    pipe.save_lora_weights(tmp_path, **pipe.lora_layers())
    before, plain = weights_of(base.denoiser), draw(base)
    base.load_lora_weights(tmp_path)
    assert base.get_active_adapters() == ["default_0"]
    assert_drawn_alike(draw(base), draw(pipe))
    assert (draw(base) - plain).abs().max() > 1e-4
    base.unload_lora_weights()
    assert_same(weights_of(base.denoiser), before)
    assert_same(draw(base), plain)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings[f"{base.denoiser.component}.lora_alpha"] == kind["lora_alpha"]


@pytest.mark.parametrize("encoder", ["clip_text", "t5_text", "bert_text"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_an_adapter_on_the_text_encoder_too(text_pipeline, request, tmp_path, encoder, kind):
    tokenizer, text_encoder = request.getfixturevalue(encoder)
    pipe = text_pipeline((tokenizer, copy.deepcopy(text_encoder)))
    base = text_pipeline((tokenizer, copy.deepcopy(text_encoder)))
    before, plain = weights_of(base.text_encoder), draw(base)
    for model in (pipe.denoiser, pipe.text_encoder):
        adapt(model, **kind)
    train(pipe)
    pipe.save_lora_weights(tmp_path, **pipe.lora_layers())
    base.load_lora_weights(tmp_path, adapter_name="both")
    assert_drawn_alike(draw(base), draw(pipe))
    adapted = draw(base)
    base.set_adapters("both", adapter_weights={"transformer": 1.0, "text_encoder": 0.0})
    assert (draw(base) - adapted).abs().max() > 1e-5
    base.unload_lora_weights()
    assert_same(weights_of(base.text_encoder), before)
    assert_same(draw(base), plain)


def test_two_adapters_are_mixed_by_their_weights(class_pipeline, saved):
    one, two = saved("one", r=2), saved("two", r=3, lora_alpha=1)
    pipe = class_pipeline()
    plain = draw(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    first = draw(pipe)
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters(["one", "two"], adapter_weights=[1.0, 0.5])
    assert pipe.get_active_adapters() == ["one", "two"]
    mixed = draw(pipe)
    pipe.set_adapters(["one", "two"], adapter_weights=[1.0, 0.0])
    torch.testing.assert_close(draw(pipe), first)
    assert (mixed - first).abs().max() > 1e-4
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    assert_same(draw(pipe), first)
    pipe.disable_lora()
    assert_same(draw(pipe), plain)
    pipe.enable_lora()
    assert_same(draw(pipe), first)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_fused_adapter_draws_the_same(class_pipeline, saved, name):
    pipe = class_pipeline(name=name)
    before, plain = weights_of(pipe.denoiser), draw(pipe)
    pipe.load_lora_weights(saved("adapter", name, lora_alpha=6))
    live = draw(pipe)
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe), live, rtol=0, atol=1e-5)
    assert pipe.num_fused_loras == 1
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(weights_of(pipe.denoiser), before, rtol=0, atol=1e-6)
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=1e-5)


def test_a_fused_adapter_can_be_saved_as_a_pipeline(class_pipeline, saved, tmp_path):
    pipe = class_pipeline()
    pipe.load_lora_weights(saved("adapter"))
    live = draw(pipe)
    with pytest.raises(ValueError, match=r"the pipeline has adapters, \{'transformer': \['default_0'\]\}"):
        pipe.save_pretrained(tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()
    pipe.fuse_lora()
    pipe.unload_lora_weights(keep_fused=True)
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = ImprovedLDMPipeline.from_pretrained(tmp_path / "pipeline")
    torch.testing.assert_close(draw(loaded), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_hotswap_puts_an_adapter_of_another_rank_in_place(class_pipeline, saved, name):
    one, two = saved("one", name, r=2), saved("two", name, r=4, lora_alpha=9)
    pipe, fresh = class_pipeline(name=name), class_pipeline(name=name)
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(one, adapter_name="style")
    first = draw(pipe)
    pipe.load_lora_weights(two, adapter_name="style", hotswap=True)
    fresh.load_lora_weights(two)
    torch.testing.assert_close(draw(pipe), draw(fresh))
    assert (draw(pipe) - first).abs().max() > 1e-4
    assert pipe.get_active_adapters() == ["style"]


@pytest.mark.parametrize("place", ["folder", "file"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_an_adapter_of_peft_loads(class_pipeline, tmp_path, name, kind, place):
    denoiser = class_pipeline(name=name).denoiser
    config = LoraConfig(target_modules=attention_projections(denoiser), init_lora_weights=False, **kind)
    wrapped = get_peft_model(denoiser, config)
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    pipe, expected = class_pipeline(name=name), class_pipeline(name=name)
    pipe.load_lora_weights(tmp_path if place == "folder" else tmp_path / "adapter_model.safetensors")
    expected.denoiser = wrapped.get_base_model()  # including the layers of the adapter
    assert_drawn_alike(draw(pipe), draw(expected))


def test_tensors_load_without_a_file(class_pipeline, saved):
    folder, pipe, other = saved("adapter", r=4, lora_alpha=4), class_pipeline(), class_pipeline()
    pipe.load_lora_weights(load_file(folder / "pytorch_lora_weights.safetensors"))
    other.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    assert_drawn_alike(draw(pipe), draw(other))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("unet", {}, r"find no layer of their shape, such as unet\.\S+lora_A\.weight \(4, \d+\)"),
        (
            "dit",
            {"hidden_size": 64},
            r"such as transformer\.transformer_blocks\.0\.attn1\.\S+ \(4, 64\).*\(rank, 32\)",
        ),
        ("mdt", {}, "expected are keys such as transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"),
    ],
    ids=["component", "width", "backbone"],
)
def test_an_adapter_of_another_model_is_an_error(class_pipeline, tmp_path, name, settings, message):
    other, pipe = class_pipeline(name=name, **settings), class_pipeline()
    adapt(other.denoiser)
    other.save_lora_weights(tmp_path, **other.lora_layers())
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(tmp_path)
    assert not pipe.get_list_adapters()


def test_keys_of_a_wrong_prefix_are_an_error(class_pipeline, saved, tmp_path):
    tensors = load_file(saved("adapter") / "pytorch_lora_weights.safetensors")
    wrong = {name.replace("transformer.", "model.diffusion_model."): value for name, value in tensors.items()}
    with pytest.raises(ValueError, match=r"does not fit this pipeline with its DiTDenoiser.*model\.diffusion_model"):
        class_pipeline().load_lora_weights(wrong)
    with pytest.raises(ValueError, match="0 of its 0 keys"):
        class_pipeline().load_lora_weights({})


def test_pickles_are_refused(class_pipeline, tmp_path):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    pipe = class_pipeline()
    for source, name in (
        (tmp_path, None),
        (tmp_path, "pytorch_lora_weights.bin"),
        (tmp_path / "pytorch_lora_weights.bin", None),
        ("someone/adapter", "pytorch_lora_weights.bin"),
    ):
        with pytest.raises(ValueError, match="safetensors file"):
            pipe.load_lora_weights(source, weight_name=name)


def test_settings_are_always_saved(class_pipeline, tmp_path):
    pipe = class_pipeline()
    adapt(pipe.denoiser)
    layers = pipe.lora_layers()["transformer_lora_layers"]
    with pytest.raises(ValueError, match="is given without `transformer_lora_adapter_metadata`"):
        ImprovedLDMPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    with pytest.raises(ValueError, match="no layers are given"):
        ImprovedLDMPipeline.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match=r"`adapter_name` is 'style'; there are \{'transformer': \['default'\]\}"):
        pipe.lora_layers("style")


def test_tensors_named_by_peft_need_their_settings(class_pipeline, saved):
    tensors = load_file(saved("adapter") / "pytorch_lora_weights.safetensors")
    named = {name.replace("transformer.", "base_model.model."): value for name, value in tensors.items()}
    with pytest.raises(ValueError, match="load the folder, which has the settings"):
        class_pipeline().load_lora_weights(named)


def trainable(pipe):
    """Whether each parameter requires gradients, by component and parameter."""
    models = {"denoiser": pipe.denoiser, "text_encoder": pipe.text_encoder}
    return {
        f"{component}.{name}": parameter.requires_grad
        for component, model in models.items()
        if model is not None
        for name, parameter in model.named_parameters()
    }


@pytest.fixture
def adapter_on_both(text_pipeline, clip_text, tmp_path):
    """The folder of an adapter on a denoiser and on a text encoder."""
    tokenizer, text_encoder = clip_text
    pipe = text_pipeline((tokenizer, copy.deepcopy(text_encoder)))
    for model in (pipe.denoiser, pipe.text_encoder):
        adapt(model, lora_alpha=9)
    train(pipe)
    pipe.save_lora_weights(tmp_path / "both", **pipe.lora_layers())
    return tmp_path / "both"


@pytest.fixture
def partly_frozen(text_pipeline, clip_text):
    """A pipeline in which every third parameter is frozen."""
    tokenizer, text_encoder = clip_text
    pipe = text_pipeline((tokenizer, copy.deepcopy(text_encoder)))
    for model in (pipe.denoiser, pipe.text_encoder):
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 3 > 0)
    return pipe


def load_and_unload(pipe, folder):
    pipe.load_lora_weights(folder)
    pipe.unload_lora_weights()


def load_twice_and_unload(pipe, folder):
    pipe.load_lora_weights(folder, adapter_name="one")
    pipe.load_lora_weights(folder, adapter_name="two")
    pipe.unload_lora_weights()


def unload_and_load_again(pipe, folder):
    load_and_unload(pipe, folder)
    load_and_unload(pipe, folder)


def delete_one_after_the_other(pipe, folder):
    pipe.load_lora_weights(folder, adapter_name="one")
    pipe.load_lora_weights(folder, adapter_name="two")
    pipe.delete_adapters("one")
    assert pipe.get_list_adapters() == {"transformer": ["two"], "text_encoder": ["two"]}
    pipe.delete_adapters(["two"])


def disable_and_delete(pipe, folder):
    pipe.load_lora_weights(folder, adapter_name="one")
    pipe.disable_lora()
    pipe.enable_lora()
    pipe.set_adapters("one", 0.5)
    pipe.delete_adapters("one")


def hotswap_and_unload(pipe, folder):
    denoiser_only = {k: v for k, v in load_file(folder / FILE).items() if k.startswith("transformer.")}
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(denoiser_only, adapter_name="one")
    pipe.load_lora_weights(denoiser_only, adapter_name="one", hotswap=True)
    pipe.unload_lora_weights()


def add_and_unload(pipe, folder):
    adapt(pipe.denoiser)
    adapt(pipe.text_encoder)
    pipe.unload_lora_weights()


def fail_to_load(pipe, folder):
    with pytest.raises(ValueError, match="its file must have the settings"):  # after the denoiser's part is loaded
        pipe.load_lora_weights(load_file(folder / FILE))


def fail_to_add(pipe, folder):
    for model in (pipe.denoiser, pipe.text_encoder):
        with pytest.raises(ValueError, match=r"(?i)target.*modules"):
            adapt(model, target_modules=["nowhere"])


@pytest.mark.parametrize(
    "change",
    [
        load_and_unload,
        load_twice_and_unload,
        unload_and_load_again,
        delete_one_after_the_other,
        disable_and_delete,
        hotswap_and_unload,
        add_and_unload,
        fail_to_load,
        fail_to_add,
    ],
    ids=lambda change: change.__name__,
)
def test_without_adapters_the_models_are_as_before(partly_frozen, adapter_on_both, change):
    pipe = partly_frozen
    flags, plain = trainable(pipe), draw(pipe)
    weights = [weights_of(model) for model in (pipe.denoiser, pipe.text_encoder)]
    change(pipe, adapter_on_both)
    assert trainable(pipe) == flags
    assert_same([weights_of(model) for model in (pipe.denoiser, pipe.text_encoder)], weights)
    assert_same(draw(pipe), plain)
    assert not pipe.get_list_adapters()


def test_a_fused_adapter_leaves_what_is_trained(partly_frozen, adapter_on_both):
    flags = trainable(partly_frozen)
    partly_frozen.load_lora_weights(adapter_on_both)
    live = draw(partly_frozen)
    partly_frozen.fuse_lora()
    partly_frozen.unload_lora_weights(keep_fused=True)
    assert trainable(partly_frozen) == flags
    torch.testing.assert_close(draw(partly_frozen), live, rtol=0, atol=1e-5)


def test_a_failure_leaves_the_adapters_that_are_there(partly_frozen, adapter_on_both):
    pipe = partly_frozen
    for name in ("one", "two"):
        pipe.load_lora_weights(adapter_on_both, adapter_name=name)
    pipe.set_adapters(["one", "two"], [0.5, 0.7])
    flags, mixed = trainable(pipe), draw(pipe)
    fail_to_load(pipe, adapter_on_both)
    fail_to_add(pipe, adapter_on_both)
    with pytest.raises(ValueError, match="one"):
        pipe.load_lora_weights(adapter_on_both, adapter_name="one")
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"], "text_encoder": ["one", "two"]}
    assert pipe.get_active_adapters() == ["one", "two"]
    assert trainable(pipe) == flags
    assert_same(draw(pipe), mixed)


def test_a_pipeline_without_its_last_adapter_can_be_saved(partly_frozen, adapter_on_both, tmp_path):
    plain = draw(partly_frozen)
    partly_frozen.load_lora_weights(adapter_on_both, adapter_name="one")
    partly_frozen.delete_adapters("one")
    partly_frozen.save_pretrained(tmp_path / "pipeline")
    assert_drawn_alike(draw(ImprovedLDMPipeline.from_pretrained(tmp_path / "pipeline")), plain)


def test_a_name_of_the_text_encoder_is_given_once(partly_frozen, adapter_on_both):
    adapt(partly_frozen.text_encoder, "style")
    with pytest.raises(ValueError, match="`adapter_name` is 'style', which is taken"):
        adapt(partly_frozen.text_encoder, "style")


def test_adapters_get_names_that_no_component_has(partly_frozen, adapter_on_both, tmp_path):
    pipe = partly_frozen
    pipe.load_lora_weights(adapter_on_both)
    layers = pipe.lora_layers("default_0")
    text_only = {key: value for key, value in layers.items() if key.startswith("text_encoder")}
    pipe.save_lora_weights(tmp_path / "text", **text_only)
    pipe.unload_lora_weights()
    for _ in range(3):
        pipe.load_lora_weights(tmp_path / "text")
    pipe.delete_adapters("default_1")
    pipe.load_lora_weights(adapter_on_both)
    names = {"text_encoder": ["default_0", "default_2", "default_3"], "transformer": ["default_3"]}
    assert pipe.get_list_adapters() == names


def test_tensors_that_find_no_place_in_the_text_encoder_are_an_error(clip_text):
    model = copy.deepcopy(clip_text[1])
    adapt(model)
    tensors, settings = get_peft_model_state_dict(model), model.peft_config["default"]
    moved = {f"elsewhere.{name}": value for name, value in tensors.items()}
    fresh = copy.deepcopy(clip_text[1])
    with pytest.raises(ValueError, match=r"^peft \d.* with transformers \d.* does not load .*elsewhere"):
        add_text_adapter(fresh, settings, "style", moved)
    assert not hasattr(fresh, "peft_config") and all(value.requires_grad for value in fresh.parameters())
