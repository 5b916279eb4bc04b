"""Checks of a run's models from their configurations alone, before any data is read."""

from collections.abc import Sequence

import psutil
import torch
from diffusers import AutoModel, ConfigMixin
from transformers import AutoConfig

from improved_ldm.autoencoder import latent_channels, spatial_factor
from improved_ldm.evaluation.networks import load_judge
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.family import denoiser_class, preset
from improved_ldm.naming import loading
from improved_ldm.places import resolve
from improved_ldm.sampling.components import check_channels
from improved_ldm.trainer.components import build_denoiser, check_max_tokens, check_resolution
from improved_ldm.trainer.config import Condition, RunConfig
from improved_ldm.trainer.sections import DenoiserConfig

ANY_DIM = 8  # stands for the sizes of conditions, which are known only after loading data and text encoder
BYTES = 4  # per weight


class _ModelConfig(ConfigMixin):
    """Reads configurations of models; `AutoModel` may look for those of pipelines after it has read a subfolder."""

    config_name = "config.json"


def check_models(configs: Sequence[RunConfig], conditions: Sequence[Condition]):
    """Raise a ValueError for models that are not available or cannot be built.

    Args:
        configs: configurations of the stages, in order; their models differ only in resolution and conditions.
        conditions: kind of condition of each stage.
    """
    config = configs[0]
    with loading("autoencoder.pretrained", config.autoencoder.pretrained), torch.device("meta"):
        source = resolve(config.autoencoder.pretrained)
        vae = AutoModel.from_config(_ModelConfig.load_config(source, subfolder=config.autoencoder.subfolder))
        factor = spatial_factor(vae)
    check_channels(config.sampling.guidance_options, latent_channels(vae))
    texts = [stage.text for stage, condition in zip(configs, conditions, strict=True) if condition == "text"]
    for text in dict.fromkeys(texts):
        with loading("text.pretrained", text.pretrained):
            encoder = AutoConfig.from_pretrained(resolve(text.pretrained))
        check_max_tokens(text, getattr(encoder, "text_config", encoder))
    if config.evaluation.judge is not None:
        with loading("evaluation.judge", config.evaluation.judge):
            if load_judge(config.evaluation.judge) is None:
                raise ValueError("it must be 'embedded:judge' or the folder of a Judge")
    if config.denoiser.pretrained is not None:
        with loading("denoiser.pretrained", config.denoiser.pretrained):
            _ModelConfig.load_config(config.denoiser.pretrained, subfolder=config.denoiser.subfolder)
        return
    _check_parameters(_least_parameters(config.denoiser))
    for condition in dict.fromkeys(conditions):
        denoiser = _without_weights(config, vae, condition)
        _check_parameters(denoiser.num_parameters())
    what = "`transform.resolution`" if len(configs) == 1 else "`resolution` of a stage"
    for stage in configs:
        check_resolution(stage, factor * denoiser.patch_size, what)


def _without_weights(config: RunConfig, vae: torch.nn.Module, condition: Condition) -> Denoiser:
    names = ("num_classes",)
    if condition == "text":
        names = denoiser_class(config.denoiser.name).text_arguments(config.denoiser.conditioning)
    try:
        with torch.device("meta"):
            return build_denoiser(config, vae, **dict.fromkeys(names, ANY_DIM))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not config.denoiser.options:
            raise
        raise ValueError(f"`denoiser.options` is {config.denoiser.options}: {error}") from error


def _least_parameters(config: DenoiserConfig) -> int:
    """A lower bound of a denoiser's parameters, without building it, which takes seconds for a thousand layers."""
    sizes = {**preset(config.name, config.size), **config.options}
    if "hidden_size" in sizes:
        return 4 * sizes["num_layers"] * sizes["hidden_size"] ** 2  # the projections of self-attention
    return sum(9 * channels**2 for channels in sizes["block_out_channels"])  # one convolution of each level


def _check_parameters(parameters: int):
    """Raise a ValueError if this machine's memory cannot hold the weights."""
    size, memory = BYTES * parameters, psutil.virtual_memory().total
    if size > memory:
        raise ValueError(
            f"`denoiser.size` and `denoiser.options` make a model of at least {size / 1e9:,.0f} GB; this machine has "
            f"{memory / 1e9:,.0f} GB of memory."
        )
