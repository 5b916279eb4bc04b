"""The pipeline, from a prompt or a class and the control inputs to images."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from improved_ldm.autoencoder import decode_latents, spatial_factor
from improved_ldm.conditioning.control import control_tensor
from improved_ldm.conditioning.guidance import GuidedConditions
from improved_ldm.conditioning.values import Size, read_choice, read_flag, read_integer
from improved_ldm.loading import DENOISER_NAMES, CheckedPipeline
from improved_ldm.lora import LoraLoaderMixin
from improved_ldm.models.active_adapters import scaled_adapters
from improved_ldm.sampling.arguments import (
    MAX_IMAGES,
    check_latents,
    logger,
    read_adapter_scale,
    read_generators,
    read_schedule,
)
from improved_ldm.sampling.callbacks import CALLBACK_TENSORS, Callback, CallState, read_callback
from improved_ldm.sampling.components import (
    AS_BEFORE,
    check_components,
    check_text,
    remember_settings,
    sampling_settings,
)
from improved_ldm.sampling.denoising import DenoisingMixin, NonFiniteLatentsError, dtype_name
from improved_ldm.sampling.prompts import PromptMixin
from improved_ldm.sampling.scales import ScalesMixin
from improved_ldm.sampling.sizes import SizesMixin

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ImprovedLDMPipeline(
    CheckedPipeline,
    PromptMixin,
    SizesMixin,
    ScalesMixin,
    DenoisingMixin,
    CallState,
    LoraLoaderMixin,
    DiffusionPipeline,
):
    """Samples images from a prompt or a class label, controlled by size, crop and flip.

    Args:
        vae: Any diffusers autoencoder for images.
        transformer: One of the family's transformers; give either this or `unet`.
        unet: The family's UNet.
        scheduler: Any diffusers scheduler that fits the denoiser's objective.
        text_encoder: Any Hugging Face text encoder, for a text-conditional denoiser.
        tokenizer: Tokenizer of the text encoder.
        text_padding: Padding of short prompts: `zero`, `mask`, `replicate` or `noisy_replicate`.
        text_noise_scale: β_txt of the noisy replicate padding.
        max_text_tokens: L, the length of the token sequence.
        default_original_size: Shorter side, in pixels, of the default `original_size`; None for the output's size.
        default_size: (height, width) of samples in pixels; default: the square that the denoiser was trained at.
        default_guidance_scale: λ if the call gives none.
        default_num_inference_steps: Steps if the call gives none.
        guidance_options: Where and when the semantic guidance acts, if the call does not say: a dictionary with the
            fields of `GuidanceOptions`, `channels`, `schedule`, `power` and `interval`. Default: on all latent
            channels at all timesteps.
        class_names: Names of the classes, for the model card and the user.
        lineage: Origin of the weights, one record per transfer, for the model card and the user.
        objective: Prediction type and noise that the denoiser was trained with, see `trained_objective`; default:
            those of the scheduler. Other schedulers must fit it.
        control_seen: Ranges of the control in the training samples, as `ControlRanges` records them; None if they are
            not known. Control that never varied in training has no effect, which is said once when it is asked for.

    The denoiser carries the settings, from `text_padding` on: those that are not given are taken from its last
    pipeline.

    Raises:
        ValueError: If there is no `vae`, or there are two denoisers.
        TypeError: If the denoiser is not one of the family's.

    Source: Berrada et al., 2024.
    """

    model_cpu_offload_seq = "text_encoder->transformer->unet->vae"
    _optional_components: ClassVar[list[str]] = [*DENOISER_NAMES, "text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_TENSORS)

    def __init__(
        self,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        transformer: ModelMixin | None = None,
        unet: ModelMixin | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_padding: str = AS_BEFORE,
        text_noise_scale: float = AS_BEFORE,
        max_text_tokens: int = AS_BEFORE,
        default_original_size: int | None = AS_BEFORE,
        default_size: Sequence[int] | None = AS_BEFORE,
        default_guidance_scale: float = AS_BEFORE,
        default_num_inference_steps: int = AS_BEFORE,
        class_names: list[str] | None = AS_BEFORE,
        lineage: list[dict[str, Any]] | None = AS_BEFORE,
        objective: dict[str, Any] | None = AS_BEFORE,
        guidance_options: dict[str, Any] | None = AS_BEFORE,
        control_seen: dict[str, Any] | None = AS_BEFORE,
    ):
        super().__init__()
        check_components(vae, transformer, unet)
        self.register_modules(
            vae=vae,
            transformer=transformer,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        given = {
            "text_padding": text_padding,
            "text_noise_scale": text_noise_scale,
            "max_text_tokens": max_text_tokens,
            "default_original_size": default_original_size,
            "default_size": default_size,
            "default_guidance_scale": default_guidance_scale,
            "default_num_inference_steps": default_num_inference_steps,
            "class_names": class_names,
            "lineage": lineage,
            "objective": objective,
            "guidance_options": guidance_options,
            "control_seen": control_seen,
        }
        settings = sampling_settings(given, self.denoiser, scheduler)
        check_text(text_encoder, settings["max_text_tokens"])
        self.register_to_config(**settings)
        remember_settings(self.denoiser, self.config)
        self.vae_scale_factor = spatial_factor(vae)
        self._fitting_config = None  # config of the scheduler that last passed the check
        self._said_control: set[str] = set()  # control that never varied in training, and was asked for
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def denoiser(self) -> ModelMixin:
        """The denoiser: the `transformer` or the `unet`."""
        return self.unet if self.transformer is None else self.transformer

    @denoiser.setter
    def denoiser(self, denoiser: ModelMixin):
        self.register_modules(**dict.fromkeys(DENOISER_NAMES) | {denoiser.component: denoiser})

    @property
    def components(self) -> dict[str, Any]:
        """The components; another pipeline made from them samples the same images."""
        remember_settings(self.denoiser, self.config)
        return super().components

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        class_labels: int | str | list[int | str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        control_guidance_scale: float = 1.0,
        original_size: Size | list[Size] | None = None,
        crops_coords_top_left: Size | list[Size] | None = None,
        crop_size: Size | list[Size] | None = None,
        target_size: Size | list[Size] | None = None,
        flip: bool | list[bool] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        guidance_rescale: float = 0.0,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        colour: Sequence[float] | list[Sequence[float]] | None = None,
        guidance_options: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Sample images.

        Every control input is one value for all images or a sequence with one per prompt or class label. A size is two
        numbers in a tuple, list, array or tensor; numbers may be from NumPy or PyTorch.

        Args:
            prompt: One or several prompts.
            negative_prompt: Prompts that the semantic guidance leads away from; default: the learned null prompt.
            class_labels: Classes to sample, in place of a prompt: integers, or names in `class_names`.
            height: Height in pixels, divisible by the autoencoder's factor times the patch size; default: the size at
                training.
            width: Width in pixels, as `height`.
            num_inference_steps: Network evaluations; default: the pipeline's `default_num_inference_steps`.
            guidance_scale: λ, strength of the semantic condition; 1 turns guidance off; default: the pipeline's
                `default_guidance_scale`.
            control_guidance_scale: β, strength of the control; 1 is plain classifier-free guidance.
            original_size: (height, width), in pixels, of the image that the sample is a view of; small values give
                less detail; default: the pipeline's `default_original_size`, or `crop_size` if that is larger.
            crops_coords_top_left: (top, left) of the view, in pixels of `original_size`; default (0, 0).
            crop_size: (height, width) of the view, in pixels of `original_size`; default: the part of the image to the
                right of the corner and below it.
            target_size: (height, width) that the view is scaled to; default (`height`, `width`), which alone set the
                size of the images.
            flip: Whether the view is mirrored; default False.
            num_images_per_prompt: Images per prompt or class label.
            generator: One generator for all images or a list with one per image. With a list, an image does not depend
                on the others in its batch.
            latents: (images, latent_channels, height / factor, width / factor) noise of unit variance to start from.
            output_type: `pil`, `np` (images, height, width, 3) in [0, 1], `pt` (images, 3, height, width) in [0, 1]
                or `latent`.
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Function that is called as (pipeline, step, timestep, tensors). It may return changed
                tensors, set `_guidance_scale`, where 0 turns guidance off, or set `_interrupt`, which skips the
                remaining steps.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets, from
                `_callback_tensor_inputs`; with guidance, `prompt_embeds` has the negative rows first, and a row of NaN
                is the null prompt.
            timesteps: Descending timesteps in place of `num_inference_steps`, for schedulers that accept them.
            sigmas: Descending noise levels in place of `num_inference_steps`, for schedulers that accept them.
            guidance_rescale: φ in [0, 1], how far the deviation of guided predictions is rescaled to that of unguided
                ones.
            prompt_embeds: (prompts, tokens, text_dim) in place of `prompt`; see `encode_prompt` for all six.
            negative_prompt_embeds: Embeds in place of `negative_prompt`.
            pooled_prompt_embeds: (prompts, pooled_dim), for a denoiser that reads pooled text.
            negative_pooled_prompt_embeds: Pooled embeds that belong to `negative_prompt_embeds`.
            prompt_attention_mask: (prompts, tokens), 1 at the prompt's own tokens, after which the pipeline pads;
                default: all ones.
            negative_prompt_attention_mask: Mask that belongs to `negative_prompt_embeds`.
            attention_kwargs: `{"scale": s}` multiplies the strength of all adapters in this call.
            joint_attention_kwargs: Another name for `attention_kwargs`.
            cross_attention_kwargs: Another name for `attention_kwargs`.
            colour: Mean and standard deviation of the luminance, then of the saturation, in [0, 1]; default: unknown.
            guidance_options: Where and when the semantic guidance acts, with the fields of `GuidanceOptions`: `{}` for
                all latent channels at all timesteps, `{"channels": 3}` for the first three channels,
                `{"schedule": "power_cosine", "power": 4.0}`, or `{"schedule": "interval", "interval": [100, 800]}`;
                default: the pipeline's `guidance_options`.

        Returns:
            An output whose `.images` have the requested type, ordered by prompt, then by image of the prompt.

        Raises:
            ValueError: Before any work, if arguments contradict the model or each other.
            NonFiniteLatentsError: If latents or images become NaN or infinite; the message names the step.
        """
        check_components(self.vae, self.transformer, self.unet)
        if self.denoiser is None:
            raise ValueError("the pipeline has no denoiser: give it a `transformer` or a `unet`.")
        self.check_scheduler()
        embeds = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        semantics = self.read_semantics(prompt, negative_prompt, class_labels, embeds)
        num_images_per_prompt = read_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        num_images = len(semantics) * num_images_per_prompt
        height, width = self.read_sides(height, width, num_images)
        controls = self.make_controls(
            len(semantics),
            height,
            width,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            crop_size=crop_size,
            target_size=target_size,
            flip=flip,
            colour=colour,
        )
        guidance = self.read_guidance(guidance_scale, control_guidance_scale, guidance_rescale, guidance_options)
        adapter_scale = read_adapter_scale(
            attention_kwargs=attention_kwargs,
            joint_attention_kwargs=joint_attention_kwargs,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        schedule = read_schedule(num_inference_steps, timesteps, sigmas, self.config.default_num_inference_steps)
        on_step_end = read_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        generator = read_generators(generator, num_images)
        read_choice("output_type", output_type, OUTPUT_TYPES)
        return_dict = read_flag("return_dict", return_dict)
        latent_shape = self.latent_shape(num_images, height, width)
        if latents is not None:
            check_latents(latents, latent_shape)

        device, dtype = self._execution_device, self.denoiser.dtype
        scheduler = self.scheduled(latent_shape=latent_shape, device=device, **schedule)
        if latents is None:
            latents = randn_tensor(latent_shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device, dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        with self.adapters_scaled(adapter_scale):
            positive, negative = self.semantic_conditions(semantics, num_images_per_prompt, generator)
            control = (
                None if controls is None else control_tensor(controls).repeat_interleave(num_images_per_prompt, 0)
            )
            positive, negative = (part.to(device).with_control(control) for part in (positive, negative))
            positive, negative = (part.to(device, dtype) for part in (positive, negative.without_control()))
            guided = GuidedConditions(positive, negative, **guidance)
            latents = self.denoise(latents, scheduler, guided, generator, on_step_end)

        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def adapters_scaled(self, scale: float) -> AbstractContextManager:
        """Scale the strength of all adapters; a warning is logged if this has no effect."""
        if scale != 1 and (self.num_fused_loras or not self.get_list_adapters()):
            reason = "adapters that are fused keep their strength" if self.num_fused_loras else "no adapter is loaded"
            logger.warning(f"`attention_kwargs` has the scale {scale}, but {reason}.")
        return scaled_adapters([self.denoiser, self.text_encoder], scale)

    def decode(self, latents: torch.Tensor, output_type: str):
        """Decode latents to images of the requested type.

        Raises:
            NonFiniteLatentsError: If the images are NaN or infinite.
        """
        pixels = decode_latents(self.vae, latents)
        if not pixels.isfinite().all():
            raise NonFiniteLatentsError(
                f"the images are NaN or infinite; the {type(self.vae).__name__} computes in {dtype_name(self.vae)}."
            )
        return self.image_processor.postprocess(pixels, output_type=output_type)
