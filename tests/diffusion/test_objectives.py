import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.diffusion.objectives import FlowObjective, make_objective, objective_loss
from improved_ldm.seeds import uniform

SHAPE = (4, 2, 3, 3)
DISCRETE = ["epsilon", "v_prediction"]
PREDICTIONS = [*DISCRETE, "flow"]


def latents_and_noise(seed=0):
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))


def levels(objective, timestep):
    """sqrt(ᾱ_t) and sqrt(1 − ᾱ_t), derived from the noise that an objective adds."""
    ones = torch.ones(len(timestep), 1, 1, 1)
    signal = objective.add_noise(ones, torch.zeros_like(ones), timestep)
    return signal, objective.add_noise(torch.zeros_like(ones), ones, timestep)


@pytest.mark.parametrize("prediction", DISCRETE)
@given(timestep=st.lists(st.integers(0, 999), min_size=4, max_size=4).map(torch.tensor))
def test_signal_and_noise_keep_the_variance(prediction, timestep):
    signal, noise = levels(make_objective(prediction), timestep)
    assert_close(signal**2 + noise**2, torch.ones(4, 1, 1, 1))


@given(timestep=st.lists(st.integers(0, 999), min_size=4, max_size=4).map(torch.tensor))
def test_noise_target_gives_the_data_back(timestep):
    objective = make_objective("epsilon")
    latents, noise = latents_and_noise()
    signal_level, noise_level = levels(objective, timestep)
    noisy = objective.add_noise(latents, noise, timestep)
    target = objective.target(latents, noise, timestep)
    assert_close((noisy - noise_level * target) / signal_level, latents, rtol=1e-3, atol=1e-4)


@given(timestep=st.lists(st.integers(0, 999), min_size=4, max_size=4).map(torch.tensor))
def test_velocity_target_gives_data_and_noise_back(timestep):
    objective = make_objective("v_prediction")
    latents, noise = latents_and_noise()
    signal_level, noise_level = levels(objective, timestep)
    noisy = objective.add_noise(latents, noise, timestep)
    target = objective.target(latents, noise, timestep)
    assert_close(signal_level * noisy - noise_level * target, latents, rtol=1e-4, atol=1e-5)
    assert_close(noise_level * noisy + signal_level * target, noise, rtol=1e-4, atol=1e-5)


@given(timestep=st.lists(st.floats(0, 1000), min_size=4, max_size=4).map(torch.tensor))
def test_flow_target_gives_data_and_noise_back(timestep):
    objective = make_objective("flow")
    latents, noise = latents_and_noise()
    noisy, target = objective.add_noise(latents, noise, timestep), objective.target(latents, noise, timestep)
    sigma = timestep.view(-1, 1, 1, 1) / 1000
    assert_close(noisy - sigma * target, latents, rtol=1e-4, atol=1e-5)
    assert_close(noisy + (1 - sigma) * target, noise, rtol=1e-4, atol=1e-5)


def test_flow_runs_from_data_to_noise():
    objective = make_objective("flow")
    latents, noise = latents_and_noise()
    assert_close(objective.add_noise(latents, noise, torch.zeros(4)), latents, rtol=0, atol=0)
    assert_close(objective.add_noise(latents, noise, torch.full((4,), 1000.0)), noise, rtol=0, atol=0)


def oracle_sample(objective, steps):
    """The result of the objective's sampler if every prediction is the true target."""
    latents, noise = latents_and_noise()
    scheduler = objective.sampling_scheduler()
    scheduler.set_timesteps(steps)
    first = scheduler.timesteps[:1].expand(4)
    sample = objective.add_noise(latents, noise, first)
    for timestep in scheduler.timesteps:
        target = objective.target(latents, noise, timestep.expand(4))
        sample = scheduler.step(target, timestep, sample).prev_sample
    return sample, latents, noise


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("prediction", DISCRETE)
def test_sampler_follows_the_true_target_to_the_first_timestep(prediction, steps):
    objective = make_objective(prediction)
    sample, latents, noise = oracle_sample(objective, steps)
    nearly_clean = objective.add_noise(latents, noise, torch.zeros(4, dtype=torch.long))
    assert_close(sample, nearly_clean, rtol=1e-3, atol=1e-3)
    assert_close(sample, latents, rtol=0, atol=0.15)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sampler_follows_the_true_target_to_the_data(shift, steps):
    sample, latents, _ = oracle_sample(make_objective("flow", shift=shift), steps)
    assert_close(sample, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samplers_start_at_the_noisiest_timestep(prediction):
    scheduler = make_objective(prediction).sampling_scheduler()
    scheduler.set_timesteps(7)
    assert scheduler.timesteps[0] >= 999
    assert scheduler.config.num_train_timesteps == 1000


def fractions(count, seed):
    return uniform(torch.tensor([seed]), (count,))[0]


@pytest.mark.parametrize("prediction", DISCRETE)
@given(seed=st.integers(0, 2**32))
def test_discrete_timesteps_are_in_range(prediction, seed):
    timestep = make_objective(prediction).timestep_quantile(fractions(64, seed))
    assert timestep.shape == (64,) and timestep.dtype == torch.int64
    assert timestep.min() >= 0 and timestep.max() <= 999


@given(seed=st.integers(0, 2**32), shift=st.floats(0.1, 10), mean=st.floats(-3, 3), std=st.floats(0.1, 3))
def test_flow_timesteps_are_in_range(seed, shift, mean, std):
    timestep = FlowObjective(shift, mean, std).timestep_quantile(fractions(64, seed))
    assert timestep.shape == (64,) and timestep.is_floating_point()
    assert timestep.min() >= 0 and timestep.max() <= 1000


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_timesteps_rise_with_the_fraction(prediction):
    timestep = make_objective(prediction).timestep_quantile(fractions(64, 3).sort().values)
    assert (timestep.diff() >= 0).all() and timestep[0] < 100 and timestep[-1] > 900


def test_discrete_timesteps_are_equally_likely():
    timestep = make_objective("epsilon").timestep_quantile((torch.arange(10_000) + 0.5) / 10_000)
    assert timestep.bincount().tolist() == [10] * 1000


def test_a_larger_shift_gives_noisier_timesteps():
    means = [FlowObjective(shift).timestep_quantile(fractions(4096, 0)).mean() for shift in (0.5, 1, 3)]
    assert means == sorted(means)
    assert means[1] == pytest.approx(500, abs=20)


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
@pytest.mark.parametrize("prediction", DISCRETE)
def test_loss_weights_are_finite_and_positive_at_every_timestep(prediction, weighting):
    weights = make_objective(prediction, weighting).loss_weight(torch.arange(1000))
    assert weights.shape == (1000,) and weights.dtype == torch.float32
    assert weights.isfinite().all() and (weights > 0).all()


def test_min_snr_weights_are_their_formulas():
    timestep = torch.arange(0, 1000, 37)
    signal_level, noise_level = levels(make_objective("epsilon"), timestep)
    snr = (signal_level / noise_level).flatten() ** 2
    clamped = snr.clamp(max=5)
    assert_close(make_objective("epsilon", "min_snr").loss_weight(timestep), clamped / snr, rtol=1e-3, atol=1e-5)
    assert_close(
        make_objective("v_prediction", "min_snr").loss_weight(timestep), clamped / (snr + 1), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_zero_at_the_target_and_the_mean_square_elsewhere(prediction):
    objective, pair = make_objective(prediction), latents_and_noise()
    timestep = objective.timestep_quantile(fractions(4, 0))
    target = objective.target(*pair, timestep)
    assert objective_loss(objective, target, *pair, timestep) == 0
    assert_close(objective_loss(objective, target + 2, *pair, timestep), torch.tensor(4.0))


def test_loss_weighs_each_sample():
    objective = make_objective("epsilon", "min_snr")
    latents, noise = latents_and_noise()
    timestep = torch.tensor([0, 300, 600, 999])
    error = torch.tensor([1.0, 2, 3, 4])
    loss = objective_loss(objective, noise + error.view(4, 1, 1, 1), latents, noise, timestep)
    assert_close(loss, (objective.loss_weight(timestep) * error**2).mean())


def test_loss_is_float32_for_half_predictions():
    latents, noise = latents_and_noise()
    loss = objective_loss(make_objective("epsilon"), (noise + 1).half(), latents, noise.half(), torch.zeros(4).long())
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(scale=st.floats(1, 8), level=st.lists(st.floats(1, 999), min_size=4, max_size=4).map(torch.tensor))
def test_a_rescaled_objective_adds_noise_of_the_rescaled_signal(prediction, scale, level):
    before = make_objective(prediction)
    after = before.rescaled(32, scale * 32)
    if prediction == "flow":  # the noise levels themselves move, because the sampled levels are shifted
        timesteps = [objective.timestep_quantile(fractions(4, 0)) for objective in (before, after)]
    else:
        timesteps = [level.long()] * 2
    signals, noises = zip(*(levels(o, t) for o, t in zip((before, after), timesteps, strict=True)), strict=True)
    snr = [(signal.double() / noise.double()) ** 2 for signal, noise in zip(signals, noises, strict=True)]
    assert_close(snr[1], snr[0] / scale**2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("prediction", DISCRETE)
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_a_rescaled_objective_keeps_what_it_predicts_and_weighs(prediction, weighting):
    before = make_objective(prediction, weighting)
    after = before.rescaled(16, 32)
    assert (after.prediction, after.loss_weighting) == (prediction, weighting)
    assert after.sampling_scheduler().config.prediction_type == prediction
    sampler, forward = after.sampling_scheduler().alphas_cumprod, after.scheduler.alphas_cumprod
    assert_close(sampler, forward, rtol=0, atol=0)
    assert after.loss_weight(torch.arange(1000)).isfinite().all()


def test_a_rescaled_flow_objective_keeps_its_density():
    after = FlowObjective(3.0, 0.2, 0.7).rescaled(16, 32)
    assert (after.shift, after.logit_mean, after.logit_std) == (6.0, 0.2, 0.7)
    assert after.sampling_scheduler().config.shift == 6.0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_objectives_of_the_same_resolution_add_the_same_noise(prediction):
    before = make_objective(prediction)
    latents, noise = latents_and_noise()
    timestep = before.timestep_quantile(fractions(4, 0))
    same = before.rescaled(32, 32).add_noise(latents, noise, timestep)
    assert_close(same, before.add_noise(latents, noise, timestep), rtol=0, atol=0)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_sampler_of_a_rescaled_objective_follows_the_true_target(prediction, steps):
    objective = make_objective(prediction).rescaled(16, 32)
    sample, latents, noise = oracle_sample(objective, steps)
    nearly_clean = objective.add_noise(latents, noise, torch.zeros(4, dtype=torch.long))
    assert_close(sample, nearly_clean, rtol=2e-3, atol=2e-3)
