import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.diffusion.objectives import make_objective, objective_loss
from improved_ldm.diffusion.schedules import variance_preserving_scheduler

SHAPE = (4, 3, 2, 2)
SCHEDULES = ["linear", "scaled_linear", "cosine"]


def example(seed=0):
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed))


def posterior(objective, latents, noisy, t):
    """Mean and variance of q(z_{t−1} | z_t, z) in float64, by Bayes' rule from the two normal distributions."""
    betas = objective.scheduler.betas.double()
    alphas = (1 - betas).cumprod(0)
    beta, before = betas[t], alphas[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() * noisy.double() / beta + before.sqrt() * latents.double() / (1 - before)) / precision
    return mean, 1 / precision, beta


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(t=st.integers(1, 998), share=st.floats(-0.5, 1.5))
def test_the_bound_is_the_divergence_from_the_posterior(schedule, t, share):
    objective = make_objective("epsilon", beta_schedule=schedule, learned_variance=True)
    latents, noise = example()
    timestep, error = torch.full((4,), t), 0.3 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    prediction = torch.cat([noise + error, torch.full(SHAPE, 2 * share - 1)], dim=1)
    noisy = objective.add_noise(latents, noise, timestep)
    mean, least, most = posterior(objective, latents, noisy, t)
    signal = (1 - objective.scheduler.betas.double()).cumprod(0)[t].sqrt()
    start = latents.double() - (1 - signal**2).sqrt() / signal * error.double()
    predicted, _, _ = posterior(objective, start, noisy, t)
    variance = torch.exp(share * most.log() + (1 - share) * least.log())
    kl = (variance / least).log() + (least + (mean - predicted) ** 2) / variance - 1
    expected = (kl / 2).flatten(1).mean(1) / math.log(2)
    found = objective.losses(prediction, latents, noise, timestep)["vb"]
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_the_bound_at_the_first_timestep_is_the_likelihood_of_8_bit_values():
    objective = make_objective("epsilon", beta_schedule="linear", learned_variance=True)
    latents = torch.linspace(-1, 1, 256).view(1, 1, 16, 16).round(decimals=6)
    noise = torch.zeros_like(latents)
    prediction = torch.cat([noise, -torch.ones_like(latents)], dim=1)
    found = objective.losses(prediction, latents, noise, torch.tensor([0]))["vb"]
    # the mean is the exact value, the deviation that of the posterior at t = 1
    betas = objective.scheduler.betas.double()
    deviation = (betas[1] * betas[0] / (1 - (1 - betas[0]) * (1 - betas[1]))).sqrt()
    inside = torch.erf(1 / 255 / deviation / 2**0.5)
    outside = (1 + inside) / 2
    expected = -(254 * inside.log() + 2 * outside.log()) / 256 / math.log(2)
    assert_close(found.double(), expected.view(1), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@given(timestep=st.lists(st.integers(0, 999), min_size=4, max_size=4).map(torch.tensor))
def test_the_bound_trains_the_variance_only(prediction, timestep):
    objective = make_objective(prediction, beta_schedule="linear", learned_variance=True)
    latents, noise = example()
    predicted = torch.randn(4, 6, 2, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
    objective.losses(predicted, latents, noise, timestep)["vb"].sum().backward()
    assert predicted.grad.isfinite().all()
    assert (predicted.grad[:, :3] == 0).all() and (predicted.grad[:, 3:] != 0).any()


def test_both_predictions_of_the_same_latents_have_the_same_bound():
    latents, noise = example()
    timestep = torch.tensor([1, 100, 500, 900])
    epsilon, velocity = (
        make_objective(kind, beta_schedule="linear", learned_variance=True) for kind in ("epsilon", "v_prediction")
    )
    variance = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3))
    terms = [
        objective.losses(
            torch.cat([objective.target(latents, noise, timestep), variance], 1), latents, noise, timestep
        )
        for objective in (epsilon, velocity)
    ]
    assert_close(terms[0]["vb"], terms[1]["vb"], rtol=1e-3, atol=1e-4)


def test_the_loss_is_the_sum_of_its_terms_and_min_snr_weighs_the_squared_error_only():
    latents, noise = example()
    timestep, prediction = torch.tensor([3, 100, 500, 900]), torch.randn(4, 6, 2, 2)
    plain, weighted = (
        make_objective("epsilon", weighting, "linear", learned_variance=True) for weighting in ("uniform", "min_snr")
    )
    one, other = (objective.losses(prediction, latents, noise, timestep) for objective in (plain, weighted))
    assert_close(other["mse"], one["mse"] * weighted.loss_weight(timestep))
    assert_close(other["vb"], one["vb"])
    total = objective_loss(plain, prediction, latents, noise, timestep)
    assert_close(total, (one["mse"] + one["vb"]).mean())


def test_a_variance_that_is_not_learned_is_ignored():
    latents, noise = example()
    timestep = torch.tensor([3, 100, 500, 900])
    for kind in ("epsilon", "flow"):
        objective = make_objective(kind)
        target = objective.target(latents, noise, timestep)
        further = torch.cat([target, torch.full(SHAPE, 7.0)], dim=1)
        assert objective.losses(further, latents, noise, timestep).keys() == {"mse"}
        assert objective_loss(objective, further, latents, noise, timestep) == 0


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"prediction": "flow", "learned_variance": True}, "`learned_variance` is true"),
        ({"prediction": "epsilon", "beta_schedule": "cosine", "beta_start": 0.1}, "`beta_start` is 0.1"),
        ({"prediction": "epsilon", "beta_schedule": "cosine", "beta_end": 0.1}, "`beta_end` is 0.1"),
        ({"prediction": "epsilon", "beta_start": 0.1}, "`beta_start` is 0.1 and `beta_end` 0.012"),
        ({"prediction": "epsilon", "beta_end": 1.0}, "0 < start ≤ end < 1"),
        ({"prediction": "epsilon", "beta_schedule": "sigmoid"}, "`beta_schedule` is 'sigmoid'"),
    ],
)
def test_objectives_that_do_not_exist_are_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        make_objective(**asked)


@pytest.mark.parametrize(
    "schedule, ends",
    [("linear", (1e-4, 0.02)), ("scaled_linear", (0.00085, 0.012)), ("linear", (0.001, 0.003))],
)
def test_a_schedule_has_its_ends(schedule, ends):
    betas = variance_preserving_scheduler("epsilon", schedule, *ends).betas
    assert_close(betas[[0, -1]], torch.tensor(ends))
    middle = betas[500] if schedule == "linear" else betas[500].sqrt()
    first, last = ends if schedule == "linear" else (end**0.5 for end in ends)
    assert float(middle) == pytest.approx(first + (last - first) * 500 / 999, rel=1e-4)


def test_the_cosine_schedule_is_that_of_its_authors():
    alphas = variance_preserving_scheduler("epsilon", "cosine").alphas_cumprod
    times = (torch.arange(1, 1001).double() / 1000 + 0.008) / 1.008
    expected = (times * math.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert_close(alphas[:990].double(), expected[:990], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("learned", [False, True])
@given(scale=st.floats(1, 8))
def test_a_rescaled_objective_has_the_rescaled_signal_on_every_schedule(schedule, learned, scale):
    before = make_objective("epsilon", beta_schedule=schedule, learned_variance=learned)
    after = before.rescaled(32, 32 * scale)
    # at the end of a cosine the signal is below what float32 holds
    snr = [
        o.scheduler.alphas_cumprod[:990].double() / (1 - o.scheduler.alphas_cumprod[:990].double())
        for o in (before, after)
    ]
    assert_close(snr[1], snr[0] / scale**2, rtol=1e-3, atol=1e-9)
    assert type(after.sampling_scheduler()) is type(before.sampling_scheduler())
    assert after.learned_variance is learned
    latents, noise = example()
    terms = after.losses(torch.zeros(4, 6, 2, 2), latents, noise, torch.tensor([0, 1, 500, 999]))
    assert all(term.isfinite().all() for term in terms.values())
