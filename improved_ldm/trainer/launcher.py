"""Settings of `accelerate launch` and `accelerate config` in the environment: used, or refused with a reason."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from improved_ldm.trainer.launcher_variables import LAUNCHER_VARIABLES, launched_with
from improved_ldm.trainer.loop_config import LoopConfig

# Variable → option of the launcher. They shard or compile the model, which averaging and checkpoints do not support.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "--use_deepspeed",
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
    "ACCELERATE_DYNAMO_BACKEND": "--dynamo_backend",
}


def open_accelerator(training: LoopConfig | None = None, trains: bool = True, **arguments: Any) -> Accelerator:
    """The accelerator of a script, after a check that the launcher and the configuration agree.

    The training loop divides the loss by the number of micro-batches, so accelerate does not divide it again.

    Args:
        training: configuration of a run; None for a script that leaves the precision to the launcher.
        trains: whether the script trains; one that does not train ignores mixed precision.
        arguments: further arguments of `Accelerator`.

    Raises:
        ValueError: if settings of the launcher are not supported, or contradict the configuration.
    """
    _check_supported(training)
    if training is not None:
        _check_agreement(training)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "1")  # otherwise each process would take itself for the only one
    accelerator = Accelerator(
        mixed_precision=None if training is None else training.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        **arguments,
    )
    if trains and accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        key = "ACCELERATE_MIXED_PRECISION" if training is None else "training.mixed_precision"
        raise ValueError(f"`{key}` is 'fp16', which needs a GPU; on a CPU it must be 'no' or 'bf16'.")
    precision = accelerator.mixed_precision if trains else "no"
    for note in _notes(accelerator, precision, training.gradient_accumulation_steps if training else 1):
        accelerator.print(note)
    return accelerator


def _check_supported(training: LoopConfig | None):
    for variable, option in UNSUPPORTED.items():
        value = os.environ.get(variable, "")
        if value.lower() in ("", "no", "false", "0"):
            continue
        compiles = option == "--dynamo_backend" and hasattr(training, "compile")  # the training of a denoiser can
        instead = "; to compile, use `--training.compile true`" if compiles else ""
        raise ValueError(
            f"`accelerate launch` or `accelerate config` asks for `{option}` ({variable} is {value!r}), which is not "
            f"supported; leave it out{instead}."
        )


def _check_agreement(training: LoopConfig):
    for key, variable in LAUNCHER_VARIABLES.items():
        asked, configured = launched_with(key), getattr(training, key)
        if asked is not None and asked != str(configured):
            raise ValueError(
                f"`training.{key}` is {configured!r}, but `accelerate launch` or `accelerate config` asks for "
                f"{asked!r} ({variable}); make them equal, or leave one of them out."
            )


def _notes(accelerator: Accelerator, precision: str, accumulation: int) -> list[str]:
    """Settings of the launcher that have no effect, one line each."""
    used = {"mixed_precision": precision, "gradient_accumulation_steps": str(accumulation)}
    notes = [
        f"{variable} is {launched_with(key)!r}, which this script does not use: it uses {used[key]!r}."
        for key, variable in LAUNCHER_VARIABLES.items()
        if launched_with(key) not in (None, used[key])
    ]
    asks_for_several = "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if asks_for_several and "WORLD_SIZE" not in os.environ and accelerator.num_processes == 1:
        notes.append(
            "`accelerate launch` is asked for several processes but starts one. On CPUs it starts more with "
            "`ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N`."
        )
    return notes
