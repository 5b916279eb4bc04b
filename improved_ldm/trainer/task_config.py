"""The configuration that all training runs have, whatever they train."""

from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from pydantic import Field, model_validator

from improved_ldm.bounds import SHAREABLE, Place, Seed
from improved_ldm.settings import Section
from improved_ldm.trainer.data_sections import HeldOutConfig, ImageDataConfig, TransformConfig
from improved_ldm.trainer.loop_config import LoopConfig
from improved_ldm.trainer.optimizer_config import OptimizerConfig


def check_trackers(names: Collection[str]):
    """Raise a ValueError for a tracker that accelerate does not know, or that is not installed."""
    installed = {str(tracker) for tracker in get_available_trackers()}  # not equal to their names
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"`training.trackers` has {name!r}; it may have {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name not in installed:
            raise ValueError(f"`training.trackers` has {name!r}, which is not installed: pip install {name}")


def check_adan():
    """Raise a ValueError if timm, which has Adan, is not installed."""
    if find_spec("timm") is None:
        raise ValueError("`optimizer.name` is adan, which needs timm: pip install timm")


class TaskConfig(Section):
    """Settings of every training run."""

    output_dir: Place
    """Folder for everything that the run writes."""
    seed: Seed = 0
    """Seed of weights, data order, noise and samples."""
    data: ImageDataConfig = ImageDataConfig()
    transform: TransformConfig = TransformConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: LoopConfig = Field(default_factory=LoopConfig)
    validation: HeldOutConfig = HeldOutConfig()

    @model_validator(mode="after")
    def _updates_its_average(self):
        """Refuse a run whose average would stay at the initial weights."""
        if self.optimizer.ema_every > self.training.steps:
            every, steps = self.optimizer.ema_every, self.training.steps
            raise ValueError(
                f"`optimizer.ema_every` is {every}; it must be at most `training.steps`, which is {steps}."
            )
        return self

    def check_given(self, typed: Collection[str], filed: Collection[str]):
        if "training.trackers" in {*typed, *filed}:
            check_trackers(self.training.trackers)
        if self.optimizer.name == "adan":
            check_adan()

    def file_values(self) -> dict[str, Any]:
        """The keys and values to save next to the weights, without local folders, because they may be published."""
        return self.model_dump(mode="json", context=SHAREABLE)
