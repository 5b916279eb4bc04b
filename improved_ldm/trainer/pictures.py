"""Pictures of a run in its trackers, which take them in different forms."""

from pathlib import Path

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from improved_ldm.trainer.run import Run


def _to_tensorboard(tracker: GeneralTracker, name: str, picture: Image.Image, step: int):
    pixels = np.asarray(picture)[None]  # (1, height, width, 3)
    tracker.log_images({name: pixels}, step=step, dataformats="NHWC")


def _to_wandb(tracker: GeneralTracker, name: str, picture: Image.Image, step: int):
    tracker.log_images({name: [picture]}, step=step)


def _to_trackio(tracker: GeneralTracker, name: str, picture: Image.Image, step: int):
    import trackio

    tracker.log({name: trackio.Image(picture)}, step=step)


LOGGERS = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio}


def say_without_pictures(run: Run):
    """Name the trackers of a run that get its numbers only."""
    without = [name for name in run.config.training.trackers if name not in LOGGERS]
    if without:
        run.say(f"{', '.join(without)} gets numbers but no pictures; {', '.join(LOGGERS)} show the sample grids too")


def track_picture(run: Run, name: str, file: Path, step: int):
    """Log a picture file to the trackers of a run, on the main process."""
    with Image.open(file) as image:
        picture = image.convert("RGB")
    for tracker in run.accelerator.trackers:
        if tracker.name in LOGGERS:
            LOGGERS[tracker.name](tracker, name, picture, step)
