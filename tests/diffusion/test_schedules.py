import inspect

import pytest
import torch
from torch.testing import assert_close

from improved_ldm.diffusion.schedules import NUM_TRAIN_TIMESTEPS, flow_scheduler, variance_preserving_scheduler


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
