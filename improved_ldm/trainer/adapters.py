"""What a run that trains an adapter begins with: its base, the settings that follow from it, and the adapter."""

from pathlib import Path
from typing import get_args

import peft
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from improved_ldm.diffusion.objectives import Objective, Prediction, make_objective
from improved_ldm.lora import attention_projections
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.trainer.config import AdapterRunConfig, LoraConfig

ADAPTABLE = (nn.Linear, nn.Conv2d)  # layers of the denoisers that an adapter can be on


def load_base(place: str) -> ImprovedLDMPipeline:
    """The pipeline that an adapter is for, frozen.

    Args:
        place: folder or Hub id.

    Raises:
        ValueError: if it is not a pipeline of the family.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(place)
    except OSError as error:
        raise ValueError(f"`base` is {place!r}; it must be the folder or Hub id of a pipeline: {error}") from error
    if not isinstance(pipeline, ImprovedLDMPipeline):
        raise ValueError(f"`base` is {place!r}, a {type(pipeline).__name__}; it must be an ImprovedLDMPipeline.")
    for model in (pipeline.vae, pipeline.text_encoder, pipeline.denoiser):
        if model is not None:
            model.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_adapter_run(config: AdapterRunConfig, pipeline: ImprovedLDMPipeline):
    """Raise a ValueError where a configuration asks for what its base cannot have, or would overwrite a pipeline."""
    if (Path(config.output_dir) / "model_index.json").exists():
        raise ValueError(
            f"`output_dir` is {config.output_dir!r}, which holds a pipeline that the adapter's files would overwrite; "
            "it must be another folder."
        )
    if not pipeline.takes_text:
        if config.lora.text_encoder:
            raise ValueError("`lora.text_encoder` is true, but the base draws classes; it has no text encoder.")
        if config.sampling.prompts is not None:
            raise ValueError("`sampling.prompts` is given, but the base draws classes; it has no prompts.")
    if config.lora.text_encoder and config.cache.passes:
        raise ValueError(f"`cache.passes` is {config.cache.passes}; with `lora.text_encoder` it must be 0.")
    for target in config.lora.targets or ():
        _check_target(target, pipeline.denoiser)


def _check_target(target: str, denoiser: Denoiser):
    layers = {f".{name}": layer for name, layer in denoiser.named_modules() if hasattr(layer, "weight")}
    found = [layer for name, layer in layers.items() if name.endswith(f".{target}")]
    if not found:
        raise ValueError(f"`lora.targets` has {target!r}; no layer of a {type(denoiser).__name__} ends so.")
    other = next((type(layer).__name__ for layer in found if not isinstance(layer, ADAPTABLE)), None)
    if other is not None:
        valid = " or ".join(kind.__name__ for kind in ADAPTABLE)
        raise ValueError(f"`lora.targets` has {target!r}, the name of a {other}; it must be that of a {valid}.")


def with_base(config: AdapterRunConfig, pipeline: ImprovedLDMPipeline) -> AdapterRunConfig:
    """The configuration of an adapter's training, with what its base decides filled in.

    Raises:
        ValueError: where the configuration says otherwise.
    """
    schedule, settings = pipeline.scheduler.config, pipeline.config
    prediction = schedule.get("prediction_type", "flow")
    if prediction not in get_args(Prediction):
        raise ValueError(f"the base's scheduler is for the prediction {prediction!r}, which no objective here trains.")
    decided = {
        "data": {"num_classes": None if pipeline.takes_text else pipeline.denoiser.config.num_classes},
        "transform": {"resolution": pipeline.default_size},
        "autoencoder": _place(config.base, "vae"),
        "text": {
            "max_tokens": settings.max_text_tokens,
            "padding": settings.text_padding,
            "noise_scale": settings.text_noise_scale,
        },
        "objective": {"prediction": prediction, "shift": schedule.get("shift", 1.0)},
        "sampling": {
            "guidance_scale": settings.default_guidance_scale,
            "num_inference_steps": settings.default_num_inference_steps,
        },
    }
    if pipeline.takes_text:
        decided["text"]["pretrained"] = _place(config.base, "text_encoder")["pretrained"]
    values = config.model_dump()
    for section, keys in decided.items():
        given = getattr(config, section).model_dump(exclude_unset=True)
        for key, value in keys.items():
            if given.get(key, value) != value:
                raise ValueError(f"`{section}.{key}` is {given[key]!r}; the base decides it, and has {value!r}.")
            values[section][key] = value
    return AdapterRunConfig.model_validate(values)


def _place(base: str, component: str) -> dict[str, str | None]:
    """Where a component of a base lies: its own folder, or a subfolder on the Hub."""
    folder = Path(base) / component
    if folder.is_dir():
        return {"pretrained": folder.as_posix(), "subfolder": None}
    return {"pretrained": base, "subfolder": component}


def base_objective(config: AdapterRunConfig, pipeline: ImprovedLDMPipeline) -> Objective:
    """The objective that a base was trained with, as its scheduler tells."""
    return make_objective(**config.objective.model_dump()).with_schedule(pipeline.scheduler.config)


class AdaptedModels(nn.Module):
    """A denoiser and a text encoder whose adapters are trained together; the training loop takes it for the denoiser.

    Args:
        denoiser: it stands for both wherever it is asked for something.
        text_encoder: the one that encodes the batches.
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
    """Put a fresh adapter on a pipeline, which draws as before until it is trained, and give what is to be trained."""
    denoiser, text_encoder = pipeline.denoiser, pipeline.text_encoder
    denoiser.add_adapter(_adapter_settings(config, list(config.targets or attention_projections(denoiser))))
    if not config.text_encoder:
        return denoiser
    text_encoder.add_adapter(_adapter_settings(config, attention_projections(text_encoder)), "default")
    return AdaptedModels(denoiser, text_encoder)


def _adapter_settings(config: LoraConfig, targets: list[str]) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=targets,
    )


def put_into(pipeline: ImprovedLDMPipeline, trained: Denoiser | AdaptedModels):
    """Make a pipeline draw with what a run trained."""
    if isinstance(trained, AdaptedModels):
        pipeline.text_encoder, trained = trained.text_encoder, trained.denoiser
    pipeline.denoiser = trained
