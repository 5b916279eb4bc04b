"""The denoising loop: from noise to latents, in the steps of a scheduler."""

import copy

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from improved_ldm.conditioning.guidance import GuidedConditions
from improved_ldm.conditioning.values import shown
from improved_ldm.diffusion.fitting import check_scheduler
from improved_ldm.diffusion.schedules import (
    reads_variance,
    scaled_input,
    step_kwargs,
    without_unread_variance,
)
from improved_ldm.sampling.arguments import Generators
from improved_ldm.sampling.callbacks import StepEnd
from improved_ldm.sampling.steps import set_steps


class NonFiniteLatentsError(ValueError):
    """Latents or images are NaN or infinite, because of the weights, the schedule or the dtype."""


class DenoisingMixin:
    """The part of the pipeline that runs the denoising loop."""

    def check_scheduler(self):
        """Raise a ValueError if there is no scheduler, or it does not fit the denoiser's training."""
        if self.scheduler is None:
            raise ValueError("`scheduler` is None; the pipeline needs one to sample.")
        if not isinstance(self.scheduler, SchedulerMixin):
            raise TypeError(f"`scheduler` is {shown(self.scheduler)}; it must be a scheduler of diffusers.")
        if self.scheduler.config is not self._fitting_config:
            check_scheduler(self.scheduler, self.config.objective, self.denoiser.predicts_variance)
            self._fitting_config = self.scheduler.config

    def scheduled(
        self,
        num_inference_steps: int | None = None,
        latent_shape: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> SchedulerMixin:
        """A copy of the scheduler for one call, with its timesteps set.

        Calls in several threads do not share its state. Schedulers that shift with the image's size get the number of
        tokens. Exactly one of `num_inference_steps`, `timesteps` and `sigmas` must be given.

        Args:
            num_inference_steps: Number of steps.
            latent_shape: Shape of the latents.
            device: Device of the timesteps.
            timesteps: Timesteps.
            sigmas: Noise levels.

        Raises:
            ValueError: If the scheduler does not accept them.
        """
        steps = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        ((name, value),) = ((name, value) for name, value in steps.items() if value is not None)
        scheduler = without_unread_variance(copy.deepcopy(self.scheduler))
        kwargs = {}
        if scheduler.config.get("use_dynamic_shifting"):
            num_tokens = latent_shape[-1] * latent_shape[-2] // self.denoiser.patch_size**2
            kwargs["mu"] = calculate_shift(num_tokens)
        set_steps(scheduler, name, value, device=device, **kwargs)
        return scheduler

    def denoise(
        self,
        latents: torch.Tensor,
        scheduler: SchedulerMixin,
        guided: GuidedConditions,
        generator: Generators,
        on_step_end: StepEnd | None,
    ) -> torch.Tensor:
        """The latents (images, latent_channels, height, width) after all steps of the scheduler.

        Raises:
            NonFiniteLatentsError: If they become NaN or infinite.
        """
        timesteps = scheduler.timesteps
        self.denoiser.start_caching(len(guided.terms_at(timesteps[0], reads_variance(scheduler))))
        self._guidance_scale, self._guidance_rescale = guided.guidance_scale, guided.guidance_rescale
        self._num_timesteps, self._interrupt = len(timesteps), False
        options = step_kwargs(scheduler, generator)
        finite = [latents.isfinite().flatten(1).all(1)]  # (images,) at the start and after each step, on the device
        try:
            for step, timestep in enumerate(self.progress_bar(timesteps)):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                prediction = self.guided_prediction(scheduler, latents, timestep, guided)
                latents = scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
                latents = latents.to(prediction.dtype)
                if on_step_end is not None:
                    latents, guided = on_step_end(self, step, timestep, latents, guided)
                finite.append(latents.isfinite().flatten(1).all(1))
        finally:
            self._current_timestep = None
        self.check_finite(torch.stack(finite), len(timesteps))
        return latents

    def guided_prediction(
        self, scheduler: SchedulerMixin, latents: torch.Tensor, timestep: torch.Tensor, guided: GuidedConditions
    ) -> torch.Tensor:
        """The guided prediction of one step, all terms in one evaluation.

        Returns:
            (batch, latent_channels, height, width), or twice as many channels if the scheduler reads a variance.
        """
        terms, num_channels = guided.terms_at(timestep, reads_variance(scheduler)), latents.shape[1]
        inputs = scaled_input(scheduler, torch.cat([latents] * len(terms)), timestep)
        with self.denoiser.guidance_context(len(terms)):
            prediction = self.denoiser(inputs, timestep, **guided.batch(terms).kwargs(), return_dict=False)[0]
        if not reads_variance(scheduler):
            prediction = prediction[:, :num_channels]
        return guided.combine(prediction, terms, num_channels)

    def check_finite(self, finite: torch.Tensor, num_steps: int):
        """Raise a NonFiniteLatentsError that names the step if latents are NaN or infinite; syncs the device once.

        Args:
            finite: (steps + 1, images) bool, whether an image's latents are finite at the start and after each step.
            num_steps: Steps in the whole call.
        """
        finite = finite.cpu()
        if finite.all():
            return
        step = int((~finite).any(1).int().argmax())
        when = f"after step {step} of {num_steps}" if step else "before the first step"
        raise NonFiniteLatentsError(
            f"the latents are NaN or infinite {when}, of {(~finite[step]).sum()} of {finite.shape[1]} images; "
            f"the {type(self.denoiser).__name__} computes in {dtype_name(self.denoiser)}, its scheduler is "
            f"{type(self.scheduler).__name__}."
        )


def dtype_name(model: ModelMixin) -> str:
    """The name of the dtype that a model computes in."""
    return str(model.dtype).removeprefix("torch.")
