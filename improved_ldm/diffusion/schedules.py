"""The noise schedules that the family trains and samples with, as diffusers schedulers."""

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

NUM_TRAIN_TIMESTEPS = 1000


def variance_preserving_scheduler(prediction_type: str) -> DDIMScheduler:
    """DDIM on the `scaled_linear` betas of latent diffusion, 0.00085 to 0.012.

    Args:
        prediction_type: `epsilon` or `v_prediction`.

    Source: Berrada et al., 2024; trailing timestep spacing is our choice, it starts at the noisiest step.
    """
    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def flow_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along straight flow paths.

    Args:
        shift: moves noise levels up: σ' = shift · σ / (1 + (shift − 1) σ).

    Source: Stable Diffusion 3.
    """
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)
