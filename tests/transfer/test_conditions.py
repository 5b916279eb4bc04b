"""Transfer of a trained denoiser to other conditions: what is kept, what is listed, and the initial output."""

import logging

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from improved_ldm.models.family import DENOISERS
from improved_ldm.transfer import change_conditions

MODES = ("disentangled", "published")
OLD_NAMES, NAMES = ["cat", "dog", "fox"], ["dog", "owl", "cat", "bee"]
TEXT_DIM, OTHER_TEXT_DIM, UNET_WIDTH = 12, 20, 32
CONTROL = torch.tensor([[40.0, 60, 0, 20, 40, 40, 32, 32, 0]]).expand(2, -1)


def text_config(name, conditioning, dim=TEXT_DIM):
    return {argument: dim for argument in DENOISERS[name].text_arguments(conditioning)}


BACKBONES = [(name, mode) for name in DENOISERS for mode in MODES]
# published models that also read sizes, embed conditions in every block, or have more than one kind of text
FURTHER = [
    ("unet", {"conditioning": "published", "published": {"size_features": 0}}),
    ("pixart", {"conditioning": "published", "published": {"size_conditions": True}, "hidden_size": 48}),
    ("dit", {"conditioning": "published", "published": {"trunk_per_block": True}}),
    ("mmdit", {"conditioning": "published", "dual_attention_layers": (0,)}),
]
MODELS = {f"{name}-{mode}": (name, {"conditioning": mode}) for name, mode in BACKBONES}
MODELS |= {f"{name}-{list(config)[1]}": (name, config) for name, config in FURTHER}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request, tiny_denoiser):
    """Builds a denoiser of a backbone and a mode, with classes or text."""
    name, config = request.param

    def build(semantic, **further):
        conditions = {"num_classes": 3} if semantic == "class" else text_config(name, config["conditioning"])
        return tiny_denoiser(name, **{**config, **conditions, **further})

    build.text = lambda dim: text_config(name, config["conditioning"], dim)
    return build


@torch.no_grad()
def predict(denoiser, **conditions):
    generator = torch.Generator().manual_seed(1)
    latents, timestep = torch.randn(2, 4, 4, 4, generator=generator), torch.tensor([50, 800])
    if "control" in denoiser.inputs:
        conditions["control"] = CONTROL
    return denoiser(latents.to(denoiser.dtype), timestep, **conditions).sample


def some_text(denoiser, tokens=1, seed=2):
    generator = torch.Generator().manual_seed(seed)
    config = denoiser.config
    text = {
        "encoder_hidden_states": torch.randn(2, tokens, config.text_dim or 1, generator=generator),
        "pooled_projections": torch.randn(2, config.get("pooled_dim") or 1, generator=generator),
    }
    return {name: value for name, value in text.items() if name in denoiser.inputs}


def labels(*values):
    return {"class_labels": torch.tensor(values)}


def assert_same(sample, expected):
    assert_close(sample, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def assert_accounted_for(old, new, changes):
    """Every tensor is in exactly one list, and the kept tensors are unchanged."""
    before, after = old.state_dict(), new.state_dict()
    listed = [*changes.kept, *changes.changed, *changes.new]
    assert len(listed) == len(set(listed)) and set(listed) == set(after)
    assert set(changes.dropped) == before.keys() - after.keys()
    assert set(changes.new) >= after.keys() - before.keys()
    for name in changes.kept:
        assert torch.equal(before[name], after[name]), name
    for name in changes.changed:
        assert name in before, name


def test_the_same_conditions_change_nothing(make):
    for semantic in ("class", "text"):
        old = make(semantic)
        config = {name: old.config.get(name) for name in ("num_classes", "text_dim", "pooled_dim")}
        new, changes = change_conditions(old, **config)
        assert_accounted_for(old, new, changes)
        assert not (changes.changed or changes.new or changes.dropped)
        values = [{name: value for name, value in model.config.items() if name[0] != "_"} for model in (old, new)]
        assert values[0] == values[1]


def test_classes_are_matched_by_name(make):
    old = make("class", num_class_tokens=2)
    new, changes = change_conditions(old, num_classes=4, class_names=NAMES, old_class_names=OLD_NAMES)
    assert_accounted_for(old, new, changes)
    assert changes.matched_classes == ("dog", "cat")
    assert changes.new_classes == ("owl", "bee") and changes.dropped_classes == ("fox",)
    assert all(name.endswith(("class_tokens.weight", "class_embedding.weight")) for name in changes.changed)
    assert not changes.new and not changes.dropped
    before, null = predict(old, **labels(1, 0)), predict(old)
    assert_close(predict(new, **labels(0, 2)), before, rtol=0, atol=0)
    assert_close(predict(new), null, rtol=0, atol=0)
    assert_close(predict(new, **labels(1, 3)), null, rtol=0, atol=0)
    assert not torch.allclose(before, null, atol=1e-5)


def test_classes_in_another_order_are_matched_too(make):
    old = make("class")
    new, changes = change_conditions(old, num_classes=3, class_names=OLD_NAMES[::-1], old_class_names=OLD_NAMES)
    assert changes.matched_classes == tuple(OLD_NAMES[::-1]) and changes.changed
    assert_close(predict(new, **labels(0, 1)), predict(old, **labels(2, 1)), rtol=0, atol=0)


def test_without_names_other_classes_start_as_the_null(make):
    old = make("class")
    new, changes = change_conditions(old, num_classes=5)
    assert_accounted_for(old, new, changes)
    assert_close(predict(new, **labels(0, 4)), predict(old), rtol=0, atol=0)


def test_classes_give_way_to_text(make):
    old = make("class")
    new, changes = change_conditions(old, **make.text(TEXT_DIM))
    assert_accounted_for(old, new, changes)
    assert "class_labels" not in new.inputs and some_text(new)
    assert_same(predict(new), predict(old))
    assert_same(predict(new, **some_text(new)), predict(old))
    assert any("class_" in name for name in changes.dropped)
    assert not any("attn" in name and not name.endswith(("to_k.weight", "to_v.weight")) for name in changes.new)


def test_text_gives_way_to_classes(make):
    old = make("text")
    new, changes = change_conditions(old, num_classes=3)
    assert_accounted_for(old, new, changes)
    assert_same(predict(new), predict(old))
    assert_same(predict(new, **labels(0, 2)), predict(old))


def test_another_text_encoder(make):
    old = make("text")
    new, changes = change_conditions(old, **make.text(OTHER_TEXT_DIM))
    assert_accounted_for(old, new, changes)
    assert_same(predict(new), predict(old))
    assert_same(predict(new, **some_text(new)), predict(old))
    assert not any("attn" in name and not name.endswith(("to_k.weight", "to_v.weight")) for name in changes.new)
    assert not torch.allclose(predict(old, **some_text(old)), predict(old), atol=1e-5)


@pytest.mark.parametrize("semantic", ["class", "text"])
def test_a_step_of_training_reaches_the_new_parts(make, semantic):
    old = make(semantic)
    new, changes = change_conditions(old, **make.text(OTHER_TEXT_DIM))
    optimizer = torch.optim.SGD(new.parameters(), lr=0.1)
    for seed in range(3):  # the first step does not reach weights after a layer of zeros
        optimizer.zero_grad()
        text = some_text(new, tokens=3, seed=seed)
        latents = torch.randn(2, 4, 4, 4)
        control = {"control": CONTROL} if "control" in new.inputs else {}
        (new(latents, torch.tensor([50, 800]), **text, **control).sample - latents).square().mean().backward()
        optimizer.step()
    gradients = {name: new.get_parameter(name).grad for name in changes.new if not name.endswith("null_text")}
    assert gradients and all(gradient.abs().max() > 0 for gradient in gradients.values())
    first, second = (predict(new, **some_text(new, tokens=3, seed=seed)) for seed in (3, 4))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["dit", "mdt", "pixart", "mmdit"])
def test_attention_is_kept_where_class_tokens_give_way_to_text(tiny_denoiser, name):
    old = tiny_denoiser(name, num_classes=3)
    _, changes = change_conditions(old, text_dim=TEXT_DIM)
    projection = {name for name in changes.new if name.startswith("trunk.text_projection.")}
    assert projection and set(changes.new) == projection | {"trunk.null_text"}
    assert changes.dropped == ("trunk.class_tokens.weight",)
    assert changes.changed == ()


@pytest.mark.parametrize("name", ["dit", "mdt", "pixart", "mmdit"])
@pytest.mark.parametrize("tokens", [2, 5])
def test_longer_texts_start_as_the_null_of_their_length(tiny_denoiser, name, tokens):
    old = tiny_denoiser(name, text_dim=TEXT_DIM)
    new, _ = change_conditions(old, text_dim=OTHER_TEXT_DIM)
    null = predict(old, encoder_hidden_states=torch.full((2, tokens, TEXT_DIM), torch.nan))
    assert_same(predict(new, **some_text(new, tokens)), null)
    assert_same(predict(new, encoder_hidden_states=torch.full((2, tokens, OTHER_TEXT_DIM), torch.nan)), null)


def test_a_unet_lists_the_projections_of_its_text(tiny_denoiser):
    old = tiny_denoiser("unet", text_dim=TEXT_DIM)
    new, changes = change_conditions(old, text_dim=OTHER_TEXT_DIM)
    reads_text = {
        f"{name}.{projection}.weight"
        for name, module in new.named_modules()
        if name.endswith("attn2")
        for projection in ("to_k", "to_v")
    }
    assert set(changes.new) == reads_text | {"trunk.null_text"}
    assert {name.rpartition(".attn2.")[2] for name in changes.changed} == {"to_out.0.bias"}


@pytest.mark.parametrize("mode", MODES)
def test_a_unet_keeps_its_attention_for_text_as_wide_as_its_class_tokens(tiny_denoiser, mode):
    old = tiny_denoiser("unet", conditioning=mode, num_classes=3)
    pooled = {"pooled_dim": 6} if mode == "published" else {}
    new, changes = change_conditions(old, text_dim=UNET_WIDTH, **pooled)
    assert not any("attn2" in name for name in (*changes.new, *changes.changed))
    assert_same(predict(new), predict(old))


def test_sizes_beside_the_pooled_text_are_kept(tiny_denoiser):
    old = tiny_denoiser("unet", conditioning="published", text_dim=TEXT_DIM, pooled_dim=6)
    new, changes = change_conditions(old, text_dim=TEXT_DIM, pooled_dim=9)
    assert changes.changed == ("trunk.added_embedding.mlp.linear_1.weight",) and not changes.new
    other = CONTROL * 1.5
    for control in (CONTROL, other):
        samples = [model(torch.ones(2, 4, 4, 4), 500, control=control).sample for model in (old, new)]
        assert_same(samples[1], samples[0])


def test_published_text_may_go_on_without_its_pooled_part(tiny_denoiser):
    old = tiny_denoiser("mmdit", conditioning="published", text_dim=TEXT_DIM, pooled_dim=6)
    new, changes = change_conditions(old, text_dim=TEXT_DIM)
    assert "pooled_projections" not in new.inputs
    assert changes.changed == ("trunk.time_embedding.linear_2.bias",) and not changes.new
    text = some_text(new, 3)
    assert_same(predict(new, **text), predict(old, **text))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["dit", "mdt"])
def test_an_unconditional_model_learns_classes_and_text(tiny_denoiser, name, mode):
    old = tiny_denoiser(name, conditioning=mode)
    for conditions in ({"num_classes": 3}, text_config(name, mode)):
        new, changes = change_conditions(old, **conditions)
        assert_accounted_for(old, new, changes)
        given = labels(0, 2) if "num_classes" in conditions else some_text(new, 3)
        assert_same(predict(new, **given), predict(old))
        assert_same(predict(new), predict(old))


def test_several_null_tokens_give_way_to_their_mean(tiny_denoiser):
    old = tiny_denoiser("dit", num_classes=3, num_class_tokens=2)
    new, _ = change_conditions(old, text_dim=TEXT_DIM)
    mean = old.trunk.class_tokens.weight[-1].view(2, -1).mean(0)
    assert_close(new.trunk.text_projection(new.trunk.null_text)[0], mean)


def test_the_old_model_stays_as_it_is(make):
    old = make("class")
    before = {name: tensor.clone() for name, tensor in old.state_dict().items()}
    new, _ = change_conditions(old, **make.text(TEXT_DIM))
    for parameter in new.parameters():
        parameter.data.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_mode_are_kept(make, dtype):
    for training in (True, False):
        new, _ = change_conditions(make("class").to(dtype).train(training), **make.text(TEXT_DIM))
        assert new.training is training and {parameter.dtype for parameter in new.parameters()} == {dtype}
        assert all(parameter.requires_grad for parameter in new.parameters())


def test_a_changed_model_survives_saving(make, tmp_path):
    new, _ = change_conditions(make("class"), **make.text(OTHER_TEXT_DIM))
    new.save_pretrained(tmp_path)
    text = some_text(new)
    loaded = type(new).from_pretrained(tmp_path)
    assert loaded.config.num_classes is None
    assert_close(predict(loaded, **text), predict(new, **text), rtol=0, atol=0)


def test_what_became_of_the_weights_is_logged_by_name(tiny_denoiser, caplog):
    with caplog.at_level(logging.WARNING):
        _, changes = change_conditions(
            tiny_denoiser("dit", num_classes=3), num_classes=4, class_names=NAMES, old_class_names=OLD_NAMES
        )
    assert str(changes) in caplog.text
    assert "changed: trunk.class_tokens.weight\nnew: nothing\ndropped: nothing" in str(changes)
    assert "matched classes: 2: dog, cat\nnew classes: 2: owl, bee\ndropped classes: 1: fox" in str(changes)


def test_long_lists_of_classes_are_cut(tiny_denoiser):
    names = [f"class {number}" for number in range(40)]
    _, changes = change_conditions(
        tiny_denoiser("dit", num_classes=3), num_classes=40, class_names=names, old_class_names=OLD_NAMES
    )
    assert "new classes: 40: class 0, " in str(changes) and "class 19, …" in str(changes)
    assert changes.new_classes == tuple(names)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {}, "nothing is given; give `num_classes`, or the text's `text_dim`"),
        ({}, {"num_classes": 3, "text_dim": 4}, "`num_classes`, `text_dim` is given"),
        (
            {},
            {"pooled_dim": 4},
            "`pooled_dim` is 4, but a DiTDenoiser of the 'disentangled' mode takes num_classes, t",
        ),
        ({"conditioning": "published"}, {"text_dim": 4}, "`text_dim` is 4.*takes num_classes, pooled_dim"),
        ({}, {"num_classes": 0}, "`num_classes` is 0; it must be an integer ≥ 1"),
        ({}, {"text_dim": 2.5}, "`text_dim` is 2.5; it must be an integer ≥ 1"),
        ({}, {"num_classes": 4, "class_names": NAMES}, "`old_class_names` is None"),
        ({}, {"num_classes": 4, "old_class_names": OLD_NAMES}, "`class_names` is None"),
        (
            {},
            {"num_classes": 5, "class_names": NAMES, "old_class_names": OLD_NAMES},
            "`class_names` has 4 names; it must have 5",
        ),
        (
            {},
            {"num_classes": 4, "class_names": NAMES, "old_class_names": NAMES},
            "`old_class_names` has 4 names; it must have 3",
        ),
        (
            {},
            {"num_classes": 2, "class_names": ["cat", "cat"], "old_class_names": OLD_NAMES},
            "`class_names` has 'cat' more than once",
        ),
    ],
)
def test_what_cannot_be_is_an_error(tiny_denoiser, config, arguments, message):
    with pytest.raises(ValueError, match=message):
        change_conditions(tiny_denoiser("dit", num_classes=3, **config), **arguments)


def test_adapters_are_an_error(tiny_denoiser):
    denoiser = tiny_denoiser("dit", num_classes=3)
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    with pytest.raises(ValueError, match=r"has adapters \(style\); fuse or unload"):
        change_conditions(denoiser, text_dim=4)
