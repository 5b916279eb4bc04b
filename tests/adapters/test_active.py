"""The adapters of a pipeline: selected by name, weighted per block, fused and removed."""

import pytest
import torch
from torch.testing import assert_close

from improved_ldm.models.family import DENOISERS
from tests.adapters.test_checks import assert_as_before, state_of
from tests.test_lora import adapt, assert_same, draw, trainable, weights_of


@pytest.fixture
def loaded(class_pipeline, tmp_path):
    """A pipeline with the adapters `one` and `two`, each strong."""

    def make(name="dit", **settings):
        pipe = class_pipeline(name=name)
        adapt(pipe.denoiser, "one", init_lora_weights=False, **settings)
        pipe.save_lora_weights(tmp_path / name)
        pipe.unload_lora_weights()
        for adapter_name in ("one", "two"):
            pipe.load_lora_weights(tmp_path / name, adapter_name=adapter_name)
        pipe.set_adapters("one")
        return pipe

    return make


def blocks_of(pipe):
    """The paths, two levels deep, of the layers with adapters."""
    paths = [name for name, module in pipe.denoiser.named_modules() if hasattr(module, "scaling")]
    return list(dict.fromkeys(".".join(path.split(".")[:2]) for path in paths))


@pytest.mark.parametrize("name", DENOISERS)
def test_a_block_has_a_weight_of_its_own(loaded, name):
    pipe = loaded(name)
    block = blocks_of(pipe)[0]
    full, component = draw(pipe), pipe.denoiser.component
    pipe.set_adapters("one", {component: {block: 0.5}})
    found = {path: m.scaling["one"] for path, m in pipe.denoiser.named_modules() if hasattr(m, "scaling")}
    assert {value for path, value in found.items() if path.startswith(f"{block}.")} == {1.0}  # alpha / rank is 2
    assert {value for path, value in found.items() if not path.startswith(f"{block}.")} <= {2.0}
    assert (draw(pipe) - full).abs().max() > 0
    first, index = block.split(".")
    pipe.set_adapters("one", {component: {first: {index: 0.5}}})
    assert found == {path: m.scaling["one"] for path, m in pipe.denoiser.named_modules() if hasattr(m, "scaling")}
    pipe.set_adapters("one", {component: 1.0})
    assert_same(draw(pipe), full)


def test_the_tenth_block_is_not_the_first(class_pipeline):
    pipe = class_pipeline(num_layers=11)
    adapt(pipe.denoiser, "one", lora_alpha=4)
    pipe.set_adapters("one", {"transformer": {"transformer_blocks.1": 0.0}})
    scales = [block.attn1.to_q.scaling["one"] for block in pipe.denoiser.transformer_blocks]
    assert scales == [1.0, 0.0, *[1.0] * 9]


def test_a_unet_knows_the_words_of_diffusers(loaded):
    pipe = loaded("unet", lora_alpha=4)
    weights = {"down": 0.5, "mid": 0.25, "up": {"block_0": [0.1, 0.2]}}
    pipe.set_adapters(["one", "two"], [{"unet": weights}, 0.0])
    scales = {path: m.scaling["one"] for path, m in pipe.denoiser.named_modules() if hasattr(m, "scaling")}
    expected = {
        "down_blocks.1": 0.5,
        "mid_block": 0.25,
        "up_blocks.0.attentions.0": 0.1,
        "up_blocks.0.attentions.1": 0.2,
    }
    assert scales == {path: next(v for k, v in expected.items() if path.startswith(f"{k}.")) for path in scales}
    assert set(expected) == {k for k in expected if any(path.startswith(f"{k}.") for path in scales)}


WRONG = {
    "adapter": ("three", None, r"`adapter_names` has 'three'; loaded adapters: 'one', 'two'"),
    "among-others": (["one", "three"], [1, 1], "`adapter_names` has 'three'"),
    "twice": (["one", "one"], [1, 1], "it must not list an adapter twice"),
    "component": ("one", {"transfomer": 0.5}, "have 'transfomer'; it is on transformer"),
    "not-on-it": ("one", {"text_encoder": 0.5}, "have 'text_encoder'; it is on transformer"),
    "block": (
        "one",
        {"transformer": {"blokcs": 0.5}},
        r"'blokcs', in which it has no layer; .* transformer_blocks\.0",
    ),
    "part": ("one", {"transformer": {"transformer_blocks.0.att": 0.5}}, r"the block 'transformer_blocks\.0\.att'"),
    "index": ("one", {"transformer": {"transformer_blocks": {"9": 0.5}}}, r"the block 'transformer_blocks\.9'"),
    "word": ("one", {"transformer": {"down": 0.5}}, "the block 'down'"),
    "second": (["two", "one"], [1.0, {"transformer": {"blokcs": 0.5}}], "weights of 'one' have the block 'blokcs'"),
    "many": (["one", "two"], [1.0], "1 weights are given for 2 adapters"),
    "few": ("one", [1.0, 0.5], "2 weights are given for 1 adapters"),
    "none": (["one", "two"], [], "0 weights are given"),
    "nan": ("one", float("nan"), "the weight of 'one' is nan; it must be a finite number"),
    "infinite": ("one", [float("inf")], "is inf"),
    "text": ("one", "0.5", "is '0.5'"),
    "boolean": ("one", True, "is True"),
    "tensor": ("one", torch.ones(2), r"is tensor"),
    "block-nan": ("one", {"transformer": {"transformer_blocks.0": float("nan")}}, "for 'transformer_blocks.0' is nan"),
    "block-text": ("one", {"transformer": {"transformer_blocks.0": "1"}}, "for 'transformer_blocks.0' is '1'"),
    "block-list": ("one", {"transformer": {"transformer_blocks.0": [1, 2]}}, "2 weights for the 0 attentions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_names_and_weights_change_nothing(loaded, case):
    names, weights, message = WRONG[case]
    pipe = loaded()
    pipe.set_adapters(["one", "two"], [0.3, 0.6])
    before = state_of(pipe)
    by_component = "transformer" in str(weights) or isinstance(weights, dict)
    for set_adapters in [pipe.set_adapters] if by_component else [pipe.set_adapters, pipe.denoiser.set_adapters]:
        with pytest.raises(ValueError, match=message) as error:
            set_adapters(names, weights)
        assert "\n" not in str(error.value)
        assert_as_before(pipe, before)


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("name", DENOISERS)
def test_fused_and_unfused_it_draws_as_before(loaded, name, scale):
    pipe = loaded(name, lora_alpha=2)
    live, weights = draw(pipe), weights_of(pipe.denoiser)
    pipe.set_adapters("one", scale)
    scaled = draw(pipe)
    pipe.set_adapters("one")
    pipe.fuse_lora(lora_scale=scale)
    torch.testing.assert_close(draw(pipe), scaled, rtol=0, atol=1e-5)
    assert pipe.fused_loras == {"one"}
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    torch.testing.assert_close(weights_of(pipe.denoiser), weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(draw(pipe), live, rtol=0, atol=1e-5)


def test_two_adapters_are_fused_one_after_the_other(loaded):
    pipe = loaded()
    weights = weights_of(pipe.denoiser)
    pipe.set_adapters(["one", "two"], [0.5, 0.25])
    live = draw(pipe)
    pipe.fuse_lora(adapter_names=["one"])
    pipe.fuse_lora(adapter_names="two")
    assert pipe.fused_loras == {"one", "two"}
    torch.testing.assert_close(draw(pipe), live, rtol=0, atol=1e-5)
    pipe.unfuse_lora()
    torch.testing.assert_close(weights_of(pipe.denoiser), weights, rtol=0, atol=1e-6)


CHANGES = {
    "fuse": lambda pipe, folder: pipe.fuse_lora(),
    "fuse-scaled": lambda pipe, folder: pipe.fuse_lora(lora_scale=0.5),
    "fuse-by-name": lambda pipe, folder: pipe.fuse_lora(adapter_names=["two", "one"]),
    "unload": lambda pipe, folder: pipe.unload_lora_weights(),
    "unload-model": lambda pipe, folder: pipe.denoiser.unload_lora(),
    "delete": lambda pipe, folder: pipe.delete_adapters("one"),
    "delete-model": lambda pipe, folder: pipe.denoiser.delete_adapters("one"),
    "weights": lambda pipe, folder: pipe.set_adapters("one", 0.5),
    "weights-model": lambda pipe, folder: pipe.denoiser.set_adapters("two"),
    "load": lambda pipe, folder: pipe.load_lora_weights(folder, adapter_name="three"),
    "add": lambda pipe, folder: adapt(pipe.denoiser, "three"),
    "disable": lambda pipe, folder: pipe.disable_lora(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_fused_adapter_is_changed_by_nothing_but_unfuse(loaded, tmp_path, change):
    pipe = loaded()
    pipe.fuse_lora(lora_scale=0.5)
    fused, before = draw(pipe), state_of(pipe)
    with pytest.raises(ValueError, match=r"'one' is fused into the DiTDenoiser.*call `unfuse_lora` first"):
        CHANGES[change](pipe, tmp_path / "dit")
    assert_as_before(pipe, before)
    assert_same(draw(pipe), fused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"components": ["transfomer"]}, "`components` has 'transfomer'; it may have transformer, unet, text_encoder"),
        ({"components": ["unet"]}, "no adapter is active on unet"),
        ({"adapter_names": ["three"]}, "`adapter_names` has 'three'"),
        ({"adapter_names": []}, "no adapter is active"),
        ({"lora_scale": float("nan")}, "`lora_scale` is nan"),
        ({"lora_scale": "1"}, "`lora_scale` is '1'"),
    ],
)
def test_wrong_arguments_fuse_nothing(loaded, arguments, message):
    pipe = loaded()
    before = state_of(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.fuse_lora(**arguments)
    assert_as_before(pipe, before)


def test_a_broken_adapter_is_not_fused_where_that_is_to_be_safe(loaded):
    pipe = loaded()
    with torch.no_grad():
        pipe.denoiser.transformer_blocks[-1].attn1.to_q.lora_B["one"].weight[0] = float("nan")
    before = weights_of(pipe.denoiser)
    with pytest.raises(ValueError, match=r"NaN or infinite weights on 'transformer_blocks\.1\.attn1\.to_q'"):
        pipe.fuse_lora(safe_fusing=True)
    torch.testing.assert_close(weights_of(pipe.denoiser), before, rtol=0, atol=0, equal_nan=True)
    assert pipe.num_fused_loras == 0


def test_without_anything_to_do(class_pipeline, loaded):
    pipe = loaded()
    before = state_of(pipe)
    pipe.unfuse_lora()
    assert_as_before(pipe, before)
    pipe.disable_lora()
    with pytest.raises(ValueError, match="the adapters are disabled; call `enable_lora` first"):
        pipe.fuse_lora()
    fresh = class_pipeline()
    before = state_of(fresh)
    fresh.unload_lora_weights()
    fresh.unfuse_lora()
    with pytest.raises(ValueError, match=r"no adapter is active .*load_lora_weights"):
        fresh.fuse_lora()
    for call in (fresh.delete_adapters, fresh.set_adapters, fresh.denoiser.delete_adapters):
        with pytest.raises(ValueError, match="`adapter_names` has 'one'; loaded adapters: none"):
            call("one")
    assert_as_before(fresh, before)


def test_unknown_names_are_not_deleted(loaded):
    pipe = loaded()
    before = state_of(pipe)
    for call in (pipe.delete_adapters, pipe.denoiser.delete_adapters):
        with pytest.raises(ValueError, match="`adapter_names` has 'three'; loaded adapters: 'one', 'two'"):
            call(["one", "three"])
    assert_as_before(pipe, before)


@pytest.mark.parametrize("name", DENOISERS)
def test_what_was_unfused_or_kept_is_unloaded(class_pipeline, loaded, name):
    plain, flags = draw(class_pipeline(name=name)), trainable(class_pipeline(name=name))
    pipe = loaded(name)
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=1e-5)
    assert trainable(pipe) == flags
    pipe = loaded(name)
    live = draw(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights(keep_fused=True)
    torch.testing.assert_close(draw(pipe), live, rtol=0, atol=1e-5)
    assert trainable(pipe) == flags and not pipe.get_list_adapters() and pipe.num_fused_loras == 0


def test_a_compiled_denoiser_has_its_adapters(loaded, tmp_path):
    pipe = loaded()
    listed, adapted_picture = (pipe.get_list_adapters(), pipe.get_active_adapters()), draw(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert (pipe.get_list_adapters(), pipe.get_active_adapters()) == listed
    assert_close(draw(pipe), adapted_picture)
    with pytest.raises(ValueError, match="the pipeline has adapters"):
        pipe.save_pretrained(tmp_path / "saved")
    without = draw(pipe, attention_kwargs={"scale": 0})
    pipe.unload_lora_weights()
    assert not pipe.get_list_adapters()
    assert_close(draw(pipe), without)
    pipe.load_lora_weights(tmp_path / "dit", adapter_name="again")
    assert_close(draw(pipe), adapted_picture)
