"""What a denoiser is trained to predict: noise (ε), velocity (v) or flow, and how timesteps and losses are weighed."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from improved_ldm.diffusion.schedules import (
    NUM_TRAIN_TIMESTEPS,
    flow_scheduler,
    rescale_scheduler,
    variance_preserving_scheduler,
)

Prediction = Literal["epsilon", "v_prediction", "flow"]
LossWeighting = Literal["uniform", "min_snr"]


class VariancePreservingObjective:
    """ε- or v-prediction on LDM's schedule, timesteps drawn uniformly.

    Args:
        prediction: `epsilon` or `v_prediction`.
        loss_weighting: `uniform`, or `min_snr` with γ = 5.
        scheduler: its schedule; default: LDM's.

    Source: Berrada et al., 2024; v-prediction and min-SNR are our additions.
    """

    def __init__(
        self,
        prediction: Literal["epsilon", "v_prediction"],
        loss_weighting: LossWeighting = "uniform",
        scheduler: DDIMScheduler | None = None,
    ):
        self.prediction, self.loss_weighting = prediction, loss_weighting
        self.scheduler = scheduler or variance_preserving_scheduler(prediction)
        self.forward_process = DDPMScheduler.from_config(self.scheduler.config)

    def sampling_scheduler(self) -> DDIMScheduler:
        """The scheduler that samples a model trained on this objective."""
        return self.scheduler

    def rescaled(self, from_resolution: float, to_resolution: float) -> "VariancePreservingObjective":
        """The objective that leaves images of another resolution as uncertain at each timestep."""
        scheduler = rescale_scheduler(self.scheduler, from_resolution, to_resolution)
        return VariancePreservingObjective(self.prediction, self.loss_weighting, scheduler)

    def with_schedule(self, config: dict[str, Any]) -> "VariancePreservingObjective":
        """The objective on the schedule of a scheduler's config.

        Raises:
            ValueError: if that scheduler is for another prediction.
        """
        if config.get("prediction_type") != self.prediction:
            other = config.get("prediction_type", "flow")
            raise ValueError(f"the scheduler is for the prediction {other!r}, not {self.prediction!r}.")
        return VariancePreservingObjective(self.prediction, self.loss_weighting, DDIMScheduler.from_config(config))

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """(batch,) timesteps on the generator's device."""
        return torch.randint(NUM_TRAIN_TIMESTEPS, (batch_size,), generator=generator, device=generator.device)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(ᾱ_t) z + sqrt(1 − ᾱ_t) ε, all (batch, channels, height, width)."""
        return self.forward_process.add_noise(latents, noise, timestep)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """ε, or v = sqrt(ᾱ_t) ε − sqrt(1 − ᾱ_t) z."""
        if self.prediction == "epsilon":
            return noise
        return self.forward_process.get_velocity(latents, noise, timestep)

    def loss_weight(self, timestep: torch.Tensor) -> torch.Tensor:
        """(batch,) weights of the squared error."""
        if self.loss_weighting == "uniform":
            return torch.ones_like(timestep, dtype=torch.float32)
        snr = compute_snr(self.forward_process, timestep).clamp(min=1e-8)  # 0 at a zero terminal SNR
        return snr.clamp(max=5.0) / (snr if self.prediction == "epsilon" else snr + 1)


@dataclass(frozen=True)
class FlowObjective:
    """Flow matching on straight paths, noise levels drawn from a shifted logit-normal.

    Args:
        shift: moves noise levels up, in training and in sampling.
        logit_mean: mean of logit(σ) before the shift.
        logit_std: deviation of logit(σ) before the shift.

    Source: Stable Diffusion 3; our addition to the paper's recipe.
    """

    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def sampling_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler that samples a model trained on this objective."""
        return flow_scheduler(self.shift)

    def rescaled(self, from_resolution: float, to_resolution: float) -> "FlowObjective":
        """The objective that leaves images of another resolution as uncertain at each timestep."""
        return replace(self, shift=self.shift * to_resolution / from_resolution)

    def with_schedule(self, config: dict[str, Any]) -> "FlowObjective":
        """The objective with the shift of a scheduler's config.

        Raises:
            ValueError: if that scheduler is not for a flow.
        """
        if "shift" not in config:
            raise ValueError(f"the scheduler is for the prediction {config.get('prediction_type')!r}, not 'flow'.")
        return replace(self, shift=config["shift"])

    def draw_timesteps(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """(batch,) timesteps 1000 · σ on the generator's device."""
        sigma = compute_density_for_timestep_sampling(
            "logit_normal", batch_size, self.logit_mean, self.logit_std, device=generator.device, generator=generator
        )
        return NUM_TRAIN_TIMESTEPS * self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """z_t = (1 − σ) z + σ ε, all (batch, channels, height, width)."""
        sigma = (timestep / NUM_TRAIN_TIMESTEPS).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """ε − z, the direction of the path."""
        return noise - latents

    def loss_weight(self, timestep: torch.Tensor) -> torch.Tensor:
        """(batch,) weights of the squared error: ones."""
        return torch.ones_like(timestep)


Objective = VariancePreservingObjective | FlowObjective


def make_objective(
    prediction: Prediction,
    loss_weighting: LossWeighting = "uniform",
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Objective:
    """The objective of a prediction type.

    Args:
        prediction: `epsilon`, `v_prediction` or `flow`.
        loss_weighting: for `epsilon` and `v_prediction`.
        shift: for `flow`.
        logit_mean: for `flow`.
        logit_std: for `flow`.
    """
    if prediction == "flow":
        return FlowObjective(shift, logit_mean, logit_std)
    return VariancePreservingObjective(prediction, loss_weighting)


def objective_loss(
    objective: Objective, prediction: torch.Tensor, target: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """The mean weighted squared error of a batch, a float32 scalar; prediction and target (batch, c, h, w)."""
    errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return (objective.loss_weight(timestep) * errors).mean()
