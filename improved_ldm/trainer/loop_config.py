"""The settings of the training loop that all tasks have."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, ValidationError, WrapValidator, field_validator

from improved_ldm.bounds import BatchSize, Count, CountOrZero, Prefetched, Text, Threads
from improved_ldm.settings import Section
from improved_ldm.trainer.launcher_variables import LAUNCHER_VARIABLES, UNLAUNCHED, launched_with


def _or_as_launched(key: str) -> WrapValidator:
    """Use the launcher's value for a key of `training` that is not given."""

    def check(value, validate: Callable):
        if value is not None:
            return validate(value)
        asked = launched_with(key)
        try:
            return validate(asked or UNLAUNCHED[key])
        except ValidationError as error:
            variable = LAUNCHER_VARIABLES[key]
            raise ValueError(f"{variable} is {asked!r}: {error.errors()[0]['msg']}") from error

    return WrapValidator(check)


class LoopConfig(Section):
    """The training loop."""

    steps: Count = 400_000
    """Optimizer steps."""
    batch_size: BatchSize = 32
    """Images per process and micro-batch."""
    gradient_accumulation_steps: Annotated[BatchSize, _or_as_launched("gradient_accumulation_steps")] = Field(
        None, validate_default=True
    )
    """Micro-batches per step; default: the launcher's value, or 1."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], _or_as_launched("mixed_precision")] = Field(
        None, validate_default=True
    )
    """Mixed precision; default: the launcher's value, or `no`."""
    max_skipped_steps: CountOrZero = 100
    """Largest number of skipped (non-finite) steps in a row before the run stops; at most half of `steps`."""
    log_every: Count = 10
    """Steps between entries in the trackers and the loss curve."""
    checkpoint_every: Count = 5000
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """Number of checkpoints that are kept."""
    trackers: tuple[Text, ...] = ("tensorboard",)
    """Trackers of accelerate: `tensorboard`, `wandb`, …"""
    prefetch: Prefetched = 2
    """Batches that are read and encoded ahead, in a thread of each process; 0 prepares each when it is needed."""
    cpu_threads: Threads | None = None
    """Threads per process without a GPU; by default the processes share the cores."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value):
        return "no" if value is False else value  # YAML 1.1 reads a bare no as false
