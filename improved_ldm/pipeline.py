"""The pipeline: a prompt or a class, and the control inputs, to images."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from improved_ldm.autoencoder import decode_latents, spatial_factor
from improved_ldm.conditioning.control import Control, check_pair, control_tensor
from improved_ldm.conditioning.guidance import GuidanceTerm, combine_predictions, guidance_terms
from improved_ldm.conditioning.inputs import Conditioning
from improved_ldm.conditioning.text import encode_prompts, pad_tokens
from improved_ldm.loading import DENOISER_NAMES, CheckedPipeline
from improved_ldm.lora import LoraLoaderMixin

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
TEXT_INPUTS = frozenset({"encoder_hidden_states", "pooled_projections"})

Size = tuple[int, int]


class ImprovedLDMPipeline(CheckedPipeline, LoraLoaderMixin, DiffusionPipeline):
    """Draws images from a prompt or a class label, steered by size, crop and flip.

    Args:
        vae: any diffusers autoencoder of images.
        transformer: one of the family's transformers, or
        unet: its UNet.
        scheduler: any diffusers scheduler that fits the denoiser's objective.
        text_encoder: any Hugging Face text encoder, for a text-conditional denoiser.
        tokenizer: the text encoder's tokenizer.
        text_padding: what stands behind a short prompt: `zero`, `mask`, `replicate`, `noisy_replicate`.
        text_noise_scale: β_txt of the noisy replicate padding.
        max_text_tokens: L, the length of the token sequence.
        default_original_size: shorter side, in pixels, of the `original_size` that is asked for by default; None
            asks for the size of the output.
        default_guidance_scale: λ where the call gives none.
        default_num_inference_steps: steps where the call gives none.
        class_names: the classes' names, for the card and the user.
        lineage: what the weights were made from, one record a transfer, for the card and the user.

    Source: Berrada et al., 2024.
    """

    model_cpu_offload_seq = "text_encoder->transformer->unet->vae"
    _optional_components: ClassVar[list[str]] = [*DENOISER_NAMES, "text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        transformer: ModelMixin | None = None,
        unet: ModelMixin | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_padding: str = "noisy_replicate",
        text_noise_scale: float = 0.02,
        max_text_tokens: int = 77,
        default_original_size: int | None = None,
        default_guidance_scale: float = 5.0,
        default_num_inference_steps: int = 50,
        class_names: list[str] | None = None,
        lineage: list[dict[str, Any]] | None = None,
    ):
        super().__init__()
        if transformer is not None and unet is not None:
            raise ValueError("`transformer` and `unet` are both given; a pipeline has one denoiser.")
        self.register_modules(
            vae=vae,
            transformer=transformer,
            unet=unet,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            text_padding=text_padding,
            text_noise_scale=text_noise_scale,
            max_text_tokens=max_text_tokens,
            default_original_size=default_original_size,
            default_guidance_scale=default_guidance_scale,
            default_num_inference_steps=default_num_inference_steps,
            class_names=class_names,
            lineage=lineage,
        )
        self.vae_scale_factor = spatial_factor(vae) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def denoiser(self) -> ModelMixin:
        """The denoiser, whichever backbone it is."""
        return self.unet if self.transformer is None else self.transformer

    @denoiser.setter
    def denoiser(self, denoiser: ModelMixin):
        self.register_modules(**dict.fromkeys(DENOISER_NAMES) | {denoiser.component: denoiser})

    @property
    def takes_text(self) -> bool:
        """Whether the denoiser reads prompts."""
        return bool(TEXT_INPUTS & self.denoiser.inputs)

    @property
    def default_size(self) -> int:
        """Pixels a side that the denoiser was trained at."""
        return self.denoiser.config.sample_size * self.vae_scale_factor

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        class_labels: int | list[int] | None = None,
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
        callback_on_step_end: Callable[[DiffusionPipeline, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Every control input is one value for all images or a list with one a prompt or class label.

        Args:
            prompt: what to draw.
            negative_prompt: what the semantic guidance leads away from; by default the learned null prompt.
            class_labels: which class to draw, in place of a prompt.
            height: pixels, divisible by the autoencoder's factor times the patch size; default: as trained.
            width: as `height`.
            num_inference_steps: network evaluations; default: the pipeline's `default_num_inference_steps`.
            guidance_scale: λ, strength of the semantic condition; 1 turns guidance off; default: the pipeline's
                `default_guidance_scale`.
            control_guidance_scale: β, strength of the control; 1 is classifier-free guidance alone.
            original_size: (height, width), pixels, of the image that the sample is a view of: small asks for little
                detail; default: the pipeline's `default_original_size`.
            crops_coords_top_left: (top, left) of the view, in pixels of `original_size`; default (0, 0).
            crop_size: (height, width) of the view, in pixels of `original_size`; default: what lies right and down
                of the corner.
            target_size: (height, width) that the view is scaled to; default (`height`, `width`).
            flip: whether the view is mirrored; default False.
            num_images_per_prompt: images for each prompt or class label.
            generator: source of randomness, one for all images or a list with one an image. With a list, an image
                does not depend on the batch that it is drawn in.
            latents: (images, latent_channels, height / factor, width / factor) noise of unit variance to start from.
            output_type: `pil`, `np` (images, height, width, 3) in [0, 1], `pt` (images, 3, height, width) in [0, 1]
                or `latent`.
            return_dict: return an `ImagePipelineOutput`, else a tuple.
            callback_on_step_end: called as (pipeline, step, timestep, tensors); may return changed `latents`.
            callback_on_step_end_tensor_inputs: which tensors the callback gets: `latents`.

        Returns:
            An output whose `.images` are in the asked type, ordered by prompt, then by image of the prompt.

        Raises:
            ValueError: before any work, for arguments that contradict the model or each other.
        """
        if self.denoiser is None:
            raise ValueError("the pipeline has no denoiser: give it a `transformer` or a `unet`.")
        height, width = _default(height, self.default_size), _default(width, self.default_size)
        num_inference_steps = _default(num_inference_steps, self.config.default_num_inference_steps)
        guidance_scale = _default(guidance_scale, self.config.default_guidance_scale)
        prompts, labels = _as_list(prompt), _as_list(class_labels)
        self.check_semantics(prompts, negative_prompt, labels)
        self.check_call(
            height, width, num_inference_steps, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs
        )
        batch_size = len(prompts or labels)
        num_images = batch_size * num_images_per_prompt
        controls = self.make_controls(
            batch_size, height, width, original_size, crops_coords_top_left, crop_size, target_size, flip
        )
        if controls is None and control_guidance_scale != 1:
            raise ValueError(f"`control_guidance_scale` is {control_guidance_scale}, but the model reads no control.")
        latent_shape = self.latent_shape(num_images, height, width)
        if isinstance(generator, list) and len(generator) != num_images:
            raise ValueError(
                f"`generator` is a list of {len(generator)}; it must have one for each of {num_images} images."
            )
        if latents is not None and tuple(latents.shape) != latent_shape:
            raise ValueError(f"`latents` is {tuple(latents.shape)}; it must be {latent_shape}.")

        device, dtype = self._execution_device, self.denoiser.dtype
        terms = guidance_terms(guidance_scale, control_guidance_scale)
        timesteps = self.set_timesteps(num_inference_steps, latent_shape, device)
        if latents is None:
            latents = randn_tensor(latent_shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        conditions = self.make_conditions(
            prompts, negative_prompt, labels, controls, terms, num_images_per_prompt, generator
        ).to(device, dtype)
        step_kwargs = self.scheduler_step_kwargs(generator)

        for step, timestep in enumerate(self.progress_bar(timesteps)):
            prediction = self.guided_prediction(latents, timestep, conditions, terms)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False, **step_kwargs)[0].to(dtype)
            if callback_on_step_end is not None:
                tensors = {name: latents for name in callback_on_step_end_tensor_inputs}
                latents = (callback_on_step_end(self, step, timestep, tensors) or {}).pop("latents", latents)

        images = latents if output_type == "latent" else self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_semantics(
        self, prompts: list[str] | None, negative_prompt: str | list[str] | None, labels: list[int] | None
    ):
        """Raise a ValueError where prompt and class do not fit the model or each other."""
        if (prompts is None) == (labels is None):
            given = "both" if prompts is not None else "neither"
            raise ValueError(f"give a `prompt` or `class_labels`; {given} was given.")
        if prompts is not None:
            if not self.takes_text:
                raise ValueError("`prompt` is given, but the model is class-conditional: give `class_labels`.")
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError("`prompt` is given, but the pipeline has no `text_encoder` and `tokenizer`.")
            if not prompts or not all(isinstance(text, str) for text in prompts):
                raise ValueError(f"`prompt` is {prompts!r}; it must be a string or a list of at least one string.")
            if negative_prompt is not None:
                negatives = _spread("negative_prompt", negative_prompt, len(prompts))
                if not all(isinstance(text, str) for text in negatives):
                    raise ValueError(
                        f"`negative_prompt` is {negative_prompt!r}; it must be a string or a list of them."
                    )
            return
        if negative_prompt is not None:
            raise ValueError("`negative_prompt` is given, but it needs a `prompt`.")
        num_classes = self.denoiser.config.num_classes
        if num_classes is None:
            raise ValueError("`class_labels` is given, but the model is text-conditional: give a `prompt`.")
        for label in labels or [None]:
            if not isinstance(label, int) or not 0 <= label < num_classes:
                raise ValueError(f"`class_labels` has {label!r}; labels must be integers from 0 to {num_classes - 1}.")

    def check_call(
        self,
        height: int,
        width: int,
        num_inference_steps: int,
        num_images_per_prompt: int,
        output_type: str,
        callback_tensors: tuple[str, ...],
    ):
        """Raise a ValueError for sizes, counts and names that cannot be."""
        multiple = self.vae_scale_factor * self.denoiser.patch_size
        for name, pixels in (("height", height), ("width", width)):
            if pixels <= 0 or pixels % multiple:
                raise ValueError(f"`{name}` is {pixels}; it must be a positive multiple of {multiple} pixels.")
        for name, count in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"`{name}` is {count!r}; it must be an integer ≥ 1.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}.")
        unknown = set(callback_tensors) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}; only 'latents' is there.")

    def make_controls(
        self,
        batch_size: int,
        height: int,
        width: int,
        original_size: Size | list[Size] | None,
        crops_coords_top_left: Size | list[Size] | None,
        crop_size: Size | list[Size] | None,
        target_size: Size | list[Size] | None,
        flip: bool | list[bool] | None,
    ) -> list[Control] | None:
        """One control record a prompt, defaults filled in; None for a model without control.

        Raises:
            ValueError: for lists of a wrong length, impossible sizes, or control that the model does not read.
        """
        given = {
            "original_size": original_size,
            "crops_coords_top_left": crops_coords_top_left,
            "crop_size": crop_size,
            "target_size": target_size,
            "flip": flip,
        }
        read = self.denoiser.control_inputs
        for name, value in given.items():
            if value is not None and name not in read:
                raise ValueError(
                    f"`{name}` is given, but of the control the model reads {', '.join(sorted(read)) or 'nothing'}."
                )
        if not read:
            return None
        per_sample = zip(*(_spread(name, value, batch_size) for name, value in given.items()), strict=True)
        return [self._make_control(height, width, *values) for values in per_sample]

    def _make_control(self, height, width, original_size, corner, crop_size, target_size, flip) -> Control:
        if original_size is None:
            side = self.config.default_original_size or min(height, width)
            original_size = (side * height / min(height, width), side * width / min(height, width))
        corner = _default(corner, (0, 0))
        check_pair("original_size", original_size)
        check_pair("crops_coords_top_left", corner, minimum_is_zero=True)
        crop_size = _default(crop_size, (original_size[0] - corner[0], original_size[1] - corner[1]))
        return Control(original_size, corner, crop_size, _default(target_size, (height, width)), _default(flip, False))

    def latent_shape(self, num_images: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the latents of `num_images` images of `height` x `width` pixels."""
        factor = self.vae_scale_factor
        return (num_images, self.denoiser.config.in_channels, height // factor, width // factor)

    def encode_text(
        self, prompts: list[str], generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Conditioning:
        """The semantic condition of prompts, as far as the denoiser reads it, padded by the pipeline's policy.

        Args:
            prompts: the texts.
            generator: source of the noise of the noisy replicate padding, one for all or one a prompt.
        """
        device = self._execution_device
        tokens = encode_prompts(prompts, self.tokenizer, self.text_encoder, self.config.max_text_tokens, device)
        padded, mask = pad_tokens(tokens, self.config.text_padding, self.config.text_noise_scale, generator)
        return Conditioning(padded, mask, tokens.pooled).only(self.denoiser.inputs)

    def make_conditions(
        self,
        prompts: list[str] | None,
        negative_prompt: str | list[str] | None,
        labels: list[int] | None,
        controls: list[Control] | None,
        terms: list[GuidanceTerm],
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Conditioning:
        """The conditions of all evaluations of a step: the guidance terms one after the other, each a whole batch."""
        num_classes = self.denoiser.config.num_classes
        control = None if controls is None else control_tensor(_repeat(controls, num_images_per_prompt))
        if labels is not None:
            positive = Conditioning(class_labels=torch.tensor(_repeat(labels, num_images_per_prompt)))
        else:
            positive = self.encode_text(_repeat(prompts, num_images_per_prompt), generator)
        negative = positive.without_semantic(num_classes)
        if negative_prompt is not None:
            negative_prompts = _spread("negative_prompt", negative_prompt, len(prompts))
            negative = self.encode_text(_repeat(negative_prompts, num_images_per_prompt), generator)

        device = self._execution_device
        parts = []
        for term in terms:
            part = (positive if term.semantic else negative).to(device).with_control(control)
            parts.append(part if term.control else part.without_control())
        return Conditioning.concatenate(parts)

    def set_timesteps(self, num_inference_steps: int, latent_shape: tuple[int, ...], device) -> torch.Tensor:
        """The scheduler's timesteps; schedulers that shift by the image's size are told the number of tokens."""
        kwargs = {}
        if self.scheduler.config.get("use_dynamic_shifting"):
            num_tokens = latent_shape[-1] * latent_shape[-2] // self.denoiser.patch_size**2
            kwargs["mu"] = calculate_shift(num_tokens)
        self.scheduler.set_timesteps(num_inference_steps, device=device, **kwargs)
        return self.scheduler.timesteps

    def scheduler_step_kwargs(self, generator) -> dict[str, Any]:
        """The generator, for schedulers that draw noise in a step."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if takes_generator else {}

    def guided_prediction(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditioning, terms: list[GuidanceTerm]
    ) -> torch.Tensor:
        """The guided prediction (batch, latent_channels, height, width) of one step, all terms in one evaluation."""
        inputs = torch.cat([latents] * len(terms))
        if hasattr(self.scheduler, "scale_model_input"):
            inputs = self.scheduler.scale_model_input(inputs, timestep)
        with self.denoiser.cache_context("guided"):  # all terms of the guidance are one batch
            prediction = self.denoiser(inputs, timestep, **conditions.kwargs(), return_dict=False)[0]
        prediction = prediction[:, : latents.shape[1]]  # a learned variance, where there is one, is not used
        return combine_predictions(prediction, terms)

    def decode(self, latents: torch.Tensor, output_type: str):
        """Images of latents in the asked type."""
        return self.image_processor.postprocess(decode_latents(self.vae, latents), output_type=output_type)


def _default(value, default):
    return default if value is None else value


def _as_list(value) -> list | None:
    if value is None or isinstance(value, list):
        return value
    return value.flatten().tolist() if isinstance(value, torch.Tensor) else [value]


def _repeat(values: list, times: int) -> list:
    return [value for value in values for _ in range(times)]


def _spread(name: str, value, batch_size: int) -> list:
    """One value a sample, out of one for all or a list."""
    if not isinstance(value, list):
        return [value] * batch_size
    if len(value) != batch_size:
        raise ValueError(
            f"`{name}` is a list of {len(value)}; it must have one value for each of {batch_size} samples."
        )
    return value
