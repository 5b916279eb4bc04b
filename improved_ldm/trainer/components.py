"""The models of a run, loaded or made as its configuration says."""

import contextlib
import inspect
import json
from pathlib import Path

from diffusers import AutoModel
from diffusers.models.modeling_utils import ModelMixin
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers import AutoModel as AutoTransformersModel
from transformers.utils import logging as transformers_logging

from improved_ldm.autoencoder import spatial_factor
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.diffusion.objectives import Objective, make_objective
from improved_ldm.embedded import resolve
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.presets import denoiser_class, make_denoiser
from improved_ldm.trainer.config import AutoencoderConfig, DenoiserConfig, RunConfig, TextConfig

# model type → the class that is the text tower alone
TEXT_TOWERS = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}


def load_autoencoder(config: AutoencoderConfig) -> ModelMixin:
    """The autoencoder, frozen."""
    vae = AutoModel.from_pretrained(resolve(config.pretrained), subfolder=config.subfolder or "", use_safetensors=True)
    return vae.requires_grad_(False).eval()


def load_text_encoder(config: TextConfig) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the text encoder, frozen.

    Raises:
        ValueError: if the encoder has fewer positions than `max_tokens`.
    """
    place = resolve(config.pretrained)
    encoder_class = TEXT_TOWERS.get(AutoConfig.from_pretrained(place).model_type, AutoTransformersModel)
    tokenizer = AutoTokenizer.from_pretrained(place)
    with _quiet_transformers():  # it reports the weights of the image tower, which is left out on purpose
        text_encoder = encoder_class.from_pretrained(place, use_safetensors=True)
    positions = getattr(text_encoder.config, "max_position_embeddings", None)
    if positions is not None and config.max_tokens > positions:
        raise ValueError(f"`text.max_tokens` is {config.max_tokens}; {config.pretrained} has {positions} positions.")
    return tokenizer, text_encoder.requires_grad_(False).eval()


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
    """The denoiser that a run begins with, for the latents of an autoencoder.

    Args:
        config: the run.
        vae: whose latents it reads.
        conditions: `num_classes`, or `text_dim` and `pooled_dim`.

    Raises:
        ValueError: if the resolution does not divide into latent patches, an option is not one, or a pretrained
            denoiser is made for something else.
    """
    factor, latent_channels = spatial_factor(vae), vae.config.latent_channels
    if config.denoiser.pretrained is not None:
        side = config.transform.resolution // factor
        return _load_denoiser(config.denoiser, sample_size=side, in_channels=latent_channels, **conditions)
    arguments = {
        "sample_size": config.transform.resolution // factor,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "conditioning": config.denoiser.conditioning,
        "control_weight": config.denoiser.control_weight,
        "control_power": config.denoiser.control_power,
        "control_parts": config.denoiser.control_parts,
        **conditions,
    }
    known = inspect.signature(denoiser_class(config.denoiser.name)).parameters
    options = dict(config.denoiser.options)
    if "qk_norm" in known and config.denoiser.conditioning == "disentangled":
        options.setdefault("qk_norm", True)
    for option in options:
        if option in arguments or option not in known:
            valid = ", ".join(sorted(known.keys() - arguments.keys()))
            raise ValueError(f"`denoiser.options` has {option!r}; it may have {valid}.")
    denoiser = make_denoiser(config.denoiser.name, config.denoiser.size, **arguments, **options)
    multiple = factor * denoiser.patch_size
    if config.transform.resolution % multiple:
        raise ValueError(
            f"`transform.resolution` is {config.transform.resolution}; it must be a multiple of {multiple} pixels."
        )
    return denoiser


def build_objective(config: RunConfig) -> Objective:
    """The objective of a run; beside a pretrained denoiser lies the schedule that it was trained with.

    Raises:
        ValueError: if that denoiser predicts something else.
    """
    objective = make_objective(**config.objective.model_dump())
    if config.denoiser.pretrained is None:
        return objective
    file = Path(config.denoiser.pretrained) / "scheduler" / "scheduler_config.json"
    return objective.with_schedule(json.loads(file.read_text())) if file.is_file() else objective


def _load_denoiser(config: DenoiserConfig, **needed: int | None) -> Denoiser:
    """A trained or converted denoiser.

    Raises:
        ValueError: where its config differs from what the run needs.
    """
    denoiser = AutoModel.from_pretrained(config.pretrained, subfolder=config.subfolder or "", use_safetensors=True)
    needed["conditioning"] = config.conditioning
    for name, value in needed.items():
        if denoiser.config.get(name) != value:
            raise ValueError(
                f"`{name}` of the denoiser in {config.pretrained} is {denoiser.config.get(name)!r}; the run needs "
                f"{value!r}. `improved_ldm.transfer` moves a denoiser to another resolution or other conditions, "
                f"`improved_ldm.convert.disentangle` to the disentangled mode."
            )
    return denoiser


def text_dims(config: DenoiserConfig, encoder: SampleEncoder) -> dict[str, int]:
    """`text_dim` and `pooled_dim` of a text encoder, as far as the configured denoiser reads them."""
    tokens = encoder.text([""])
    dims = {"text_dim": tokens.hidden_states.shape[-1], "pooled_dim": tokens.pooled.shape[-1]}
    return {name: dims[name] for name in denoiser_class(config.name).text_arguments(config.conditioning)}
