"""The models of a run, loaded or built according to its configuration."""

import contextlib
import copy
import inspect
import json
import logging
from pathlib import Path

import torch
from diffusers import AutoModel
from diffusers.models.modeling_utils import ModelMixin
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers import AutoModel as AutoTransformersModel
from transformers.utils import logging as transformers_logging

from improved_ldm.autoencoder import check_image_size, latent_channels, spatial_factor
from improved_ldm.conditioning.text import text_positions
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.diffusion.objectives import Objective, make_objective
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.family import check_options, denoiser_class, make_denoiser, preset
from improved_ldm.naming import loading
from improved_ldm.places import resolve
from improved_ldm.resolution import latent_side, sides_of, size_text
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.sections import AutoencoderConfig, ComputeDtype, DenoiserConfig, TextConfig

logger = logging.getLogger(__name__)

# model type → class of the text tower alone
TEXT_TOWERS = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}


def load_autoencoder(config: AutoencoderConfig) -> ModelMixin:
    """Load the autoencoder, with its weights frozen."""
    with loading("autoencoder.pretrained", config.pretrained):
        source, subfolder = resolve(config.pretrained), config.subfolder or ""
        vae = AutoModel.from_pretrained(source, subfolder=subfolder, use_safetensors=True)
    return vae.requires_grad_(False).eval()


def compute_dtype(name: ComputeDtype, device: torch.device) -> torch.dtype:
    """The dtype that a frozen model computes in on a device; `auto` is bfloat16 on a GPU that has it, else float32."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def in_dtype(model: PreTrainedModel | None, dtype: torch.dtype) -> PreTrainedModel | None:
    """A model in a dtype: itself, or a copy, so that the weights that a pipeline saves stay exact."""
    return model if model is None or model.dtype == dtype else copy.deepcopy(model).to(dtype)


def load_tokenizer(config: TextConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the text encoder."""
    with loading("text.pretrained", config.pretrained):
        return AutoTokenizer.from_pretrained(resolve(config.pretrained))


def load_text_encoder(config: TextConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load the tokenizer and the text encoder, with its weights frozen.

    Raises:
        ValueError: if the encoder has fewer positions than `max_tokens`.
    """
    tokenizer = load_tokenizer(config)
    with loading("text.pretrained", config.pretrained):
        source = resolve(config.pretrained)
        encoder_class = TEXT_TOWERS.get(AutoConfig.from_pretrained(source).model_type, AutoTransformersModel)
        with _quiet_transformers():  # it would report the weights of the image tower as unused
            text_encoder = encoder_class.from_pretrained(source, use_safetensors=True)
    check_max_tokens(config, text_encoder.config)
    return tokenizer, text_encoder.requires_grad_(False).eval()


def check_max_tokens(config: TextConfig, encoder: PretrainedConfig):
    """Raise a ValueError if prompts have more tokens than a text encoder has positions."""
    positions = text_positions(encoder)
    if config.max_tokens > positions:
        raise ValueError(f"`text.max_tokens` is {config.max_tokens}; {config.pretrained} has {positions} positions.")


@contextlib.contextmanager
def _quiet_transformers():
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def build_denoiser(config: RunConfig, vae: ModelMixin, **conditions: int | None) -> Denoiser:
    """The denoiser that a run starts with, for the latents of an autoencoder.

    Args:
        config: configuration of the run.
        vae: autoencoder whose latents the denoiser reads.
        conditions: `num_classes`, or `text_dim` and `pooled_dim`.

    Raises:
        ValueError: if the resolution does not divide into latent patches, an option does not exist, or a pretrained
            denoiser does not suit the run.
    """
    check_image_size(vae, sides_of(config.transform.resolution))
    factor, channels = spatial_factor(vae), latent_channels(vae)
    if config.denoiser.pretrained is not None:
        denoiser = _load_denoiser(config, factor, in_channels=channels, **conditions)
        _check_variance(config, denoiser)
        return denoiser
    options = check_options(config.denoiser.name, config.denoiser.options)
    patch_size = {**preset(config.denoiser.name, config.denoiser.size), **options}.get("patch_size", 1)
    arguments = {
        "sample_size": latent_side(config.transform.resolution, factor, patch_size),
        "in_channels": channels,
        "out_channels": channels * (2 if config.objective.learned_variance else 1),
        "conditioning": config.denoiser.conditioning,
        "control_weight": config.denoiser.control_weight,
        "control_power": config.denoiser.control_power,
        "control_parts": config.denoiser.control_parts,
        "control_route": config.denoiser.control_route,
        **conditions,
    }
    has_qk_norm = "qk_norm" in inspect.signature(denoiser_class(config.denoiser.name)).parameters
    if has_qk_norm and config.denoiser.conditioning == "disentangled":
        options.setdefault("qk_norm", True)
    denoiser = make_denoiser(config.denoiser.name, config.denoiser.size, **arguments, **options)
    check_resolution(config, factor * denoiser.patch_size)
    return denoiser


def _check_variance(config: RunConfig, denoiser: Denoiser):
    """Raise a ValueError if a pretrained denoiser has no channels for the variance that it is to learn."""
    if config.objective.learned_variance and not denoiser.predicts_variance:
        raise ValueError(
            f"`objective.learned_variance` is true, but the denoiser in {config.denoiser.pretrained} has "
            f"{denoiser.config.out_channels} output channels; a variance needs {2 * denoiser.config.in_channels}."
        )
    if denoiser.predicts_variance and not config.objective.learned_variance:
        logger.warning(
            "The denoiser in %s predicts a variance, which this run does not train: `objective.learned_variance` is "
            "false.",
            config.denoiser.pretrained,
        )


def check_resolution(config: RunConfig, multiple: int, what: str = "`transform.resolution`"):
    """Raise a ValueError if a side of the images does not divide into latent patches of `multiple` pixels."""
    resolution = config.transform.resolution
    if any(side % multiple for side in sides_of(resolution)):
        valid = "it must be a multiple" if isinstance(resolution, int) else "both sides must be multiples"
        raise ValueError(f"{what} is {size_text(resolution)}; {valid} of {multiple} pixels.")


def build_objective(config: RunConfig) -> Objective:
    """The objective of a run; a pretrained denoiser brings the noise schedule that it was trained with.

    Raises:
        ValueError: if that denoiser predicts something else.
    """
    objective = make_objective(**config.objective.model_dump())
    if config.denoiser.pretrained is None:
        return objective
    file = Path(config.denoiser.pretrained) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return objective
    trained = objective.with_schedule(json.loads(file.read_text(encoding="utf-8")))
    if not objective.has_noise_of(trained):
        logger.warning(
            "The denoiser in %s was trained with another noise schedule than `objective` describes; this run keeps "
            "that of the denoiser.",
            config.denoiser.pretrained,
        )
    return trained


def _load_denoiser(config: RunConfig, latent_factor: int, **needed: int | None) -> Denoiser:
    """A trained or converted denoiser.

    Raises:
        ValueError: if its config differs from what the run needs.
    """
    source = config.denoiser.pretrained
    with loading("denoiser.pretrained", source):
        denoiser = AutoModel.from_pretrained(source, subfolder=config.denoiser.subfolder or "", use_safetensors=True)
    side = latent_side(config.transform.resolution, latent_factor, denoiser.patch_size)
    needed = {"sample_size": side, **needed, "conditioning": config.denoiser.conditioning}
    for name, value in needed.items():
        if denoiser.config.get(name) != value:
            raise ValueError(
                f"`{name}` of the denoiser in {source} is {denoiser.config.get(name)!r}; the run needs "
                f"{value!r}. `improved_ldm.transfer` moves a denoiser to another resolution or other conditions, "
                f"`improved_ldm.convert.disentangle` converts it to the disentangled mode."
            )
    return denoiser


def text_dims(config: DenoiserConfig, encoder: SampleEncoder) -> dict[str, int]:
    """`text_dim` and `pooled_dim` of a text encoder, as far as the configured denoiser reads them."""
    tokens = encoder.text([""])
    dims = {"text_dim": tokens.hidden_states.shape[-1], "pooled_dim": tokens.pooled.shape[-1]}
    return {name: dims[name] for name in denoiser_class(config.name).text_arguments(config.conditioning)}
