"""Training objectives: prediction of noise (ε), velocity (v) or flow, with distributions of timesteps and weights."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from improved_ldm.diffusion.schedules import (
    NUM_TRAIN_TIMESTEPS,
    flow_scheduler,
    rescale_scheduler,
    variance_preserving_scheduler,
)

Prediction = Literal["epsilon", "v_prediction", "flow"]
LossWeighting = Literal["uniform", "min_snr"]


class VariancePreservingObjective:
    """ε- or v-prediction on LDM's schedule, with uniformly distributed timesteps.

    Args:
        prediction: `epsilon` or `v_prediction`.
        loss_weighting: `uniform`, or `min_snr` with γ = 5.
        scheduler: Scheduler with the noise schedule; default: LDM's.

    Source: Berrada et al., 2024, in our reading; v-prediction and min-SNR are our additions.
    """

    def __init__(
        self,
        prediction: Literal["epsilon", "v_prediction"],
        loss_weighting: LossWeighting = "uniform",
        scheduler: DDIMScheduler | None = None,
    ):
        self.prediction, self.loss_weighting = prediction, loss_weighting
        self.scheduler = scheduler or variance_preserving_scheduler(prediction)

    def sampling_scheduler(self) -> DDIMScheduler:
        """A new scheduler to sample from a model with this objective; training moves its own scheduler to a device."""
        return DDIMScheduler.from_config(self.scheduler.config)

    def rescaled(self, from_resolution: float, to_resolution: float) -> "VariancePreservingObjective":
        """The objective with which images at another resolution are as uncertain at each timestep."""
        return self.with_schedule(rescale_scheduler(self.sampling_scheduler(), from_resolution, to_resolution).config)

    def with_schedule(self, config: dict[str, Any]) -> "VariancePreservingObjective":
        """The objective on the schedule of a scheduler's config.

        Raises:
            ValueError: If the scheduler is for another prediction type.
        """
        if config.get("prediction_type") != self.prediction:
            other = config.get("prediction_type", "flow")
            raise ValueError(f"the scheduler is for the prediction {other!r}, not {self.prediction!r}.")
        return VariancePreservingObjective(self.prediction, self.loss_weighting, DDIMScheduler.from_config(config))

    def timestep_quantile(self, fraction: torch.Tensor) -> torch.Tensor:
        """(batch,) timesteps at these quantiles, (batch,) fractions in (0, 1); all timesteps are equally likely."""
        return (NUM_TRAIN_TIMESTEPS * fraction).long()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """z_t = sqrt(ᾱ_t) z + sqrt(1 − ᾱ_t) ε, all (batch, channels, height, width)."""
        return self.scheduler.add_noise(latents, noise, timestep)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """ε, or v = sqrt(ᾱ_t) ε − sqrt(1 − ᾱ_t) z."""
        if self.prediction == "epsilon":
            return noise
        return self.scheduler.get_velocity(latents, noise, timestep)

    def loss_weight(self, timestep: torch.Tensor) -> torch.Tensor:
        """(batch,) weights of the squared error."""
        if self.loss_weighting == "uniform":
            return torch.ones_like(timestep, dtype=torch.float32)
        snr = compute_snr(self.scheduler, timestep).clamp(min=1e-8)  # 0 at a zero terminal SNR
        return snr.clamp(max=5.0) / (snr if self.prediction == "epsilon" else snr + 1)


@dataclass(frozen=True)
class FlowObjective:
    """Flow matching on straight paths, with noise levels from a shifted logit-normal distribution.

    Args:
        shift: Shift towards higher noise levels, in training and sampling.
        logit_mean: Mean of logit(σ) before the shift.
        logit_std: Standard deviation of logit(σ) before the shift.

    Source: Stable Diffusion 3; our addition to the paper's recipe.
    """

    shift: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def sampling_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """A scheduler to sample from a model with this objective."""
        return flow_scheduler(self.shift)

    def rescaled(self, from_resolution: float, to_resolution: float) -> "FlowObjective":
        """The objective with which images at another resolution are as uncertain at each timestep."""
        return self.with_schedule(rescale_scheduler(self.sampling_scheduler(), from_resolution, to_resolution).config)

    def with_schedule(self, config: dict[str, Any]) -> "FlowObjective":
        """The objective with the shift of a scheduler's config.

        Raises:
            ValueError: If the scheduler is not for a flow.
        """
        if "shift" not in config:
            raise ValueError(f"the scheduler is for the prediction {config.get('prediction_type')!r}, not 'flow'.")
        return replace(self, shift=config["shift"])

    def timestep_quantile(self, fraction: torch.Tensor) -> torch.Tensor:
        """(batch,) timesteps 1000 · σ at these quantiles, (batch,) fractions in (0, 1); logit(σ) is normal."""
        sigma = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(fraction))
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
        loss_weighting: Loss weighting of `epsilon` and `v_prediction`.
        shift: Shift of `flow`.
        logit_mean: Mean of logit(σ) of `flow`.
        logit_std: Standard deviation of logit(σ) of `flow`.
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
