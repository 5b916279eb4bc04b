import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.diffusion.schedules import (
    NUM_TRAIN_TIMESTEPS,
    flow_scheduler,
    rescale_scheduler,
    variance_preserving_scheduler,
)

SCHEDULERS = (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
)
RESOLUTIONS = [(256, 512), (16, 32), (64, 128), (256, 1024), (256, 320)]
SIDE = st.integers(8, 1024)


def test_betas_are_those_of_latent_diffusion():
    betas = variance_preserving_scheduler("epsilon").betas
    assert betas.shape == (NUM_TRAIN_TIMESTEPS,)
    assert_close(betas, torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TRAIN_TIMESTEPS) ** 2)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_prediction_type_is_kept(prediction_type):
    assert variance_preserving_scheduler(prediction_type).config.prediction_type == prediction_type


@pytest.mark.parametrize("make", [lambda: variance_preserving_scheduler("epsilon"), lambda: flow_scheduler(3.0)])
def test_schedulers_survive_saving(make, tmp_path):
    scheduler = make()
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    for name in inspect.signature(type(scheduler)).parameters:
        assert loaded.config[name] == scheduler.config[name]


def test_shift_moves_noise_levels_up():
    plain, shifted = flow_scheduler(1.0), flow_scheduler(3.0)
    plain.set_timesteps(9), shifted.set_timesteps(9)
    sigma = plain.sigmas
    assert (shifted.sigmas >= sigma).all()
    assert shifted.sigmas[0] == 1 and shifted.sigmas[-1] == 0


def signal_to_noise(scheduler):
    """SNR(t) = ᾱ / (1 − ᾱ) of every timestep, float64."""
    alphas_cumprod = scheduler.alphas_cumprod.double()
    return alphas_cumprod / (1 - alphas_cumprod)


@pytest.mark.parametrize(("small", "large"), RESOLUTIONS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_scheduler_of_a_rescaled_config_has_the_rescaled_signal(tmp_path, prediction_type, small, large):
    before = variance_preserving_scheduler(prediction_type)
    after = rescale_scheduler(before, small, large)
    assert type(after) is DDIMScheduler and after.config.prediction_type == prediction_type
    after.save_pretrained(tmp_path)
    expected = signal_to_noise(before) * (small / large) ** 2
    for scheduler_class in SCHEDULERS:
        loaded = scheduler_class.from_pretrained(tmp_path)
        assert_close(signal_to_noise(loaded), expected, rtol=1e-4, atol=0)
        again = scheduler_class.from_config(loaded.config)
        assert torch.equal(again.alphas_cumprod, loaded.alphas_cumprod)
        assert loaded.config.prediction_type == prediction_type


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_every_scheduler_is_rescaled_to_its_own_class(scheduler_class):
    before = scheduler_class.from_config(variance_preserving_scheduler("epsilon").config)
    expected = signal_to_noise(before) / 4
    after = rescale_scheduler(before, 16, 32)
    assert type(after) is scheduler_class
    assert_close(signal_to_noise(after), expected, rtol=1e-4, atol=0)
    assert before.config.trained_betas is None  # it is unchanged


@given(SIDE, st.floats(1, 8))
def test_upscaling_divides_the_signal_by_the_square_of_the_scale(small, scale):
    before = variance_preserving_scheduler("epsilon")
    after = rescale_scheduler(before, small, scale * small)
    assert_close(signal_to_noise(after), signal_to_noise(before) / scale**2, rtol=1e-4, atol=0)
    assert (after.betas > 0).all() and (after.betas < 1).all()


@given(st.floats(0.5, 1))
def test_downscaling_is_as_precise_as_signals_near_one_are_in_float32(scale):
    before = variance_preserving_scheduler("epsilon")
    after = rescale_scheduler(before, 512, scale * 512)
    assert_close(signal_to_noise(after), signal_to_noise(before) / scale**2, rtol=3e-4, atol=0)


@pytest.mark.parametrize("scheduler", [variance_preserving_scheduler("epsilon"), flow_scheduler(3.0)])
def test_rescaling_to_the_same_resolution_is_the_identity(scheduler):
    assert rescale_scheduler(scheduler, 256, 256) is scheduler


def test_rescaling_in_steps_is_rescaling_at_once():
    before = variance_preserving_scheduler("epsilon")
    steps, once = rescale_scheduler(rescale_scheduler(before, 16, 32), 32, 64), rescale_scheduler(before, 16, 64)
    assert_close(signal_to_noise(steps), signal_to_noise(once), rtol=1e-4, atol=0)
    back = rescale_scheduler(once, 64, 16)
    assert_close(back.alphas_cumprod, before.alphas_cumprod, rtol=1e-5, atol=1e-6)


def test_no_signal_stays_no_signal():
    config = variance_preserving_scheduler("v_prediction").config
    before = DDIMScheduler.from_config(config, rescale_betas_zero_snr=True)
    after = rescale_scheduler(before, 16, 32)
    assert after.alphas_cumprod[-1] == 0
    assert_close(signal_to_noise(after), signal_to_noise(before) / 4, rtol=1e-4, atol=0)


@given(st.floats(0.25, 8), SIDE, SIDE)
def test_a_rescaled_flow_moves_its_noise_levels(shift, from_side, to_side):
    before = flow_scheduler(shift)
    after = rescale_scheduler(before, from_side, to_side)
    scale, sigma = to_side / from_side, before.sigmas.double()
    rounding = 1e-6 / min(
        1, shift, shift * scale
    )  # rounding of 1 + (shift − 1) σ, which diffusers computes in float32
    assert_close(after.sigmas.double(), scale * sigma / (1 + (scale - 1) * sigma), rtol=rounding, atol=0)
    assert after.config.shift == pytest.approx(shift * scale)


def test_a_rescaled_flow_moves_the_levels_that_it_samples_at(tmp_path):
    before, sigmas = flow_scheduler(3.0), [1.0, 0.7, 0.2, 0.01]
    rescale_scheduler(before, 16, 32).save_pretrained(tmp_path)
    after = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    before.set_timesteps(sigmas=sigmas), after.set_timesteps(sigmas=sigmas)
    assert_close(after.sigmas, 2 * before.sigmas / (1 + before.sigmas))
    assert_close(after.timesteps, 1000 * after.sigmas[:-1])


def test_rescaling_a_flow_in_steps_is_rescaling_at_once():
    before = flow_scheduler(3.0)
    steps, once = rescale_scheduler(rescale_scheduler(before, 16, 32), 32, 64), rescale_scheduler(before, 16, 64)
    assert steps.config.shift == once.config.shift == 12.0
    assert_close(steps.sigmas, once.sigmas, rtol=0, atol=0)


def test_multistep_solvers_of_a_flow_are_shifted():
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
    for scheduler_class in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        assert rescale_scheduler(scheduler_class(**flow), 16, 32).config.flow_shift == 4.0


@pytest.mark.parametrize(("from_side", "to_side"), [(0, 512), (256, 0), (-256, 512), (256, -1)])
def test_resolutions_must_be_positive(from_side, to_side):
    with pytest.raises(ValueError, match=f"`from_resolution` {from_side} and `to_resolution` {to_side} must be pos"):
        rescale_scheduler(variance_preserving_scheduler("epsilon"), from_side, to_side)


def test_dynamic_shifting_is_not_rescaled():
    with pytest.raises(ValueError, match=r"`use_dynamic_shifting`.*needs no rescaling"):
        rescale_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 256, 512)


def test_a_scheduler_without_betas_or_shift_is_not_rescaled():
    with pytest.raises(ValueError, match="a ScoreSdeVeScheduler has neither betas nor a shift"):
        rescale_scheduler(ScoreSdeVeScheduler(), 256, 512)
