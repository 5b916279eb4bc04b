"""A run: its configuration, its folder, its processes."""

import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from tqdm import tqdm

from improved_ldm.output import writing
from improved_ldm.trainer.checkpoints import CONFIG, write_config
from improved_ldm.trainer.config import SharedConfig
from improved_ldm.trainer.launcher import open_accelerator
from improved_ldm.trainer.lock import lock_folder
from improved_ldm.trainer.optimizer import scaled
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.same_run import check_same_processes, check_same_run

EVALUATION_TIME = timedelta(hours=3)  # longest time that processes wait for the main one


@dataclass
class Clock:
    """The time that a run takes, with all its parts: this process, and those whose checkpoints it resumes from.

    Args:
        started: `time.perf_counter()` when this part started.
        earlier: seconds of the earlier parts.
    """

    started: float = field(default_factory=time.perf_counter)
    earlier: float = 0.0

    def seconds(self, started: float | None = None) -> float:
        """Seconds of all parts until now; this part is counted from `started` if that is given."""
        return self.earlier + time.perf_counter() - (self.started if started is None else started)


@dataclass(frozen=True)
class Run:
    """What every part of a training script needs.

    Args:
        config: the configuration.
        folder: folder for everything that the run writes.
        accelerator: its processes and precision.
        stage: number of the stage and of all stages, for messages; empty for a run without stages.
        clock: clock of the time that the run takes.
    """

    config: SharedConfig
    folder: Path
    accelerator: Accelerator
    stage: str = ""
    clock: Clock = field(default_factory=Clock)

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step of all processes."""
        training = self.config.training
        return training.batch_size * training.gradient_accumulation_steps * self.accelerator.num_processes

    def named_step(self, step: int) -> str:
        """A step as messages name it, with the number of steps and the stage."""
        return f"step {step} of {self.config.training.steps}" + f", {self.stage}" * bool(self.stage)

    def say(self, text: str):
        """Print on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text)


def start_run(config: SharedConfig) -> Run:
    """Lock the run's folder, write its configuration there, seed the weights and print the images per step.

    A scaled learning rate is printed as well.

    Raises:
        ValueError: if the folder holds a run with another configuration or another number of processes, the
            launcher contradicts the configuration, or the scaled learning rate does not train.
        OSError: if the folder cannot be written, or another process is training there.
    """
    folder = Path(config.output_dir)
    check_same_run(config, folder)
    accelerator = open_accelerator(
        config.training,
        log_with=list(config.training.trackers) or None,
        project_dir=str(folder / "logs"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=EVALUATION_TIME)],
    )
    check_same_processes(folder, accelerator.num_processes)
    run = Run(config, folder, accelerator)
    peak = scaled(config.optimizer, run.images_per_step).learning_rate
    on_main_process(lambda: _open_folder(run, peak))
    share_cores(accelerator, config.training.cpu_threads)
    set_seed(config.seed)
    return run


def _open_folder(run: Run, learning_rate: float):
    lock_folder(run.folder, run.say)
    with writing(run.folder):
        write_config(run.config.file_values(), run.folder / CONFIG)
    training, processes = run.config.training, run.accelerator.num_processes
    run.say(
        f"{processes} process{'es' * (processes > 1)} × batch {training.batch_size} × accumulation "
        f"{training.gradient_accumulation_steps} = {run.images_per_step} images per step"
    )
    optimizer = run.config.optimizer
    if optimizer.lr_scaling != "none":
        rule = "√" if optimizer.lr_scaling == "sqrt" else ""
        ratio = f"{rule}({run.images_per_step} / {optimizer.lr_base_batch})"
        run.say(f"learning rate {optimizer.learning_rate:g} × {ratio} = {learning_rate:g}")


def share_cores(accelerator: Accelerator, cpu_threads: int | None):
    """Set the threads of a process without a GPU; None shares the cores among all processes."""
    if accelerator.device.type == "cpu":  # `accelerate launch` sets one thread per process
        torch.set_num_threads(cpu_threads or max(1, _free_cores() // accelerator.num_processes))


def _free_cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed, psutil.cpu_count(logical=False) or allowed)
