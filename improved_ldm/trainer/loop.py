"""The training loop, the same for every denoiser and every kind of condition."""

import contextlib
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from improved_ldm.conditioning.inputs import Conditioning
from improved_ldm.conditioning.text import pad_tokens
from improved_ldm.data.latents import EncodedBatch
from improved_ldm.diffusion.objectives import Objective, objective_loss
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.trainer.config import OptimizerConfig, TextConfig
from improved_ldm.trainer.draws import StepDraws
from improved_ldm.trainer.reports import NonFiniteLossError, Progress
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.state import Checkpoints

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def train(
    run: Run,
    denoiser: Denoiser,
    objective: Objective,
    batches,
    on_sample: Callable[[Denoiser, int], None] | None = None,
    averaged: Denoiser | None = None,
    optimizer_state: dict[str, Any] | None = None,
    on_push: Callable[[Denoiser, int], None] | None = None,
) -> Denoiser:
    """Train a denoiser from the newest checkpoint, or from the start, to the last step of the configuration.

    Of a denoiser with adapters those alone are trained, averaged and kept in checkpoints.

    Ctrl-C, or a signal to terminate, ends it after the current step with a checkpoint.

    Args:
        run: configuration, folder and processes.
        denoiser: the model to begin with.
        objective: what it predicts.
        batches: a loader of `EncodedBatch` with `state_dict` and `load_state_dict`.
        on_sample: called on the main process with the averaged model and the step, every `sampling.every` steps.
        averaged: the average to begin with; default: the model itself.
        optimizer_state: moments to begin with, of a model with the same parameters; where a shape differs they start
            afresh.
        on_push: called as `on_sample` is, every `hub.push_every` steps.

    Returns:
        The averaged denoiser (float32).

    Raises:
        NonFiniteLossError: if the loss or, at a checkpoint, a weight is NaN or infinite.
        SystemExit: after a clean stop.
    """
    config, accelerator = run.config.training, run.accelerator
    denoiser, optimizer, ema = _prepare(run, denoiser, averaged, optimizer_state)
    inner = accelerator.unwrap_model(denoiser)
    frozen = frozenset(name for name, parameter in inner.named_parameters() if not parameter.requires_grad)
    checkpoints = Checkpoints(accelerator, run.folder / "checkpoints", config.keep_checkpoints, ema, batches, frozen)
    start = checkpoints.resume()
    progress = Progress(run, start)
    batch_iterator = iter(batches)

    with progress, _kept_on_failure(run, checkpoints, progress), _stop_signals() as stop:
        for step in range(start, config.steps):
            draws = StepDraws(config, objective, run.config.seed, step, accelerator.process_index, accelerator.device)
            set_learning_rate(optimizer, run.config.optimizer, step, config.steps)
            loss = _accumulate_gradients(run, denoiser, objective, batch_iterator, draws)
            gradient_norm = accelerator.clip_grad_norm_(denoiser.parameters(), run.config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update_parameters(accelerator.unwrap_model(denoiser))

            done = step + 1
            progress.after_step(done, loss, gradient_norm, optimizer.param_groups[0]["lr"])
            for every, call in ((run.config.sampling.every, on_sample), (run.config.hub.push_every, on_push)):
                if call is not None and every and done % every == 0:
                    if accelerator.is_main_process:
                        call(ema.module, done)
                    accelerator.wait_for_everyone()
            stopping = _agree(run, stop, done)
            if stopping or done == config.steps or done % config.checkpoint_every == 0:
                _check_weights(denoiser, done)
                progress.flush()
                checkpoints.save(done)
            if stopping:
                raise SystemExit(f"stopped after step {done}; the same command goes on from there")
    return ema.module


def _prepare(
    run: Run, denoiser: Denoiser, averaged: Denoiser | None, optimizer_state: dict[str, Any] | None
) -> tuple[nn.Module, torch.optim.Optimizer, AveragedModel]:
    """The model and the optimizer on their device, and the running average of the weights (float32)."""
    config, optimizer_config = run.config.training, run.config.optimizer
    denoiser.train()
    if not getattr(denoiser, "peft_config", None):  # adapters have frozen what they are on
        denoiser.requires_grad_(True)
    ema = AveragedModel(denoiser, multi_avg_fn=get_ema_multi_avg_fn(optimizer_config.ema_decay))
    _share_frozen(denoiser, ema.module)
    if averaged is not None:
        ema.module.load_state_dict(averaged.state_dict())
        ema.n_averaged += 1  # or the first update would copy the model
    ema.requires_grad_(False).eval().to(run.accelerator.device)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if config.compile:
        denoiser.compile_repeated_blocks(fullgraph=True)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in denoiser.parameters() if parameter.requires_grad],
        lr=optimizer_config.learning_rate,
        betas=optimizer_config.betas,
        weight_decay=optimizer_config.weight_decay,
        fused=True,  # three times as fast as the default on CPU
    )
    if optimizer_state is not None:
        optimizer.load_state_dict(_fitting(optimizer_state, optimizer))
    denoiser, optimizer = run.accelerator.prepare(denoiser, optimizer)
    return denoiser, optimizer, ema


def _share_frozen(model: nn.Module, copy: nn.Module):
    """Give a copy of a model the model's own frozen weights: one base under the adapters and their average."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            layer, _, own_name = name.rpartition(".")
            setattr(copy.get_submodule(layer), own_name, parameter)


def _fitting(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The moments of an optimizer's state dict whose shapes fit, with the settings of an optimizer."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    moments = {i: values for i, values in state["state"].items() if values["exp_avg"].shape == shapes[i]}
    return {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}


def _check_weights(denoiser: nn.Module, step: int):
    """Raise before spoilt weights replace a good checkpoint."""
    if not all(torch.isfinite(parameter).all() for parameter in denoiser.parameters()):
        raise NonFiniteLossError(f"weights are NaN or infinite after step {step}; it is not saved")


def learning_rate_at(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then constant or a cosine down to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    fraction = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * fraction)).item())


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, steps: int):
    """Set the learning rate of a step; a function of the step alone, so there is no state to resume."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(config, step, steps)


def _accumulate_gradients(
    run: Run, denoiser: nn.Module, objective: Objective, batch_iterator, draws: StepDraws
) -> torch.Tensor:
    """Gradients of one step, summed over its micro-batches; returns the mean loss, on the device."""
    micro_batches, total = run.config.training.gradient_accumulation_steps, 0.0
    for number in range(micro_batches):
        batch = next(batch_iterator).to(run.accelerator.device)
        last = number == micro_batches - 1
        with contextlib.nullcontext() if last else run.accelerator.no_sync(denoiser):
            loss = batch_loss(run.accelerator, denoiser, objective, batch, run.config.text, draws, number)
            run.accelerator.backward(loss / micro_batches)
        total = total + loss.detach() / micro_batches
    return total


def batch_loss(
    accelerator,
    denoiser: nn.Module,
    objective: Objective,
    batch: EncodedBatch,
    text: TextConfig,
    draws: StepDraws,
    number: int = 0,
) -> torch.Tensor:
    """The loss of one micro-batch, a scalar."""
    inner = accelerator.unwrap_model(denoiser)
    timestep, no_semantic, no_control = draws.of_micro_batch(number)
    noise = draws.noise_like(batch.latents)
    conditions = batch_conditions(batch, text, draws.text_noise).only(inner.inputs)
    missing = inner.inputs - {name for name, value in conditions.kwargs().items() if value is not None}
    if missing - {"encoder_attention_mask"}:  # None where every token counts
        raise ValueError(f"the batch lacks {', '.join(sorted(missing))}, which the denoiser reads.")
    conditions = conditions.dropped(no_semantic, no_control, inner.config.num_classes)
    noisy = objective.add_noise(batch.latents, noise, timestep)
    target = objective.target(batch.latents, noise, timestep)
    passes = inner.training_passes(noisy, draws.mask_level, draws.masks)
    loss = 0.0
    for further in passes:
        with accelerator.autocast():
            prediction = denoiser(noisy, timestep, **conditions.kwargs(), **further, return_dict=False)[0]
        prediction = prediction[:, : noisy.shape[1]]  # a learned variance, where there is one, is not trained
        loss = loss + objective_loss(objective, prediction, target, timestep) / len(passes)
    return loss


def batch_conditions(batch: EncodedBatch, text: TextConfig, generator: torch.Generator) -> Conditioning:
    """All that is known of a batch, its text padded."""
    if batch.text is None:
        return Conditioning(class_labels=batch.class_labels, control=batch.control)
    hidden_states, mask = pad_tokens(batch.text, text.padding, text.noise_scale, generator)
    return Conditioning(hidden_states, mask, batch.text.pooled, control=batch.control)


@contextlib.contextmanager
def _kept_on_failure(run: Run, checkpoints: Checkpoints, progress: Progress):
    """Save the last finished step if the run fails. Several processes cannot be trusted to meet there.

    Images that the unfinished step had drawn are not drawn again.
    """
    try:
        yield
    except NonFiniteLossError:  # the weights are spoilt
        raise
    except Exception:
        if run.accelerator.num_processes == 1 and progress.step:
            checkpoints.save(progress.step)
        raise


@contextlib.contextmanager
def _stop_signals():
    """Collects the first interrupt or terminate signal in the list that it yields; a second one ends the process."""
    received, handlers = [], {name: signal.getsignal(name) for name in STOP_SIGNALS}

    def restore():
        for name, handler in handlers.items():
            signal.signal(name, handler)

    def receive(number: int, _):
        received.append(number)
        restore()

    for name in STOP_SIGNALS:
        signal.signal(name, receive)
    try:
        yield received
    finally:
        restore()


def _agree(run: Run, received: list, step: int) -> bool:
    """Whether any process was told to stop; several processes ask one another at log steps only."""
    if run.accelerator.num_processes == 1:
        return bool(received)
    if step % run.config.training.log_every:
        return False
    flag = torch.tensor(float(bool(received)), device=run.accelerator.device)
    return bool(run.accelerator.reduce(flag, "sum").item())
