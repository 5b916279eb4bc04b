"""Adapters that are incomplete, damaged or do not fit are refused before loading; the pipeline stays as it is."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from improved_ldm.models.family import DENOISERS
from tests.test_lora import adapt

KEY = "lora_adapter_metadata"


def state_of(pipe):
    """Everything that a failed load must not change: tensors, trainable parameters, and adapters with their scales."""
    models = [model for model in (pipe.denoiser, pipe.text_encoder) if model is not None]
    return {
        "tensors": [{name: value.clone() for name, value in model.state_dict().items()} for model in models],
        "trained": [[parameter.requires_grad for parameter in model.parameters()] for model in models],
        "modules": [[(name, type(module)) for name, module in model.named_modules()] for model in models],
        "adapters": pipe.get_list_adapters(),
        "active": pipe.get_active_adapters(),
        "scales": [dict(getattr(module, "scaling", {})) for model in models for module in model.modules()],
        "attributes": [sorted(vars(model)) for model in models],
    }


def assert_as_before(pipe, before):
    after = state_of(pipe)
    torch.testing.assert_close(after["tensors"], before["tensors"], rtol=0, atol=0)
    assert {**after, "tensors": None} == {**before, "tensors": None}


@pytest.fixture
def text_pipe(text_pipeline, clip_text):
    def build(name="dit"):
        return text_pipeline((clip_text[0], copy.deepcopy(clip_text[1])), name=name)

    return build


@pytest.fixture
def adapter(text_pipe, tmp_path):
    """Tensors and settings of an adapter on both components, as in a file."""

    def make(name="dit", **settings):
        pipe = text_pipe(name)
        for model in (pipe.denoiser, pipe.text_encoder):
            adapt(model, lora_alpha=8, **settings)
        pipe.save_lora_weights(tmp_path / "adapter")
        with safe_open(tmp_path / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()[KEY])

    return make


def last(tensors, ending, component=""):
    return [key for key in tensors if key.endswith(ending) and key.startswith(component)][-1]


def without(ending, component=""):
    return lambda tensors, settings: tensors.pop(last(tensors, ending, component))


def replaced(ending, change, component=""):
    def damage(tensors, settings):
        key = last(tensors, ending, component)
        tensors[key] = change(tensors[key])

    return damage


def without_layer(component):
    def damage(tensors, settings):
        layer = last(tensors, "lora_A.weight", component).removesuffix("lora_A.weight")
        for key in [key for key in tensors if key.startswith(layer)]:
            tensors.pop(key)

    return damage


def moved(tensors, settings):
    for key in list(tensors):
        tensors[key.replace("text_encoder.", "text_encoder_2.")] = tensors.pop(key)


def setting(name, value):
    return lambda tensors, settings: settings.update({name: value})


def drop_settings(component):
    def damage(tensors, settings):
        for key in [key for key in settings if key.startswith(component)]:
            settings.pop(key)

    return damage


def drop_tensors(component):
    def damage(tensors, settings):
        for key in [key for key in tensors if key.startswith(component)]:
            tensors.pop(key)

    return damage


DAMAGES = {
    "no-up": (without("lora_B.weight", "transformer"), "lack a part, such as .* without lora_B"),
    "no-down": (without("lora_A.weight", "transformer"), "lack a part, such as .* without lora_A"),
    "no-up-text": (without("lora_B.weight", "text_encoder"), "on the text_encoder lack a part"),
    "no-layer": (without_layer("transformer"), "its settings name .* of which 1 have no tensors"),
    "no-layer-text": (without_layer("text_encoder"), "its settings name .* of which 1 have no tensors"),
    "wide-up": (replaced("lora_B.weight", lambda value: value.repeat(2, 1)), "1 of its .* find no layer"),
    "wide-down": (replaced("lora_A.weight", lambda value: value[:, 1:]), "1 of its .* find no layer"),
    "wide-text": (replaced("lora_B.weight", lambda value: value[1:], "text_encoder"), r"such as text_encoder\."),
    "transposed": (replaced("lora_A.weight", lambda value: value.T), "find no layer of their shape"),
    "flat": (replaced("lora_A.weight", lambda value: value.flatten()), "find no layer of their shape"),
    "scalar": (replaced("lora_B.weight", lambda value: value.sum()), "find no layer of their shape"),
    "empty": (replaced("lora_A.weight", lambda value: value[:0]), "find no layer of their shape"),
    "ranks": (replaced("lora_B.weight", lambda value: value[:, 1:]), "differ in rank"),
    "both-ranks": (
        lambda t, s: [t.update({k: v[1:] if "lora_A" in k else v[:, 1:]}) for k, v in t.items()],
        "give .* the rank 4; its tensors have 3",
    ),
    "integers": (replaced("lora_A.weight", lambda value: value.int()), "1 of them are integers"),
    "component": (moved, r"such as text_encoder_2\."),
    "unknown-part": (lambda t, s: t.update({"transformer.x.lora_mid.weight": torch.zeros(2, 2)}), "1 of its"),
    "magnitude": (
        lambda t, s: t.update({last(t, "lora_A.weight", "text")[:-13] + "lora_magnitude_vector": torch.ones(96)}),
        "`use_dora` is false",
    ),
    "no-settings": (drop_settings("transformer"), "it has no settings for the transformer"),
    "no-settings-text": (drop_settings("text_encoder"), "it has no settings for the text_encoder"),
    "no-tensors-text": (drop_tensors("text_encoder"), "it has no tensors for the text_encoder"),
    "dora": (setting("transformer.use_dora", True), "without lora_magnitude_vector"),
    "unknown-setting": (setting("transformer.rang", 3), "are not those of LoRA.*rang"),
    "kind": (setting("text_encoder.peft_type", "LOHA"), "of the kind 'LOHA'"),
    "rank-0": (setting("transformer.r", 0), "`r` .*positive"),
    "rank-text": (setting("transformer.r", "4"), "`r` .*4"),
    "alpha-text": (setting("text_encoder.lora_alpha", "8"), "`lora_alpha` is '8'"),
    "alpha-nan": (setting("text_encoder.lora_alpha", float("nan")), "`lora_alpha` is nan"),
    "other-rank": (setting("transformer.r", 2), "the rank 2; its tensors have 4"),
    "modules": (setting("transformer.modules_to_save", ["proj"]), "`modules_to_save` is"),
    "start": (setting("transformer.init_lora_weights", "pissa"), "`init_lora_weights` is 'pissa'"),
}


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-another"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_leaves_the_pipeline_as_it_was(text_pipe, adapter, tmp_path, damage, beside):
    change, message = DAMAGES[damage]
    pipe, (tensors, settings) = text_pipe(), adapter()
    if beside:
        pipe.load_lora_weights(tmp_path / "adapter", adapter_name="other")
        pipe.set_adapters("other", 0.5)
    for index, parameter in enumerate(pipe.denoiser.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    before = state_of(pipe)
    change(tensors, settings)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, tmp_path / "damaged.safetensors", metadata={KEY: json.dumps(settings)})
    with pytest.raises(ValueError, match=message) as error:
        pipe.load_lora_weights(tmp_path / "damaged.safetensors")
    assert "\n" not in str(error.value)
    assert_as_before(pipe, before)


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("half", ["lora_A.weight", "lora_B.weight"])
def test_half_an_adapter_is_refused_on_every_backbone(text_pipe, adapter, name, half):
    pipe, (tensors, _) = text_pipe(name), adapter(name)
    tensors = {key: value for key, value in tensors.items() if not key.startswith("text_encoder")}
    tensors.pop(last(tensors, half))
    before = state_of(pipe)
    with pytest.raises(ValueError, match=f"1 of its .* lack a part, such as .* without {half}"):
        pipe.load_lora_weights(tensors)
    assert_as_before(pipe, before)


@pytest.mark.parametrize("adapter_name", ["", "a.b", "pop", 3])
def test_names_that_no_adapter_can_have(text_pipe, adapter, tmp_path, adapter_name):
    pipe = text_pipe()
    adapter()
    with pytest.raises(ValueError, match="`adapter_name` is"):
        pipe.load_lora_weights(tmp_path / "adapter", adapter_name=adapter_name)
    assert not pipe.get_list_adapters()


@pytest.mark.parametrize("place", ["denoiser", "text_encoder"])
def test_an_adapter_that_would_change_the_weights_under_it_is_not_added(text_pipe, place):
    pipe = text_pipe()
    before = state_of(pipe)
    with pytest.raises(ValueError, match="`init_lora_weights` is 'pissa', which changes the model's own weights"):
        adapt(getattr(pipe, place), init_lora_weights="pissa")
    assert_as_before(pipe, before)


def test_a_hotswap_that_fails_keeps_the_loaded_adapter(text_pipe, adapter, tmp_path):
    pipe, (tensors, _) = text_pipe(), adapter()
    tensors = {key: value for key, value in tensors.items() if not key.startswith("text_encoder")}
    layer = last(tensors, "lora_A.weight").removesuffix("lora_A.weight")
    fewer = {key: value for key, value in tensors.items() if not key.startswith(layer)}
    pipe.load_lora_weights(fewer, adapter_name="style")
    before = state_of(pipe)
    for source, name, message in (
        (tensors, "style", "has no .*load the adapter separately"),
        (fewer, "other", "`adapter_names` has 'other'; loaded adapters: 'style'"),
        (adapter(use_dora=True)[0], "style", "."),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(source, adapter_name=name, hotswap=True)
    assert_as_before(pipe, before)
