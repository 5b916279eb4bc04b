"""The training loop, the same for every task: denoisers, adapters, autoencoders, text towers and judges."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from improved_ldm.output import OutputError
from improved_ldm.pipeline import NonFiniteLatentsError
from improved_ldm.trainer.checkpoints import Checkpoints
from improved_ldm.trainer.nonfinite import (
    NONFINITE,
    FirstSkipped,
    NonFiniteLossError,
    Suspect,
    check_weights,
)
from improved_ldm.trainer.optimizer import WeightAverage, fitting_state, make_optimizer, scaled, set_learning_rate
from improved_ldm.trainer.optimizer_config import OptimizerConfig
from improved_ldm.trainer.randomness import StepRandomness
from improved_ldm.trainer.reports import Progress
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.stopping import Stop, StoppedWaiting, agree_to_stop, stop_signals
from improved_ldm.trainer.task import Batch, Task


class Batches(Protocol):
    """An endless loader that can resume at the next batch."""

    def __iter__(self) -> Iterator[Batch]: ...

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
class Hook:
    """A function that is called with the averaged model at regular steps, on the main process.

    Args:
        every: steps between calls; 0 or None never calls.
        call: function of the averaged model and the step, counted from 1.
    """

    every: int | None
    call: Callable[[nn.Module, int], None] | None


def train(
    run: Run, task: Task, batches: Batches, hooks: Sequence[Hook] = (), validation: Measuring | None = None
) -> nn.Module:
    """Train a model from the newest checkpoint, or from the start, to the last step of the configuration.

    Weights that require no gradient are neither trained nor averaged nor saved in checkpoints.

    Ctrl-C, or a signal to terminate, ends the training after the current step with a checkpoint; a single process that
    waits for data stops waiting.

    A step whose loss or gradient is NaN or infinite is skipped: weights, moments and average stay as they are. The
    decision is made on the device, from the gradient norm, which is the same on all processes; skipped steps are
    counted at log steps.

    Args:
        run: configuration, folder and processes.
        task: the model with what it starts from, and its loss.
        batches: this process's share of the data.
        hooks: functions to call at regular steps.
        validation: what is measured of held-out images.

    Returns:
        The averaged model (float32).

    Raises:
        NonFiniteLossError: if too many steps in a row are skipped or, at a checkpoint, a weight is NaN or infinite.
        SystemExit: after a clean stop.
    """
    config, accelerator = run.config.training, run.accelerator
    recipe = scaled(run.config.optimizer, run.images_per_step)
    model, optimizer, ema = _prepare(run, task, recipe)
    inner = accelerator.unwrap_model(model)
    frozen = frozenset(name for name, parameter in inner.named_parameters() if not parameter.requires_grad)
    folder, keep = run.folder / "checkpoints", config.keep_checkpoints
    checkpoints = Checkpoints(accelerator, folder, keep, ema, batches, frozen, run.images_per_step, run.config)
    first_step, kept_progress = checkpoints.resume()
    progress = Progress(run, first_step, kept_progress, partial(task.flops_per_image, run))
    if validation is not None:
        validation.resume(first_step)
    if first_step:
        at = run.named_step(first_step)
        run.say(f"resuming after {at}" if first_step < config.steps else f"{at} is done; no step is left to train")
    first_skipped = FirstSkipped(run.folder / NONFINITE, accelerator.process_index, accelerator.device)

    def randomness_of(step: int) -> StepRandomness:
        parts = (config.batch_size, config.gradient_accumulation_steps)
        processes = (accelerator.process_index, accelerator.num_processes, accelerator.device)
        return StepRandomness(run.config.seed, step, *parts, *processes)

    def iterated(stop: Stop) -> contextlib.closing:
        return contextlib.closing(iter(batches) if accelerator.num_processes > 1 else stop.ending(iter(batches)))

    kept = _kept_on_failure(run, checkpoints, progress)
    with progress, kept, stop_signals() as stop, iterated(stop) as batch_iterator:
        timed_batches = progress.meter.timed(batch_iterator)
        for step in range(first_step, config.steps):
            set_learning_rate(optimizer, recipe, step, config.steps)
            loss, suspect = _accumulate_gradients(run, task, model, timed_batches, randomness_of(step))
            gradient_norm = accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm or math.inf)
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
                file = first_skipped.write(randomness_of, partial(task.random_choices, run))
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
                check_weights(model, done)
                _save(checkpoints, progress)
                if validation is not None:
                    validation.draw()
            if stopping:
                raise SystemExit(f"stopped after {run.named_step(done)}; the same command resumes from there")
    return ema.module


def _prepare(run: Run, task: Task, recipe: OptimizerConfig) -> tuple[nn.Module, torch.optim.Optimizer, WeightAverage]:
    """The model and the optimizer on their device, and the running average of the weights (float32)."""
    model = task.model.train()
    ema = WeightAverage(model, recipe.ema_decay, recipe.ema_warmup)
    if task.averaged is not None:
        ema.start_from(task.averaged)
    ema.requires_grad_(False).eval().to(run.accelerator.device)
    model = task.faster_model(run)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, recipe)
    if task.optimizer_state is not None:
        optimizer.load_state_dict(fitting_state(task.optimizer_state, optimizer))
    model, optimizer = run.accelerator.prepare(model, optimizer)
    return model, optimizer, ema


def _call_on_main(run: Run, call: Callable[[nn.Module, int], None], averaged: nn.Module, step: int):
    """Call a function of the average on the main process; the run continues if sampling fails."""
    if run.accelerator.is_main_process:
        try:
            call(averaged, step)
        except NonFiniteLatentsError as error:
            run.say(f"step {step}: sampling failed, training continues: {error}")
    run.accelerator.wait_for_everyone()


def _accumulate_gradients(
    run: Run, task: Task, model: nn.Module, batches: Iterator[Batch], randomness: StepRandomness
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
        with contextlib.nullcontext() if last else run.accelerator.no_sync(model):
            loss = task.loss(run, model, batch, randomness.images(number, len(batch)))
            run.accelerator.backward(loss * share)
        loss = loss.detach()
        total, shares = total + loss * share, shares + share
        suspect = Suspect(batch, torch.full((), number, device=loss.device), loss).unless_before(suspect)
    return total / shares, suspect


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
