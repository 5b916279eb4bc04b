"""The start of a run that trains an adapter: its base, the settings that the base decides, and the adapter."""

from pathlib import Path
from typing import get_args

import peft
from torch import nn
from transformers import PreTrainedModel

from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.diffusion.fitting import is_flow
from improved_ldm.diffusion.objectives import Objective, Prediction, make_objective
from improved_ldm.models.adapters import ADAPTABLE, add_text_adapter, attention_projections
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.naming import loading
from improved_ldm.open_pipeline import open_pipeline
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.resolution import resolution_of
from improved_ldm.trainer.config import AdapterRunConfig, LoraConfig

# section and key of the settings that only the scheduler of a base has
SCHEDULER_KEYS = (
    *(("objective", key) for key in ("beta_schedule", "beta_start", "beta_end")),
    *(("sampling", key) for key in ("sampler", "timestep_spacing")),
)


def load_base(source: str) -> ImprovedLDMPipeline:
    """Load the pipeline that an adapter is for, with its weights frozen.

    Args:
        source: folder or Hub id.

    Raises:
        ValueError: if it is not a pipeline of this library.
    """
    with loading("base", source):
        pipeline = open_pipeline(source)
    for model in (pipeline.vae, pipeline.text_encoder, pipeline.denoiser):
        if model is not None:
            model.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_adapter_run(config: AdapterRunConfig, pipeline: ImprovedLDMPipeline):
    """Raise a ValueError if a configuration does not suit its base, or would overwrite a pipeline."""
    if (Path(config.output_dir) / "model_index.json").exists():
        raise ValueError(
            f"`output_dir` is {config.output_dir!r}, which holds a pipeline that the adapter's files would overwrite; "
            "it must be another folder."
        )
    if not pipeline.takes_text:
        if config.lora.text_encoder:
            raise ValueError("`lora.text_encoder` is true, but the base is class-conditional; it has no text encoder.")
        if config.sampling.prompts is not None:
            raise ValueError("`sampling.prompts` is given, but the base is class-conditional; it has no prompts.")
    if config.lora.text_encoder and config.cache.pretrained:
        raise ValueError(
            f"`cache.pretrained` is {config.cache.pretrained!r}; with `lora.text_encoder` it must not be given."
        )
    if config.lora.text_encoder and config.cache.passes:
        raise ValueError(f"`cache.passes` is {config.cache.passes}; with `lora.text_encoder` it must be 0.")
    for target in config.lora.targets or ():
        _check_target(target, pipeline.denoiser)


def _check_target(target: str, denoiser: Denoiser):
    layers = {f".{name}": layer for name, layer in denoiser.named_modules() if hasattr(layer, "weight")}
    found = [layer for name, layer in layers.items() if name.endswith(f".{target}")]
    if not found:
        raise ValueError(f"`lora.targets` has {target!r}; no layer of a {type(denoiser).__name__} has this name.")
    other = next((type(layer).__name__ for layer in found if not isinstance(layer, ADAPTABLE)), None)
    if other is not None:
        valid = " or ".join(kind.__name__ for kind in ADAPTABLE)
        raise ValueError(f"`lora.targets` has {target!r}, the name of a {other}; it must be that of a {valid}.")


def fill_from_base(config: AdapterRunConfig, pipeline: ImprovedLDMPipeline) -> AdapterRunConfig:
    """The configuration of an adapter's training, completed with the settings that its base decides.

    Raises:
        ValueError: if the configuration gives one of them another value.
    """
    schedule, settings = pipeline.scheduler.config, pipeline.config
    prediction = "flow" if is_flow(pipeline.scheduler) else schedule.get("prediction_type")
    if prediction not in get_args(Prediction):
        raise ValueError(f"the base's scheduler is for the prediction {prediction!r}, which no objective has.")
    for section, key in SCHEDULER_KEYS:
        if key in getattr(config, section).model_fields_set:
            raise ValueError(f"`{section}.{key}` is given, but the base's scheduler decides it.")
    decided = {
        "data": {"num_classes": None if pipeline.takes_text else pipeline.denoiser.config.num_classes},
        "transform": {"resolution": resolution_of(*pipeline.default_size)},
        "autoencoder": _place(config.base, "vae"),
        "text": {
            "max_tokens": settings.max_text_tokens,
            "padding": settings.text_padding,
            "noise_scale": settings.text_noise_scale,
        },
        "objective": {
            "prediction": prediction,
            "shift": schedule.get("flow_shift" if schedule.get("use_flow_sigmas") else "shift", 1.0),
            "learned_variance": pipeline.denoiser.predicts_variance,
        },
        "sampling": {
            "guidance_scale": settings.default_guidance_scale,
            "num_inference_steps": settings.default_num_inference_steps,
            "guidance_options": settings.guidance_options or {},
        },
    }
    if pipeline.takes_text:
        decided["text"]["pretrained"] = _place(config.base, "text_encoder")["pretrained"]
    values = config.model_dump()
    for section, keys in decided.items():
        given = getattr(config, section).model_dump(exclude_unset=True)
        for key, value in keys.items():
            if given.get(key, value) != value:
                raise ValueError(f"`{section}.{key}` is {given[key]!r}; it must be {value!r}, as in the base.")
            values[section][key] = value
    return AdapterRunConfig.model_validate(values)


def _place(base: str, component: str) -> dict[str, str | None]:
    """Where a component of a base is: its own folder, or a subfolder on the Hub."""
    folder = Path(base) / component
    if folder.is_dir():
        return {"pretrained": folder.as_posix(), "subfolder": None}
    return {"pretrained": base, "subfolder": component}


def base_objective(config: AdapterRunConfig, pipeline: ImprovedLDMPipeline) -> Objective:
    """The objective that a base was trained with, according to its scheduler."""
    return make_objective(**config.objective.model_dump()).with_schedule(pipeline.scheduler.config)


class AdaptedModels(nn.Module):
    """A denoiser and a text encoder whose adapters are trained together; the training loop sees it as the denoiser.

    Args:
        denoiser: the denoiser, which also provides all other attributes.
        text_encoder: the text encoder that encodes the batches.
    """

    def __init__(self, denoiser: Denoiser, text_encoder: PreTrainedModel):
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    def forward(self, *args, **kwargs):
        return self.denoiser(*args, **kwargs)


def add_adapter(pipeline: ImprovedLDMPipeline, config: LoraConfig) -> Denoiser | AdaptedModels:
    """Add a new adapter to a pipeline, whose samples stay the same until it is trained; returns the model to train."""
    denoiser, text_encoder = pipeline.denoiser, pipeline.text_encoder
    denoiser.add_adapter(_adapter_settings(config, list(config.targets or attention_projections(denoiser))))
    if not config.text_encoder:
        return denoiser
    add_text_adapter(text_encoder, _adapter_settings(config, attention_projections(text_encoder)))
    return AdaptedModels(denoiser, text_encoder)


def _adapter_settings(config: LoraConfig, targets: list[str]) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=targets,
    )


def set_trained(
    pipeline: ImprovedLDMPipeline, trained: Denoiser | AdaptedModels, control_seen: ControlRanges | None = None
):
    """Make a pipeline sample with the model that a run trains, and know the control that it was trained with.

    Args:
        pipeline: the pipeline.
        trained: the model.
        control_seen: ranges of the control so far; None for an adapter, whose pipeline keeps those of its base.
    """
    if control_seen is not None:
        pipeline.register_to_config(control_seen=control_seen.record())
    if isinstance(trained, AdaptedModels):
        pipeline.text_encoder, trained = trained.text_encoder, trained.denoiser
    pipeline.denoiser = trained
