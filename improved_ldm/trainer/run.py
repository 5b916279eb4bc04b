"""A run: its configuration, its folder, its processes."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

from improved_ldm.trainer.config import SharedConfig
from improved_ldm.trainer.state import check_same_run

EVALUATION_TIME = timedelta(hours=3)  # for which processes wait for the main one


@dataclass(frozen=True)
class Run:
    """What every part of a training script needs to know.

    Args:
        config: the configuration.
        folder: where the run leaves everything.
        accelerator: its processes and precision.
    """

    config: SharedConfig
    folder: Path
    accelerator: Accelerator

    @property
    def images_per_step(self) -> int:
        """Images that all processes see between two updates."""
        training = self.config.training
        return training.batch_size * training.gradient_accumulation_steps * self.accelerator.num_processes

    def say(self, text: str):
        """Print on the main process, above the progress bar."""
        if self.accelerator.is_main_process:
            self.accelerator.print(text)


def start_run(config: SharedConfig) -> Run:
    """Make the run's folder, keep its configuration there and seed the weights.

    Raises:
        ValueError: if the folder holds a run of another configuration.
    """
    folder = Path(config.output_dir)
    check_same_run(config, folder)
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision,
        log_with=list(config.training.trackers) or None,
        project_dir=str(folder / "logs"),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=EVALUATION_TIME)],
    )
    if accelerator.is_main_process:
        write_config(config, folder / "config.yaml")
    accelerator.wait_for_everyone()
    share_cores(accelerator, config.training.cpu_threads)
    set_seed(config.seed)
    return Run(config, folder, accelerator)


def share_cores(accelerator: Accelerator, cpu_threads: int | None):
    """Set the threads that a process computes with where there is no GPU; None shares the cores among them all."""
    if accelerator.device.type == "cpu":  # `accelerate launch` leaves one thread a process
        torch.set_num_threads(cpu_threads or max(1, _free_cores() // accelerator.num_processes))


def write_config(config: SharedConfig, file: Path):
    """Keep a configuration as YAML."""
    file.parent.mkdir(parents=True, exist_ok=True)
    values = config.model_dump(mode="json")
    file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _free_cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed, psutil.cpu_count(logical=False) or allowed)
