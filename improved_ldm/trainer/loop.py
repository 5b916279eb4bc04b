"""The training loop, the same for every denoiser and every kind of condition."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.control import required_columns
from improved_ldm.conditioning.text import pad_tokens
from improved_ldm.data.latents import EncodedBatch
from improved_ldm.diffusion.objectives import Objective, objective_loss
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.output import OutputError
from improved_ldm.pipeline import NonFiniteLatentsError
from improved_ldm.trainer.checkpoints import Checkpoints
from improved_ldm.trainer.config import OptimizerConfig, TextConfig, TrainingConfig
from improved_ldm.trainer.nonfinite import (
    NONFINITE,
    FirstSkipped,
    NonFiniteLossError,
    Suspect,
    check_weights,
    pass_nonfinite_to_gradient,
)
from improved_ldm.trainer.optimizer import WeightAverage, fitting_state, make_optimizer, scaled, set_learning_rate
from improved_ldm.trainer.randomness import ImageRandomness, StepRandomness
from improved_ldm.trainer.reports import Progress
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.stopping import Stop, StoppedWaiting, agree_to_stop, stop_signals


class Batches(Protocol):
    """An endless loader that can resume at the next batch."""

    def __iter__(self) -> Iterator[EncodedBatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]): ...


class Measuring(Protocol):
    """Measures models during training and changes neither them nor the training."""

    def resume(self, step: int):
        """Continue after a step."""

    def after_step(self, step: int, live: nn.Module, averaged: nn.Module):
        """Measure what is due after a step, counted from 1, on all processes together."""

    def draw(self):
        """Draw what was measured until now."""


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Args:
        denoiser: denoiser with the weights to start from.
        objective: training objective, with its noise schedule.
        averaged: average of the weights; None starts it from the weights.
        optimizer_state: moments of a model with the same parameters; those whose shape differs start from scratch.
        changes: what a change of conditions keeps and what begins anew, for the lineage; empty if there is none.
    """

    denoiser: Denoiser
    objective: Objective
    averaged: Denoiser | None = None
    optimizer_state: dict[str, Any] | None = None
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hook:
    """A function that is called with the averaged model at regular steps, on the main process.

    Args:
        every: steps between calls; 0 or None never calls.
        call: function of the averaged model and the step, counted from 1.
    """

    every: int | None
    call: Callable[[Denoiser, int], None] | None


def train(
    run: Run, start: Start, batches: Batches, hooks: Sequence[Hook] = (), validation: Measuring | None = None
) -> Denoiser:
    """Train a denoiser from the newest checkpoint, or from the start, to the last step of the configuration.

    If a denoiser has adapters, only these are trained, averaged and saved in checkpoints.

    Ctrl-C, or a signal to terminate, ends the training after the current step with a checkpoint; a single process that
    waits for data stops waiting.

    A step whose loss or gradient is NaN or infinite is skipped: weights, moments and average stay as they are. The
    decision is made on the device, from the gradient norm, which is the same on all processes; skipped steps are
    counted at log steps.

    Args:
        run: configuration, folder and processes.
        start: the model, the objective, the average and the moments to begin with.
        batches: this process's share of the data.
        hooks: functions to call at regular steps.
        validation: what is measured of held-out images.

    Returns:
        The averaged denoiser (float32).

    Raises:
        NonFiniteLossError: if too many steps in a row are skipped or, at a checkpoint, a weight is NaN or infinite.
        SystemExit: after a clean stop.
    """
    config, accelerator, objective = run.config.training, run.accelerator, start.objective
    recipe = scaled(run.config.optimizer, run.images_per_step)
    denoiser, optimizer, ema = _prepare(run, start, recipe)
    inner = accelerator.unwrap_model(denoiser)
    frozen = frozenset(name for name, parameter in inner.named_parameters() if not parameter.requires_grad)
    folder, keep = run.folder / "checkpoints", config.keep_checkpoints
    checkpoints = Checkpoints(accelerator, folder, keep, ema, batches, frozen, run.images_per_step, run.config)
    first_step, kept_progress = checkpoints.resume()
    progress = Progress(run, first_step, kept_progress)
    if validation is not None:
        validation.resume(first_step)
    if first_step:
        goes_on = "training resumes from there" if first_step < config.steps else "no step is left to train"
        run.say(f"{run.named_step(first_step)} is done; {goes_on}")
    first_skipped = FirstSkipped(run.folder / NONFINITE, accelerator.process_index, accelerator.device)

    def randomness_of(step: int) -> StepRandomness:
        parts = (config.batch_size, config.gradient_accumulation_steps)
        processes = (accelerator.process_index, accelerator.num_processes, accelerator.device)
        return StepRandomness(run.config.seed, step, *parts, *processes)

    def iterated(stop: Stop) -> contextlib.closing:
        return contextlib.closing(iter(batches) if accelerator.num_processes > 1 else stop.ending(iter(batches)))

    kept = _kept_on_failure(run, checkpoints, progress)
    with progress, kept, stop_signals() as stop, iterated(stop) as batch_iterator:
        for step in range(first_step, config.steps):
            set_learning_rate(optimizer, recipe, step, config.steps)
            loss, suspect = _accumulate_gradients(run, denoiser, objective, batch_iterator, randomness_of(step))
            gradient_norm = accelerator.clip_grad_norm_(denoiser.parameters(), recipe.max_grad_norm or math.inf)
            skipped = ~gradient_norm.isfinite()  # a scalar on the device, the same on all processes
            optimizer.optimizer.skip_where(skipped)  # accelerate's optimizer wraps ours
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if done % recipe.ema_every == 0:
                ema.update_parameters(inner, skipped)
            checkpoints.mark_place()
            # with fp16, gradients that only exceed its range are not an error: the loss scale adapts to them
            first_skipped.note(done, suspect, skipped if accelerator.scaler is None else ~loss.isfinite())
            loss = loss.masked_fill(skipped, torch.nan)
            if progress.after_step(done, loss, gradient_norm, optimizer.param_groups[0]["lr"]):
                file = first_skipped.write(randomness_of, objective, config)
                if file is not None:
                    run.say(f"{file} holds the batch of the first skipped step")
                progress.check_skipped()
            if validation is not None:
                validation.after_step(done, inner, ema.module)
            for hook in hooks:
                if hook.every and done % hook.every == 0:
                    _call_on_main(run, hook.call, ema.module, done)
            stopping = agree_to_stop(run, stop, done)
            if stopping or done == config.steps or done % config.checkpoint_every == 0:
                check_weights(denoiser, done)
                _save(checkpoints, progress)
                if validation is not None:
                    validation.draw()
            if stopping:
                raise SystemExit(f"stopped after {run.named_step(done)}; the same command resumes from there")
    return ema.module


def _prepare(
    run: Run, start: Start, recipe: OptimizerConfig
) -> tuple[nn.Module, torch.optim.Optimizer, WeightAverage]:
    """The model and the optimizer on their device, and the running average of the weights (float32)."""
    config, denoiser = run.config.training, start.denoiser
    denoiser.train()
    if not getattr(denoiser, "peft_config", None):  # adapters have frozen their base
        denoiser.requires_grad_(True)
    ema = WeightAverage(denoiser, recipe.ema_decay, recipe.ema_warmup)
    if start.averaged is not None:
        ema.go_on_from(start.averaged)
    ema.requires_grad_(False).eval().to(run.accelerator.device)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if config.compile:
        denoiser.compile_repeated_blocks(fullgraph=True)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, recipe)
    if start.optimizer_state is not None:
        optimizer.load_state_dict(fitting_state(start.optimizer_state, optimizer))
    denoiser, optimizer = run.accelerator.prepare(denoiser, optimizer)
    return denoiser, optimizer, ema


def _call_on_main(run: Run, call: Callable[[Denoiser, int], None], averaged: Denoiser, step: int):
    """Call a function of the average on the main process; the run continues if sampling fails."""
    if run.accelerator.is_main_process:
        try:
            call(averaged, step)
        except NonFiniteLatentsError as error:
            run.say(f"step {step}: sampling failed, training continues: {error}")
    run.accelerator.wait_for_everyone()


def _accumulate_gradients(
    run: Run,
    denoiser: nn.Module,
    objective: Objective,
    batches: Iterator[EncodedBatch],
    randomness: StepRandomness,
) -> tuple[torch.Tensor, Suspect]:
    """Sum the gradients of one step over its micro-batches.

    Each image has the same weight, also in the smaller batches of rare buckets.

    Returns:
        The mean loss of the images, on the device, and the suspect.
    """
    training, total, suspect, shares = run.config.training, 0.0, None, 0.0
    micro_batches = training.gradient_accumulation_steps
    for number in range(micro_batches):
        batch = next(batches).to(run.accelerator.device)
        last = number == micro_batches - 1
        share = len(batch) / (training.batch_size * micro_batches)
        with contextlib.nullcontext() if last else run.accelerator.no_sync(denoiser):
            images = randomness.images(number, len(batch))
            loss = batch_loss(run.accelerator, denoiser, objective, batch, images, training, run.config.text)
            run.accelerator.backward(loss * share)
        loss = loss.detach()
        total, shares = total + loss * share, shares + share
        suspect = Suspect(batch, torch.full((), number, device=loss.device), loss).unless_before(suspect)
    return total / shares, suspect


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


@contextlib.contextmanager
def _kept_on_failure(run: Run, checkpoints: Checkpoints, progress: Progress):
    """Save the last finished step if the run fails; not with several processes, which may not all get here."""
    try:
        yield
    except StoppedWaiting:
        if progress.step:
            _save(checkpoints, progress)
        raise SystemExit(
            f"stopped after {run.named_step(progress.step)}; the same command resumes from there"
        ) from None
    except (NonFiniteLossError, OutputError):  # the weights are not finite, or cannot be written
        raise
    except Exception:
        if run.accelerator.num_processes == 1 and progress.step:
            _save(checkpoints, progress)
        raise


def _save(checkpoints: Checkpoints, progress: Progress):
    """Save the last finished step, with the history up to it."""
    progress.flush()
    checkpoints.save(progress.step, progress.state_dict())
