"""Which schedulers of diffusers fit a denoiser, and the errors for the others."""

import inspect
import re

import diffusers
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from improved_ldm.diffusion.fitting import check_scheduler, trained_objective
from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.diffusion.schedules import flow_scheduler, rescale_scheduler, variance_preserving_scheduler

OWN = {
    "epsilon": variance_preserving_scheduler("epsilon"),
    "v_prediction": variance_preserving_scheduler("v_prediction"),
    "flow": flow_scheduler(3.0),
}
OBJECTIVES = {name: trained_objective(scheduler) for name, scheduler in OWN.items()}
FLOW_SETTINGS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
VARIANCE_PRESERVING = (
    *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep"),
    *("DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
    *("KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep"),
)
FLOW = ("FlowMapEulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "FlowMatchLCM")
WITH_FLOW_SETTINGS = ("DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "SASolver", "UniPCMultistep")


def scheduler_class(name: str):
    return getattr(diffusers, f"{name}Scheduler")


def others() -> list[str]:
    """The schedulers of diffusers that need no arguments or further libraries."""
    names = []
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler")):
        kind = getattr(diffusers, name)
        if not inspect.isclass(kind):
            continue
        try:
            kind()
        except (ImportError, TypeError):
            continue
        names.append(name.removesuffix("Scheduler"))
    return names


ALL = others()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_a_scheduler_made_from_the_models_own_fits(name, prediction):
    check_scheduler(scheduler_class(name).from_config(OWN[prediction].config), OBJECTIVES[prediction])


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_a_scheduler_made_from_one_with_a_learned_variance_fits(name):
    own = make_objective("epsilon", beta_schedule="linear", learned_variance=True).sampling_scheduler()
    check_scheduler(scheduler_class(name).from_config(own.config), trained_objective(own), predicts_variance=True)


@pytest.mark.parametrize("name", FLOW)
def test_a_scheduler_of_a_flow_fits_a_flow(name):
    check_scheduler(scheduler_class(name).from_config(OWN["flow"].config), OBJECTIVES["flow"])


@pytest.mark.parametrize("name", WITH_FLOW_SETTINGS)
def test_other_schedulers_fit_a_flow_with_its_settings(name):
    check_scheduler(scheduler_class(name)(**FLOW_SETTINGS), OBJECTIVES["flow"])


@pytest.mark.parametrize("name", sorted({*ALL} - {*FLOW}))
def test_a_scheduler_of_noise_is_refused_for_a_flow(name):
    scheduler = scheduler_class(name).from_config(OWN["flow"].config)
    with pytest.raises(ValueError, match="which does not fit the model: "):
        check_scheduler(scheduler, OBJECTIVES["flow"])


@pytest.mark.parametrize("name", sorted({*ALL} - {*VARIANCE_PRESERVING, "UnCLIP"}))
def test_schedulers_of_other_noise_or_steps_are_refused(name):
    scheduler = scheduler_class(name).from_config(OWN["epsilon"].config)
    with pytest.raises(ValueError, match="which does not fit the model: "):
        check_scheduler(scheduler, OBJECTIVES["epsilon"])


@pytest.mark.parametrize("prediction", OWN)
@pytest.mark.parametrize("name", ALL)
def test_default_settings_that_do_not_fit_are_refused_with_some_that_do(name, prediction):
    try:
        check_scheduler(scheduler_class(name)(), OBJECTIVES[prediction])
    except ValueError as error:
        advised = re.search(r"A (\w+)Scheduler fits with (.*)\.$", str(error))
        settings = eval(f"dict({advised[2]})")
        check_scheduler(scheduler_class(advised[1])(**settings), OBJECTIVES[prediction])


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (DDPMScheduler(), "noise at its timesteps"),
        (EulerDiscreteScheduler.from_config(OWN["flow"].config), "noise at its timesteps"),
        (DDIMScheduler.from_config(OWN["epsilon"].config, prediction_type="v_prediction"), "'v_prediction'"),
        (DDIMScheduler.from_config(OWN["epsilon"].config, clip_sample=True), "misses the latents"),
        (DDIMScheduler.from_config(OWN["epsilon"].config, num_train_timesteps=500), "another kind"),
        (DDIMScheduler.from_config(OWN["epsilon"].config, num_train_timesteps=2000), "noise at its timesteps"),
        (DDIMScheduler.from_config(OWN["epsilon"].config, rescale_betas_zero_snr=True), "noise at its timesteps"),
        (DPMSolverMultistepScheduler(**FLOW_SETTINGS), "'flow_prediction'"),
    ],
)
def test_the_reason_is_said(scheduler, reason):
    with pytest.raises(ValueError, match=reason):
        check_scheduler(scheduler, OBJECTIVES["epsilon"])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_schedule_of_another_resolution_fits_only_a_model_of_it(prediction):
    rescaled = rescale_scheduler(OWN[prediction], 256, 512)
    check_scheduler(rescaled, trained_objective(rescaled))
    with pytest.raises(ValueError, match="noise at its timesteps"):
        check_scheduler(rescaled, OBJECTIVES[prediction])


def test_the_settings_of_steps_are_free():
    for settings in ({"timestep_spacing": "leading"}, {"set_alpha_to_one": True}):
        check_scheduler(DDIMScheduler.from_config(OWN["epsilon"].config, **settings), OBJECTIVES["epsilon"])
    for settings in ({"use_karras_sigmas": True}, {"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}):
        scheduler = DPMSolverMultistepScheduler.from_config(OWN["epsilon"].config, **settings)
        check_scheduler(scheduler, OBJECTIVES["epsilon"])
    for settings in ({"shift": 1.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}):
        check_scheduler(type(OWN["flow"]).from_config(OWN["flow"].config, **settings), OBJECTIVES["flow"])
