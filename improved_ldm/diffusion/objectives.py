"""Training objectives: prediction of noise (ε), velocity (v) or flow, with distributions of timesteps and weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from improved_ldm.diffusion.bound import VariationalBound
from improved_ldm.diffusion.schedules import (
    NUM_TRAIN_TIMESTEPS,
    BetaSchedule,
    SamplerName,
    TimestepSpacing,
    flow_scheduler,
    rescale_scheduler,
    variance_preserving_sampler,
    variance_preserving_scheduler,
)

Prediction = Literal["epsilon", "v_prediction", "flow"]
LossWeighting = Literal["uniform", "min_snr"]


class VariancePreservingObjective:
    """ε- or v-prediction on a schedule of betas, with uniformly distributed timesteps.

    Args:
        prediction: `epsilon` or `v_prediction`.
        loss_weighting: Weight of the squared error: `uniform`, or `min_snr` with γ = 5.
        scheduler: Scheduler with the noise schedule; default: Stable Diffusion's.
        learned_variance: Whether the denoiser also predicts the variance of ancestral steps, in as many further
            channels; the variational bound is then added to the loss, with weight 1.

    Source: Berrada et al., 2024, in our reading; v-prediction and min-SNR are our additions. Learned variance: DiT.
    """

    def __init__(
        self,
        prediction: Literal["epsilon", "v_prediction"],
        loss_weighting: LossWeighting = "uniform",
        scheduler: SchedulerMixin | None = None,
        learned_variance: bool = False,
    ):
        self.prediction, self.loss_weighting = prediction, loss_weighting
        self.scheduler = scheduler or variance_preserving_scheduler(prediction)
        self.learned_variance = learned_variance
        self.bound = None
        if learned_variance:
            self.scheduler = variance_preserving_sampler(self.scheduler.config, "ddpm", learned_variance=True)
            self.bound = VariationalBound(self.scheduler.betas)
        alphas_cumprod = (1 - self.scheduler.betas.double()).cumprod(0)  # float32 rounds 1 - ᾱ at the first timesteps
        self.snr = (alphas_cumprod / (1 - alphas_cumprod)).clamp(min=1e-8).float()  # 0 at a zero terminal SNR

    def sampling_scheduler(
        self, sampler: SamplerName | None = None, timestep_spacing: TimestepSpacing | None = None
    ) -> SchedulerMixin:
        """A new scheduler to sample from a model with this objective; training moves its own scheduler to a device.

        Args:
            sampler: Sampler, as in `variance_preserving_sampler`; default: `ddpm` with a learned variance, else
                `ddim`.
            timestep_spacing: Spacing of its timesteps; default: the sampler's.

        Raises:
            ValueError: As `variance_preserving_sampler`.
        """
        if sampler is None and timestep_spacing is None:
            return type(self.scheduler).from_config(self.scheduler.config)
        sampler = sampler or ("ddpm" if self.learned_variance else "ddim")
        return variance_preserving_sampler(self.scheduler.config, sampler, timestep_spacing, self.learned_variance)

    def rescaled(self, from_resolution: float, to_resolution: float) -> "VariancePreservingObjective":
        """The objective with which images at another resolution are as uncertain at each timestep."""
        return self.with_schedule(rescale_scheduler(self.sampling_scheduler(), from_resolution, to_resolution).config)

    def with_schedule(self, config: Mapping[str, Any]) -> "VariancePreservingObjective":
        """The objective on the schedule of a scheduler's config.

        Raises:
            ValueError: If the scheduler is for another prediction type.
        """
        if config.get("prediction_type") != self.prediction:
            other = config.get("prediction_type", "flow")
            raise ValueError(f"the scheduler is for the prediction {other!r}, not {self.prediction!r}.")
        scheduler = DDIMScheduler.from_config(config)
        return VariancePreservingObjective(self.prediction, self.loss_weighting, scheduler, self.learned_variance)

    def has_noise_of(self, other: "VariancePreservingObjective") -> bool:
        """Whether another objective adds the same noise at each timestep."""
        return torch.allclose(self.snr, other.snr, rtol=1e-3)

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
        self.snr = self.snr.to(timestep.device)
        snr = self.snr[timestep]
        return snr.clamp(max=5.0) / (snr if self.prediction == "epsilon" else snr + 1)

    def losses(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The terms of the loss per image, each (batch,) float32; their sum is the loss.

        Args:
            prediction: (batch, channels, height, width), or (batch, 2 · channels, height, width) with a variance.
            latents: (batch, channels, height, width) z.
            noise: (batch, channels, height, width) ε.
            timestep: (batch,) int.

        Returns:
            `mse`, the weighted squared error, and with a learned variance `vb`, the variational bound in bits per
            dimension, which trains the variance only.
        """
        mean, variance = prediction[:, : latents.shape[1]], prediction[:, latents.shape[1] :]
        errors = _squared_error(mean, self.target(latents, noise, timestep))
        terms = {"mse": self.loss_weight(timestep) * errors}
        if self.bound is not None:
            noisy = self.add_noise(latents, noise, timestep)
            terms["vb"] = self.bound(mean, variance, latents, noisy, timestep, self.prediction == "v_prediction")
        return terms


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

    def sampling_scheduler(
        self, sampler: SamplerName | None = None, timestep_spacing: TimestepSpacing | None = None
    ) -> SchedulerMixin:
        """A scheduler to sample from a model with this objective.

        Args:
            sampler: `euler` or `dpm_solver`; default: `euler`.
            timestep_spacing: None; the shift sets the spacing of a flow.

        Raises:
            ValueError: If the sampler is not for a flow, or a spacing is given.
        """
        if timestep_spacing is not None:
            raise ValueError(f"`timestep_spacing` is {timestep_spacing!r}; for a flow, `shift` sets the spacing.")
        return flow_scheduler(self.shift, sampler or "euler")

    def rescaled(self, from_resolution: float, to_resolution: float) -> "FlowObjective":
        """The objective with which images at another resolution are as uncertain at each timestep."""
        return self.with_schedule(rescale_scheduler(self.sampling_scheduler(), from_resolution, to_resolution).config)

    def with_schedule(self, config: Mapping[str, Any]) -> "FlowObjective":
        """The objective with the shift of a scheduler's config.

        Raises:
            ValueError: If the scheduler is not for a flow.
        """
        shift = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift")
        if shift is None:
            raise ValueError(f"the scheduler is for the prediction {config.get('prediction_type')!r}, not 'flow'.")
        return replace(self, shift=shift)

    def has_noise_of(self, other: "FlowObjective") -> bool:
        """Whether another objective has the same shift."""
        return self.shift == other.shift

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

    def losses(
        self, prediction: torch.Tensor, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The loss per image, `mse` (batch,) float32, as the other objectives give it; further channels are ignored.

        Source: Stable Diffusion 3: the squared error of the velocity, without a weight.
        """
        target = self.target(latents, noise, timestep)
        return {"mse": _squared_error(prediction[:, : latents.shape[1]], target)}


Objective = VariancePreservingObjective | FlowObjective


def make_objective(
    prediction: Prediction,
    loss_weighting: LossWeighting = "uniform",
    beta_schedule: BetaSchedule = "scaled_linear",
    beta_start: float | None = None,
    beta_end: float | None = None,
    learned_variance: bool = False,
    shift: float = 1.0,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> Objective:
    """The objective of a prediction type.

    Args:
        prediction: `epsilon`, `v_prediction` or `flow`.
        loss_weighting: Loss weighting of `epsilon` and `v_prediction`.
        beta_schedule: Betas of `epsilon` and `v_prediction`, as in `variance_preserving_scheduler`.
        beta_start: First of these betas; default: that of the schedule's authors.
        beta_end: Last of these betas.
        learned_variance: Whether the denoiser of `epsilon` or `v_prediction` predicts a variance as well.
        shift: Shift of `flow`.
        logit_mean: Mean of logit(σ) of `flow`.
        logit_std: Standard deviation of logit(σ) of `flow`.

    Raises:
        ValueError: If the betas are not valid, or a flow is asked for a learned variance.
    """
    if prediction == "flow":
        if learned_variance:
            raise ValueError("`learned_variance` is true; the steps of a 'flow' have no variance.")
        return FlowObjective(shift, logit_mean, logit_std)
    scheduler = variance_preserving_scheduler(prediction, beta_schedule, beta_start, beta_end)
    return VariancePreservingObjective(prediction, loss_weighting, scheduler, learned_variance)


def objective_loss(
    objective: Objective,
    prediction: torch.Tensor,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timestep: torch.Tensor,
) -> torch.Tensor:
    """The mean loss of a batch, a float32 scalar; for the arguments see `losses` of the objective."""
    return sum(objective.losses(prediction, latents, noise, timestep).values()).mean()


def _squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error per image, (batch,) float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
