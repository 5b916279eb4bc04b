"""Fused projections: equal outputs; training, adapters and saved files are not affected."""

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close

from improved_ldm.models.family import DENOISERS
from improved_ldm.models.fusion import FUSED

MODES = ("disentangled", "published")
NAMES = pytest.mark.parametrize("name", DENOISERS)


def run(denoiser, inputs):
    with torch.no_grad():
        return denoiser(**inputs).sample


def fused_calls(denoiser):
    calls = []
    for path, module in denoiser.named_modules():
        if path.rpartition(".")[2] in FUSED:
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    return calls


def test_fused_projections_change_no_output_and_come_off(denoiser, make_inputs):
    inputs, names = make_inputs(denoiser), list(denoiser.state_dict())
    plain = run(denoiser, inputs)
    denoiser.fuse_qkv_projections()
    calls = fused_calls(denoiser)
    assert_close(run(denoiser, inputs), plain, rtol=0, atol=1e-6)
    read = [call for call in calls if not call.startswith("side_block")]
    assert len(read) >= len(denoiser.attn_processors) - 2 * (type(denoiser).__name__ == "MDTDenoiser")
    denoiser.unfuse_qkv_projections()
    assert list(denoiser.state_dict()) == names
    assert torch.equal(run(denoiser, inputs), plain)


@NAMES
@pytest.mark.parametrize("mode", MODES)
def test_gradients_go_to_the_weights_themselves(tiny_denoiser, make_inputs, name, mode):
    denoiser = tiny_denoiser(name, conditioning=mode, num_classes=5)
    inputs = make_inputs(denoiser)

    def gradients():
        denoiser.zero_grad()
        denoiser(**inputs).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}

    plain = gradients()
    denoiser.fuse_qkv_projections()
    fused = gradients()
    assert plain.keys() == fused.keys()
    assert all(torch.equal(fused[name], plain[name]) for name in plain)


@NAMES
def test_what_would_pass_fused_projections_by_is_refused(tiny_denoiser, make_inputs, name, tmp_path):
    denoiser = tiny_denoiser(name, num_classes=5)
    denoiser.fuse_qkv_projections()
    calls = {
        "trained": denoiser.train,
        "adapted": lambda: denoiser.add_adapter(LoraConfig(target_modules=["to_q"])),
        "saved": lambda: denoiser.save_pretrained(tmp_path / "saved"),
    }
    for what, call in calls.items():
        with pytest.raises(ValueError, match=f"fused projections cannot be {what}; call `unfuse_qkv_projections"):
            call()
    assert not (tmp_path / "saved").exists()
    denoiser.unfuse_qkv_projections()
    for call in calls.values():
        call()


@NAMES
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda model: model.train(), "cannot be trained; call `eval"),
        (lambda model: model.add_adapter(LoraConfig(target_modules=["to_q"])), "has adapters.*default"),
        (lambda model: model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), "quantised, cast or off"),
        (lambda model: model.to("meta"), "quantised, cast or offloaded"),
    ],
)
def test_a_model_that_cannot_be_fused_says_so(tiny_denoiser, name, state, message):
    denoiser = tiny_denoiser(name, num_classes=5)
    state(denoiser)
    with pytest.raises(ValueError, match=message):
        denoiser.fuse_qkv_projections()
    assert not denoiser.is_fused
