"""Adapters with the key names of kohya and ComfyUI, written and read again."""

import copy

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.adapters.formats import read_adapter
from improved_ldm.models.adapters import adaptable_layers, attention_projections
from improved_ldm.models.family import DENOISERS
from tests.test_lora import FILE, adapt, assert_drawn_alike, assert_same, draw, train, weights_of

KINDS = {
    "alpha": {"r": 3, "lora_alpha": 7},
    "fraction": {"r": 2, "lora_alpha": 0.3},
    "ranks": {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_q": 2, "q_proj": 1}, "alpha_pattern": {"to_k": 5}},
    "dora": {"r": 2, "lora_alpha": 5, "use_dora": True},
}


def scales(pipe, adapter_name):
    """The strength of an adapter on each layer."""
    return {
        name: module.scaling[adapter_name]
        for name, module in pipe.denoiser.named_modules()
        if adapter_name in getattr(module, "scaling", {})
    }


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("name", DENOISERS)
def test_kohyas_naming_round_trips_exactly(class_pipeline, tmp_path, name, kind):
    pipe, fresh = class_pipeline(name=name), class_pipeline(name=name)
    before = weights_of(fresh.denoiser)
    layers = list(adaptable_layers(pipe.denoiser))  # including convolutions
    adapt(pipe.denoiser, target_modules=layers, init_lora_weights=False, **kind)
    pipe.save_lora_weights(tmp_path, format="kohya")
    saved = load_file(tmp_path / FILE)
    endings = {key.partition(".")[2] for key in saved}
    assert endings == {"lora_down.weight", "lora_up.weight", "alpha", *["dora_scale"] * ("use_dora" in kind)}
    assert all(key.startswith("lora_unet_") and key.count(".") <= 2 for key in saved)
    fresh.load_lora_weights(tmp_path, adapter_name="again")
    assert_same(
        get_peft_model_state_dict(fresh.denoiser, adapter_name="again"), get_peft_model_state_dict(pipe.denoiser)
    )
    assert scales(fresh, "again") == scales(pipe, "default")
    assert_drawn_alike(draw(fresh), draw(pipe))
    fresh.save_lora_weights(tmp_path / "again", format="kohya")
    assert_same(load_file(tmp_path / "again" / FILE), saved)
    fresh.save_lora_weights(tmp_path / "diffusers")
    other = class_pipeline(name=name)
    other.load_lora_weights(tmp_path / "diffusers")
    assert_drawn_alike(draw(other), draw(pipe))
    fresh.unload_lora_weights()
    assert_same(weights_of(fresh.denoiser), before)


def test_a_rank_stabilised_adapter_keeps_its_strength(class_pipeline, tmp_path):
    pipe, fresh = class_pipeline(), class_pipeline()
    adapt(pipe.denoiser, r=3, lora_alpha=2, use_rslora=True)
    train(pipe)
    pipe.save_lora_weights(tmp_path, format="kohya")
    fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(draw(fresh), draw(pipe), rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", ["clip_text", "t5_text", "bert_text"])
def test_the_text_encoder_has_names_of_its_own(text_pipeline, request, tmp_path, encoder):
    tokenizer, text_encoder = request.getfixturevalue(encoder)
    pipe, fresh = (text_pipeline((tokenizer, copy.deepcopy(text_encoder))) for _ in range(2))
    for model in (pipe.denoiser, pipe.text_encoder):
        adapt(model, r=3, lora_alpha=7)
    train(pipe)
    pipe.save_lora_weights(tmp_path, format="kohya")
    assert {key[:8] for key in load_file(tmp_path / FILE)} == {"lora_une", "lora_te_"}
    fresh.load_lora_weights(tmp_path)
    assert_drawn_alike(draw(fresh), draw(pipe))


def test_clips_layers_are_found_under_the_names_of_other_releases(text_pipeline, clip_text):
    pipes = [text_pipeline((clip_text[0], copy.deepcopy(clip_text[1]))) for _ in range(3)]
    layer = attention_projections(pipes[0].text_encoder)[0]
    module = pipes[0].text_encoder.get_submodule(layer)
    halves = {"down": torch.randn(2, module.in_features), "up": torch.randn(module.out_features, 2)}
    stem = layer.removeprefix("text_model.").replace(".", "_")
    for pipe, head in zip(pipes, ("lora_te_text_model_", "lora_te_", "lora_te1_text_model_"), strict=True):
        pipe.load_lora_weights({f"{head}{stem}.lora_{half}.weight": value for half, value in halves.items()})
    first, *others = (draw(pipe) for pipe in pipes)
    for other in others:
        assert_drawn_alike(other, first)


@pytest.mark.parametrize("halves", [("lora_A", "lora_B"), ("lora_down", "lora_up")], ids="-".join)
@pytest.mark.parametrize("name", DENOISERS)
def test_comfyuis_naming_loads(class_pipeline, tmp_path, name, halves):
    pipe, fresh, plain = (class_pipeline(name=name) for _ in range(3))
    adapt(pipe.denoiser, r=3, lora_alpha=7)
    train(pipe)
    tensors = {}
    for key, value in get_peft_model_state_dict(pipe.denoiser).items():
        key = key.replace("lora_A", halves[0]).replace("lora_B", halves[1])
        tensors[f"diffusion_model.{key}"] = value.contiguous()
        tensors[f"diffusion_model.{key.partition('.lora_')[0]}.alpha"] = torch.tensor(7.0)
    save_file(tensors, tmp_path / "comfy.safetensors")
    fresh.load_lora_weights(tmp_path)
    assert_drawn_alike(draw(fresh), draw(pipe))
    # without alpha, the rank is used
    plain.load_lora_weights({key: value for key, value in tensors.items() if not key.endswith("alpha")})
    assert set(scales(plain, "default_0").values()) == {1.0}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, stem: tensors.pop(f"{stem}.lora_up.weight"), "lack a part, such as .* without lora_B"),
        (lambda tensors, stem: tensors.pop(f"{stem}.lora_down.weight"), "lack a part, such as .* without lora_A"),
        (lambda tensors, stem: tensors.update({f"{stem}.alpha": torch.tensor(float("nan"))}), "`.alpha` of .* is nan"),
        (lambda tensors, stem: tensors.update({f"{stem}.alpha": torch.ones(2)}), r"find no layer .*\.alpha \(2,\)"),
        (lambda tensors, stem: tensors.update({f"{stem}.lora_mid.weight": torch.ones(2, 2)}), r"\.lora_mid\.weight"),
        (lambda tensors, stem: tensors.update({f"{stem}.dora_scale": torch.ones(1, 32)}), r"\.dora_scale \(1, 32\)"),
        (lambda tensors, stem: tensors.update({f"{stem}.dora_scale": torch.ones(32, 1)}), "lora_magnitude_vector"),
        (
            lambda tensors, stem: tensors.update({"lora_unet_x.alpha": torch.tensor(1.0)}),
            r"such as lora_unet_x\.alpha",
        ),
        (
            lambda tensors, stem: tensors.update(
                {f"{stem.replace('lora_unet', 'lora_transformer')}.alpha": torch.ones(1)}
            ),
            "is in the adapter twice",
        ),
    ],
)
def test_damaged_files_of_kohya_are_refused(class_pipeline, tmp_path, damage, message):
    pipe, fresh = class_pipeline(), class_pipeline()
    adapt(pipe.denoiser)
    pipe.save_lora_weights(tmp_path, format="kohya")
    tensors, before = load_file(tmp_path / FILE), weights_of(fresh.denoiser)
    damage(tensors, next(iter(tensors)).partition(".")[0])
    with pytest.raises(ValueError, match=message):
        fresh.load_lora_weights(tensors)
    assert not fresh.get_list_adapters()
    assert_same(weights_of(fresh.denoiser), before)


class Ambiguous(nn.Module):
    """Two layers whose names are equal if dots are replaced by underscores."""

    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 4)
        self.to = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})


def test_underscores_that_stand_for_two_layers_are_refused():
    def halves(name):
        return {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)}

    models = {"transformer": Ambiguous()}
    found = read_adapter(halves("lora_unet_to_k"), None, models, "transformer")
    assert found["transformer"].settings.target_modules == {"to.k"}
    with pytest.raises(ValueError, match=r"'to_q' in the adapter may be to\.q or to_q; name layers with dots"):
        read_adapter(halves("lora_unet_to_q"), None, models, "transformer")


def test_what_kohyas_naming_cannot_say_is_not_written(class_pipeline, tmp_path):
    pipe = class_pipeline()
    adapt(pipe.denoiser, lora_bias=True)
    with pytest.raises(ValueError, match=r"kohya has no name for '.*lora_B\.bias'"):
        pipe.save_lora_weights(tmp_path / "new", format="kohya")
    with pytest.raises(ValueError, match="`format` is 'khoya'; it must be 'diffusers' or 'kohya'"):
        pipe.save_lora_weights(tmp_path / "new", format="khoya")
    layers = pipe.lora_layers()
    twice = {"x_y.lora_A.weight": torch.ones(2, 4), "x.y.lora_A.weight": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=r"are both named 'lora_unet_x_y'"):
        ImprovedLDMPipeline.save_lora_weights(
            tmp_path / "new", **{**layers, "transformer_lora_layers": twice}, format="kohya"
        )
    assert not (tmp_path / "new").exists()
