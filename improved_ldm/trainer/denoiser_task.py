"""The training of a denoiser: its loss on latents, with noise and with conditions that are dropped at random."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.control import required_columns
from improved_ldm.conditioning.text import pad_tokens
from improved_ldm.data.latents import EncodedBatch
from improved_ldm.diffusion.objectives import Objective, objective_loss
from improved_ldm.models.cost import training_flops
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.trainer.nonfinite import pass_nonfinite_to_gradient
from improved_ldm.trainer.randomness import ImageRandomness
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.sections import TextConfig, TrainingConfig
from improved_ldm.trainer.task import Task


class DenoiserTask(Task):
    """The training of a denoiser; if it has adapters, only these are trained.

    Args:
        denoiser: denoiser with the weights to start from.
        objective: training objective, with its noise schedule.
        averaged: average of the weights; None starts it from the weights.
        optimizer_state: moments of a model with the same parameters; those whose shape differs start from scratch.
        changes: what a change of conditions keeps and what begins anew, for the lineage; empty if there is none.
    """

    model: Denoiser

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        averaged: Denoiser | None = None,
        optimizer_state: dict[str, Any] | None = None,
        changes: dict[str, Any] | None = None,
    ):
        if not getattr(denoiser, "peft_config", None):  # adapters have frozen their base
            denoiser.requires_grad_(True)
        super().__init__(denoiser, averaged, optimizer_state)
        self.objective, self.changes = objective, changes or {}

    def faster_model(self, run: Run) -> Denoiser:
        if run.config.training.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        if run.config.training.compile:
            self.model.compile_repeated_blocks(fullgraph=True)
        return self.model

    def loss(self, run: Run, model: nn.Module, batch: EncodedBatch, images: ImageRandomness) -> torch.Tensor:
        return batch_loss(run.accelerator, model, self.objective, batch, images, run.config.training, run.config.text)

    def flops_per_image(self, run: Run) -> float:
        denoiser = getattr(self.model, "denoiser", self.model)  # an adapted text encoder comes with its denoiser
        return training_flops(
            denoiser, run.config.text.max_tokens, frozen=bool(getattr(denoiser, "peft_config", None))
        )

    def random_choices(self, run: Run, images: ImageRandomness) -> dict[str, torch.Tensor]:
        semantic, control = images.dropped(run.config.training.semantic_dropout, run.config.training.control_dropout)
        timesteps = self.objective.timestep_quantile(images.timestep_fractions())
        return {"timesteps": timesteps, "drops_semantic": semantic, "drops_control": control}


def batch_loss(
    accelerator: Accelerator,
    denoiser: nn.Module,
    objective: Objective,
    batch: EncodedBatch,
    images: ImageRandomness,
    training: TrainingConfig,
    text: TextConfig,
) -> torch.Tensor:
    """The loss of one micro-batch, a scalar: the sum over the passes of the denoiser."""
    inner = accelerator.unwrap_model(denoiser)
    timestep = objective.timestep_quantile(images.timestep_fractions())
    conditions = batch_conditions(batch, text, images).only(inner.inputs)
    missing = inner.inputs - {name for name, value in conditions.kwargs().items() if value is not None}
    if missing - {"encoder_attention_mask"}:  # None if every token counts
        raise ValueError(f"the batch lacks {', '.join(sorted(missing))}, which the denoiser reads.")
    loss = 0.0
    for number, further in enumerate(inner.training_passes(batch.latents, images.mask_level, images.mask_uniform)):
        noise = images.noise(batch.latents.shape[1:], number)
        noisy = objective.add_noise(batch.latents, noise, timestep)
        dropped = images.dropped(training.semantic_dropout, training.control_dropout, number)
        seen = conditions.dropped(*dropped, inner.config.num_classes, inner.null_keeps_mask)
        with accelerator.autocast():
            prediction = denoiser(noisy, timestep, **seen.kwargs(), **further, return_dict=False)[0]
        loss = loss + objective_loss(objective, prediction, batch.latents, noise, timestep)
    return pass_nonfinite_to_gradient(loss, *_without_unknown(conditions))


def _without_unknown(conditions: Conditioning) -> list[torch.Tensor | None]:
    """The conditions without those columns of the control that are NaN if their value is unknown."""
    known = None if conditions.control is None else required_columns(conditions.control)
    return list(replace(conditions, control=known).kwargs().values())


def batch_conditions(batch: EncodedBatch, text: TextConfig, images: ImageRandomness) -> Conditioning:
    """All conditions of a batch, with the text padded."""
    if batch.text is None:
        return Conditioning(class_labels=batch.class_labels, control=batch.control)
    is_noisy = text.padding == "noisy_replicate"
    noise = images.text_noise(batch.text.hidden_states.shape[1:]) if is_noisy else None
    hidden_states, mask = pad_tokens(batch.text, text.padding, text.noise_scale, noise=noise)
    return Conditioning(hidden_states, mask, batch.text.pooled, control=batch.control)
